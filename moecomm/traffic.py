"""What each rank sends in an exchange, counted from the rank lists: plain arithmetic, nothing is moved."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from math import gcd
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from moecomm.arrays import Counts
from moecomm.nodes import Nodes
from moecomm.topology import Topology

Rows = NDArray[np.number]
"""Numbers of rows: whole numbers, or averages."""
Labels = Counts
"""[p] a number for each rank, the same for the ranks of a group."""


class Sent(NamedTuple):
    """What each rank sends directly to other ranks.

    messages, rows  [p, 2]  inside its node, between nodes. A message is one non-empty pair of different ranks
    """

    messages: Counts
    rows: NDArray[np.float64]


def directly(nodes: Nodes, traffic: Rows) -> Sent:
    """What ranks send that have `traffic` [p, p], rows from each to each. What stays on its rank is not sent."""
    same_node = np.equal.outer(nodes.node_of, nodes.node_of)
    inside = same_node & ~np.eye(len(same_node), dtype=bool)
    masks = (inside, ~same_node)
    averages = traffic.astype(np.float64)
    messages = [(mask & (averages > 0)).sum(axis=1) for mask in masks]
    rows = [(mask * averages).sum(axis=1) for mask in masks]
    return Sent(np.stack(messages, axis=1), np.stack(rows, axis=1))


def flat(nodes: Nodes, groups: Labels, rows: NDArray[np.float64]) -> Sent:
    """What a FlatAllToAll in each group sends, where each rank has rows [p] > 0 for each rank of its group."""
    size = count_of(groups)
    neighbours = count_of(_cells(nodes, groups))
    messages = np.stack([neighbours - 1, size - neighbours], axis=1)
    return Sent(messages, messages * rows[:, None])


def hierarchical(nodes: Nodes, groups: Labels, rows: NDArray[np.float64]) -> Sent:
    """`flat` for a HierarchicalAllToAll. Its nodes are the intersections of the group with `nodes`."""
    cells = _cells(nodes, groups)
    size = count_of(groups)
    neighbours = count_of(cells)
    local_rank = place_in(cells)
    # The rule of HierarchicalAllToAll: on a node with G ranks of the group, local rank i forwards to the ranks of the
    # group whose local rank is i modulo G.
    forwards_to = np.empty_like(size)
    for ranks_per_node in np.unique(neighbours).tolist():
        keys = groups * ranks_per_node + local_rank % ranks_per_node
        of_this_size = neighbours == ranks_per_node
        forwards_to[of_this_size] = np.bincount(keys)[keys[of_this_size]]
    # A forwarder sends on what the whole node has for a destination. It is a destination itself.
    of_node = np.bincount(cells, rows)[cells]
    messages = np.stack([neighbours - 1, forwards_to - 1], axis=1)
    return Sent(messages, np.stack([(size - forwards_to) * rows, (forwards_to - 1) * of_node], axis=1))


def _cells(nodes: Nodes, groups: Labels) -> Labels:
    """The ranks of a group that are on one node, numbered from 0 without gaps."""
    return np.unique(groups * len(nodes) + nodes.node_of, return_inverse=True)[1].reshape(-1)


def count_of(groups: Labels) -> Counts:
    """[p] how many ranks the group of each rank has."""
    return np.bincount(groups)[groups]


def place_in(groups: Labels) -> Counts:
    """[p] the index of each rank among the ranks of its group, which ascend."""
    order = np.argsort(groups, kind="stable")
    sizes = np.bincount(groups)
    first = np.cumsum(sizes) - sizes
    places = np.empty_like(groups)
    places[order] = np.arange(len(groups)) - first[groups[order]]
    return places


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
    """The groups of a TensorParallelExchange over groups("expert_lane"), and which share of its rows a rank sends.

    All of it takes p steps: a lane has the ranks of an expert group whose index in it is the same modulo `period`.
    """

    def __init__(self, topology: Topology) -> None:
        self.topology = topology
        sizes = (topology.pipeline, topology.expert_data, topology.expert, topology.expert_tensor)
        ranks = np.arange(topology.world_size)
        if topology.inner == "expert":
            self._grid = ranks.reshape(sizes)
        else:
            self._grid = ranks.reshape(sizes[0], sizes[2], sizes[1], sizes[3]).swapaxes(1, 2)
        # From one rank of an expert group to the next, the tensor rank goes on by the stride, modulo tensor.
        stride = topology.expert_tensor
        if topology.inner == "expert_data":
            stride *= topology.expert_data
        period = topology.tensor // gcd(topology.tensor, stride)
        # In a group that is shorter than the period, each rank is on a lane of its own.
        self._period = min(period, topology.expert)
        expert, expert_tensor = np.ogrid[: topology.expert, : topology.expert_tensor]
        self._shards: Labels = np.empty_like(ranks)
        """Which shards the lane of each rank reaches: they are the same for ranks with the same number."""
        self._shards[self._grid] = expert_tensor * self._period + expert % self._period
        self._reaching = self._count_lanes()

    def _count_lanes(self) -> Counts:
        """[p / L, sets of shards] how many lanes of each tensor group reach them."""
        tensor = self.topology.tensor
        num_sets = self.topology.expert_tensor * self._period
        num_groups = self.topology.world_size // tensor
        if num_sets > tensor:
            # So few ranks cannot reach all of them. The table would be large.
            return np.zeros((num_groups, 1), np.int64)
        group = np.arange(self.topology.world_size) // tensor
        return np.bincount(group * num_sets + self._shards, minlength=num_groups * num_sets).reshape(num_groups, -1)

    def incomplete(self) -> list[int]:
        """A tensor group that does not reach all experts, so that there is no such exchange. [] if all groups do."""
        lacking = np.flatnonzero((self._reaching == 0).any(axis=1))
        if not len(lacking):
            return []
        first = int(lacking[0]) * self.topology.tensor
        return list(range(first, first + self.topology.tensor))

    def expert_groups(self) -> Labels:
        """[p] the expert group of each rank."""
        labels = np.empty(self.topology.world_size, np.int64)
        members = self._grid.swapaxes(2, 3).reshape(-1, self.topology.expert)
        labels[members] = np.arange(len(members))[:, None]
        return labels

    def members(self) -> Counts:
        """[lanes, ranks of a lane] the ranks, ascending. ValueError if there is no such exchange."""
        if self.incomplete():
            raise ValueError(f"Lanes.members: tensor group {self.incomplete()} does not reach all experts")
        topology = self.topology
        size = topology.expert // self._period
        grid = self._grid.reshape(topology.pipeline, topology.expert_data, size, self._period, topology.expert_tensor)
        return np.moveaxis(grid, 2, -1).reshape(-1, size)

    def lanes(self) -> Labels:
        """[p] the lane of each rank: `members` as labels."""
        labels = np.empty(self.topology.world_size, np.int64)
        members = self.members()
        labels[members] = np.arange(len(members))[:, None]
        return labels

    @cached_property
    def shares(self) -> NDArray[np.float64]:
        """[p] the share of its assignments that a rank sends to each rank of its lane.

        The lanes of a tensor group that reach the same expert take turns. Only where `incomplete` is [].
        """
        lanes = self._reaching[np.arange(len(self._shards)) // self.topology.tensor, self._shards]
        return 1 / (self.topology.expert * lanes)

    def answers(self, num_tokens: int, top_k: int) -> NDArray[np.float64]:
        """[p] for how many tokens a rank has answers to share with its tensor group.

        A lane has answers for as many different tokens as it can, and sums those of a token before it shares them.
        """
        of_all = self.topology.expert // self._period * self.shares
        return num_tokens * np.minimum(1, top_k * of_all)

    def sharing(self, nodes: Nodes, num_tokens: int, top_k: int) -> tuple[str, Sent]:
        """How the tensor ranks share their answers, as TensorParallelExchange chooses it, and what they send for it.

        An all-reduce is counted as a ring: 2 (L - 1) messages of num_tokens / L rows to the next rank.
        """
        tensor = self.topology.tensor
        ranks = np.arange(self.topology.world_size)
        answers = self.answers(num_tokens, top_k)
        # The tolerance is for shares such as 1/3, whose sum may come out a little above the whole.
        gathers = answers.reshape(-1, tensor).sum(axis=1) <= 2 * num_tokens * (1 + 1e-9)
        gather = flat(nodes, ranks // tensor, answers)
        successor = ranks // tensor * tensor + (ranks + 1) % tensor
        leaves = nodes.node_of[ranks] != nodes.node_of[successor]
        steps = 2 * (tensor - 1) * np.stack([~leaves, leaves], axis=1)
        names = {True: "all-gather", False: "all-reduce as a ring"}
        way = " or ".join(names[gathered] for gathered in (True, False) if (gathers == gathered).any())
        gathered = np.repeat(gathers, tensor)[:, None]
        messages = np.where(gathered, gather.messages, steps)
        rows = np.where(gathered, gather.rows, steps * num_tokens / tensor)
        return way, Sent(messages, rows)
