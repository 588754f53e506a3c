"""The groups of a topology along any axes: boxes are ranks, frames are nodes, the colour is the group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, fields
from typing import NamedTuple

from moecomm.draw.colors import FRAME, MUTED, color_of, ink_on, mixed
from moecomm.draw.legend import heading
from moecomm.draw.svg import MARGIN, Box, Canvas, Line, text_width
from moecomm.nodes import Nodes
from moecomm.topology import Topology

WIDTH, HEIGHT, GAP = 40, 40, 6
"""px of the box of a rank, and between two."""
WIDEST, SPACE = 860, 14
"""px that frames side by side fill before the next go below, and between two."""
MOST_KEYS = 16


class Frame(NamedTuple):
    """The frame of a node: at most how many ranks it has, in rows of how many, px above them and around them."""

    num_ranks: int
    longest_row: int
    header: int
    pad: int

    @property
    def per_row(self) -> int:
        """Ranks in a row."""
        return min(self.num_ranks, self.longest_row)

    @property
    def width(self) -> int:
        """px from edge to edge."""
        return self.per_row * (WIDTH + GAP) - GAP + 2 * self.pad

    @property
    def height(self) -> int:
        """px from edge to edge."""
        return self.header + -(-self.num_ranks // self.per_row) * (HEIGHT + GAP) - GAP + self.pad


def topology_svg(topology: Topology, *axes: str, ranks_per_node: int | None = None) -> str:
    """Draw the groups of `topology` along the axes, as SVG text.

    axes            as in Topology.groups
    ranks_per_node  nodes are blocks of so many ranks; None: no nodes are drawn

    The colour of a rank and the small name under its number are its group's.

    Raises ValueError for axes that do not go together.
    """
    groups = topology.groups(*axes)
    group_of = {rank: i for i, group in enumerate(groups) for rank in group}
    along = " x ".join(axes)
    canvas = Canvas(f"{in_words(topology)} along {along}")
    size = len(groups[0])
    counted = f"{len(groups)} {'group' if len(groups) == 1 else 'groups'} of {size} along {along}"
    if ranks_per_node is None:
        nodes, frame = Nodes.of_size(topology.world_size, topology.world_size), Frame(topology.world_size, 16, 0, 0)
    else:
        nodes = Nodes.of_size(ranks_per_node, topology.world_size)
        frame = Frame(len(nodes.ranks[0]), 8, 24, 10)
        counted += f"; a frame is a node of {ranks_per_node}"
    y = heading(canvas, in_words(topology), counted)
    bottom = _draw_nodes(canvas, nodes, frame, group_of, y + 6)
    _list_groups(canvas, groups, bottom + 16)
    return canvas.svg()


def in_words(topology: Topology) -> str:
    """How a program would make the topology: its sizes, those left out that are the default."""
    sizes = [(field, getattr(topology, field.name)) for field in fields(topology) if field.default is not MISSING]
    changed = [f", {field.name}={size!r}" for field, size in sizes if size != field.default]
    return f"Topology({topology.world_size}{''.join(changed)})"


def _draw_nodes(canvas: Canvas, nodes: Nodes, frame: Frame, group_of: dict[int, int], top: float) -> float:
    """All ranks, in frames from left to right and then downward. Returns the y below them."""
    fitting = max(1, WIDEST // (frame.width + SPACE))
    lines = -(-len(nodes) // fitting)
    per_line = -(-len(nodes) // lines)
    for node, ranks in enumerate(nodes.ranks):
        x = MARGIN + node % per_line * (frame.width + SPACE)
        y = top + node // per_line * (frame.height + SPACE)
        if frame.header:
            canvas.rect(Box(x, y, frame.width, frame.height), "#f6f8fa", Line(FRAME), radius=6)
            canvas.text((x + frame.pad, y + 17), f"node {node}", 13, color=MUTED, weight=600)
        for i, rank in enumerate(ranks):
            column, row = i % frame.per_row, i // frame.per_row
            at = x + frame.pad + column * (WIDTH + GAP), y + frame.header + row * (HEIGHT + GAP)
            _draw_rank(canvas, rank, group_of[rank], at)
    return top + lines * (frame.height + SPACE) - SPACE


def _draw_rank(canvas: Canvas, rank: int, group: int, at: tuple[float, float]) -> None:
    box = Box(*at, WIDTH, HEIGHT)
    canvas.rect(box, fill_of(group), Line(color_of(group), 1.6), radius=4, about=f"rank {rank}, group {group}")
    ink = ink_on(fill_of(group))
    canvas.text((box.center[0], box.y + 18), str(rank), 14, "middle", ink, 600)
    canvas.text((box.center[0], box.y + 33), f"g{group}", 11, "middle", ink)


def fill_of(group: int) -> str:
    """The fill of a group's ranks: pale, and strong in every other round of the palette."""
    return mixed(color_of(group), 0.2 if group // 8 % 2 == 0 else 0.8)


def _list_groups(canvas: Canvas, groups: Sequence[Sequence[int]], y: float) -> None:
    """The ranks of each group, in as many columns as there is room for."""
    shown = groups if len(groups) <= MOST_KEYS else groups[: MOST_KEYS - 1]
    labels = [f"g{i}: {ranks_in_words(group)}" for i, group in enumerate(shown)]
    width = max(text_width(label, 13) for label in labels) + 50
    columns = max(1, int(max(canvas.right - MARGIN, 500) // width))
    rows = -(-len(labels) // columns)
    for i, label in enumerate(labels):
        x, line = MARGIN + i // rows * width, y + i % rows * 22
        canvas.rect(Box(x, line + 1, 18, 15), fill_of(i), Line(color_of(i), 1.6), radius=3)
        canvas.text((x + 26, line + 13), label, 13)
    if len(shown) < len(groups):
        canvas.text((MARGIN, y + rows * 22 + 13), f"and {len(groups) - len(shown)} more", 13, color=MUTED)


def ranks_in_words(ranks: Sequence[int]) -> str:
    """The ranks of a group: all, or where there are many, the first and the last."""
    if len(ranks) <= 8:
        return ", ".join(map(str, ranks))
    return f"{', '.join(map(str, ranks[:3]))}, … {ranks[-1]}"
