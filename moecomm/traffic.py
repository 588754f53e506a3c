"""What each rank sends in an exchange, counted from the rank lists: plain arithmetic, nothing is moved."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from moecomm.arrays import Counts
from moecomm.nodes import Nodes
from moecomm.topology import Topology

Rows = NDArray[np.number]
"""Numbers of rows: whole numbers, or averages."""
RowsFor = Callable[[int, Counts], Rows]
"""A rank and the group it sends to -> [size of the group] the rows that it has for each member."""


class Sent:
    """What each rank sends directly to other ranks.

    messages, rows  [p, 2]  inside its node, between nodes. A message is one non-empty pair of different ranks
    """

    def __init__(self, nodes: Nodes) -> None:
        self.nodes = nodes
        self.messages: Counts = np.zeros((nodes.world_size, 2), np.int64)
        self.rows: NDArray[np.float64] = np.zeros((nodes.world_size, 2))

    def add(self, senders: Sequence[int] | Counts, receivers: Counts, rows: Rows) -> None:
        """Count rows [senders, receivers]; what stays on its rank is not sent."""
        node_of = self.nodes.node_of
        same_node = np.equal.outer(node_of[senders], node_of[receivers])
        inside = same_node & np.not_equal.outer(senders, receivers)
        for column, pairs in enumerate((inside, ~same_node)):
            self.messages[senders, column] += (pairs & (rows > 0)).sum(axis=1)
            self.rows[senders, column] += (pairs * rows).sum(axis=1)


def flat(nodes: Nodes, groups: Iterable[Sequence[int]], rows_for: RowsFor) -> Sent:
    """What a FlatAllToAll in each group sends."""
    sent = Sent(nodes)
    for group in map(np.array, groups):
        # Rank by rank: a matrix of all pairs would need gigabytes for a group of 65,536 ranks.
        for rank in group.tolist():
            sent.add([rank], group, rows_for(rank, group)[None])
    return sent


def hierarchical(nodes: Nodes, groups: Iterable[Sequence[int]], rows_for: RowsFor) -> Sent:
    """What a HierarchicalAllToAll in each group sends. Its nodes are the intersections of the group with `nodes`."""
    sent = Sent(nodes)
    for group in map(np.array, groups):
        node_of = nodes.node_of[group]
        group_nodes = Nodes(np.flatnonzero(node_of == node).tolist() for node in np.unique(node_of))
        for node in group_nodes.ranks:
            senders = group[list(node)]
            rows = np.stack([rows_for(rank, group) for rank in senders.tolist()])
            for hop in hops(group_nodes, node, rows):
                sent.add(senders, group, hop)
    return sent


def hops(nodes: Nodes, node: Sequence[int], rows: Rows) -> tuple[Rows, Rows]:
    """What the ranks of one node send in each hop of the hierarchical all-to-all.

    rows     [G, p]  what they have for each rank
    returns  [G, p] for hop one, to the ranks of the node that forward it, and [G, p] for hop two, from these to the
             destinations. Rows that stay on their rank are included
    """
    hop_one = np.zeros_like(rows)
    hop_two = np.zeros_like(rows)
    for i, forwarder in enumerate(node):
        # The rule of HierarchicalAllToAll: on a node with fewer ranks, a rank forwards for several local ranks.
        destinations = np.flatnonzero(nodes.local_rank % len(node) == i)
        forwarded = rows[:, destinations]
        hop_one[:, forwarder] = forwarded.sum(axis=1)
        hop_two[i, destinations] = forwarded.sum(axis=0)
    return hop_one, hop_two


def hop_traffic(nodes: Nodes, rows: Rows) -> tuple[Rows, Rows]:
    """The rows that go from rank to rank directly, in each hop of the hierarchical all-to-all.

    rows     [p, p]  from each source to each destination
    returns  [p, p] for hop one, inside nodes, and [p, p] for hop two, between nodes; [sender, receiver]. Rows that stay
             on their rank are not traffic: the diagonals are 0
    """
    traffic = np.zeros((2, *rows.shape), rows.dtype)
    for node in map(list, nodes.ranks):
        traffic[:, node] = hops(nodes, node, rows[node])
    diagonal = np.arange(len(rows))
    traffic[:, diagonal, diagonal] = 0
    return traffic[0], traffic[1]


class Lanes:
    """A TensorParallelExchange over groups("expert_lane"): which share of its assignments a rank sends to whom."""

    def __init__(self, topology: Topology) -> None:
        self.topology = topology
        self._tensor = _groups_by_rank(topology, "tensor")
        self._lane = _groups_by_rank(topology, "expert_lane")
        # A shard is a slice of some experts. Ranks with the same index in these groups hold the same shard.
        self._shard = np.empty(topology.world_size, np.int64)
        for group in topology.groups("expert", "expert_tensor"):
            self._shard[group] = range(len(group))

    def reached(self, rank: int) -> Counts:
        """[shards of the experts] how many lanes of the tensor group of `rank` reach each: these take turns."""
        ranks = np.concatenate([self._lane[member] for member in self._tensor[rank].tolist()])
        return np.bincount(self._shard[ranks], minlength=self.topology.expert * self.topology.expert_tensor)

    def incomplete(self) -> list[int]:
        """A tensor group that does not reach all experts, so that there is no such exchange. [] if all groups do."""
        for group in self.topology.groups("tensor"):
            if not self.reached(group[0]).all():
                return group
        return []

    def shares(self, rank: int, group: Counts) -> Rows:
        """[size of the group] for each rank of the lane of `rank`, the share of the assignments that goes there."""
        lanes = self.reached(rank)[self._shard[group]]
        return 1 / (self.topology.expert * lanes)

    def sharing(self, nodes: Nodes, num_tokens: int, top_k: int) -> tuple[str, Sent]:
        """How the tensor ranks share their answers, as TensorParallelExchange chooses it, and what they send for it.

        A lane has answers for as many different tokens as it can. An all-reduce is counted as a ring: 2 (L - 1)
        messages of num_tokens / L rows to the next rank.
        """
        sent = Sent(nodes)
        collectives = set()
        for group in map(np.array, self.topology.groups("tensor")):
            members = group.tolist()
            shares = [self.shares(rank, self._lane[rank]).sum() for rank in members]
            # A lane sums the answers of a token's experts before it shares them: at most a row for each token.
            answers = num_tokens * np.minimum(1, top_k * np.array(shares))
            # The tolerance is for shares such as 1/3, whose sum may come out a little above the whole.
            if answers.sum() <= 2 * num_tokens * (1 + 1e-9):
                collectives.add("all-gather")
                sent.add(group, group, answers[:, None])
                continue
            collectives.add("all-reduce as a ring")
            steps = 2 * (len(group) - 1)
            rows = np.full((1, steps), num_tokens / len(group))
            for rank, successor in zip(members, np.roll(group, -1), strict=True):
                # a receiver for each step, because each step is a message
                sent.add([rank], np.full(steps, successor), rows)
        return " or ".join(sorted(collectives)), sent


def _groups_by_rank(topology: Topology, axis: str) -> dict[int, Counts]:
    """`topology.group_of` for all ranks in p steps; a call for each rank would take p^2."""
    groups = map(np.array, topology.groups(axis))
    return {rank: group for group in groups for rank in group.tolist()}
