"""The figures of docs/direct.md: what bench/exchange_gpu.py measured between GPUs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from charts import Axis, Chart

CURVES = {
    "dispatch": ("direct", "dispatch", "bfloat16"),
    "dispatch, float8": ("direct", "dispatch", "float8_e4m3fn"),
    "combine": ("direct", "combine", "bfloat16"),
    "dispatch, expanded": ("direct", "dispatch_expanded", "bfloat16"),
    "NCCL all-to-all in a graph": ("nccl", "all_to_all", "bfloat16"),
    "RoutedExchange, dispatch": ("routed", "dispatch_expanded", "bfloat16"),
}


def read(results: Path) -> list[dict[str, Any]]:
    """The records of a file."""
    return [json.loads(line) for line in results.read_text().splitlines()]


def microseconds(value: float) -> str:
    """10 us, 1 ms."""
    return f"{value:g} us" if value < 1000 else f"{value / 1000:g} ms"


def tokens_svg(records: list[dict[str, Any]]) -> str:
    """Time against tokens a rank, with all multiprocessors."""
    some = [r for r in records if (r["H"], r["k"]) == (7168, 8) and r["sms"] in (None, 132)]
    first = some[0]
    x = Axis("tokens of a rank", [1, 8, 32, 128, 1024, 4096, 32768], lambda tokens: f"{tokens:,.0f}")
    y = Axis("time of a call", [1, 10, 100, 1000, 10_000], microseconds)
    machine = first["machine"]
    title = f"{machine['gpus']} {machine['gpu']}, {first['E']} experts, top {first['k']}, H = {first['H']}"
    chart = Chart("Dispatch and combine between GPUs", f"{title}: median of the slowest rank; grey: the floor", x, y)
    for name, (path, stage, dtype) in CURVES.items():
        how = "eager" if path == "routed" else "graph"
        points = {r["T"]: r for r in some if (r["path"], r["stage"], r["dtype"], r["how"]) == (path, stage, dtype, how)}
        chart.curve(name, [(tokens, points[tokens]["time_us"]) for tokens in sorted(points)])
        if name == "combine":
            floors = [
                (tokens, points[tokens]["floor_us"]) for tokens in sorted(points) if points[tokens]["floor_us"] >= 1
            ]
            chart.line(floors[0], floors[-1])
    return chart.svg()


def multiprocessors_svg(records: list[dict[str, Any]]) -> str:
    """Time against the number of multiprocessors, for 4096 tokens."""
    some = [r for r in records if (r["T"], r["H"], r["dtype"]) == (4096, 7168, "bfloat16") and r["path"] == "direct"]
    x = Axis("multiprocessors", [4, 8, 12, 16, 24, 32, 64, 132], lambda number: f"{number:.0f}")
    y = Axis("time of a call", [100, 1000], microseconds)
    chart = Chart("How many multiprocessors an exchange needs", "4096 tokens a rank, bfloat16; grey: the floor", x, y)
    for stage in ("dispatch", "dispatch, in place", "dispatch_expanded", "combine", "combine_expanded"):
        points = sorted({r["sms"]: r["time_us"] for r in some if r["stage"] == stage}.items())
        chart.curve(stage.replace("_", ", "), [(sms, time) for sms, time in points if time < 1000])
    floor = next(r["floor_us"] for r in some if r["stage"] == "dispatch")
    chart.line((4, floor), (132, floor))
    return chart.svg()
