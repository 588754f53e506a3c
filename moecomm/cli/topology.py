"""python -m moecomm topology: the groups of a topology, and what its exchanges would send."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from moecomm.arrays import Counts
from moecomm.cost.model import MOST_RANKS
from moecomm.draw import topology_svg
from moecomm.draw.words import counted, nodes_in_words, ranks_in_words, topology_in_words
from moecomm.nodes import Nodes
from moecomm.topology import AXES, Topology
from moecomm.traffic import Lanes, Rows, Sent, flat, hierarchical

SUMMARY = "print the groups of a topology, and the messages and bytes that each exchange would need in it"
EXAMPLES = """examples:
  python -m moecomm topology --world-size 128 --tensor 8 --expert 128 --ranks-per-node 8
  python -m moecomm topology --world-size 16 --tensor 2 --expert 4 --axis expert_lane
  python -m moecomm topology --world-size 16 --tensor 2 --expert 4 --axis expert,expert_data --svg groups.svg
"""
SIZES = {
    "tensor": (1, "ranks that hold the same tokens"),
    "pipeline": (1, "stages"),
    "expert": (1, "ranks among which the experts are divided"),
    "expert_tensor": (1, "ranks that hold slices of one expert"),
}
WORK = {
    "tokens": (4096, "tokens on a rank"),
    "hidden": (4096, "numbers in a row"),
    "top_k": (1, "experts of a token"),
    "dtype_bytes": (2, "bytes of a number"),
}
ASSUMED = """\
Assumed: {} tokens on a rank, top-{}, spread evenly over the {} ranks of an expert group, even where that is less than \
a row for each; rows of {} x {} bytes. Combine sends as much back. Counts and expert ids come on top."""
ON_LANES = """\
Tensor ranks hold the same tokens; without lanes each of them sends all, to one slice of each expert. \
Sharing comes once, after combine; the experts of a token are assumed to be on different lanes where possible."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """What `run` takes."""
    parser.add_argument("--world-size", type=ranks, required=True, metavar="P", help="number of ranks")
    for name, (default, what) in {**SIZES, "ranks_per_node": (8, "ranks of a node, which is a block"), **WORK}.items():
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, type=positive, default=default, metavar="N", help=f"{what} ({default})")
    parser.add_argument(
        "--inner", default="expert", help="what runs faster over the ranks: expert (default), expert_data"
    )
    parser.add_argument("--axis", metavar="AXIS[,AXIS]", help=f"list the groups along these: {', '.join(AXES)}")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="draw the groups along the axis (expert) too")
    parser.add_argument("--json", action="store_true", help="print the rank lists as JSON instead: Topology.to_json()")


def positive(text: str) -> int:
    """`text` as a whole number >= 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number >= 1")
    return int(text)


def ranks(text: str) -> int:
    """`text` as a number of ranks, of which tables are made."""
    if positive(text) > MOST_RANKS:
        raise argparse.ArgumentTypeError(f"{text!r} is too many, expected at most {MOST_RANKS}")
    return int(text)


def run(options: argparse.Namespace) -> None:
    """Print, and draw, what the options ask for."""
    axes = [] if options.axis is None else [axis.strip() for axis in options.axis.split(",")]
    try:
        topology = Topology(options.world_size, inner=options.inner, **{name: getattr(options, name) for name in SIZES})
        nodes = Nodes.of_size(options.ranks_per_node, topology.world_size)
        table = group_table(topology, nodes, axes) if axes else axis_table(topology, nodes)
        if options.svg is not None:
            picture = topology_svg(topology, *(axes or ["expert"]), ranks_per_node=options.ranks_per_node)
            options.svg.write_bytes(picture.encode())
    except (ValueError, OSError) as error:
        options.parser.error(str(error))
    if options.json:
        print(topology.to_json())
        return
    print(f"{topology_in_words(topology)}: {nodes_in_words(nodes)}", table, sep="\n\n")
    print("", exchange_table(topology, nodes, **{name: getattr(options, name) for name in WORK}), sep="\n")


