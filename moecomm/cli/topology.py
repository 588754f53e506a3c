"""python -m moecomm topology: the groups of a topology, and what its exchanges would send."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path

import numpy as np

from moecomm.arrays import Counts
from moecomm.cli.tables import Column, paragraph, scaled, text_table
from moecomm.cost.model import MOST_RANKS
from moecomm.draw import topology_svg
from moecomm.draw.words import counted, nodes_in_words, ranks_in_words, topology_in_words
from moecomm.nodes import Nodes
from moecomm.topology import AXES, Topology
from moecomm.traffic import Lanes, Sent, flat, hierarchical

SUMMARY = "print the groups of a topology, and the messages and bytes that each exchange would need in it"
EXAMPLES = """examples:
  python -m moecomm topology --ranks 128 --tensor 8 --expert 128 --ranks-per-node 8
  python -m moecomm topology --ranks 16 --tensor 2 --expert 4 --axis expert_lane
  python -m moecomm topology --ranks 16 --tensor 2 --expert 4 --axis expert,expert_data --svg groups.svg
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
a row for each; rows of {} x {} bytes. Combine sends as much back. Counts come on top."""
ON_LANES = """\
Tensor ranks hold the same tokens; without lanes each of them sends all, to one slice of each expert. \
Sharing comes once, after combine; the experts of a token are assumed to be on different lanes where possible."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """What `run` takes."""
    parser.add_argument("--ranks", type=ranks, required=True, metavar="P", help="number of ranks")
    add_numbers(parser, SIZES)
    add_numbers(parser, WORK)
    parser.add_argument(
        "--inner", default="expert", help="what runs faster over the ranks: expert (default), expert_data"
    )
    parser.add_argument("--axis", metavar="AXIS[,AXIS]", help=f"list the groups along these: {', '.join(AXES)}")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="draw the groups along the axis (expert) too")
    parser.add_argument("--json", action="store_true", help="print the rank lists as JSON instead: Topology.to_json()")
    add_wide(parser)


def add_numbers(parser: argparse.ArgumentParser, numbers: Mapping[str, tuple[int, str]]) -> None:
    """An option for each number, from its name, its default and its meaning."""
    for name, (default, meaning) in numbers.items():
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, type=positive, default=default, metavar="N", help=f"{meaning} ({default})")


def add_wide(parser: argparse._ActionsContainer) -> None:
    """The option of whoever has more than 80 columns."""
    parser.add_argument("--wide", action="store_true", help="print everything, wider than 80 columns")


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
        topology = Topology(options.ranks, inner=options.inner, **sizes)
        nodes = Nodes.of_size(options.ranks_per_node, topology.world_size)
        wide = options.wide
        table = group_table(topology, nodes, axes, wide) if axes else axis_table(topology, nodes, wide)
        # Written first: a file that cannot be written is an error, and then nothing is printed.
        if options.svg is not None:
            picture = topology_svg(topology, *(axes or ["expert"]), ranks_per_node=options.ranks_per_node)
            # bytes, so that Windows does not change the ends of lines
            options.svg.write_bytes(picture.encode())
    except (ValueError, OSError) as error:
        options.parser.error(str(error))
    if options.json:
        print(topology.to_json())
        return
    print(paragraph(f"{topology_in_words(topology)}: {nodes_in_words(nodes)}"), table, sep="\n\n")
    print("", exchange_table(topology, nodes, options), sep="\n")


def axis_table(topology: Topology, nodes: Nodes, wide: bool) -> str:
    """A line for each axis: how many groups, of how many ranks, on how many nodes, and the first and the last."""
    groups = [topology.groups(axis) for axis in AXES]
    # What the other columns leave of a narrow line.
    room = 0 if wide else 28
    return text_table(
        [
            Column(("axis",), AXES, words=True),
            Column(("first group",), [ranks_in_words(of_axis[0], room) for of_axis in groups], words=True),
            Column(("last group",), [ranks_in_words(of_axis[-1], room) for of_axis in groups], words=True, rank=1),
            Column(("groups",), [str(len(of_axis)) for of_axis in groups]),
            Column(("ranks each",), [str(len(of_axis[0])) for of_axis in groups]),
            Column(("nodes each",), [str(num_nodes(nodes, of_axis).max()) for of_axis in groups]),
        ],
        wide,
    )


def group_table(topology: Topology, nodes: Nodes, axes: Sequence[str], wide: bool) -> str:
    """A line for each group along the axes: its ranks, and on how many nodes they are."""
    groups = topology.groups(*axes)
    # Without a limit where it is wide: whoever asks for the lists of a group wants them whole.
    room = 0 if wide else 60
    table = text_table(
        [
            Column(("group",), [f"g{i}" for i in range(len(groups))], words=True),
            Column(("ranks",), [ranks_in_words(group, room) for group in groups], words=True),
            Column(("nodes",), list(map(str, num_nodes(nodes, groups).tolist()))),
        ],
        wide,
    )
    heading = f"{counted(len(groups), 'group')} of {counted(len(groups[0]), 'rank')} along {' x '.join(axes)}"
    return f"{heading}\n\n{table}"


def num_nodes(nodes: Nodes, groups: Sequence[Sequence[int]]) -> Counts:
    """[groups] the number of nodes that each group spans."""
    # All groups at once: a world of 65,536 ranks may have as many groups.
    label = np.repeat(np.arange(len(groups)), list(map(len, groups)))
    node = nodes.node_of[np.fromiter(chain.from_iterable(groups), np.int64)]
    return np.bincount(np.unique(label * len(nodes) + node) // len(nodes))


def exchange_table(topology: Topology, nodes: Nodes, options: argparse.Namespace) -> str:
    """A line for each exchange: messages and bytes inside the node and between nodes, of the rank that has most."""
    tokens = options.tokens
    top_k = options.top_k
    width = options.hidden * options.dtype_bytes
    lanes = Lanes(topology)
    # Notes follow the table in the order of its lines.
    notes = [ASSUMED.format(tokens, top_k, topology.expert, options.hidden, options.dtype_bytes)]
    groups = lanes.expert_groups()
    evenly = np.full(topology.world_size, tokens * top_k / topology.expert)
    lines = {
        "flat": most(flat(nodes, groups, evenly), width),
        "hierarchical": most(hierarchical(nodes, groups, evenly), width),
    }
    if topology.tensor > 1 and (group := lanes.incomplete()):
        notes.append(f"No lane-restricted exchange: tensor group {ranks_in_words(group)} does not reach all experts.")
    elif topology.tensor > 1:
        notes.append(ON_LANES)
        groups = lanes.lanes()
        on_lanes = tokens * top_k * lanes.shares
        lines["lane-restricted, flat"] = most(flat(nodes, groups, on_lanes), width)
        lines["lane-restricted, hierarchical"] = most(hierarchical(nodes, groups, on_lanes), width)
        collective, sent = lanes.sharing(nodes, tokens, top_k)
        # A sum over several lanes is not rounded before it is complete, so it is shared in float32.
        is_sum = top_k * topology.expert_tensor > 1
        number_bytes = max(options.dtype_bytes, 4 if is_sum else 0)
        lines[f"  then sharing, {collective}"] = most(sent, options.hidden * number_bytes)
    table = text_table(exchange_columns(lines), options.wide)
    return "\n".join([table, "", *map(paragraph, notes)])


def exchange_columns(lines: Mapping[str, Sequence[str]]) -> list[Column]:
    """The columns of the table, from its lines."""
    columns = [Column(("most that a rank sends, one way", ""), list(lines), words=True)]
    headings = [(kind, where) for kind in ("messages", "bytes") for where in ("inside", "between", "total")]
    by_column = zip(*lines.values(), strict=True)
    for heading, cells in zip(headings, by_column, strict=True):
        # The total is the sum of its neighbours but for rounding, so it is what a narrow table can spare.
        rank = 1 if "total" in heading else 0
        columns.append(Column(heading, cells, rank=rank))
    return columns


def most(sent: Sent, width: int) -> list[str]:
    """Messages and bytes of the rank that has most, inside its node, between nodes and in total."""
    # The rank with most in total is not always the rank with most inside or between.
    messages = [*sent.messages.max(axis=0), sent.messages.sum(axis=1).max()]
    rows = [*sent.rows.max(axis=0), sent.rows.sum(axis=1).max()]
    cells = [f"{number:,}" for number in messages]
    cells += [scaled(number * width, "B", 1024) for number in rows]
    return cells
