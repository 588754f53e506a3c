"""Tables and numbers as the commands print them."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import NamedTuple

WIDTH = 80
"""Columns of a terminal."""


class Column(NamedTuple):
    """A column of a table: the lines of its heading, and its cells. Words start on the left, numbers end on the right.

    rank  columns of the highest rank go first where the table is too wide; 0: the column stays
    """

    heading: tuple[str, ...]
    cells: Sequence[str]
    words: bool = False
    rank: int = 0

    def lines(self) -> list[str]:
        """Heading and cells, all of one width."""
        lines = [*self.heading, *self.cells]
        width = max(map(len, lines))
        align = str.ljust if self.words else str.rjust
        return [align(line, width) for line in lines]


def text_table(columns: Sequence[Column], wide: bool) -> str:
    """The columns side by side: all of them, or as many as a terminal has room for."""
    shown = list(columns)
    while True:
        cells = [column.lines() for column in shown]
        lines = ["  ".join(line).rstrip() for line in zip(*cells, strict=True)]
        # Of columns with the same rank the left one goes first.
        least_needed = max(shown, key=lambda column: column.rank)
        fits = wide or max(map(len, lines)) <= WIDTH
        if fits or not least_needed.rank:
            return "\n".join(lines)
        shown.remove(least_needed)


def paragraph(text: str, start: str = "", indent: str = "") -> str:
    """The text in lines that fit. start: before the first line, indent: before all that follow."""
    # A path or a long name is not broken: it can be copied.
    return textwrap.fill(
        text, WIDTH, initial_indent=start, subsequent_indent=indent, break_on_hyphens=False, break_long_words=False
    )


def rounded(value: float) -> str:
    """`value` with three significant digits, without an exponent: 1,230,000; 12.3; 0.00123."""
    if value == 0:
        return "0"
    # The exponent after rounding: 9.999 has that of 10.0.
    _, _, exponent = f"{value:.2e}".partition("e")
    digits = 2 - int(exponent)
    return f"{round(value, digits):,.{max(digits, 0)}f}"


def scaled(value: float, unit: str, base: int = 1000) -> str:
    """`value` with three significant digits and a prefix: 1.23 GB. base 1024: 1.23 GiB."""
    prefixes = ["", "k", "M", "G", "T", "P"] if base == 1000 else ["", "Ki", "Mi", "Gi", "Ti", "Pi"]
    power = 0
    # Half a unit of the third digit early, so that 999.9 becomes 1.00 of the next.
    while value >= 999.5 and power < len(prefixes) - 1:
        value /= base
        power += 1
    return f"{rounded(value)} {prefixes[power]}{unit}".rstrip()
