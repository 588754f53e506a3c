"""Groups: the Comms of a topology, and the one rule that needs two of them."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

from moecomm.arrays import Array, as_dtype, sum_dtype
from moecomm.comm import Comm
from moecomm.failures import collective, refused
from moecomm.identity import Identity
from moecomm.nodes import Nodes
from moecomm.topology import Topology


@dataclass(frozen=True, eq=False)
class Groups(Identity):
    """One rank's group along every axis of a topology. Made by `build_groups`."""

    topology: Topology
    world: Comm
    pipeline: Comm
    data: Comm
    """Ranks with the same dense weights and other tokens; also called lane."""
    tensor: Comm
    """Ranks with the same tokens and slices of the dense weights."""
    expert: Comm
    """Ranks that share the experts."""
    expert_data: Comm
    """Ranks with the same experts."""
    expert_tensor: Comm
    """Ranks with slices of the same experts."""
    expert_lane: Comm
    """The ranks of `expert` with this one's tensor rank: all that it talks to in a TensorParallelExchange."""

    def free(self) -> None:
        """Give back every group but world. Collective over world."""
        for axis in AXES:
            getattr(self, axis).free()


AXES = ("pipeline", "data", "tensor", "expert", "expert_data", "expert_tensor", "expert_lane")


def build_groups(comm: Comm, topology: Topology, nodes: Nodes | None = None) -> Groups:
    """Split `comm` along every axis of `topology`. Collective over comm; nothing else in moecomm splits the world.

    comm   all ranks: topology.world_size of them
    nodes  where the ranks are; None: as Nodes.discover finds them

    Warns, on rank 0, if a tensor group spans nodes: its all-reduces and all-gathers would cross the network.
    Raises ValueError, on every rank, if the topology has another size or differs among the ranks.
    """
    with collective("build_groups", comm):
        comm.agree("build_groups: topology", repr(topology))
        if topology.world_size != comm.size:
            raise refused(
                ValueError(
                    f"build_groups: topology has {topology.world_size} ranks, expected {comm.size}{comm.where()}"
                )
            )
        nodes = Nodes.discover(comm) if nodes is None else nodes
        spanning = [group for group in topology.groups("tensor") if len(set(nodes.node_of[group].tolist())) > 1]
        if spanning and comm.rank == 0:
            num_groups = comm.size // topology.tensor
            warnings.warn(
                f"build_groups: {len(spanning)} of {num_groups} tensor groups span nodes, {spanning[0]} is the first; "
                f"put tensor={topology.tensor} ranks on one node",
                stacklevel=2,
            )
        return Groups(topology, comm, *(comm.split(_color(topology, axis, comm.rank)) for axis in AXES))


def _color(topology: Topology, axis: str, rank: int) -> int:
    """The lowest rank of the group: unique among the groups of an axis."""
    return topology.group_of(rank, axis)[0]


def reduce_expert_gradient(gradient: Array, groups: Groups) -> Array:
    """The gradient of an expert's weight for the mean loss over all data-parallel ranks. Collective over expert_data.

    gradient  this rank's, of the mean loss over its own tokens

    Summed over the ranks that hold the expert and divided by the *full* data-parallel size, not by their number: an
    expert sees the tokens of all data-parallel ranks, whatever the expert-parallel size is, so its gradient must not
    depend on it. (DeepSpeed's were `expert` times too large until its v0.14.1 and v0.15.4.)
    """
    mean = as_dtype(gradient, sum_dtype(gradient)) / groups.topology.data  # first: the sum may be too large for 16 bits
    return as_dtype(groups.expert_data.all_reduce(mean), gradient.dtype)
