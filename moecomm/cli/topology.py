"""python -m moecomm topology: the groups of a topology, and what its exchanges would send."""

from __future__ import annotations

import argparse
import textwrap
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moecomm.arrays import Counts
from moecomm.cli.sent import Lanes, Rows, Sent, differ, flat, hierarchical, sharing
from moecomm.cli.words import counted, in_bytes, nodes_in_words, ranks_in_words, text_table
from moecomm.nodes import Nodes
from moecomm.topology import AXES, Topology

EXAMPLES = """examples:
  python -m moecomm topology --world-size 128 --tensor 8 --expert 128 --ranks-per-node 8
  python -m moecomm topology --world-size 16 --tensor 2 --expert 4 --axis expert_lane
  python -m moecomm topology --world-size 16 --tensor 2 --expert 4 --axis expert,expert_data --svg groups.svg
"""
MOST_GROUPS = 32
"""Groups that are listed line by line; --json has all."""
SIZES = {
    "tensor": "ranks that hold the same tokens",
    "pipeline": "stages",
    "expert": "ranks among which the experts are divided",
    "expert_tensor": "ranks that hold slices of one expert",
}
"""Those that are 1 if left out."""


class Workload(NamedTuple):
    """What a rank has to send."""

    tokens: int
    hidden: int
    top_k: int
    dtype_bytes: int


