"""The pictures of docs/mixture_of_students.md, and of the paper's claims in small: what bench/claims.py measured."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from charts import Chart, Linear

from moecomm.draw.svg import INK, MARGIN, MUTED, Box, Canvas, Key, color_of, mixed

LAYER = Box(0, 0, 150, 20)
COMPARED = {
    "dense": "dense",
    "standard MoE": "standard",
    "PR-MoE": "pr-moe",
    "first half": "first half",
    "second half": "second half",
    "top-2": "top-2",
    "residual": "residual",
}
TAUGHT = {
    "teacher": "pr-moe",
    "student alone": "student",
    "student, full": "student, full",
    "student, staged": "student, staged",
    "student, linear": "student, linear",
}
"""How a row of the records is called in a picture -> the row."""
LEFT, WIDTH, ROW = 150, 520, 30
"""px: where the axis of losses starts, how long it is, and a row of it."""


def draw(results: Path) -> dict[str, str]:
    """Name of each figure -> its text. results: a file of bench/claims.py, all runs of as many steps."""
    records = [json.loads(line) for line in results.read_text().splitlines()]
    claims, students = "The paper's comparisons in small", "What the teacher gives a student"
    return {
        "students_layers": layers_svg((0, 4, 0, 4, 0, 8, 0, 8), (0, 1, 2, 5, 4, 7, 6)),
        "students_claims": rows_svg(students, records, TAUGHT),
        "students_losses": curves_svg(students, records, TAUGHT, "teacher", (-0.1, -0.05, 0, 0.05, 0.1)),
        "pr_moe_claims": rows_svg(claims, records, COMPARED),
        "pr_moe_curves": curves_svg(claims, records, COMPARED, "standard MoE", (-0.05, 0, 0.05, 0.1, 0.15, 0.2, 0.25)),
    }


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


class Curves(Chart):
    """A chart of rows that have a curve for each seed."""

    def runs(self, name: str, curves: Sequence[Sequence[tuple[float, float]]]) -> None:
        """The mean of several curves over the same steps, and a band from the lowest to the highest."""
        steps = [step for step, _ in curves[0]]
        values = list(zip(*[[value for _, value in curve] for curve in curves], strict=True))
        mean, low, high = ([function(column) for column in values] for function in (fmean, min, max))
        self.band(name, *(list(zip(steps, line, strict=True)) for line in (mean, low, high)))

    def step(self, step: float, words: str) -> None:
        """A grey line at a step, and what happens there."""
        low, high = self.y.marks[0], self.y.marks[-1]
        self.line((step, low), (step, high))
        x, y = self._place((step, high))
        self.canvas.text((x + 6, y + 15), words, 12, color=MUTED)


def curves_svg(
    title: str, records: Sequence[dict[str, Any]], rows: Mapping[str, str], base: str, marks: Sequence[float]
) -> str:
    """Held-out losses in training less those of the row called `base` with the same seed: mean and range of the seeds.

    rows   name -> row of the records
    marks  of the losses
    """
    steps, text = records[0]["steps"], records[0]["text"]
    found = {(record["row"], record["seed"]): record["validation_curve"] for record in records}
    seeds = sorted({seed for _, seed in found})
    compared = f"held-out loss less that of the {base} with the same seed, nats per byte"
    about = f"{compared}; mean and range of {len(seeds)} seeds, {text}"
    x = Linear("step", range(0, steps + 1, steps // 5), lambda step: f"{step:g}")
    chart = Curves(title, about, x, Linear("", marks, lambda loss: f"{loss:+g}" if loss else "0"))
    chart.line((0, 0), (steps, 0))
    for name, row in rows.items():
        if name != base:
            pairs = [zip(found[row, seed], found[rows[base], seed], strict=True) for seed in seeds]
            chart.runs(name, [[(step, loss - least) for (step, loss), (_, least) in pair] for pair in pairs])
    if "student, staged" in rows:
        stop = next(record["schedule"]["stop"] for record in records if record["row"] == "student, staged")
        chart.step(stop, "staged: from here alone")
    return chart.svg()


def rows_svg(title: str, records: Sequence[dict[str, Any]], rows: Mapping[str, str]) -> str:
    """The held-out loss of each row at the end: a dot for each seed, a line for their mean."""
    found = [record for record in records if record["row"] in rows.values()]
    first = found[0]
    about = f"held-out loss after {first['tokens'] / 1e6:.1f} million bytes of {first['text']}, nats per byte"
    canvas = Canvas(title, about)
    least, most = (f([record["validation_loss"] for record in found]) for f in (min, max))
    edge = 0.08 * (most - least)
    least, most = least - edge, most + edge
    top, y = MARGIN + 60.0, MARGIN + 60.0
    for name, row in rows.items():
        runs = [record for record in found if record["row"] == row]
        places = [LEFT + (record["validation_loss"] - least) / (most - least) * WIDTH for record in runs]
        canvas.text((LEFT - 10, y + 15), name, 13, "end")
        canvas.rect(Box(LEFT, y + ROW / 2 - 4.5, WIDTH, 0.5), "#e3e7eb")
        mean = sum(record["validation_loss"] for record in runs) / len(runs)
        canvas.rect(Box(sum(places) / len(places) - 1, y + 2, 2, ROW - 13), INK)
        size = f"{runs[0]['active_parameters'] / 1e6:.1f} of {runs[0]['parameters'] / 1e6:.1f}"
        canvas.text((LEFT + WIDTH + 14, y + 15), f"{mean:.3f};  {size} million parameters", 12)
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
