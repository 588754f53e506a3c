"""Charts of the documentation: points on two logarithmic axes, drawn with the library's own canvas, byte-stable."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

from moecomm.draw.svg import INK, MARGIN, MUTED, Box, Canvas, Key, Point, color_of

PLOT = Box(90, 98, 640, 360)
GRID = "#e3e7eb"


class Axis(NamedTuple):
    """A logarithmic axis: from the first mark to the last."""

    name: str
    marks: Sequence[float]
    words: Callable[[float], str]

    def share(self, value: float) -> float:
        """How far along the axis, 0 .. 1."""
        first, last = math.log(self.marks[0]), math.log(self.marks[-1])
        return (math.log(value) - first) / (last - first)


class Linear(Axis):
    """An axis with even steps."""

    def share(self, value: float) -> float:
        """How far along the axis, 0 .. 1."""
        return (value - self.marks[0]) / (self.marks[-1] - self.marks[0])


class Chart:
    """Axes, and what is put into them: curves or dots, each kind with a colour and an entry in the legend."""

    def __init__(self, title: str, subtitle: str, x: Axis, y: Axis) -> None:
        self.canvas = Canvas(title, subtitle)
        self.x, self.y = x, y
        self.keys: list[Key] = []
        for mark in x.marks:
            at = PLOT.x + x.share(mark) * PLOT.width
            self.canvas.rect(Box(at, PLOT.y, 0.5, PLOT.height), GRID)
            self.canvas.text((at, PLOT.y + PLOT.height + 20), x.words(mark), 12, "middle")
        for mark in y.marks:
            at = PLOT.y + (1 - y.share(mark)) * PLOT.height
            self.canvas.rect(Box(PLOT.x, at, PLOT.width, 0.5), GRID)
            self.canvas.text((PLOT.x - 8, at + 4), y.words(mark), 12, "end")
        self.canvas.text((PLOT.x + PLOT.width / 2, PLOT.y + PLOT.height + 42), x.name, color=MUTED, anchor="middle")
        self.canvas.text((MARGIN, PLOT.y - 13), y.name, color=MUTED)

    def curve(self, name: str, points: Sequence[Point]) -> None:
        """Dots, and lines between them."""
        color = self._key(name)
        places = [self._place(point) for point in points]
        for before, after in pairwise(places):
            self._segment(before, after, color)
        self._dots(places, color)

    def scatter(self, name: str, points: Sequence[Point]) -> None:
        """Dots alone."""
        self._dots([self._place(point) for point in points], self._key(name))

    def band(self, name: str, points: Sequence[Point], low: Sequence[Point], high: Sequence[Point]) -> None:
        """A line, and an area of its colour from `low` to `high` behind it."""
        color = self._key(name)
        edge = [f"{x:.1f} {y:.1f}" for x, y in map(self._place, [*high, *reversed(low)])]
        self.canvas.parts.append(f'<path d="M{"L".join(edge)}Z" fill="{color}" fill-opacity="0.15"/>')
        for before, after in pairwise(map(self._place, points)):
            self._segment(before, after, color)

    def line(self, start: Point, end: Point) -> None:
        """A grey line from point to point."""
        self._segment(self._place(start), self._place(end), MUTED)

    def svg(self) -> str:
        """The whole picture."""
        self.canvas.legend(self.keys)
        return self.canvas.svg()

    def _key(self, name: str) -> str:
        color = color_of(len(self.keys))
        self.keys.append(Key(name, INK, color))
        return color

    def _place(self, point: Point) -> Point:
        x, y = self.x.share(point[0]), self.y.share(point[1])
        return PLOT.x + x * PLOT.width, PLOT.y + (1 - y) * PLOT.height

    def _segment(self, start: Point, end: Point, color: str) -> None:
        path = f"M{start[0]:.1f} {start[1]:.1f}L{end[0]:.1f} {end[1]:.1f}"
        self.canvas.parts.append(f'<path d="{path}" fill="none" stroke="{color}" stroke-width="1.8"/>')

    def _dots(self, places: Sequence[Point], color: str) -> None:
        for x, y in places:
            self.canvas.rect(Box(x - 3, y - 3, 6, 6), color, INK, radius=3)
