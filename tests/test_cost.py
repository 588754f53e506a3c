"""The cost model: counts against what is counted rank by rank, seconds against sums worked out by hand."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, fields, replace
from itertools import pairwise

import numpy as np
import pytest

from moecomm import Comm, Nodes, Topology
from moecomm.cost import (
    GPU_NODES,
    Cost,
    Link,
    Links,
    Tokens,
    measure,
    model,
    predict,
    predict_groups,
    predict_lanes,
    predict_relayed,
)
from moecomm.traffic import flat, hierarchical
from moecomm.transports import threads

FREE = Link(latency=0, wait=0, message=0, bandwidth=1e30)
NOTHING = Links(
    FREE, FREE, node_bandwidth=1e30, copy_bandwidth=1e30, start=0, wake=0, cores_per_node=1, combine_below=0
)
ALL = [(1, 1), (2, 1), (8, 8), (16, 4), (10, 4), (13, 5), (64, 16), (9, 1), (12, 7)]
SPLITS = [[[0, 3], [1, 2, 4], [5]], [[0, 1, 2], [3, 4, 5, 6, 7], [8, 9]]]


def seconds(links: Links, p: int, ranks_per_node: int, block: float) -> dict[str, float]:
    return {name: cost.seconds for name, cost in predict(links, (p, ranks_per_node), block).items()}


# ---- what is sent --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nodes", [*(Nodes.of_size(size, p) for p, size in ALL), *map(Nodes, SPLITS)], ids=repr)
def test_messages_and_bytes_are_those_that_are_counted_rank_by_rank(nodes: Nodes) -> None:
    everybody = np.zeros(nodes.world_size, np.int64)
    rows = np.full(nodes.world_size, 24.0)
    costs = predict(NOTHING, nodes, 24)
    for name, count in (("flat", flat), ("hierarchical", hierarchical)):
        sent = count(nodes, everybody, rows)
        assert costs[name].messages == tuple(sent.messages.max(axis=0)), name
        assert costs[name].bytes == pytest.approx(sent.rows.max(axis=0)), name


@pytest.mark.parametrize(("p", "size"), [case for case in ALL if case[0] % case[1] == 0])
def test_bruck_counted_message_by_message(p: int, size: int) -> None:
    """Block d of a rank goes on in each round whose bit d has; the node's totals are what the prices are taken of."""
    messages, moved = np.zeros(2), np.zeros(2)
    for bit in range((p - 1).bit_length()):
        blocks = sum(d >> bit & 1 for d in range(p))
        for rank in range(size):
            leaves = int((rank + 2**bit) % p >= size)
            messages[leaves] += 1
            moved[leaves] += blocks * 24
    (step,) = model._bruck(NOTHING, Nodes.of_size(size, p).sizes(), size, 24)
    assert step.node[model.MESSAGES] == pytest.approx(messages)
    assert step.node[model.BYTES] == pytest.approx(moved)


def test_the_library_combines_small_blocks() -> None:
    links = replace(GPU_NODES, combine_below=257)
    for p, block, combines in ((64, 256, True), (64, 257, False), (7, 16, False), (8, 16, True)):
        costs = predict(links, (p, 1), block)
        assert (costs["library"].messages == (0, math.ceil(math.log2(p)))) == combines
        assert costs["flat"].messages == (0, p - 1)


def test_shared_sends_one_message_a_chunk_from_each_node() -> None:
    for block, chunks in ((0, 1), (1, 1), (8192, 1), (8193, 2), (65536, 8)):
        cost = predict(NOTHING, (64, 16), block)["shared"]  # a stream has 16 x 16 blocks, a chunk is 2 MiB
        assert cost.messages == (0, 3 * chunks)
        assert cost.bytes == (0, 16 * 48 * block)
    assert predict(NOTHING, (16, 16), 1000)["shared"].messages == (0, 0)


# ---- the paper's figures -------------------------------------------------------------------------------------------


