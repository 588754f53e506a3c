"""A small canvas that writes SVG as text. The same calls give the same bytes; nothing is drawn outside its panel."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple
from xml.sax.saxutils import escape

from moecomm.draw.colors import EDGE, INK, PAPER

FONT = "Helvetica, Arial, sans-serif"
MARGIN = 20
"""px between what is drawn and the edge of the panel."""

WIDTHS = {
    "ijlI'.,:;| ": 0.34,
    "frt()[]-/": 0.42,
    "ABCEFHKLNPRSTUVXYZ": 0.74,
    "wDGOQM+=<>": 0.86,
    "mW%@→↓…": 1.0,
}
"""Widths of characters in em, of the widest of the usual sans-serif fonts."""
EM = {char: width for chars, width in WIDTHS.items() for char in chars}

Point = tuple[float, float]


class Box(NamedTuple):
    """A rectangle in px; y runs downward."""

    x: float
    y: float
    width: float
    height: float

    @property
    def right(self) -> float:
        """x of the right edge."""
        return self.x + self.width

    @property
    def bottom(self) -> float:
        """y of the lower edge."""
        return self.y + self.height

    @property
    def center(self) -> Point:
        """The middle."""
        return self.x + self.width / 2, self.y + self.height / 2

    def grown(self, by: float) -> Box:
        """The box with `by` px more on every side."""
        return Box(self.x - by, self.y - by, self.width + 2 * by, self.height + 2 * by)


class Line(NamedTuple):
    """How a line looks: its colour, its width in px, and its dashes ("": none)."""

    color: str
    width: float = 1
    dash: str = ""

    def attributes(self) -> str:
        """As SVG writes it."""
        dash = f' stroke-dasharray="{self.dash}"' if self.dash else ""
        return f'stroke="{self.color}" stroke-width="{number(self.width)}"{dash}'


class Canvas:
    """A white panel as large as what is drawn on it, back to front, and a margin.

    title  what a screen reader says in place of the picture
    """

    def __init__(self, title: str) -> None:
        self.title = title
        self.parts: list[str] = []
        self.right = self.bottom = 0.0

    def rect(self, box: Box, fill: str = "none", line: Line | None = None, radius: float = 0, about: str = "") -> None:
        """A rectangle. about: what it stands for, shown when the pointer rests on it."""
        corner = f' rx="{number(radius)}"' if radius else ""
        stroke = f" {line.attributes()}" if line else ""
        x, y, width, height = map(number, box)
        place = f'x="{x}" y="{y}" width="{width}" height="{height}"{corner}'
        self._add(f'<rect {place} fill="{fill}"{stroke}', about, "rect")
        self._reach(box.right, box.bottom)

    def text(
        self, at: Point, words: str, size: float = 13, anchor: str = "start", color: str = INK, weight: int = 400
    ) -> None:
        """Words whose base line starts, has its middle or ends at the point: anchor start, middle or end."""
        look = f' text-anchor="{anchor}"' * (anchor != "start") + f' font-weight="{weight}"' * (weight != 400)
        place = f'x="{number(at[0])}" y="{number(at[1])}" font-size="{number(size)}"'
        self.parts.append(f'<text {place}{look} fill="{color}">{escape(words)}</text>')
        share = {"start": 1.0, "middle": 0.5, "end": 0.0}[anchor]
        self._reach(at[0] + share * text_width(words, size, weight), at[1] + 0.25 * size)

    def marks(self, points: Sequence[Point], words: str, size: float, color: str) -> None:
        """The same words in the middle of many places, inside what else is drawn."""
        self.parts.append(f'<g font-size="{number(size)}" text-anchor="middle" fill="{color}">')
        self.parts += [f'<text x="{number(x)}" y="{number(y)}">{escape(words)}</text>' for x, y in points]
        self.parts.append("</g>")

    def route(self, points: Sequence[Point], line: Line, about: str = "", corner: float = 5) -> None:
        """An arrow along the points with round corners. Its head is at the last one."""
        back = toward(points[-1], points[-2], 6)  # the line ends inside the head
        path = rounded([*points[:-1], back], corner)
        self._add(f'<path d="{path}" fill="none" {line.attributes()}', about, "path")
        self.head(points[-2], points[-1], line.color)
        self._reach(max(x for x, _ in points), max(y for _, y in points))

    def head(self, start: Point, end: Point, color: str) -> None:
        """The head of an arrow that comes from `start` and ends at `end`."""
        x, y = toward(end, start, 8)
        dx, dy = (end[0] - x) / 8 * 3.6, (end[1] - y) / 8 * 3.6
        tips = (end, (x - dy, y + dx), (x + dy, y - dx))
        self.parts.append(f'<path d="M{"L".join(pair(tip) for tip in tips)}Z" fill="{color}"/>')

    def path(self, d: str, fill: str = "none", line: Line | None = None) -> None:
        """A path in SVG's own words, inside what else is drawn."""
        self.parts.append(f'<path d="{d}" fill="{fill}"{" " + line.attributes() if line else ""}/>')

    def svg(self) -> str:
        """The whole picture."""
        width, height = math.ceil(self.right + MARGIN), math.ceil(self.bottom + MARGIN)
        panel = f'width="{width - 1}" height="{height - 1}" rx="8" fill="{PAPER}" stroke="{EDGE}"'
        return "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}"'
                f' viewBox="0 0 {width} {height}" font-family="{FONT}" role="img">',
                f"<title>{escape(self.title)}</title>",
                f'<rect x="0.5" y="0.5" {panel}/>',
                *self.parts,
                "</svg>\n",
            ]
        )

    def _add(self, start: str, about: str, tag: str) -> None:
        self.parts.append(f"{start}><title>{escape(about)}</title></{tag}>" if about else f"{start}/>")

    def _reach(self, right: float, bottom: float) -> None:
        self.right, self.bottom = max(self.right, right), max(self.bottom, bottom)


def text_width(words: str, size: float, weight: int = 400) -> float:
    """At most how many px wide the words come out."""
    return sum(EM.get(char, 0.66) for char in words) * size * (1.12 if weight > 400 else 1)


def number(value: float) -> str:
    """`value` with at most one decimal, the same on every machine."""
    tenths = round(value * 10)
    return str(tenths // 10) if tenths % 10 == 0 else f"{tenths / 10:.1f}"


def pair(point: Point) -> str:
    """A point as a path writes it."""
    return f"{number(point[0])} {number(point[1])}"


def toward(start: Point, end: Point, distance: float) -> Point:
    """The point `distance` px from `start` on the way to `end`."""
    dx, dy = end[0] - start[0], end[1] - start[1]
    share = distance / (math.hypot(dx, dy) or 1)
    return start[0] + share * dx, start[1] + share * dy


def rounded(points: Sequence[Point], corner: float) -> str:
    """The path along the points, its corners rounded by `corner` px or as much as there is room for."""
    path = [f"M{pair(points[0])}"]
    for before, here, after in zip(points, points[1:], points[2:], strict=False):
        radius = min(corner, math.dist(before, here) / 2, math.dist(here, after) / 2)
        path.append(f"L{pair(toward(here, before, radius))}Q{pair(here)} {pair(toward(here, after, radius))}")
    return "".join([*path, f"L{pair(points[-1])}"])
