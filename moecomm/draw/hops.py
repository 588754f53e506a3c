"""The two hops of the hierarchical all-to-all, seen from one rank."""

from __future__ import annotations

from moecomm.draw.colors import FRAME, INK, PALETTE, color_of
from moecomm.draw.columns import Columns
from moecomm.draw.legend import Bar, Key, bars, heading, legend
from moecomm.draw.routes import forwarders, hop_arrows, num_messages
from moecomm.draw.svg import MARGIN, Canvas, Line, text_width
from moecomm.nodes import Nodes

HOP_ONE = "5 3"
"""The dashes of a message of hop one."""


def two_hops_svg(nodes: Nodes, source: int = 0) -> str:
    """Draw where the rows of `source` go in the hierarchical all-to-all, as SVG text.

    Boxes are ranks, frames are nodes. Hop one goes from the source to the forwarders on its node, hop two from each
    forwarder to its destinations on the others; the colour is the forwarder's local rank. Below, the messages that the
    source sends, flat and hierarchical.

    Raises ValueError if source is no rank of nodes.
    """
    if not 0 <= source < nodes.world_size:
        raise ValueError(f"two_hops_svg: source is {source}, expected a rank in 0 .. {nodes.world_size - 1}")
    canvas = Canvas(f"Hierarchical all-to-all of {nodes_in_words(nodes)}, seen from rank {source}")
    subtitle = f"{nodes_in_words(nodes)}; colour: {_lane_in_words(nodes, source)}; every rank does the same at once"
    y = heading(canvas, f"Hierarchical all-to-all, seen from rank {source}", subtitle)
    columns = _draw_ranks(canvas, nodes, source, y + 6)
    y = legend(canvas, _keys(nodes, source), columns.bottom + 14)
    title = f"Messages that rank {source} sends: grey inside the node, black between nodes"
    bars(canvas, title, _message_bars(nodes, source), y + 8)
    return canvas.svg()


def _draw_ranks(canvas: Canvas, nodes: Nodes, source: int, top: float) -> Columns:
    hop_one, hop_two = hop_arrows(nodes, source)
    rows = [f"local rank {l}" for l in range(int(nodes.sizes().max()))]  # noqa: E741
    left = MARGIN + max(text_width(row, 13) for row in rows)
    columns = Columns(nodes.ranks, (left + 14, top), across=hop_two, inside=hop_one)
    for node in range(len(nodes)):
        columns.draw_frame(canvas, node, f"node {node}")
    columns.label_rows(canvas, rows, left)
    lane = nodes.local_rank[forwarders(nodes)[source]]  # [p] local rank of the forwarder to each rank
    for rank in range(nodes.world_size):
        columns.draw_rank(canvas, rank, color_of(int(lane[rank])), share=1 if rank == source else 0.16)
    for arrow in hop_one:
        line = Line(color_of(int(lane[arrow[1]])), 2, HOP_ONE)
        columns.draw_inside(canvas, arrow, line, f"hop 1: rank {arrow[0]} to rank {arrow[1]}")
    for arrow in hop_two:
        line = Line(color_of(int(lane[arrow[1]])), 1.8)
        columns.draw_across(canvas, arrow, line, f"hop 2: rank {arrow[0]} to rank {arrow[1]}")
    return columns


def _keys(nodes: Nodes, source: int) -> list[Key]:
    hop_one, hop_two = hop_arrows(nodes, source)
    others = len(nodes.ranks[nodes.node_of[source]]) - 1
    keys = []
    if hop_one:
        lane = "colour" if others < len(PALETTE) else _lane_in_words(nodes, source)
        words = f"hop 1, inside the node: rows go to the rank that has the {lane} of their destination"
        keys.append(Key(words, line=Line(INK, 2, HOP_ONE)))
    if hop_two:
        companions = f"the node's other {others} ranks" if others > 1 else "the node's other rank"
        carried = f"on to their destination, with those of {companions}" if others else "straight to their destination"
        keys.append(Key(f"hop 2, between nodes: {carried}", line=Line(INK, 1.8)))
    return keys


def _lane_in_words(nodes: Nodes, source: int) -> str:
    """Which ranks have the same forwarder on the source's node."""
    size = len(nodes.ranks[nodes.node_of[source]])
    return "local rank" if size in (1, int(nodes.sizes().max())) else f"local rank mod {size}"


def _message_bars(nodes: Nodes, source: int) -> list[Bar]:
    inside, between, hop_one, hop_two = num_messages(nodes, source)
    return [
        Bar("flat", [(inside, FRAME), (between, INK)], _count_in_words(inside, between)),
        Bar("hierarchical", [(hop_one, FRAME), (hop_two, INK)], _count_in_words(hop_one, hop_two)),
    ]


def _count_in_words(inside: int, between: int) -> str:
    return f"{inside + between} = {inside} inside the node + {between} between nodes"


def nodes_in_words(nodes: Nodes) -> str:
    """For a heading: how many ranks in nodes of which sizes."""
    sizes = nodes.sizes().tolist()
    if len(sizes) == 1:
        return f"{sizes[0]} {'rank' if sizes == [1] else 'ranks'} on one node"
    if len(set(sizes)) == 1:
        return f"{nodes.world_size} ranks on {len(sizes)} nodes of {sizes[0]}"
    return f"{nodes.world_size} ranks on nodes of {', '.join(map(str, sizes))}"
