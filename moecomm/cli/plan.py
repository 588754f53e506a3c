"""python -m moecomm plan: which layout and which all-to-all, before the ranks are there."""

from __future__ import annotations

import argparse
import json
import textwrap
from dataclasses import asdict, dataclass
from math import gcd
from pathlib import Path

import numpy as np

from moecomm.cli.topology import WORK, positive, ranks, text_table
from moecomm.cost import GPU_NODES, Cost, Links, predict_group
from moecomm.draw.words import nodes_in_words, topology_in_words
from moecomm.nodes import Nodes
from moecomm.topology import Topology
from moecomm.traffic import Lanes

SUMMARY = "predict time and memory of the exchange in several layouts, by each all-to-all, and say which to take"
EXAMPLES = """examples:
  python -m moecomm plan --ranks 4096 --ranks-per-node 8 --tokens 4096 --hidden 4096 --top-k 2 --experts 512 \\
      --tensor 1,2,4,8
  python -m moecomm plan --ranks 64 --ranks-per-node 16 --experts 64 --links links.json --json
links.json is what moecomm.cost.measure(comm, nodes).to_json() gave on the machine.
"""
ASSUMED = """\
Time: dispatch, combine and, with several tensor ranks, sharing the answers among them; all experts are equally \
popular, counts are not included. Tokens: of all ranks together, so a layout whose tensor ranks hold the same tokens \
has fewer. Memory, of a rank: rows sent, rows received, staging, answers gathered."""
ASSUMED_LINKS = """\
The machine is assumed, not measured: moecomm.cost.GPU_NODES, 450 GB/s a GPU inside a node and 400 Gbit/s a GPU \
between nodes. --links takes measured figures. SharedAllToAll, for rows in host memory, is left out."""


@dataclass(frozen=True)
class Option:
    """A layout with an all-to-all, and what it costs."""

    topology: Topology
    algorithm: str
    cost: Cost
    tokens_per_second: float
    memory: float

    def line(self) -> list[object]:
        """Of the table."""
        inside, between = (f"{sent:,.0f}" for sent in self.cost.messages)
        moved = (f"{sent / 2**20:,.1f}" for sent in self.cost.bytes)
        tokens = f"{self.tokens_per_second:,.0f}"
        return [inside, between, *moved, f"{self.cost.seconds * 1e3:,.3f}", f"{self.memory / 2**20:,.1f}", tokens]

    def as_json(self) -> dict[str, object]:
        """Seconds, bytes."""
        return {
            "topology": {key: value for key, value in asdict(self.topology).items() if value != 1},
            "all_to_all": self.algorithm,
            **asdict(self.cost),
            "memory": self.memory,
            "tokens_per_second": self.tokens_per_second,
        }


def add_options(parser: argparse.ArgumentParser) -> None:
    """What `run` takes."""
    parser.add_argument("--ranks", type=ranks, required=True, metavar="P", help="number of ranks")
    parser.add_argument("--experts", type=positive, required=True, metavar="E", help="experts of the layer")
    for name, (default, what) in {"ranks_per_node": (8, "ranks of a node, which is a block"), **WORK}.items():
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, type=positive, default=default, metavar="N", help=f"{what} ({default})")
    parser.add_argument(
        "--tensor", type=several, default=[1], metavar="L[,L]", help="ranks that hold the same tokens, to compare (1)"
    )
    parser.add_argument("--links", type=Path, metavar="FILE", help="figures of the machine: Links.to_json()")
    parser.add_argument("--json", action="store_true", help="print all options as JSON, the best first")


def several(text: str) -> list[int]:
    """Whole numbers >= 1, with commas between them, each once."""
    return list(dict.fromkeys(positive(number) for number in text.split(",")))


def run(options: argparse.Namespace) -> None:
    """Print the options, the best of them, and why."""
    if options.top_k > options.experts:
        options.parser.error(f"argument --top-k: {options.top_k} is more than the {options.experts} experts there are")
    try:
        links = GPU_NODES if options.links is None else Links.from_json(options.links.read_text())
        nodes = Nodes.of_size(options.ranks_per_node, options.ranks)
        found = [option for topology in layouts(options) for option in costs(links, nodes, topology, options)]
    except (ValueError, OSError) as error:
        options.parser.error(str(error))
    if not found:
        options.parser.error("in none of the layouts does a tensor group reach all experts")
    best_first = sorted(found, key=lambda option: -option.tokens_per_second)
    if options.json:
        print(json.dumps([option.as_json() for option in best_first], indent=1))
        return
    print(f"{nodes_in_words(nodes)}; {options.tokens:,} tokens on a rank, top-{options.top_k} of {options.experts}\n")
    print(table(found, best_first[0]), "", *why(best_first), "", sep="\n")
    for note in [ASSUMED, ASSUMED_LINKS][: 1 + (options.links is None)]:
        print(textwrap.fill(note, 100))


