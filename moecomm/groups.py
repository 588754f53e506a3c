"""Groups: the Comms of a topology, and how the gradient of an expert is averaged over two of them."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, fields

import numpy as np

from moecomm.arrays import Array, as_dtype, sum_dtype
from moecomm.comm import Comm, CommLike
from moecomm.failures import collective, refused
from moecomm.identity import Identity
from moecomm.nodes import Nodes
from moecomm.topology import AXES, Topology
from moecomm.transports import as_comm


@dataclass(frozen=True, eq=False)
class Groups(Identity):
    """One rank's group along each axis of a topology. Made by `build_groups`."""

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
    """The ranks of `expert` with the same tensor rank: the only peers in a TensorParallelExchange."""

    def free(self) -> None:
        """Give back each group but world. Collective over world."""
        for axis in SPLIT_AXES:
            getattr(self, axis).free()


# lane has the groups of data: a second Comm over the same ranks would cost a communicator and serve nothing.
SPLIT_AXES = tuple(field.name for field in fields(Groups) if field.name in AXES)
"""The axes along which `build_groups` splits the world, in the order in which all ranks split it."""


def build_groups(comm: CommLike, topology: Topology, nodes: Nodes | None = None) -> Groups:
    """Split `comm` along each axis of `topology`. Collective over comm; nothing else in moecomm splits the world.

    comm   all ranks: topology.world_size of them
    nodes  where the ranks are; None: what Nodes.discover returns

    Warns, on rank 0, if a tensor group spans nodes: its all-reduces and all-gathers would cross the network.
    Raises ValueError, on all ranks, if the topology has another size or differs among the ranks.
    """
    comm = as_comm(comm)
    with collective("build_groups", comm):
        comm.agree("build_groups: topology", repr(topology))
        if topology.world_size != comm.size:
            raise refused(
                ValueError(
                    f"build_groups: topology has {topology.world_size} ranks, expected {comm.size}{comm.where()}"
                )
            )
        if nodes is None:
            nodes = Nodes.discover(comm)
        spanning = [group for group in topology.groups("tensor") if len(np.unique(nodes.node_of[group])) > 1]
        if spanning and comm.rank == 0:
            num_groups = comm.size // topology.tensor
            warnings.warn(
                f"build_groups: {len(spanning)} of {num_groups} tensor groups span nodes, {spanning[0]} is the first; "
                f"put tensor={topology.tensor} ranks on one node",
                stacklevel=2,
            )
        # The lowest rank of a group is a color that no other group along the axis has.
        colors = [topology.group_of(comm.rank, axis)[0] for axis in SPLIT_AXES]
        return Groups(topology, comm, *map(comm.split, colors))


def reduce_expert_gradient(gradient: Array, groups: Groups) -> Array:
    """The gradient of an expert's weight for the mean loss over all data-parallel ranks. Collective over expert_data.

    gradient  of this rank, for the mean loss over its own tokens

    Summed over the ranks that hold the expert and divided by the *full* data-parallel size, not by their number: an
    expert sees the tokens of all data-parallel ranks, whatever the expert-parallel size is, so its gradient must not
    depend on it. (DeepSpeed's were `expert` times too large until its v0.14.1 and v0.15.4.)
    """
    wide = as_dtype(gradient, sum_dtype(gradient))
    # Divided before the sum, which may be too large for a 16-bit type.
    mean = wide / groups.topology.data
    return as_dtype(groups.expert_data.all_reduce(mean), gradient.dtype)