def add_command(commands: Any) -> None:
    """Add `topology` to the subparsers of the command line."""
    parser = commands.add_parser(
        "topology",
        help="print the groups of a topology and what its exchanges would send",
        description="Print the groups of a topology, and the messages and bytes that each exchange would need in it.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    sizes = parser.add_argument_group("sizes of the topology")
    sizes.add_argument("--world-size", type=int, required=True, metavar="P", help="number of ranks")
    for name, what in SIZES.items():
        sizes.add_argument(f"--{name.replace('_', '-')}", type=int, default=1, metavar="N", help=f"{what} (1)")
    sizes.add_argument(
        "--inner", default="expert", help="which runs faster over the ranks: expert (default) or expert_data"
    )
    sizes.add_argument("--ranks-per-node", type=int, default=8, metavar="G", help="nodes are blocks of G ranks (8)")
    shown = parser.add_argument_group("what is printed")
    shown.add_argument(
        "--axis", metavar="AXIS[,AXIS]", help=f"list the groups along one axis, or a product: {', '.join(AXES)}"
    )
    shown.add_argument("--svg", type=Path, metavar="FILE", help="draw the groups along the axis (expert) too")
    shown.add_argument("--json", action="store_true", help="print the rank lists as JSON instead: Topology.to_json()")
    work = parser.add_argument_group("what a rank has to send, for the bytes")
    work.add_argument("--tokens", type=positive, default=4096, metavar="T", help="tokens on a rank (4096)")
    work.add_argument("--hidden", type=positive, default=4096, metavar="H", help="numbers in a row (4096)")
    work.add_argument("--top-k", type=positive, default=1, metavar="K", help="experts of a token (1)")
    work.add_argument("--dtype-bytes", type=positive, default=2, metavar="B", help="bytes of a number (2)")
    parser.set_defaults(run=lambda options: run(options, parser))


def positive(text: str) -> int:
    """`text` as a whole number >= 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number >= 1")
    return int(text)


def run(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Print, and draw, what the options ask for."""
    axes = [axis.strip() for axis in options.axis.split(",")] if options.axis is not None else []
    try:
        sizes = {name: getattr(options, name) for name in SIZES}
        topology = Topology(options.world_size, inner=options.inner, **sizes)
        nodes = Nodes.of_size(options.ranks_per_node, topology.world_size)
        groups = topology.groups(*axes) if axes else []
        if options.svg is not None:
            from moecomm import draw

            picture = draw.topology_svg(topology, *(axes or ["expert"]), ranks_per_node=options.ranks_per_node)
            options.svg.write_bytes(picture.encode())
    except ValueError as error:
        parser.error(str(error))
    except OSError as error:
        parser.error(f"argument --svg: {options.svg}: {error.strerror}")
    if options.json:
        print(topology.to_json())
        return 0
    print(f"{topology} on {nodes_in_words(nodes)}\n")
    print(group_table(" x ".join(axes), groups, nodes) if axes else axis_table(topology, nodes))
    work = Workload(options.tokens, options.hidden, options.top_k, options.dtype_bytes)
    print(f"\n{exchange_table(topology, nodes, work)}")
    return 0


# ---- groups --------------------------------------------------------------------------------------------------------


def axis_table(topology: Topology, nodes: Nodes) -> str:
    """A line for each axis: how many groups, of how many ranks, on how many nodes, and the first and the last."""
    rows = [["axis", "first group", "last group", "groups", "ranks each", "nodes each"]]
    for axis in AXES:
        groups = topology.groups(axis)
        first, last = ranks_in_words(groups[0]), ranks_in_words(groups[-1]) if len(groups) > 1 else ""
        spread = max(_num_nodes(nodes, group) for group in groups)
        rows.append([axis, first, last, str(len(groups)), str(len(groups[0])), str(spread)])
    return text_table(rows, num_left=3)


def group_table(along: str, groups: list[list[int]], nodes: Nodes) -> str:
    """A line for each group: its ranks, and on how many nodes they are."""
    lines = [[f"g{i}", ranks_in_words(group), str(_num_nodes(nodes, group))] for i, group in enumerate(groups)]
    if len(lines) > MOST_GROUPS:
        lines[MOST_GROUPS - 2 : -1] = [["...", f"{len(lines) - MOST_GROUPS + 1} more", ""]]
    heading = f"{counted(len(groups), 'group')} of {counted(len(groups[0]), 'rank')} along {along}"
    return f"{heading}\n\n{text_table([['group', 'ranks', 'nodes'], *lines], num_left=2)}"


def _num_nodes(nodes: Nodes, group: list[int]) -> int:
    return len(np.unique(nodes.node_of[group]))


# ---- exchanges -----------------------------------------------------------------------------------------------------


def exchange_table(topology: Topology, nodes: Nodes, work: Workload) -> str:
    """A line for each exchange: messages and bytes of a rank, inside its node and between nodes."""
    problem = Lanes(topology).problem() if topology.tensor > 1 else None
    counts = exchanges(topology, nodes, work)
    if topology.tensor > 1 and problem is None:
        counts |= lane_exchanges(topology, nodes, work)
    notes = [_assumptions(topology, work)]
    if problem is not None:
        notes.append(f"A lane-restricted exchange is not possible: {problem}.")
    if topology.expert_tensor > 1:
        notes.append(
            f"Without lanes a rank reaches one of the {topology.expert_tensor} slices of an expert: to add the answers "
            "of all slices comes on top."
        )
    if differ([sent for sent, _ in counts.values()]):
        notes.append("Ranks differ: each number is of the rank that has most.")
    if work.tokens * work.top_k < topology.expert:
        notes.append(f"With {work.tokens * work.top_k} rows for {topology.expert} ranks, many messages would be empty.")
    rows = [["a rank sends, one way", *["messages"] * 3, *["bytes"] * 3], ["", *["inside", "between", "total"] * 2]]
    rows += [[name, *_largest(sent, width)] for name, (sent, width) in counts.items()]
    return "\n".join([text_table(rows, num_left=1), "", *(textwrap.fill(note, 100) for note in notes)])


def exchanges(topology: Topology, nodes: Nodes, work: Workload) -> dict[str, tuple[Sent, int]]:
    """RoutedExchange over the expert groups: what it sends, and the bytes of a row."""
    groups, width = topology.groups("expert"), work.hidden * work.dtype_bytes

    def rows_for(_: int, group: Counts) -> Rows:
        return np.full(len(group), work.tokens * work.top_k / len(group))

    return {
        "flat": (flat(nodes, groups, rows_for), width),
        "hierarchical": (hierarchical(nodes, groups, rows_for), width),
    }


def lane_exchanges(topology: Topology, nodes: Nodes, work: Workload) -> dict[str, tuple[Sent, int]]:
    """TensorParallelExchange over the expert lanes: what it sends, and the bytes of a row."""
    groups, width, lanes = topology.groups("expert_lane"), work.hidden * work.dtype_bytes, Lanes(topology)

    def rows_for(rank: int, group: Counts) -> Rows:
        return work.tokens * work.top_k * lanes.shares(rank, group)

    way, shared = sharing(nodes, topology, lambda rank: lanes.answered(rank, work.tokens, work.top_k), work.tokens)
    return {
        "lane-restricted, flat": (flat(nodes, groups, rows_for), width),
        "lane-restricted, hierarchical": (hierarchical(nodes, groups, rows_for), width),
        f"  then sharing, {way}": (shared, work.hidden * _bytes_shared(topology, work)),
    }


def _bytes_shared(topology: Topology, work: Workload) -> int:
    """Of a number, where tensor ranks share answers: sums of several lanes are not rounded before they are complete."""
    one_answer = work.top_k * topology.expert_tensor == 1
    return work.dtype_bytes if one_answer else 8 if work.dtype_bytes == 8 else 4


def _largest(sent: Sent, width: int) -> list[str]:
    messages = [*sent.messages.max(axis=0), sent.messages.sum(axis=1).max()]
    rows = [*sent.rows.max(axis=0), sent.rows.sum(axis=1).max()]
    return [*map(str, messages), *(in_bytes(float(number) * width) for number in rows)]


def _assumptions(topology: Topology, work: Workload) -> str:
    said = (
        f"Assumed: {work.tokens} tokens on a rank, routed to {counted(work.top_k, 'expert')} each, every rank's "
        f"experts asked equally often; rows of {work.hidden} x {work.dtype_bytes} bytes. Combine sends as much back. "
        "Counts and expert ids come on top."
    )
    if topology.tensor == 1:
        return said
    apart = "" if work.top_k == 1 else ", where possible with the experts of a token on different lanes"
    return (
        f"{said} Tensor ranks hold the same tokens, and without lanes each of them sends all. Sharing comes once, "
        f"after combine{apart}."
    )
