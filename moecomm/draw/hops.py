"""Who sends to whom, seen from one rank: the two hops of the hierarchical all-to-all, the lane-restricted exchange."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from moecomm.draw.svg import (
    FRAME,
    INK,
    MARGIN,
    MUTED,
    PALE,
    Box,
    Canvas,
    Key,
    Point,
    color_of,
    mixed,
    text_width,
)
from moecomm.draw.words import nodes_in_words, topology_in_words
from moecomm.nodes import Nodes
from moecomm.topology import Topology
from moecomm.traffic import Rows, flat, hierarchical, hop_traffic

Arrow = tuple[int, int]
"""(sending rank, receiving rank)"""
# All lengths are in px. The box of a rank, and the space between two in a row:
WIDTH = 54
HEIGHT = 34
GAP = 10
HOP_ONE = "hop 1: inside the node, to the rank in the row of the destination"
HOP_TWO = "hop 2: between nodes, to the destination, with the rows of the whole node"
ROWS = "rows: to the experts on the sender's own lane; they come back the same way"
RESULTS = "results: afterwards, to the others of the tensor group"
# A frame above its ranks, a frame around them, and the space between arrows side by side:
HEADER = 24
PAD = 14
STEP = 6


class Step(NamedTuple):
    """Arrows that mean the same. Dashed: from the source to other rows of its frame; solid: along a row."""

    meaning: str
    arrows: Sequence[Arrow]
    dashed: bool


class View(NamedTuple):
    """Frames side by side that have the same rows, and arrows from the source's frame, where a row is one rank.

    frames  name -> the ranks in each row
    rows    their names; the colour is the row's
    grey    ranks that take no part
    """

    source: int
    frames: Mapping[str, Sequence[Sequence[int]]]
    rows: Sequence[str]
    steps: Sequence[Step]
    grey: frozenset[int] = frozenset()


class Exit(NamedTuple):
    """Where an arrow leaves its sender: share 0 .. 1 of the side, and how many arrows it runs outside of, from 1."""

    share: float
    level: int


def two_hops_svg(nodes: Nodes, source: int = 0) -> str:
    """Draw where the rows of `source` go in the hierarchical all-to-all, as SVG text.

    Boxes are ranks, frames are nodes. Hop one goes from the source to the forwarders on its node, hop two from each
    forwarder to its destinations on other nodes, which are in its row and have its colour. Below, the messages that the
    source sends, flat and hierarchical.

    Raises ValueError if source is no rank of nodes.
    """
    p = nodes.world_size
    if not 0 <= source < p:
        raise ValueError(f"two_hops_svg: source is {source}, expected a rank in 0 .. {p - 1}")
    size = len(nodes.ranks[nodes.node_of[source]])
    largest = int(nodes.sizes().max())
    # Row i of a frame has the local ranks that local rank i of the source's node forwards to.
    frames = {}
    for number, node in enumerate(nodes.ranks):
        num_rows = min(size, len(node))
        frames[f"node {number}"] = [node[row::size] for row in range(num_rows)]
    rows = []
    for row in range(size):
        local_ranks = range(row, largest, size)
        rows.append(f"local rank {', '.join(map(str, local_ranks))}")
    from_source = np.zeros((p, p), np.int64)
    from_source[source] = 1
    hop_one, hop_two = hop_traffic(nodes, from_source)
    steps = [
        Step(HOP_ONE, _arrows(hop_one), dashed=True),
        Step(HOP_TWO, _arrows(hop_two), dashed=False),
    ]
    title = f"Hierarchical all-to-all, seen from rank {source}"
    canvas = Canvas(title, f"{nodes_in_words(nodes)}; every rank does the same at once")
    _draw(canvas, View(source, frames, rows, steps))
    # All ranks are one group, and each has one row for each.
    group = np.zeros(p, np.int64)
    row_each = np.ones(p)
    bars = {}
    for count in (flat, hierarchical):
        sent = count(nodes, group, row_each)
        bars[count.__name__] = sent.messages[source].tolist()
    kinds = ("inside the node", "between nodes")
    _draw_bars(canvas, f"Messages that rank {source} sends", kinds, bars)
    return canvas.svg()


def _arrows(traffic: Rows) -> list[Arrow]:
    return [(sender, receiver) for sender, receiver in np.argwhere(traffic).tolist()]


def lanes_svg(topology: Topology, source: int = 0) -> str:
    """Draw the lane-restricted exchange seen from the tensor group of `source`, as SVG text.

    Boxes are ranks, frames are tensor groups, rows and colours are lanes. Each rank of the source's tensor group sends
    to the ranks of its expert group that are on its own lane; afterwards each shares its results with the tensor group,
    which is drawn for the source. Ranks of other expert groups are grey. Only the source's pipeline stage is drawn.
    Below, the number of ranks that the source talks to, restricted and not.

    Raises ValueError if source is no rank of the topology.
    """
    sharing = topology.group_of(source, "tensor")
    stage = topology.group_of(source, "data", "tensor")
    groups = [group for group in topology.groups("tensor") if group[0] in stage]
    frames = {f"group {i}": [[rank] for rank in group] for i, group in enumerate(groups)}
    rows: list[Arrow] = []
    reached: set[int] = set()
    for sender in sharing:
        lane = topology.group_of(sender, "expert_lane")
        rows += [(sender, rank) for rank in lane if rank != sender]
        reached.update(topology.group_of(sender, "expert"))
    results = [(source, rank) for rank in sharing if rank != source]
    steps = [
        Step(ROWS, rows, dashed=False),
        Step(RESULTS, results, dashed=True),
    ]
    title = f"Lane-restricted exchange, seen from rank {source}"
    canvas = Canvas(title, f"{topology_in_words(topology)}; a frame is a tensor group: its ranks hold the same tokens")
    lanes = [f"lane {lane}" for lane in range(topology.tensor)]
    elsewhere = frozenset(stage) - reached
    _draw(canvas, View(source, frames, lanes, steps, elsewhere))
    # A rank does not talk to itself.
    peers = len(topology.group_of(source, "expert")) - 1
    peers_on_lane = len(topology.group_of(source, "expert_lane")) - 1
    bars = {
        "unrestricted": (0, peers),
        "lane-restricted": (len(results), peers_on_lane),
    }
    _draw_bars(canvas, f"Ranks that rank {source} talks to", ("for results", "for rows"), bars)
    return canvas.svg()


def _draw(canvas: Canvas, view: View) -> None:
    """Draw frames, ranks, arrows that run around the boxes, and a legend."""
    row_of: dict[int, int] = {}
    for frame in view.frames.values():
        for row, ranks in enumerate(frame):
            row_of.update(dict.fromkeys(ranks, row))
    # The boxes leave room for the arrows that run around them, so arrows are laid out first.
    exits = [_exits(step.arrows, list(row_of)) for step in view.steps]
    room = {}
    for step, leaving in zip(view.steps, exits, strict=True):
        room[step.dashed] = _room(leaving)
    boxes = _draw_ranks(canvas, view, beside=room[True], above=room[False])
    keys = []
    for step, leaving in zip(view.steps, exits, strict=True):
        points_of = _points_beside if step.dashed else _points_above
        name = step.meaning.split(":")[0]
        for sender, receiver in step.arrows:
            leave = leaving[sender, receiver]
            points = points_of(boxes[sender], boxes[receiver], leave)
            color = color_of(row_of[receiver])
            about = f"{name}: rank {sender} to rank {receiver}"
            canvas.arrow(points, color, step.dashed, about)
        if step.arrows:
            keys.append(Key(step.meaning, INK, dashed=step.dashed))
    if view.grey:
        keys.append(Key("in other expert groups, which do the same", FRAME, mixed(FRAME, PALE)))
    canvas.legend(keys)


def _exits(arrows: Sequence[Arrow], order: list[int]) -> dict[Arrow, Exit]:
    """Where each arrow leaves its sender. order: as the ranks are drawn.

    The arrows of the nearest receivers leave outermost and run nearest to the boxes, so that no two arrows cross.
    """
    exits = {}
    for sender in dict.fromkeys(sender for sender, _ in arrows):
        index = order.index(sender)
        receivers = {receiver for origin, receiver in arrows if origin == sender}
        # Seen from the sender, the nearest first.
        backward = [rank for rank in reversed(order[:index]) if rank in receivers]
        forward = [rank for rank in order[index:] if rank in receivers]
        leaving = [*backward, *reversed(forward)]
        gaps = len(leaving) + 1
        for i, receiver in enumerate(leaving, start=1):
            level = i if receiver in backward else gaps - i
            exits[sender, receiver] = Exit(i / gaps, level)
    return exits


def _room(exits: Mapping[Arrow, Exit]) -> int:
    """px that the arrows take."""
    levels = [leave.level for leave in exits.values()]
    return 14 + STEP * max(levels, default=0)


def _points_beside(start: Box, end: Box, leave: Exit) -> list[Point]:
    """Out to the left, then along the frame."""
    x = start.x - 8 - STEP * leave.level
    y = start.y + leave.share * HEIGHT
    _, end_y = end.center
    return [
        (start.x, y),
        (x, y),
        (x, end_y),
        (end.x, end_y),
    ]


def _points_above(start: Box, end: Box, leave: Exit) -> list[Point]:
    """Up, then along above the row."""
    x = start.x + leave.share * WIDTH
    y = start.y - 8 - STEP * leave.level
    end_x, _ = end.center
    return [
        (x, start.y),
        (x, y),
        (end_x, y),
        (end_x, end.y),
    ]


def _draw_ranks(canvas: Canvas, view: View, beside: float, above: float) -> dict[int, Box]:
    """The box of each rank. beside, above: px that arrows take beside the source's frame's ranks and above a row."""
    boxes: dict[int, Box] = {}
    left = MARGIN + max(map(text_width, view.rows))
    top = canvas.bottom + 14
    pitch = above + HEIGHT
    for row, label in enumerate(view.rows, start=1):
        # The base line is below the middle of the boxes by about half the height of a letter.
        base = top + HEADER + row * pitch - HEIGHT / 2 + 5
        canvas.text((left, base), label, anchor="end")
    x = left + GAP
    for name, frame in view.frames.items():
        # Only the source sends to other rows, so only its frame needs room for arrows beside its ranks.
        has_source = any(view.source in ranks for ranks in frame)
        inset = PAD + beside if has_source else PAD
        columns = len(frame[0])
        width = inset + columns * (WIDTH + GAP) - GAP + PAD
        height = HEADER + len(frame) * pitch + PAD
        canvas.frame(Box(x, top, width, height), name)
        for row, ranks in enumerate(frame):
            y = top + HEADER + row * pitch + above
            for column, rank in enumerate(ranks):
                box = Box(x + inset + column * (WIDTH + GAP), y, WIDTH, HEIGHT)
                boxes[rank] = box
                color = FRAME if rank in view.grey else color_of(row)
                share = 1 if rank == view.source else PALE
                canvas.rank(box, rank, color, share)
        # The more frames, the less space between them.
        x += width + min(80.0, max(16.0, 640 / len(view.frames) - 80))
    return boxes


def _draw_bars(canvas: Canvas, title: str, kinds: tuple[str, str], bars: Mapping[str, Sequence[int]]) -> None:
    """A bar for each name: as many grey squares as there are of the first kind, then dark ones for the second."""
    y = canvas.bottom + 28
    canvas.text((MARGIN, y), f"{title}:", color=MUTED)
    x = MARGIN + text_width(f"{title}: ")
    # Samples, not names of colours: these change where the page is dark.
    for color, kind in zip((FRAME, INK), kinds, strict=True):
        canvas.rect(Box(x, y - 11, 13, 13), color)
        canvas.text((x + 19, y), kind, color=MUTED)
        x += 19 + text_width(f"{kind}  ")
    # The longest bar fits into 420 px.
    longest = max(1, *map(sum, bars.values()))
    cell = min(16.0, 420 / longest)
    left = MARGIN + 10 + max(map(text_width, bars))
    for name, (grey, dark) in bars.items():
        y += 24
        x = left
        canvas.text((MARGIN, y), name, bold=True)
        for color in [FRAME] * grey + [INK] * dark:
            square = Box(x, y - 11, cell * 0.85, 13)
            canvas.rect(square, color)
            x += cell
        grey_kind, dark_kind = kinds
        total = f"{grey + dark} = {grey} {grey_kind} + {dark} {dark_kind}"
        canvas.text((x + 8, y), total)
