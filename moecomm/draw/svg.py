"""A small canvas that writes SVG as text. The same calls give the same bytes; the panel grows with what is drawn."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple
from xml.sax.saxutils import escape

MARGIN = 20
"""px between what is drawn and the edge of the panel."""
DARK = "@media (prefers-color-scheme: dark) {svg {filter: invert(0.92) hue-rotate(180deg)}}"
"""Where the page is dark, so is the panel. The hues stay: one palette serves both."""
INK = "#1f2328"
MUTED = "#59636e"
FRAME = "#8c959f"
PAPER = "#ffffff"
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#b3569b", "#c98a00", "#3fa3d9", "#882255", "#6b6b6b")
"""Okabe and Ito's, which colour-blind readers can tell apart, the light ones darkened for thin lines."""
PALE = 0.18
"""How much of its colour fills the box of a rank, where the fill has no other meaning."""

Point = tuple[float, float]


class Box(NamedTuple):
    """A rectangle in px; y runs downward."""

    x: float
    y: float
    width: float
    height: float

    @property
    def center(self) -> Point:
        return self.at(self.width / 2, self.height / 2)

    def at(self, x: float, y: float) -> Point:
        """The point x px to the right of the top left corner and y px below it."""
        return self.x + x, self.y + y

    def meets(self, box: Box) -> bool:
        """Whether the two share an area."""
        left = max(self.x, box.x)
        right = min(self.x + self.width, box.x + box.width)
        top = max(self.y, box.y)
        bottom = min(self.y + self.height, box.y + box.height)
        return left < right and top < bottom


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
        self.right = 0.0
        self.bottom = 0.0
        heading = (MARGIN, MARGIN + 16)
        below = (MARGIN, MARGIN + 38)
        self.text(heading, title, 17, bold=True)
        self.text(below, subtitle, color=MUTED)

    def rect(self, box: Box, fill: str, color: str = "none", radius: int = 0, about: str = "") -> None:
        """A rectangle. color: its edge. about: what it stands for, shown when the pointer rests on it."""
        x, y, width, height = map(number, box)
        place = f'x="{x}" y="{y}" width="{width}" height="{height}" rx="{radius}"'
        paint = f'fill="{fill}" stroke="{color}" stroke-width="1.3"'
        self._add("rect", f"{place} {paint}", about)
        self._grow(box.x + box.width, box.y + box.height)

    def text(
        self, at: Point, words: str, size: int = 13, anchor: str = "start", color: str = INK, bold: bool = False
    ) -> None:
        """Words whose base line starts, has its middle or ends at the point: anchor start, middle or end."""
        style = f'font-size="{size}" text-anchor="{anchor}" fill="{color}"'
        if bold:
            style += ' font-weight="600"'
        self.parts.append(f"<text {_place(at)} {style}>{escape(words)}</text>")
        # The panel must hold the text in any font that a viewer may choose, so its width is an estimate from above.
        share = {"start": 1.0, "middle": 0.5, "end": 0.0}[anchor]
        x, y = at
        width = text_width(words, size)
        # Letters such as p reach below the base line.
        self._grow(x + share * width, y + 0.25 * size)

    def line(self, points: Sequence[Point], color: str, width: float) -> None:
        """Straight from point to point, within a box drawn before: the panel does not grow."""
        path = "L".join(map(_pair, points))
        paint = f'fill="none" stroke="{color}" stroke-width="{width}"'
        self._add("path", f'd="M{path}" {paint}')

    def arrow(self, points: Sequence[Point], color: str, dashed: bool = False, about: str = "") -> None:
        """An arrow with round corners along the points, each right of, left of, above or below the previous point."""
        tip = points[-1]
        corner = points[-2]
        path = f"M{_pair(points[0])}"
        # A corner is a curve that begins and ends a little before and after it.
        for start, turn, end in zip(points, points[1:], points[2:], strict=False):
            begin = _toward(turn, start, 5)
            path += f"L{_pair(begin)}"
            finish = _toward(turn, end, 5)
            path += f"Q{_pair(turn)} {_pair(finish)}"
        # The line ends inside the head: its blunt end would be wider than the tip.
        inside_head = _toward(tip, corner, 6)
        path += f"L{_pair(inside_head)}"
        paint = f'fill="none" stroke="{color}" stroke-width="1.8"'
        if dashed:
            paint += ' stroke-dasharray="5 3"'
        self._add("path", f'd="{path}" {paint}', about)
        # The head is a triangle, 8 px long. Its base is at a right angle to the arrow.
        x, y = _toward(tip, corner, 8)
        tip_x, tip_y = tip
        dx = (tip_x - x) * 0.45
        dy = (tip_y - y) * 0.45
        left = _pair((x - dy, y + dx))
        right = _pair((x + dy, y - dx))
        head = f"M{_pair(tip)}L{left}L{right}Z"
        self._add("path", f'd="{head}" fill="{color}"')

    def cells(self, corners: Sequence[Point], side: float, fill: str, words: str = "") -> None:
        """Many squares with the same words in the middle, within a box drawn before: the panel does not grow."""
        length = number(side)
        square = f"h{length}v{length}h{number(-side)}z"
        path = "".join(f"M{_pair(corner)}{square}" for corner in corners)
        self._add("path", f'd="{path}" fill="{fill}"')
        if not words:
            return
        # The base line is below the middle by about half the height of a digit.
        middle = side / 2
        base = middle + 3.5
        texts = ""
        for x, y in corners:
            texts += f"<text {_place((x + middle, y + base))}>{words}</text>"
        style = f'font-size="10" text-anchor="middle" fill="{ink_on(fill)}"'
        self.parts.append(f"<g {style}>{texts}</g>")

    def frame(self, box: Box, label: str) -> None:
        """A frame that ranks are put in, and its name at the top left."""
        self.rect(box, "#f6f8fa", FRAME, radius=6)
        self.text(box.at(10, 18), label, color=MUTED, bold=True)

    def rank(self, box: Box, rank: int, color: str, share: float, note: str = "") -> None:
        """The box of a rank. share: how much of the colour fills it, 0 .. 1. note: small below the number."""
        fill = mixed(color, share)
        ink = ink_on(fill)
        x, y = box.center
        about = f"rank {rank} {note}".strip()
        self.rect(box, fill, color, radius=4, about=about)
        # The number makes room for a note below it.
        base = y - 2 if note else y + 5
        self.text((x, base), str(rank), 14, "middle", ink, bold=True)
        if note:
            self.text((x, y + 13), note, 11, "middle", ink)

    def legend(self, keys: Sequence[Key]) -> None:
        """The keys below the picture, in as many columns as there is room for."""
        widest = max((text_width(key.label) for key in keys), default=0)
        width = widest + 56
        top = self.bottom + 16
        # A narrow picture has room for more columns than its width: its heading is wider.
        columns = max(1, int(max(self.right, 600) // width))
        for i, key in enumerate(keys):
            row, column = divmod(i, columns)
            x = MARGIN + column * width
            y = top + row * 24
            if key.fill:
                sample = Box(x, y, 18, 15)
                self.rect(sample, key.fill, key.color, radius=2)
                label = x + 26
            else:
                line = [(x, y + 8), (x + 26, y + 8)]
                self.arrow(line, key.color, key.dashed)
                label = x + 34
            self.text((label, y + 12.5), key.label)

    def svg(self) -> str:
        """The picture as text."""
        width = math.ceil(self.right + MARGIN)
        height = math.ceil(self.bottom + MARGIN)
        size = f'width="{width}" height="{height}" viewBox="0 0 {width} {height}"'
        style = 'font-family="Helvetica, Arial, sans-serif" role="img"'
        # Half a px inward, so that the edge of 1 px is not cut off.
        place = f'x="0.5" y="0.5" width="{width - 1}" height="{height - 1}" rx="8"'
        lines = [
            f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>',
            f"<title>{escape(self.about)}</title>",
            f"<style>{DARK}</style>",
            f'<rect {place} fill="{PAPER}" stroke="#d1d9e0"/>',
            *self.parts,
            "</svg>\n",
        ]
        return "\n".join(lines)

    def _add(self, tag: str, attributes: str, about: str = "") -> None:
        end = f"><title>{about}</title></{tag}>" if about else "/>"
        self.parts.append(f"<{tag} {attributes}{end}")

    def _grow(self, right: float, bottom: float) -> None:
        self.right = max(self.right, right)
        self.bottom = max(self.bottom, bottom)


def text_width(words: str, size: int = 13, bold: bool = False) -> float:
    """About how many px wide the words are drawn, in the widest of the usual sans-serif fonts."""
    share = 0.74 if bold else 0.64
    return share * size * len(words)


def color_of(index: int) -> str:
    """The colour with this index; after eight the palette starts again."""
    return PALETTE[index % len(PALETTE)]


def mixed(color: str, share: float) -> str:
    """`share` of the colour, 0 .. 1, on white."""
    mixture = [1 - share * (1 - channel) for channel in _channels(color)]
    return "#" + "".join(f"{round(255 * channel):02x}" for channel in mixture)


def ink_on(fill: str) -> str:
    """Black or white, depending on which has more contrast with `fill`."""
    # The luminance of sRGB, with its curve taken as a power.
    red, green, blue = (channel**2.2 for channel in _channels(fill))
    luminance = 0.21 * red + 0.72 * green + 0.07 * blue
    return INK if luminance > 0.2 else PAPER


def number(value: float) -> str:
    """`value` with at most one decimal, the same on all machines."""
    return f"{round(value, 1):g}"


def _channels(color: str) -> list[float]:
    red = color[1:3]
    green = color[3:5]
    blue = color[5:7]
    return [int(digits, 16) / 255 for digits in (red, green, blue)]


def _pair(point: Point) -> str:
    x, y = map(number, point)
    return f"{x} {y}"


def _place(point: Point) -> str:
    x, y = map(number, point)
    return f'x="{x}" y="{y}"'


def _toward(start: Point, end: Point, distance: float) -> Point:
    """The point `distance` px from `start` in the direction of `end`."""
    share = distance / math.dist(start, end)
    x, y = start
    end_x, end_y = end
    return x + share * (end_x - x), y + share * (end_y - y)
