"""How much each rank sends in an exchange with balanced routing: counted from the rank lists, nothing is moved."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from moecomm.arrays import Counts
from moecomm.cli.words import ranks_in_words
from moecomm.nodes import Nodes
from moecomm.topology import Topology

Rows = NDArray[np.float64]
"""Rows on average, so not always whole."""
RowsFor = Callable[[int, Counts], Rows]
"""A rank and the group it sends to -> [size of the group] the rows that it has for each."""


class Sent:
    """What each rank sends straight to others.

    messages, rows  [p, 2]  inside its node, between nodes. A message is one non-empty pair of different ranks
    """

    def __init__(self, nodes: Nodes) -> None:
        self.nodes = nodes
        self.messages: Counts = np.zeros((nodes.world_size, 2), np.int64)
        self.rows: Rows = np.zeros((nodes.world_size, 2))

    def add(self, source: int, destinations: Counts, rows: Rows) -> None:
        """Count rows [len(destinations)] from `source` to each; what stays on it is not sent."""
        sent = (rows > 0) & (destinations != source)
        between = self.nodes.node_of[destinations] != self.nodes.node_of[source]
        for column, these in enumerate((sent & ~between, sent & between)):
            self.messages[source, column] += np.count_nonzero(these)
            self.rows[source, column] += rows[these].sum()


def flat(nodes: Nodes, groups: list[list[int]], rows_for: RowsFor) -> Sent:
    """A FlatAllToAll in each group."""
    sent = Sent(nodes)
    for group in map(np.array, groups):
        for source in group.tolist():
            sent.add(source, group, rows_for(source, group))
    return sent


def hierarchical(nodes: Nodes, groups: list[list[int]], rows_for: RowsFor) -> Sent:
    """A HierarchicalAllToAll in each group, whose nodes are what the group has of the nodes."""
    sent = Sent(nodes)
    for group in map(np.array, groups):
        members = _by_node(nodes, group)
        local_rank = {rank: i for part in members for i, rank in enumerate(part)}
        local = np.array([local_rank[rank] for rank in group.tolist()])
        for part in members:
            forwarder = local % len(part)  # as HierarchicalAllToAll chooses it
            gathered = np.zeros(len(group))
            for source in part:
                rows = rows_for(source, group)
                gathered += rows
                by_forwarder = np.bincount(forwarder, weights=rows, minlength=len(part))
                sent.add(source, np.array(part), by_forwarder.astype(np.float64))
            for i, rank in enumerate(part):
                sent.add(rank, group[forwarder == i], gathered[forwarder == i])
    return sent


def _by_node(nodes: Nodes, group: Counts) -> list[list[int]]:
    members = defaultdict(list)
    for rank, node in zip(group.tolist(), nodes.node_of[group].tolist(), strict=True):
        members[node].append(rank)
    return list(members.values())


class Lanes:
    """A TensorParallelExchange over groups("expert_lane"): which share of its assignments a rank sends to whom."""

    def __init__(self, topology: Topology) -> None:
        self.topology = topology
        self._tensor = _group_of(topology, "tensor")
        self._lane = _group_of(topology, "expert_lane")
        self._place = _places(topology, "expert")
        self._part = _places(topology, "expert_tensor")

    def shares(self, source: int, group: Counts) -> Rows:
        """[len(group)] for each rank of the source's expert_lane, the share of the assignments that goes there."""
        return 1 / (self.topology.expert * self._num_lanes(source)[self._place[group]])

    def answered(self, source: int, num_tokens: int, top_k: int) -> float:
        """Tokens that the source's lane has an answer for, if no two experts of a token are on it where avoidable."""
        share = self.shares(source, np.array(self._lane[source])).sum()
        return min(float(num_tokens), num_tokens * top_k * float(share))

    def problem(self) -> str | None:
        """Why the tensor ranks cannot reach every expert, or None."""
        slices = self.topology.expert_tensor
        for group in self.topology.groups("tensor"):
            held = len(np.unique(self._part[group]))
            if held < slices:
                return f"tensor group {ranks_in_words(group)} reaches {held} of the {slices} slices of an expert"
            for rank in group:
                lost = np.flatnonzero(self._num_lanes(rank) == 0)
                if lost.size:
                    holders = np.flatnonzero((self._place == lost[0]) & (self._part == self._part[rank])).tolist()
                    who = f"rank {holders[0]}" if len(holders) == 1 else f"ranks {ranks_in_words(holders)}"
                    return f"tensor group {ranks_in_words(group)} has no lane to the experts that {who} hold"
        return None

    def _num_lanes(self, source: int) -> Counts:
        """[expert] how many ranks of the tensor group reach the experts of each place in the slices of the source."""
        reached = np.zeros(self.topology.expert, np.int64)
        for rank in self._tensor[source]:
            if self._part[rank] == self._part[source]:
                reached[self._place[self._lane[rank]]] += 1
        return reached


def sharing(nodes: Nodes, topology: Topology, answered: Callable[[int], float], num_tokens: int) -> tuple[str, Sent]:
    """How the tensor ranks share their answers, as TensorParallelExchange chooses it, and what they send for it.

    answered  rank -> tokens that it has an answer for

    An all-reduce is counted as a ring: 2 (L - 1) messages of num_tokens / L rows to the next rank.
    """
    sent, ways = Sent(nodes), set()
    for group in map(np.array, topology.groups("tensor")):
        rows = [answered(rank) for rank in group.tolist()]
        if sum(rows) <= 2 * num_tokens * (1 + 1e-9):
            ways.add("all-gather")
            for rank, number in zip(group.tolist(), rows, strict=True):
                sent.add(rank, group, np.full(len(group), number))
        else:
            ways.add("all-reduce as a ring")
            for rank, following in zip(group.tolist(), np.roll(group, -1).tolist(), strict=True):
                steps = 2 * (len(group) - 1)
                sent.add(rank, np.full(steps, following), np.full(steps, num_tokens / len(group)))
    return " or ".join(sorted(ways)), sent


def _group_of(topology: Topology, axis: str) -> dict[int, list[int]]:
    return {rank: group for group in topology.groups(axis) for rank in group}


def _places(topology: Topology, axis: str) -> Counts:
    """[p] the place of each rank in its group."""
    places = np.empty(topology.world_size, np.int64)
    for group in topology.groups(axis):
        places[group] = np.arange(len(group))
    return places


def differ(sent: Sequence[Sent]) -> bool:
    """Whether some ranks send more than others."""
    return any(
        (each.messages != each.messages[0]).any() or not np.allclose(each.rows, each.rows[0], 1e-9) for each in sent
    )
