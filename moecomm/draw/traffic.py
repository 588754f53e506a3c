"""Traffic matrices: how many rows go from rank to rank directly, flat and in the two hops of the hierarchical."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

from moecomm.arrays import Counts
from moecomm.draw.svg import (
    FRAME,
    INK,
    MARGIN,
    MUTED,
    PAPER,
    Box,
    Canvas,
    Key,
    Point,
    mixed,
    text_width,
)
from moecomm.draw.words import counted, nodes_in_words
from moecomm.nodes import Nodes
from moecomm.traffic import Rows, directly, hop_traffic

SIDE = 240
"""Width in px of a matrix whose cells fit into it."""
SHADE = "#0b4f8a"
"""The darkest cell."""
STAYS = "#d9cfbb"
"""The diagonal: rows that do not move."""
GRID = "#afb8c1"
"""The lines from node to node."""
MAX_SHADES = 5
"""Shades in the legend at most."""


def traffic_svg(nodes: Nodes, counts: ArrayLike | None = None) -> str:
    """Draw which rank sends how many rows to which, as SVG text.

    counts  [p, p]  rows from each source to each destination; None: one for each pair

    Three matrices, sender by receiver: the flat all-to-all, and hop one and hop two of the hierarchical one. The darker
    a cell, the more rows; frames are nodes. Below each, its messages and rows inside nodes and between them.

    Raises ValueError if counts are not p x p whole numbers >= 0.
    """
    rows = row_counts(nodes, counts)
    total = f"{counted(int(rows.sum()), 'row')} in all"
    if (rows == 1).all():
        total = "one row for each pair of ranks"
    title = "Rows that go from rank to rank directly"
    canvas = Canvas(title, f"{nodes_in_words(nodes)}; {total}")
    hop_one, hop_two = hop_traffic(nodes, rows)
    # Rows that stay on their rank are no traffic.
    off_diagonal = rows * ~np.eye(len(rows), dtype=bool)
    matrices = {
        "flat": off_diagonal,
        "hierarchical, hop 1": hop_one,
        "hierarchical, hop 2": hop_two,
    }
    # One scale for all three, so that equal shades are equal counts.
    most = max(1, *(int(matrix.max()) for matrix in matrices.values()))
    x = float(MARGIN)
    y = canvas.bottom + 24
    for name, matrix in matrices.items():
        canvas.text((x, y), name, 14, bold=True)
        canvas.text((x, y + 18), "from ↓ to →", 11, color=MUTED)
        corner = (x + 26, y + 38)
        grid = _draw_matrix(canvas, nodes, matrix, most, corner)
        below = grid.at(0, grid.height + 20)
        _draw_totals(canvas, nodes, matrix, below)
        x = grid.x + max(grid.width, SIDE) + 24
    values = np.unique(list(matrices.values()))
    canvas.legend(_keys(values, most))
    return canvas.svg()


def row_counts(nodes: Nodes, counts: ArrayLike | None) -> Counts:
    """`counts` as int64 [p, p]; None: one row for each pair. Raises ValueError if they are something else."""
    p = nodes.world_size
    if counts is None:
        return np.ones((p, p), np.int64)
    array = np.asarray(counts)
    if array.shape != (p, p) or array.dtype.kind not in "iu" or (array < 0).any():
        raise ValueError(f"counts is {array.dtype} {array.shape}, expected ({p}, {p}) whole numbers >= 0 for {p} ranks")
    return array.astype(np.int64)


def shade(rows: int, most: int) -> str:
    """The colour of cells of so many rows, where the darkest have `most`."""
    return mixed(SHADE, 0.14 + 0.86 * rows / most)


def _keys(values: Rows, most: int) -> list[Key]:
    # values[0] is 0, the diagonal, which has a key of its own
    shown = values[1:]
    if len(shown) > MAX_SHADES:
        evenly = np.linspace(shown[0], most, MAX_SHADES)
        shown = np.unique(evenly.round().astype(np.int64))
    keys = []
    for value in shown.tolist():
        name = counted(value, "row")
        keys.append(Key(name, FRAME, shade(value, most)))
    keys.append(Key("stays on its rank", FRAME, STAYS))
    keys.append(Key("a node", INK, PAPER))
    return keys


def _draw_matrix(canvas: Canvas, nodes: Nodes, matrix: Rows, most: int, corner: Point) -> Box:
    """Draw the cells, and the ranks along both sides, by node. Returns where the cells are."""
    # Ranks of a node are neighbours in the picture, also where their numbers are not.
    order = [rank for node in nodes.ranks for rank in node]
    p = len(order)
    cell = max(3, min(44, SIDE // p))
    grid = Box(*corner, cell * p, cell * p)
    canvas.rect(grid, PAPER)
    # As many rank numbers as fit beside one another.
    step = math.ceil(text_width(str(p), 10) / cell)
    for i in range(0, p, step):
        middle = (i + 0.5) * cell
        rank = str(order[i])
        above = grid.at(middle, -5)
        beside = grid.at(-5, middle + 3.5)
        canvas.text(above, rank, 10, "middle", MUTED)
        canvas.text(beside, rank, 10, "end", MUTED)
    # -1 marks the diagonal: no count is negative, and 0 is an empty cell
    by_node = matrix[np.ix_(order, order)]
    marked = by_node - np.eye(p, dtype=np.int64)
    gap = int(cell >= 8)
    labelled = text_width(f"{most:,}", 10) <= cell - 2
    # One path for all cells of a value keeps the file small: a large world has thousands of equal cells.
    side = cell - gap
    for value in np.unique(marked[marked != 0]).tolist():
        places = np.argwhere(marked == value) * cell + gap / 2
        corners = [grid.at(x, y) for y, x in places]
        if value < 0:
            canvas.cells(corners, side, STAYS)
            continue
        words = f"{value:,}" if labelled else ""
        canvas.cells(corners, side, shade(value, most), words)
    _draw_nodes(canvas, grid, (nodes.sizes() * cell).tolist())
    return grid


def _draw_nodes(canvas: Canvas, grid: Box, widths: list[int]) -> None:
    """Draw lines from node to node, and a frame around the cells of each node."""
    frames = []
    x = grid.x
    y = grid.y
    for width in widths:
        column = Box(x, grid.y, width, grid.height)
        row = Box(grid.x, y, grid.width, width)
        canvas.rect(column, "none", GRID)
        canvas.rect(row, "none", GRID)
        frames.append(Box(x, y, width, width))
        x += width
        y += width
    # The frames come on top: the lines of the next node would cover their edges.
    for frame in frames:
        canvas.rect(frame, "none", INK)


def _draw_totals(canvas: Canvas, nodes: Nodes, matrix: Rows, corner: Point) -> None:
    """Draw the messages and rows of all ranks as a table."""
    sent = directly(nodes, matrix)
    messages = sent.messages.sum(axis=0)
    rows = sent.rows.sum(axis=0)
    table = [("total", "messages", "rows")]
    for column, name in enumerate(("inside nodes", "between nodes")):
        num_messages = f"{messages[column]:,}"
        num_rows = f"{rows[column]:,.0f}"
        table.append((name, num_messages, num_rows))
    x, y = corner
    for line, (name, *numbers) in enumerate(table):
        base = y + 18 * line
        canvas.text((x, base), name, 12)
        # The heading is not bold.
        bold = line > 0
        for right, words in zip((SIDE - 70, SIDE), numbers, strict=True):
            canvas.text((x + right, base), words, 12, "end", bold=bold)
