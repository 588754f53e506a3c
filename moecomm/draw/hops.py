"""Who sends to whom, seen from one rank: the two hops of the hierarchical all-to-all, the lane-restricted exchange."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from moecomm.draw.svg import FRAME, INK, MARGIN, MUTED, PALE, Box, Canvas, Key, color_of, mixed, text_width
from moecomm.draw.words import nodes_in_words, topology_in_words
from moecomm.nodes import Nodes
from moecomm.topology import Topology
from moecomm.traffic import flat, hierarchical, hop_traffic

Arrow = tuple[int, int]
"""(sending rank, receiving rank)"""
WIDTH, HEIGHT, GAP = 54, 34, 10
"""px of the box of a rank, and between two in a row."""
HEADER, PAD, STEP = 24, 14, 6
"""px of a frame above its ranks, of a frame around them, and between arrows side by side."""


class View(NamedTuple):
    """Frames side by side that have the same rows, and arrows from the source's frame, where a row is one rank.

    frames  name -> the ranks in each row
    rows    their names; the colour is the row's
    steps   what arrows mean -> the arrows: along a row, or from the source to other rows of its frame
    grey    ranks that take no part
    """

    source: int
    frames: Mapping[str, Sequence[Sequence[int]]]
    rows: Sequence[str]
    steps: Mapping[str, Sequence[Arrow]]
    grey: frozenset[int] = frozenset()


def two_hops_svg(nodes: Nodes, source: int = 0) -> str:
    """Draw where the rows of `source` go in the hierarchical all-to-all, as SVG text.

    Boxes are ranks, frames are nodes. Hop one goes from the source to the forwarders on its node, hop two from each
    forwarder to its destinations on the others, which are in its row and have its colour. Below, the messages that the
    source sends, flat and hierarchical.

    Raises ValueError if source is no rank of nodes.
    """
    if not 0 <= source < nodes.world_size:
        raise ValueError(f"two_hops_svg: source is {source}, expected a rank in 0 .. {nodes.world_size - 1}")
    size, largest = len(nodes.ranks[nodes.node_of[source]]), int(nodes.sizes().max())
    frames = {f"node {i}": [node[row::size] for row in range(size)[: len(node)]] for i, node in enumerate(nodes.ranks)}
    rows = [f"local rank {', '.join(map(str, range(row, largest, size)))}" for row in range(size)]
    from_source = np.zeros((nodes.world_size, nodes.world_size), np.int64)
    from_source[source] = 1
    hop_one, hop_two = ([(s, r) for s, r in np.argwhere(hop).tolist()] for hop in hop_traffic(nodes, from_source))
    steps = {
        "hop 1: inside the node, to the rank in the row of the destination": hop_one,
        "hop 2: between nodes, to the destination, with the rows of the whole node": hop_two,
    }
    title = f"Hierarchical all-to-all, seen from rank {source}"
    canvas = Canvas(title, f"{nodes_in_words(nodes)}; every rank does the same at once")
    _draw(canvas, View(source, frames, rows, steps))
    everyone = [range(nodes.world_size)]
    sent = {
        count.__name__: count(nodes, everyone, lambda _, group: np.ones_like(group)) for count in (flat, hierarchical)
    }
    bars = {name: tuple(each.messages[source].tolist()) for name, each in sent.items()}
    _draw_bars(canvas, f"Messages that rank {source} sends", ("inside the node", "between nodes"), bars)
    return canvas.svg()


def lanes_svg(topology: Topology, source: int = 0) -> str:
    """Draw the lane-restricted exchange seen from the tensor group of `source`, as SVG text.

    Boxes are ranks, frames are tensor groups, rows and colours are lanes. Each rank of the source's tensor group sends
    to the ranks of its expert group that are on its own lane; afterwards each shares its results with the tensor group,
    which is drawn for the source. Ranks of other expert groups are grey. Only the source's pipeline stage is drawn.
    Below, with how many ranks the source talks, restricted and not.

    Raises ValueError if source is no rank of the topology.
    """
    sharing, stage = topology.group_of(source, "tensor"), topology.group_of(source, "data", "tensor")
    groups = [group for group in topology.groups("tensor") if group[0] in stage]
    frames = {f"group {i}": [[rank] for rank in group] for i, group in enumerate(groups)}
    reached = {rank for sender in sharing for rank in topology.group_of(sender, "expert")}
    rows = [(s, r) for s in sharing for r in topology.group_of(s, "expert_lane") if r != s]
    steps = {
        "rows: to the experts on the sender's own lane; they come back the same way": rows,
        "results: afterwards, to the others of the tensor group": [(source, r) for r in sharing if r != source],
    }
    title = f"Lane-restricted exchange, seen from rank {source}"
    canvas = Canvas(title, f"{topology_in_words(topology)}; a frame is a tensor group: its ranks hold the same tokens")
    lanes = [f"lane {lane}" for lane in range(topology.tensor)]
    _draw(canvas, View(source, frames, lanes, steps, frozenset(stage) - reached))
    everyone, lane = (len(topology.group_of(source, axis)) - 1 for axis in ("expert", "expert_lane"))
    bars = {"unrestricted": (0, everyone), "lane-restricted": (topology.tensor - 1, lane)}
    _draw_bars(canvas, f"Ranks that rank {source} talks to", ("for results", "for rows"), bars)
    return canvas.svg()


def _draw(canvas: Canvas, view: View) -> None:
    """Frames, ranks, arrows that run around the boxes, and a legend."""
    row_of = {rank: row for frame in view.frames.values() for row, ranks in enumerate(frame) for rank in ranks}
    arrows = [arrow for step in view.steps.values() for arrow in step]
    along = _places([(s, r) for s, r in arrows if row_of[s] == row_of[r]], list(row_of))
    down = _places([(s, r) for s, r in arrows if row_of[s] != row_of[r]], list(row_of))
    beside, above = (14 + STEP * max((level for _, level in each.values()), default=0) for each in (down, along))
    boxes = _draw_ranks(canvas, view, beside, above)
    for words, step in view.steps.items():
        for sender, receiver in step:
            start, end, dashed = boxes[sender], boxes[receiver], (sender, receiver) in down
            share, level = down[sender, receiver] if dashed else along[sender, receiver]
            if dashed:  # out to the left, then along the frame
                x, y = start.x - 8 - STEP * level, start.y + share * HEIGHT
                points = [(start.x, y), (x, y), (x, end.center[1]), (end.x, end.center[1])]
            else:  # up, then along above the row
                x, y = start.x + share * WIDTH, start.y - 8 - STEP * level
                points = [(x, start.y), (x, y), (end.center[0], y), (end.center[0], end.y)]
            about = f"{words.split(':')[0]}: rank {sender} to rank {receiver}"
            canvas.arrow(points, color_of(row_of[receiver]), dashed, about)
    keys = [Key(words, INK, dashed=step[0] in down) for words, step in view.steps.items() if step]
    if view.grey:
        keys.append(Key("in other expert groups, which do the same", FRAME, mixed(FRAME, PALE)))
    canvas.legend(keys)


def _draw_ranks(canvas: Canvas, view: View, beside: float, above: float) -> dict[int, Box]:
    """The box of each rank. beside, above: px that arrows take beside the source's frame's ranks and above a row."""
    boxes: dict[int, Box] = {}
    left, top, pitch = MARGIN + max(map(text_width, view.rows)), canvas.bottom + 14, above + HEIGHT
    for row, label in enumerate(view.rows):
        canvas.text((left, top + HEADER + (row + 1) * pitch - HEIGHT / 2 + 5), label, anchor="end")
    x = left + GAP
    for name, frame in view.frames.items():
        inset = PAD + beside * any(view.source in ranks for ranks in frame)
        width = inset + len(frame[0]) * (WIDTH + GAP) - GAP + PAD
        canvas.frame(Box(x, top, width, HEADER + len(frame) * pitch + PAD), name)
        for row, ranks in enumerate(frame):
            for i, rank in enumerate(ranks):
                at = x + inset + i * (WIDTH + GAP), top + HEADER + row * pitch + above
                boxes[rank] = Box(*at, WIDTH, HEIGHT)
                color = FRAME if rank in view.grey else color_of(row)
                canvas.rank(boxes[rank], rank, color, 1 if rank == view.source else PALE)
        x += width + min(80.0, max(16.0, 640 / len(view.frames) - 80))
    return boxes


def _places(arrows: Sequence[Arrow], order: list[int]) -> dict[Arrow, tuple[float, int]]:
    """Where along its sender's side each arrow leaves, 0 .. 1, and how far out it runs, 1 2 3 ...

    The nearest receivers' arrows leave outermost and run nearest, so that no two cross. order: as the ranks are drawn.
    """
    places = {}
    for sender in dict.fromkeys(sender for sender, _ in arrows):
        at = order.index(sender)
        before, after = ([r for r in side if (sender, r) in arrows] for side in (order[:at][::-1], order[at:]))
        leaving = [*before, *reversed(after)]
        for side in (before, after):
            for level, receiver in enumerate(side, start=1):
                places[sender, receiver] = (leaving.index(receiver) + 1) / (len(leaving) + 1), level
    return places


def _draw_bars(canvas: Canvas, title: str, kinds: tuple[str, str], bars: Mapping[str, tuple[int, int]]) -> None:
    """For each name so many grey squares, of the first kind, and so many black ones, of the second."""
    y = canvas.bottom + 28
    canvas.text((MARGIN, y), f"{title}: grey {kinds[0]}, black {kinds[1]}", color=MUTED)
    cell, x = min(16.0, 420 / max(1, *map(sum, bars.values()))), MARGIN + 10 + max(map(text_width, bars))
    for name, (grey, black) in bars.items():
        y += 24
        canvas.text((MARGIN, y), name, bold=True)
        for i in range(grey + black):
            canvas.rect(Box(x + i * cell, y - 11, cell * 0.85, 13), FRAME if i < grey else INK)
        words = f"{grey + black} = {grey} {kinds[0]} + {black} {kinds[1]}"
        canvas.text((x + (grey + black) * cell + 8, y), words)
