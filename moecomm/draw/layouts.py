"""Time against memory: a dot for each layout that a planner may choose, and the front of those that nothing beats."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from moecomm.cost import Candidate, pareto_front
from moecomm.draw.svg import (
    FRAME,
    INK,
    MARGIN,
    MUTED,
    PALETTE,
    PAPER,
    Box,
    Canvas,
    Key,
    Point,
    text_width,
)
from moecomm.draw.words import layout_in_words

# All lengths are in px. What the dots lie in at least, without the room for names on its left and below:
WIDTH = 560
HEIGHT = 320
RADIUS = 3
MARKED = 5
"""Radius of a dot on the front."""
AROUND = 16
"""From the outermost dots to the frame."""
TICKS = 60
"""Left of the frame, for the numbers along it."""
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
        length = self.end - self.start
        # Where all values are equal they lie in the middle.
        if self.most <= self.least:
            return self.start + length / 2
        share = math.log(value / self.least) / math.log(self.most / self.least)
        return self.start + share * length

    def ticks(self, low: float, high: float) -> list[float]:
        """1, 2 and 5 times the powers of ten between two px; only the powers where these alone are many."""
        # An axis whose values are equal has no length per factor: it gets that value alone.
        if self.most <= self.least:
            return [self.least]
        powers = [10.0**power for power in range(-12, 13)]
        values = [factor * power for power in powers for factor in (1, 2, 5)]
        shown = [value for value in values if low <= self.at(value) <= high]
        if len(shown) > 9:
            shown = [value for value in shown if value in powers]
        return shown


class Plot(NamedTuple):
    """A frame on a canvas with two axes: memory in GiB to the right, time in ms upward."""

    canvas: Canvas
    frame: Box
    memory: Scale
    time: Scale

    def place(self, candidate: Candidate) -> Point:
        """Where a layout lies."""
        x = self.memory.at(candidate.memory.total / GIB)
        y = self.time.at(candidate.seconds * 1e3)
        return x, y

    def dot(self, candidate: Candidate, radius: int, fill: str, edge: str) -> None:
        """Draw a layout."""
        x, y = self.place(candidate)
        box = Box(x - radius, y - radius, 2 * radius, 2 * radius)
        size = f"{candidate.seconds * 1e3:.3g} ms, {candidate.memory.total / GIB:.3g} GiB"
        about = f"{name_of(candidate)}: {size}"
        self.canvas.rect(box, fill, edge, radius, about)


def layouts_svg(best_first: Sequence[Candidate], about: str, limit: float = math.inf) -> str:
    """Draw time against memory of layouts, as SVG text.

    best_first  what `cost.candidates` returned
    about       what they are layouts of, for the heading
    limit       bytes: layouts that need more are hollow

    The line joins the front: layouts that no other beats in both. Those on it are named where there is room.
    Raises ValueError if no layout is within the limit.
    """
    fitting = [candidate for candidate in best_first if candidate.memory.total <= limit]
    if not fitting:
        raise ValueError(f"layouts_svg: none of {len(best_first)} layouts is within the limit of {limit} bytes")
    front = pareto_front(fitting)
    names = list(map(name_of, front))
    canvas = Canvas("Time against memory of every layout", about)
    widest = max(text_width(name, NAME_SIZE) for name in names)
    plot = _plot(canvas, best_first, widest)
    _draw_axes(plot)
    # Drawn last is what no other dot may hide: the front, and then the fastest.
    drawn: set[tuple[int, ...]] = set()
    for candidate in best_first:
        pixel = tuple(map(round, plot.place(candidate)))
        # Tens of thousands of combinations may share a few hundred places.
        if candidate not in front and pixel not in drawn:
            drawn.add(pixel)
            fill = FRAME if candidate.memory.total <= limit else PAPER
            plot.dot(candidate, RADIUS, fill, FRAME)
    places = list(map(plot.place, front))
    steps = _steps(places)
    canvas.line(steps, ON_FRONT, 1.5)
    for candidate in reversed(front):
        fill = BEST if candidate is front[0] else ON_FRONT
        plot.dot(candidate, MARKED, fill, PAPER)
    _draw_names(canvas, names, places, steps)
    canvas.legend(_keys(len(fitting) < len(best_first), limit))
    return canvas.svg()


def name_of(candidate: Candidate) -> str:
    """Its layout, and its all-to-all where that is not the flat one."""
    layout = layout_in_words(candidate.topologies)
    if candidate.all_to_all == "flat":
        return layout
    return f"{layout}, {candidate.all_to_all}"


def _keys(has_hollow: bool, limit: float) -> list[Key]:
    keys = [
        Key("the fastest", BEST, BEST),
        Key("on the front", ON_FRONT, ON_FRONT),
        Key("other layouts", FRAME, FRAME),
    ]
    if has_hollow:
        keys.append(Key(f"need more than {limit / GIB:,.4g} GiB", FRAME, PAPER))
    return keys


def _plot(canvas: Canvas, layouts: Sequence[Candidate], widest: float) -> Plot:
    """The frame and its axes. widest: px of the longest name, for which there is room on the left of all dots."""
    left = MARGIN + TICKS
    # The frame is as wide as the heading, which may be long.
    width = max(widest + WIDTH + 2 * AROUND, canvas.right - left)
    height = HEIGHT + 2 * AROUND + 3 * NAME_SIZE
    frame = Box(left, canvas.bottom + 34, width, height)
    sizes = [candidate.memory.total / GIB for candidate in layouts]
    times = [candidate.seconds * 1e3 for candidate in layouts]
    top = frame.y + AROUND
    memory = Scale(
        min(sizes),
        max(sizes),
        start=left + AROUND + widest,
        end=left + width - AROUND,
    )
    # y runs downward, and the most time is on top.
    time = Scale(min(times), max(times), start=top + HEIGHT, end=top)
    return Plot(
        canvas,
        frame,
        memory,
        time,
    )


def _draw_axes(plot: Plot) -> None:
    canvas = plot.canvas
    left, top, width, height = plot.frame
    right = left + width
    bottom = top + height
    canvas.rect(plot.frame, "#f6f8fa", FRAME)
    # No line so near to the frame that the two look like one.
    for value in plot.memory.ticks(left + 10, right - 10):
        x = plot.memory.at(value)
        upright = [(x, top), (x, bottom)]
        canvas.line(upright, GRID, 1)
        canvas.text((x, bottom + 18), f"{value:g}", NAME_SIZE, "middle")
    for value in plot.time.ticks(top + 10, bottom - 10):
        y = plot.time.at(value)
        level = [(left, y), (right, y)]
        canvas.line(level, GRID, 1)
        canvas.text((left - 8, y + 4), f"{value:g}", NAME_SIZE, "end")
    middle = left + width / 2
    canvas.text(
        (middle, bottom + 40),
        "memory of a rank, GiB",
        color=MUTED,
        anchor="middle",
    )
    canvas.text((MARGIN, top - 12), "time for the tokens of all ranks, ms", color=MUTED)


def _steps(places: Sequence[Point]) -> list[Point]:
    """The front from the fastest to the smallest: with less memory the time stays that of the next smaller layout."""
    points = [places[0]]
    for (right, _), (x, y) in pairwise(places):
        points.append((right, y))
        points.append((x, y))
    return points


def _draw_names(canvas: Canvas, names: Sequence[str], places: Sequence[Point], steps: Sequence[Point]) -> None:
    """Each on the left of its dot, or a little below: no layout lies there, as it would beat this one."""
    obstacles = [Box(x - MARKED, y - MARKED, 2 * MARKED, 2 * MARKED) for x, y in places]
    for (right, low), (left, high) in pairwise(steps):
        # A line has no area, which two boxes must share to meet.
        obstacles.append(Box(left, high, right - left + 1, low - high + 1))
    # The fastest and the smallest come first; the others are named where they leave room.
    ends = (0, len(names) - 1)
    order = sorted(range(len(names)), key=lambda i: (i not in ends, i))
    named: list[Point] = []
    for i in order:
        # Of dots that cover each other one has a name: two would not say which is which.
        if any(math.dist(places[i], place) < 2 * MARKED for place in named):
            continue
        x, y = places[i]
        width = text_width(names[i], NAME_SIZE)
        left = x - MARKED - 3 - width
        # From beside the dot to below it.
        boxes = [Box(left, y + down, width, NAME_SIZE) for down in range(-NAME_SIZE // 2, NAME_SIZE, 3)]
        free = [box for box in boxes if not any(map(box.meets, obstacles))]
        if free:
            box = free[0]
            obstacles.append(box)
            named.append(places[i])
            # The base line is a little above the lower edge, which letters such as p reach.
            at = box.at(width, NAME_SIZE - 2)
            canvas.text(at, names[i], NAME_SIZE, "end", INK, bold=i == 0)
