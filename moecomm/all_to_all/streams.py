"""The rows that each pair of nodes exchanges, and the position of a rank's rows among them: arithmetic on counts.

A stream joins two nodes in one direction: the blocks from all ranks of one node to all ranks of the other, ordered by
destination, then by source. A rank's share of a stream is a list of pieces: (first row in the stream, number of rows,
first row in the rank's own array).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np

from moecomm._core import Transfer
from moecomm.arrays import Counts
from moecomm.nodes import Nodes

LINE_BYTES = 64
"""Of a cache line: chunks are a multiple of it, so that the copies of a chunk begin at a line."""


@dataclass(frozen=True, eq=False)
class NodeCounts:
    """The rows that the G ranks of one node send and receive.

    sent      [G, p] rows from each rank of the node to every rank
    received  [p, G] rows from every rank to each rank of the node
    longest   upper bound on the rows of any stream between any two nodes; the same on every rank
    """

    sent: Counts
    received: Counts
    longest: int
    transfers: dict[int, Transfer] = field(default_factory=dict)
    """The transfers of these counts that were made so far, by bytes per row."""

    @cached_property
    def reversed(self) -> NodeCounts:
        """The counts of the opposite direction."""
        return NodeCounts(self.received.T, self.sent.T, self.longest)


class _Side(NamedTuple):
    """One rank's share of all streams in one direction, as `Transfer` takes it. All numbers are rows."""

    totals: Counts
    """[N] length of each stream."""
    num_pieces: Counts
    """[N] pieces of this rank in each stream."""
    pieces: Counts
    """[sum(num_pieces), 3]"""
    num_rows: int
    """Length of the rank's own array."""


