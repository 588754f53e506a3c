"""Nodes: which ranks share a node. Plain arithmetic; only `discover` talks to other ranks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from operator import index

import numpy as np
from numpy.typing import NDArray

from moecomm.arrays import Counts
from moecomm.comm import CommLike
from moecomm.transports import as_comm


class Nodes:
    """A partition of the ranks 0 .. p-1 into nodes, of any sizes and placed in any order.

    ranks  the ranks of each node, e.g. [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]

    Immutable. Nodes are numbered by their lowest rank, and the local ranks of a node by rank, whatever the order of the
    argument.
    Raises ValueError if a rank is missing or on two nodes.
    """

    def __init__(self, ranks: Iterable[Sequence[int]]) -> None:
        # Sorted twice, so that two descriptions of the same nodes are equal and number them alike on all ranks.
        members = sorted(tuple(sorted(map(index, node))) for node in ranks)
        flat = [rank for node in members for rank in node]
        if not flat or not all(members):
            raise ValueError(f"Nodes: ranks is {[list(m) for m in members]}, expected at least one rank on every node")
        world = range(len(flat))
        if sorted(flat) != list(world):
            odd = [rank for rank in sorted(flat) if flat.count(rank) > 1 or rank not in world]
            missing = sorted(set(world).difference(flat))
            raise ValueError(
                f"Nodes: ranks is no partition of 0..{len(flat) - 1}: {odd} twice or out of range, {missing} on no node"
            )
        self.ranks: tuple[tuple[int, ...], ...] = tuple(members)
        """The ranks of each node, ascending."""
        self.node_of: Counts = np.empty(len(flat), np.int64)
        """[p] the node of each rank."""
        self.local_rank: Counts = np.empty(len(flat), np.int64)
        """[p] the index of each rank within its node."""
        for number, node in enumerate(members):
            self.node_of[list(node)] = number
            self.local_rank[list(node)] = range(len(node))
        # Exchanges keep these arrays without a copy.
        for array in (self.node_of, self.local_rank):
            array.flags.writeable = False

    @classmethod
    def of_size(cls, ranks_per_node: int, world_size: int) -> Nodes:
        """Blocks of consecutive ranks; the last node is smaller where ranks_per_node does not divide world_size."""
        for name, value in (("ranks_per_node", ranks_per_node), ("world_size", world_size)):
            if not isinstance(value, int | np.integer) or value < 1:
                raise ValueError(f"Nodes.of_size: {name} is {value!r}, expected a whole number >= 1")
        world = range(world_size)
        return cls(world[start : start + ranks_per_node] for start in world[::ranks_per_node])

    @classmethod
    def discover(cls, comm: CommLike) -> Nodes:
        """The nodes on which the ranks of `comm` run. Collective over comm.

        MPI: ranks that can share memory. torch: ranks with the same host name and boot. Threads: one node.
        """
        ranks = as_comm(comm)
        keys = ranks.all_gather(np.array([ranks.node_key()], np.int64))
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
        return np.array([len(node) for node in self.ranks], np.int64)

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
        return f"Nodes({[list(node) for node in self.ranks]})"
