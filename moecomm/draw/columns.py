"""Frames side by side with their ranks stacked inside, and arrows that run around the boxes, not through them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import TypeAlias

from moecomm.draw.colors import FRAME, INK, MUTED, ink_on, mixed
from moecomm.draw.routes import Arrow
from moecomm.draw.svg import Box, Canvas, Line, Point

WIDTH, HEIGHT = 54, 34
"""px of the box of a rank."""
HEADER, PAD, STEP = 24, 14, 6
"""px of a frame above its ranks, of a frame beside them, and between arrows side by side."""
WISHED_WIDTH = 660
"""px that few columns spread to."""

Places: TypeAlias = dict[Arrow, int]


class Columns:
    """Where everything is, and how to draw it.

    frames  the ranks of each column, top down
    corner  the top left
    across  the arrows between columns; each runs in the room above the boxes of its sender's row
    inside  the arrows from one rank to others of its column; they run to the left of the boxes
    """

    def __init__(
        self, frames: Sequence[Sequence[int]], corner: Point, across: Iterable[Arrow], inside: Iterable[Arrow] = ()
    ) -> None:
        self.frames = frames
        self.place = {rank: (column, row) for column, ranks in enumerate(frames) for row, rank in enumerate(ranks)}
        self.levels = self._in_order(across, self._nearest_column)
        self.levels_inside = self._in_order(inside, self._nearest_row)
        self.turns = self._turns()
        self.channel = 10 + STEP * max(self.levels.values(), default=0)
        self.top = corner[1]
        self.x = self._place_columns(corner[0])
        self.right = self.frame(len(frames) - 1).right
        self.bottom = max(self.frame(column).bottom for column in range(len(frames)))

    # ---- places ----------------------------------------------------------------------------------------------------

    def _nearest_column(self, arrow: Arrow) -> tuple[bool, tuple[int, ...]]:
        """The side an arrow leaves to, and its place there: in this order, arrows of one sender do not cross."""
        (column, row), (to_column, to_row) = self.place[arrow[0]], self.place[arrow[1]]
        return to_column > column, (abs(to_column - column), to_row == row, -to_row)

    def _nearest_row(self, arrow: Arrow) -> tuple[bool, tuple[int, ...]]:
        distance = self.place[arrow[1]][1] - self.place[arrow[0]][1]
        return distance > 0, (abs(distance),)

    def _in_order(self, arrows: Iterable[Arrow], order: Callable[[Arrow], tuple[bool, tuple[int, ...]]]) -> Places:
        """The place of each arrow, from 1, among those that leave its sender to the same side."""
        sides = defaultdict(list)
        for arrow in arrows:
            side, place = order(arrow)
            sides[arrow[0], side].append((place, arrow))
        return {arrow: i for side in sides.values() for i, (_, arrow) in enumerate(sorted(side), start=1)}

    def _turns(self) -> Places:
        """For arrows that change row: the place of each beside its receiver's column, the longest turn outermost."""
        beside = defaultdict(list)
        for sender, receiver in self.levels:
            (column, row), (to_column, to_row) = self.place[sender], self.place[receiver]
            if row != to_row:
                beside[to_column, to_column > column].append((to_row, (sender, receiver)))
        return {arrow: i for side in beside.values() for i, (_, arrow) in enumerate(sorted(side), start=1)}

    def _place_columns(self, x: float) -> list[float]:
        """The left edge of each frame. Between two there is room for what turns there."""
        rooms = [0.0] * (len(self.frames) + 1)
        for (sender, receiver), place in self.turns.items():
            column, rightward = self.place[receiver][0], self.place[receiver] > self.place[sender]
            side = column if rightward else column + 1
            rooms[side] = max(rooms[side], 10.0 + STEP * place)
        used = sum(rooms) + sum(self._frame_width(column) for column in range(len(self.frames)))
        gap = min(max(14.0, (WISHED_WIDTH - used) / max(1, len(self.frames) - 1)), 90.0)
        places = []
        for column in range(len(self.frames)):
            x += rooms[column]
            places.append(x)
            x += self._frame_width(column) + gap
        return places

    def _left(self, column: int) -> float:
        levels = [level for arrow, level in self.levels_inside.items() if self.place[arrow[0]][0] == column]
        return PAD + (8 + STEP * max(levels) if levels else 0)

    def _frame_width(self, column: int) -> float:
        return self._left(column) + WIDTH + PAD

    def frame(self, column: int) -> Box:
        """The frame of a column."""
        height = HEADER + len(self.frames[column]) * (self.channel + HEIGHT) + PAD
        return Box(self.x[column], self.top, self._frame_width(column), height)

    def box(self, rank: int) -> Box:
        """The box of a rank."""
        column, row = self.place[rank]
        y = self.top + HEADER + row * (self.channel + HEIGHT) + self.channel
        return Box(self.x[column] + self._left(column), y, WIDTH, HEIGHT)

    # ---- drawing ---------------------------------------------------------------------------------------------------

    def draw_frame(self, canvas: Canvas, column: int, label: str) -> None:
        """The frame of a column and its name."""
        box = self.frame(column)
        canvas.rect(box, "#f6f8fa", Line(FRAME), radius=6)
        canvas.text((box.x + 10, box.y + 18), label, 13, color=MUTED, weight=600)

    def draw_rank(self, canvas: Canvas, rank: int, color: str, share: float = 0.16) -> None:
        """The box of a rank. share: how much of the colour fills it, 0 .. 1."""
        box, fill = self.box(rank), mixed(color, share)
        canvas.rect(box, fill, Line(color, 1.6), radius=4, about=f"rank {rank}")
        x, y = box.center
        canvas.text((x, y + 5), str(rank), 14, "middle", ink_on(fill), 600)

    def draw_across(self, canvas: Canvas, arrow: Arrow, line: Line, about: str) -> None:
        """An arrow of `across`: up from the sender, along above its row, down to the receiver."""
        start, end = self.box(arrow[0]), self.box(arrow[1])
        x = start.center[0] + _offset(self.levels, arrow, end.x > start.x, WIDTH)
        along = start.y - 4 - STEP * self.levels[arrow]
        points = [(x, start.y), (x, along)]
        if arrow in self.turns:
            frame, side = self.frame(self.place[arrow[1]][0]), end.x > start.x
            room = 4 + STEP * self.turns[arrow]
            beside = frame.x - room if side else frame.right + room
            points += [(beside, along), (beside, end.y - 10), (end.center[0], end.y - 10)]
        else:
            points += [(end.center[0], along)]
        canvas.route([*points, (end.center[0], end.y)], line, about)

    def draw_inside(self, canvas: Canvas, arrow: Arrow, line: Line, about: str) -> None:
        """An arrow of `inside`: out of the sender to the left, along the boxes, into the receiver."""
        start, end = self.box(arrow[0]), self.box(arrow[1])
        y = start.center[1] + _offset(self.levels_inside, arrow, end.y > start.y, HEIGHT)
        x = start.x - 8 - STEP * self.levels_inside[arrow]
        canvas.route([(start.x, y), (x, y), (x, end.center[1]), (end.x, end.center[1])], line, about)

    def label_rows(self, canvas: Canvas, labels: Sequence[str], right: float) -> None:
        """The name of each row, ending at x = right."""
        tallest = max(self.frames, key=lambda ranks: len(ranks))
        for rank, label in zip(tallest, labels, strict=True):
            canvas.text((right, self.box(rank).center[1] + 5), label, 13, "end", INK)


def _offset(levels: Places, arrow: Arrow, forward: bool, room: float) -> float:
    """How far from the middle of a side of `room` px the arrow leaves: the nearest receivers' arrows outermost."""
    most = sum(sender == arrow[0] for sender, _ in levels)
    step = min(8.0, (room - 8) / most)
    outermost = step * (most - 1) / 2
    distance = outermost - step * (levels[arrow] - 1)
    return distance if forward else -distance
