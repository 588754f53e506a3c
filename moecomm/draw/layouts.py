"""Time against memory: a dot for each layout that a planner may choose, and the front of those that nothing beats."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from moecomm.cost import Candidate, pareto_front
from moecomm.draw.svg import FRAME, INK, MARGIN, MUTED, PALETTE, PAPER, Box, Canvas, Key, Point, text_width
from moecomm.draw.words import layout_in_words

# All lengths are in px. What the dots lie in, without the room for names on its left and below:
WIDTH = 560
HEIGHT = 320
RADIUS = 3
MARKED = 5
"""Radius of a dot on the front."""
AROUND = 16
"""From the outermost dots to the frame."""
NAME_SIZE = 12
GRID = "#e3e7eb"
GIB = 2**30
BEST = PALETTE[1]
ON_FRONT = PALETTE[0]


class Scale(NamedTuple):
    """A logarithmic axis: `least` lies at px `start`, `most` at px `end`."""

    least: float
    most: float
    start: float
    end: float

    def at(self, value: float) -> float:
        """px of a value."""
        # Where all values are equal they lie in the middle.
        share = math.log(value / self.least) / math.log(self.most / self.least) if self.most > self.least else 0.5
        return self.start + share * (self.end - self.start)

    def ticks(self, low: float, high: float) -> list[float]:
        """1, 2 and 5 times the powers of ten between two px; only the powers where these alone are many."""
        decades = range(-12, 13)
        # An axis whose values are equal has no length per factor: it gets that value alone.
        if self.most <= self.least:
            return [self.least]
        values = [mantissa * 10.0**power for power in decades for mantissa in (1, 2, 5)]
        inside = [value for value in values if low <= min(self.at(value), 1e9) <= high]
        return inside if len(inside) <= 9 else [value for value in inside if f"{value:e}".startswith("1.0")]


def layouts_svg(best_first: Sequence[Candidate], about: str, limit: float = math.inf) -> str:
    """Draw time against memory of layouts, as SVG text.

    best_first  what `cost.candidates` returned
    about       what they are layouts of, for the heading
    limit       bytes: layouts that need more are hollow

    The line joins the front: layouts that no other beats in both. Those on it are named where there is room.
    """
    canvas = Canvas("Time against memory of every layout", about)
    fitting = [candidate for candidate in best_first if candidate.memory.total <= limit]
    front = pareto_front(fitting)
    names = [_name(candidate) for candidate in front]
    left = max([text_width(name, NAME_SIZE) for name in names], default=0.0)
    # The frame is as wide as the heading, which may be long.
    width = max(left + WIDTH + 2 * AROUND, canvas.right - MARGIN - 60)
    plot = Box(MARGIN + 60, canvas.bottom + 34, width, HEIGHT + 2 * AROUND + 3 * NAME_SIZE)
    memory = [candidate.memory.total / GIB for candidate in best_first]
    milliseconds = [candidate.seconds * 1e3 for candidate in best_first]
    right = plot.x + plot.width - AROUND
    top = plot.y + AROUND
    x = Scale(min(memory), max(memory), plot.x + AROUND + left, right)
    y = Scale(min(milliseconds), max(milliseconds), top + HEIGHT, top)
    _draw_axes(canvas, plot, x, y)

    def place(candidate: Candidate) -> Point:
        return x.at(candidate.memory.total / GIB), y.at(candidate.seconds * 1e3)

    # Drawn last is what no other dot may hide: the front, and then the fastest.
    for candidate in best_first:
        if candidate not in front:
            edge, fill = (FRAME, FRAME) if candidate.memory.total <= limit else (FRAME, PAPER)
            _draw_dot(canvas, place(candidate), RADIUS, (fill, edge), _details(candidate))
    places = list(map(place, front))
    steps = _steps(places)
    canvas.line(steps, ON_FRONT, 1.5)
    for candidate, point in reversed(list(zip(front, places, strict=True))):
        color = BEST if candidate is front[0] else ON_FRONT
        _draw_dot(canvas, point, MARKED, (color, PAPER), _details(candidate))
    _draw_names(canvas, names, places, steps)
    keys = [Key("the fastest", BEST, BEST), Key("on the front", ON_FRONT, ON_FRONT), Key("other layouts", FRAME, FRAME)]
    if len(fitting) < len(best_first):
        keys.append(Key(f"need more than {limit / GIB:,.4g} GiB", FRAME, PAPER))
    canvas.legend(keys)
    return canvas.svg()


def _name(candidate: Candidate) -> str:
    """Its layout, and its all-to-all where that is not the flat one."""
    layout = layout_in_words(candidate.topologies)
    return layout if candidate.all_to_all == "flat" else f"{layout}, {candidate.all_to_all}"


def _details(candidate: Candidate) -> str:
    """What is shown when the pointer rests on a dot."""
    return f"{_name(candidate)}: {candidate.seconds * 1e3:.3g} ms, {candidate.memory.total / GIB:.3g} GiB"


def _draw_axes(canvas: Canvas, plot: Box, x: Scale, y: Scale) -> None:
    canvas.rect(plot, "#f6f8fa", FRAME)
    for value in x.ticks(plot.x + 10, plot.x + plot.width - 10):
        at = x.at(value)
        canvas.line([(at, plot.y), (at, plot.y + plot.height)], GRID, 1)
        canvas.text((at, plot.y + plot.height + 18), f"{value:g}", NAME_SIZE, "middle")
    for value in y.ticks(plot.y + 10, plot.y + plot.height - 10):
        at = y.at(value)
        canvas.line([(plot.x, at), (plot.x + plot.width, at)], GRID, 1)
        canvas.text((plot.x - 8, at + 4), f"{value:g}", NAME_SIZE, "end")
    middle = plot.x + plot.width / 2
    canvas.text((middle, plot.y + plot.height + 40), "memory of a rank, GiB", color=MUTED, anchor="middle")
    canvas.text((MARGIN, plot.y - 12), "time for the tokens of all ranks, ms", color=MUTED)


def _draw_dot(canvas: Canvas, center: Point, radius: int, colors: tuple[str, str], about: str) -> None:
    """colors: of the disc and of its edge."""
    x, y = center
    canvas.rect(Box(x - radius, y - radius, 2 * radius, 2 * radius), *colors, radius, about)


def _steps(places: Sequence[Point]) -> list[Point]:
    """The front from the fastest to the smallest: with less memory the time stays that of the next smaller layout."""
    points = [places[0]]
    for x, y in places[1:]:
        points += [(points[-1][0], y), (x, y)]
    return points


def _draw_names(canvas: Canvas, names: Sequence[str], places: Sequence[Point], steps: Sequence[Point]) -> None:
    """Each on the left of its dot, or a little below: no layout lies there, as it would beat this one."""
    taken = [Box(x - MARKED, y - MARKED, 2 * MARKED, 2 * MARKED) for x, y in places]
    for (x, y), (end_x, end_y) in pairwise(steps):
        taken.append(Box(min(x, end_x), min(y, end_y), abs(x - end_x) + 1, abs(y - end_y) + 1))
    # The fastest and the smallest come first; the others are named where they leave room.
    order = sorted(range(len(names)), key=lambda i: (i not in (0, len(names) - 1), i))
    for i in order:
        x, y = places[i]
        width = text_width(names[i], NAME_SIZE)
        for shift in range(-NAME_SIZE // 2, NAME_SIZE, 3):
            box = Box(x - MARKED - 3 - width, y + shift, width, NAME_SIZE)
            if not any(box.meets(other) for other in taken):
                taken.append(box)
                canvas.text(box.at(width, NAME_SIZE - 2), names[i], NAME_SIZE, "end", INK, bold=i == 0)
                break