def test_128_c1_and_c2_become_16_c1_and_c2() -> None:
    """DeepSpeed-MoE, section 5.3: 128 GPUs, 8 of them on the same tokens. C1 a message between nodes, C2 the volume."""
    c1, volume, bandwidth = 1e-3, 128.0, 50.0
    between = Link(latency=0, wait=0, message=c1, bandwidth=bandwidth)
    links = replace(NOTHING, inside=replace(FREE, bandwidth=bandwidth), between=between, cores_per_node=8)
    c2 = volume / bandwidth
    flat_cost = predict(links, (128, 8), volume / 128)["flat"]
    lanes = predict_lanes(links, (128, 8), 8, volume / 128, volume / 8)["flat"]
    assert flat_cost.messages[1] == 120 and lanes.messages == (7, 15)
    assert flat_cost.seconds == pytest.approx(120 * c1 + c2 * 127 / 128)
    assert lanes.seconds == pytest.approx(15 * c1 + c2 * (15 + 7 * 16) / 128)
    one_a_node = predict(links, (128, 1), volume / 128)["flat"]  # as the paper counts: all messages alike
    assert one_a_node.seconds == pytest.approx(127 * c1 + c2 * 127 / 128)


def test_lanes_over_nodes_of_any_size() -> None:
    links = replace(NOTHING, between=replace(FREE, message=1), inside=replace(FREE, message=1e-6), cores_per_node=100)
    assert predict_lanes(links, (64, 4), 8, 1, 0)["flat"].messages == (0, 7)
    assert predict_lanes(links, (64, 4), 8, 1, 1)["flat"].messages == (3, 7 + 4)  # a tensor group is on two nodes
    assert predict_lanes(links, (64, 16), 8, 1, 1)["flat"].messages == (1 + 7, 6)
    assert predict_lanes(links, (64, 16), 1, 1, 1)["flat"] == predict(links, (64, 16), 1)["flat"]


# ---- seconds -------------------------------------------------------------------------------------------------------


def test_what_ranks_do_on_the_same_core_adds_up() -> None:
    links = replace(NOTHING, between=replace(FREE, message=1))
    for cores, factor in ((0.5, 32), (1, 16), (4, 4), (16, 1), (64, 1)):
        found = seconds(replace(links, cores_per_node=cores), 64, 16, 1)
        assert found["flat"] == pytest.approx(48 * factor)
        assert found["hierarchical"] == pytest.approx(3 * factor)
        assert found["shared"] == pytest.approx(3 * max(1, 1 / cores))


def test_latency_and_waits() -> None:
    between = replace(FREE, latency=100, wait=1)
    links = replace(NOTHING, between=between, inside=replace(FREE, latency=10, wait=0.5), cores_per_node=16)
    assert seconds(links, 64, 16, 1)["flat"] == pytest.approx(101)
    assert seconds(links, 64, 16, 1)["hierarchical"] == pytest.approx(10.5 + 101)
    assert seconds(links, 16, 16, 1)["flat"] == pytest.approx(10.5)
    assert seconds(replace(links, combine_below=2), 64, 1, 1)["library"] == pytest.approx(6 * 101)


def test_what_fits_into_buffers_is_moved_with_the_message() -> None:
    links = replace(NOTHING, between=replace(FREE, bandwidth=10, buffered=100), cores_per_node=16)
    for block, beyond in ((0, 0), (100, 0), (101, 1), (400, 300)):
        assert seconds(links, 64, 16, block)["flat"] == pytest.approx(48 * beyond / 10)
    assert seconds(links, 64, 16, 100)["hierarchical"] == pytest.approx(3 * 1500 / 10)  # messages of 1,600 bytes


