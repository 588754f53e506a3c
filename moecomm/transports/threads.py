"""Ranks as threads of one process: needs nothing, runs on a laptop, and is what the tests use.

A collective is a meeting: every rank brings its arguments, sees everybody's, copies what is meant for it, and leaves
when all have copied. A rank that fails, or returns while others wait for it, ends the meeting for all.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import numpy as np

from moecomm.arrays import Array, Counts, as_bytes, dtype_name, is_torch, row_bytes
from moecomm.comm import SPLIT_FROM_A_FAILED_COMM, Comm, Missing
from moecomm.errors import CommError
from moecomm.transports.limit import check_limit

R = TypeVar("R")

LONGEST_FAREWELL = 5.0
"""Seconds that an interrupted `run` waits for its ranks to come to their next collective."""


SIGNAL_SECONDS = 0.1
"""How long a signal may wait that comes just before the main thread goes to sleep."""


def run(size: int, body: Callable[[Comm], R], *, limit: float | None = None) -> list[R]:
    """Run body(comm) on `size` ranks, each a thread, and return what they returned, by rank.

    size   number of ranks
    limit  seconds that a collective waits for the other ranks before it raises CommError; None: no limit (a rank that
           has failed or returned is noticed without one)

    If a rank raises, the others' collectives raise CommError, and the first error is raised here.

    What is raised here meanwhile, by Ctrl-C or another signal's handler, ends the collectives of all ranks with
    CommError, and goes on when the ranks have ended. A rank that comes to no collective cannot be stopped: after
    LONGEST_FAREWELL seconds, or at a second Ctrl-C, it is left running as a daemon thread, until its next collective or
    the end of Python; a RuntimeWarning names it.
    """
    if not isinstance(size, int | np.integer) or size < 1:
        raise ValueError(f"run: size is {size!r}, expected a whole number >= 1")
    limit = check_limit("run", limit)
    world = _World()
    group = _Group(world, tuple(range(size)))
    results: list[Any] = [None] * size

    def rank_main(rank: int) -> None:
        try:
            if world.enter(rank):
                results[rank] = body(ThreadComm(group, rank, limit))
        except BaseException as error:  # re-raised by run
            world.fail(rank, error)
        else:
            world.leave(rank)

    threads = [
        threading.Thread(target=rank_main, args=(rank,), name=f"rank {rank}", daemon=True) for rank in range(size)
    ]
    try:
        for thread in threads:
            thread.start()
        world.wait(set(range(size)))
    except BaseException as error:
        world.end(f"run was interrupted by {type(error).__name__}")
        world.wait(world.entered, LONGEST_FAREWELL)
        left = sorted(world.entered - world.gone.keys())
        if left:
            warnings.warn(
                f"run: rank(s) {left} came to no collective for {LONGEST_FAREWELL} s after {type(error).__name__}, and "
                "go on as daemon threads",
                RuntimeWarning,
                stacklevel=2,
            )
        raise
    for thread in threads:
        thread.join()
    if world.first_failure is not None:
        rank, failure = world.first_failure
        if hasattr(failure, "add_note"):  # Python >= 3.11
            failure.add_note(f"raised on rank {rank} of {size}")
        raise failure
    return results


class _World:
    """What all ranks of one `run` share: who has begun, who has failed and who has returned."""

    def __init__(self) -> None:
        self.first_failure: tuple[int, BaseException] | None = None
        self.entered: set[int] = set()
        self.gone: dict[int, str] = {}
        self.failure: str | None = None  # ends every collective
        self.groups: weakref.WeakSet[_Group] = weakref.WeakSet()
        self.lock = threading.Lock()  # of groups: ranks split while others leave
        self._leaving: queue.SimpleQueue[int] = queue.SimpleQueue()

    def enter(self, rank: int) -> bool:
        """Whether a rank may begin."""
        self.entered.add(rank)  # first: `end` is then followed by a wait for this rank, or this rank sees it
        return self.failure is None

    def fail(self, rank: int, error: BaseException) -> None:
        if self.first_failure is None:
            self.first_failure = rank, error
        self._leave(rank, f"failed: {type(error).__name__}: {error}")

    def leave(self, rank: int) -> None:
        self._leave(rank, "has returned")

    def _leave(self, rank: int, how: str) -> None:
        self.gone[rank] = how
        self.wake()
        self._leaving.put(rank)

    def end(self, why: str) -> None:
        """Let every collective raise, on all ranks."""
        self.failure = why
        self.wake()

    def wake(self) -> None:
        """Let every rank that waits see whether it still should."""
        with self.lock:
            groups = list(self.groups)
        for group in groups:
            with group.condition:
                group.condition.notify_all()

    def wait(self, ranks: set[int], seconds: float | None = None) -> None:
        """Return when these ranks are gone, or after `seconds`. A signal handler may raise in here at any point.

        Thread.join could not be called again after that: Python 3.10 to 3.12 then take the thread for ended.
        """
        deadline = None if seconds is None else time.monotonic() + seconds
        while ranks - self.gone.keys() and (deadline is None or time.monotonic() < deadline):
            with contextlib.suppress(queue.Empty):
                self._leaving.get(timeout=SIGNAL_SECONDS)


class _Meeting:
    def __init__(self, size: int) -> None:
        self.brought: list[Any] = [None] * size
        self.missing = set(range(size))


class _Group:
    """The ranks of one Comm and the meeting that they are in."""

    def __init__(self, world: _World, members: tuple[int, ...], parent: _Group | None = None) -> None:
        self.world = world
        self.members = members  # world ranks
        self.parent = parent
        self.condition = threading.Condition()
        self.meeting = _Meeting(len(members))
        self._failure: str | None = None
        with world.lock:
            world.groups.add(self)

    def failure(self) -> str | None:
        """Why nobody may wait here any more: this group has failed, or one that it was split from."""
        if self._failure is not None or self.parent is None:
            return self._failure or self.world.failure
        inherited = self.parent.failure()
        return inherited and f"{SPLIT_FROM_A_FAILED_COMM}: {inherited}"

    def fail(self, why: str) -> None:
        """End this meeting and all later ones of the group, and of those that were split from it."""
        with self.condition:
            self._failure = self._failure or why
        self.world.wake()

    def meet(self, rank: int, call: str, value: Any, limit: float | None) -> list[Any]:
        """What each rank brought, once all have come."""
        with self.condition:
            why = self.failure()
            if why is None:
                meeting = self.meeting
                meeting.brought[rank] = call, value
                meeting.missing.discard(rank)
                absent, gone = meeting.missing, self.world.gone
                if not absent:
                    self.meeting = _Meeting(len(self.members))
                    self.condition.notify_all()
                self.condition.wait_for(
                    lambda: not absent or self.failure() or self._are_some_gone(absent, gone), limit
                )
                if absent:
                    why = self.failure() or f"{call}: {self._who_is_missing(absent, gone, limit)}"
                    self._failure = why  # before anybody can come late and find the meeting complete
        if why is not None:
            self.world.wake()
            raise CommError(why)
        calls = [brought[0] for brought in meeting.brought]
        other = next((r for r, name in enumerate(calls) if name != calls[0]), None)
        if other is not None:
            raise CommError(
                f"rank {self.members[0]} called {calls[0]} while rank {self.members[other]} called {calls[other]}"
            )
        return [brought[1] for brought in meeting.brought]

    def why_not_wait(self, call: str, seconds: float, limit: float | None, missing: Missing) -> str | None:
        """Why a rank need not wait for the others in `call`, or None: then it must.

        A rank that is gone has come to nothing that it was missing from when that was known.
        """
        gone = dict(self.world.gone)  # before the look at who is missing
        absent = missing()
        is_over = limit is not None and seconds > limit
        why = self.failure()
        if why is None and (is_over or self._are_some_gone(absent, gone)):
            why = f"{call}: {self._who_is_missing(absent, gone, limit)}"
        return why

    def _are_some_gone(self, ranks: Iterable[int], gone: dict[int, str]) -> bool:
        return any(self.members[rank] in gone for rank in ranks)

    def _who_is_missing(self, ranks: Iterable[int], gone: dict[int, str], limit: float | None) -> str:
        absent = sorted(self.members[rank] for rank in ranks)
        for rank in absent:
            if rank in gone:
                return f"rank {rank} {gone[rank]}"
        return f"waited {limit} s for " + (f"rank(s) {absent}, which did not come" if absent else "the other ranks")


class ThreadComm(Comm):
    """One rank's view of a group of threads. Made by `run`."""

    _compares_rows = True

    def __init__(self, group: _Group, rank: int, limit: float | None) -> None:
        self.rank = rank
        self.size = len(group.members)
        self._group = group
        self._limit = limit

    def _meet(self, call: str, value: Any, use: Callable[[list[Any]], R]) -> R:
        """use(what all ranks brought). What they brought may be changed by its owner only afterwards."""
        try:
            offers = self._group.meet(self.rank, call, value, self._limit)
            result = use(offers)
            self._group.meet(self.rank, call, None, self._limit)
        except Exception as error:
            self._group.fail(f"{call}: rank {self.world_rank(self.rank)}: {error}")
            self.fail(str(error))
            raise CommError(f"{error}{self.where()}") from (None if isinstance(error, CommError) else error)
        return result

    def fail(self, why: str) -> None:
        super().fail(why)
        self._group.fail(why)

    def _all_to_all(self, rows: Array, out: Array, send_counts: Counts | None, recv_counts: Counts | None) -> None:
        if send_counts is None or recv_counts is None:
            send_counts = recv_counts = np.full(self.size, rows.shape[0] // self.size, np.int64)
        starts = np.cumsum(send_counts) - send_counts

        def copy(offers: list[Any]) -> None:
            mine = [(sent, begin[self.rank], count[self.rank]) for sent, begin, count in offers]
            self._copy(out, mine, recv_counts)

        self._meet("all_to_all", (rows, starts, send_counts), copy)

    def _all_gather(self, rows: Array, out: Array, recv_counts: Counts | None) -> None:
        if recv_counts is None:
            recv_counts = np.full(self.size, rows.shape[0], np.int64)

        def copy(offers: list[Array]) -> None:
            self._copy(out, [(sent, 0, sent.shape[0]) for sent in offers], recv_counts)

        self._meet("all_gather", rows, copy)

    def _copy(self, out: Array, offers: list[tuple[Array, int, int]], recv_counts: Counts) -> None:
        target, width, place = as_bytes(out), row_bytes(out), 0
        for source, (sent, start, count) in enumerate(offers):
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
            total[...] = offers[0]
            for other in offers[1:]:
                total += other  # the same order on every rank: the same bits
            return total

        return self._meet("all_reduce", array, add)

    def _barrier(self) -> None:
        self._meet("barrier", None, list)

    def check_usable(self, call: str) -> None:
        self.failure = self.failure or self._group.failure()
        super().check_usable(call)

    def waiting(self, call: str, seconds: float, missing: Missing = list) -> None:
        why = self._group.why_not_wait(call, seconds, self._limit, missing)
        if why is not None:
            self.fail(why)
            raise CommError(f"{why}{self.where()}")

    def _split(self, color: int, key: int) -> Comm:
        wishes = self._meet("split", (color, key), list)
        members = sorted((r for r in range(self.size) if wishes[r][0] == color), key=lambda r: (wishes[r][1], r))
        made = None
        if members[0] == self.rank:
            made = _Group(self._group.world, tuple(self._group.members[r] for r in members), self._group)
        group = self._meet("split", made, lambda offers: offers[members[0]])
        return ThreadComm(group, members.index(self.rank), self._limit)

    def _node_key(self) -> int:
        return 0
