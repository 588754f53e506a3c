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
    averages = traffic.astype(np.float64)
    same_node = np.equal.outer(nodes.node_of, nodes.node_of)
    same_rank = np.eye(len(same_node), dtype=bool)
    messages = []
    rows = []
    for counted in (same_node & ~same_rank, ~same_node):
        sent = np.where(counted, averages, 0)
        messages.append((sent > 0).sum(axis=1))
        rows.append(sent.sum(axis=1))
    return Sent(
        np.stack(messages, axis=1),
        np.stack(rows, axis=1),
    )


def flat(nodes: Nodes, groups: Labels, rows: NDArray[np.float64]) -> Sent:
    """What a FlatAllToAll in each group sends, where each rank has rows [p] > 0 for each rank of its group."""
    size = count_of(groups)
    on_node = count_of(_cells(nodes, groups))
    # What a rank has for itself is not sent.
    inside = on_node - 1
    between = size - on_node
    messages = np.stack([inside, between], axis=1)
    of_each = rows[:, None]
    return Sent(messages, messages * of_each)


def hierarchical(nodes: Nodes, groups: Labels, rows: NDArray[np.float64]) -> Sent:
    """`flat` for a HierarchicalAllToAll. Its nodes are the intersections of the group with `nodes`."""
    cells = _cells(nodes, groups)
    size = count_of(groups)
    on_node = count_of(cells)
    local_rank = place_in(cells)
    # The rule of HierarchicalAllToAll: on a node with G ranks of the group, local rank i forwards to the ranks of the
    # group whose local rank is i modulo G.
    destinations = np.empty_like(size)
    for ranks_per_node in np.unique(on_node).tolist():
        remainder = local_rank % ranks_per_node
        row = groups * ranks_per_node + remainder
        ranks_of_row = np.bincount(row)[row]
        of_this_size = on_node == ranks_per_node
        destinations[of_this_size] = ranks_of_row[of_this_size]
    # A forwarder sends on what the whole node has for a destination. It is a destination itself.
    of_node = np.bincount(cells, rows)[cells]
    inside = (size - destinations) * rows
    between = (destinations - 1) * of_node
    return Sent(
        np.stack([on_node - 1, destinations - 1], axis=1),
        np.stack([inside, between], axis=1),
    )


def _cells(nodes: Nodes, groups: Labels) -> Labels:
    """The ranks of a group that are on one node, numbered from 0 without gaps."""
    pair = groups * len(nodes) + nodes.node_of
    _, cells = np.unique(pair, return_inverse=True)
    return cells.reshape(-1)


def count_of(groups: Labels) -> Counts:
    """[p] how many ranks the group of each rank has."""
    return np.bincount(groups)[groups]


def place_in(groups: Labels) -> Counts:
    """[p] the index of each rank among the ranks of its group, which ascend."""
    order = np.argsort(groups, kind="stable")
    # In this order the ranks of a group follow one another, ascending.
    sizes = np.bincount(groups)
    start = np.cumsum(sizes) - sizes
    position = np.arange(len(groups))
    places = np.empty_like(groups)
    places[order] = position - start[groups[order]]
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
        remainder = nodes.local_rank % len(node)
        destinations = np.flatnonzero(remainder == i)
        forwarded = rows[:, destinations]
        of_source = forwarded.sum(axis=1)
        of_destination = forwarded.sum(axis=0)
        hop_one[:, forwarder] = of_source
        hop_two[i, destinations] = of_destination
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
    hop_one, hop_two = traffic
    return hop_one, hop_two


