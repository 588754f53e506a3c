"""The cost model: every algorithm is a few steps, one after the other, and a step takes

    latency + sqrt(work^2 + network^2)

work     that of the rank that has most or, if this is longer, of all ranks of the node spread over its cores
network  bytes that leave the node / node_bandwidth. It overlaps the work in part: neither their sum nor the longer one

Steps of two hops overlap where rows go in several pieces: links inside nodes and links between nodes work side by side.

Blocks are of one size, and nodes hold consecutive ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from math import ceil, hypot, inf
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from moecomm.arrays import Counts
from moecomm.cost.links import Links
from moecomm.nodes import Nodes
from moecomm.shared_memory import NUM_SLOTS, chunk_bytes

NodesLike = Nodes | tuple[int, int]
"""Nodes, or (number of ranks, ranks of a node): the last node is smaller where these do not divide the ranks."""
Work = NDArray[np.float64]
"""Messages, bytes and waits for messages inside the node, the same between nodes, bytes copied, starts, wake-ups."""

# An array, because work is added, scaled by ranks and compared. These are its columns.
MESSAGES = [0, 3]
BYTES = [1, 4]
WAITS = [2, 5]
COPIED = 6
STARTS = 7
WAKES = 8
PARTS = ("inside", "between", "copy", "call")

MOST_RANKS = 65536
FEWEST_COMBINED = 8
"""Ranks from which on a library combines small blocks."""


@dataclass(frozen=True)
class Cost:
    """What one call costs.

    messages, bytes  (inside the node, between nodes) of the rank that sends most
    seconds          from start to end
    parts            the terms of the seconds: "inside" and "between" (messages, bytes and waiting of that class of
                     links), "copy" (in memory), "call" (entering calls, waking ranks)
    staging          bytes of memory beside input and output, of a rank; of memory that a node shares, its share
    """

    messages: tuple[int, int]
    bytes: tuple[float, float]
    seconds: float
    parts: dict[str, float]
    staging: float

    def then(self, cost: Cost) -> Cost:
        """This call and then that of `cost`."""
        inside, between = self.messages
        inside_bytes, between_bytes = self.bytes
        return Cost(
            messages=(inside + cost.messages[0], between + cost.messages[1]),
            bytes=(inside_bytes + cost.bytes[0], between_bytes + cost.bytes[1]),
            seconds=self.seconds + cost.seconds,
            parts={name: seconds + cost.parts[name] for name, seconds in self.parts.items()},
            # The first call frees its memory before the second needs any.
            staging=max(self.staging, cost.staging),
        )

    def beside(self, cost: Cost) -> Cost:
        """This call and that of `cost`, on ranks of their own at the same time: all wait for the longer one."""
        inside, between = self.messages
        inside_bytes, between_bytes = self.bytes
        longer = self if self.seconds >= cost.seconds else cost
        return Cost(
            messages=(max(inside, cost.messages[0]), max(between, cost.messages[1])),
            bytes=(max(inside_bytes, cost.bytes[0]), max(between_bytes, cost.bytes[1])),
            seconds=longer.seconds,
            parts=longer.parts,
            staging=max(self.staging, cost.staging),
        )


class _Step(NamedTuple):
    """What ranks do until they wait for one another.

    rank     work of the rank that has most
    node     work of all ranks of its node
    staging  bytes of memory of a rank
    hop      steps of hop 2 overlap those of hop 1 of the next piece, where there are several
    """

    rank: Work
    node: Work
    staging: float = 0
    hop: int = 1


class Tokens(NamedTuple):
    """Tokens of a rank whose experts are drawn at random, without repetitions."""

    number: float
    row_bytes: float
    top_k: int
    num_experts: int

    def needing(self, num_held: int) -> float:
        """How many need any of so many experts, on average."""
        avoided = 1.0
        for i in range(self.top_k):
            remaining = self.num_experts - i
            avoided *= max(remaining - num_held, 0) / remaining
        return self.number * (1 - avoided)


_Algorithm = Callable[[Links, Counts, int, float], list[_Step]]
"""Links, the sizes of all nodes, the size of one of them and the bytes a pair -> the steps of a rank on that node."""


def predict(links: Links, nodes: NodesLike, bytes_per_pair: float, *, chunks: int = 1) -> dict[str, Cost]:
    """The cost of one all-to-all by each algorithm. The same on all ranks that give the same arguments.

    nodes           Nodes, or (number of ranks, ranks of a node); at most 65,536 ranks
    bytes_per_pair  what a rank sends to each of the ranks, on average
    chunks          pieces in which "hierarchical" sends: hop one of a piece runs while hop two of the piece before it
                    does. Of the two classes of links the shorter time is hidden; calls and copies are not
    returns         "flat"          p - 1 messages a rank: FlatAllToAll, uneven form
                    "library"       FlatAllToAll, even form: the same, or Bruck's algorithm for small blocks
                    "hierarchical"  HierarchicalAllToAll, whose hops are "library"
                    "shared"        SharedAllToAll: memory inside the node, one message for each chunk between nodes

    Raises ValueError for less than 1 rank or more than 65,536, less than 1 chunk, and for bytes that are negative or
    not finite.
    """
    node_of = _node_of(nodes)
    return predict_groups(links, node_of, np.arange(len(node_of))[None], bytes_per_pair, chunks=chunks)


def predict_groups(
    links: Links, node_of: Counts, groups: Counts, bytes_per_pair: float, *, chunks: int = 1
) -> dict[str, Cost]:
    """`predict` for all-to-alls in groups of ranks, all at once: the cost of the group that takes longest.

    node_of  [p] the node of each rank
    groups   [groups, ranks of a group]; ranks that are in none of them do the same in groups like these

    Messages and bytes are those of the rank that sends most in any of the groups, staging that of the rank that needs
    most.
    Raises ValueError for more than 65,536 ranks, less than 1 chunk, or bytes that are negative or not finite.
    """
    if len(node_of) > MOST_RANKS:
        raise ValueError(f"predict_groups: node_of has {len(node_of)} ranks, expected at most {MOST_RANKS}")
    if not 0 <= bytes_per_pair < inf:
        raise ValueError(f"predict_groups: bytes_per_pair is {bytes_per_pair!r}, expected a number >= 0")
    return _of_groups(links, node_of, groups, bytes_per_pair, ALGORITHMS, chunks)


def predict_relayed(links: Links, node_of: Counts, groups: Counts, tokens: Tokens, *, chunks: int = 1) -> Cost:
    """One dispatch, or one combine, of HierarchicalExchange in groups of ranks, all at once.

    A token crosses the network once for each node that holds any of its experts; its relay there passes it on. What
    travels with the rows is left out: 4 bytes for each weight and assignment.

    links, node_of, groups  as for `predict_groups`
    tokens                  of each rank; the experts are spread evenly over the ranks of a group
    chunks                  pieces: hop two of one runs while hop one of the next does

    Raises ValueError for experts that the ranks of a group cannot share evenly, or less than 1 chunk.
    """
    size = groups.shape[1]
    if tokens.num_experts % size:
        raise ValueError(f"predict_relayed: {tokens.num_experts} experts, which groups of {size} ranks cannot share")
    algorithm = partial(_relayed, tokens)
    return _of_groups(links, node_of, groups, 1.0, {"relayed": algorithm}, chunks)["relayed"]


def _of_groups(
    links: Links, node_of: Counts, groups: Counts, block: float, algorithms: Mapping[str, _Algorithm], chunks: int
) -> dict[str, Cost]:
    if chunks < 1:
        raise ValueError(f"predict: chunks is {chunks!r}, expected at least 1")
    ranks_of_node = np.bincount(node_of)
    costs: dict[str, Cost] = {}
    for occupied in _kinds(node_of[groups], ranks_of_node):
        sizes = np.bincount(occupied)
        occupied = np.flatnonzero(sizes)
        sizes = sizes[occupied]
        # Groups on one node share its cores and its network. The node with most of them decides.
        groups_per_node = float((ranks_of_node[occupied] / sizes).max())
        for name, algorithm in algorithms.items():
            pieces = chunks if name in IN_PIECES else 1
            cost = _cost(links, sizes, block, algorithm, groups_per_node, pieces)
            costs[name] = cost.beside(costs[name]) if name in costs else cost
    return costs


def _kinds(node: Counts, ranks_of_node: Counts) -> Iterator[Counts]:
    """Of groups [groups, ranks of a group], given as the node of each rank, one for each way to lie on the nodes."""
    # Whole worlds repeat a few patterns: the number of loops is small, whatever the number of groups.
    pattern = node - node[:, :1]
    # Nodes of different sizes have different room for other groups.
    if ranks_of_node.min() < ranks_of_node.max():
        sizes = ranks_of_node[node]
        pattern = np.concatenate([pattern, sizes], axis=1)
    while len(node):
        yield node[0]
        differs = (pattern != pattern[0]).any(axis=1)
        node = node[differs]
        pattern = pattern[differs]


def predict_lanes(
    links: Links, nodes: NodesLike, tensor: int, bytes_per_pair: float, answer_bytes: float
) -> dict[str, Cost]:
    """The lane-restricted exchange: an all-to-all on each lane, by each algorithm, then an all-gather of the answers.

    tensor          L, how many consecutive ranks hold the same tokens
    bytes_per_pair  what a rank sends to each of the p/L ranks of its lane
    answer_bytes    what it then sends to each of the L - 1 other ranks that hold its tokens
    returns         as `predict`

    Raises ValueError for a tensor size that does not divide the ranks, and what `predict` raises.
    """
    node_of = _node_of(nodes)
    if tensor < 1 or len(node_of) % tensor:
        raise ValueError(f"predict_lanes: tensor is {tensor!r}, expected a divisor of the {len(node_of)} ranks")
    tensor_groups = np.arange(len(node_of)).reshape(-1, tensor)
    costs = predict_groups(links, node_of, tensor_groups.T, bytes_per_pair)
    if tensor == 1 or answer_bytes == 0:
        return costs
    gather = predict_groups(links, node_of, tensor_groups, answer_bytes)["flat"]
    return {name: cost.then(gather) for name, cost in costs.items()}


def _node_of(nodes: NodesLike) -> Counts:
    """[p] the node of each rank."""
    if isinstance(nodes, Nodes):
        return nodes.node_of
    # Counts of ranks are enough for regular nodes: no Nodes of 65,536 ranks has to be built and sorted.
    if min(nodes) < 1:
        raise ValueError(f"predict: nodes is {nodes!r}, expected at least 1 rank, and 1 a node")
    num_ranks, ranks_per_node = nodes
    return np.arange(num_ranks) // ranks_per_node


# ---- from steps to seconds -------------------------------------------------------------------------------------------


def _cost(
    links: Links, sizes: Counts, block: float, algorithm: _Algorithm, groups_per_node: float, chunks: int = 1
) -> Cost:
    # Ranks on nodes of the same size do the same work, so one list of steps for each size stands for all ranks.
    # plain integers: products of numpy's int64 would overflow for large blocks
    lists = [algorithm(links, sizes, size, block / chunks) for size in np.unique(sizes).tolist()]
    enter = _work(starts=1)
    entering = _Step(enter, int(sizes.max()) * enter)
    of_hops = np.zeros((2, len(PARTS)))
    for steps in zip(*lists, strict=True):
        # All ranks wait for the slowest node before the next step.
        slowest = max(
            (_seconds(links, step, groups_per_node) for step in steps),
            key=np.sum,
        )
        of_hops[steps[0].hop - 1] += slowest
    seconds = _seconds(links, entering, groups_per_node)
    seconds += of_hops.sum(axis=0)
    # While two pieces are under way their hops overlap, at all times but at the ends.
    seconds += (chunks - 1) * _overlapped(of_hops)
    totals = [np.sum([step.rank for step in steps], axis=0) for steps in lists]
    sent = chunks * np.max(totals, axis=0)
    inside, between = sent[MESSAGES]
    staging = max(step.staging for steps in lists for step in steps)
    return Cost(
        messages=(round(inside), round(between)),
        bytes=tuple(sent[BYTES].tolist()),
        seconds=float(seconds.sum()),
        parts=dict(zip(PARTS, seconds.tolist(), strict=True)),
        # Of two pieces at a time.
        staging=min(chunks, 2) * staging,
    )


def _overlapped(of_hops: Work) -> Work:
    """[2, PARTS] of each hop -> [PARTS] of the two at once: the two classes of links work side by side."""
    seconds: Work = of_hops.sum(axis=0)
    inside_and_between = seconds[:2]
    shorter = int(np.argmin(inside_and_between))
    seconds[shorter] = 0
    return seconds


def _seconds(links: Links, step: _Step, groups_per_node: float) -> Work:
    """[PARTS] seconds of one step."""
    share = groups_per_node / links.cores_per_node
    work = max(
        _core_seconds(links, step.rank),
        share * _core_seconds(links, step.node),
        key=np.sum,
    )
    waits_inside, waits_between = step.rank[WAITS]
    _, leaving = step.node[BYTES]
    network = leaving * groups_per_node / links.node_bandwidth
    # What the network adds to the work is time on links between nodes.
    added = hypot(work.sum(), network) - work.sum()
    inside = waits_inside * links.inside.latency
    between = waits_between * links.between.latency + added
    return work + np.array([inside, between, 0, 0])


def _core_seconds(links: Links, work: Work) -> Work:
    """[PARTS] seconds of a core for this work."""
    classes = (links.inside, links.between)
    # What fits into buffers is moved with the message.
    buffered = work[MESSAGES] * [link.buffered for link in classes]
    moved = np.maximum(work[BYTES] - buffered, 0)
    over_links = (
        work[MESSAGES] * [link.message for link in classes]
        + moved / [link.bandwidth for link in classes]
        + work[WAITS] * [link.wait for link in classes]
    )
    copy = work[COPIED] / links.copy_bandwidth
    call = work[STARTS] * links.start + work[WAKES] * links.wake
    return np.array([*over_links, copy, call])


# ---- the algorithms --------------------------------------------------------------------------------------------------


def _work(
    inside: tuple[float, float, float] = (0, 0, 0),
    between: tuple[float, float, float] = (0, 0, 0),
    copied: float = 0,
    starts: float = 0,
    wakes: float = 0,
) -> Work:
    """Work from its columns. inside, between: messages, bytes, waits."""
    return np.array([*inside, *between, copied, starts, wakes], float)


def _flat(_: Links, sizes: Counts, size: int, block: float) -> list[_Step]:
    inside = size - 1
    between = int(sizes.sum()) - size
    # All messages are under way together, so the rank waits once: for those between nodes, which take longer.
    wait_between = min(between, 1)
    wait_inside = min(inside, 1 - wait_between)
    rank = _work(
        inside=(inside, inside * block, wait_inside),
        between=(between, between * block, wait_between),
        # The block of the rank itself.
        copied=block,
    )
    return [_Step(rank, size * rank)]


def _library(links: Links, sizes: Counts, size: int, block: float) -> list[_Step]:
    combines = sizes.sum() >= FEWEST_COMBINED and block < links.combine_below
    algorithm = _bruck if combines else _flat
    return algorithm(links, sizes, size, block)


def _bruck(_: Links, sizes: Counts, size: int, block: float) -> list[_Step]:
    """In round k each rank sends to the rank 2^k further all blocks whose distance has this bit set."""
    p = int(sizes.sum())
    distance = np.arange(p)
    # The blocks are rotated before the first round, and put in order after the last.
    rank = _work(copied=2 * p * block)
    node = size * rank
    for bit in range((p - 1).bit_length()):
        has_bit = distance >> bit & 1
        moved = int(has_bit.sum()) * block
        # 2^k ranks forward is p - 2^k backward: so many ranks at one edge of a node leave it, at most all of them.
        forward = 1 << bit
        leaving = min(size, forward, p - forward) if size < p else 0
        # Blocks are gathered into one message and scattered from it.
        inside = _work(inside=(1, moved, 1), copied=2 * moved)
        between = _work(between=(1, moved, 1), copied=2 * moved)
        rank = rank + (between if leaving else inside)
        node = node + leaving * between
        node = node + (size - leaving) * inside
    return [_Step(rank, node)]


def _hierarchical(links: Links, sizes: Counts, size: int, block: float) -> list[_Step]:
    p = int(sizes.sum())
    num_nodes = len(sizes)
    if num_nodes == 1 or sizes.max() == 1:
        return _library(links, sizes, size, block)
    if sizes.min() == sizes.max():
        (hop_one,) = _library(links, np.array([size]), size, block * num_nodes)
        one_a_node = np.ones(num_nodes, np.int64)
        (hop_two,) = _library(links, one_a_node, 1, block * size)
        # Hop two was computed for a world of one rank a node. Here all ranks of the node do it at once.
        hop_two = _Step(hop_two.rank, size * hop_two.node)
    else:
        hop_one, hop_two = _uneven_hops(sizes, size, block)
    # Rows are put in order before each hop, from the input into one buffer and from there into the output.
    transform = _work(copied=p * block)
    second_call = transform + _work(starts=1)
    return [
        _Step(transform, size * transform, float(p * block)),
        hop_one,
        _Step(second_call, size * second_call, hop=2),
        hop_two._replace(hop=2),
    ]


def _uneven_hops(sizes: Counts, size: int, block: float) -> tuple[_Step, _Step]:
    """Hops between nodes of different sizes: local rank i forwards to the local ranks i, i + size, ... of each node."""
    p = int(sizes.sum())
    # The first rank forwards to most ranks, so it sends most in hop two. The last rank forwards to fewest, so it keeps
    # least of its own rows and sends most in hop one.
    most = int(np.ceil(sizes / size).sum())
    fewest = int((sizes // size).sum())
    peers = size - 1
    waits = min(peers, 1)
    sent_one = (p - fewest) * block if peers else 0
    sent_two = (most - 1) * size * block
    # The node as a whole does what its ranks do on average.
    mean_one = p * peers / size * block
    mean_two = (p - size) * block
    rank_one = _work(inside=(peers, sent_one, waits))
    rank_two = _work(between=(most - 1, sent_two, 1))
    node_one = size * _work(inside=(peers, mean_one, waits))
    node_two = size * _work(between=((p - size) / size, mean_two, 1))
    return _Step(rank_one, node_one), _Step(rank_two, node_two)


def _relayed(tokens: Tokens, _: Links, sizes: Counts, size: int, share: float) -> list[_Step]:
    """The relay of a source on another node is the rank with its local rank, modulo the size of that node."""
    p = int(sizes.sum())
    experts_per_rank = tokens.num_experts // p
    row_bytes = share * tokens.row_bytes
    # What a rank has for each node, and how much of it stays on its own.
    for_nodes = row_bytes * sum(tokens.needing(experts_per_rank * ranks) for ranks in sizes.tolist())
    stays = row_bytes * tokens.needing(experts_per_rank * size)
    for_rank = row_bytes * tokens.needing(experts_per_rank)
    num_nodes = len(sizes)
    leaving = _work(between=(num_nodes - 1, for_nodes - stays, min(num_nodes - 1, 1)))
    # Local rank 0 is the relay of most sources, those of its own node included.
    most_sources = int(np.ceil(sizes / size).sum())
    mean_sources = p / size
    peers = size - 1
    # For one source: its rows are copied to all ranks of the node, and one copy stays.
    passing = _work(inside=(0, for_rank * peers, 0), copied=for_rank * size)
    call = _work(inside=(peers, 0, min(peers, 1)), starts=1)
    rank = call + most_sources * passing
    node = size * (call + mean_sources * passing)
    return [
        _Step(leaving, size * leaving),
        _Step(rank, node, staging=most_sources * for_rank * size, hop=2),
    ]


def _shared(_: Links, sizes: Counts, size: int, block: float) -> list[_Step]:
    p = int(sizes.sum())
    num_nodes = len(sizes)
    # The largest node has the longest stream to another node, and all nodes make as many chunks as it does.
    stream = int(sizes.max()) ** 2 * block
    chunks = max(1, ceil(stream / chunk_bytes(num_nodes)))
    # The first chunk is copied in before the first exchange, and the last chunk is copied out after the last exchange.
    # All other copies are made while exchanges are under way.
    copies = _work(copied=p * block / chunks)
    edge = _Step(copies, size * copies)
    copied = 2 * p * block * (1 - 1 / chunks)
    member = _work(copied=copied, wakes=2 * chunks)
    leader = _work()
    if num_nodes > 1:
        messages = (num_nodes - 1) * chunks
        leaving = size * (p - size) * block
        # Two exchanges are under way at a time, so the leader waits once for two of them.
        leader = _work(between=(messages, leaving, ceil(chunks / 2)))
    num_slots = NUM_SLOTS * (2 * num_nodes - 1)
    slots = num_slots * chunk_bytes(num_nodes) / size
    exchanges = _Step(member + leader, size * member + leader, slots)
    return [edge, exchanges, edge]


IN_PIECES = ("hierarchical", "relayed")
"""The algorithms whose hops overlap where there are several chunks."""
ALGORITHMS: dict[str, _Algorithm] = {
    "flat": _flat,
    "library": _library,
    "hierarchical": _hierarchical,
    "shared": _shared,
}
