"""The figures of the pages in DejaVu Sans, the widest of the usual fonts: labels have room."""

from __future__ import annotations

import re
from itertools import combinations
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import pytest
from conftest import ROOT

FIGURES = sorted((ROOT / "docs" / "figures").glob("*.svg"))
SVG = "{http://www.w3.org/2000/svg}"
SHARE = {"start": 0.0, "middle": 0.5, "end": 1.0}
TOUCH = 1.0
"""px by which two labels may overlap: the box of a letter is larger than the letter."""

THICKEST_LINE = 2.0
"""px; a rectangle is a line up to here."""


class Label(NamedTuple):
    """Words, and the edges of their box in px."""

    words: str
    left: float
    top: float
    right: float
    bottom: float

    def meets(self, other: Label) -> bool:
        across = min(self.right, other.right) - max(self.left, other.left)
        down = min(self.bottom, other.bottom) - max(self.top, other.top)
        return across > TOUCH and down > TOUCH

    def crosses(self, box: Label) -> bool:
        """Whether the label is neither inside the box nor beside it."""
        inside = self.left >= box.left and self.right <= box.right and self.top >= box.top and self.bottom <= box.bottom
        return self.meets(box) and not inside


def width(words: str, size: float, bold: bool) -> float:
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import TextPath

    font = FontProperties(family="DejaVu Sans", weight="bold" if bold else "normal")
    return float(TextPath((0, 0), words, size=size, prop=font).get_extents().x1) if words.strip() else 0.0


def boxes(figure: Path) -> list[Label]:
    """The rectangles that are no lines."""
    found = []
    for element in ElementTree.parse(figure).getroot().iter(f"{SVG}rect"):
        x, y, across, down = (float(element.attrib[name]) for name in ("x", "y", "width", "height"))
        if min(across, down) > THICKEST_LINE:
            found.append(Label("box", x, y, x + across, y + down))
    return found


def labels(figure: Path) -> list[Label]:
    found = []

    def read(element: ElementTree.Element, style: dict[str, str]) -> None:
        style = style | element.attrib
        if element.tag == f"{SVG}text":
            size = float(style.get("font-size", "16"))
            words = "".join(element.itertext())
            length = width(words.replace("$", r"\$"), size, "font-weight" in style)
            left = float(style["x"]) - SHARE[style.get("text-anchor", "start")] * length
            base = float(style["y"])
            found.append(Label(words, left, base - 0.73 * size, left + length, base + 0.05 * size))
        for child in element:
            read(child, style)

    read(ElementTree.parse(figure).getroot(), {})
    return found


@pytest.mark.parametrize("figure", FIGURES, ids=lambda figure: figure.stem)
def test_labels_have_room(figure: Path) -> None:
    pytest.importorskip("matplotlib")
    root = ElementTree.parse(figure).getroot()
    found = labels(figure)
    assert found
    for label in found:
        assert label.left >= 0 and label.right <= float(root.attrib["width"]), label
    for label, other in combinations(found, 2):
        assert not label.meets(other), (label, other)
    for label in found:
        for box in boxes(figure):
            assert not label.crosses(box), (label, box)


@pytest.mark.parametrize("figure", FIGURES, ids=lambda figure: figure.stem)
def test_follows_a_dark_page(figure: Path) -> None:
    assert re.search(r"@media \(prefers-color-scheme: dark\)", figure.read_text())