def test_the_network_of_a_node_is_shared_and_overlaps_the_work() -> None:
    links = replace(NOTHING, node_bandwidth=10, cores_per_node=16)
    for cost in predict(links, (64, 16), 5).values():
        assert cost.seconds == pytest.approx(16 * 48 * 5 / 10)
    both = replace(links, between=replace(FREE, message=8))  # 48 messages: work 384, network 384
    assert seconds(both, 64, 16, 5)["flat"] == pytest.approx(384 * math.sqrt(2))


def test_copies_starts_and_wake_ups() -> None:
    links = replace(NOTHING, copy_bandwidth=2, cores_per_node=16)
    assert seconds(links, 64, 16, 1)["hierarchical"] == pytest.approx((2 * 64 + 4 + 16) / 2)  # own blocks in each hop
    assert seconds(links, 64, 16, 1)["shared"] == pytest.approx(2 * 64 / 2)
    links = replace(NOTHING, start=3, wake=1)
    assert seconds(links, 64, 16, 1) == pytest.approx(
        {"flat": 48, "library": 48, "hierarchical": 96, "shared": 48 + 2 * 16}
    )


def test_groups_on_the_same_nodes_share_them() -> None:
    """Lanes of 8 on 16 nodes of 8: each node has a rank of all lanes, and they send at once."""
    node_of = np.arange(128) // 8
    links = replace(NOTHING, node_bandwidth=10)
    lane = predict_groups(links, node_of, np.arange(0, 128, 8)[None], 5)["flat"]
    assert lane.seconds == pytest.approx(8 * 15 * 5 / 10)
    half = predict_groups(links, node_of, np.arange(64)[None], 5)["flat"]  # these have their nodes for themselves
    assert half.seconds == pytest.approx(8 * 56 * 5 / 10)


