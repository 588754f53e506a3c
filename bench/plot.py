"""Draw what a benchmark measured: time against bytes a pair, one panel for each setting, one line for each algorithm.

    python bench/plot.py bench/results/alltoall.jsonl                writes bench/results/alltoall.png and .svg
    python bench/plot.py one.jsonl other.jsonl --out both            both.png and both.svg

A line is the median, its band reaches from p10 to p90. Where a file has measured the same thing twice, the later one is
drawn. The same records give the same SVG, byte for byte.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

Panel = dict[str, dict[int, dict[str, Any]]]
"""algorithm -> bytes a pair -> record"""

STYLE = {
    "svg.hashsalt": "moecomm",  # without it the ids in the SVG are random
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "0.9",
    "legend.frameon": False,
}
COLORS = ["#444444", "#0072b2", "#d55e00", "#009e73", "#cc79a7"]  # told apart by colour-blind readers as well
MARKERS = ["s", "o", "D", "^", "v"]


def read(paths: list[Path]) -> dict[str, Panel]:
    """title of the panel -> what it shows"""
    panels: dict[str, Panel] = {}
    for path in paths:
        for line in path.read_text().splitlines():
            record = json.loads(line)
            lines = panels.setdefault(title(record), {})
            lines.setdefault(record["algorithm"], {})[record["bytes_per_pair"]] = record
    return panels


def title(record: dict[str, Any]) -> str:
    p, nodes, per_node = record["p"], record["nodes"], record["ranks_per_node"]
    ranks = f"{p} ranks: {nodes} nodes of {'' if p == nodes * per_node else 'up to '}{per_node}"
    return f"{record['transport']}, {ranks}" + (f", {record['skew'].capitalize()} counts" if record["skew"] else "")


def draw(panels: dict[str, Panel]) -> Any:
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure, grid = plt.subplots(rows, columns, figsize=(4.4 * columns, 3.4 * rows), squeeze=False, layout="constrained")
    algorithms = list(dict.fromkeys(name for panel in panels.values() for name in panel))
    for axes in grid.flat[len(panels) :]:
        axes.remove()
    for axes, (name, panel) in zip(grid.flat, panels.items(), strict=False):
        draw_panel(axes, panel, algorithms)
        axes.set_title(name, fontsize=9)
    return figure


def draw_panel(axes: Any, panel: Panel, algorithms: list[str]) -> None:
    for algorithm, by_size in panel.items():
        sizes = sorted(by_size)
        median, low, high = ([by_size[size][key] for size in sizes] for key in ("time_us", "p10_us", "p90_us"))
        place = algorithms.index(algorithm)
        color = COLORS[place % len(COLORS)]
        axes.plot(sizes, median, color=color, marker=MARKERS[place % len(MARKERS)], markersize=4, label=algorithm)
        axes.fill_between(sizes, low, high, color=color, alpha=0.15, linewidth=0)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(sorted({size for by_size in panel.values() for size in by_size}))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda size, _: byte_label(size)))
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda time_us, _: f"{time_us:,.10g}"))
    axes.set_xlabel("bytes a pair")
    axes.set_ylabel("time of the slowest rank (us)\nmedian, p10 to p90")
    axes.legend()


def byte_label(size: float) -> str:
    for unit, name in ((2**20, "Mi"), (2**10, "Ki")):
        if size >= unit:
            return f"{size / unit:g}{name}"
    return f"{size:g}"


def main() -> None:
    description, _, rest = (__doc__ or "").partition("\n\n")
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, epilog=rest, formatter_class=raw)
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE.jsonl", help="written by bench/alltoall.py --out")
    parser.add_argument("--out", metavar="STEM", help="write STEM.png and STEM.svg (default: beside the first file)")
    options = parser.parse_args()
    stem = options.out or str(options.files[0].with_suffix(""))
    plt.rcParams.update(STYLE)
    figure = draw(read(options.files))
    figure.savefig(f"{stem}.png", dpi=150)
    figure.savefig(f"{stem}.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
