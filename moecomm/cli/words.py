"""Ranks, nodes, bytes and tables as plain text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise

from moecomm.nodes import Nodes

MOST_NAMES = 8
"""Longer lists of ranks are shortened."""


def text_table(rows: Sequence[Sequence[str]], num_left: int) -> str:
    """Aligned columns: the first num_left to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < num_left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def ranks_in_words(ranks: Sequence[int]) -> str:
    """0, 8, 16 ... 120: all ranks, or where they are many and equally spaced, the first three and the last.

    Many that come in blocks: 0-3, 16-19, 32-35 ... 112-115.
    """
    blocks = list(_blocks(ranks))
    if len(ranks) <= MOST_NAMES or len(blocks) in (1, len(ranks)):
        blocks = [(rank, rank) for rank in ranks]
    names = [str(first) if first == last else f"{first}-{last}" for first, last in blocks]
    steps = {(b[0] - a[0], b[1] - a[1]) for a, b in pairwise(blocks)}
    if len(names) <= MOST_NAMES or len(steps) > 1:
        return ", ".join(names)
    return f"{', '.join(names[:3])} ... {names[-1]}"


def _blocks(ranks: Sequence[int]) -> Iterator[tuple[int, int]]:
    """First and last of each run of neighbouring ranks."""
    first = ranks[0]
    for rank, following in zip(ranks, [*ranks[1:], None], strict=True):
        if following != rank + 1:
            yield first, rank
            first = rank if following is None else following


def nodes_in_words(nodes: Nodes) -> str:
    """16 nodes of 8 ranks; where sizes differ, 2 nodes of 4 ranks and 1 node of 2 ranks."""
    sizes = sorted(Counter(nodes.sizes().tolist()).items(), reverse=True)
    return " and ".join(f"{counted(number, 'node')} of {counted(size, 'rank')}" for size, number in sizes)


def counted(number: int, what: str) -> str:
    """1 node, 2 nodes."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def in_bytes(number: float) -> str:
    """Below 10 KiB in bytes, else to three digits: 3.75 MiB."""
    if number < 10 * 2**10:
        return f"{number:,.0f} B"
    power = next(n for n in (1, 2, 3, 4) if n == 4 or number / 2 ** (10 * n) < 999.5)
    value, unit = number / 2 ** (10 * power), ("KiB", "MiB", "GiB", "TiB")[power - 1]
    return f"{value:,.{2 if value < 9.995 else 1 if value < 99.95 else 0}f} {unit}"
