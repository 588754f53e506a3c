"""What an exchange costs before it is run: messages, bytes and seconds, from a few figures of the machine."""

from moecomm.cost.links import CPU_NODES, GPU_NODES, Link, Links
from moecomm.cost.measuring import measure
from moecomm.cost.model import Cost, predict, predict_group, predict_lanes

__all__ = ["CPU_NODES", "GPU_NODES", "Cost", "Link", "Links", "measure", "predict", "predict_group", "predict_lanes"]