def axis_table(topology: Topology, nodes: Nodes) -> str:
    """A line for each axis: how many groups, of how many ranks, on how many nodes, and the first and the last."""
    lines: list[list[object]] = [["axis", "first group", "last group", "groups", "ranks each", "nodes each"]]
    for axis in AXES:
        groups = topology.groups(axis)
        spread = max(num_nodes(nodes, group) for group in groups)
        shown = ranks_in_words(groups[0]), ranks_in_words(groups[-1])
        lines.append([axis, *shown, len(groups), len(groups[0]), spread])
    return text_table(lines, num_left=3)


def group_table(topology: Topology, nodes: Nodes, axes: Sequence[str]) -> str:
    """A line for each group along the axes: its ranks, and on how many nodes they are."""
    groups = topology.groups(*axes)
    lines = [[f"g{i}", ranks_in_words(group), num_nodes(nodes, group)] for i, group in enumerate(groups)]
    heading = f"{counted(len(groups), 'group')} of {counted(len(groups[0]), 'rank')} along {' x '.join(axes)}"
    return f"{heading}\n\n{text_table([['group', 'ranks', 'nodes'], *lines], num_left=2)}"


def num_nodes(nodes: Nodes, group: list[int]) -> int:
    """On how many nodes the group is."""
    return len(set(nodes.node_of[group].tolist()))


def exchange_table(topology: Topology, nodes: Nodes, tokens: int, hidden: int, top_k: int, dtype_bytes: int) -> str:
    """A line for each exchange: messages and bytes inside the node and between nodes, of the rank that has most."""

    def evenly(_: int, group: Counts) -> Rows:
        return np.full(len(group), tokens * top_k / len(group))

    def on_lanes(rank: int, group: Counts) -> Rows:
        return tokens * top_k * lanes.shares(rank, group)

    lanes, width = Lanes(topology), hidden * dtype_bytes
    notes = [ASSUMED.format(tokens, top_k, topology.expert, hidden, dtype_bytes)]
    table: list[list[object]] = [
        ["most that a rank sends, one way", *["messages"] * 3, *["bytes"] * 3],
        ["", *["inside", "between", "total"] * 2],
    ]
    for name, count in (("flat", flat), ("hierarchical", hierarchical)):
        table.append([name, *most(count(nodes, topology.groups("expert"), evenly), width)])
    if topology.tensor > 1 and (group := lanes.incomplete()):
        notes.append(f"No lane-restricted exchange: tensor group {ranks_in_words(group)} does not reach all experts.")
    elif topology.tensor > 1:
        notes.append(ON_LANES)
        for name, count in (("lane-restricted, flat", flat), ("lane-restricted, hierarchical", hierarchical)):
            table.append([name, *most(count(nodes, topology.groups("expert_lane"), on_lanes), width)])
        way, shared = lanes.sharing(nodes, tokens, top_k)
        is_sum = top_k * topology.expert_tensor > 1  # of several lanes: not rounded before it is complete
        table.append([f"  then sharing, {way}", *most(shared, hidden * max(dtype_bytes, 4 * is_sum))])
    return "\n".join([text_table(table, num_left=1), "", *(textwrap.fill(note, 100) for note in notes)])


def most(sent: Sent, width: int) -> list[str]:
    """Messages and bytes of the rank that has most, inside its node, between nodes and in total."""
    both = (sent.messages, sent.rows * width)
    return [f"{number:,.0f}" for each in both for number in (*each.max(axis=0), each.sum(axis=1).max())]


def text_table(rows: Sequence[Sequence[object]], num_left: int) -> str:
    """Aligned columns: the first num_left to the left, the others to the right."""
    widths = [max(len(str(cell)) for cell in column) for column in zip(*rows, strict=True)]
    line = "  ".join(f"{{:{'<' if i < num_left else '>'}{width}}}" for i, width in enumerate(widths))
    return "\n".join(line.format(*map(str, row)).rstrip() for row in rows)
