"""Draw what a benchmark measured: its time against the size of the problem, one panel for each setting.

    python bench/plot.py bench/results/alltoall.jsonl                writes bench/results/alltoall.png and .svg
    python bench/plot.py one.jsonl other.jsonl --out both            both.png and both.svg
    python bench/plot.py gating.jsonl --where stage=whole E=128      of a large file, these records alone

A line is the median, its band reaches from p10 to p90 of the samples; a prediction is dashed. Where a file has measured
the same thing twice, the later one is drawn. The same records give the same SVG, byte for byte.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

Record = dict[str, Any]
Panel = dict[str, dict[int, Record]]
"""line -> place on the x axis -> record"""

STYLE = {
    "svg.hashsalt": "moecomm",  # without it the ids in the SVG are random
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "0.9",
    "legend.frameon": False,
}
COLORS = [
    "#444444", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#c98a00", "#3fa3d9", "#882255",
]  # fmt: skip
"""Told apart by colour-blind readers as well."""
MARKERS = ["s", "o", "D", "^", "v", "P", "X", "*"]
MOST_PANELS = 24
MOST_TICKS = 6


class Kind(NamedTuple):
    """How the records of a benchmark are drawn."""

    x: str
    """The key of the size."""
    about_x: str
    line: Callable[[Record], str]
    panel: Callable[[Record], str]
    """The title of the panel that a record belongs to."""
    about_time: str = "time of the slowest rank (us)"


def ranks_title(record: Record) -> str:
    p, nodes, per_node = record["p"], record["nodes"], record["ranks_per_node"]
    ranks = f"{p} ranks: {nodes} nodes of {'' if p == nodes * per_node else 'up to '}{per_node}"
    skew = record.get("skew")
    return f"{record['transport']}, {ranks}" + (f", {skew.capitalize()} counts" if skew else "")


def prediction_title(record: Record) -> str:
    return f"{record['library']}, {record['p']} ranks, {record['ranks_per_node']} a node"


def exchange_line(record: Record) -> str:
    return f"{record['exchange']}, {record['algorithm']}, {record['send']}"


def exchange_title(record: Record) -> str:
    setting = f"{record['tokens']} tokens, top {record['top_k']}, rows of {record['hidden']}"
    return f"{ranks_title(record)}\n{setting}"


def gate_setting(record: Record) -> str:
    return f"{record['E']} experts, top {record['k']}, rows of {record['H']} {record['dtype']}"


def gpu_line(record: Record) -> str:
    return f"{record['path']}: {record['stage']}"


def gpu_title(record: Record) -> str:
    blocks = "" if record["sms"] is None else f", {record['sms']} blocks"
    return f"{record['ranks']} GPUs, {record['how']}{blocks}\n{gate_setting(record)}"


def gating_title(record: Record) -> str:
    if record["bench"] == "local_rows":
        return f"dispatch and combine inside a rank\n{gate_setting(record)}"
    inputs = f"inputs in {record['inputs']}" if "inputs" in record else f"{record['threads']} threads"
    kept = f", {record['memory']} memory" if "memory" in record else ""
    return f"{record['stage']}, {inputs}{kept}\n{gate_setting(record)}"


def implementation(record: Record) -> str:
    return str(record["impl"])


def algorithm(record: Record) -> str:
    return str(record["algorithm"])


ALL_TO_ALL = Kind("bytes_per_pair", "bytes a pair", algorithm, ranks_title)
GATING = Kind("T", "tokens", implementation, gating_title, "time of a call (us)")
KINDS = {
    "alltoall": ALL_TO_ALL,
    "cluster": ALL_TO_ALL,
    "prediction": Kind("bytes_per_pair", "bytes a pair", algorithm, prediction_title),
    "exchange": Kind("tensor", "tensor-parallel ranks", exchange_line, exchange_title),
    "exchange_gpu": Kind("T", "tokens of a rank", gpu_line, gpu_title),
    "gating": GATING,
    "gating_cpu": GATING,
    "local_rows": GATING,
}
"""bench, as each record says -> how it is drawn."""


class Unusable(Exception):
    """What is wrong with a file, for whoever gave it."""


def records_of(path: Path) -> list[Record]:
    """The records of a file. Raises Unusable for a file that is none of a benchmark's."""
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise Unusable(f"{path}: {getattr(error, 'strerror', None) or 'not a text'}, expected JSON Lines") from None
    if not lines:
        raise Unusable(f"{path} is empty, expected the records of a benchmark: --out {path}")
    return [record_of(line, f"{path}:{number}") for number, line in enumerate(lines, 1)]


def record_of(line: str, place: str) -> Record:
    """A line that is a record of a known kind, with all that its picture needs."""
    try:
        record = json.loads(line)
    except ValueError as error:
        raise Unusable(f"{place}: not JSON ({error}), expected a record of a benchmark") from None
    bench = record.get("bench") if isinstance(record, dict) else None
    if bench not in KINDS:
        raise Unusable(f"{place}: bench is {bench!r}, expected one of {', '.join(KINDS)}")
    kind = KINDS[bench]
    try:
        kind.line(record), kind.panel(record), record[kind.x], float(record["time_us"])
    except (KeyError, TypeError) as error:
        raise Unusable(f"{place}: a record of {bench} without {error}") from None
    return record


