"""The lane-restricted exchange: a rank talks only to the ranks of its expert group that are on its own lane."""

from __future__ import annotations

from moecomm.draw.colors import FRAME, INK, color_of, mixed
from moecomm.draw.columns import Columns
from moecomm.draw.legend import Bar, Key, bars, heading, legend
from moecomm.draw.routes import Arrow
from moecomm.draw.svg import MARGIN, Canvas, Line, text_width
from moecomm.draw.topology import in_words
from moecomm.topology import Topology

SHARED = "5 3"
"""The dashes of what a tensor group shares."""


def lanes_svg(topology: Topology, source: int = 0) -> str:
    """Draw the lane-restricted exchange seen from the tensor group of `source`, as SVG text.

    Boxes are ranks, frames are tensor groups, rows and colours are lanes. Each rank of the source's tensor group sends
    to the ranks of its expert group that are on its own lane; afterwards the tensor group shares the results. Ranks of
    other expert groups are grey. Only the source's pipeline stage is drawn. Below, with how many ranks the source
    talks, restricted and not.

    Raises ValueError if source is no rank of the topology.
    """
    sharing = topology.group_of(source, "tensor")
    canvas = Canvas(f"Lane-restricted exchange in {in_words(topology)}, seen from rank {source}")
    subtitle = f"{in_words(topology)}; a frame is a tensor group: its ranks hold the same tokens"
    y = heading(canvas, f"Lane-restricted exchange, seen from rank {source}", subtitle)
    columns = _draw_ranks(canvas, topology, source, y + 6)
    y = legend(canvas, _keys(topology, source), columns.bottom + 14)
    shared = ", grey to share results" if len(sharing) > 1 else ""
    bars(canvas, f"Ranks that rank {source} talks to: black for rows{shared}", _peer_bars(topology, source), y + 8)
    return canvas.svg()


def _keys(topology: Topology, source: int) -> list[Key]:
    words = "dispatch: rows go to the experts on the sender's own lane; combine comes back the same way"
    keys = [Key(words, line=Line(INK, 1.8))]
    if topology.tensor > 1:
        keys.append(Key("afterwards the tensor group shares the results", line=Line(INK, 1.8, SHARED)))
    if reached(topology, source) != set(_stage(topology, source)):
        keys.append(Key("in other expert groups, which do the same", fill=mixed(FRAME, 0.16)))
    return keys


def _stage(topology: Topology, source: int) -> list[int]:
    """The ranks of the pipeline stage of `source`."""
    return topology.group_of(source, "data", "tensor")


def reached(topology: Topology, source: int) -> set[int]:
    """The ranks whose experts the tokens of `source` can go to: the expert groups of its tensor group."""
    return {rank for sender in topology.group_of(source, "tensor") for rank in topology.group_of(sender, "expert")}


def lane_arrows(topology: Topology, source: int) -> list[Arrow]:
    """Who sends rows to whom when the tensor group of `source` dispatches."""
    senders = topology.group_of(source, "tensor")
    return [(s, r) for s in senders for r in topology.group_of(s, "expert_lane") if r != s]


def _draw_ranks(canvas: Canvas, topology: Topology, source: int, top: float) -> Columns:
    arrows, sharing = lane_arrows(topology, source), topology.group_of(source, "tensor")
    stage, drawn = set(_stage(topology, source)), reached(topology, source)
    groups = [group for group in topology.groups("tensor") if stage.issuperset(group)]
    rows = [f"lane {lane}" for lane in range(topology.tensor)]
    left = MARGIN + max(text_width(row, 13) for row in rows)
    inside = [(sharing[0], sharing[-1])] if len(sharing) > 1 else []
    columns = Columns(groups, (left + 14, top), across=arrows, inside=inside)
    for i, group in enumerate(groups):
        columns.draw_frame(canvas, i, f"group {i}")
        for lane, rank in enumerate(group):
            color = color_of(lane) if rank in drawn else FRAME
            columns.draw_rank(canvas, rank, color, share=1 if rank == source else 0.16)
    columns.label_rows(canvas, rows, left)
    for arrow in arrows:
        line = Line(color_of(sharing.index(arrow[0])), 1.8)
        columns.draw_across(canvas, arrow, line, f"rank {arrow[0]} to rank {arrow[1]}")
    if inside:
        _draw_shared(canvas, columns, sharing)
    return columns


def _draw_shared(canvas: Canvas, columns: Columns, ranks: list[int]) -> None:
    """A line along the left of the boxes with a head into each."""
    boxes = [columns.box(rank) for rank in ranks]
    x = boxes[0].x - 17
    middle = (boxes[0].center[1] + boxes[-1].center[1]) / 2
    for box, rank in zip(boxes, ranks, strict=True):
        y = box.center[1]
        points = [(x, y), (box.x, y)]
        if box in (boxes[0], boxes[-1]):
            points.insert(0, (x, middle))
        canvas.route(points, Line(INK, 1.8, SHARED), f"results shared with rank {rank}")


def _peer_bars(topology: Topology, source: int) -> list[Bar]:
    everyone = len(topology.group_of(source, "expert")) - 1
    lane = len(topology.group_of(source, "expert_lane")) - 1
    sharing = topology.tensor - 1
    shared = f" + {sharing} of its tensor group" if sharing else ""
    return [
        Bar("unrestricted", [(everyone, INK)], f"{everyone} of its expert group"),
        Bar("lane-restricted", [(lane, INK), (sharing, FRAME)], f"{lane} of its expert group{shared}"),
    ]
