"""What is counted is what Timed counts when the exchange runs."""

from __future__ import annotations

import numpy as np
import pytest

from moecomm import (
    Comm,
    FlatAllToAll,
    HierarchicalAllToAll,
    Nodes,
    RoutedExchange,
    Routing,
    TensorParallelExchange,
    Topology,
    build_groups,
)
from moecomm.traffic import Lanes, directly, flat, hierarchical, hop_traffic
from moecomm.transports import threads
from moecomm.transports.wrappers import Timed


def recorded(timed: Timed, nodes: Nodes, kind: str) -> tuple[list[int], list[int]]:
    """Messages and bytes that one rank sent, inside its node and between nodes."""
    inside, record = nodes.same_node(timed.rank), timed.record.get(kind)
    if record is None:
        return [0, 0], [0, 0]
    messages, sizes = record.messages, record.bytes
    return [int(messages[inside].sum()), int(messages[~inside].sum())], [
        int(sizes[inside].sum()),
        int(sizes[~inside].sum()),
    ]


PLACEMENTS = [
    Nodes.of_size(2, 8),
    Nodes.of_size(3, 8),
    Nodes([[0, 3, 5], [1, 2], [4, 6, 7]]),
    Nodes([[0, 2, 4, 6], [1, 3, 5, 7]]),
]