@pytest.mark.parametrize(("p", "size", "group"), [(48, 6, 16), (60, 7, 15), (60, 7, 4), (20, 8, 5), (36, 8, 12)])
def test_of_several_groups_the_worst_counts(p: int, size: int, group: int) -> None:
    """Groups lie on nodes in different ways: each number is the most of any group, as counted rank by rank."""
    nodes, ranks = Nodes.of_size(size, p), np.arange(p)
    groups = ranks.reshape(-1, group)
    costs = predict_groups(GPU_NODES, nodes.node_of, groups, 24)
    alone = [predict_groups(GPU_NODES, nodes.node_of, members[None], 24) for members in groups]
    for name, count in (("flat", flat), ("hierarchical", hierarchical)):
        sent = count(nodes, ranks // group, np.full(p, 24.0))
        assert costs[name].messages == tuple(sent.messages.max(axis=0))
        assert costs[name].bytes == pytest.approx(sent.rows.max(axis=0))
    for name, cost in costs.items():
        slowest = max((one[name] for one in alone), key=lambda one: one.seconds)
        assert (cost.seconds, cost.parts) == (slowest.seconds, slowest.parts)
        assert cost.staging == max(one[name].staging for one in alone)


def test_48_ranks_send_14_messages_between_nodes() -> None:
    """16 ranks a group, 6 a node. Group 0 lies on 6 + 6 + 4, where 4 ranks have 12; group 1 on 2 + 6 + 6 + 2: 14."""
    groups = np.arange(48).reshape(3, 16)
    node_of = np.arange(48) // 6
    assert predict_groups(GPU_NODES, node_of, groups[:1], 1)["flat"].messages == (5, 12)
    assert predict_groups(GPU_NODES, node_of, groups, 1)["flat"].messages == (5, 14)


def test_hops_of_several_pieces_overlap() -> None:
    """Hops of 12 s and 18 s: the first and the last piece have a hop alone, between them the shorter hop is hidden."""
    inside, between = replace(FREE, bandwidth=1), replace(FREE, bandwidth=1)
    links = replace(NOTHING, inside=inside, between=between, cores_per_node=2)
    sequence = {chunks: predict(links, (8, 2), 3, chunks=chunks)["hierarchical"] for chunks in (1, 2, 4)}
    assert sequence[1].bytes == (12, 18)
    for chunks, cost in sequence.items():
        one, two = 12 / chunks, 18 / chunks
        assert cost.seconds == pytest.approx(one + two + (chunks - 1) * max(one, two))
        assert sum(cost.parts.values()) == pytest.approx(cost.seconds)
        assert cost.messages == (chunks, 3 * chunks) and cost.bytes == pytest.approx((12, 18))
        assert cost.staging == min(1, 2 / chunks) * 8 * 3
    # Copies and calls are work of the rank in either hop: they do not overlap.
    links = replace(NOTHING, copy_bandwidth=2, start=1)
    for chunks in (1, 4):
        cost = predict(links, (8, 1), 8, chunks=chunks)["flat"]
        assert cost == predict(links, (8, 1), 8)["flat"]
    copies = predict(replace(links, cores_per_node=2), (8, 2), 8, chunks=4)["hierarchical"].parts
    assert copies["copy"] == pytest.approx(
        predict(replace(links, cores_per_node=2), (8, 2), 8)["hierarchical"].parts["copy"]
    )
    assert copies["call"] == 1 + 4


def test_impossible_chunks() -> None:
    with pytest.raises(ValueError, match="chunks is 0, expected at least 1"):
        predict(GPU_NODES, (8, 2), 1, chunks=0)


@pytest.mark.parametrize(("p", "size", "E", "K"), [(16, 8, 256, 8), (128, 8, 256, 8), (12, 4, 24, 1), (8, 2, 8, 8)])
def test_a_token_crosses_once_for_each_node(p: int, size: int, E: int, K: int) -> None:  # noqa: N803
    """The sums of docs/exchanges.md: how many other nodes, and ranks beside its relays, a token needs on average."""

    def needed(experts: int) -> float:
        return 1 - math.comb(E - experts, K) / math.comb(E, K)

    node_of, group = np.arange(p) // size, np.arange(p)[None]
    cost = predict_relayed(GPU_NODES, node_of, group, Tokens(100, 2, K, E))
    assert cost.messages == (size - 1, p // size - 1)
    inside, between = (p - p // size) * needed(E // p), (p // size - 1) * needed(E * size // p)
    assert cost.bytes == pytest.approx((200 * inside, 200 * between))
    if K == 1:  # a row for each assignment
        assert cost.bytes[1] == pytest.approx(predict(GPU_NODES, (p, size), 200 / p)["flat"].bytes[1])
    pieces = predict_relayed(GPU_NODES, node_of, group, Tokens(100, 2, K, E), chunks=4)
    assert pieces.bytes == pytest.approx(cost.bytes)


def test_relays_of_nodes_of_different_sizes() -> None:
    """Random tokens, sent rank by rank as HierarchicalExchange says: the busiest rank, inside and between."""
    nodes, E, K, T = Nodes([range(5), range(5, 10), [10, 11]]), 24, 3, 4000  # noqa: N806
    random = np.random.default_rng(0)
    between, inside = np.zeros(12), np.zeros(12)
    for source in range(12):
        experts = random.random((T, E)).argsort(axis=1)[:, :K]
        needs = np.zeros((T, 12), bool)
        np.put_along_axis(needs, experts // (E // 12), True, axis=1)
        for node in map(list, nodes.ranks):
            relay = node[nodes.local_rank[source] % len(node)]
            between[source] += 0 if source in node else needs[:, node].any(axis=1).sum()
            inside[relay] += needs[:, [rank for rank in node if rank != relay]].sum()
    cost = predict_relayed(GPU_NODES, nodes.node_of, np.arange(12)[None], Tokens(T, 1, K, E))
    assert cost.messages == (4, 2)
    assert cost.bytes == pytest.approx((inside.max(), between.max()), rel=0.02)


def test_pieces_hide_the_shorter_hop() -> None:
    links = replace(NOTHING, inside=replace(FREE, bandwidth=1), between=replace(FREE, bandwidth=1), cores_per_node=4)
    node_of, group = np.arange(8) // 4, np.arange(8)[None]
    whole = predict_relayed(links, node_of, group, Tokens(64, 1, 4, 16))
    pieces = predict_relayed(links, node_of, group, Tokens(64, 1, 4, 16), chunks=4)
    one, two = sorted(whole.bytes)
    assert whole.seconds == pytest.approx(one + two)
    assert pieces.seconds == pytest.approx((one + two) / 4 + 3 * two / 4)


def test_experts_that_ranks_cannot_share() -> None:
    with pytest.raises(ValueError, match="predict_relayed: 9 experts, which groups of 8 ranks cannot share"):
        predict_relayed(GPU_NODES, np.arange(8) // 4, np.arange(8)[None], Tokens(64, 1, 4, 9))


@pytest.mark.parametrize(
    "nodes", [(1, 1), (64, 16), (10, 4), (4096, 8), (65536, 8), (65535, 7), (65536, 1), (65536, 65536)]
)
def test_parts_sum_to_the_seconds(nodes: tuple[int, int]) -> None:
    for block in (0, 1, 1e3, 1e6):
        for links in (GPU_NODES, replace(GPU_NODES, cores_per_node=0.5, combine_below=math.inf)):
            for name, cost in predict(links, nodes, block).items():
                assert sum(cost.parts.values()) == pytest.approx(cost.seconds), name
                assert min(cost.parts.values()) >= 0 and math.isfinite(cost.seconds), name


def test_more_bytes_and_slower_links_never_take_less() -> None:
    for p, size in ALL:
        at = [seconds(GPU_NODES, p, size, block) for block in (0, 1, 100, 1e4, 1e6, 1e8)]
        for less, more in pairwise(at):
            assert all(less[name] <= more[name] * (1 + 1e-12) for name in less), (p, size)


def test_65536_ranks_are_no_more_work_than_their_number() -> None:
    """2^32 pairs would take minutes and 34 GB: the test would not come to its end."""
    for links in (GPU_NODES, replace(GPU_NODES, combine_below=math.inf)):
        for size in (1, 8, 65536):
            costs = predict(links, (65536, size), 1000)
            assert costs["flat"].messages == (size - 1, 65536 - size)
    assert predict_lanes(GPU_NODES, (65536, 8), 8, 1000, 8000)["hierarchical"].messages == (7, 8191)


def test_staging() -> None:
    costs = predict(GPU_NODES, (64, 16), 1000)
    assert costs["flat"].staging == 0
    assert costs["hierarchical"].staging == 64_000
    assert costs["shared"].staging == 4 * 7 * 2**21 / 16
    assert predict(GPU_NODES, (16, 16), 1000)["hierarchical"].staging == 0


def test_one_call_after_the_other() -> None:
    one, two = predict(GPU_NODES, (64, 16), 1000)["hierarchical"], predict(GPU_NODES, (64, 16), 10)["flat"]
    both = one.then(two)
    assert both.messages == (15 + 15, 3 + 48)
    assert both.seconds == pytest.approx(one.seconds + two.seconds) == pytest.approx(sum(both.parts.values()))
    assert both.staging == one.staging


# ---- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nodes", [(0, 1), (8, 0)])
def test_impossible_nodes(nodes: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"nodes is \(., .\), expected at least 1 rank, and 1 a node"):
        predict(GPU_NODES, nodes, 1)


def test_too_many_ranks() -> None:
    with pytest.raises(ValueError, match="predict_groups: node_of has 65537 ranks, expected at most 65536"):
        predict(GPU_NODES, (65537, 8), 1)


@pytest.mark.parametrize("block", [-1, math.nan, math.inf])
def test_impossible_bytes(block: float) -> None:
    with pytest.raises(ValueError, match=r"predict_groups: bytes_per_pair is .*, expected a number >= 0"):
        predict(GPU_NODES, (8, 2), block)


@pytest.mark.parametrize("tensor", [0, -2, 3])
def test_impossible_lanes(tensor: int) -> None:
    with pytest.raises(ValueError, match=r"predict_lanes: tensor is -?\d, expected a divisor of the 8 ranks"):
        predict_lanes(GPU_NODES, (8, 2), tensor, 1, 1)


def test_impossible_links() -> None:
    for field in fields(Links)[2:]:
        with pytest.raises(ValueError, match=f"Links: {field.name} is -1, expected a number"):
            replace(GPU_NODES, **{field.name: -1})
    for name in ("node_bandwidth", "copy_bandwidth", "cores_per_node"):
        with pytest.raises(ValueError, match=f"Links: {name} is 0, expected a number > 0"):
            replace(GPU_NODES, **{name: 0})
    with pytest.raises(ValueError, match=r"Links: between.bandwidth is 0, expected a number > 0"):
        replace(GPU_NODES, between=replace(FREE, bandwidth=0))
    with pytest.raises(ValueError, match=r"Links: inside.latency is 'fast', expected a number >= 0"):
        replace(GPU_NODES, inside=replace(FREE, latency="fast"))  # type: ignore[arg-type]


# ---- JSON ----------------------------------------------------------------------------------------------------------


def test_json_keeps_every_bit() -> None:
    links = replace(GPU_NODES, start=0.1 + 0.2, combine_below=513)
    assert Links.from_json(links.to_json()) == links


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"start": "slow"}, "Links: start is 'slow'"),
        ({"more": 1}, "the text has"),
        ({"inside": {"latency": 1}}, "inside has"),
        ({"inside": 3}, "inside has a int"),
    ],
)
def test_other_json_is_refused(change: dict[str, object], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        Links.from_json(json.dumps({**asdict(GPU_NODES), **change}))


def test_text_that_is_no_json_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Links.from_json: not JSON"):
        Links.from_json("[")


# ---- measured ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nodes", [[[0, 1], [2, 3]], [[0, 1, 2, 3]], [[0], [1], [2], [3]], [[0, 2, 3], [1]]], ids=str)
def test_measured_links_are_the_same_on_every_rank(nodes: list[list[int]]) -> None:
    found = threads.run(4, lambda comm: measure(comm, Nodes(nodes)))
    assert len(set(found)) == 1
    assert Links.from_json(found[0].to_json()) == found[0]
    if len(nodes) in (1, 4):
        assert found[0].inside == found[0].between
    assert all(cost.seconds > 0 for cost in predict(found[0], Nodes(nodes), 100).values())


def test_measure_refuses_other_nodes() -> None:
    def body(comm: Comm) -> list[str]:
        errors = []
        for nodes in (Nodes.of_size(comm.rank + 1, 2), Nodes.of_size(2, 4)):
            with pytest.raises(ValueError, match="measure") as error:
                measure(comm, nodes)
            errors.append(str(error.value))
        return errors

    for differ, too_many in threads.run(2, body):
        assert "measure: nodes of rank 1 is not that of rank 0" in differ
        assert "measure: nodes has 4 ranks, expected 2" in too_many


def test_the_exchange_of_a_topology() -> None:
    """predict_lanes is predict_groups on the expert_lane of a topology whose experts are on all ranks."""
    topology = Topology(64, tensor=4, expert=64)
    node_of = Nodes.of_size(8, 64).node_of
    one_way: dict[str, Cost] = predict_groups(GPU_NODES, node_of, np.array(topology.groups("expert_lane")), 10)
    gather = predict_groups(GPU_NODES, node_of, np.array(topology.groups("tensor")), 1000)["flat"]
    both = predict_lanes(GPU_NODES, (64, 8), 4, 10, 1000)
    assert both == {name: cost.then(gather) for name, cost in one_way.items()}
