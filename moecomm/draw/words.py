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


def ranks_in_words(ranks: Sequence[int], width: int = 0) -> str:
    """All of them, or where more than 8 are equally spaced, the first three and the last: 0, 8, 16 ... 120.

    width  characters that there is room for, if not 0: as many of the first ranks as fit, and the last
    """
    steps = {b - a for a, b in pairwise(ranks)}
    is_progression = len(steps) == 1
    shown = len(ranks)
    words = ", ".join(map(str, ranks))
    # Three are enough to see the step.
    if len(ranks) > 8 and is_progression:
        shown = 3
        words = _shortened(ranks, shown)
    # The gap stands for two ranks at least, and each shown takes a character or more.
    shown = min(shown, len(ranks) - 1, width) if width else shown
    while width and len(words) > width and shown > 1:
        shown -= 1
        words = _shortened(ranks, shown)
    return words


def _shortened(ranks: Sequence[int], shown: int) -> str:
    beginning = ", ".join(map(str, ranks[:shown]))
    return f"{beginning} ... {ranks[-1]}"


def nodes_in_words(nodes: Nodes) -> str:
    """How many ranks in nodes of which sizes."""
    sizes = sorted(set(nodes.sizes().tolist()), reverse=True)
    words = " and ".join(map(str, sizes))
    ranks = counted(nodes.world_size, "rank")
    return f"{ranks} on {counted(len(nodes), 'node')} of {words}"


def topology_in_words(topology: Topology) -> str:
    """How a program would make the topology: its sizes, those left out that are the default."""
    arguments = [str(topology.world_size)]
    # world_size is the first field, and has no default
    for field in fields(topology)[1:]:
        size = getattr(topology, field.name)
        if size != field.default:
            arguments.append(f"{field.name}={size!r}")
    return f"Topology({', '.join(arguments)})"


def layout_in_words(topologies: Sequence[Topology]) -> str:
    """The sizes of the topologies of a model's layers, in short: EP 8, TP 2; EP 32/64, spread."""
    experts = [topology.expert for topology in topologies]
    words = [f"EP {_joined(experts)}"]
    # These are 1 in most layouts, and then say nothing.
    for name, size in (("TP", "tensor"), ("ETP", "expert_tensor")):
        sizes = [getattr(topology, size) for topology in topologies]
        if max(sizes) > 1:
            words.append(f"{name} {_joined(sizes)}")
    names = {"expert": "near", "expert_data": "spread"}
    placements = [names[topology.inner] for topology in topologies]
    if "spread" in placements:
        words.append(_joined(placements))
    return ", ".join(words)


def _joined(sizes: Sequence[object]) -> str:
    """32/64, or 32 where all are equal."""
    if len(set(sizes)) == 1:
        sizes = sizes[:1]
    return "/".join(map(str, sizes))
