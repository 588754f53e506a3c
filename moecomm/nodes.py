"""Nodes: which ranks share a node. Plain arithmetic; only `discover` talks to other ranks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from operator import index

import numpy as np
from numpy.typing import NDArray

from moecomm.arrays import Counts
from moecomm.comm import Comm


class Nodes:
    """A partition of the ranks 0 .. p-1 into nodes, of any sizes and placed in any order.

    ranks  the ranks of each node, e.g. [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]

    Immutable. Nodes are numbered by their lowest rank and the local ranks of a node by rank, in whatever order they are
    given.
    Raises ValueError if some rank is missing or in two nodes.
    """

    def __init__(self, ranks: Iterable[Sequence[int]]) -> None:
        members = sorted(tuple(sorted(index(r) for r in node)) for node in ranks)
        flat = [rank for node in members for rank in node]
        if not flat or not all(members):
            raise ValueError(f"Nodes: ranks is {[list(m) for m in members]}, expected at least one rank on every node")
        if sorted(flat) != list(range(len(flat))):
            odd = sorted(r for r in flat if flat.count(r) > 1 or not 0 <= r < len(flat))
            missing = sorted(set(range(len(flat))) - set(flat))
            raise ValueError(
                f"Nodes: ranks is no partition of 0..{len(flat) - 1}: {odd} twice or out of range, {missing} on no node"
            )
        self.ranks: tuple[tuple[int, ...], ...] = tuple(members)
        """The ranks of each node, ascending."""
        self.node_of: Counts = np.empty(len(flat), np.int64)
        """[p] the node of each rank."""
        self.local_rank: Counts = np.empty(len(flat), np.int64)
        """[p] the place of each rank within its node."""
        for node, group in enumerate(members):
            self.node_of[list(group)] = node
            self.local_rank[list(group)] = np.arange(len(group))
        self.node_of.flags.writeable = self.local_rank.flags.writeable = False

    @classmethod
    def of_size(cls, ranks_per_node: int, world_size: int) -> Nodes:
        """Blocks of consecutive ranks; the last node is smaller where ranks_per_node does not divide world_size."""
        for name, value in (("ranks_per_node", ranks_per_node), ("world_size", world_size)):
            if not isinstance(value, int | np.integer) or value < 1:
                raise ValueError(f"Nodes.of_size: {name} is {value!r}, expected a whole number >= 1")
        starts = range(0, world_size, ranks_per_node)
        return cls(range(start, min(start + ranks_per_node, world_size)) for start in starts)

    @classmethod
    def discover(cls, comm: Comm) -> Nodes:
        """The nodes that the ranks of `comm` really run on. Collective over comm.

        MPI: ranks that can share memory. torch: ranks with the same host name and boot. Threads: one node.
        """
        keys = comm.all_gather(np.array([comm.node_key()], np.int64))
        nodes = defaultdict(list)
        for rank, key in enumerate(keys.tolist()):
            nodes[key].append(rank)
        return cls(nodes.values())

    @property
    def world_size(self) -> int:
        """p, the number of ranks."""
        return len(self.node_of)

    def sizes(self) -> Counts:
        """[number of nodes] how many ranks each node has."""
        return np.array([len(group) for group in self.ranks], np.int64)

    def same_node(self, rank: int) -> NDArray[np.bool_]:
        """[p] which ranks share the node of `rank`, itself included."""
        return np.equal(self.node_of, self.node_of[rank])

    def __len__(self) -> int:
        return len(self.ranks)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Nodes) and self.ranks == other.ranks

    def __hash__(self) -> int:
        return hash(self.ranks)

    def __repr__(self) -> str:
        return f"Nodes({[list(group) for group in self.ranks]})"
