"""Which bytes go from node to node, and where each rank's are among them: plain arithmetic.

A stream joins two nodes in one direction: the blocks of all ranks of the one for all ranks of the other, ordered by
destination, then source. A rank's part of it is a list of pieces (start in the stream, rows, start in its own rows).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np

from moecomm._core import Transfer
from moecomm.arrays import Counts
from moecomm.nodes import Nodes


@dataclass(frozen=True, eq=False)
class NodeCounts:
    """How many rows go from and to the ranks of one node.

    sent      [G, p] from each of them to every rank
    received  [p, G] from every rank to each of them
    longest   no stream between any two nodes has more rows; the same on every rank
    """

    sent: Counts
    received: Counts
    longest: int
    ways: dict[int, Way] = field(default_factory=dict)
    """By bytes a row: those that were needed so far."""

    @cached_property
    def reversed(self) -> NodeCounts:
        """The way back."""
        return NodeCounts(self.received.T, self.sent.T, self.longest)


@dataclass(frozen=True, eq=False)
class Way:
    """One transfer in chunks. Chunk c is bytes [c * chunk_bytes, (c + 1) * chunk_bytes) of every stream."""

    transfer: Transfer
    chunk_bytes: int
    to_node: Counts
    """[N] bytes to each other node; 0 for this one."""
    from_node: Counts

    def counts(self, chunk: int) -> tuple[Counts, Counts]:
        """Bytes of the chunk to and from each node."""
        start = chunk * self.chunk_bytes
        sent, received = (np.clip(total - start, 0, self.chunk_bytes) for total in (self.to_node, self.from_node))
        return sent, received


class _Side(NamedTuple):
    """The streams that leave a node, or those that come, seen from one rank. In rows."""

    totals: Counts  # [N]
    num_pieces: Counts  # [N]
    pieces: Counts  # [sum(num_pieces), 3]
    num_rows: int  # that the rank has there


class Streams:
    """The streams from and to the node of `rank`."""

    def __init__(self, nodes: Nodes, rank: int) -> None:
        self.node = int(nodes.node_of[rank])
        self.local = int(nodes.local_rank[rank])
        self.sizes = nodes.sizes()
        self.num_local = int(self.sizes[self.node])
        self._order = np.concatenate([np.array(node, np.int64) for node in nodes.ranks])  # ranks, node by node
        self._begin = self.sizes.cumsum() - self.sizes  # [N] in _order

    def way(self, counts: NodeCounts, row_bytes: int, chunk_bytes: int) -> Way:
        """Chunks of at most chunk_bytes, a multiple of 64, all alike."""
        sent, received = self._leaving(counts.sent), self._coming(counts.received)
        return self._way(sent, received, row_bytes, counts.longest * row_bytes, chunk_bytes)

    def way_of_counts(self, chunk_bytes: int) -> Way:
        """For what `given_counts` makes: what a rank gives goes to all ranks of its node, and to other nodes in part.

        To a node of B ranks: [B, G] the rows for each of them from each rank here, and [G, 2] the last two numbers of
        each rank here. Rows of this transfer are single numbers.
        """
        G, p = self.num_local, len(self._order)  # noqa: N806
        pieces = []
        for node, size in enumerate(self.sizes.tolist()):
            if node == self.node:
                pieces.append([[self.local * (p + 2), p + 2, 0]])
                continue
            begin = self._begin[node]
            pieces.append([[d * G + self.local, 1, self._order[begin + d]] for d in range(size)])
            pieces[-1].append([size * G + 2 * self.local, 2, p])
        to_node, from_node = G * self.sizes + 2 * G, G * self.sizes + 2 * self.sizes
        to_node[self.node] = from_node[self.node] = G * (p + 2)
        num_pieces = np.array([len(of_node) for of_node in pieces], np.int64)
        sent = _Side(to_node, num_pieces, np.array([piece for of_node in pieces for piece in of_node], np.int64), p + 2)
        everything = np.stack([np.zeros_like(from_node), from_node, from_node.cumsum() - from_node], axis=1)
        received = _Side(from_node, np.ones_like(num_pieces), everything, int(from_node.sum()))
        largest = int(self.sizes.max())
        longest = max(largest * (p + 2), largest * (largest + 2))
        return self._way(sent, received, 8, 8 * longest, chunk_bytes)

    def given_counts(self, send_counts: Counts) -> Counts:
        """[p + 2] a rank's counts, the most rows that it has for a node, and all its rows."""
        by_node = np.add.reduceat(send_counts[self._order], self._begin)
        return np.concatenate([send_counts, [by_node.max(), by_node.sum()]])

    def read_counts(self, found: Counts) -> tuple[NodeCounts, int]:
        """The counts of this node and the number of rows in all the world, from what arrived."""
        G, p = self.num_local, len(self._order)  # noqa: N806
        received = np.empty((p, G), np.int64)
        longest = total = end = 0
        sent = received.T
        for node, size in enumerate(self.sizes.tolist()):
            begin, end = end, end + (G * (p + 2) if node == self.node else (G + 2) * size)
            ranks = self._order[self._begin[node] : self._begin[node] + size]
            if node == self.node:
                table = found[begin:end].reshape(G, p + 2)
                sent, ends = table[:, :p], table[:, p:]
                received[ranks] = sent[:, ranks]
            else:
                received[ranks] = found[begin : begin + G * size].reshape(G, size).T
                ends = found[begin + G * size : end].reshape(size, 2)
            longest = max(longest, int(ends[:, 0].sum()))
            total += int(ends[:, 1].sum())
        return NodeCounts(sent, received, longest), total

    def _way(self, sent: _Side, received: _Side, row_bytes: int, longest: int, most: int) -> Way:
        num_chunks = -(-longest // most)
        chunk_bytes = -(-longest // (64 * max(num_chunks, 1))) * 64 or 64
        transfer = Transfer(*sent, *received, row_bytes, chunk_bytes, num_chunks)
        to_node, from_node = sent.totals * row_bytes, received.totals * row_bytes
        to_node[self.node] = from_node[self.node] = 0
        return Way(transfer, chunk_bytes, to_node, from_node)

    def _leaving(self, sent: Counts) -> _Side:
        blocks = sent[:, self._order]  # [G, p]
        to_rank = blocks.sum(axis=0)
        starts = self._within_node(to_rank) + blocks[: self.local].sum(axis=0)
        return self._side(np.add.reduceat(to_rank, self._begin), starts, blocks[self.local])

    def _coming(self, received: Counts) -> _Side:
        blocks = received[self._order]  # [p, G]
        from_node = np.add.reduceat(blocks, self._begin, axis=0)  # [N, G]
        for_earlier = from_node[:, : self.local].sum(axis=1)
        mine = blocks[:, self.local]
        starts = self._within_node(mine) + np.repeat(for_earlier, self.sizes)
        return self._side(from_node.sum(axis=1), starts, mine)

    def _within_node(self, counts: Counts) -> Counts:
        """[p] how many there are before, in the same node."""
        before = counts.cumsum() - counts
        return before - np.repeat(before[self._begin], self.sizes)

    def _side(self, totals: Counts, starts: Counts, counts: Counts) -> _Side:
        by_rank = np.empty_like(counts)
        by_rank[self._order] = counts
        places = (by_rank.cumsum() - by_rank)[self._order]
        return _Side(totals, self.sizes, np.stack([starts, counts, places], axis=1), int(counts.sum()))
