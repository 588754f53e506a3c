"""Draw every figure of the documentation.

python docs/make_figures.py            writes docs/figures/*.svg
python docs/make_figures.py --check    changes nothing; names the files that are stale and exits 1 if there are any
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from moecomm import Nodes
from moecomm.arrays import Counts
from moecomm.draw import lanes_svg, topology_svg, traffic_svg, two_hops_svg
from moecomm.topology import Topology

FOLDER = Path(__file__).parent / "figures"

BLOCKS = Nodes.of_size(4, 16)
UNEQUAL = Nodes([range(4), range(4, 8), range(8, 10)])
TOPOLOGY = Topology(16, tensor=2, expert=4)

FIGURES: dict[str, Callable[[], str]] = {
    "two_hops.svg": lambda: two_hops_svg(BLOCKS),
    "two_hops_nodes_of_2.svg": lambda: two_hops_svg(Nodes.of_size(2, 8)),
    "two_hops_unequal.svg": lambda: two_hops_svg(UNEQUAL),
    "two_hops_unequal_from_8.svg": lambda: two_hops_svg(UNEQUAL, source=8),
    "traffic.svg": lambda: traffic_svg(BLOCKS),
    "traffic_unequal.svg": lambda: traffic_svg(UNEQUAL),
    "traffic_uneven_rows.svg": lambda: traffic_svg(BLOCKS, popular_experts(16)),
    "topology_tensor.svg": lambda: topology_svg(TOPOLOGY, "tensor", ranks_per_node=4),
    "topology_data.svg": lambda: topology_svg(TOPOLOGY, "data", ranks_per_node=4),
    "topology_expert.svg": lambda: topology_svg(TOPOLOGY, "expert", ranks_per_node=4),
    "topology_expert_data.svg": lambda: topology_svg(TOPOLOGY, "expert_data", ranks_per_node=4),
    "topology_expert_lane.svg": lambda: topology_svg(TOPOLOGY, "expert_lane", ranks_per_node=4),
    "topology_128_ranks.svg": lambda: topology_svg(
        Topology(128, tensor=8, expert=128), "expert_lane", ranks_per_node=8
    ),
    "lanes.svg": lambda: lanes_svg(Topology(16, tensor=2, expert=16)),
    "lanes_8_ranks.svg": lambda: lanes_svg(Topology(8, tensor=2, expert=8)),
}
"""Name of the file -> what draws it."""


def popular_experts(p: int) -> Counts:
    """[p, p] rows from each source to each destination: some destinations are much asked for, some pairs are empty."""
    source, destination = np.indices((p, p))
    popularity = 36 // (1 + 5 * destination % p)
    return np.asarray(popularity * ((3 * source + 7 * destination) % 5) // 2, np.int64)


def stale(folder: Path) -> list[str]:
    """What is wrong with the figures in `folder`, a line for each file that is not as it would be drawn now."""
    problems = []
    for name, draw in FIGURES.items():
        file = folder / name
        if not file.exists():
            problems.append(f"{name}: missing")
        elif file.read_bytes() != draw().encode():
            problems.append(f"{name}: differs from what is drawn now")
    return problems + [
        f"{file.name}: nothing draws it" for file in sorted(folder.glob("*.svg")) if file.name not in FIGURES
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the figures, or check them. Returns the exit status."""
    parser = argparse.ArgumentParser(description="Draw every figure of the documentation.")
    parser.add_argument("--check", action="store_true", help="change nothing; name stale files and exit 1 if any")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where the figures are (docs/figures)")
    options = parser.parse_args(arguments)
    if options.check:
        problems = stale(options.folder)
        print("\n".join(problems) if problems else f"{len(FIGURES)} figures are current")
        return 1 if problems else 0
    options.folder.mkdir(parents=True, exist_ok=True)
    for name, draw in FIGURES.items():
        (options.folder / name).write_bytes(draw().encode())
        print(options.folder / name)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
