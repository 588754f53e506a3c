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
from moecomm.arrays import Counts
from moecomm.traffic import Lanes, Sent, flat, hierarchical
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
    groups = Topology(8, expert=expert).groups("expert")

    def rows_for(rank: int, group: Counts) -> np.ndarray:
        return (3.0 * rank + np.arange(len(group))) % 4  # some pairs have nothing

    def body(comm: Comm) -> None:
        timed = Timed(comm)
        group = np.array(groups[comm.rank // expert])
        part = timed.split(comm.rank // expert)
        in_part = Nodes([np.flatnonzero(nodes.node_of[group] == node) for node in np.unique(nodes.node_of[group])])
        rows = rows_for(comm.rank, group).astype(np.int64)
        for algorithm, count in ((FlatAllToAll(part), flat), (HierarchicalAllToAll(part, in_part), hierarchical)):
            timed.clear()
            algorithm.rows(np.zeros((rows.sum(), 5), np.uint8), rows)
            sent = count(nodes, groups, rows_for)
            messages, sizes = recorded(timed, nodes, "all_to_allv")
            assert sent.messages[comm.rank].tolist() == messages
            assert (sent.rows[comm.rank] * 5).tolist() == sizes

    threads.run(8, body)


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
    inner = flat(nodes, topology.groups("expert_lane"), lambda rank, group: T * lanes.shares(rank, group))
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
        assert messages == (2 * inner.messages[comm.rank]).tolist()  # expert ids, rows
        np.testing.assert_allclose(sizes, inner.rows[comm.rank] * (8 + H * 4))
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
    sent = Sent(Nodes.of_size(2, 4))
    sent.add([1], np.arange(4), np.array([[1.0, 9.0, 0.0, 0.5]]))
    assert sent.messages[1].tolist() == [1, 1]
    assert sent.rows[1].tolist() == [1.0, 0.5]


def test_the_paper_counts_22_messages_instead_of_127() -> None:
    nodes, everyone = Nodes.of_size(8, 128), [range(128)]
    for count, messages in ((flat, [7, 120]), (hierarchical, [7, 15])):
        sent = count(nodes, everyone, lambda _, group: np.ones(len(group)))
        assert (sent.messages == messages).all()
