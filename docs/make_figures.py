"""Draw every figure of the documentation.

python docs/make_figures.py            writes docs/figures/*.svg
python docs/make_figures.py --check    changes nothing; names the files that are stale and exits 1 if there are any
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import exchange_figure
import pr_moe_figure
import scaling_figures
import students_figure
from architecture_figure import architecture_svg
from gating_figure import gating_svg
from models_figure import models_svg

from moecomm import Nodes, Topology
from moecomm.draw import lanes_svg, topology_svg, traffic_svg, two_hops_svg

FOLDER = Path(__file__).parent / "figures"
RESULTS = Path(__file__).parents[1] / "bench" / "results"

EQUAL = Nodes.of_size(4, 16)
UNEQUAL = Nodes.of_size(4, 10)
TOPOLOGY = Topology(16, tensor=2, expert=4)
SPREAD = Topology(16, tensor=2, expert=4, inner="expert_data")
SLICED = Topology(16, tensor=2, expert=4, expert_tensor=2)
STAGES = Topology(16, pipeline=2, expert=4)


def draw() -> dict[str, str]:
    """Name of each file -> its text."""
    figures = {
        "architecture": architecture_svg(),
        "two_hops": two_hops_svg(EQUAL),
        "two_hops_unequal": two_hops_svg(UNEQUAL, source=8),
        "traffic": traffic_svg(EQUAL),
        "traffic_unequal": traffic_svg(UNEQUAL),
        "topology_128_ranks": topology_svg(Topology(128, tensor=8, expert=128), "expert_lane", ranks_per_node=8),
        "topology_inner_expert_data": topology_svg(SPREAD, "expert", ranks_per_node=4),
        "topology_sliced_experts": topology_svg(SLICED, "expert", ranks_per_node=4),
        "topology_pipeline": topology_svg(STAGES, "expert_data", ranks_per_node=4),
        "lanes": lanes_svg(Topology(16, tensor=2, expert=16)),
        "models": models_svg(Topology(8, tensor=2, expert=4), num_experts=8),
        "gating_h200": gating_svg(RESULTS / "gating_h200.jsonl"),
    }
    for axis in ("tensor", "data", "expert", "expert_data", "expert_lane"):
        figures[f"topology_{axis}"] = topology_svg(TOPOLOGY, axis, ranks_per_node=4)
    figures |= scaling_figures.draw() | pr_moe_figure.draw(RESULTS) | exchange_figure.draw(RESULTS)
    figures |= students_figure.draw(RESULTS / "claims_h200.jsonl")
    return {f"{name}.svg": svg for name, svg in figures.items()}


def stale(folder: Path) -> list[str]:
    """The names of the files in `folder` that are missing, not as drawn now, or drawn by nothing."""
    found = {file.name: file.read_bytes() for file in folder.glob("*.svg")}
    drawn = {name: svg.encode() for name, svg in draw().items()}
    return sorted(name for name in found | drawn if found.get(name) != drawn.get(name))


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the figures, or check them. Returns the exit status."""
    parser = argparse.ArgumentParser(description="Draw every figure of the documentation.")
    parser.add_argument("--check", action="store_true", help="change nothing; name stale files and exit 1 if any")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where the figures are (docs/figures)")
    options = parser.parse_args(arguments)
    if options.check:
        names = stale(options.folder)
        print("\n".join(f"{name} is stale" for name in names) or "every figure is current")
        return 1 if names else 0
    options.folder.mkdir(parents=True, exist_ok=True)
    for name, svg in draw().items():
        (options.folder / name).write_bytes(svg.encode())
        print(options.folder / name)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
