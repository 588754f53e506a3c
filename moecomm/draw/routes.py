"""Which rank sends what to which in the hierarchical all-to-all: plain arithmetic on the nodes."""

from __future__ import annotations

from typing import Any

import numpy as np

from moecomm.arrays import Counts
from moecomm.nodes import Nodes

Arrow = tuple[int, int]
"""(sending rank, receiving rank)"""


def forwarders(nodes: Nodes) -> Counts:
    """The rank of the source's node that a row passes through.

    returns  [source, destination]  local rank l mod (size of the source's node), where l is the destination's; the
             destination itself if it is on the source's node
    """
    ranks = [np.array(group, np.int64)[nodes.local_rank % len(group)] for group in nodes.ranks]
    return np.stack([ranks[node] for node in nodes.node_of])


def hop_traffic(nodes: Nodes, counts: Any = None) -> tuple[Counts, Counts]:
    """The rows that go from rank to rank directly, in each hop of the hierarchical all-to-all.

    counts   [p, p]  rows from each source to each destination; None: one for each pair
    returns  [p, p] for hop one, inside nodes, and [p, p] for hop two, between nodes; [sender, receiver]. Rows that stay
             on their rank are not traffic: the diagonals are 0

    Raises ValueError if counts are not p x p whole numbers >= 0.
    """
    rows = row_counts(nodes, counts)
    source, destination = np.indices(rows.shape)
    via = forwarders(nodes)
    hop_one, hop_two = np.zeros_like(rows), np.zeros_like(rows)
    np.add.at(hop_one, (source, via), rows)
    np.add.at(hop_two, (via, destination), rows)
    np.fill_diagonal(hop_one, 0)
    np.fill_diagonal(hop_two, 0)
    return hop_one, hop_two


def hop_arrows(nodes: Nodes, source: int) -> tuple[list[Arrow], list[Arrow]]:
    """The messages of hop one and of hop two that carry rows of `source`, if it has rows for every rank."""
    counts = np.zeros((nodes.world_size, nodes.world_size), np.int64)
    counts[source] = 1
    hop_one, hop_two = ([(int(s), int(d)) for s, d in np.argwhere(hop)] for hop in hop_traffic(nodes, counts))
    return hop_one, hop_two


def num_messages(nodes: Nodes, rank: int) -> tuple[int, int, int, int]:
    """How many messages `rank` sends: flat inside its node and between nodes, hop one, hop two."""
    same_node = int(nodes.same_node(rank).sum())
    hop_one, hop_two = hop_traffic(nodes)
    return same_node - 1, nodes.world_size - same_node, int((hop_one[rank] > 0).sum()), int((hop_two[rank] > 0).sum())


def row_counts(nodes: Nodes, counts: Any = None) -> Counts:
    """`counts` as int64 [p, p]; None: one row for each pair. Raises ValueError if they are something else."""
    p = nodes.world_size
    if counts is None:
        return np.ones((p, p), np.int64)
    array = np.asarray(counts)
    if array.shape != (p, p) or array.dtype.kind not in "iu" or (array < 0).any():
        raise ValueError(f"counts is {array.dtype} {array.shape}, expected ({p}, {p}) whole numbers >= 0 for {p} ranks")
    return array.astype(np.int64)
