"""The pictures of docs/mixture_of_students.md, and of the paper's claims in small: what bench/claims.py measured."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from charts import Axis, Chart

from moecomm.draw.svg import INK, MARGIN, MUTED, Box, Canvas, Key, color_of, mixed

LAYER = Box(0, 0, 150, 20)
STUDENTS = ("pr-moe", "student", "student, full", "student, staged", "student, linear")
LEFT, WIDTH, ROW = 150, 520, 30
"""px: where the axis of losses starts, how long it is, and a row of it."""


def layers_svg(experts: Sequence[int], kept: Sequence[int]) -> str:
    """A teacher on the left, the last layer on top, its student on the right, and which layer stands for which.

    experts  of each of the teacher's layers; 0: dense
    kept     as from `kept_layers`
    """
    canvas = Canvas(
        "Teacher and student", "each layer of the student stands for one of its teacher's; the rest is left out"
    )
    colors = {False: color_of(0), True: color_of(1)}
    step, right = LAYER.height + 10, 280.0

    def layer(x: float, row: int, count: int, about: str) -> float:
        y = MARGIN + 60 + (len(experts) - 1 - row) * step
        color = colors[bool(count)]
        words = f"{count} experts" if count else "dense"
        canvas.rect(Box(x, y, LAYER.width, LAYER.height), mixed(color, 0.35), color, 2, about)
        canvas.text((x + LAYER.width / 2, y + 14.5), words, 12, "middle")
        return y + LAYER.height / 2

    ends = [layer(MARGIN, row, count, f"teacher, layer {row}") for row, count in enumerate(experts)]
    for row, source in enumerate(kept):
        y = layer(right, row, experts[source], f"student, layer {row}")
        path = f"M{MARGIN + LAYER.width + 4} {ends[source]:g}L{right - 4:g} {y:g}"
        canvas.parts.append(f'<path d="{path}" stroke="{MUTED}" stroke-width="1.5"/>')
    bottom = MARGIN + 60 + len(experts) * step + 4
    canvas.text((MARGIN + LAYER.width / 2, bottom), "teacher", 13, "middle", bold=True)
    canvas.text((right + LAYER.width / 2, bottom), "student", 13, "middle", bold=True)
    return canvas.svg()


class Linear(Axis):
    """An axis with even steps."""

    def share(self, value: float) -> float:
        """How far along the axis, 0 .. 1."""
        return (value - self.marks[0]) / (self.marks[-1] - self.marks[0])


def curves_svg(results: Path, steps: int, marks: Sequence[float]) -> str:
    """Held-out losses of the teacher and of students that hear it, in training, less that of a student alone.

    steps  of the runs
    marks  of the losses. All numbers are means over the seeds
    """
    found = [record for record in read(results, steps) if record["row"] in STUDENTS]
    first = found[0]
    seeds = len({record["seed"] for record in found})
    about = (
        f"held-out loss less that of a student alone at the same step, nats per byte; {seeds} seeds, {first['text']}"
    )
    x = Linear("step", range(0, steps + 1, steps // 5), lambda step: f"{step:g}")
    chart = Chart("What the teacher gives a student", about, x, Linear("", marks, lambda loss: f"{loss:+g}"))
    alone = dict(means(found, "student"))
    chart.line((0, 0), (steps, 0))
    for row in STUDENTS:
        points = [(step, loss - alone[step]) for step, loss in means(found, row)]
        if points and row != "student":
            chart.curve("teacher" if row == "pr-moe" else row, [p for p in points if marks[0] <= p[1] <= marks[-1]])
    return chart.svg()


def means(found: Sequence[dict[str, Any]], row: str) -> list[tuple[float, float]]:
    """Step and mean loss of all seeds, where a row was evaluated."""
    curves = [record["validation_curve"] for record in found if record["row"] == row]
    return [(float(at[0][0]), sum(loss for _, loss in at) / len(at)) for at in zip(*curves, strict=True)]


def rows_svg(results: Path, steps: int, rows: Sequence[str]) -> str:
    """The held-out loss of each row at the end: a dot for each seed, a line for their mean."""
    found = [record for record in read(results, steps) if record["row"] in rows]
    first = found[0]
    about = f"held-out loss after {first['tokens'] / 1e6:.1f} million bytes of {first['text']}, nats per byte"
    canvas = Canvas("The paper's comparisons in small", about)
    least, most = (f([record["validation_loss"] for record in found]) for f in (min, max))
    edge = 0.08 * (most - least)
    least, most = least - edge, most + edge
    top, y = MARGIN + 60.0, MARGIN + 60.0
    for row in rows:
        runs = [record for record in found if record["row"] == row]
        places = [LEFT + (record["validation_loss"] - least) / (most - least) * WIDTH for record in runs]
        canvas.text((LEFT - 10, y + 15), row, 13, "end")
        canvas.rect(Box(LEFT, y + ROW / 2 - 4.5, WIDTH, 0.5), "#e3e7eb")
        if places:
            mean = sum(record["validation_loss"] for record in runs) / len(runs)
            canvas.rect(Box(sum(places) / len(places) - 1, y + 2, 2, ROW - 13), INK)
            size = f"{runs[0]['active_parameters'] / 1e6:.2f} of {runs[0]['parameters'] / 1e6:.2f}"
            canvas.text((LEFT + WIDTH + 14, y + 15), f"{mean:.4f};  {size} million parameters", 12)
        for place in places:
            canvas.rect(Box(place - 4, y + ROW / 2 - 8.5, 8, 8), mixed(color_of(0), 0.6), color_of(0), 4)
        y += ROW
    for mark in ticks(least, most):
        at = LEFT + (mark - least) / (most - least) * WIDTH
        canvas.rect(Box(at, top, 0.5, y - top), "#e3e7eb")
        canvas.text((at, y + 14), f"{mark:.2f}", 12, "middle")
    canvas.legend([Key("a seed", color_of(0), mixed(color_of(0), 0.6)), Key("their mean", INK, INK)])
    canvas.text((MARGIN, canvas.bottom + 18), "parameters that a byte meets, of all", color=MUTED, size=12)
    return canvas.svg()


def ticks(least: float, most: float) -> Iterable[float]:
    """Round numbers between the two, four to nine of them."""
    step = next(step for step in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0) if (most - least) / step < 9)
    return [n * step for n in range(int(least / step) + 1, int(most / step) + 1)]


def read(results: Path, steps: int) -> list[dict[str, Any]]:
    """The records of so many steps."""
    records = [json.loads(line) for line in results.read_text().splitlines()]
    return [record for record in records if record["steps"] == steps]