@pytest.mark.parametrize("expert", [8, 4])
@pytest.mark.parametrize("nodes", PLACEMENTS, ids=repr)
def test_both_algorithms_send_what_is_counted(nodes: Nodes, expert: int) -> None:
    """Ranks have different numbers of rows, each the same for all ranks of its group."""
    groups = Topology(8, expert=expert).groups("expert")
    labels = np.arange(8) // expert
    rows = 1 + np.arange(8) % 3

    def body(comm: Comm) -> None:
        timed = Timed(comm)
        group = np.array(groups[comm.rank // expert])
        part = timed.split(comm.rank // expert)
        in_part = Nodes([np.flatnonzero(nodes.node_of[group] == node) for node in np.unique(nodes.node_of[group])])
        counts = np.full(expert, rows[comm.rank])
        for algorithm, count in ((FlatAllToAll(part), flat), (HierarchicalAllToAll(part, in_part), hierarchical)):
            timed.clear()
            algorithm.rows(np.zeros((counts.sum(), 5), np.uint8), counts)
            sent = count(nodes, labels, rows)
            messages, sizes = recorded(timed, nodes, "all_to_allv")
            assert sent.messages[comm.rank].tolist() == messages
            assert (sent.rows[comm.rank] * 5).tolist() == sizes

    threads.run(8, body)


@pytest.mark.parametrize("nodes", [*PLACEMENTS, Nodes.of_size(1, 8), Nodes.of_size(8, 8)], ids=repr)
@pytest.mark.parametrize("labels", [[0] * 8, [0, 1] * 4, [0, 0, 0, 1, 1, 2, 0, 2], list(range(8))], ids=str)
def test_groups_send_what_is_counted_pair_by_pair(nodes: Nodes, labels: list[int]) -> None:
    """Groups of any sizes: the two hops are those of `hop_traffic`, with the group's own nodes."""
    groups, rows = np.array(labels), np.arange(1.0, 9)
    pairs = np.equal.outer(groups, groups) * rows[:, None]
    wanted = directly(nodes, pairs)
    found = flat(nodes, groups, rows)
    assert (found.messages == wanted.messages).all() and np.allclose(found.rows, wanted.rows)
    messages, sizes = np.zeros((8, 2)), np.zeros((8, 2))
    for label in set(labels):
        ranks = np.flatnonzero(groups == label)
        members = nodes.node_of[ranks]
        in_group = Nodes([np.flatnonzero(members == node).tolist() for node in np.unique(members)])
        for hop in hop_traffic(in_group, pairs[np.ix_(ranks, ranks)]):
            sent = directly(in_group, hop)
            messages[ranks] += sent.messages
            sizes[ranks] += sent.rows
    hops = hierarchical(nodes, groups, rows)
    assert (hops.messages == messages).all() and np.allclose(hops.rows, sizes)


TOPOLOGIES = [
    Topology(p, tensor=tensor, pipeline=pipeline, expert=expert, expert_tensor=expert_tensor, inner=inner)
    for p in (1, 6, 8, 12, 16, 18)
    for pipeline in (1, 2)
    for tensor in range(1, p + 1)
    for expert_tensor in (1, 2, 3)
    for expert in range(1, p + 1)
    for inner in ("expert", "expert_data")
    if p % (pipeline * tensor) == 0 and p % (pipeline * expert * expert_tensor) == 0
]


@pytest.mark.parametrize("p", sorted({topology.world_size for topology in TOPOLOGIES}))
def test_lanes_are_those_of_the_rank_lists(p: int) -> None:
    """Every topology of p ranks: who reaches what, counted in the lists of `groups`, tensor group by tensor group."""
    for topology in [topology for topology in TOPOLOGIES if topology.world_size == p]:
        lanes = Lanes(topology)
        lane_of = {rank: group for group in topology.groups("expert_lane") for rank in group}
        shard = {}
        for group in topology.groups("expert", "expert_tensor"):
            shard.update({rank: i for i, rank in enumerate(group)})
        num_shards = topology.expert * topology.expert_tensor
        lacking, shares = [], np.zeros(p)
        for group in topology.groups("tensor"):
            reached = [shard[peer] for rank in group for peer in lane_of[rank]]
            if set(reached) != set(range(num_shards)):
                lacking.append(group)
                continue
            for rank in group:
                of_peers = {1 / (topology.expert * reached.count(shard[peer])) for peer in lane_of[rank]}
                assert len(of_peers) == 1, topology
                shares[rank] = of_peers.pop()
        assert lanes.incomplete() == (lacking[0] if lacking else []), topology
        for group in topology.groups("expert"):
            assert len(set(lanes.expert_groups()[group])) == 1, topology
        if lacking:
            with pytest.raises(ValueError, match="does not reach all experts"):
                lanes.members()
            continue
        assert sorted(lanes.members().tolist()) == sorted(topology.groups("expert_lane")), topology
        assert all(len(set(lanes.lanes()[group])) == 1 for group in lane_of.values()), topology
        assert np.allclose(lanes.shares, shares), topology


def test_a_large_world_takes_as_many_steps_as_it_has_ranks() -> None:
    """Pairs of tensor groups and experts would be 2^29: the test would not come to its end."""
    lanes = Lanes(Topology(65536, tensor=8, expert=65536))
    assert lanes.incomplete() == [] and lanes.members().shape == (8, 8192)
    assert (lanes.shares == 1 / 65536).all()
    assert Lanes(Topology(65536, tensor=2, expert_tensor=32768)).incomplete() == [0, 1]
    nodes = Nodes.of_size(8, 65536)
    assert (hierarchical(nodes, lanes.expert_groups(), np.ones(65536)).messages == [7, 8191]).all()


@pytest.mark.parametrize("nodes", PLACEMENTS, ids=repr)
@pytest.mark.parametrize(
    "topology",
    [
        Topology(8, tensor=2, expert=8),
        Topology(8, tensor=4, expert=8),
        Topology(8, tensor=2, expert=4),
        Topology(8, tensor=4, expert=2),
        Topology(8, tensor=2),
        Topology(8, tensor=2, expert=2, inner="expert_data"),
        Topology(8, tensor=2, expert=2, expert_tensor=2),
        Topology(8, tensor=4, expert=2, expert_tensor=2),
        Topology(8, tensor=2, expert=4, pipeline=2),
    ],
    ids=str,
)
def test_a_tensor_parallel_exchange_sends_what_is_counted(topology: Topology, nodes: Nodes) -> None:
    """Top-1, one expert a rank, every replica of every expert asked equally often."""
    replicas = topology.tensor  # as many at most
    expert = (np.arange(replicas * topology.expert * 4) // replicas % topology.expert)[:, None]
    lanes, T, H = Lanes(topology), len(expert), 3  # noqa: N806
    inner = flat(nodes, lanes.lanes(), T * lanes.shares)
    way, shared = lanes.sharing(nodes, T, 1)

    def body(comm: Comm) -> None:
        timed = Timed(comm)
        groups = build_groups(timed, topology, nodes=Nodes.of_size(8, 8))
        place = [[topology.coords(rank)["expert"]] for rank in topology.group_of(comm.rank, "expert_lane")]
        exchange = TensorParallelExchange(
            RoutedExchange(FlatAllToAll(groups.expert_lane), place),
            groups.tensor,
            part=(topology.coords(comm.rank)["expert_tensor"], topology.expert_tensor),
        )
        timed.clear()
        rows, plan = exchange.dispatch(np.ones((T, H), np.float32), Routing(expert, np.ones((T, 1), np.float32)))
        messages, sizes = recorded(timed, nodes, "all_to_allv")
        assert messages == inner.messages[comm.rank].tolist()
        np.testing.assert_allclose(sizes, inner.rows[comm.rank] * H * 4)
        exchange.combine(rows, plan)
        messages, sizes = recorded(timed, nodes, "all_gather")
        assert way == "all-gather"
        assert messages == shared.messages[comm.rank].tolist()
        np.testing.assert_allclose(sizes, shared.rows[comm.rank] * H * 4)

    threads.run(8, body)


def test_lanes_refuses_what_the_exchange_refuses() -> None:
    topology = Topology(6, tensor=2, expert=3)
    assert Lanes(topology).incomplete() == [2, 3]
    assert Lanes(Topology(8, tensor=2, expert_tensor=4)).incomplete() == [0, 1]
    assert Lanes(Topology(8, tensor=2, expert=4)).incomplete() == []

    def body(comm: Comm) -> str:
        groups = build_groups(comm, topology)
        place = [[topology.coords(rank)["expert"]] for rank in topology.group_of(comm.rank, "expert_lane")]
        try:
            TensorParallelExchange(RoutedExchange(FlatAllToAll(groups.expert_lane), place), groups.tensor)
        except ValueError as error:
            return str(error)
        return ""

    assert [bool(problem) for problem in threads.run(6, body)] == [False, False, True, True, False, False]


def test_what_stays_is_not_sent() -> None:
    sent = directly(Nodes.of_size(2, 4), np.array([[0.0] * 4, [1.0, 9.0, 0.0, 0.5], [0.0] * 4, [0.0] * 4]))
    assert sent.messages[1].tolist() == [1, 1]
    assert sent.rows[1].tolist() == [1.0, 0.5]


def test_the_paper_counts_22_messages_instead_of_127() -> None:
    nodes = Nodes.of_size(8, 128)
    for count, messages in ((flat, [7, 120]), (hierarchical, [7, 15])):
        assert (count(nodes, np.zeros(128, np.int64), np.ones(128)).messages == messages).all()
