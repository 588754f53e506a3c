"""Ranks as threads of one process: needs no other library, runs on a laptop, and is what the tests use.

A collective is a meeting: every rank offers its arguments, sees the offers of all ranks, copies the rows sent to it,
and leaves when all have copied. A rank that fails, or returns while others wait for it, ends the meeting for all.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Collection
from typing import TypeVar, cast

import numpy as np

from moecomm.arrays import Array, Counts, as_bytes, dtype_name, is_torch, row_bytes
from moecomm.comm import SPLIT_FROM_A_FAILED_COMM, Comm, Missing
from moecomm.errors import CommError
from moecomm.transports.limit import check_limit

R = TypeVar("R")
Offer = TypeVar("Offer")

LONGEST_FAREWELL = 5.0
"""Seconds that an interrupted `run` waits for its ranks to come to their next collective."""

SIGNAL_SECONDS = 0.1
"""Longest delay of a signal that arrives just before the main thread goes to sleep."""


def run(size: int, body: Callable[[Comm], R], *, limit: float | None = None) -> list[R]:
    """Run body(comm) on `size` ranks, each a thread, and return what they returned, by rank.

    size   number of ranks
    limit  seconds that a collective waits for the other ranks before it raises CommError; None: no limit (a rank that
           has failed or returned is noticed without one)

    If a rank raises, the others' collectives raise CommError, and the first error is raised here.

    Ctrl-C, or an exception from another signal's handler, ends the collectives of all ranks with CommError and is
    raised when the ranks have ended. A rank that calls no collective cannot be stopped: after LONGEST_FAREWELL seconds,
    or at a second Ctrl-C, it is left running as a daemon thread, until its next collective or the end of Python; a
    RuntimeWarning names it.
    """
    if not isinstance(size, int | np.integer) or size < 1:
        raise ValueError(f"run: size is {size!r}, expected a whole number >= 1")
    limit = check_limit("run", limit)
    world = _World()
    group = _Group(world, tuple(range(size)))
    results: dict[int, R] = {}

    def rank_main(rank: int) -> None:
        try:
            if world.enter(rank):
                results[rank] = body(ThreadComm(group, rank, limit))
        except BaseException as error:
            # `run` raises the first failure, once all ranks have ended.
            world.fail(rank, error)
        else:
            world.leave(rank)

    # Daemons: Python can then end although a rank never comes back.
    threads = []
    for rank in range(size):
        threads.append(threading.Thread(target=rank_main, args=(rank,), name=f"rank {rank}", daemon=True))
    try:
        for thread in threads:
            thread.start()
        world.wait(set(range(size)))
    except BaseException as error:
        _end_ranks(world, type(error).__name__)
        raise
    for thread in threads:
        thread.join()
    if world.first_failure is not None:
        rank, failure = world.first_failure
        # Since Python 3.11.
        if hasattr(failure, "add_note"):
            failure.add_note(f"raised on rank {rank} of {size}")
        raise failure
    return [results[rank] for rank in range(size)]


def _end_ranks(world: _World, interruption: str) -> None:
    """End the ranks' collectives and wait for the ranks, with a warning about those that go on."""
    world.end(f"run was interrupted by {interruption}")
    # Only the ranks that have entered: a thread may not have been started.
    world.wait(world.entered, LONGEST_FAREWELL)
    running = sorted(world.entered - world.departed.keys())
    if running:
        warnings.warn(
            f"run: rank(s) {running} came to no collective for {LONGEST_FAREWELL} s after {interruption}, and "
            "go on as daemon threads",
            RuntimeWarning,
            stacklevel=3,
        )


class _World:
    """The state that all ranks of one `run` share: which have entered, failed or returned."""

    def __init__(self) -> None:
        self.first_failure: tuple[int, BaseException] | None = None
        self.entered: set[int] = set()
        self.departed: dict[int, str] = {}
        """Ranks that will come to no collective any more, and why."""
        self.failure: str | None = None
        """Ends every collective."""
        self.groups: weakref.WeakSet[_Group] = weakref.WeakSet()
        # Of `groups`: ranks split while others leave.
        self.lock = threading.Lock()
        self._departures: queue.SimpleQueue[int] = queue.SimpleQueue()

    def enter(self, rank: int) -> bool:
        """Whether a rank may begin."""
        # In this order: either `end` comes later and its caller waits for this rank, or this rank sees the failure.
        self.entered.add(rank)
        return self.failure is None

    def fail(self, rank: int, error: BaseException) -> None:
        if self.first_failure is None:
            self.first_failure = rank, error
        self._depart(rank, f"failed: {type(error).__name__}: {error}")

    def leave(self, rank: int) -> None:
        self._depart(rank, "has returned")

    def _depart(self, rank: int, reason: str) -> None:
        self.departed[rank] = reason
        self.wake()
        self._departures.put(rank)

    def end(self, reason: str) -> None:
        """Make every collective raise, on all ranks."""
        self.failure = reason
        self.wake()

    def wake(self) -> None:
        """Make every rank that waits check again whether it must."""
        # Copied, so that no group's lock is taken under this one.
        with self.lock:
            groups = list(self.groups)
        for group in groups:
            with group.condition:
                group.condition.notify_all()

    def wait(self, ranks: set[int], seconds: float | None = None) -> None:
        """Return when these ranks have departed, or after `seconds`. A signal handler may raise in here at any point.

        Not Thread.join: in Python 3.10 to 3.12, once interrupted, it takes the thread for ended.
        """
        deadline = None if seconds is None else time.monotonic() + seconds
        while ranks - self.departed.keys() and (deadline is None or time.monotonic() < deadline):
            with contextlib.suppress(queue.Empty):
                self._departures.get(timeout=SIGNAL_SECONDS)


