"""Pyramid-MoE: layers with different numbers of experts, each with its own topology over the same ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

from moecomm.comm import CommLike
from moecomm.groups import Groups, build_groups
from moecomm.topology import Topology
from moecomm.transports import as_comm

Shape = Literal["pyramid", "first-half", "second-half", "standard"]


def pyramid(num_layers: int, num_experts: int, shape: Shape = "pyramid", *, num_wide: int = 2) -> tuple[int, ...]:
    """How many experts each of num_layers MoE layers has; 0: it is dense.

    shape     "standard": num_experts everywhere. "pyramid": twice as many in the last num_wide layers.
              "first-half", "second-half": num_experts in that half, the others dense (the paper's comparison of where
              experts help: in the second)

    pyramid(12, 32) is the paper's 350M+PR-MoE-32/64. Raises ValueError for an unknown shape or impossible numbers.
    Source: DeepSpeed-MoE (arXiv 2201.05596), section 4.1.
    """
    if num_layers < 1 or num_experts < 1 or not 0 <= num_wide <= num_layers:
        raise ValueError(
            f"pyramid: got num_layers {num_layers}, num_experts {num_experts}, num_wide {num_wide}; expected layers "
            f"and experts >= 1, and num_wide 0 .. num_layers"
        )
    half = num_layers // 2
    # The layers that come first, the experts of each of them, and those of each later layer.
    shapes = {
        "standard": (num_layers, num_experts, 0),
        "pyramid": (num_layers - num_wide, num_experts, 2 * num_experts),
        "first-half": (half, num_experts, 0),
        "second-half": (half, 0, num_experts),
    }
    if shape not in shapes:
        raise ValueError(f"pyramid: shape is {shape!r}, expected one of {', '.join(map(repr, shapes))}")
    layers, early, late = shapes[shape]
    return (early,) * layers + (late,) * (num_layers - layers)


def layer_topologies(
    world_size: int,
    num_experts: Sequence[int],
    *,
    expert: int | None = None,
    expert_tensor: int = 1,
    **dense: Any,
) -> list[Topology]:
    """A topology for each layer: its experts spread over as many ranks as can share them, copies over the rest.

    num_experts  of each layer
    expert       the most ranks that may share experts; None: all of a stage (over expert_tensor)
    dense        tensor, pipeline

    {32, 64, 128} experts on 128 ranks are shared by {32, 64, 128} ranks, so that there are {4, 2, 1} copies.
    Raises ValueError for sizes that do not divide the ranks.
    """
    if expert is None:
        expert = Topology(world_size, expert_tensor=expert_tensor, **dense).expert_data
    # A size that does not divide the ranks raises, where its common divisor with the experts might divide them.
    Topology(world_size, expert_tensor=expert_tensor, expert=expert, **dense)
    # A layer with 0 experts, a dense one, gets the size itself.
    sizes = [math.gcd(expert, count) for count in num_experts]
    return [Topology(world_size, expert_tensor=expert_tensor, expert=size, **dense) for size in sizes]


def layer_groups(comm: CommLike, num_experts: Sequence[int], **sizes: Any) -> list[Groups]:
    """The groups of each layer's topology, built once for each different one. Collective over comm.

    sizes  of `layer_topologies`

    Layers of the same topology share their groups.
    """
    comm = as_comm(comm)
    topologies = layer_topologies(comm.size, num_experts, **sizes)
    groups: dict[Topology, Groups] = {}
    for topology in topologies:
        # Groups cost communicators, of which MPI and NCCL have few.
        if topology not in groups:
            groups[topology] = build_groups(comm, topology)
    return [groups[topology] for topology in topologies]
