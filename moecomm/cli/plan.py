"""python -m moecomm plan: which layout and which all-to-all, before the ranks are there."""

from __future__ import annotations

import argparse
import json
import textwrap
from dataclasses import asdict, dataclass, replace
from math import gcd
from pathlib import Path

import numpy as np

from moecomm.cli.topology import WORK, Line, add_numbers, positive, ranks, text_table
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
PARTS = {"inside": "links inside nodes", "between": "links between nodes", "copy": "copies", "call": "calls"}
"""The parts of a Cost in words."""


@dataclass(frozen=True)
class Candidate:
    """A layout with an all-to-all, and what it costs: seconds, bytes."""

    topology: Topology
    all_to_all: str
    cost: Cost
    memory: float
    tokens_per_second: float

    def cells(self) -> list[str]:
        """Its numbers in the table."""
        cost = self.cost
        return [
            *(f"{messages:,.0f}" for messages in cost.messages),
            *(f"{sent / 2**20:,.1f}" for sent in cost.bytes),
            f"{cost.seconds * 1e3:,.3f}",
            f"{self.memory / 2**20:,.1f}",
            f"{self.tokens_per_second:,.0f}",
        ]

    def as_json(self) -> dict[str, object]:
        """Its entry in the list of --json."""
        return {
            "topology": {name: size for name, size in asdict(self.topology).items() if size != 1},
            "all_to_all": self.all_to_all,
            **asdict(self.cost),
            "memory": self.memory,
            "tokens_per_second": self.tokens_per_second,
        }


def add_options(parser: argparse.ArgumentParser) -> None:
    """What `run` takes."""
    parser.add_argument("--ranks", type=ranks, required=True, metavar="P", help="number of ranks")
    parser.add_argument("--experts", type=positive, required=True, metavar="E", help="experts of the layer")
    add_numbers(parser, WORK)
    parser.add_argument(
        "--tensor",
        type=tensor_sizes,
        default=[1],
        metavar="L[,L]",
        help="ranks that hold the same tokens, to compare (1)",
    )
    parser.add_argument("--links", type=Path, metavar="FILE", help="figures of the machine: Links.to_json()")
    parser.add_argument("--json", action="store_true", help="print all options as JSON, the best first")


def tensor_sizes(text: str) -> list[int]:
    """Whole numbers >= 1, with commas between them, without repetitions."""
    return list(dict.fromkeys(map(positive, text.split(","))))


def run(options: argparse.Namespace) -> None:
    """Print the candidates, the best of them, and why."""
    if options.top_k > options.experts:
        options.parser.error(f"argument --top-k: {options.top_k} is more than the {options.experts} experts there are")
    try:
        links = GPU_NODES if options.links is None else Links.from_json(options.links.read_text())
        nodes = Nodes.of_size(options.ranks_per_node, options.ranks)
        candidates = []
        for topology in layouts(options):
            candidates += candidates_of(links, nodes, topology, options)
    except (ValueError, OSError) as error:
        options.parser.error(str(error))
    if not candidates:
        options.parser.error("in none of the layouts does a tensor group reach all experts")
    # Tokens, not seconds: layouts with more tensor ranks are faster, but with fewer tokens.
    best_first = sorted(candidates, key=lambda candidate: -candidate.tokens_per_second)
    if options.json:
        print(json.dumps([candidate.as_json() for candidate in best_first], indent=1))
        return
    print(f"{nodes_in_words(nodes)}; {options.tokens:,} tokens on a rank, top-{options.top_k} of {options.experts}\n")
    print(candidate_table(candidates, best_first[0]), "", *reasons(best_first), "", sep="\n")
    print(textwrap.fill(ASSUMED, 100))
    if options.links is None:
        print(textwrap.fill(ASSUMED_LINKS, 100))


