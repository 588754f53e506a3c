"""python -m moecomm topology: the groups of a topology, and what its exchanges would send."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Mapping, Sequence
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
    "ranks_per_node": (8, "ranks of a node, which is a block"),
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

Line = Sequence[object]
"""The cells of one line of a table."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """What `run` takes."""
    parser.add_argument("--world-size", type=ranks, required=True, metavar="P", help="number of ranks")
    add_numbers(parser, SIZES)
    add_numbers(parser, WORK)
    parser.add_argument(
        "--inner", default="expert", help="what runs faster over the ranks: expert (default), expert_data"
    )
    parser.add_argument("--axis", metavar="AXIS[,AXIS]", help=f"list the groups along these: {', '.join(AXES)}")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="draw the groups along the axis (expert) too")
    parser.add_argument("--json", action="store_true", help="print the rank lists as JSON instead: Topology.to_json()")


def add_numbers(parser: argparse.ArgumentParser, numbers: Mapping[str, tuple[int, str]]) -> None:
    """An option for each number, from its name, its default and its meaning."""
    for name, (default, meaning) in numbers.items():
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, type=positive, default=default, metavar="N", help=f"{meaning} ({default})")


def positive(text: str) -> int:
    """`text` as a whole number >= 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number >= 1")
    return int(text)


def ranks(text: str) -> int:
    """`text` as a number of ranks, of which tables are made."""
    number = positive(text)
    if number > MOST_RANKS:
        raise argparse.ArgumentTypeError(f"{text!r} is too many, expected at most {MOST_RANKS}")
    return number


def run(options: argparse.Namespace) -> None:
    """Print, and draw, what the options ask for."""
    axes = [] if options.axis is None else [axis.strip() for axis in options.axis.split(",")]
    # Whatever can be refused comes before the first line is printed: an error is the only output.
    try:
        sizes = {name: getattr(options, name) for name in SIZES}
        topology = Topology(options.world_size, inner=options.inner, **sizes)
        nodes = Nodes.of_size(options.ranks_per_node, topology.world_size)
        table = group_table(topology, nodes, axes) if axes else axis_table(topology, nodes)
        if options.svg is not None:
            picture = topology_svg(topology, *(axes or ["expert"]), ranks_per_node=options.ranks_per_node)
            # bytes, so that Windows does not change the ends of lines
            options.svg.write_bytes(picture.encode())
    except (ValueError, OSError) as error:
        options.parser.error(str(error))
    if options.json:
        print(topology.to_json())
        return
    print(f"{topology_in_words(topology)}: {nodes_in_words(nodes)}", table, sep="\n\n")
    print("", exchange_table(topology, nodes, options), sep="\n")


def axis_table(topology: Topology, nodes: Nodes) -> str:
    """A line for each axis: how many groups, of how many ranks, on how many nodes, and the first and the last."""
    lines: list[Line] = [["axis", "first group", "last group", "groups", "ranks each", "nodes each"]]
    for axis in AXES:
        groups = topology.groups(axis)
        lines.append(
            [
                axis,
                ranks_in_words(groups[0]),
                ranks_in_words(groups[-1]),
                len(groups),
                len(groups[0]),
                max(num_nodes(nodes, group) for group in groups),
            ]
        )
    return text_table(lines, num_left=3)


def group_table(topology: Topology, nodes: Nodes, axes: Sequence[str]) -> str:
    """A line for each group along the axes: its ranks, and on how many nodes they are."""
    groups = topology.groups(*axes)
    lines: list[Line] = [["group", "ranks", "nodes"]]
    for i, group in enumerate(groups):
        lines.append([f"g{i}", ranks_in_words(group), num_nodes(nodes, group)])
    heading = f"{counted(len(groups), 'group')} of {counted(len(groups[0]), 'rank')} along {' x '.join(axes)}"
    return f"{heading}\n\n{text_table(lines, num_left=2)}"


def num_nodes(nodes: Nodes, group: list[int]) -> int:
    """The number of nodes that the group spans."""
    return len(np.unique(nodes.node_of[group]))


def exchange_table(topology: Topology, nodes: Nodes, options: argparse.Namespace) -> str:
    """A line for each exchange: messages and bytes inside the node and between nodes, of the rank that has most."""
    tokens = options.tokens
    top_k = options.top_k
    width = options.hidden * options.dtype_bytes
    lanes = Lanes(topology)

    def evenly(_: int, group: Counts) -> Rows:
        return np.full(len(group), tokens * top_k / len(group))

    def on_lanes(rank: int, group: Counts) -> Rows:
        return tokens * top_k * lanes.shares(rank, group)

    lines: list[Line] = [
        ["most that a rank sends, one way", *["messages"] * 3, *["bytes"] * 3],
        ["", *["inside", "between", "total"] * 2],
    ]
    notes = [ASSUMED.format(tokens, top_k, topology.expert, options.hidden, options.dtype_bytes)]
    groups = topology.groups("expert")
    lines.append(["flat", *most(flat(nodes, groups, evenly), width)])
    lines.append(["hierarchical", *most(hierarchical(nodes, groups, evenly), width)])
    if topology.tensor > 1 and (group := lanes.incomplete()):
        notes.append(f"No lane-restricted exchange: tensor group {ranks_in_words(group)} does not reach all experts.")
    elif topology.tensor > 1:
        notes.append(ON_LANES)
        groups = topology.groups("expert_lane")
        lines.append(["lane-restricted, flat", *most(flat(nodes, groups, on_lanes), width)])
        lines.append(["lane-restricted, hierarchical", *most(hierarchical(nodes, groups, on_lanes), width)])
        collective, sent = lanes.sharing(nodes, tokens, top_k)
        # A sum over several lanes is not rounded before it is complete, so it is shared in float32.
        is_sum = top_k * topology.expert_tensor > 1
        number_bytes = max(options.dtype_bytes, 4 if is_sum else 0)
        lines.append([f"  then sharing, {collective}", *most(sent, options.hidden * number_bytes)])
    paragraphs = [textwrap.fill(note, 100) for note in notes]
    return "\n".join([text_table(lines, num_left=1), "", *paragraphs])


def most(sent: Sent, width: int) -> list[str]:
    """Messages and bytes of the rank that has most, inside its node, between nodes and in total."""
    cells = []
    for numbers in (sent.messages, sent.rows * width):
        # The rank with most in total is not always the rank with most inside or between.
        largest = [*numbers.max(axis=0), numbers.sum(axis=1).max()]
        cells += [f"{number:,.0f}" for number in largest]
    return cells


def text_table(lines: Sequence[Line], num_left: int) -> str:
    """Aligned columns: the first num_left to the left, the rest to the right."""
    columns = []
    for i, cells in enumerate(zip(*lines, strict=True)):
        texts = [str(cell) for cell in cells]
        width = max(map(len, texts))
        align = str.ljust if i < num_left else str.rjust
        columns.append([align(text, width) for text in texts])
    return "\n".join("  ".join(cells).rstrip() for cells in zip(*columns, strict=True))
