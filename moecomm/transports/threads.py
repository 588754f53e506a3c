"""Ranks as threads of one process: needs nothing, runs on a laptop, and is what the tests use.

A collective is a meeting: every rank brings its arguments, sees everybody's, copies what is meant for it, and leaves
when all have copied. A rank that fails, or returns while others wait for it, ends the meeting for all.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np

from moecomm.arrays import Array, Counts, as_bytes, dtype_name, is_torch, row_bytes
from moecomm.comm import Comm
from moecomm.errors import CommError
from moecomm.transports.limit import check_limit

R = TypeVar("R")

LONGEST_FAREWELL = 2.0
"""Seconds after which a rank that has returned cannot be one that merely finished the same call earlier."""


def run(size: int, body: Callable[[Comm], R], *, limit: float | None = None) -> list[R]:
    """Run body(comm) on `size` ranks, each a thread, and return what they returned, by rank.

    size   number of ranks
    limit  seconds that a collective waits for the other ranks before it raises CommError; None: no limit (a rank that
           has failed or returned is noticed without one)

    If a rank raises, the others' collectives raise CommError, and the first error is raised here.
    """
    if not isinstance(size, int | np.integer) or size < 1:
        raise ValueError(f"run: size is {size!r}, expected a whole number >= 1")
    limit = check_limit("run", limit)
    world = _World(size)
    group = _Group(world, tuple(range(size)))
    results: list[Any] = [None] * size

    def rank_main(rank: int) -> None:
        try:
            results[rank] = body(ThreadComm(group, rank, limit))
        except BaseException as error:  # re-raised by run
            world.fail(rank, error)
        else:
            world.leave(rank)

    threads = [
        threading.Thread(target=rank_main, args=(rank,), name=f"rank {rank}", daemon=True) for rank in range(size)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if world.first_failure is not None:
        rank, error = world.first_failure
        if hasattr(error, "add_note"):  # Python >= 3.11
            error.add_note(f"raised on rank {rank} of {size}")
        raise error
    return results


class _World:
    """What all ranks of one `run` share: who has failed and who has returned."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.first_failure: tuple[int, BaseException] | None = None
        self.gone: dict[int, str] = {}
        self.last_gone = 0.0
        self.groups: weakref.WeakSet[_Group] = weakref.WeakSet()
        self.lock = threading.Lock()  # of groups: ranks split while others leave

    def fail(self, rank: int, error: BaseException) -> None:
        if self.first_failure is None:
            self.first_failure = rank, error
        self._wake(rank, f"failed: {type(error).__name__}: {error}")

    def leave(self, rank: int) -> None:
        self._wake(rank, "has returned")

    def _wake(self, rank: int, why: str) -> None:
        self.last_gone = time.monotonic()
        self.gone[rank] = why
        with self.lock:
            groups = list(self.groups)
        for group in groups:
            with group.condition:
                group.condition.notify_all()


class _Meeting:
    def __init__(self, size: int) -> None:
        self.brought: list[Any] = [None] * size
        self.missing = set(range(size))


class _Group:
    """The ranks of one Comm and the meeting that they are in."""

    def __init__(self, world: _World, members: tuple[int, ...]) -> None:
        self.world = world
        self.members = members  # world ranks
        self.condition = threading.Condition()
        self.meeting = _Meeting(len(members))
        self.failure: str | None = None
        with world.lock:
            world.groups.add(self)

    def meet(self, rank: int, call: str, value: Any, limit: float | None) -> list[Any]:
        """What each rank brought, once all have come."""
        with self.condition:
            if self.failure:
                raise CommError(self.failure)
            meeting = self.meeting
            meeting.brought[rank] = call, value
            meeting.missing.discard(rank)
            if not meeting.missing:
                self.meeting = _Meeting(len(self.members))
                self.condition.notify_all()
            else:
                self.condition.wait_for(lambda: not meeting.missing or self.failure or self._gone(meeting), limit)
            # A meeting that is complete ends well, even if a rank that has left it has failed in the next one.
            if meeting.missing:
                raise CommError(self.failure or f"{call}: {self._who_is_missing(meeting, limit)}")
        calls = [brought[0] for brought in meeting.brought]
        if len(set(calls)) > 1:
            other = next(r for r, name in enumerate(calls) if name != calls[0])
            first, second = self.members[0], self.members[other]
            raise CommError(f"rank {first} called {calls[0]} while rank {second} called {calls[other]}")
        return [brought[1] for brought in meeting.brought]

    def fail(self, why: str) -> None:
        """End this meeting and all later ones of the group."""
        with self.condition:
            self.failure = self.failure or why
            self.condition.notify_all()

    def check_waiting(self, call: str, seconds: float, limit: float | None) -> None:
        """Raise CommError if a member has failed or gone without coming, or the limit is over."""
        why = self.failure
        for member in self.members:
            said = self.world.gone.get(member, "")
            if said.startswith("failed") or (said and time.monotonic() > self.world.last_gone + LONGEST_FAREWELL):
                why = why or f"{call}: rank {member} {said}"
        if limit is not None and seconds > limit:
            why = why or f"{call}: waited {limit} s for the other ranks"
        if why:
            raise CommError(why)

    def _gone(self, meeting: _Meeting) -> list[int]:
        """World ranks."""
        return sorted(self.members[rank] for rank in meeting.missing if self.members[rank] in self.world.gone)

    def _who_is_missing(self, meeting: _Meeting, limit: float | None) -> str:
        gone = self._gone(meeting)
        if gone:
            return f"rank {gone[0]} {self.world.gone[gone[0]]}"
        missing = sorted(self.members[rank] for rank in meeting.missing)
        return f"waited {limit} s for rank(s) {missing}, which did not come"


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

    def waiting(self, call: str, seconds: float) -> None:
        try:
            self._group.check_waiting(call, seconds, self._limit)
        except CommError as error:
            self.fail(str(error))
            raise CommError(f"{error}{self.where()}") from None

    def _split(self, color: int, key: int) -> Comm:
        wishes = self._meet("split", (color, key), list)
        members = sorted((r for r in range(self.size) if wishes[r][0] == color), key=lambda r: (wishes[r][1], r))
        mine = None
        if members[0] == self.rank:
            mine = _Group(self._group.world, tuple(self._group.members[r] for r in members))
        group = self._meet("split", mine, lambda offers: offers[members[0]])
        return ThreadComm(group, members.index(self.rank), self._limit)

    def _node_key(self) -> int:
        return 0