def layouts(options: argparse.Namespace) -> list[Topology]:
    """As many expert-parallel ranks as the experts can be divided among, on neighbouring ranks and spread."""
    expert = gcd(options.experts, options.ranks)
    topologies = []
    for tensor in options.tensor:
        neighbours = Topology(options.ranks, tensor=tensor, expert=expert)
        topologies.append(neighbours)
        # An expert group of one rank or of all ranks has nothing to spread.
        if 1 < expert < options.ranks:
            topologies.append(replace(neighbours, inner="expert_data"))
    return topologies


def candidates_of(links: Links, nodes: Nodes, topology: Topology, options: argparse.Namespace) -> list[Candidate]:
    """Each all-to-all in one layout, [] if there is no such exchange. Tensor ranks send by lanes."""
    lanes = Lanes(topology)
    if lanes.incomplete():
        return []
    tensor = topology.tensor
    lane = np.array(topology.group_of(0, "expert_lane"))
    row_bytes = options.hidden * options.dtype_bytes
    rows = options.tokens * options.top_k * float(lanes.shares(0, lane).sum())
    # An all-reduce, where it is shorter, moves what a gather of 2 / L of the tokens from each rank does.
    answers = min(rows, options.tokens, 2 * options.tokens / tensor) if tensor > 1 else 0
    # Answers of several experts are sums, which are shared in float32 at least.
    answer_bytes = answers * options.hidden * max(options.dtype_bytes, 4 if options.top_k > 1 else 0)
    sharing = predict_group(links, nodes.node_of, np.arange(tensor), answer_bytes)["flat"]
    on_lane = predict_group(links, nodes.node_of, lane, rows * row_bytes / len(lane))
    # SharedAllToAll moves rows in host memory: the assumed machine has its rows on GPUs.
    names = ["flat", "hierarchical"] if options.links is None else ["flat", "hierarchical", "shared"]
    candidates = []
    for name in names:
        # With one rank of the lane on each node there is no second hop.
        if name == "hierarchical" and on_lane[name] == on_lane["flat"]:
            continue
        cost = on_lane[name].then(on_lane[name])
        if tensor > 1:
            cost = cost.then(sharing)
        memory = 2 * rows * row_bytes + cost.staging + tensor * answer_bytes
        tokens = options.ranks / tensor * options.tokens
        candidates.append(Candidate(topology, name, cost, memory, tokens / cost.seconds))
    return candidates


def candidate_table(candidates: list[Candidate], best: Candidate) -> str:
    """A line for each candidate."""
    lines: list[Line] = [
        ["layout", "all-to-all", *["messages"] * 2, *["MiB sent"] * 2, "time", "memory", "tokens", ""],
        ["", "", *["inside", "between"] * 2, "ms", "MiB", "a second", ""],
    ]
    topology = None
    for candidate in candidates:
        layout = ""
        # The layout is named on its first line alone.
        if candidate.topology != topology:
            topology = candidate.topology
            layout = topology_in_words(topology).partition(", ")[2].rstrip(")")
        mark = "  <-- best" if candidate is best else ""
        lines.append([layout, candidate.all_to_all, *candidate.cells(), mark])
    return text_table(lines, num_left=2)


def reasons(best_first: list[Candidate]) -> list[str]:
    """The best candidate against the rest, in sentences."""
    best, *rest = best_first
    sentences = [f"Take {topology_in_words(best.topology)} with the {best.all_to_all} all-to-all:"]
    for candidate in rest:
        if candidate.topology == best.topology:
            ratio = candidate.cost.seconds / best.cost.seconds
            messages = f"{sum(best.cost.messages):,} messages instead of {sum(candidate.cost.messages):,}"
            sentences.append(f"{ratio:.2f} times as fast as {candidate.all_to_all}: {messages};")
    second = next((candidate for candidate in rest if candidate.topology != best.topology), None)
    if second is not None:
        ratio = best.tokens_per_second / second.tokens_per_second
        sentences.append(f"{ratio:.2f} times the tokens of the next layout, {topology_in_words(second.topology)};")
    part, seconds = max(best.cost.parts.items(), key=lambda item: item[1])
    return [*sentences, f"{seconds / best.cost.seconds:.0%} of its time goes into {PARTS[part]}."]
