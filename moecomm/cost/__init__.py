"""What an exchange costs before it is run: messages, bytes, seconds and memory, from a few figures of the machine."""

from moecomm.cost.layouts import (
    Candidate,
    Machine,
    Option,
    RankMemory,
    Sizes,
    Workload,
    candidates,
    expert_seconds,
    layer_options,
    layers_memory,
    layouts,
    pareto_front,
)
from moecomm.cost.links import CPU_NODES, GPU_NODES, Link, Links
from moecomm.cost.measuring import measure
from moecomm.cost.model import Cost, Tokens, predict, predict_groups, predict_lanes, predict_relayed

__all__ = [
    "CPU_NODES",
    "GPU_NODES",
    "Candidate",
    "Cost",
    "Link",
    "Links",
    "Machine",
    "Option",
    "RankMemory",
    "Sizes",
    "Tokens",
    "Workload",
    "candidates",
    "expert_seconds",
    "layer_options",
    "layers_memory",
    "layouts",
    "measure",
    "pareto_front",
    "predict",
    "predict_groups",
    "predict_lanes",
    "predict_relayed",
]
