"""Traffic matrices: how many rows go from rank to rank directly, flat and in the two hops of the hierarchical."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moecomm.arrays import Counts
from moecomm.draw.colors import EDGE, FRAME, INK, MUTED, PAPER, SHADE, ink_on, mixed
from moecomm.draw.hops import nodes_in_words
from moecomm.draw.legend import heading
from moecomm.draw.routes import hop_traffic, row_counts
from moecomm.draw.svg import MARGIN, Box, Canvas, Line, Point, number, pair, text_width
from moecomm.nodes import Nodes

SIDE = 240
"""px that a matrix is wide, where its cells can have a fitting size."""
LARGEST_CELL, SMALLEST_CELL = 44, 3
LEVELS = 32
"""How many shades of cells there are, beside white."""
STAYS = "#afb8c1"
"""What does not move."""


class Totals(NamedTuple):
    """Messages and rows of one exchange: inside nodes, between nodes."""

    messages: tuple[int, int]
    rows: tuple[int, int]


def traffic_svg(nodes: Nodes, counts: Any = None) -> str:
    """Draw which rank sends how many rows to which, as SVG text.

    counts  [p, p]  rows from each source to each destination; None: one for each pair

    Three matrices, sender by receiver: the flat all-to-all, and hop one and hop two of the hierarchical one. The darker
    a cell, the more rows; frames are nodes. Below each, its messages and rows inside nodes and between them.

    Raises ValueError if counts are not p x p whole numbers >= 0.
    """
    rows = row_counts(nodes, counts)
    matrices = {"flat": rows * ~np.eye(len(rows), dtype=bool)}
    matrices["hierarchical, hop 1"], matrices["hierarchical, hop 2"] = hop_traffic(nodes, rows)
    canvas = Canvas(f"Rows from rank to rank, flat and hierarchical, of {nodes_in_words(nodes)}")
    sent = "one row for each pair of ranks" if (rows == 1).all() else f"{rows.sum():,} rows in all"
    y = heading(canvas, "Rows that go from rank to rank directly", f"{nodes_in_words(nodes)}; {sent}")
    most = max(1, *(int(matrix.max()) for matrix in matrices.values()))
    x: float = MARGIN
    for name, matrix in matrices.items():
        drawing = _Matrix(canvas, nodes, (x, y + 6), matrix, most)
        x = drawing.draw(name) + 24
    _draw_scale(canvas, np.unique(np.concatenate([*matrices.values()])), most, canvas.bottom + 14)
    return canvas.svg()


def totals(nodes: Nodes, matrix: Counts) -> Totals:
    """How many messages and rows a [sender, receiver] matrix of rows has inside nodes and between them."""
    inside = nodes.node_of[:, None] == nodes.node_of
    sent = matrix > 0
    return Totals(
        (int(sent[inside].sum()), int(sent[~inside].sum())), (int(matrix[inside].sum()), int(matrix[~inside].sum()))
    )


class _Matrix:
    """One matrix at a place of the canvas. Its ranks are ordered by node."""

    def __init__(self, canvas: Canvas, nodes: Nodes, corner: Point, matrix: Counts, most: int) -> None:
        self.canvas, self.nodes, self.corner, self.most = canvas, nodes, corner, most
        self.order = [rank for group in nodes.ranks for rank in group]
        self.matrix = matrix
        p = len(self.order)
        self.cell = max(SMALLEST_CELL, min(LARGEST_CELL, SIDE // p))
        self.grid = Box(corner[0] + 24, corner[1] + 52, p * self.cell, p * self.cell)

    def draw(self, name: str) -> float:
        """Everything about it. Returns the x right of it."""
        x, y = self.corner
        self.canvas.text((x, y + 13), name, 14, weight=600)
        self.canvas.text((x, y + 31), "from ↓  to →", 11, color=MUTED)
        self._draw_ticks()
        self._draw_cells()
        self._draw_nodes()
        return max(self.grid.right, self._draw_totals())

    def _draw_ticks(self) -> None:
        """The ranks along both sides: all of them, or where cells are small, the first of each node."""
        last = -math.inf
        for rank in self.order if self.cell >= 14 else [group[0] for group in self.nodes.ranks]:
            middle = (self.order.index(rank) + 0.5) * self.cell
            if middle - last >= 14:
                last = middle
                self.canvas.text((self.grid.x + middle, self.grid.y - 5), str(rank), 10, "middle", MUTED)
                self.canvas.text((self.grid.x - 5, self.grid.y + middle + 3.5), str(rank), 10, "end", MUTED)

    def _draw_cells(self) -> None:
        self.canvas.rect(self.grid, PAPER)
        ordered = self.matrix[np.ix_(self.order, self.order)]
        side, places = 0.4 * self.cell, [(i + 0.3) * self.cell for i in range(len(self.order))]
        stay = [block((self.grid.x + place, self.grid.y + place), side, side) for place in places]
        self.canvas.path("".join(stay), STAYS)
        level = level_of(ordered, self.most)
        for each in np.unique(level[level > 0]).tolist():
            self.canvas.path("".join(self._cells(level == each)), shade(each))
        if text_width(f"{self.most:,}", 10) <= self.cell - 3:
            self._draw_numbers(ordered)

    def _draw_numbers(self, ordered: Counts) -> None:
        x, y = self.grid.x + self.cell / 2, self.grid.y + self.cell / 2 + 3.5
        for value in np.unique(ordered[ordered > 0]).tolist():
            middles = [(x + j * self.cell, y + i * self.cell) for i, j in np.argwhere(ordered == value).tolist()]
            self.canvas.marks(middles, f"{value:,}", 10, ink_on(shade(level_of(value, self.most))))

    def _cells(self, where: NDArray[np.bool_]) -> Iterator[str]:
        """The cells that are set. Where they have no gap between them, those of one row run together."""
        gap = 1 if self.cell >= 8 else 0
        for row, columns in enumerate(map(np.flatnonzero, where)):
            for run in np.split(columns, np.flatnonzero(np.diff(columns) > 1 - gap) + 1):
                if len(run):
                    x, y = self.grid.x + run[0] * self.cell + gap / 2, self.grid.y + row * self.cell + gap / 2
                    yield block((x, y), len(run) * self.cell - gap, self.cell - gap)

    def _draw_nodes(self) -> None:
        starts = (np.cumsum(self.nodes.sizes()) - self.nodes.sizes()).tolist()
        x, y, side = self.grid.x, self.grid.y, number(self.grid.width)
        lines = [start * self.cell for start in starts[1:]]
        across = "".join(f"M{number(x)} {number(y + at)}h{side}M{number(x + at)} {number(y)}v{side}" for at in lines)
        self.canvas.path(across, line=Line(FRAME, 0.8))
        self.canvas.rect(self.grid, line=Line(FRAME, 1))
        for start, size in zip(starts, self.nodes.sizes().tolist(), strict=True):
            at, width = start * self.cell, size * self.cell
            self.canvas.rect(Box(x + at, y + at, width, width), line=Line(INK, 1.6))

    def _draw_totals(self) -> float:
        counted = totals(self.nodes, self.matrix)
        x, y = self.corner[0] + 24, self.grid.bottom + 20
        widths = [max(text_width(f"{number:,}", 12, 600) for number in numbers) for numbers in counted]
        widths = [max(widths[0], text_width("messages", 12)), max(widths[1], 46)]
        right = max(self.grid.right, x + text_width("between nodes", 12) + sum(widths) + 28)
        columns = (right - widths[1] - 14, right)
        for column, words in zip(columns, counted._fields, strict=True):
            self.canvas.text((column, y), words, 12, "end", MUTED)
        for i, name in enumerate(("inside nodes", "between nodes")):
            y += 18
            self.canvas.text((x, y), name, 12)
            for column, numbers in zip(columns, counted, strict=True):
                self.canvas.text((column, y), f"{numbers[i]:,}", 12, "end", weight=600)
        return right


def block(corner: Point, width: float, height: float) -> str:
    """A rectangle as a path writes it."""
    return f"M{pair(corner)}h{number(width)}v{number(height)}h{number(-width)}z"


def level_of(rows: Any, most: int) -> Any:
    """How dark cells of so many rows are, where the darkest has `most`: 1 .. LEVELS, and 0 where there are none."""
    return -(-LEVELS * rows // most)


def shade(level: int) -> str:
    """The colour of that level."""
    return mixed(SHADE, 0.14 + 0.86 * level / LEVELS)


def _draw_scale(canvas: Canvas, values: Counts, most: int, y: float) -> None:
    """What the shades mean, and the frames."""
    values = values[values > 0]
    if len(values) > 5:
        values = np.unique(np.linspace(values.min(), most, 5).round().astype(np.int64))
    x: float = MARGIN + 24
    for value in values.tolist():
        x = _sample(canvas, (x, y), shade(level_of(value, most)), f"{value:,} {'row' if value == 1 else 'rows'}")
    canvas.rect(Box(x + 4, y + 5, 6, 6), STAYS)
    x = _sample(canvas, (x, y), "none", "stays on its rank")
    canvas.rect(Box(x, y + 1, 14, 14), PAPER, Line(INK, 1.6))
    canvas.text((x + 20, y + 12.5), "a node", 12)


def _sample(canvas: Canvas, at: Point, fill: str, label: str) -> float:
    canvas.rect(Box(at[0], at[1] + 1, 14, 14), fill, Line(EDGE, 0.8))
    canvas.text((at[0] + 20, at[1] + 12.5), label, 12)
    return at[0] + 20 + text_width(label, 12) + 18
