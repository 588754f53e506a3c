"""The picture of what bench/gating.py measured on a GPU: the whole gate, there and back, beside others."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from moecomm.draw.svg import INK, MARGIN, MUTED, PALETTE, Box, Canvas, Key, text_width

IMPLEMENTATIONS = ("moecomm", "torch.compile", "torch", "deepspeed", "deepspeed einsum")
DECADE, BAR, GAP = 170, 17, 26
"""px: ten times as long, the height of a bar, between two shapes."""
LEFT = MARGIN + text_width("131072 tokens, k = 8", bold=True) + 10
"""px: where the bars start."""


def gating_svg(results: Path, experts: int = 128) -> str:
    """One group of bars for each T and k that peers were measured at, on a logarithmic scale from 1 us."""
    records = [json.loads(line) for line in results.read_text().splitlines()]
    whole = [r for r in records if r["stage"] == "whole" and r["E"] == experts and (r["inputs"] == "memory")]
    first = whole[0]
    canvas = Canvas(
        "Route, permute and unpermute on one GPU",
        f"{first['machine']['gpu']}, {experts} experts, rows of {first['H']} {first['dtype']}: "
        "median of a call under graph replay, logarithmic",
    )
    shapes = sorted({(r["T"], r["k"]) for r in whole if r["impl"] != "moecomm"})
    y = MARGIN + 62.0
    for tokens, top_k in shapes:
        group: dict[str, Any] = {}
        for record in whole:  # the first: of the run that the others are in
            if (record["T"], record["k"]) == (tokens, top_k):
                group.setdefault(record["impl"], record)
        canvas.text((MARGIN, y + 13), f"{tokens} tokens, k = {top_k}", bold=True)
        floor = length(group["moecomm"]["floor_us"])
        top = y
        for name in (name for name in IMPLEMENTATIONS if name in group):
            y = bar(canvas, name, group, y)
        if floor > 0:
            canvas.rect(Box(LEFT + floor, top - 3, 1.5, y - top + 1), INK)
        y += GAP
    names = [name for name in IMPLEMENTATIONS if any(r["impl"] == name for r in whole)]
    canvas.legend([Key(name, color_of(name), color_of(name)) for name in names])
    canvas.text((MARGIN, canvas.bottom + 18), "line: all bytes once, at the speed of a copy", color=MUTED)
    return canvas.svg()


def bar(canvas: Canvas, name: str, group: dict[str, Any], y: float) -> float:
    """The bar of one implementation, its time and how many times ours that is. Returns where the next one starts."""
    time_us = group[name]["time_us"]
    canvas.rect(Box(LEFT, y, length(time_us), BAR - 3), color_of(name), about=name)
    ratio = time_us / group["moecomm"]["time_us"]
    words = f"{time_us:,.1f} us" + ("" if name == "moecomm" else f"  ({ratio:.1f}x)")
    canvas.text((LEFT + length(time_us) + 6, y + 11.5), words, 12)
    return y + BAR


def length(time_us: float) -> float:
    return DECADE * max(math.log10(time_us), 0)


def color_of(name: str) -> str:
    return PALETTE[IMPLEMENTATIONS.index(name)]
