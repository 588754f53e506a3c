"""Mixture-of-Students: a smaller PR-MoE model learns from a trained one, for a while. python -m moecomm.distill --help.

Source: DeepSpeed-MoE (arXiv 2201.05596), section 4.2. Needs torch: pip install 'moecomm[train]'.
"""

from moecomm.distill.loss import distillation_loss, divergence
from moecomm.distill.schedule import Schedule
from moecomm.distill.student import kept_layers, start_from, student_config
from moecomm.distill.teacher import CachedTeacher, ModelTeacher, Teacher
from moecomm.distill.trainer import Distiller

__all__ = [
    "CachedTeacher",
    "Distiller",
    "ModelTeacher",
    "Schedule",
    "Teacher",
    "distillation_loss",
    "divergence",
    "kept_layers",
    "start_from",
    "student_config",
]
