"""The groups of a topology along any axes: boxes are ranks, frames are nodes, the colour is the group."""

from __future__ import annotations

from moecomm.draw.svg import MARGIN, PALE, Box, Canvas, Key, color_of, mixed
from moecomm.draw.words import counted, topology_in_words
from moecomm.nodes import Nodes
from moecomm.topology import Topology

SIDE, PITCH = 40, 46
"""px of the box of a rank, and from one to the next."""
HEADER, PAD, SPACE = 24, 10, 14
"""px of a frame above its ranks, of a frame around them, and between frames."""
LONGEST_ROW, WIDEST = 16, 860
"""Ranks in a row of a frame, and px of frames side by side, at most."""


def topology_svg(topology: Topology, *axes: str, ranks_per_node: int | None = None) -> str:
    """Draw the groups of `topology` along the axes, as SVG text.

    axes            as in Topology.groups
    ranks_per_node  nodes are blocks of so many ranks; None: one frame around all ranks

    The colour of a rank and the small name under its number are its group's.

    Raises ValueError for axes that do not go together.
    """
    groups = topology.groups(*axes)
    subtitle = f"{counted(len(groups), 'group')} of {len(groups[0])} along {' x '.join(axes)}"
    each = "" if ranks_per_node is None else f"; a frame is a node of {ranks_per_node}"
    canvas = Canvas(topology_in_words(topology), subtitle + each)
    _draw_ranks(canvas, groups, ranks_per_node)
    keys = []
    for i, group in enumerate(groups):
        shown = group if len(group) <= 8 else [*group[:3], "…", group[-1]]
        keys.append(Key(f"g{i}: {', '.join(map(str, shown))}", color_of(i), mixed(color_of(i), share_of(i))))
    canvas.legend(keys)
    return canvas.svg()


def share_of(group: int) -> float:
    """How much of its colour fills a group's ranks: little, and much in every other round of the palette."""
    return PALE if group // 8 % 2 == 0 else 0.8


def _draw_ranks(canvas: Canvas, groups: list[list[int]], ranks_per_node: int | None) -> None:
    """The frames from left to right and then downward, the ranks in them the same way."""
    group_of = {rank: i for i, group in enumerate(groups) for rank in group}
    nodes = Nodes.of_size(len(group_of) if ranks_per_node is None else ranks_per_node, len(group_of))
    per_row = min(len(nodes.ranks[0]), LONGEST_ROW)
    width = per_row * PITCH - (PITCH - SIDE) + 2 * PAD
    height = HEADER + -(-len(nodes.ranks[0]) // per_row) * PITCH - (PITCH - SIDE) + PAD
    per_line = max(1, WIDEST // (width + SPACE))
    top = canvas.bottom + SPACE
    for node, ranks in enumerate(nodes.ranks):
        x, y = MARGIN + node % per_line * (width + SPACE), top + node // per_line * (height + SPACE)
        canvas.frame(Box(x, y, width, height), "all ranks" if ranks_per_node is None else f"node {node}")
        for i, rank in enumerate(ranks):
            box = Box(x + PAD + i % per_row * PITCH, y + HEADER + i // per_row * PITCH, SIDE, SIDE)
            group = group_of[rank]
            canvas.rank(box, rank, color_of(group), share_of(group), f"g{group}")
