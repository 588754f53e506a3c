"""The pictures show the exchange that really happens, and can be read: inside the panel, without overlap."""

from __future__ import annotations

import functools
import importlib.util
import itertools
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

from moecomm import AllToAll, Comm, FlatAllToAll, HierarchicalAllToAll, Nodes, draw, testing
from moecomm.arrays import Counts
from moecomm.draw.lanes import lane_arrows
from moecomm.draw.legend import legend
from moecomm.draw.routes import forwarders, hop_arrows, num_messages
from moecomm.draw.svg import Box, Canvas, text_width
from moecomm.draw.topology import in_words
from moecomm.draw.traffic import totals
from moecomm.topology import Topology
from moecomm.transports import threads
from moecomm.transports.wrappers import Timed

PROGRAM = ROOT / "docs" / "make_figures.py"
SPEC = importlib.util.spec_from_file_location("make_figures", PROGRAM)
assert SPEC and SPEC.loader
make_figures = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(make_figures)

UNEQUAL = Nodes([range(4), range(4, 8), [8, 9]])
CYCLIC = Nodes([range(first, 12, 3) for first in range(3)])
SCATTERED = Nodes([[0, 5, 6, 7, 8, 10], [1], [2, 9], [3, 4]])
NODES = [
    Nodes.of_size(4, 16),
    Nodes.of_size(2, 8),
    UNEQUAL,
    CYCLIC,
    SCATTERED,
    Nodes.of_size(1, 4),
    Nodes.of_size(5, 5),
]
TOPOLOGIES = [
    Topology(16, tensor=2, expert=16),
    Topology(8, tensor=2, expert=8),
    Topology(16, tensor=4, expert=8),
    Topology(16, tensor=2, pipeline=2, expert=4),
    Topology(8, tensor=4, expert=2),
    Topology(8, expert=4),
]