class Lanes:
    """The groups of a TensorParallelExchange over groups("expert_lane"), and which share of its rows a rank sends.

    A lane has those ranks of an expert group whose index in it is the same modulo `period`, and so reaches these
    shards of the experts: a set of shards. All of it takes p steps, where rank lists would take p^2.
    """

    def __init__(self, topology: Topology) -> None:
        self.topology = topology
        expert = topology.expert
        tensor = topology.tensor
        ranks = np.arange(topology.world_size)
        # From one rank of an expert group to the next, the tensor rank goes on by the stride, modulo tensor.
        stride = topology.expert_tensor
        if topology.inner == "expert":
            grid = ranks.reshape(
                topology.pipeline,
                topology.expert_data,
                expert,
                topology.expert_tensor,
            )
        else:
            stride *= topology.expert_data
            grid = ranks.reshape(
                topology.pipeline,
                expert,
                topology.expert_data,
                topology.expert_tensor,
            )
            grid = grid.swapaxes(1, 2)
        self._grid = grid
        """[pipeline, expert_data, expert, expert_tensor]"""
        # In a group that is shorter than the period, each rank is on a lane of its own.
        period = tensor // gcd(tensor, stride)
        self._period = min(period, expert)
        index, piece = np.ogrid[:expert, : topology.expert_tensor]
        self._set_of: Labels = np.empty_like(ranks)
        """[p] which set of shards the lane of each rank reaches."""
        self._set_of[grid] = piece * self._period + index % self._period
        self._tensor_group: Labels = ranks // tensor
        self._num_lanes = self._count_lanes()
        """[p / L, sets] how many lanes of each tensor group reach a set of shards."""

    def _count_lanes(self) -> Counts:
        tensor = self.topology.tensor
        num_groups = self.topology.world_size // tensor
        num_sets = self.topology.expert_tensor * self._period
        if num_sets > tensor:
            # So few ranks cannot reach all of them, and the table would be large.
            return np.zeros((num_groups, 1), np.int64)
        shape = (num_groups, num_sets)
        cell = self._tensor_group * num_sets + self._set_of
        counts = np.bincount(cell, minlength=num_groups * num_sets)
        return counts.reshape(shape)

    def incomplete(self) -> list[int]:
        """A tensor group that does not reach all experts, so that there is no such exchange. [] if all groups do."""
        is_lacking = (self._num_lanes == 0).any(axis=1)
        if not is_lacking.any():
            return []
        # Tensor ranks are neighbours.
        tensor = self.topology.tensor
        lowest = int(np.argmax(is_lacking)) * tensor
        return list(range(lowest, lowest + tensor))

    def expert_groups(self) -> Labels:
        """[p] the expert group of each rank."""
        by_group = self._grid.swapaxes(2, 3)
        return self._labels(by_group.reshape(-1, self.topology.expert))

    def members(self) -> Counts:
        """[lanes, ranks of a lane] the ranks, ascending. ValueError if there is no such exchange."""
        lacking = self.incomplete()
        if lacking:
            raise ValueError(f"Lanes.members: tensor group {lacking} does not reach all experts")
        pipeline, expert_data, expert, expert_tensor = np.shape(self._grid)
        size = expert // self._period
        # index = turn * period + lane
        grid = self._grid.reshape(pipeline, expert_data, size, self._period, expert_tensor)
        turns_inside = np.moveaxis(grid, 2, -1)
        return turns_inside.reshape(-1, size)

    def lanes(self) -> Labels:
        """[p] the lane of each rank: `members` as labels."""
        return self._labels(self.members())

    def _labels(self, members: Counts) -> Labels:
        labels = np.empty(self.topology.world_size, np.int64)
        labels[members] = np.arange(len(members))[:, None]
        return labels

    @cached_property
    def shares(self) -> NDArray[np.float64]:
        """[p] the share of its assignments that a rank sends to each rank of its lane.

        The lanes of a tensor group that reach the same expert take turns. Only where `incomplete` is [].
        """
        lanes = self._num_lanes[self._tensor_group, self._set_of]
        return 1 / (self.topology.expert * lanes)

    def answers(self, num_tokens: int, top_k: int) -> NDArray[np.float64]:
        """[p] for how many tokens a rank has answers to share with its tensor group.

        A lane has answers for as many different tokens as it can, and sums those of a token before it shares them.
        """
        ranks_of_lane = self.topology.expert // self._period
        per_token = top_k * ranks_of_lane * self.shares
        return num_tokens * np.minimum(1, per_token)

    def sharing(self, nodes: Nodes, num_tokens: int, top_k: int) -> tuple[str, Sent]:
        """How the tensor ranks share their answers, as TensorParallelExchange chooses it, and what they send for it.

        An all-reduce is counted as a ring: 2 (L - 1) messages of num_tokens / L rows to the next rank.
        """
        tensor = self.topology.tensor
        answers = self.answers(num_tokens, top_k)
        # The tolerance is for shares such as 1/3, whose sum may come out a little above the whole.
        limit = 2 * num_tokens * (1 + 1e-9)
        of_groups = answers.reshape(-1, tensor)
        gathers = of_groups.sum(axis=1) <= limit
        names = {True: "all-gather", False: "all-reduce as a ring"}
        used = [name for is_gather, name in names.items() if (gathers == is_gather).any()]
        gather = flat(nodes, self._tensor_group, answers)
        ring = self._ring(nodes, num_tokens)
        of_rank = gathers[self._tensor_group][:, None]
        sent = Sent(
            np.where(of_rank, gather.messages, ring.messages),
            np.where(of_rank, gather.rows, ring.rows),
        )
        return " or ".join(used), sent

    def _ring(self, nodes: Nodes, num_tokens: int) -> Sent:
        tensor = self.topology.tensor
        ranks = np.arange(self.topology.world_size)
        successor = self._tensor_group * tensor + (ranks + 1) % tensor
        leaves = nodes.node_of != nodes.node_of[successor]
        steps = 2 * (tensor - 1)
        messages = steps * np.stack([~leaves, leaves], axis=1)
        rows_each = num_tokens / tensor
        return Sent(messages, messages * rows_each)
