"""Measure the figures of a machine, with the verbs that every Comm has."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from math import sqrt
from statistics import fmean
from threading import Thread

import numpy as np
from numpy.typing import NDArray

from moecomm.arrays import Counts, copy_blocks
from moecomm.comm import Comm, CommLike
from moecomm.cost.links import Link, Links
from moecomm.nodes import Nodes
from moecomm.transports import as_comm

# Bytes a pair. Known libraries send blocks of SINGLE and LARGE bytes without combining them, all at once.
SMALL = 16
SINGLE = 1024
LARGE = 16384
LONG = 1 << 19
MAYBE_COMBINED = (256, 512)

# How often a body does its work, so that it takes long enough for the clock.
ROUNDS = 5
COPIES = 3
BLOCKS = 4096
WAKES = 50
# All ranks together take longer than one pair alone, so fewer repeats are affordable.
REPEATS_TOGETHER = 3
REPEATS_ALONE = 7
MAX_GROUP = 64
"""Ranks of the largest group that exchanges."""
QUIET = 0.1
"""Seconds for which the other ranks sleep while one or two work alone."""
LEAST_WORK = 1e-9
"""Seconds: the least that a message takes, so that noise gives no negative work."""

Body = Callable[[], object]


def measure(comm: CommLike, nodes: Nodes) -> Links:
    """The Links of the machine that `comm` runs on, the same on all ranks.

    First one rank or a pair works while the other ranks sleep: counting, waking a thread, exchanges inside a node and
    between two. Then all ranks work at once: counting, copying, exchanges in pairs, and all-to-alls in nodes and in
    groups of up to 64 ranks. What takes longer in company, and not on the network, is work that ranks on the same cores
    do in turn. If no node has two ranks, or there is one node, the two classes of links get the same figures.

    Takes about 5 seconds for 64 ranks on 2 cores, 1 where each rank has a core. Collective over comm.
    Raises ValueError on all ranks unless nodes is the same partition of at least two ranks on all of them.
    """
    comm = as_comm(comm)
    comm.agree("measure: nodes", repr(nodes))
    if nodes.world_size != comm.size or comm.size == 1:
        raise ValueError(f"measure: nodes has {nodes.world_size} ranks, expected {max(2, comm.size)}{comm.where()}")
    clock = _Clock(comm)
    counting, waking, copying = clock.together(_count, _wake_a_thread, _copying())
    # How many ranks share a core: counting needs nothing else.
    turns = max(1.0, counting / clock.alone([0], _count))
    copy_bandwidth = turns * COPIES * BLOCKS * SINGLE / copying

    most = int(nodes.sizes().max())
    # ranks of a node in a group across nodes
    per_node = min(most, max(1, MAX_GROUP // len(nodes)))
    times = _time_links(clock, nodes, most, per_node)
    between = times[-1]
    # One pair may be too slow to fill the network of a node, and all pairs together may have too few cores for it.
    of_pair = LONG / max(between.long_alone - between.short_alone, LEAST_WORK)
    node_bandwidth = max(of_pair, most * LONG / between.long)

    links = []
    if most > 1:
        links.append(times[0].link(turns, copy_bandwidth))
    if len(nodes) > 1:
        # A group across nodes has pairs inside nodes too, whose price is known by now.
        inside = links[0] if per_node > 1 else None
        links.append(between.link(turns, copy_bandwidth, inside, per_node - 1, most / node_bandwidth))
    return Links(
        inside=links[0],
        between=links[-1],
        node_bandwidth=node_bandwidth,
        copy_bandwidth=copy_bandwidth,
        start=max(0.0, min(figures.short - figures.round for figures in times)) / turns,
        # A rank that is woken has to get its core back, as after a wait.
        wake=waking / (2 * WAKES * turns) + links[0].wait,
        cores_per_node=most / turns,
        combine_below=between.combine_below,
    )


def _time_links(clock: _Clock, nodes: Nodes, most: int, per_node: int) -> list[_Times]:
    """Links inside nodes, if a node has two ranks, and links between nodes, if there are two."""
    node = nodes.node_of
    local_rank = nodes.local_rank
    times = []
    # Pairs and groups are numbered so that no two of them have the same number.
    if most > 1:
        pairs = node * most + local_rank // 2
        times.append(_Times(clock, pairs, node))
    if len(nodes) > 1:
        pairs = node // 2 * most + local_rank
        groups = node // MAX_GROUP * most + local_rank // per_node
        times.append(_Times(clock, pairs, groups))
    return times


class _Times:
    """Seconds of exchanges over one class of links. Making it is collective.

    short_alone, long_alone  one pair, while the other ranks sleep: SMALL and LONG bytes
    short, long              all pairs at once: SMALL and LONG bytes
    round                    all at once: a message that waits for the previous message, in pairs and in Bruck's
                             algorithm
    single, large            all groups at once: SINGLE and LARGE bytes a pair
    """

    def __init__(self, clock: _Clock, pairs: Counts, groups: Counts) -> None:
        comm = clock.comm
        self.largest_group = int(np.bincount(groups).max())
        quiet_pair = np.flatnonzero(pairs == pairs[0]).tolist()
        pair = comm.split(int(pairs[comm.rank]))
        group = comm.split(int(groups[comm.rank]))
        self.short_alone = clock.alone(quiet_pair, _all_to_all(pair, SMALL))
        self.long_alone = clock.alone(quiet_pair, _all_to_all(pair, LONG))
        self.short, rounds, self.long, self.single, self.large, *combined = clock.together(
            _all_to_all(pair, SMALL),
            _all_to_all(pair, SMALL, ROUNDS),
            _all_to_all(pair, LONG),
            *(_all_to_all(group, size) for size in (SINGLE, LARGE, *MAYBE_COMBINED)),
        )
        self.combine_below = 0.0
        round_times = [max(rounds - self.short, 0.0) / (ROUNDS - 1)]
        for size, seconds in zip(MAYBE_COMBINED, combined, strict=True):
            # Uncombined, blocks of a few hundred bytes take as long as SINGLE bytes: the price is that of the message.
            if seconds < 0.7 * self.single:
                self.combine_below = size + 1
                round_times.append(seconds / (self.largest_group - 1).bit_length())
        self.round = fmean(round_times)
        pair.free()
        group.free()

    def link(
        self,
        turns: float,
        copy_bandwidth: float,
        inside: Link | None = None,
        num_inside: int = 0,
        network: float = 0.0,
    ) -> Link:
        """The figures of this class of links.

        inside, num_inside  links inside nodes, and how many of its peers in the group a rank reaches over these
        network             seconds until each rank of a node has sent a byte to another
        """
        num_peers = self.largest_group - 1 - num_inside
        # Differences of two sizes leave out what both calls pay: entering them, and the first message.
        work = (self.single - self.short) / turns
        if inside is not None:
            work -= num_inside * inside.message
        message = max(work / max(1, num_peers - 1), LEAST_WORK)
        latency = max(self.short_alone - message, 0.0)
        wait = max((self.round - latency) / turns - message, LEAST_WORK)

        work = (_without(network * LONG, self.long) - self.short) / turns
        # A core cannot send faster than it copies.
        bandwidth = LONG / max(work, LONG / copy_bandwidth)
        work = (_without(network * num_peers * LARGE, self.large) - self.single) / turns
        if inside is not None:
            work -= num_inside * max(LARGE - inside.buffered, 0) / inside.bandwidth
        # Bytes that cost nothing at this bandwidth were moved with the message.
        buffered = min(max(LARGE - work * bandwidth / num_peers, 0.0), float(LARGE))
        return Link(latency, wait, message, bandwidth, buffered)


def _without(network: float, seconds: float) -> float:
    """The work in these seconds: the inverse of how the model joins work and network."""
    return sqrt(max(seconds**2 - network**2, 0.0))


class _Clock:
    """Seconds of the slowest rank, the median of a few, the same on all ranks. Collective."""

    def __init__(self, comm: Comm) -> None:
        self.comm = comm

    def together(self, *bodies: Body) -> list[float]:
        """All ranks at once. The bodies take turns: in a program too, calls of one kind do not follow one another."""
        samples = []
        for _ in range(REPEATS_TOGETHER):
            samples.append([_seconds(body, self.comm.barrier) for body in bodies])
        return self._slowest(np.array(samples))

    def alone(self, ranks: list[int], body: Body) -> float:
        """These ranks, while the other ranks sleep."""
        works = self.comm.rank in ranks
        self.comm.barrier()
        # The ranks that work start when the others are asleep and end before these wake up.
        time.sleep(QUIET / 2 if works else QUIET)
        samples = [[_seconds(body) if works else 0.0] for _ in range(REPEATS_ALONE)]
        return self._slowest(np.array(samples))[0]

    def _slowest(self, samples: NDArray[np.float64]) -> list[float]:
        """samples [repeats, bodies] -> [bodies]."""
        slowest = self.comm.all_gather(samples[None]).max(axis=0)
        # The median: the first repeat may be long, as connections and buffers are made.
        medians: list[float] = np.median(slowest, axis=0).tolist()
        return medians


def _seconds(body: Body, prepare: Body | None = None) -> float:
    if prepare is not None:
        prepare()
    start = time.perf_counter()
    body()
    return time.perf_counter() - start


def _all_to_all(group: Comm, size: int, rounds: int = 1) -> Body:
    # made once, so that no round pays for new memory
    x = np.ones((group.size, size), np.uint8)
    out = np.empty_like(x)

    def body() -> None:
        for _ in range(rounds):
            group.move(x, out)

    return body


def _count() -> None:
    for _ in range(200_000):
        pass


def _copying() -> Body:
    src = np.ones((BLOCKS, SINGLE), np.uint8)
    dst = np.empty_like(src)
    # Blocks far apart, as rows are that go to different ranks.
    order = np.arange(BLOCKS).reshape(64, -1).T.reshape(-1)

    def body() -> None:
        for _ in range(COPIES):
            copy_blocks(dst, src, order)

    return body


def _wake_a_thread() -> None:
    request, ask = os.pipe()
    answer, reply = os.pipe()

    def echo() -> None:
        for _ in range(WAKES):
            os.write(reply, os.read(request, 1))

    thread = Thread(target=echo)
    thread.start()
    for _ in range(WAKES):
        os.write(ask, b" ")
        os.read(answer, 1)
    thread.join()
    for end in (request, ask, answer, reply):
        os.close(end)
