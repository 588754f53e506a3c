"""The colours of the pictures: a palette that colour-blind readers can tell apart, on white."""

from __future__ import annotations

INK = "#1f2328"
MUTED = "#59636e"
FRAME = "#8c959f"
PALE = "#eaeef2"
PAPER = "#ffffff"
EDGE = "#d1d9e0"
SHADE = "#0b4f8a"

PALETTE = ("#0072b2", "#d55e00", "#009e73", "#b3569b", "#c98a00", "#3fa3d9", "#882255", "#6b6b6b")
"""Okabe and Ito's, the light ones darkened so that thin lines show on white."""


def color_of(index: int) -> str:
    """The colour of the index-th thing; they come round again after eight."""
    return PALETTE[index % len(PALETTE)]


def mixed(color: str, share: float) -> str:
    """`share` of the colour, 0 .. 1, on white."""
    parts = (int(color[i : i + 2], 16) for i in (1, 3, 5))
    return "#" + "".join(f"{round(255 - share * (255 - part)):02x}" for part in parts)


def ink_on(fill: str) -> str:
    """Black or white, whichever has the stronger contrast to `fill` (as WCAG 2 counts it)."""
    red, green, blue = ((int(fill[i : i + 2], 16) / 255) ** 2.2 for i in (1, 3, 5))
    return INK if 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.2 else PAPER
