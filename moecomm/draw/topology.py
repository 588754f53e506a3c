"""The groups of a topology along any axes: boxes are ranks, frames are nodes, the colour is the group."""

from __future__ import annotations

from moecomm.draw.svg import MARGIN, PALE, PALETTE, Box, Canvas, Key, color_of, mixed
from moecomm.draw.words import counted, topology_in_words
from moecomm.nodes import Nodes
from moecomm.topology import Topology

# All lengths are in px. The box of a rank, and the distance from one box to the next:
SIDE = 40
PITCH = 46
# A frame above its ranks, a frame around them, and the space between frames:
HEADER = 24
PAD = 10
SPACE = 14
LONGEST_ROW = 16
"""Ranks in a row of a frame at most."""
WIDEST = 860
"""Width of frames side by side at most."""


def topology_svg(topology: Topology, *axes: str, ranks_per_node: int | None = None) -> str:
    """Draw the groups of `topology` along the axes, as SVG text.

    axes            as in Topology.groups
    ranks_per_node  nodes are blocks of so many ranks; None: one frame around all ranks

    The colour of a rank and the small name under its number are its group's.

    Raises ValueError for axes that do not go together.
    """
    groups = topology.groups(*axes)
    num_groups = counted(len(groups), "group")
    subtitle = f"{num_groups} of {len(groups[0])} along {' x '.join(axes)}"
    if ranks_per_node is not None:
        subtitle += f"; a frame is a node of {ranks_per_node}"
    canvas = Canvas(topology_in_words(topology), subtitle)
    _draw_ranks(canvas, groups, ranks_per_node)
    keys = []
    for i, group in enumerate(groups):
        members = list(map(str, group))
        if len(group) > 8:
            members[3:-1] = "…"
        color = color_of(i)
        fill = mixed(color, share_of(i))
        keys.append(Key(f"g{i}: {', '.join(members)}", color, fill))
    canvas.legend(keys)
    return canvas.svg()


def share_of(group: int) -> float:
    """How much of its colour fills a group's ranks: little, and much in every other round of the palette."""
    return PALE if group // len(PALETTE) % 2 == 0 else 0.8


def _draw_ranks(canvas: Canvas, groups: list[list[int]], ranks_per_node: int | None) -> None:
    """Draw the frames from left to right and then downward, and the ranks in each frame the same way."""
    group_of = {rank: i for i, group in enumerate(groups) for rank in group}
    p = len(group_of)
    size = p if ranks_per_node is None else ranks_per_node
    nodes = Nodes.of_size(size, p)
    # The first node has most ranks: all frames are as large as its frame, so that they are aligned.
    size = len(nodes.ranks[0])
    columns = min(size, LONGEST_ROW)
    rows = -(-size // columns)
    gap = PITCH - SIDE
    width = columns * PITCH - gap + 2 * PAD
    height = HEADER + rows * PITCH - gap + PAD
    frames_in_row = max(1, WIDEST // (width + SPACE))
    top = canvas.bottom + SPACE
    for node, ranks in enumerate(nodes.ranks):
        row, column = divmod(node, frames_in_row)
        x = MARGIN + column * (width + SPACE)
        y = top + row * (height + SPACE)
        frame = Box(x, y, width, height)
        name = "all ranks" if ranks_per_node is None else f"node {node}"
        canvas.frame(frame, name)
        for i, rank in enumerate(ranks):
            row, column = divmod(i, columns)
            corner = frame.at(PAD + column * PITCH, HEADER + row * PITCH)
            box = Box(*corner, SIDE, SIDE)
            group = group_of[rank]
            canvas.rank(box, rank, color_of(group), share_of(group), f"g{group}")
