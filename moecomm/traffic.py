"""What each rank sends in an exchange, counted from the rank lists: plain arithmetic, nothing is moved."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moecomm.arrays import Counts
from moecomm.nodes import Nodes
from moecomm.topology import Topology

Rows = NDArray[Any]
"""Numbers of rows: whole ones, or what there is on average."""
RowsFor = Callable[[int, Counts], Rows]
"""A rank and the group it sends to -> [size of the group] the rows that it has for each."""


class Sent:
    """What each rank sends straight to others.

    messages, rows  [p, 2]  inside its node, between nodes. A message is one non-empty pair of different ranks
    """

    def __init__(self, nodes: Nodes) -> None:
        self.nodes = nodes
        self.messages: Counts = np.zeros((nodes.world_size, 2), np.int64)
        self.rows: NDArray[np.float64] = np.zeros((nodes.world_size, 2))

    def add(self, senders: Sequence[int] | Counts, receivers: Counts, rows: Rows) -> None:
        """Count rows [senders, receivers]; what stays on its rank is not sent."""
        node_of = self.nodes.node_of
        inside = np.equal.outer(node_of[senders], node_of[receivers])
        for column, pairs in enumerate((inside & np.not_equal.outer(senders, receivers), ~inside)):
            self.messages[senders, column] += (pairs & (rows > 0)).sum(axis=1)
            self.rows[senders, column] += (pairs * rows).sum(axis=1)


def flat(nodes: Nodes, groups: Iterable[Sequence[int]], rows_for: RowsFor) -> Sent:
    """A FlatAllToAll in each group."""
    sent = Sent(nodes)
    for group in map(np.array, groups):
        for rank in group.tolist():
            sent.add([rank], group, rows_for(rank, group)[None])
    return sent


def hierarchical(nodes: Nodes, groups: Iterable[Sequence[int]], rows_for: RowsFor) -> Sent:
    """A HierarchicalAllToAll in each group, whose nodes are what the group has of `nodes`."""
    sent = Sent(nodes)
    for group in map(np.array, groups):
        node_of = nodes.node_of[group]
        within = Nodes(np.flatnonzero(node_of == node).tolist() for node in np.unique(node_of))
        for node in within.ranks:
            senders = group[list(node)]
            for hop in hops(within, node, np.stack([rows_for(rank, group) for rank in senders.tolist()])):
                sent.add(senders, group, hop)
    return sent


def hops(nodes: Nodes, node: Sequence[int], rows: Rows) -> tuple[Rows, Rows]:
    """What the ranks of one node send in each hop of the hierarchical all-to-all.

    rows     [G, p]  what they have for every rank
    returns  [G, p] for hop one, to the ranks of the node that forward it, and [G, p] for hop two, from these to the
             destinations. What stays on its rank is among it
    """
    one, two = np.zeros_like(rows), np.zeros_like(rows)
    for i, forwarder in enumerate(node):
        destinations = np.flatnonzero(nodes.local_rank % len(node) == i)  # as HierarchicalAllToAll chooses
        one[:, forwarder] = rows[:, destinations].sum(axis=1)
        two[i, destinations] = rows[:, destinations].sum(axis=0)
    return one, two


def hop_traffic(nodes: Nodes, rows: Rows) -> tuple[Rows, Rows]:
    """The rows that go from rank to rank directly, in each hop of the hierarchical all-to-all.

    rows     [p, p]  from each source to each destination
    returns  [p, p] for hop one, inside nodes, and [p, p] for hop two, between nodes; [sender, receiver]. Rows that stay
             on their rank are not traffic: the diagonals are 0
    """
    both = np.zeros((2, *rows.shape), rows.dtype)
    for node in map(list, nodes.ranks):
        both[:, node] = hops(nodes, node, rows[node])
    each = np.arange(len(rows))
    both[:, each, each] = 0
    return both[0], both[1]


class Lanes:
    """A TensorParallelExchange over groups("expert_lane"): which share of its assignments a rank sends to whom."""

    def __init__(self, topology: Topology) -> None:
        self.topology = topology
        self._tensor, self._lane = (
            {rank: group for group in map(np.array, topology.groups(axis)) for rank in group.tolist()}
            for axis in ("tensor", "expert_lane")
        )
        self._part = np.empty(topology.world_size, np.int64)  # what a rank holds: of which experts, which slice
        for group in topology.groups("expert", "expert_tensor"):
            self._part[group] = np.arange(len(group))

    def reached(self, rank: int) -> Counts:
        """[parts of the experts] by how many lanes the tensor group of `rank` reaches each: these take turns."""
        ranks = np.concatenate([self._lane[member] for member in self._tensor[rank].tolist()])
        return np.bincount(self._part[ranks], minlength=self.topology.expert * self.topology.expert_tensor)

    def incomplete(self) -> list[int]:
        """A tensor group that does not reach all experts, so that there is no such exchange. [] if all do."""
        return next((group for group in self.topology.groups("tensor") if not self.reached(group[0]).all()), [])

    def shares(self, rank: int, group: Counts) -> Rows:
        """[size of the group] for each rank of the lane of `rank`, the share of the assignments that goes there."""
        return 1 / (self.topology.expert * self.reached(rank)[self._part[group]])

    def sharing(self, nodes: Nodes, num_tokens: int, top_k: int) -> tuple[str, Sent]:
        """How the tensor ranks share their answers, as TensorParallelExchange chooses it, and what they send for it.

        A lane has answers for as many different tokens as it can. An all-reduce is counted as a ring: 2 (L - 1)
        messages of num_tokens / L rows to the next rank.
        """
        sent, ways = Sent(nodes), set()
        for group in map(np.array, self.topology.groups("tensor")):
            shares = [self.shares(rank, self._lane[rank]).sum() for rank in group.tolist()]
            answered = num_tokens * np.minimum(1, top_k * np.array(shares))
            if answered.sum() <= 2 * num_tokens * (1 + 1e-9):
                ways.add("all-gather")
                sent.add(group, group, answered[:, None])
            else:
                ways.add("all-reduce as a ring")
                steps = 2 * (len(group) - 1)
                for rank, following in zip(group.tolist(), np.roll(group, -1).tolist(), strict=True):
                    sent.add([rank], np.full(steps, following), np.full((1, steps), num_tokens / len(group)))
        return " or ".join(sorted(ways)), sent
