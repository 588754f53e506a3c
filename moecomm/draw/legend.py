"""What pictures have around them: a heading, keys, and bars that count messages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from moecomm.draw.colors import INK, MUTED, PAPER
from moecomm.draw.svg import MARGIN, Box, Canvas, Line, text_width

SWATCH = 26
"""px that the sample before a key takes."""


class Key(NamedTuple):
    """One entry of a legend: a sample and what it means. The sample is an arrow, or a box where `line` is None."""

    label: str
    fill: str = PAPER
    line: Line | None = None


class Bar(NamedTuple):
    """A row of squares, one a message: parts (how many, their colour), and words to say at its end."""

    label: str
    parts: Sequence[tuple[int, str]]
    words: str


def heading(canvas: Canvas, title: str, subtitle: str) -> float:
    """Title and subtitle at the top left. Returns the y below them."""
    canvas.text((MARGIN, MARGIN + 16), title, 17, weight=600)
    canvas.text((MARGIN, MARGIN + 38), subtitle, 13, color=MUTED)
    return MARGIN + 52


def legend(canvas: Canvas, keys: Sequence[Key], y: float) -> float:
    """The keys below each other. Returns the y below them."""
    for key in keys:
        _sample(canvas, key, MARGIN, y)
        canvas.text((MARGIN + SWATCH + 8, y + 14), key.label, 13)
        y += 24
    return y


def _sample(canvas: Canvas, key: Key, x: float, y: float) -> None:
    if key.line:
        canvas.route([(x, y + 9.5), (x + SWATCH, y + 9.5)], key.line)
    else:
        canvas.rect(Box(x + 4, y + 2, SWATCH - 8, 15), key.fill, Line(INK, 0.8), radius=3)


def bars(canvas: Canvas, title: str, rows: Sequence[Bar], y: float) -> float:
    """A title and the bars below it, all of one scale. Returns the y below them."""
    canvas.text((MARGIN, y + 14), title, 13, color=MUTED)
    start = MARGIN + 12 + max(text_width(bar.label, 13, 600) for bar in rows)
    longest = max(1, *(sum(count for count, _ in bar.parts) for bar in rows))
    cell = min(16.0, 420 / longest)
    for bar in rows:
        y += 24
        canvas.text((MARGIN, y + 14), bar.label, 13, weight=600)
        x = start
        for count, color in bar.parts:
            for i in range(count):
                canvas.rect(Box(x + i * cell, y + 3, cell * 0.85, 13), color)
            x += count * cell
        canvas.text((x + 8, y + 14), bar.words, 13)
    return y + 24