def read(paths: Sequence[Path], where: Sequence[str] = ()) -> dict[tuple[str, str], Panel]:
    """(bench, title) -> what the panel shows. where: KEY=VALUE that a record must have. Raises Unusable."""
    panels: dict[tuple[str, str], Panel] = {}
    for path in paths:
        for record in records_of(path):
            if all(str(record.get(key)) == value for key, _, value in (term.partition("=") for term in where)):
                kind = KINDS[record["bench"]]
                lines = panels.setdefault((record["bench"], kind.panel(record)), {})
                lines.setdefault(kind.line(record), {})[record[kind.x]] = record
    if not panels:
        raise Unusable(f"no record has {' '.join(where)}")
    if len(panels) > MOST_PANELS:
        first = next(iter(next(iter(next(iter(panels.values())).values())).values()))
        keys = ", ".join(key for key, value in first.items() if isinstance(value, str | int))
        raise Unusable(f"{len(panels)} panels, expected at most {MOST_PANELS}: choose by --where KEY=VALUE ({keys})")
    return panels


def draw(panels: dict[tuple[str, str], Panel]) -> Any:
    """A figure with all panels, a line of the same name in the same colour."""
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure, grid = plt.subplots(rows, columns, figsize=(4.4 * columns, 3.6 * rows), squeeze=False, layout="constrained")
    names = list(dict.fromkeys(name for panel in panels.values() for name in panel))
    for axes in grid.flat[len(panels) :]:
        axes.remove()
    for axes, ((bench, title), panel) in zip(grid.flat, panels.items(), strict=False):
        draw_panel(axes, KINDS[bench], panel, names)
        axes.set_title(title, fontsize=8)
    return figure


def draw_panel(axes: Any, kind: Kind, panel: Panel, names: Sequence[str]) -> None:
    """The lines of a panel and its axes."""
    for name, by_size in panel.items():
        sizes = sorted(by_size)
        records = [by_size[size] for size in sizes]
        place = names.index(name)
        color = COLORS[place % len(COLORS)]
        marker = MARKERS[place % len(MARKERS)]
        times = [record["time_us"] for record in records]
        axes.plot(sizes, times, color=color, marker=marker, markersize=4, label=name)
        low, high = zip(*map(spread, records), strict=True)
        axes.fill_between(sizes, low, high, color=color, alpha=0.15, linewidth=0)
        if "predicted_us" in records[0]:
            predicted = [record["predicted_us"] for record in records]
            axes.plot(sizes, predicted, color=color, linestyle="--", label=f"{name}, predicted")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(ticks({size for by_size in panel.values() for size in by_size}))
    axes.xaxis.set_minor_locator(NullLocator())
    is_bytes = kind.x == "bytes_per_pair"
    axes.xaxis.set_major_formatter(FuncFormatter(lambda size, _: byte_label(size) if is_bytes else f"{size:,.0f}"))
    low, high = axes.get_ylim()
    # Marks between the powers of ten where there is room for them.
    between = (1, 2, 5) if high < 300 * low else (1,)
    axes.yaxis.set_major_locator(LogLocator(subs=between))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda time_us, _: f"{time_us:,.10g}"))
    axes.set_xlabel(kind.about_x)
    axes.set_ylabel(f"{kind.about_time}\nmedian, p10 to p90")
    axes.legend(fontsize=6 if len(panel) > 4 else 8)


def spread(record: Record) -> tuple[float, float]:
    """p10 and p90 of a record, from its samples where it does not have them."""
    if "p10_us" in record:
        return record["p10_us"], record["p90_us"]
    low, high = np.percentile(record.get("samples_us") or [record["time_us"]], (10, 90))
    return float(low), float(high)


def ticks(sizes: set[int]) -> list[int]:
    """The largest size and, going down, as many others as have room for their labels."""
    step = math.ceil(len(sizes) / MOST_TICKS)
    return sorted(sizes)[::-1][::step][::-1]


def byte_label(size: float) -> str:
    """1Ki for 1024 bytes."""
    for unit, name in ((2**20, "Mi"), (2**10, "Ki")):
        if size >= unit:
            return f"{size / unit:g}{name}"
    return f"{size:g}"


def main() -> None:
    """Read, draw, write; what is wrong with a file is one line and exit status 2."""
    description, _, rest = (__doc__ or "").partition("\n\n")
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, epilog=rest, formatter_class=raw)
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE.jsonl", help="written by a benchmark's --out")
    parser.add_argument("--out", metavar="STEM", help="write STEM.png and STEM.svg (default: beside the first file)")
    parser.add_argument("--where", nargs="+", default=[], metavar="KEY=VALUE", help="draw the records that have these")
    options = parser.parse_args()
    stem = options.out or str(options.files[0].with_suffix(""))
    plt.rcParams.update(STYLE)
    try:
        panels = read(options.files, options.where)
    except Unusable as error:
        parser.error(str(error))
    figure = draw(panels)
    figure.savefig(f"{stem}.png", dpi=150)
    figure.savefig(f"{stem}.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
