"""Traffic matrices: how many rows go from rank to rank directly, flat and in the two hops of the hierarchical."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from moecomm.arrays import Counts
from moecomm.draw.svg import FRAME, INK, MARGIN, MUTED, PAPER, Box, Canvas, Key, Point, mixed, text_width
from moecomm.draw.words import counted, nodes_in_words
from moecomm.nodes import Nodes
from moecomm.traffic import Sent, hop_traffic

SIDE = 240
"""px that a matrix is wide, where its cells can have a fitting size."""
SHADE, STAYS, GRID = "#0b4f8a", "#d9cfbb", "#afb8c1"
"""The darkest cell; the diagonal: what does not move; the lines from node to node."""


def traffic_svg(nodes: Nodes, counts: Any = None) -> str:
    """Draw which rank sends how many rows to which, as SVG text.

    counts  [p, p]  rows from each source to each destination; None: one for each pair

    Three matrices, sender by receiver: the flat all-to-all, and hop one and hop two of the hierarchical one. The darker
    a cell, the more rows; frames are nodes. Below each, its messages and rows inside nodes and between them.

    Raises ValueError if counts are not p x p whole numbers >= 0.
    """
    rows = row_counts(nodes, counts)
    sent = "one row for each pair of ranks" if (rows == 1).all() else f"{counted(int(rows.sum()), 'row')} in all"
    canvas = Canvas("Rows that go from rank to rank directly", f"{nodes_in_words(nodes)}; {sent}")
    matrices = {"flat": rows * ~np.eye(len(rows), dtype=bool)}
    matrices["hierarchical, hop 1"], matrices["hierarchical, hop 2"] = hop_traffic(nodes, rows)
    most = max(1, *(int(matrix.max()) for matrix in matrices.values()))
    x, y = float(MARGIN), canvas.bottom + 24
    for name, matrix in matrices.items():
        canvas.text((x, y), name, 14, bold=True)
        canvas.text((x, y + 18), "from ↓ to →", 11, color=MUTED)
        grid = _draw_matrix(canvas, nodes, matrix, most, (x + 26, y + 38))
        _draw_totals(canvas, nodes, matrix, (grid.x, grid.y + grid.height + 20))
        x = 24 + grid.x + max(grid.width, SIDE)
    values = np.unique(list(matrices.values()))[1:]
    if len(values) > 5:
        values = np.unique(np.linspace(values[0], most, 5).round().astype(np.int64))
    keys = [Key(counted(value, "row"), FRAME, shade(value, most)) for value in values.tolist()]
    canvas.legend([*keys, Key("stays on its rank", FRAME, STAYS), Key("a node", INK, PAPER)])
    return canvas.svg()


def row_counts(nodes: Nodes, counts: Any) -> Counts:
    """`counts` as int64 [p, p]; None: one row for each pair. Raises ValueError if they are something else."""
    p = nodes.world_size
    array = np.ones((p, p), np.int64) if counts is None else np.asarray(counts)
    if array.shape != (p, p) or array.dtype.kind not in "iu" or (array < 0).any():
        raise ValueError(f"counts is {array.dtype} {array.shape}, expected ({p}, {p}) whole numbers >= 0 for {p} ranks")
    return array.astype(np.int64)


def shade(rows: int, most: int) -> str:
    """The colour of cells of so many rows, where the darkest have `most`."""
    return mixed(SHADE, 0.14 + 0.86 * rows / most)


def _draw_matrix(canvas: Canvas, nodes: Nodes, matrix: Counts, most: int, corner: Point) -> Box:
    """Cells, and the ranks along both sides in the order of their nodes. Returns where the cells are."""
    order = [rank for node in nodes.ranks for rank in node]
    cell = max(3, min(44, SIDE // len(order)))
    grid = Box(*corner, cell * len(order), cell * len(order))
    canvas.rect(grid, PAPER)
    for i in range(0, len(order), math.ceil(text_width(str(len(order)), 10) / cell)):
        middle = (i + 0.5) * cell
        canvas.text((grid.x + middle, grid.y - 5), str(order[i]), 10, "middle", MUTED)
        canvas.text((grid.x - 5, grid.y + middle + 3.5), str(order[i]), 10, "end", MUTED)
    ordered = matrix[np.ix_(order, order)] - np.eye(len(order), dtype=np.int64)  # -1: stays
    gap, fits = int(cell >= 8), text_width(f"{most:,}", 10) <= cell - 2
    for value in np.unique(ordered[ordered != 0]).tolist():
        corners = [(grid.x + j * cell + gap / 2, grid.y + i * cell + gap / 2) for i, j in np.argwhere(ordered == value)]
        fill, words = (shade(value, most), f"{value:,}") if value > 0 else (STAYS, "")
        canvas.cells(corners, cell - gap, fill, words if fits else "")
    widths = nodes.sizes() * cell
    frames = list(zip((np.cumsum(widths) - widths).tolist(), widths.tolist(), strict=True))
    for at, width in frames:
        canvas.rect(Box(grid.x + at, grid.y, width, grid.height), "none", GRID)
        canvas.rect(Box(grid.x, grid.y + at, grid.width, width), "none", GRID)
    for at, width in frames:
        canvas.rect(Box(grid.x + at, grid.y + at, width, width), "none", INK)
    return grid


def _draw_totals(canvas: Canvas, nodes: Nodes, matrix: Counts, corner: Point) -> None:
    """The messages and rows of all ranks as a table."""
    sent, every = Sent(nodes), np.arange(len(matrix))
    sent.add(every, every, matrix)
    totals = zip(("inside nodes", "between nodes"), sent.messages.sum(axis=0), sent.rows.sum(axis=0), strict=True)
    table = [("total", "messages", "rows"), *((name, f"{m:,}", f"{r:,.0f}") for name, m, r in totals)]
    for line, words in enumerate(table):
        for cell, at, anchor in zip(words, (0, SIDE - 70, SIDE), ("start", "end", "end"), strict=True):
            canvas.text((corner[0] + at, corner[1] + 18 * line), cell, 12, anchor, bold=line > 0 and at > 0)
