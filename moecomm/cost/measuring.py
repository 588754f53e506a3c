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
from moecomm.comm import Comm
from moecomm.cost.links import Link, Links
from moecomm.nodes import Nodes

SMALL, SINGLE, LARGE, LONG = 16, 1024, 16384, 1 << 19
"""Bytes a pair. Blocks of SINGLE and LARGE bytes are sent one by one, and all at once, by the libraries we know."""
MAYBE_COMBINED = (256, 512)
ROUNDS, COPIES, BLOCKS, WAKES = 5, 3, 4096, 50
REPEATS, MANY = 3, 7
MOST_TOGETHER = 64
"""Ranks of the largest group that exchanges."""
QUIET = 0.1
"""Seconds for which the other ranks sleep while one or two work alone."""
LEAST_WORK = 1e-9
"""Seconds: what a message takes at least, however the noise falls."""

Body = Callable[[], object]


def measure(comm: Comm, nodes: Nodes) -> Links:
    """The Links of the machine that `comm` runs on, the same on every rank.

    First one rank or a pair works while the others sleep: counting, waking a thread, exchanges inside a node and
    between two. Then all ranks work at once: counting, copying, exchanges in pairs, and all-to-alls in nodes and in
    groups of up to 64 ranks. What takes longer in company, and not on the network, is work that ranks on the same cores
    do in turn. If no node has two ranks, or there is one node, both classes of links get the figures of the one found.

    Takes about 5 seconds for 64 ranks on 2 cores, 1 where each has its own. Collective over comm.
    Raises ValueError on every rank unless nodes is the same partition of at least two ranks on all of them.
    """
    comm.agree("measure: nodes", repr(nodes))
    if nodes.world_size != comm.size or comm.size == 1:
        raise ValueError(f"measure: nodes has {nodes.world_size} ranks, expected {max(2, comm.size)}{comm.where()}")
    clock = _Clock(comm)
    counting, waking, copying = clock.together(_count, _wake_a_thread, _copying())
    turns = max(1.0, counting / clock.alone([0], _count))
    copy_bandwidth = turns * COPIES * BLOCKS * SINGLE / copying

    node, local, most = nodes.node_of, nodes.local_rank, int(nodes.sizes().max())
    per_node = min(most, max(1, MOST_TOGETHER // len(nodes)))  # ranks of a node in a group across nodes
    times = []
    if most > 1:
        times.append(_Times(clock, node * most + local // 2, node))
    if len(nodes) > 1:
        times.append(_Times(clock, node // 2 * most + local, node // MOST_TOGETHER * most + local // per_node))
    last = times[-1]
    node_bandwidth = max(LONG / max(last.long_alone - last.alone, LEAST_WORK), most * LONG / last.long)

    links: list[Link] = []
    for each in times:
        crosses = each is last and len(nodes) > 1
        same_node, network = (per_node - 1, most / node_bandwidth) if crosses else (0, 0.0)
        links.append(each.link(turns, copy_bandwidth, links[0] if same_node else None, same_node, network))
    return Links(
        inside=links[0],
        between=links[-1],
        node_bandwidth=node_bandwidth,
        copy_bandwidth=copy_bandwidth,
        start=max(0.0, min(each.one - each.round for each in times)) / turns,
        wake=waking / (2 * WAKES * turns) + links[0].wait,  # it has to get its core back, as after a wait
        cores_per_node=most / turns,
        combine_below=last.combine_below,
    )


class _Times:
    """Seconds of exchanges over one class of links. Making it is collective.

    alone, long_alone  one pair, while the others sleep: SMALL and LONG bytes
    one, long          all pairs at once: SMALL and LONG bytes
    round              all at once: a message that waits for the one before, in pairs and in Bruck's algorithm
    single, large      all groups at once: SINGLE and LARGE bytes a pair
    """

    def __init__(self, clock: _Clock, pairs: Counts, groups: Counts) -> None:
        comm = clock.comm
        self.largest_group = int(np.bincount(groups).max())
        first_pair = np.flatnonzero(pairs == pairs[0]).tolist()
        pair, group = comm.split(int(pairs[comm.rank])), comm.split(int(groups[comm.rank]))
        self.alone, self.long_alone = (clock.alone(first_pair, _all_to_all(pair, size)) for size in (SMALL, LONG))
        self.one, several, self.long, self.single, self.large, *combined = clock.together(
            *(_all_to_all(pair, size, rounds) for size, rounds in ((SMALL, 1), (SMALL, ROUNDS), (LONG, 1))),
            *(_all_to_all(group, size) for size in (SINGLE, LARGE, *MAYBE_COMBINED)),
        )
        self.combine_below, rounds = 0.0, [max(several - self.one, 0.0) / (ROUNDS - 1)]
        for size, seconds in zip(MAYBE_COMBINED, combined, strict=True):
            if seconds < 0.7 * self.single:
                self.combine_below = size + 1
                rounds.append(seconds / (self.largest_group - 1).bit_length())
        self.round = fmean(rounds)
        pair.free()
        group.free()

    def link(self, turns: float, copy_bandwidth: float, inside: Link | None, same_node: int, network: float) -> Link:
        """The figures of this class of links.

        inside, same_node  links inside nodes, and how many of its peers in the group a rank reaches over these
        network            seconds until each rank of a node has sent a byte to another
        """
        others = self.largest_group - 1 - same_node
        work = (self.single - self.one) / turns - (same_node * inside.message if inside else 0.0)
        message = max(work / max(1, others - 1), LEAST_WORK)
        latency = max(self.alone - message, 0.0)
        wait = max((self.round - latency) / turns - message, LEAST_WORK)

        work = (_beside(self.long, network * LONG) - self.one) / turns
        bandwidth = LONG / max(work, LONG / copy_bandwidth)
        work = (_beside(self.large, network * others * LARGE) - self.single) / turns
        work -= same_node * max(LARGE - inside.buffered, 0) / inside.bandwidth if inside else 0.0
        buffered = min(max(LARGE - work * bandwidth / others, 0.0), float(LARGE))
        return Link(latency, wait, message, bandwidth, buffered)


def _beside(seconds: float, network: float) -> float:
    """What is left of the seconds without the network: the inverse of how the model joins them."""
    return sqrt(max(seconds**2 - network**2, 0.0))


class _Clock:
    """Seconds of the slowest rank, the median of a few, the same on every rank. Collective."""

    def __init__(self, comm: Comm) -> None:
        self.comm = comm

    def together(self, *bodies: Body) -> list[float]:
        """All ranks at once. The bodies take turns, as in a program, where no call follows another of its kind."""
        samples = np.array([[_seconds(body, self.comm.barrier) for body in bodies] for _ in range(REPEATS)])
        return self._slowest(samples)

    def alone(self, ranks: list[int], body: Body) -> float:
        """These ranks, while the others sleep."""
        mine = self.comm.rank in ranks
        self.comm.barrier()
        time.sleep(QUIET / 2 if mine else QUIET)  # until the others sleep
        samples = np.array([[_seconds(body) if mine else 0.0] for _ in range(MANY)])
        return self._slowest(samples)[0]

    def _slowest(self, samples: NDArray[np.float64]) -> list[float]:
        """samples [repeats, bodies] -> [bodies]. The first may be long, as connections and buffers are made."""
        every = self.comm.all_gather(samples[None]).max(axis=0)
        medians: list[float] = np.median(every, axis=0).tolist()
        return medians


def _seconds(body: Body, before: Body | None = None) -> float:
    if before is not None:
        before()
    start = time.perf_counter()
    body()
    return time.perf_counter() - start


def _all_to_all(group: Comm, size: int, rounds: int = 1) -> Body:
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
    dst, order = np.empty_like(src), np.arange(BLOCKS).reshape(64, -1).T.reshape(-1)

    def body() -> None:
        for _ in range(COPIES):
            copy_blocks(dst, src, order)

    return body


def _wake_a_thread() -> None:
    (there, say), (answer, back) = os.pipe(), os.pipe()

    def echo() -> None:
        for _ in range(WAKES):
            os.write(back, os.read(there, 1))

    thread = Thread(target=echo)
    thread.start()
    for _ in range(WAKES):
        os.write(say, b" ")
        os.read(answer, 1)
    thread.join()
    for end in (there, say, answer, back):
        os.close(end)
