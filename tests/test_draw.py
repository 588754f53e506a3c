"""The pictures show the exchange that really happens, and can be read: inside the panel, without overlap."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

from moecomm import Comm, HierarchicalAllToAll, Nodes, Topology, cost, draw, testing
from moecomm.arrays import Counts
from moecomm.draw.svg import Box, Canvas, text_width
from moecomm.draw.words import topology_in_words
from moecomm.traffic import hop_traffic
from moecomm.transports import threads
from moecomm.transports.wrappers import Timed

SVG = "{http://www.w3.org/2000/svg}"
CYCLIC = Nodes([range(first, 12, 3) for first in range(3)])
SCATTERED = Nodes([[0, 5, 6, 7, 8, 10], [1], [2, 9], [3, 4]])
NODES = [Nodes.of_size(4, 16), Nodes([range(4), range(4, 8), [8, 9]]), CYCLIC, SCATTERED, Nodes.of_size(1, 4)]
HARDER_NODES = [Nodes.of_size(5, 5), Nodes.of_size(1, 1), Nodes.of_size(8, 64), Nodes([[0], range(1, 10)])]
STAGES = Topology(16, tensor=2, pipeline=2, expert=4, inner="expert_data")
TOPOLOGIES = [Topology(16, tensor=2, expert=16), Topology(16, tensor=4, expert=8), STAGES, Topology(8, expert=4)]


def random_counts(p: int) -> Counts:
    return np.random.default_rng(p).integers(-600, 1400, (p, p)).clip(0)


def planned(p: int, *experts: int, tensor: Sequence[int] = (1,), expert: Sequence[int] | None = None) -> str:
    """Layouts of p ranks; a quarter of them need more memory than there is."""
    workload = cost.Workload(experts, 1024, 4096, 1, 512)
    layouts = cost.candidates(cost.Machine(Nodes.of_size(8, p)), workload, cost.Sizes(tensor=tensor, expert=expert))
    limit = sorted(layout.memory.total for layout in layouts)[-1 - len(layouts) // 4]
    return draw.layouts_svg(layouts, f"{p} ranks", limit)


def pictures() -> Iterator[tuple[str, Callable[[], str]]]:
    yield "escapes", Canvas("a < b & c", 'x < y & "z"').svg
    yield "layouts", partial(planned, 1024, 128, tensor=(1, 2, 4, 8))
    yield "layouts of a large world", partial(planned, 65536, 4096, tensor=(1, 8))
    yield "layouts of a pyramid", partial(planned, 128, 32, 32, 64)
    yield "one layout", partial(planned, 8, 8, expert=[8])
    yield "two layouts of one size", partial(planned, 64, 8, expert=[8])
    for i, nodes in enumerate([*NODES, *HARDER_NODES]):
        yield f"traffic {i}", partial(draw.traffic_svg, nodes)
        yield f"traffic {i} random", partial(draw.traffic_svg, nodes, random_counts(nodes.world_size))
        for source in {0, nodes.world_size // 2, nodes.world_size - 1}:
            yield f"hops {i} from {source}", partial(draw.two_hops_svg, nodes, source)
    for i, topology in enumerate([*TOPOLOGIES, Topology(128, tensor=8, expert=128)]):
        yield f"lanes {i}", partial(draw.lanes_svg, topology, topology.world_size // 2)
        for axis, size in itertools.product(("tensor", "expert_lane"), (None, 3, 16)):
            yield f"{axis} {i} {size}", partial(draw.topology_svg, topology, axis, ranks_per_node=size)


PICTURES = dict(pictures())


def elements(svg: str, tag: str) -> list[ET.Element]:
    return list(ET.fromstring(svg).iter(SVG + tag))


def about(element: ET.Element) -> str:
    return element.findtext(f"{SVG}title") or ""


def boxes_of(rects: Iterable[ET.Element]) -> list[Box]:
    return [Box(*(float(rect.get(name, "nan")) for name in ("x", "y", "width", "height"))) for rect in rects]


def words(svg: str) -> Iterator[tuple[str, Box]]:
    """Every text and the most room that it takes."""
    for group in (ET.fromstring(svg), *elements(svg, "g")):
        for text in group.findall(f"{SVG}text"):
            look = {**group.attrib, **text.attrib}
            size, word = int(look["font-size"]), text.text or ""
            x = float(look["x"]) - {"start": 0, "middle": 0.5, "end": 1}[look["text-anchor"]] * text_width(word, size)
            yield word, Box(x, float(look["y"]) - 0.73 * size, text_width(word, size), 0.93 * size)


def arrows(svg: str) -> Iterator[tuple[str, Box]]:
    """The straight parts of all arrows, and what they belong to."""
    for path in filter(about, elements(svg, "path")):
        numbers = list(map(float, re.findall(r"-?\d+(?:\.\d+)?", path.get("d", ""))))
        for (x, y), (to_x, to_y) in itertools.pairwise(zip(numbers[::2], numbers[1::2], strict=True)):
            yield about(path), Box(min(x, to_x), min(y, to_y), abs(x - to_x), abs(y - to_y))


def shared(boxes: Sequence[Box], others: Sequence[Box]) -> np.ndarray:
    """[boxes, others, 2] how many px of width and of height two boxes share; negative: how far they are apart."""
    one, other = np.array(boxes)[:, None], np.array(others)
    return np.minimum(one[..., :2] + one[..., 2:], other[:, :2] + other[:, 2:]) - np.maximum(one[..., :2], other[:, :2])


@pytest.mark.parametrize("name", PICTURES)
def test_all_is_inside_and_nothing_lies_on_another(name: str) -> None:
    svg = PICTURES[name]()
    assert svg == PICTURES[name]()
    root, (panel, *boxes) = ET.fromstring(svg), boxes_of(elements(svg, "rect"))
    assert about(root) and [panel.width + 1, panel.height + 1] == [float(root.attrib[n]) for n in ("width", "height")]
    names, texts = zip(*words(svg), strict=True)
    of, lines = [arrow for arrow, _ in arrows(svg)], [line for _, line in arrows(svg)]
    inner = shared([*boxes, *texts, *lines], [Box(15, 15, panel.width - 30, panel.height - 30)])[:, 0]
    assert np.allclose(inner, np.array([*boxes, *texts, *lines])[:, 2:])
    covered = np.triu((shared(texts, texts) > 0).all(axis=-1), 1)
    assert not [(names[i], names[j]) for i, j in np.argwhere(covered)]
    ranks = [Box(x + 2, y + 2, w - 4, h - 4) for x, y, w, h in boxes_of(filter(about, elements(svg, "rect")))]
    frames = boxes_of(rect for rect in elements(svg, "rect") if rect.get("fill") == "#f6f8fa")
    assert all(np.isclose(shared([rank], frames), rank[2:]).all(axis=-1).sum() == 1 for rank in ranks)
    if lines:  # arrows run around ranks and texts, and beside each other
        assert not (shared(lines, [*ranks, *texts]) > -1).all(axis=-1).any()
        overlap = np.sort(shared(lines, lines))
        on_another = (overlap[..., 1] > 6) & (overlap[..., 0] > -2) & (np.array(of)[:, None] != of)
        assert not on_another.any(), [(of[i], of[j]) for i, j in np.argwhere(on_another)]


@pytest.mark.parametrize("name", [name for name in PICTURES if "layout" in name])
def test_names_of_layouts_do_not_overlap_in_a_wide_font(name: str) -> None:
    """Measured in DejaVu Sans, which matplotlib brings: neither on one another nor on a dot of the front."""
    font_manager, textpath = pytest.importorskip("matplotlib.font_manager"), pytest.importorskip("matplotlib.textpath")
    svg = PICTURES[name]()
    boxes = []
    for text in elements(svg, "text"):
        size, bold = int(text.attrib["font-size"]), text.get("font-weight", "normal")
        font = font_manager.FontProperties(
            family="DejaVu Sans", weight="bold" if bold == "600" else "normal", size=size
        )
        path = textpath.TextPath((0, 0), text.text or "", prop=font).get_extents()
        x = float(text.attrib["x"]) - {"start": 0, "middle": 0.5, "end": 1}[text.attrib["text-anchor"]] * path.x1
        boxes.append(Box(x, float(text.attrib["y"]) - path.y1, path.x1, path.y1 - path.y0))
    names = [text.text for text in elements(svg, "text")]
    covered = np.triu((shared(boxes, boxes) > 0).all(axis=-1), 1)
    assert not [(names[i], names[j]) for i, j in np.argwhere(covered)]
    front = boxes_of(rect for rect in elements(svg, "rect") if rect.get("width") == "10")
    assert front and not (shared(boxes, front) > 0.5).all(axis=-1).any()
    panel, *_ = boxes_of(elements(svg, "rect"))
    assert all(box.x >= 0 and box.x + box.width <= panel.width for box in boxes)


def test_the_front_is_drawn_as_steps() -> None:
    """From the fastest layout upward: along the front no layout lies below and on the left."""
    svg = planned(1024, 128, tensor=(1, 2, 4, 8))
    dots = boxes_of(filter(about, elements(svg, "rect")))
    front = [dot.center for dot in dots if dot.width == 10]
    assert front == sorted(front, key=lambda dot: (dot[0], -dot[1]))
    solid = [
        dot
        for dot, rect in zip(dots, filter(about, elements(svg, "rect")), strict=True)
        if rect.get("fill") != "#ffffff"
    ]
    for x, y in front:
        assert not [dot for dot in solid if dot.center[0] < x - 0.2 and dot.center[1] > y + 0.2]


def test_pictures_follow_a_dark_page() -> None:
    assert "<style>@media (prefers-color-scheme: dark) {svg {filter: " in Canvas("a", "b").svg()


def sent(nodes: Nodes, counts: Counts) -> tuple[Counts, ...]:
    """[p, p] messages and [p, p] rows from rank to rank in one real hierarchical call, as Timed counts them."""

    def body(comm: Comm) -> tuple[Counts, Counts]:
        timed = Timed(comm)
        a2a = HierarchicalAllToAll(timed, nodes)
        timed.clear()
        a2a.rows(np.zeros((int(counts[comm.rank].sum()), 1), np.uint8), counts[comm.rank])
        return timed.record["all_to_allv"].messages, timed.record["all_to_allv"].bytes

    return tuple(map(np.stack, zip(*threads.run(len(counts), body), strict=True)))


@pytest.mark.parametrize("nodes", NODES, ids=repr)
def test_hop_traffic_is_what_a_real_run_sends(nodes: Nodes) -> None:
    p = nodes.world_size
    inside = nodes.node_of[:, None] == nodes.node_of
    for counts in map(np.asarray, (np.ones((p, p), np.int64), random_counts(p), *testing.count_matrices(p))):
        messages, rows = sent(nodes, counts)
        for hop, where in zip(hop_traffic(nodes, counts), (inside, ~inside), strict=True):
            assert (hop == rows * where).all() and ((hop > 0) == messages * where).all()


@pytest.mark.parametrize("nodes", NODES, ids=repr)
def test_the_arrows_and_counts_are_what_a_real_run_sends(nodes: Nodes) -> None:
    every = np.ones((nodes.world_size, nodes.world_size), np.int64)
    hop, (everything, _) = np.where(nodes.node_of[:, None] == nodes.node_of, 1, 2), sent(nodes, every)
    for source in range(nodes.world_size):
        svg = draw.two_hops_svg(nodes, source)
        alone, _ = sent(nodes, every * (np.arange(nodes.world_size) == source)[:, None])
        wanted = [f"hop {i}: rank {s} to rank {r}" for i in (1, 2) for s, r in np.argwhere(alone * hop == i)]
        assert list(filter(None, map(about, elements(svg, "path")))) == wanted
        flat = (hop[source] == 1).sum() - 1, (hop[source] == 2).sum()
        hops = tuple(everything[source][hop[source] == i].sum() for i in (1, 2))
        said = [text for text, _ in words(svg) if " = " in text]
        assert said == [f"{a + b} = {a} inside the node + {b} between nodes" for a, b in (flat, hops)]


@pytest.mark.parametrize("nodes", NODES, ids=repr)
def test_the_matrices_show_the_traffic(nodes: Nodes) -> None:
    svg = draw.traffic_svg(nodes)
    every = np.ones((nodes.world_size, nodes.world_size), np.int64)
    matrices = [1 - np.eye(nodes.world_size, dtype=np.int64), *hop_traffic(nodes, every)]
    cells = [int(text.text or -1) for group in elements(svg, "g") for text in group]
    assert cells == [value for matrix in matrices for value in sorted(matrix[matrix > 0].tolist())]
    bold = [text.text for text in elements(svg, "text") if text.get("font-size") == "12" and text.get("font-weight")]
    parts = [m * ((nodes.node_of[:, None] == nodes.node_of) == inside) for m in matrices for inside in (True, False)]
    assert bold == [str(total) for part in parts for total in ((part > 0).sum(), part.sum())]


def test_the_cells_are_where_their_ranks_are() -> None:
    counts = np.zeros((12, 12), np.int64)
    counts[3, 7] = 9  # through rank 6, which is on the node of rank 3 and has the local rank of rank 7
    small = [box.center for _, box in words(draw.traffic_svg(CYCLIC, counts)) if box.height == 0.93 * 10]
    ticks, marks = np.array(small[:-3]).reshape(3, 12, 2, 2), small[-3:]  # matrix, place, top or left, x or y
    place = [rank for node in CYCLIC.ranks for rank in node].index
    for i, (sender, receiver) in enumerate([(3, 7), (3, 6), (6, 7)]):
        assert marks[i] == pytest.approx((ticks[i, place(receiver), 0, 0], ticks[i, place(sender), 1, 1]), abs=0.2)


@pytest.mark.parametrize("topology", TOPOLOGIES, ids=topology_in_words)
@pytest.mark.parametrize("axes", [("tensor",), ("expert",), ("expert_lane",), ("expert_data", "expert")])
def test_the_groups_that_are_drawn(topology: Topology, axes: tuple[str, ...]) -> None:
    drawn: dict[int, list[int]] = {}
    for rect in filter(about, elements(draw.topology_svg(topology, *axes, ranks_per_node=4), "rect")):
        rank, group = map(int, re.findall(r"\d+", about(rect)))
        drawn.setdefault(group, []).append(rank)
    assert [drawn[group] for group in sorted(drawn)] == topology.groups(*axes)
    assert eval(topology_in_words(topology)) == topology


@pytest.mark.parametrize("topology", TOPOLOGIES, ids=topology_in_words)
def test_the_lanes_that_are_drawn(topology: Topology) -> None:
    source, tensor = 5, topology.group_of(5, "tensor")
    rows = [(s, r) for s in tensor for r in topology.group_of(s, "expert") if r != s and (r - s) % topology.tensor == 0]
    results = [(source, rank) for rank in tensor if rank != source]
    wanted = [f"{name}: rank {s} to rank {r}" for name, step in (("rows", rows), ("results", results)) for s, r in step]
    svg = draw.lanes_svg(topology, source)
    assert list(filter(None, map(about, elements(svg, "path")))) == wanted
    everyone, peers = len(topology.group_of(source, "expert")) - 1, sum(s == source for s, _ in rows)
    said = [text for text, _ in words(svg) if " = " in text]
    assert said == [f"{a + b} = {a} for results + {b} for rows" for a, b in ((0, everyone), (len(results), peers))]


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match=r"two_hops_svg: source is 8, expected a rank in 0 \.\. 7"):
        draw.two_hops_svg(Nodes.of_size(2, 8), 8)
    for bad in (np.ones((3, 3), int), np.ones((4, 4)), -np.ones((4, 4), int)):
        with pytest.raises(ValueError, match=r"counts .*expected \(4, 4\) whole numbers >= 0"):
            draw.traffic_svg(Nodes.of_size(2, 4), bad)
    with pytest.raises(ValueError, match="ranks_per_node is 0"):
        draw.topology_svg(Topology(4), "data", ranks_per_node=0)


def test_the_figures_are_current_and_stale_ones_are_named(tmp_path: Path) -> None:
    def make_figures(*arguments: object) -> tuple[int, str]:
        command = [sys.executable, str(ROOT / "docs" / "make_figures.py"), *map(str, arguments)]
        ended = subprocess.run(command, capture_output=True, text=True)  # a process of its own, so other hashes
        return ended.returncode, ended.stdout

    assert make_figures("--check") == (0, "every figure is current\n")
    assert make_figures("--folder", tmp_path)[0] == 0
    (tmp_path / "two_hops.svg").write_text("<svg/>")
    (tmp_path / "lanes.svg").unlink()
    (tmp_path / "old.svg").write_text("<svg/>")
    stale = "lanes.svg is stale\nold.svg is stale\ntwo_hops.svg is stale\n"
    assert make_figures("--folder", tmp_path, "--check") == (1, stale)
