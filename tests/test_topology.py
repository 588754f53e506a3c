"""Topology: literal tables, and properties that every valid choice of sizes keeps."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import pickle
import random
from collections import defaultdict

import numpy as np
import pytest

from moecomm.topology import AXES, Topology

EVENS, ODDS = [0, 2, 4, 6, 8, 10, 12, 14], [1, 3, 5, 7, 9, 11, 13, 15]
PAIRS = [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9], [10, 11], [12, 13], [14, 15]]
FOURS = [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]]
STRIDED_FOURS = [[0, 4, 8, 12], [1, 5, 9, 13], [2, 6, 10, 14], [3, 7, 11, 15]]
EIGHTS = [[0, 1, 2, 3, 4, 5, 6, 7], [8, 9, 10, 11, 12, 13, 14, 15]]
EIGHT_APART = [[0, 8], [1, 9], [2, 10], [3, 11], [4, 12], [5, 13], [6, 14], [7, 15]]


def check(topology: Topology, **tables: list[list[int]]) -> None:
    for axis, table in tables.items():
        assert topology.groups(axis) == table, axis


class TestDeepSpeedTables:
    """The rank lists of deepspeed.utils.groups, in its order: its tests and docstrings, and runs of its code."""

    def test_experts_whole_on_neighbouring_ranks(self) -> None:
        check(
            Topology(8, expert=4),
            expert=[[0, 1, 2, 3], [4, 5, 6, 7]],
            expert_data=[[0, 4], [1, 5], [2, 6], [3, 7]],
        )
        check(Topology(16, expert=4), expert=FOURS, expert_data=STRIDED_FOURS)
        check(Topology(16, expert=2), expert=PAIRS, expert_data=[EVENS, ODDS])

    def test_experts_whole_expert_data_inner(self) -> None:
        check(
            Topology(8, expert=4, inner="expert_data"),
            expert=[[0, 2, 4, 6], [1, 3, 5, 7]],
            expert_data=[[0, 1], [2, 3], [4, 5], [6, 7]],
        )
        check(Topology(16, expert=4, inner="expert_data"), expert=STRIDED_FOURS, expert_data=FOURS)
        check(Topology(16, expert=2, inner="expert_data"), expert=EIGHT_APART, expert_data=EIGHTS)

    def test_experts_whole_pipeline(self) -> None:
        check(
            Topology(16, pipeline=2, expert=4),
            expert=FOURS,
            expert_data=[[0, 4], [1, 5], [2, 6], [3, 7], [8, 12], [9, 13], [10, 14], [11, 15]],
            pipeline=EIGHT_APART,
        )

    def test_experts_whole_span_the_tensor_pairs(self) -> None:
        check(
            Topology(16, tensor=2, expert=4),
            tensor=PAIRS,
            data=[EVENS, ODDS],
            expert=FOURS,
            expert_data=STRIDED_FOURS,
            expert_tensor=[[rank] for rank in range(16)],
        )

    def test_experts_sliced_like_tensor(self) -> None:
        check(
            Topology(16, tensor=2, expert=4, expert_tensor=2),
            tensor=PAIRS,
            data=[EVENS, ODDS],
            expert=[[0, 2, 4, 6], [8, 10, 12, 14], [1, 3, 5, 7], [9, 11, 13, 15]],
            expert_data=[[0, 8], [2, 10], [4, 12], [6, 14], [1, 9], [3, 11], [5, 13], [7, 15]],
            expert_tensor=PAIRS,
        )
        check(
            Topology(16, tensor=4, expert=2, expert_tensor=4),
            expert=[[0, 4], [8, 12], [1, 5], [9, 13], [2, 6], [10, 14], [3, 7], [11, 15]],
            expert_data=[[0, 8], [4, 12], [1, 9], [5, 13], [2, 10], [6, 14], [3, 11], [7, 15]],
        )
        check(
            Topology(16, tensor=4, expert=4, expert_tensor=4),
            expert=[[0, 4, 8, 12], [1, 5, 9, 13], [2, 6, 10, 14], [3, 7, 11, 15]],
            expert_data=[[r] for r in (0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15)],
        )
        check(
            Topology(8, tensor=2, expert=4, expert_tensor=2),
            expert=[[0, 2, 4, 6], [1, 3, 5, 7]],
            expert_data=[[0], [2], [4], [6], [1], [3], [5], [7]],
        )
        check(
            Topology(8, tensor=2, expert=2, expert_tensor=2),
            expert=[[0, 2], [4, 6], [1, 3], [5, 7]],
            expert_data=[[0, 4], [2, 6], [1, 5], [3, 7]],
        )

    def test_experts_sliced_pipeline(self) -> None:
        check(
            Topology(16, tensor=2, pipeline=2, expert=2, expert_tensor=2),
            expert=[[0, 2], [4, 6], [1, 3], [5, 7], [8, 10], [12, 14], [9, 11], [13, 15]],
            expert_data=[[0, 4], [2, 6], [1, 5], [3, 7], [8, 12], [10, 14], [9, 13], [11, 15]],
            data=[[0, 2, 4, 6], [1, 3, 5, 7], [8, 10, 12, 14], [9, 11, 13, 15]],
            pipeline=EIGHT_APART,
        )

    def test_experts_sliced_expert_data_inner(self) -> None:
        check(
            Topology(16, tensor=2, expert=4, expert_tensor=2, inner="expert_data"),
            expert=[[0, 4, 8, 12], [2, 6, 10, 14], [1, 5, 9, 13], [3, 7, 11, 15]],
            expert_data=[[0, 2], [4, 6], [8, 10], [12, 14], [1, 3], [5, 7], [9, 11], [13, 15]],
        )
        check(
            Topology(32, tensor=2, expert=4, expert_tensor=2, inner="expert_data"),
            expert=[
                *([0, 8, 16, 24], [2, 10, 18, 26], [4, 12, 20, 28], [6, 14, 22, 30]),
                *([1, 9, 17, 25], [3, 11, 19, 27], [5, 13, 21, 29], [7, 15, 23, 31]),
            ],
            expert_data=[
                *([0, 2, 4, 6], [8, 10, 12, 14], [16, 18, 20, 22], [24, 26, 28, 30]),
                *([1, 3, 5, 7], [9, 11, 13, 15], [17, 19, 21, 23], [25, 27, 29, 31]),
            ],
        )

    def test_folding(self) -> None:
        topology = Topology(16, tensor=2, expert=4)
        check(topology, tensor=PAIRS, data=[EVENS, ODDS], expert=FOURS, expert_data=STRIDED_FOURS)
        assert topology.tensor * topology.data == topology.expert * topology.expert_tensor * topology.expert_data == 16


class TestLanes:
    def test_lane_is_the_ranks_of_a_stage_with_one_tensor_rank(self) -> None:
        topology = Topology(16, tensor=2, pipeline=2, expert=4)
        check(topology, lane=[[0, 2, 4, 6], [1, 3, 5, 7], [8, 10, 12, 14], [9, 11, 13, 15]])
        assert topology.groups("lane", "tensor") == EIGHTS

    def test_expert_group_over_two_lanes(self) -> None:
        topology = Topology(16, tensor=2, expert=4)
        check(topology, expert_lane=[[0, 2], [1, 3], [4, 6], [5, 7], [8, 10], [9, 11], [12, 14], [13, 15]])

    def test_expert_group_on_one_lane(self) -> None:
        sliced = Topology(16, tensor=2, expert=4, expert_tensor=2)
        assert sliced.groups("expert_lane") == sliced.groups("expert")
        inner = Topology(16, tensor=2, expert=4, inner="expert_data")
        assert inner.groups("expert_lane") == inner.groups("expert")

    def test_expert_groups_smaller_than_tensor_groups(self) -> None:
        smallest = Topology(2, tensor=2)
        check(smallest, expert=[[0], [1]], expert_data=[[0, 1]], expert_lane=[[0], [1]])
        topology = Topology(4, tensor=4, expert=2)
        check(topology, expert=[[0, 1], [2, 3]], expert_lane=[[0], [1], [2], [3]])

    def test_sliced_experts_in_a_larger_tensor_group(self) -> None:
        topology = Topology(8, tensor=4, expert=2, expert_tensor=2)
        check(topology, expert=[[0, 2], [4, 6], [1, 3], [5, 7]], expert_tensor=[[0, 1], [2, 3], [4, 5], [6, 7]])

    def test_groups_that_do_not_nest(self) -> None:
        topology = Topology(12, tensor=4, expert=6)
        check(topology, expert_lane=[[0, 4], [1, 5], [2], [3], [6, 10], [7, 11], [8], [9]])

    def test_128_ranks_8_way_tensor_128_way_expert(self) -> None:
        topology = Topology(128, tensor=8, expert=128)
        assert topology.data == 16 and topology.expert_data == 1
        assert topology.groups("expert") == [list(range(128))]
        assert topology.groups("expert_lane") == topology.groups("lane") == [[*range(t, 128, 8)] for t in range(8)]

    def test_two_layers_over_the_same_ranks(self) -> None:
        early, late = Topology(16, tensor=2, expert=4), Topology(16, tensor=2, expert=8)
        assert early.groups("data", "tensor") == late.groups("data", "tensor")
        check(early, tensor=PAIRS, expert=FOURS)
        check(late, tensor=PAIRS, expert=EIGHTS, expert_data=EIGHT_APART)


def test_products() -> None:
    topology = Topology(16, tensor=2, pipeline=2, expert=2, expert_tensor=2)
    assert topology.groups("pipeline", "data", "tensor") == [list(range(16))]
    assert topology.groups("tensor", "data") == topology.groups("data", "tensor") == EIGHTS
    assert topology.groups("expert_data", "expert", "expert_tensor") == EIGHTS
    assert topology.groups("expert", "expert_tensor") == FOURS
    assert topology.groups("expert_data", "expert") == topology.groups("data")
    assert topology.groups("pipeline", "tensor") == [[0, 1, 8, 9], [2, 3, 10, 11], [4, 5, 12, 13], [6, 7, 14, 15]]
    assert topology.groups("pipeline", "expert") == [[0, 2, 8, 10], [4, 6, 12, 14], [1, 3, 9, 11], [5, 7, 13, 15]]
    assert topology.groups("pipeline", "expert_lane") == topology.groups("pipeline", "expert")


def test_coords() -> None:
    assert Topology(16, tensor=2, pipeline=2, expert=4).coords(13) == {
        "pipeline": 1,
        "data": 2,
        "tensor": 1,
        "expert_data": 1,
        "expert": 1,
        "expert_tensor": 0,
        "lane": 2,
        "expert_lane": 0,
    }


# ---- properties over many sizes ------------------------------------------------------------------------------------


def some_topologies() -> list[Topology]:
    draw = random.Random(20)

    def divisor(number: int) -> int:
        return draw.choice([d for d in range(1, number + 1) if number % d == 0])

    chosen = []
    for _ in range(250):
        world = draw.choice([1, 2, 4, 6, 8, 12, 16, 18, 20, 24, 30, 32, 36, 48, 64])
        pipeline = divisor(world)
        sliced = divisor(world // pipeline)
        chosen.append(
            Topology(
                world,
                pipeline=pipeline,
                tensor=divisor(world // pipeline),
                expert_tensor=sliced,
                expert=divisor(world // pipeline // sliced),
                inner=draw.choice(["expert", "expert_data"]),
            )
        )
    return chosen


TOPOLOGIES = some_topologies()
GRIDS = (("pipeline", "data", "tensor"), ("pipeline", "expert_data", "expert", "expert_tensor"))
PRODUCTS = sorted({axes for grid in GRIDS for n in range(1, 5) for axes in itertools.combinations(grid, n)})


def test_the_sample_has_every_kind() -> None:
    assert len(set(TOPOLOGIES)) > 150
    assert {t.inner for t in TOPOLOGIES} == {"expert", "expert_data"}
    assert any(1 < t.expert < t.tensor for t in TOPOLOGIES)
    assert any(1 < t.tensor < t.expert for t in TOPOLOGIES)
    assert any(t.pipeline > 1 and t.tensor > 1 and t.expert > 1 and t.expert_data > 1 for t in TOPOLOGIES)
    assert any(1 < t.expert_tensor < t.tensor for t in TOPOLOGIES)


def test_coords_are_unique_and_within_both_grids() -> None:
    for topology in TOPOLOGIES:
        coords = [topology.coords(rank) for rank in range(topology.world_size)]
        assert all(list(c) == list(AXES) for c in coords)
        for grid in GRIDS:
            sizes = [getattr(topology, axis) for axis in grid]
            assert {tuple(c[axis] for axis in grid) for c in coords} == set(itertools.product(*map(range, sizes)))


def test_a_group_is_the_ranks_that_agree_in_all_other_coordinates() -> None:
    for topology in TOPOLOGIES:
        coords = [topology.coords(rank) for rank in range(topology.world_size)]
        for axes in PRODUCTS:
            grid = GRIDS[not set(axes) <= set(GRIDS[0])]
            expected = defaultdict(list)
            for rank, c in enumerate(coords):
                expected[tuple(c[axis] for axis in grid if axis not in axes)].append(rank)
            groups = topology.groups(*axes)
            assert sorted(groups) == sorted(expected.values()), (topology, axes)
            assert {len(group) for group in groups} == {int(np.prod([getattr(topology, axis) for axis in axes]))}
            assert topology.groups(*reversed(axes)) == groups


def test_groups_partition_the_ranks_and_group_of_agrees() -> None:
    for topology in TOPOLOGIES:
        for axes in (*PRODUCTS, ("lane",), ("lane", "tensor"), ("expert_lane",), ("pipeline", "expert_lane")):
            groups = topology.groups(*axes)
            assert sorted(rank for group in groups for rank in group) == list(range(topology.world_size))
            for group in groups:
                assert (
                    group == sorted(group) == topology.group_of(group[0], *axes) == topology.group_of(group[-1], *axes)
                )
                if len(axes) == 1:
                    assert [topology.coords(rank)[axes[0]] for rank in group] == list(range(len(group)))


def test_groups_come_by_stage_then_slice_then_lowest_rank() -> None:
    for topology in TOPOLOGIES:
        for axes in PRODUCTS:
            first = [group[0] for group in topology.groups(*axes)]
            if set(axes) <= set(GRIDS[0]):
                assert first == sorted(first), (topology, axes)
            else:
                c = {rank: topology.coords(rank) for rank in first}
                assert first == sorted(first, key=lambda rank: (c[rank]["pipeline"], c[rank]["expert_tensor"], rank))


def test_an_expert_lane_is_an_expert_group_on_one_lane() -> None:
    for topology in TOPOLOGIES:
        for rank in range(topology.world_size):
            expected = set(topology.group_of(rank, "expert")) & set(topology.group_of(rank, "lane"))
            assert topology.group_of(rank, "expert_lane") == sorted(expected)
        if topology.expert_tensor == 1 and topology.inner == "expert" and topology.expert % topology.tensor == 0:
            lanes = topology.groups("expert_lane")
            assert {len(lane) for lane in lanes} == {topology.expert // topology.tensor}
            assert len(lanes) == topology.world_size * topology.tensor // topology.expert


# ---- arguments -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (
            {"expert": 3},
            "Topology: expert=3 does not divide 16 = world_size 16 / (pipeline 1 * expert_tensor 1); "
            "valid: 1, 2, 4, 8, 16",
        ),
        (
            {"expert": 8, "pipeline": 2, "expert_tensor": 2},
            "Topology: expert=8 does not divide 4 = world_size 16 / (pipeline 2 * expert_tensor 2); valid: 1, 2, 4",
        ),
        ({"expert": 0}, "Topology: expert=0 does not divide 16 = world_size 16 / (pipeline 1 * expert_tensor 1)"),
        ({"tensor": 3}, "Topology: tensor=3 does not divide 16 = world_size 16 / pipeline 1; valid: 1, 2, 4, 8, 16"),
        (
            {"tensor": 16, "pipeline": 2},
            "Topology: tensor=16 does not divide 8 = world_size 16 / pipeline 2; valid: 1, 2, 4, 8",
        ),
        ({"pipeline": 32}, "Topology: pipeline=32 does not divide world_size 16; valid: 1, 2, 4, 8, 16"),
        (
            {"expert_tensor": 5},
            "Topology: expert_tensor=5 does not divide 16 = world_size 16 / pipeline 1; valid: 1, 2",
        ),
        ({"inner": "data"}, "Topology: inner is 'data', expected 'expert' or 'expert_data'"),
        ({"world_size": 0}, "Topology: world_size is 0, expected at least 1"),
    ],
)
def test_sizes_that_do_not_fit(sizes: dict, message: str) -> None:
    with pytest.raises(ValueError) as raised:
        Topology(**{"world_size": 16, **sizes})
    assert message in str(raised.value)


@pytest.mark.parametrize("name", ["world_size", "tensor", "pipeline", "expert", "expert_tensor"])
@pytest.mark.parametrize("value", [2.0, "2", None, True, np.True_, np.float32(2)])
def test_sizes_that_are_no_integers(name: str, value: object) -> None:
    with pytest.raises(TypeError, match=f"Topology: {name} is .*, expected an integer"):
        Topology(**{"world_size": 16, name: value})


def test_sizes_other_than_the_world_go_by_name() -> None:
    with pytest.raises(TypeError):
        Topology(16, 2)  # type: ignore[misc]


@pytest.mark.parametrize(
    "axes",
    [
        (),
        ("data", "data"),
        ("data", "lane"),
        ("data", "expert"),
        ("tensor", "expert"),
        ("tensor", "expert_tensor"),
        ("lane", "expert"),
        ("expert", "expert_lane"),
        ("expert_lane", "tensor"),
        ("expert_lane", "expert_data"),
        ("pipeline", "data", "expert_data"),
    ],
)
def test_axes_that_do_not_go_together(axes: tuple[str, ...]) -> None:
    for call in (Topology(16).groups, lambda *axes: Topology(16).group_of(0, *axes)):
        with pytest.raises(ValueError, match="expected different ones that go together: pipeline, data"):
            call(*axes)


def test_unknown_axis() -> None:
    with pytest.raises(ValueError, match=r"Topology.groups: 'experts' is no axis, expected some of pipeline, data"):
        Topology(16).groups("experts")


def test_rank_outside_the_world() -> None:
    topology = Topology(16)
    for rank in (-1, 16):
        with pytest.raises(ValueError, match=rf"Topology.coords: rank is {rank}, expected 0 .. 15"):
            topology.coords(rank)
        with pytest.raises(ValueError, match=rf"Topology.group_of: rank is {rank}, expected 0 .. 15"):
            topology.group_of(rank, "expert")
    with pytest.raises(TypeError, match=r"Topology.coords: rank is 1.0, expected an integer"):
        topology.coords(1.0)  # type: ignore[arg-type]


# ---- a value -------------------------------------------------------------------------------------------------------


def test_equal_sizes_are_one_value() -> None:
    topology = Topology(16, tensor=2, expert=4)
    same = Topology(np.int64(16), expert=np.int32(4), tensor=2)
    assert topology == same and hash(topology) == hash(same) and repr(topology) == repr(same)
    assert type(same.world_size) is type(same.expert) is int
    assert topology == pickle.loads(pickle.dumps(topology)) == copy.deepcopy(topology)
    assert len({topology, same, Topology(16, tensor=2, expert=4, inner="expert_data"), Topology(16, tensor=2)}) == 3
    assert eval(repr(topology), {"Topology": Topology}) == topology


def test_immutable() -> None:
    topology = Topology(16, tensor=2)
    with pytest.raises(dataclasses.FrozenInstanceError):
        topology.tensor = 4  # type: ignore[misc]
    topology.groups("tensor")[0].append(99)
    assert topology.groups("tensor") == PAIRS
    with pytest.raises(ValueError, match="tensor=3 does not divide"):
        dataclasses.replace(topology, tensor=3)


# ---- JSON ----------------------------------------------------------------------------------------------------------


def test_json_text() -> None:
    text = Topology(4, tensor=2, expert=2, inner="expert_data").to_json()
    assert text.splitlines() == [
        "{",
        '  "world_size": 4,',
        '  "tensor": 2,',
        '  "pipeline": 1,',
        '  "expert": 2,',
        '  "expert_tensor": 1,',
        '  "inner": "expert_data",',
        '  "groups": {',
        '    "pipeline": [[0], [1], [2], [3]],',
        '    "data": [[0, 2], [1, 3]],',
        '    "tensor": [[0, 1], [2, 3]],',
        '    "expert_data": [[0, 1], [2, 3]],',
        '    "expert": [[0, 2], [1, 3]],',
        '    "expert_tensor": [[0], [1], [2], [3]],',
        '    "lane": [[0, 2], [1, 3]],',
        '    "expert_lane": [[0, 2], [1, 3]]',
        "  }",
        "}",
    ]


def test_json_round_trip() -> None:
    for topology in TOPOLOGIES:
        text = topology.to_json()
        assert Topology.from_json(text) == topology
        assert json.loads(text)["groups"] == {axis: topology.groups(axis) for axis in AXES}
        assert Topology.from_json(json.dumps(json.loads(text), indent=4)) == topology


@pytest.mark.parametrize("axis", AXES)
def test_json_with_a_changed_table(axis: str) -> None:
    read = json.loads(Topology(16, tensor=2, expert=4, pipeline=2, expert_tensor=2).to_json())
    read["groups"][axis][0], read["groups"][axis][1] = read["groups"][axis][1], read["groups"][axis][0]
    with pytest.raises(ValueError, match=rf"Topology.from_json: the groups along {axis} are not those of Topology\("):
        Topology.from_json(json.dumps(read))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"expert": 8}, "the groups along expert_data are not those of"),
        ({"expert": 3}, "expert=3 does not divide"),
        ({"expert": 2.0}, "expert is 2.0, expected an integer"),
        ({"tensor": True}, "tensor is True, expected an integer"),
        ({"inner": ["expert"]}, "inner is"),
        ({"groups": {}}, "groups has"),
        ({"groups": [[0]]}, "groups has a list"),
        ({"context": 1}, "the text has"),
    ],
)
def test_json_of_something_else(change: dict, message: str) -> None:
    read = json.loads(Topology(16, tensor=2, expert=4).to_json()) | change
    with pytest.raises(ValueError, match=r"Topology.from_json: ") as raised:
        Topology.from_json(json.dumps(read))
    assert message in str(raised.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "null", '{"world_size": 4}'])
def test_text_of_something_else(text: str) -> None:
    with pytest.raises(ValueError, match=r"Topology.from_json: "):
        Topology.from_json(text)