def layouts(options: argparse.Namespace) -> list[Topology]:
    """As many expert-parallel ranks as the experts can be divided among, on neighbouring ranks and spread."""
    expert = gcd(options.experts, options.ranks)
    spreads = ("expert", "expert_data") if 1 < expert < options.ranks else ("expert",)
    return [
        Topology(options.ranks, tensor=tensor, expert=expert, inner=inner)  # type: ignore[arg-type]
        for tensor in options.tensor
        for inner in spreads
    ]


def costs(links: Links, nodes: Nodes, topology: Topology, options: argparse.Namespace) -> list[Option]:
    """Each all-to-all in one layout, [] if there is no such exchange. Tensor ranks send by lanes."""
    lanes, tensor = Lanes(topology), topology.tensor
    if lanes.incomplete():
        return []
    lane = np.array(topology.group_of(0, "expert_lane"))
    rows = options.tokens * options.top_k * float(lanes.shares(0, lane).sum())
    width = options.hidden * options.dtype_bytes
    # an all-reduce, where it is shorter, moves what a gather of 2 / L of the tokens from each does
    answers = min(rows, options.tokens, 2 * options.tokens / tensor) if tensor > 1 else 0
    answer_bytes = answers * options.hidden * max(options.dtype_bytes, 4 * (options.top_k > 1))
    sharing = predict_group(links, nodes.node_of, np.arange(tensor), answer_bytes)["flat"]
    found = []
    on_lane = predict_group(links, nodes.node_of, lane, rows * width / len(lane))
    for name in ("flat", "hierarchical", "shared")[: 2 + (options.links is not None)]:
        one_way = on_lane[name]
        if name == "hierarchical" and one_way == on_lane["flat"]:  # one rank of the lane on each node
            continue
        cost = one_way.then(one_way).then(sharing) if tensor > 1 else one_way.then(one_way)
        memory = 2 * rows * width + cost.staging + tensor * answer_bytes
        tokens = options.ranks / tensor * options.tokens / cost.seconds
        found.append(Option(topology, name, cost, tokens, memory))
    return found


def table(found: list[Option], best: Option) -> str:
    """A line for each option."""
    lines: list[list[object]] = [
        ["layout", "all-to-all", *["messages"] * 2, *["MiB sent"] * 2, "time", "memory", "tokens"],
        ["", "", *["inside", "between"] * 2, "ms", "MiB", "a second"],
    ]
    last = None
    for option in found:
        layout = topology_in_words(option.topology).partition(", ")[2].rstrip(")")
        mark = "  <-- best" if option is best else ""
        lines.append(["" if layout == last else layout, option.algorithm, *option.line(), mark])
        last = layout
    return text_table([line if len(line) > 9 else [*line, ""] for line in lines], num_left=2)


def why(best_first: list[Option]) -> list[str]:
    """The best option against the others, in sentences."""
    best = best_first[0]
    name, seconds = max(best.cost.parts.items(), key=lambda part: part[1])
    where = {"inside": "links inside nodes", "between": "links between nodes", "copy": "copies", "call": "calls"}[name]
    lines = [f"Take {topology_in_words(best.topology)} with the {best.algorithm} all-to-all:"]
    for other in best_first[1:]:
        if other.topology == best.topology:
            faster = other.cost.seconds / best.cost.seconds
            here, there = sum(best.cost.messages), sum(other.cost.messages)
            lines.append(f"{faster:.2f} times as fast as {other.algorithm}: {here:,} messages instead of {there:,};")
    elsewhere = next((option for option in best_first if option.topology != best.topology), None)
    if elsewhere:
        more = best.tokens_per_second / elsewhere.tokens_per_second
        lines.append(f"{more:.2f} times the tokens of the next layout, {topology_in_words(elsewhere.topology)};")
    return [*lines, f"{seconds / best.cost.seconds:.0%} of its time goes into {where}."]
