"""The figures of docs/scaling.md."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median

from charts import Axis, Chart

from moecomm import Nodes
from moecomm.cost import CPU_NODES, GPU_NODES, Links, Machine, Sizes, Workload, candidates, predict, predict_lanes
from moecomm.draw import layouts_svg

RESULTS = Path(__file__).parent.parent / "bench" / "results"
RANKS = [2**i for i in range(3, 17)]
ROWS_BYTES = 2**23
"""What a rank sends in all: 1024 rows of 4096 numbers of 2 bytes."""
SECONDS = [10.0**i for i in range(-5, 1)]
LANES = 8


def seconds_in_words(seconds: float) -> str:
    """10 us, 1 ms, 1 s."""
    for unit, name in ((1.0, "s"), (1e-3, "ms"), (1e-6, "us")):
        if seconds >= unit * 0.999:
            return f"{seconds / unit:g} {name}"
    return f"{seconds:g} s"


def times(links: Links, p: int, ranks_per_node: int, num_bytes: float) -> dict[str, float]:
    """Seconds of one exchange in which a rank has num_bytes to send, by each algorithm."""
    costs = predict(links, (p, ranks_per_node), num_bytes / p)
    lanes = predict_lanes(links, (p, ranks_per_node), LANES, num_bytes / p, num_bytes / LANES)
    return {
        "flat": costs["flat"].seconds,
        "hierarchical": costs["hierarchical"].seconds,
        "shared": costs["shared"].seconds,
        f"lane-restricted, {LANES} lanes, flat, with the all-gather": lanes["flat"].seconds,
    }


def scaling_svg(links: Links, ranks_per_node: int, num_bytes: int, machine: str, leave_out: str = "") -> str:
    """Time against the number of ranks."""
    x = Axis("ranks", RANKS, lambda p: f"{p:,.0f}")
    y = Axis("time of one exchange", SECONDS, seconds_in_words)
    subtitle = f"{machine}; each rank sends {num_bytes // 2**10:,} KiB in all"
    chart = Chart("Predicted time of an exchange, 8 to 65,536 ranks", subtitle, x, y)
    found = {p: times(links, p, ranks_per_node, num_bytes) for p in RANKS}
    for name in found[RANKS[0]]:
        if name != leave_out:
            chart.curve(name, [(p, found[p][name]) for p in RANKS])
    return chart.svg()


def predictions() -> list[tuple[str, str, float, float]]:
    """Library, algorithm, measured and predicted seconds: what bench/prediction.py timed, and the model of today."""
    found = []
    for file in sorted(RESULTS.glob("prediction_*.jsonl")):
        for record in map(json.loads, file.read_text().splitlines()):
            nodes = record["p"], record["ranks_per_node"]
            costs = predict(Links.from_json(json.dumps(record["links"])), nodes, record["bytes_per_pair"])
            name = record["algorithm"]
            predicted = costs["library" if name == "mpi" else name].seconds
            found.append((record["library"], name, record["time_us"] / 1e6, predicted))
    return found


def median_error(found: list[tuple[str, str, float, float]]) -> float:
    """Of the predicted times, as a share of the measured ones."""
    return median(abs(predicted / measured - 1) for *_, measured, predicted in found)


def predictions_svg() -> str:
    """Predicted against measured time."""
    found = predictions()
    marks = [10.0**i for i in range(-3, 1)]
    x, y = Axis("measured", marks, seconds_in_words), Axis("predicted", marks, seconds_in_words)
    subtitle = f"4 emulated hosts x 16 ranks, 16 B to 64 KiB a pair; median error {median_error(found):.0%}"
    chart = Chart("Predicted and measured time", subtitle, x, y)
    chart.line((marks[0], marks[0]), (marks[-1], marks[-1]))
    for kind in dict.fromkeys(result[:2] for result in found):
        chart.scatter(", ".join(kind), [result[2:] for result in found if result[:2] == kind])
    return chart.svg()


def plan_svg() -> str:
    """What docs/scaling.md plans, within 80 GiB."""
    machine = Machine(Nodes.of_size(8, 1024))
    workload = Workload(experts=(128,), hidden=4096, ffn=16384, top_k=2, tokens=4096)
    layouts = candidates(machine, workload, Sizes(tensor=(1, 2, 4, 8)))
    return layouts_svg(layouts, "1,024 GPUs on 128 nodes of 8; 128 experts, top-2; training", 80 * 2.0**30)


def draw() -> dict[str, str]:
    """Name of each figure -> its text."""
    return {
        "plan": plan_svg(),
        "scaling_gpu": scaling_svg(GPU_NODES, 8, ROWS_BYTES, "nodes of 8 GPUs (assumed figures)", leave_out="shared"),
        "scaling_cpu": scaling_svg(CPU_NODES, 64, 2**16, "nodes of 64 cores (assumed figures)"),
        "predictions": predictions_svg(),
    }