class Streams:
    """The streams from and to the node of `rank`."""

    def __init__(self, nodes: Nodes, rank: int) -> None:
        self.node = int(nodes.node_of[rank])
        self.local = int(nodes.local_rank[rank])
        self.sizes = nodes.sizes()
        self.num_local = int(self.sizes[self.node])
        # All ranks, node by node, and the first position of each node in that order.
        self._order = np.concatenate([np.array(node, np.int64) for node in nodes.ranks])
        self._begin = self.sizes.cumsum() - self.sizes
        # A report of counts has a section for each node: the counts for its ranks, then two numbers about the sender.
        self._section_sizes = self.sizes + 2
        self._section_begin = self._section_sizes.cumsum() - self._section_sizes
        self._report_size = int(self._section_sizes.sum())
        self._count_positions = np.empty_like(self._order)
        node_in_order = np.repeat(np.arange(len(self.sizes)), self.sizes)
        self._count_positions[self._order] = np.arange(len(self._order)) + 2 * node_in_order

    def transfer(self, counts: NodeCounts, row_bytes: int, chunk_bytes: int) -> Transfer:
        """The transfer of rows, in equal chunks of at most chunk_bytes, a multiple of LINE_BYTES."""
        sent = self._sent(counts.sent)
        received = self._received(counts.received)
        return self._chunked(sent, received, row_bytes, counts.longest * row_bytes, chunk_bytes)

    def transfer_of_reports(self, chunk_bytes: int) -> Transfer:
        """The transfer of the reports: each rank's whole report to its own node, one section to each other node.

        A row of this transfer is one number of 8 bytes. A stream has its sections ordered by source.
        """
        # The ranks of a node need all counts of each other: a leader's message sizes are sums over the node.
        lengths = self._section_sizes.copy()
        lengths[self.node] = self._report_size
        begin = self._section_begin.copy()
        begin[self.node] = 0
        num_pieces = np.ones_like(lengths)
        sent_pieces = np.stack([self.local * lengths, lengths, begin], axis=1)
        sent = _Side(self.num_local * lengths, num_pieces, sent_pieces, self._report_size)

        from_node = self.sizes * self._section_sizes[self.node]
        from_node[self.node] = self.num_local * self._report_size
        received_pieces = np.stack([np.zeros_like(from_node), from_node, from_node.cumsum() - from_node], axis=1)
        received = _Side(from_node, num_pieces, received_pieces, int(from_node.sum()))

        # The stream inside the largest node is the longest: a report is longer than any of its sections.
        longest = int(self.sizes.max()) * self._report_size
        return self._chunked(sent, received, 8, 8 * longest, chunk_bytes)

    def report(self, send_counts: Counts) -> Counts:
        """[p + 2 N] for each node: the counts for its ranks, this rank's most rows for any node, all its rows."""
        to_node = np.add.reduceat(send_counts[self._order], self._begin)
        section_end = self._section_begin + self.sizes
        report = np.empty(self._report_size, np.int64)
        report[self._count_positions] = send_counts
        report[section_end] = to_node.max()
        report[section_end + 1] = to_node.sum()
        return report

    def read_reports(self, numbers: Counts) -> tuple[NodeCounts, int]:
        """The counts of this node and the number of rows of all ranks together, from the reports received."""
        G, p = self.num_local, len(self._order)  # noqa: N806
        sent = np.empty((G, p), np.int64)
        received = np.empty((p, G), np.int64)
        longest = total = end = 0
        for node, size in enumerate(self.sizes.tolist()):
            begin = end
            end += size * (self._report_size if node == self.node else G + 2)
            sections = numbers[begin:end].reshape(size, -1)
            if node == self.node:
                sent = sections[:, self._count_positions]
                own = self._section_begin[node]
                sections = sections[:, own : own + G + 2]
            ranks = self._order[self._begin[node] : self._begin[node] + size]
            received[ranks] = sections[:, :G]
            # No rank of the node sends more to one node than its maximum, so no stream is longer than their sum.
            longest = max(longest, int(sections[:, G].sum()))
            total += int(sections[:, G + 1].sum())
        return NodeCounts(sent, received, longest), total

    def _chunked(self, sent: _Side, received: _Side, row_bytes: int, longest: int, most_bytes: int) -> Transfer:
        # All nodes cut their streams alike, by the longest of all: the leaders' messages then have matching sizes.
        num_chunks = -(-longest // most_bytes)
        num_lines = -(-longest // (LINE_BYTES * max(num_chunks, 1)))
        window = LINE_BYTES * max(num_lines, 1)
        return Transfer(*sent, *received, row_bytes, window, num_chunks)

    def _sent(self, counts: Counts) -> _Side:
        blocks = counts[:, self._order]
        to_rank = blocks.sum(axis=0)
        # In a stream, the blocks for earlier destinations come first, then those of earlier sources.
        starts = self._starts_in_node(to_rank) + blocks[: self.local].sum(axis=0)
        return self._side(np.add.reduceat(to_rank, self._begin), starts, blocks[self.local])

    def _received(self, counts: Counts) -> _Side:
        blocks = counts[self._order]
        from_node = np.add.reduceat(blocks, self._begin, axis=0)
        # In a stream, all blocks for the earlier ranks of this node come first.
        for_earlier = from_node[:, : self.local].sum(axis=1)
        from_rank = blocks[:, self.local]
        starts = self._starts_in_node(from_rank) + np.repeat(for_earlier, self.sizes)
        return self._side(from_node.sum(axis=1), starts, from_rank)

    def _starts_in_node(self, counts: Counts) -> Counts:
        """[p] sum of the counts of the earlier ranks of the same node; ranks in node order."""
        starts = counts.cumsum() - counts
        return starts - np.repeat(starts[self._begin], self.sizes)

    def _side(self, totals: Counts, starts: Counts, counts: Counts) -> _Side:
        # The rank's own array is ordered by rank; starts and counts are in node order.
        by_rank = np.empty_like(counts)
        by_rank[self._order] = counts
        own_starts = (by_rank.cumsum() - by_rank)[self._order]
        return _Side(totals, self.sizes, np.stack([starts, counts, own_starts], axis=1), int(counts.sum()))
