"""Ranks, nodes and topologies in words: for headings, and for the command line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from itertools import pairwise

from moecomm.nodes import Nodes
from moecomm.topology import Topology


def counted(count: int, thing: str) -> str:
    """1 row, 2 rows."""
    return f"{count:,} {thing}{'s' * (count != 1)}"


def ranks_in_words(ranks: Sequence[int]) -> str:
    """All of them, or where more than 8 are equally spaced, the first three and the last: 0, 8, 16 ... 120."""
    steps = {b - a for a, b in pairwise(ranks)}
    if len(ranks) > 8 and len(steps) == 1:
        return f"{', '.join(map(str, ranks[:3]))} ... {ranks[-1]}"
    return ", ".join(map(str, ranks))


def nodes_in_words(nodes: Nodes) -> str:
    """How many ranks in nodes of which sizes."""
    sizes = sorted(set(nodes.sizes().tolist()), reverse=True)
    words = " and ".join(map(str, sizes))
    return f"{counted(nodes.world_size, 'rank')} on {counted(len(nodes), 'node')} of {words}"


def topology_in_words(topology: Topology) -> str:
    """How a program would make the topology: its sizes, those left out that are the default."""
    arguments = [str(topology.world_size)]
    # world_size is the first field, and has no default
    for field in fields(topology)[1:]:
        size = getattr(topology, field.name)
        if size != field.default:
            arguments.append(f"{field.name}={size!r}")
    return f"Topology({', '.join(arguments)})"
