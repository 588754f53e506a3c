"""The pictures of docs/pr_moe.md: which layers have experts and where these are; losses on one rank and on four."""

from __future__ import annotations

import json
import math
from pathlib import Path

from charts import Axis, Chart, Linear

from moecomm import Topology
from moecomm.draw.svg import MARGIN, MUTED, Box, Canvas, Key, color_of, mixed

UNIT = 4.0
"""px for an expert."""
ROW = 24
MODEL = (32, 32, 64, 64, 128, 128)
"""Experts of each MoE layer."""
SPLITS = {
    "expert 4": {"expert": 4},
    "expert 2, tensor 2": {"expert": 2, "tensor": 2},
    "expert 2, tensor 2, experts sliced": {"expert": 2, "tensor": 2, "expert-tensor": 2},
}
"""How four ranks are split -> what its record has, and no other option of a split."""
OPTIONS = ("expert", "tensor", "expert-tensor")


def draw(results: Path) -> dict[str, str]:
    """Name of each figure -> its text."""
    topologies = [Topology(128, expert=math.gcd(128, count)) for count in MODEL]
    return {"pr_moe": pyramid_svg(topologies), "pr_moe_losses": losses_svg(results / "train_splits.jsonl")}


def pyramid_svg(topologies: list[Topology]) -> str:
    """The layers of a PR-MoE model, the last one on top: MLP, experts, and on how many ranks a copy of these is."""
    fixed, experts = color_of(0), color_of(1)
    world = topologies[0].world_size
    canvas = Canvas(
        "Pyramid and residual", f"every second layer has experts beside its MLP; {world} ranks hold them all"
    )
    y = MARGIN + 56.0
    for count, topology in zip(reversed(MODEL), reversed(topologies), strict=True):
        canvas.rect(Box(MARGIN, y, 60, ROW - 6), mixed(fixed, 0.5), fixed, 2, "MLP")
        canvas.text((MARGIN + 66, y + 13), "+", bold=True)
        for e in range(count):
            canvas.rect(
                Box(MARGIN + 82 + e * UNIT, y, UNIT - 1, ROW - 6), mixed(experts, 0.6), "none", 0, f"expert {e}"
            )
        copies = "1 copy" if topology.expert_data == 1 else f"{topology.expert_data} copies"
        words = f"{count} experts: {topology.expert} ranks share them, {copies}"
        canvas.text((MARGIN + 96 + max(MODEL) * UNIT, y + 13), words, 12)
        y += ROW
        canvas.rect(Box(MARGIN, y, 60, ROW - 6), mixed(fixed, 0.5), fixed, 2, "MLP")
        y += ROW
    canvas.text((MARGIN, y + 12), "attention and norms are left out", color=MUTED, size=12)
    keys = [
        Key("MLP: all tokens", fixed, mixed(fixed, 0.5)),
        Key("one expert: 1 of them for a token", experts, mixed(experts, 0.6)),
    ]
    canvas.legend(keys)
    return canvas.svg()


def losses_svg(results: Path) -> str:
    """How far each step's loss is from that of one rank, for each split; equal losses have no place on the axis."""
    records = [json.loads(line) for line in results.read_text().splitlines()]
    splits = {tuple(record.get(name) for name in OPTIONS): record["losses"] for record in records}
    alone = splits[None, None, None]
    first = records[0]
    x = Linear("step", range(0, first["steps"] + 1, 25), lambda step: f"{step:g}")
    y = Axis("difference / loss", [10.0**power for power in range(-8, 0)], lambda share: f"{share:.0e}")
    about = f'"{first["config"]}", {first["steps"]} steps on the sources of Python\'s standard library, float32'
    chart = Chart("How far losses on four ranks are from those on one", about, x, y)
    for name, split in SPLITS.items():
        losses = splits[tuple(split.get(option) for option in OPTIONS)]
        points = []
        for step, (loss, loss_alone) in enumerate(zip(losses, alone, strict=True), 1):
            if loss != loss_alone:
                points.append((step, abs(loss - loss_alone) / loss_alone))
        chart.scatter(name, points)
    return chart.svg()