class _Meeting:
    """One collective of a group, until its last rank comes."""

    def __init__(self, size: int) -> None:
        self.calls = [""] * size
        self.offers: list[object] = [None] * size
        self.missing = set(range(size))


class _Group:
    """The ranks of one Comm and the meeting that they are in."""

    def __init__(self, world: _World, members: tuple[int, ...], parent: _Group | None = None) -> None:
        self.world = world
        # Ranks of the world, for errors.
        self.members = members
        self.parent = parent
        self.condition = threading.Condition()
        self.meeting = _Meeting(len(members))
        self._failure: str | None = None
        with world.lock:
            world.groups.add(self)

    def failure(self) -> str | None:
        """Why no rank may wait in this group any more: it has failed, or a group that it was split from."""
        if self._failure is not None or self.parent is None:
            return self._failure or self.world.failure
        inherited = self.parent.failure()
        return inherited and f"{SPLIT_FROM_A_FAILED_COMM}: {inherited}"

    def fail(self, reason: str) -> None:
        """End this meeting and all later ones of the group, and of those that were split from it."""
        with self.condition:
            self._failure = self._failure or reason
        self.world.wake()

    def meet(self, rank: int, call: str, offer: Offer, limit: float | None) -> list[Offer]:
        """The offers of all ranks, once all have come."""
        with self.condition:
            failure = self.failure()
            meeting = self.meeting
            if failure is None:
                meeting.calls[rank] = call
                meeting.offers[rank] = offer
                meeting.missing.discard(rank)
                failure = self._wait(meeting, call, limit)
        if failure is not None:
            self.world.wake()
            raise CommError(failure)
        self._check_calls(meeting.calls)
        return cast(list[Offer], meeting.offers)

    def _wait(self, meeting: _Meeting, call: str, limit: float | None) -> str | None:
        """Wait for all ranks of the meeting, under the condition; the failure if they do not come."""
        missing = meeting.missing
        departed = self.world.departed
        if not missing:
            # The ranks that have left may begin the next collective while others still wake up in this one.
            self.meeting = _Meeting(len(self.members))
            self.condition.notify_all()
        self.condition.wait_for(
            lambda: not missing or self.failure() or self._has_departed(missing, departed),
            limit,
        )
        if not missing:
            return None
        # Kept before the condition is released: a rank that comes late must not find the meeting complete.
        self._failure = self.failure() or f"{call}: {self._absence(missing, departed, limit)}"
        return self._failure

    def _check_calls(self, calls: list[str]) -> None:
        for rank, call in enumerate(calls):
            if call != calls[0]:
                raise CommError(
                    f"rank {self.members[0]} called {calls[0]} while rank {self.members[rank]} called {call}"
                )

    def why_not_wait(self, call: str, seconds: float, limit: float | None, missing: Missing) -> str | None:
        """Why a rank that waits in `call` outside of a meeting need not go on, or None: then it must.

        missing  returns the ranks that have not begun the call
        """
        # Copied before `missing` looks: a rank departed by then has begun no call after that look.
        departed = dict(self.world.departed)
        absent = missing()
        failure = self.failure()
        if failure is not None:
            return failure
        is_over = limit is not None and seconds > limit
        if is_over or self._has_departed(absent, departed):
            return f"{call}: {self._absence(absent, departed, limit)}"
        return None

    def _has_departed(self, ranks: Collection[int], departed: dict[int, str]) -> bool:
        return any(self.members[rank] in departed for rank in ranks)

    def _absence(self, ranks: Collection[int], departed: dict[int, str], limit: float | None) -> str:
        absent = sorted(self.members[rank] for rank in ranks)
        for rank in absent:
            if rank in departed:
                return f"rank {rank} {departed[rank]}"
        return f"waited {limit} s for " + (f"rank(s) {absent}, which did not come" if absent else "the other ranks")


