"""The figures of docs/direct.md: what bench/exchange_gpu.py measured between GPUs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from charts import Axis, Chart

CURVES = {
    "dispatch_compact": ("direct", "dispatch", "bfloat16", "graph"),
    "dispatch_compact, float8": ("direct", "dispatch", "float8_e4m3fn", "graph"),
    "combine": ("direct", "combine", "bfloat16", "graph"),
    "dispatch": ("direct", "dispatch_expanded", "bfloat16", "graph"),
    "NCCL's all-to-all": ("nccl", "all_to_all", "bfloat16", "graph"),
    "RoutedExchange, dispatch": ("routed", "dispatch_expanded", "bfloat16", "eager"),
}
STAGES = {
    "dispatch_compact, tokens in place": "dispatch, in place",
    "dispatch_compact": "dispatch",
    "combine": "combine",
    "dispatch": "dispatch_expanded",
}


def read(results: Path) -> list[dict[str, Any]]:
    """The records of tokens that have 8 experts each."""
    records = [json.loads(line) for line in results.read_text().splitlines()]
    return [record for record in records if record["k"] == 8]


def microseconds(value: float) -> str:
    """10 us, 1 ms."""
    return f"{value:g} us" if value < 1000 else f"{value / 1000:g} ms"


def tokens_svg(results: Path, sms: int) -> str:
    """Time against tokens a rank, of kernels of `sms` blocks."""
    some = [record for record in read(results) if record["sms"] in (None, sms)]
    first = some[0]
    tokens = sorted({record["T"] for record in some})
    x = Axis("tokens of a rank", tokens, lambda number: f"{number:,.0f}")
    y = Axis("", [1, 10, 100, 1000, 10_000, 100_000], microseconds)
    title = f"Time of dispatch and combine between {first['ranks']} {first['machine']['gpu']}"
    setting = f"{first['E']} experts, top {first['k']}, rows of {first['H']} bfloat16"
    chart = Chart(title, f"{setting}; {sms} blocks a kernel; grey: the floor", x, y)
    for name, curve in CURVES.items():
        found = {r["T"]: r for r in some if (r["path"], r["stage"], r["dtype"], r["how"]) == curve}
        chart.curve(name, [(number, found[number]["time_us"]) for number in sorted(found)])
        if name == "combine":
            floor = found[tokens[-1]]["floor_us"]  # in proportion to the tokens
            chart.line((tokens[-1] / floor, 1), (tokens[-1], floor))
    return chart.svg()


def blocks_svg(results: Path) -> str:
    """Bytes a second that leave a rank against the blocks of a kernel, for 4096 tokens."""
    some = [r for r in read(results) if (r["T"], r["dtype"], r["path"]) == (4096, "bfloat16", "direct")]
    first = some[0]
    blocks = sorted({record["sms"] for record in some})
    x = Axis("blocks (multiprocessors)", blocks, lambda number: f"{number:.0f}")
    y = Axis("", [20, 50, 100, 200, 400], lambda rate: f"{rate:g} GB/s")
    title = f"What a rank sends, by the blocks of a kernel, {first['ranks']} {first['machine']['gpu']}"
    setting = f"{first['T']} tokens a rank, {first['E']} experts, top {first['k']}, rows of {first['H']} bfloat16"
    chart = Chart(title, f"{setting}; grey: a large copy", x, y)
    for name, stage in STAGES.items():
        points = {r["sms"]: r["wire_GBps"] for r in some if r["stage"] == stage}
        chart.curve(name, [(number, points[number]) for number in sorted(points)])
    chart.line((blocks[0], first["link_GBps"]), (blocks[-1], first["link_GBps"]))
    return chart.svg()


def draw(results: Path) -> dict[str, str]:
    """Name of each figure -> its text."""
    two, four = results / "exchange_gpu_h200.jsonl", results / "exchange_gpu_h200_x4.jsonl"
    return {
        "exchange_gpu": tokens_svg(two, 132),
        "exchange_gpu_x4": tokens_svg(four, 100),
        "exchange_gpu_blocks": blocks_svg(two),
        "exchange_gpu_blocks_x4": blocks_svg(four),
    }
