"""A small canvas that writes SVG as text. The same calls give the same bytes; the panel grows with what is drawn."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple
from xml.sax.saxutils import escape

MARGIN = 20
"""px between what is drawn and the edge of the panel."""
INK, MUTED, FRAME, PAPER = "#1f2328", "#59636e", "#8c959f", "#ffffff"
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#b3569b", "#c98a00", "#3fa3d9", "#882255", "#6b6b6b")
"""Okabe and Ito's, which colour-blind readers can tell apart, the light ones darkened for thin lines."""
PALE = 0.18
"""How much of its colour fills the box of a rank, where nothing else is meant."""

Point = tuple[float, float]


class Box(NamedTuple):
    """A rectangle in px; y runs downward."""

    x: float
    y: float
    width: float
    height: float

    @property
    def center(self) -> Point:
        return self.x + self.width / 2, self.y + self.height / 2


class Key(NamedTuple):
    """One entry of a legend: what it means, and the sample: a box, or an arrow if there is no fill."""

    label: str
    color: str
    fill: str = ""
    dashed: bool = False


class Canvas:
    """A white panel with a heading, as large as what is drawn on it, back to front, and a margin."""

    def __init__(self, title: str, subtitle: str) -> None:
        self.about = f"{title}: {subtitle}"
        self.parts: list[str] = []
        self.right = self.bottom = 0.0
        self.text((MARGIN, MARGIN + 16), title, 17, bold=True)
        self.text((MARGIN, MARGIN + 38), subtitle, color=MUTED)

    def rect(self, box: Box, fill: str, color: str = "none", radius: int = 0, about: str = "") -> None:
        """A rectangle. color: its edge. about: what it stands for, shown when the pointer rests on it."""
        x, y, width, height = map(number, box)
        place = f'x="{x}" y="{y}" width="{width}" height="{height}" rx="{radius}"'
        self._add("rect", f'{place} fill="{fill}" stroke="{color}" stroke-width="1.3"', about)
        self._reach(box.x + box.width, box.y + box.height)

    def text(
        self, at: Point, words: str, size: int = 13, anchor: str = "start", color: str = INK, bold: bool = False
    ) -> None:
        """Words whose base line starts, has its middle or ends at the point: anchor start, middle or end."""
        look = f'text-anchor="{anchor}" fill="{color}"' + ' font-weight="600"' * bold
        self.parts.append(f'<text {_place(at)} font-size="{size}" {look}>{escape(words)}</text>')
        share = {"start": 1.0, "middle": 0.5, "end": 0.0}[anchor]
        self._reach(at[0] + share * text_width(words, size), at[1] + 0.25 * size)

    def arrow(self, points: Sequence[Point], color: str, dashed: bool = False, about: str = "") -> None:
        """An arrow along the points, each right of, left of, above or below the one before; its corners are round."""
        end, (x, y) = points[-1], _toward(points[-1], points[-2], 8)
        dx, dy = (end[0] - x) * 0.45, (end[1] - y) * 0.45
        path = [f"M{_pair(points[0])}"]
        for before, here, after in zip(points, points[1:], points[2:], strict=False):
            path.append(f"L{_pair(_toward(here, before, 5))}Q{_pair(here)} {_pair(_toward(here, after, 5))}")
        path.append(f"L{_pair(_toward(end, points[-2], 6))}")  # inside the head
        look = f'fill="none" stroke="{color}" stroke-width="1.8"' + ' stroke-dasharray="5 3"' * dashed
        self._add("path", f'd="{"".join(path)}" {look}', about)
        self._add("path", f'd="M{_pair(end)}L{_pair((x - dy, y + dx))}L{_pair((x + dy, y - dx))}Z" fill="{color}"')

    def cells(self, corners: Sequence[Point], side: float, fill: str, words: str = "") -> None:
        """Many squares with the same words in the middle, inside what else is drawn."""
        square = f"h{number(side)}v{number(side)}h{number(-side)}z"
        self._add("path", f'd="{"".join(f"M{_pair(corner)}{square}" for corner in corners)}" fill="{fill}"')
        if words:
            texts = [f"<text {_place((x + side / 2, y + side / 2 + 3.5))}>{words}</text>" for x, y in corners]
            self.parts.append(f'<g font-size="10" text-anchor="middle" fill="{ink_on(fill)}">{"".join(texts)}</g>')

    def frame(self, box: Box, label: str) -> None:
        """A frame that ranks are put in, and its name at the top left."""
        self.rect(box, "#f6f8fa", FRAME, radius=6)
        self.text((box.x + 10, box.y + 18), label, color=MUTED, bold=True)

    def rank(self, box: Box, rank: int, color: str, share: float, note: str = "") -> None:
        """The box of a rank. share: how much of the colour fills it, 0 .. 1. note: small below the number."""
        fill, (x, y) = mixed(color, share), box.center
        self.rect(box, fill, color, radius=4, about=f"rank {rank} {note}".strip())
        self.text((x, y - 2 if note else y + 5), str(rank), 14, "middle", ink_on(fill), bold=True)
        if note:
            self.text((x, y + 13), note, 11, "middle", ink_on(fill))

    def legend(self, keys: Sequence[Key]) -> None:
        """The keys below all else, in as many columns as there is room for."""
        width, top = 56 + max((text_width(key.label) for key in keys), default=0), self.bottom + 16
        columns = max(1, int(max(self.right, 600) // width))
        for i, key in enumerate(keys):
            x, y = MARGIN + i % columns * width, top + i // columns * 24
            if key.fill:
                self.rect(Box(x, y, 18, 15), key.fill, key.color, radius=2)
            else:
                self.arrow([(x, y + 8), (x + 26, y + 8)], key.color, key.dashed)
            self.text((x + (26 if key.fill else 34), y + 12.5), key.label)

    def svg(self) -> str:
        """The whole picture."""
        width, height = math.ceil(self.right + MARGIN), math.ceil(self.bottom + MARGIN)
        look = f'viewBox="0 0 {width} {height}" font-family="Helvetica, Arial, sans-serif" role="img"'
        start = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" {look}>'
        panel = (
            f'<rect x="0.5" y="0.5" width="{width - 1}" height="{height - 1}" rx="8" fill="{PAPER}" stroke="#d1d9e0"/>'
        )
        return "\n".join([start, f"<title>{escape(self.about)}</title>", panel, *self.parts, "</svg>\n"])

    def _add(self, tag: str, attributes: str, about: str = "") -> None:
        self.parts.append(f"<{tag} {attributes}" + (f"><title>{about}</title></{tag}>" if about else "/>"))

    def _reach(self, right: float, bottom: float) -> None:
        self.right, self.bottom = max(self.right, right), max(self.bottom, bottom)


def text_width(words: str, size: int = 13) -> float:
    """About how many px wide the words come out, in the widest of the usual sans-serif fonts."""
    return 0.64 * size * len(words)


def color_of(index: int) -> str:
    """The colour of the index-th thing; they come round again after eight."""
    return PALETTE[index % len(PALETTE)]


def mixed(color: str, share: float) -> str:
    """`share` of the colour, 0 .. 1, on white."""
    return "#" + "".join(f"{round(255 * (1 - share * (1 - part))):02x}" for part in _parts(color))


def ink_on(fill: str) -> str:
    """Black or white, whichever shows better on `fill`."""
    red, green, blue = _parts(fill)
    return INK if 0.21 * red**2.2 + 0.72 * green**2.2 + 0.07 * blue**2.2 > 0.2 else PAPER


def number(value: float) -> str:
    """`value` with at most one decimal, the same on every machine."""
    return f"{round(value, 1):g}"


def _parts(color: str) -> list[float]:
    return [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]


def _pair(point: Point) -> str:
    return f"{number(point[0])} {number(point[1])}"


def _place(point: Point) -> str:
    return f'x="{number(point[0])}" y="{number(point[1])}"'


def _toward(start: Point, end: Point, distance: float) -> Point:
    """The point `distance` px from `start` on the way to `end`."""
    share = distance / math.dist(start, end)
    return start[0] + share * (end[0] - start[0]), start[1] + share * (end[1] - start[1])