class ThreadComm(Comm):
    """One rank's view of a group of threads. Made by `run`."""

    _compares_rows = True

    def __init__(self, group: _Group, rank: int, limit: float | None) -> None:
        self.rank = rank
        self.size = len(group.members)
        self._group = group
        self._limit = limit

    def _meet(self, call: str, offer: Offer, use: Callable[[list[Offer]], R]) -> R:
        """use(the offers of all ranks). A second meeting follows: only then may an owner change what it offered."""
        try:
            offers = self._group.meet(self.rank, call, offer, self._limit)
            result = use(offers)
            self._group.meet(self.rank, call, None, self._limit)
        except Exception as error:
            # The others may wait in the second meeting for this rank.
            self._group.fail(f"{call}: rank {self.world_rank(self.rank)}: {error}")
            self.fail(str(error))
            if isinstance(error, MemoryError):
                raise  # as everywhere on the rank that has no more
            raise CommError(f"{error}{self.where()}") from (None if isinstance(error, CommError) else error)
        return result

    def fail(self, why: str) -> None:
        super().fail(why)
        self._group.fail(why)

    def _all_to_all(self, rows: Array, out: Array, send_counts: Counts | None, recv_counts: Counts | None) -> None:
        if send_counts is None or recv_counts is None:
            send_counts = recv_counts = np.full(self.size, rows.shape[0] // self.size, np.int64)
        starts = np.cumsum(send_counts) - send_counts

        def copy(offers: list[tuple[Array, Counts, Counts]]) -> None:
            blocks = [(sent, begin[self.rank], count[self.rank]) for sent, begin, count in offers]
            self._copy(out, blocks, recv_counts)

        self._meet("all_to_all", (rows, starts, send_counts), copy)

    def _all_gather(self, rows: Array, out: Array, recv_counts: Counts | None) -> None:
        if recv_counts is None:
            recv_counts = np.full(self.size, rows.shape[0], np.int64)

        def copy(offers: list[Array]) -> None:
            blocks = [(sent, 0, sent.shape[0]) for sent in offers]
            self._copy(out, blocks, recv_counts)

        self._meet("all_gather", rows, copy)

    def _copy(self, out: Array, blocks: list[tuple[Array, int, int]], recv_counts: Counts) -> None:
        """Copy a block from each rank, (its rows, first row, number of rows), one after the other."""
        target = as_bytes(out)
        width = row_bytes(out)
        place = 0
        for source, (sent, start, count) in enumerate(blocks):
            if dtype_name(sent) != dtype_name(out) or sent.shape[1:] != out.shape[1:] or count != recv_counts[source]:
                raise CommError(
                    f"rank {self.world_rank(source)} sent {count} rows {dtype_name(sent)}{list(sent.shape[1:])}, rank "
                    f"{self.world_rank(self.rank)} "
                    f"expected {recv_counts[source]} rows {dtype_name(out)}{list(out.shape[1:])}"
                )
            if count:
                target[place : place + count * width] = as_bytes(sent)[start * width : (start + count) * width]
            place += count * width

    def _all_reduce(self, array: Array) -> Array:
        def add(offers: list[Array]) -> Array:
            total = array.detach().clone() if is_torch(array) else array.copy()
            # In the same order on every rank: the same bits.
            total[...] = offers[0]
            for other in offers[1:]:
                total += other
            return total

        return self._meet("all_reduce", array, add)

    def _barrier(self) -> None:
        self._meet("barrier", None, list)

    def check_usable(self, call: str) -> None:
        self.failure = self.failure or self._group.failure()
        super().check_usable(call)

    def waiting(self, call: str, seconds: float, missing: Missing = list) -> None:
        reason = self._group.why_not_wait(call, seconds, self._limit, missing)
        if reason is not None:
            self.fail(reason)
            raise CommError(f"{reason}{self.where()}")

    def _split(self, color: int, key: int) -> Comm:
        offers = self._meet("split", (color, key), list)
        # Stable: ranks with the same key stay in order.
        members = sorted(
            (rank for rank in range(self.size) if offers[rank][0] == color), key=lambda rank: offers[rank][1]
        )
        group = None
        if members[0] == self.rank:
            world_ranks = tuple(self._group.members[rank] for rank in members)
            group = _Group(self._group.world, world_ranks, self._group)
        # The first member makes the group, and the others take it from its offer.
        group = self._meet("split", group, lambda groups: groups[members[0]])
        assert group is not None
        return ThreadComm(group, members.index(self.rank), self._limit)

    def _node_key(self) -> int:
        return 0