def pictures() -> dict[str, Callable[[], str]]:
    """The figures of the documentation, and shapes that are harder to draw."""
    found = dict(make_figures.FIGURES)
    for i, nodes in enumerate([*NODES, Nodes.of_size(1, 1), Nodes.of_size(8, 64), Nodes([[0], range(1, 10)])]):
        for source in {0, nodes.world_size // 2, nodes.world_size - 1}:
            found[f"hops {i} from {source}"] = lambda nodes=nodes, source=source: draw.two_hops_svg(nodes, source)
        found[f"traffic {i}"] = lambda nodes=nodes: draw.traffic_svg(nodes, random_counts(nodes.world_size))
    for i, topology in enumerate(TOPOLOGIES):
        found[f"lanes {i}"] = lambda topology=topology: draw.lanes_svg(topology, topology.world_size // 2)
        for axis in ("tensor", "expert_lane"):
            found[f"{axis} {i}"] = lambda topology=topology, axis=axis: draw.topology_svg(topology, axis)
            found[f"{axis} {i} nodes"] = lambda t=topology, axis=axis: draw.topology_svg(t, axis, ranks_per_node=3)
    found["groups of a product"] = lambda: draw.topology_svg(
        Topology(64, tensor=2, inner="expert_data"), "tensor", ranks_per_node=16
    )
    return found


PICTURES = {name: functools.cache(picture) for name, picture in pictures().items()}


def random_counts(p: int) -> Counts:
    rng = np.random.default_rng(p)
    return rng.integers(0, 1500, (p, p)) * (rng.random((p, p)) < 0.7)


@pytest.fixture(params=PICTURES)
def svg(request: pytest.FixtureRequest) -> str:
    return PICTURES[request.param]()


# ---- it can be read ------------------------------------------------------------------------------------------------


def elements(svg: str, tag: str) -> list[ET.Element]:
    return list(ET.fromstring(svg).iter(f"{{http://www.w3.org/2000/svg}}{tag}"))


def about(element: ET.Element) -> str:
    return element.findtext("{http://www.w3.org/2000/svg}title") or ""


def box_of(rect: ET.Element) -> Box:
    return Box(*(float(rect.get(name, "nan")) for name in ("x", "y", "width", "height")))


def words(svg: str) -> Iterator[tuple[str, Box]]:
    """Every text and the most room that it takes."""
    for group in (ET.fromstring(svg), *elements(svg, "g")):
        for text in group.findall("{http://www.w3.org/2000/svg}text"):
            look = {**group.attrib, **text.attrib}
            size, weight = float(look["font-size"]), int(look.get("font-weight", "400"))
            width = text_width(text.text or "", size, weight)
            x = float(look["x"]) - {"start": 0, "middle": 0.5, "end": 1}[look.get("text-anchor", "start")] * width
            yield text.text or "", Box(x, float(look["y"]) - 0.73 * size, width, 0.93 * size)


def test_it_is_svg_with_a_title_and_a_panel(svg: str) -> None:
    root = ET.fromstring(svg)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert about(root)
    panel = elements(svg, "rect")[0]
    assert panel.get("fill") == "#ffffff"
    assert (float(panel.get("width", 0)), float(panel.get("height", 0))) == (
        float(root.get("width", 0)) - 1,
        float(root.get("height", 0)) - 1,
    )


def test_no_text_leaves_the_panel_or_covers_another(svg: str) -> None:
    panel = box_of(elements(svg, "rect")[0]).grown(-8)
    found = list(words(svg))
    assert found
    for text, box in found:
        assert panel.x <= box.x and box.right <= panel.right, text
        assert panel.y <= box.y and box.bottom <= panel.bottom, text
    x, y, width, height = np.array([box for _, box in found]).T
    apart = (x[:, None] + width[:, None] <= x) | (y[:, None] + height[:, None] <= y)
    covered = np.argwhere(~(apart | apart.T | np.eye(len(found), dtype=bool)))
    assert not covered.size, [(found[i][0], found[j][0]) for i, j in covered.tolist()]


def test_nothing_else_leaves_the_panel(svg: str) -> None:
    panel, *rects = map(box_of, elements(svg, "rect"))
    for box in rects:
        assert panel.x < box.x and box.right < panel.right and panel.y < box.y and box.bottom < panel.bottom
    for path in elements(svg, "path"):
        if about(path):
            for x, y in points(path):
                assert panel.x < x < panel.right and panel.y < y < panel.bottom, about(path)


def points(path: ET.Element) -> list[tuple[float, float]]:
    numbers = [float(number) for number in re.findall(r"-?\d+(?:\.\d+)?", path.get("d", ""))]
    return list(zip(numbers[::2], numbers[1::2], strict=True))


def test_arrows_run_around_the_boxes(svg: str) -> None:
    boxes = {about(rect): box_of(rect).grown(-1.5) for rect in elements(svg, "rect") if about(rect)}
    for path in elements(svg, "path"):
        for (x, y), (next_x, next_y) in itertools.pairwise(points(path)) if about(path) else ():
            for name, box in boxes.items():
                beside = max(x, next_x) <= box.x or min(x, next_x) >= box.right
                assert beside or max(y, next_y) <= box.y or min(y, next_y) >= box.bottom, (about(path), name)


def test_arrows_do_not_lie_on_each_other(svg: str) -> None:
    """Long parts of two arrows side by side are at least 2 px apart."""
    parts: list[tuple[str, str, float, float, float]] = []
    for path in elements(svg, "path"):
        if about(path).startswith(("hop", "rank")):
            for (x, y), (next_x, next_y) in itertools.pairwise(points(path)):
                if abs(x - next_x) > 12:
                    parts.append((about(path), "across", y, min(x, next_x), max(x, next_x)))
                elif abs(y - next_y) > 12:
                    parts.append((about(path), "down", x, min(y, next_y), max(y, next_y)))
    for one, other in itertools.combinations(parts, 2):
        if one[0] != other[0] and one[1] == other[1] and min(one[4], other[4]) - max(one[3], other[3]) > 6:
            assert abs(one[2] - other[2]) >= 2, (one, other)


def test_the_same_bytes_each_time() -> None:
    for name, picture in PICTURES.items():
        assert picture() == picture.__wrapped__(), name


def test_escapes_and_grows() -> None:
    canvas = Canvas("a < b & c")
    canvas.text((20, 30), 'x < y & "z"', 12)
    canvas.rect(Box(20, 40, 10, 10), about="<r>")
    legend(canvas, [], 60)
    svg = canvas.svg()
    assert about(ET.fromstring(svg)) == "a < b & c"
    assert [text for text, _ in words(svg)] == ['x < y & "z"']
    assert about(elements(svg, "rect")[1]) == "<r>"
    assert float(ET.fromstring(svg).get("width", 0)) >= 20 + text_width('x < y & "z"', 12) + 20


# ---- it shows what happens -----------------------------------------------------------------------------------------


def counted(algorithm: Callable[[Comm], AllToAll], counts: Counts) -> tuple[Counts, Counts]:
    """[p, p] messages and [p, p] rows from rank to rank in one real uneven call, as Timed counts them."""

    def body(comm: Comm) -> tuple[Counts, Counts]:
        timed = Timed(comm)
        a2a = algorithm(timed)
        timed.clear()
        a2a.rows(np.zeros((int(counts[comm.rank].sum()), 1), np.uint8), counts[comm.rank])
        nothing = np.zeros(comm.size, np.int64)
        record = timed.record.get("all_to_allv")
        return (record.messages, record.bytes) if record else (nothing, nothing)

    messages, rows = zip(*threads.run(len(counts), body), strict=True)
    return np.stack(messages), np.stack(rows)


@pytest.mark.parametrize("nodes", NODES, ids=repr)
def test_hop_traffic_is_what_a_real_run_sends(nodes: Nodes) -> None:
    p = nodes.world_size
    for counts in (np.ones((p, p), np.int64), random_counts(p), *testing.count_matrices(p)):
        messages, rows = counted(lambda comm: HierarchicalAllToAll(comm, nodes), np.asarray(counts))
        inside = np.array([nodes.same_node(rank) for rank in range(p)])
        hop_one, hop_two = draw.hop_traffic(nodes, counts)
        assert (hop_one == rows * inside).all()
        assert (hop_two == rows * ~inside).all()
        assert ((hop_one > 0) == messages * inside).all()
        assert ((hop_two > 0) == messages * ~inside).all()


@pytest.mark.parametrize("nodes", NODES, ids=repr)
def test_the_arrows_are_the_messages_that_carry_rows_of_the_source(nodes: Nodes) -> None:
    p = nodes.world_size
    for source in {0, p // 2, p - 1}:
        counts = np.zeros((p, p), np.int64)
        counts[source] = 1
        messages, _ = counted(lambda comm: HierarchicalAllToAll(comm, nodes), counts)
        hop_one, hop_two = hop_arrows(nodes, source)
        assert sorted(hop_one + hop_two) == [tuple(arrow) for arrow in np.argwhere(messages).tolist()]
        drawn = [about(path) for path in elements(draw.two_hops_svg(nodes, source), "path") if about(path)]
        wanted = [f"hop {hop}: rank {s} to rank {r}" for hop, arrows in ((1, hop_one), (2, hop_two)) for s, r in arrows]
        assert drawn == wanted


@pytest.mark.parametrize("nodes", NODES, ids=repr)
def test_the_message_counts(nodes: Nodes) -> None:
    p = nodes.world_size
    every = np.ones((p, p), np.int64)
    flat, _ = counted(FlatAllToAll, every)
    hierarchical, _ = counted(lambda comm: HierarchicalAllToAll(comm, nodes), every)
    for rank in range(p):
        inside = nodes.same_node(rank)
        wanted = [int(messages[rank][where].sum()) for messages in (flat, hierarchical) for where in (inside, ~inside)]
        assert list(num_messages(nodes, rank)) == wanted
        said = [text for text, _ in words(draw.two_hops_svg(nodes, rank)) if " = " in text]
        assert said == [f"{a + b} = {a} inside the node + {b} between nodes" for a, b in (wanted[:2], wanted[2:])]


def test_message_counts_of_the_paper() -> None:
    assert num_messages(Nodes.of_size(8, 128), 77) == (7, 120, 7, 15)
    assert num_messages(Nodes.of_size(4, 16), 0) == (3, 12, 3, 3)


def test_forwarders() -> None:
    assert forwarders(UNEQUAL)[0].tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1]
    assert forwarders(UNEQUAL)[8].tolist() == [8, 9, 8, 9, 8, 9, 8, 9, 8, 9]
    assert forwarders(CYCLIC)[4].tolist() == [1, 1, 1, 4, 4, 4, 7, 7, 7, 10, 10, 10]


@pytest.mark.parametrize("nodes", NODES, ids=repr)
def test_the_matrices_show_the_traffic(nodes: Nodes) -> None:
    p = nodes.world_size
    svg = draw.traffic_svg(nodes)
    hop_one, hop_two = draw.hop_traffic(nodes)
    flat = 1 - np.eye(p, dtype=np.int64)
    cells = [float(text.text or "nan") for group in elements(svg, "g") for text in group]
    wanted = [value for matrix in (flat, hop_one, hop_two) for value in sorted(matrix[matrix > 0].tolist())]
    assert cells == wanted
    bold = [text.text for text in elements(svg, "text") if text.get("font-size") == "12" and text.get("font-weight")]
    numbers = [totals(nodes, matrix) for matrix in (flat, hop_one, hop_two)]
    assert bold == [str(n) for total in numbers for i in (0, 1) for n in (total.messages[i], total.rows[i])]


def test_the_cells_are_where_their_ranks_are() -> None:
    counts = np.zeros((12, 12), np.int64)
    counts[3, 7] = 9  # nodes 0 3 6 9 | 1 4 7 10 | 2 5 8 11: from place 1 to place 6, through rank 6 at place 2
    svg = draw.traffic_svg(CYCLIC, counts)
    ticks = {text: box.center for text, box in words(svg) if box.height == pytest.approx(9.3) and box.x < 60}
    marks = [[float(text.get(name, "nan")) for name in "xy"] for group in elements(svg, "g") for text in group]
    grids = [box_of(rect) for rect in elements(svg, "rect") if rect.get("stroke") == "#8c959f"]
    places = [((x - grid.x) // 20, (y - grid.y) // 20) for (x, y), grid in zip(marks, grids, strict=True)]
    assert places == [(6, 1), (2, 1), (6, 2)]
    assert ticks["3"][1] == pytest.approx(marks[0][1] - 3.5, abs=2)


def test_totals() -> None:
    hop_one, hop_two = draw.hop_traffic(Nodes.of_size(4, 16))
    assert totals(Nodes.of_size(4, 16), hop_one) == ((48, 0), (192, 0))
    assert totals(Nodes.of_size(4, 16), hop_two) == ((0, 48), (0, 192))


@pytest.mark.parametrize("topology", TOPOLOGIES, ids=in_words)
@pytest.mark.parametrize("axes", [("tensor",), ("expert",), ("expert_lane",), ("expert_data", "expert")])
def test_the_groups_that_are_drawn(topology: Topology, axes: tuple[str, ...]) -> None:
    svg = draw.topology_svg(topology, *axes, ranks_per_node=4)
    drawn: dict[int, list[int]] = {}
    for rect in elements(svg, "rect"):
        if about(rect):
            rank, group = map(int, re.findall(r"\d+", about(rect)))
            drawn.setdefault(group, []).append(rank)
    assert [sorted(drawn[group]) for group in sorted(drawn)] == topology.groups(*axes)
    assert eval(in_words(topology)) == topology


@pytest.mark.parametrize("topology", TOPOLOGIES, ids=in_words)
def test_the_lanes_that_are_drawn(topology: Topology) -> None:
    source = topology.world_size // 2
    arrows = lane_arrows(topology, source)
    assert all(s % topology.tensor == r % topology.tensor for s, r in arrows)
    assert {s for s, _ in arrows} <= set(topology.group_of(source, "tensor"))
    svg = draw.lanes_svg(topology, source)
    drawn = [about(path) for path in elements(svg, "path")]
    assert [text for text in drawn if text.startswith("rank")] == [f"rank {s} to rank {r}" for s, r in arrows]
    shared = [f"results shared with rank {rank}" for rank in topology.group_of(source, "tensor")]
    assert [text for text in drawn if text.startswith("results")] == (shared if topology.tensor > 1 else [])


def test_peers_of_the_lane_restricted_exchange() -> None:
    """p/L - 1 instead of p - 1 where the experts are spread over all ranks."""
    said = [text for text, _ in words(draw.lanes_svg(Topology(16, tensor=2, expert=16)))]
    assert "15 of its expert group" in said
    assert "7 of its expert group + 1 of its tensor group" in said
    assert len([1 for s, _ in lane_arrows(Topology(128, tensor=8, expert=128), 0) if s == 0]) == 128 // 8 - 1


# ---- bad input, and the files --------------------------------------------------------------------------------------


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match=r"two_hops_svg: source is 8, expected a rank in 0 \.\. 7"):
        draw.two_hops_svg(Nodes.of_size(2, 8), 8)
    for bad in (np.ones((3, 3), int), np.ones((4, 4)), -np.ones((4, 4), int)):
        with pytest.raises(ValueError, match=r"counts .*expected \(4, 4\) whole numbers >= 0"):
            draw.traffic_svg(Nodes.of_size(2, 4), bad)
    with pytest.raises(ValueError, match="ranks_per_node is 0"):
        draw.topology_svg(Topology(4), "data", ranks_per_node=0)
    with pytest.raises(ValueError, match="is no axis"):
        draw.topology_svg(Topology(4), "colour")
    with pytest.raises(ValueError, match="rank is 4"):
        draw.lanes_svg(Topology(4), 4)


def test_the_figures_are_current() -> None:
    """In a process of its own, so with other hashes."""
    ended = subprocess.run([sys.executable, str(PROGRAM), "--check"], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    for name in make_figures.FIGURES:
        assert (make_figures.FOLDER / name).stat().st_size < 60_000, name


def test_stale_figures_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = ["--folder", str(tmp_path)]
    assert make_figures.main(folder) == 0
    assert make_figures.main([*folder, "--check"]) == 0
    (tmp_path / "two_hops.svg").write_text("<svg/>")
    (tmp_path / "lanes.svg").unlink()
    (tmp_path / "old.svg").write_text("<svg/>")
    capsys.readouterr()
    assert make_figures.main([*folder, "--check"]) == 1
    assert capsys.readouterr().out.splitlines() == [
        "two_hops.svg: differs from what is drawn now",
        "lanes.svg: missing",
        "old.svg: nothing draws it",
    ]
    assert (tmp_path / "two_hops.svg").read_text() == "<svg/>"
