"""The cost model: every algorithm is a few steps, one after the other, and a step takes

    waiting + max(work, bytes that leave the node / node_bandwidth)

where work is that of the rank that has most or, if this is longer, of all ranks of the node spread over its cores.
Blocks are of one size, and nodes hold consecutive ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil, inf
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from moecomm.arrays import Counts
from moecomm.cost.links import Links
from moecomm.nodes import Nodes

Place = Nodes | tuple[int, int]
"""Nodes, or (number of ranks, ranks of a node): the last node is smaller where these do not divide the ranks."""
Work = NDArray[np.float64]
"""[messages inside the node, messages between nodes, bytes inside, bytes between, bytes copied, calls, wake-ups]"""

MOST_RANKS = 65536
CHUNK_BYTES = 1 << 16
"""The most that SharedAllToAll sends to another node in one message."""
SLOTS = 4
"""How many chunks have room in the memory that it shares."""


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
    waits: tuple[int, int] = (0, 0)
    """How many messages, inside and between, wait for each other, one after the other."""


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
    node_of = _node_of("predict", nodes, bytes_per_pair)
    return predict_group(links, node_of, np.arange(len(node_of)), bytes_per_pair)


def predict_group(links: Links, node_of: Counts, group: Counts, bytes_per_pair: float) -> dict[str, Cost]:
    """`predict` for an all-to-all in one group of ranks, while the other ranks do the same in groups like it.

    node_of  [p] the node of each rank
    group    its ranks
    """
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
    node_of = _node_of("predict_lanes", nodes, min(bytes_per_pair, answer_bytes))
    ranks = np.arange(len(node_of))
    if tensor < 1 or len(ranks) % tensor:
        raise ValueError(f"predict_lanes: tensor is {tensor!r}, expected a divisor of the {len(ranks)} ranks")
    gather = predict_group(links, node_of, ranks[:tensor], answer_bytes)["flat"]
    lane = predict_group(links, node_of, ranks[::tensor], bytes_per_pair)
    return {name: cost.then(gather) for name, cost in lane.items()}


def _node_of(call: str, nodes: Place, least_bytes: float) -> Counts:
    """[p] the node of each rank, after checking what callers gave."""
    p = nodes.world_size if isinstance(nodes, Nodes) else nodes[0]
    if not 1 <= p <= MOST_RANKS or (not isinstance(nodes, Nodes) and nodes[1] < 1):
        raise ValueError(f"{call}: nodes is {nodes!r}, expected 1 to {MOST_RANKS} ranks, at least 1 a node")
    if not 0 <= least_bytes < inf:
        raise ValueError(f"{call}: {least_bytes!r} bytes, expected a number >= 0")
    return nodes.node_of if isinstance(nodes, Nodes) else np.arange(p) // nodes[1]


# ---- from steps to seconds -------------------------------------------------------------------------------------------


def _cost(links: Links, sizes: Counts, block: float, algorithm: _Algorithm, groups_per_node: float) -> Cost:
    inside, between = links.inside, links.between
    prices = np.array([inside.message, between.message, 1 / inside.bandwidth, 1 / between.bandwidth])
    prices = np.append(prices, [1 / links.copy_bandwidth, links.call, links.wake])
    different = np.unique(sizes).tolist()
    per_size = [algorithm.steps(links, sizes, size, block) for size in different]
    parts = np.zeros(4)
    for alike in zip(*per_size, strict=True):
        parts += max((_parts(links, prices, step, groups_per_node) for step in alike), key=np.sum)
    sent = np.max([np.sum([step.rank[:4] for step in steps], axis=0) for steps in per_size], axis=0).tolist()
    return Cost(
        (round(sent[0]), round(sent[1])),
        (sent[2], sent[3]),
        float(parts.sum()),
        dict(zip(("inside", "between", "copy", "call"), parts.tolist(), strict=True)),
        max(algorithm.staging(sizes, size, block) for size in different),
    )


def _parts(links: Links, prices: Work, step: _Step, groups_per_node: float) -> Work:
    """Seconds for messages inside, messages between nodes, copies, and calls with wake-ups."""
    work = max(step.rank * prices, step.node * prices * groups_per_node / links.cores_per_node, key=np.sum)
    network = step.node[3] * groups_per_node / links.node_bandwidth
    return np.array([
        work[0] + work[2] + step.waits[0] * links.inside.latency,
        work[1] + work[3] + step.waits[1] * links.between.latency + max(0.0, network - work.sum()),
        work[4],
        work[5] + work[6],
    ])  # fmt: skip


# ---- the algorithms --------------------------------------------------------------------------------------------------


def _work(
    messages: tuple[float, float] = (0, 0),
    moved: tuple[float, float] = (0, 0),
    copied: float = 0,
    calls: float = 0,
    wakes: float = 0,
) -> Work:
    return np.array([*messages, *moved, copied, calls, wakes], float)


def _all_copy(size: int, copied: float) -> _Step:
    return _Step(_work(copied=copied), size * _work(copied=copied))


def _flat(links: Links, sizes: Counts, size: int, block: float) -> list[_Step]:
    peers = size - 1, int(sizes.sum()) - size
    work = _work(peers, (peers[0] * block, peers[1] * block), copied=block, calls=1)
    return [_Step(work, size * work, _last_wait(*peers))]


def _last_wait(inside: float, between: float) -> tuple[int, int]:
    """Messages that are under way together: one of them is waited for."""
    return (0, 1) if between else (1 if inside else 0, 0)


def _library(links: Links, sizes: Counts, size: int, block: float) -> list[_Step]:
    return (_bruck if _combines(links, int(sizes.sum()), block) else _flat)(links, sizes, size, block)


def _combines(links: Links, num_ranks: int, block: float) -> bool:
    return num_ranks >= FEWEST_COMBINED and block < links.combine_below


def _bruck(_: Links, sizes: Counts, size: int, block: float) -> list[_Step]:
    """In round k each rank sends to the one 2**k further all blocks whose way has this bit set."""
    p = int(sizes.sum())
    numbers = np.arange(p)
    rank = node = _work(copied=2 * p * block, calls=1)  # the blocks are rotated before and put in order at the end
    node = size * rank
    for bit in range((p - 1).bit_length()):
        moved = int((numbers >> bit & 1).sum()) * block
        leaving = min(size, 1 << bit, p - (1 << bit)) if size < p else 0
        rank = rank + (_work((0, 1), (0, moved), 2 * moved) if leaving else _work((1, 0), (moved, 0), 2 * moved))
        node = node + _work((size - leaving, leaving), ((size - leaving) * moved, leaving * moved), size * 2 * moved)
    rounds = (p - 1).bit_length()
    return [_Step(rank, node, (0, rounds) if size < p else (rounds, 0))]


def _hierarchical(links: Links, sizes: Counts, size: int, block: float) -> list[_Step]:
    p, num_nodes = int(sizes.sum()), len(sizes)
    if num_nodes == 1 or sizes.max() == 1:
        return _library(links, sizes, size, block)
    if sizes.min() == sizes.max():
        one = _library(links, np.array([size]), size, block * num_nodes)[0]
        two = _library(links, np.ones(num_nodes, np.int64), 1, block * size)[0]
        hops = [one, two._replace(node=size * two.node)]
    else:
        hops = _uneven_hops(sizes, size, block)
    return [_all_copy(size, p * block), hops[0], _all_copy(size, p * block), hops[1]]


def _uneven_hops(sizes: Counts, size: int, block: float) -> list[_Step]:
    """Local rank i forwards to the local ranks i, i + size, ... of each node: the first to most, the last to fewest."""
    p = int(sizes.sum())
    most, fewest = int(np.ceil(sizes / size).sum()), int((sizes // size).sum())
    one = _work((size - 1, 0), ((p - fewest) * block, 0), calls=1)
    all_one = _work((size * (size - 1), 0), ((size - 1) * p * block, 0), calls=size)
    two = _work((0, most - 1), (0, (most - 1) * size * block), calls=1)
    all_two = _work((0, p - size), (0, (p - size) * size * block), calls=size)
    return [_Step(one, all_one, _last_wait(size - 1, 0)), _Step(two, all_two, (0, 1))]


def _shared(_: Links, sizes: Counts, size: int, block: float) -> list[_Step]:
    """Two exchanges are under way at a time; the first chunk is copied in before them, the last one out after them."""
    p, num_nodes = int(sizes.sum()), len(sizes)
    chunks = max(1, ceil(int(sizes.max()) ** 2 * block / CHUNK_BYTES))
    copied = p * block / chunks
    messages, moved = (0, (num_nodes - 1) * chunks), (0, size * (p - size) * block)
    leader = _work(messages, moved, 2 * (p * block - copied), 1, 2 * chunks)
    node = _work(messages, moved, size * 2 * (p * block - copied), size, size * 2 * chunks)
    waits = (0, ceil(chunks / 2)) if num_nodes > 1 else (0, 0)
    return [_all_copy(size, copied), _Step(leader, node, waits), _all_copy(size, copied)]


def _no_staging(_sizes: Counts, _size: int, _block: float) -> float:
    return 0


def _one_buffer(sizes: Counts, _: int, block: float) -> float:
    return float(sizes.sum() * block)


def _slots(sizes: Counts, size: int, block: float) -> float:
    return SLOTS * (2 * len(sizes) - 1) * min(CHUNK_BYTES, int(sizes.max()) ** 2 * block) / size


FEWEST_COMBINED = 8
"""Ranks from which on a library combines small blocks."""
ALGORITHMS = {
    "flat": _Algorithm(_flat, _no_staging),
    "library": _Algorithm(_library, _no_staging),
    "hierarchical": _Algorithm(_hierarchical, _one_buffer),
    "shared": _Algorithm(_shared, _slots),
}
