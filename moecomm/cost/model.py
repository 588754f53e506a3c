"""The cost model: every algorithm is a few steps, one after the other, and a step takes

    latency + sqrt(work^2 + network^2)

work     that of the rank that has most or, if this is longer, of all ranks of the node spread over its cores
network  bytes that leave the node / node_bandwidth. It overlaps the work in part: neither their sum nor the longer one

Blocks are of one size, and nodes hold consecutive ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil, hypot, inf
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from moecomm.arrays import Counts
from moecomm.cost.links import Links
from moecomm.nodes import Nodes
from moecomm.shared_memory import NUM_SLOTS, chunk_bytes

Place = Nodes | tuple[int, int]
"""Nodes, or (number of ranks, ranks of a node): the last node is smaller where these do not divide the ranks."""
Work = NDArray[np.float64]
"""Messages inside the node and between nodes, bytes inside and between, times that messages inside and between are
waited for, bytes copied, starts, wake-ups."""

MOST_RANKS = 65536


@dataclass(frozen=True)
class Cost:
    """What one call costs.

    messages, bytes  (inside the node, between nodes) of the rank that sends most
    seconds          from start to end
    parts            which sum to the seconds: "inside" and "between" (messages, bytes and waiting of that class of
                     links), "copy" (in memory), "call" (entering calls, waking ranks)
    staging          bytes of memory beside input and output, of a rank; of memory that a node shares, a rank's part
    """

    messages: tuple[int, int]
    bytes: tuple[float, float]
    seconds: float
    parts: dict[str, float]
    staging: float

    def then(self, other: Cost) -> Cost:
        """Both calls, one after the other."""
        parts = {name: seconds + other.parts[name] for name, seconds in self.parts.items()}
        messages = self.messages[0] + other.messages[0], self.messages[1] + other.messages[1]
        moved = self.bytes[0] + other.bytes[0], self.bytes[1] + other.bytes[1]
        return Cost(messages, moved, self.seconds + other.seconds, parts, max(self.staging, other.staging))


class _Step(NamedTuple):
    rank: Work
    """Of the rank that has most."""
    node: Work
    """Of all ranks of its node."""


class _Algorithm(NamedTuple):
    steps: Callable[[Links, Counts, int, float], list[_Step]]
    """Of a rank, from the sizes of all nodes, the size of its own and the bytes a pair."""
    staging: Callable[[Counts, int, float], float]


def predict(links: Links, nodes: Place, bytes_per_pair: float) -> dict[str, Cost]:
    """The cost of one all-to-all by each algorithm. The same on every rank that gives the same arguments.

    nodes           Nodes, or (number of ranks, ranks of a node); at most 65,536 ranks
    bytes_per_pair  what a rank has for each other, on average
    returns         "flat"          p - 1 messages a rank: FlatAllToAll, uneven form
                    "library"       FlatAllToAll, even form: the same, or Bruck's algorithm for small blocks
                    "hierarchical"  HierarchicalAllToAll, whose hops are "library"
                    "shared"        SharedAllToAll: memory inside the node, one message for each chunk between nodes

    Raises ValueError for arguments that cannot be.
    """
    node_of = _node_of(nodes)
    return predict_group(links, node_of, np.arange(len(node_of)), bytes_per_pair)


def predict_group(links: Links, node_of: Counts, group: Counts, bytes_per_pair: float) -> dict[str, Cost]:
    """`predict` for an all-to-all in one group of ranks, while the other ranks do the same in groups like it.

    node_of  [p] the node of each rank
    group    its ranks

    Raises ValueError for more than 65,536 ranks, or bytes that are negative or not finite.
    """
    if len(node_of) > MOST_RANKS:
        raise ValueError(f"predict_group: node_of has {len(node_of)} ranks, expected at most {MOST_RANKS}")
    if not 0 <= bytes_per_pair < inf:
        raise ValueError(f"predict_group: bytes_per_pair is {bytes_per_pair!r}, expected a number >= 0")
    here, all_ranks = np.bincount(node_of[group]), np.bincount(node_of)
    at = np.flatnonzero(here)
    groups_per_node = float((all_ranks[at] / here[at]).max())  # they share the node's cores and its network
    return {
        name: _cost(links, here[at], bytes_per_pair, algorithm, groups_per_node)
        for name, algorithm in ALGORITHMS.items()
    }


def predict_lanes(
    links: Links, nodes: Place, tensor: int, bytes_per_pair: float, answer_bytes: float
) -> dict[str, Cost]:
    """The lane-restricted exchange: an all-to-all on each lane, by each algorithm, then an all-gather of the answers.

    tensor          L, how many consecutive ranks hold the same tokens
    bytes_per_pair  what a rank has for each of the p/L ranks of its lane
    answer_bytes    what it then has for each of the L - 1 others that hold its tokens
    returns         as `predict`

    Raises ValueError for arguments that cannot be.
    """
    node_of = _node_of(nodes)
    ranks = np.arange(len(node_of))
    if tensor < 1 or len(ranks) % tensor:
        raise ValueError(f"predict_lanes: tensor is {tensor!r}, expected a divisor of the {len(ranks)} ranks")
    on_lane = predict_group(links, node_of, ranks[::tensor], bytes_per_pair)
    if tensor == 1 or answer_bytes == 0:
        return on_lane
    gather = predict_group(links, node_of, ranks[:tensor], answer_bytes)["flat"]
    return {name: cost.then(gather) for name, cost in on_lane.items()}


def _node_of(nodes: Place) -> Counts:
    """[p] the node of each rank."""
    if isinstance(nodes, Nodes):
        return nodes.node_of
    if min(nodes) < 1:
        raise ValueError(f"predict: nodes is {nodes!r}, expected at least 1 rank, and 1 a node")
    return np.arange(nodes[0]) // nodes[1]


# ---- from steps to seconds -------------------------------------------------------------------------------------------


def _cost(links: Links, sizes: Counts, block: float, algorithm: _Algorithm, groups_per_node: float) -> Cost:
    different = np.unique(sizes).tolist()
    per_size = [[_all_alike(size, _work(starts=1)), *algorithm.steps(links, sizes, size, block)] for size in different]
    parts = np.zeros(4)
    for alike in zip(*per_size, strict=True):
        parts += max((_parts(links, step, groups_per_node) for step in alike), key=np.sum)
    sent = np.max([np.sum([step.rank[:4] for step in steps], axis=0) for steps in per_size], axis=0).tolist()
    return Cost(
        (round(sent[0]), round(sent[1])),
        (sent[2], sent[3]),
        float(parts.sum()),
        dict(zip(("inside", "between", "copy", "call"), parts.tolist(), strict=True)),
        max(algorithm.staging(sizes, size, block) for size in different),
    )


def _parts(links: Links, step: _Step, groups_per_node: float) -> Work:
    """Seconds for messages inside, messages between nodes, copies, and starts with wake-ups."""
    share = groups_per_node / links.cores_per_node
    work = max(_priced(links, step.rank), share * _priced(links, step.node), key=np.sum)
    network = step.node[3] * groups_per_node / links.node_bandwidth
    latency = step.rank[4:6] * (links.inside.latency, links.between.latency)
    between = latency[1] + hypot(work.sum(), network) - work.sum()
    return work + np.array([latency[0], between, 0, 0])


def _priced(links: Links, work: Work) -> Work:
    """Seconds of work inside, between, for copies and for starts. What fits into buffers is moved for nothing."""
    both = (links.inside, links.between)
    messages, waits = [link.message for link in both], [link.wait for link in both]
    moved = np.maximum(work[2:4] - work[0:2] * [link.buffered for link in both], 0)
    over_links = work[0:2] * messages + moved / [link.bandwidth for link in both] + work[4:6] * waits
    return np.array([*over_links, work[6] / links.copy_bandwidth, work[7] * links.start + work[8] * links.wake])


# ---- the algorithms --------------------------------------------------------------------------------------------------


def _work(
    messages: tuple[float, float] = (0, 0),
    moved: tuple[float, float] = (0, 0),
    waits: tuple[float, float] = (0, 0),
    copied: float = 0,
    starts: float = 0,
    wakes: float = 0,
) -> Work:
    return np.array([*messages, *moved, *waits, copied, starts, wakes], float)


def _all_alike(size: int, rank: Work) -> _Step:
    return _Step(rank, size * rank)


def _flat(_: Links, sizes: Counts, size: int, block: float) -> list[_Step]:
    peers = size - 1, int(sizes.sum()) - size
    moved = peers[0] * block, peers[1] * block
    return [_all_alike(size, _work(peers, moved, _one_wait(*peers), copied=block))]


def _one_wait(inside: float, between: float) -> tuple[float, float]:
    """All messages are under way together; those between nodes take longer."""
    return (0, 1) if between else (1 if inside else 0, 0)


def _library(links: Links, sizes: Counts, size: int, block: float) -> list[_Step]:
    combines = sizes.sum() >= FEWEST_COMBINED and block < links.combine_below
    return (_bruck if combines else _flat)(links, sizes, size, block)


def _bruck(_: Links, sizes: Counts, size: int, block: float) -> list[_Step]:
    """In round k each rank sends to the one 2^k further all blocks whose way has this bit set."""
    p = int(sizes.sum())
    way = np.arange(p)
    rank = _work(copied=2 * p * block)  # the blocks are rotated before, and put in order at the end
    node = size * rank
    for bit in range((p - 1).bit_length()):
        moved = int((way >> bit & 1).sum()) * block
        leaving = min(size, 1 << bit, p - (1 << bit)) if size < p else 0
        one_inside = _work((1, 0), (moved, 0), (1, 0), copied=2 * moved)
        one_between = _work((0, 1), (0, moved), (0, 1), copied=2 * moved)
        rank = rank + (one_between if leaving else one_inside)
        node = node + leaving * one_between + (size - leaving) * one_inside
    return [_Step(rank, node)]


def _hierarchical(links: Links, sizes: Counts, size: int, block: float) -> list[_Step]:
    p, num_nodes = int(sizes.sum()), len(sizes)
    if num_nodes == 1 or sizes.max() == 1:
        return _library(links, sizes, size, block)
    if sizes.min() == sizes.max():
        one = _library(links, np.array([size]), size, block * num_nodes)[0]
        two = _library(links, np.ones(num_nodes, np.int64), 1, block * size)[0]
        two = two._replace(node=size * two.node)
    else:
        one, two = _uneven_hops(sizes, size, block)
    transform = _all_alike(size, _work(copied=p * block))
    second_call = _all_alike(size, _work(copied=p * block, starts=1))
    return [transform, one, second_call, two]


def _uneven_hops(sizes: Counts, size: int, block: float) -> tuple[_Step, _Step]:
    """Local rank i forwards to the local ranks i, i + size, ... of each node: the first to most, the last to fewest."""
    p = int(sizes.sum())
    most, fewest = int(np.ceil(sizes / size).sum()), int((sizes // size).sum())
    waits = _one_wait(size - 1, 0)
    one = _work((size - 1, 0), ((p - fewest) * block if size > 1 else 0, 0), waits)
    ones = _work((size - 1, 0), (p * (size - 1) / size * block, 0), waits)
    two = _work((0, most - 1), (0, (most - 1) * size * block), (0, 1))
    twos = _work((0, (p - size) / size), (0, (p - size) * block), (0, 1))
    return _Step(one, size * ones), _Step(two, size * twos)


def _shared(_: Links, sizes: Counts, size: int, block: float) -> list[_Step]:
    """Two exchanges are under way at a time; the first chunk is copied in before them, the last one out after them."""
    p, num_nodes = int(sizes.sum()), len(sizes)
    chunks = max(1, ceil(int(sizes.max()) ** 2 * block / chunk_bytes(num_nodes)))
    every = _work(copied=2 * p * block * (1 - 1 / chunks), wakes=2 * chunks)
    leader = _work()
    if num_nodes > 1:
        moved = size * (p - size) * block
        leader = _work((0, (num_nodes - 1) * chunks), (0, moved), (0, ceil(chunks / 2)))
    first_or_last = _all_alike(size, _work(copied=p * block / chunks))
    return [first_or_last, _Step(every + leader, size * every + leader), first_or_last]


def _no_staging(_sizes: Counts, _size: int, _block: float) -> float:
    return 0


def _one_buffer(sizes: Counts, _: int, block: float) -> float:
    has_two_hops = len(sizes) > 1 and sizes.max() > 1
    return float(sizes.sum() * block) if has_two_hops else 0


def _slots(sizes: Counts, size: int, _: float) -> float:
    return NUM_SLOTS * (2 * len(sizes) - 1) * chunk_bytes(len(sizes)) / size


FEWEST_COMBINED = 8
"""Ranks from which on a library combines small blocks."""
ALGORITHMS = {
    "flat": _Algorithm(_flat, _no_staging),
    "library": _Algorithm(_library, _no_staging),
    "hierarchical": _Algorithm(_hierarchical, _one_buffer),
    "shared": _Algorithm(_shared, _slots),
}
