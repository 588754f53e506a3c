"""A Comm around a Comm: Checked compares what the ranks pass, Timed counts what they send."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from moecomm.arrays import Array, Counts, row_bytes
from moecomm.comm import Comm, Missing, Started, text_of_call
from moecomm.errors import CommError
from moecomm.failures import refused

T = TypeVar("T")

DIGEST_BYTES = 16


class _Wrapper(Comm):
    """Hands every call on, so that a subclass writes only what it changes. Checks are done once, by the outermost."""

    def __init__(self, inner: Comm) -> None:
        if not isinstance(inner, Comm):
            raise TypeError(f"{type(self).__name__}: comm is a {type(inner).__name__}, expected a moecomm Comm")
        self.inner = inner
        self.rank = inner.rank
        self.size = inner.size

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.inner!r})"

    @property
    def _compares_rows(self) -> bool:  # type: ignore[override]
        return self.inner._compares_rows

    @property
    def failure(self) -> str | None:  # type: ignore[override]
        return self.inner.failure

    @failure.setter
    def failure(self, why: str | None) -> None:
        self.inner.failure = why

    @property
    def _world_ranks(self) -> Sequence[int] | None:  # type: ignore[override]
        return self.inner._world_ranks

    @_world_ranks.setter
    def _world_ranks(self, ranks: Sequence[int] | None) -> None:
        self.inner._world_ranks = ranks

    @property
    def _world_size(self) -> int:  # type: ignore[override]
        return self.inner._world_size

    @_world_size.setter
    def _world_size(self, size: int) -> None:
        self.inner._world_size = size

    def fail(self, why: str) -> None:
        self.inner.fail(why)

    def _adopt(self, part: Comm) -> None:
        self.inner._adopt(part)

    def check_usable(self, call: str) -> None:
        self.inner.check_usable(call)

    def checked(
        self, call: str, check: Callable[..., T], *arguments: Any, compared_text: Callable[[T], str] | None = None
    ) -> T:
        return self.inner.checked(call, check, *arguments, compared_text=compared_text)

    def compared(self, call: str, check: Callable[..., T], *arguments: Any, compared_text: Callable[[T], str]) -> T:
        return self.inner.compared(call, check, *arguments, compared_text=compared_text)

    def tell_refusal(self, error: Exception) -> None:
        self.inner.tell_refusal(error)

    def compare_texts(self, text: str) -> None:
        self.inner.compare_texts(text)

    def compare_counts(self, send_counts: Counts, recv_counts: Counts) -> None:
        self.inner.compare_counts(send_counts, recv_counts)

    def compare_gathered(self, recv_counts: Counts) -> None:
        self.inner.compare_gathered(recv_counts)

    def digest(self, counts: Counts) -> str:
        return self.inner.digest(counts)

    def _all_to_all(self, rows: Array, out: Array, send_counts: Counts | None, recv_counts: Counts | None) -> None:
        self.inner._all_to_all(rows, out, send_counts, recv_counts)

    def _all_gather(self, rows: Array, out: Array, recv_counts: Counts | None) -> None:
        self.inner._all_gather(rows, out, recv_counts)

    def _all_reduce(self, array: Array) -> Array:
        return self.inner._all_reduce(array)

    def _barrier(self) -> None:
        self.inner._barrier()

    def _start(self, rows: Array, out: Array, send_counts: Counts, recv_counts: Counts) -> Started:
        return self.inner._start(rows, out, send_counts, recv_counts)

    def progress(self) -> None:
        self.inner.progress()

    def waiting(self, call: str, seconds: float, missing: Missing = list) -> None:
        self.inner.waiting(call, seconds, missing)

    def _split(self, color: int, key: int) -> Comm:
        return type(self)(self.inner._split(color, key))

    def _node_key(self) -> int:
        return self.inner._node_key()

    def _free(self) -> None:
        self.inner._free()


class Checked(_Wrapper):
    """All ranks agree on a call before anything moves: which collective, dtype, row shape, counts.

    What differs is a ValueError on every rank that names two ranks and their two values, and what one rank alone
    refuses is raised on all of them, so nobody waits for a rank that has given up. A rank that never comes is not
    noticed here: give the transport a limit. Costs one small all-gather a call, and an all-to-all of the counts where
    there are any. For finding mistakes, not for production.
    """

    def compared(self, call: str, check: Callable[..., T], *arguments: Any, compared_text: Callable[[T], str]) -> T:
        return self.checked(call, check, *arguments, compared_text=compared_text)

    def checked(
        self, call: str, check: Callable[..., T], *arguments: Any, compared_text: Callable[[T], str] | None = None
    ) -> T:
        try:
            result = self.inner.checked(call, check, *arguments, compared_text=compared_text)
            text = text_of_call(call, result, compared_text)
        except CommError:
            raise  # the Comm is of no use: nothing can be told to the others
        except Exception as error:
            self.tell_refusal(error)
            refused(error)
            raise
        self.inner.compare_texts(text)
        return result

    def tell_refusal(self, error: Exception) -> None:
        self.inner.compare_texts(f"!{error}")

    def compare_counts(self, send_counts: Counts, recv_counts: Counts) -> None:
        announced = np.empty_like(recv_counts)
        self.inner._all_to_all(send_counts, announced, None, None)
        differing = np.flatnonzero(announced != recv_counts)
        # The first difference of each rank: source, rows that it sends, rows that are expected; -1: none. All ranks
        # hear of all of them, so that they raise together.
        difference = np.full((1, 3), -1, np.int64)
        if differing.size:
            source = differing[0]
            difference[0] = source, announced[source], recv_counts[source]
        differences = np.empty((self.size, 3), np.int64)
        self.inner._all_gather(difference, differences, None)
        for rank, (source, sent, expected) in enumerate(differences.tolist()):
            if source >= 0:
                raise refused(
                    ValueError(
                        f"all_to_all: rank {self.world_rank(source)} sends {sent} rows to rank "
                        f"{self.world_rank(rank)}, which expects {expected}{self.where()}"
                    )
                )

    def compare_gathered(self, recv_counts: Counts) -> None:
        counts_of_rank = np.empty((self.size, self.size), np.int64)
        self.inner._all_gather(recv_counts.reshape(1, -1), counts_of_rank, None)
        for rank in range(self.size):
            if (counts_of_rank[rank] != counts_of_rank[0]).any():
                first, other = counts_of_rank[0].tolist(), counts_of_rank[rank].tolist()
                raise refused(
                    ValueError(
                        f"all_gather: recv_counts differ: rank {self.world_rank(0)} has {first}, rank "
                        f"{self.world_rank(rank)} has {other}{self.where()}"
                    )
                )

    def digest(self, counts: Counts) -> str:
        # A rank knows its own counts alone; two routes may differ in those of other ranks.
        digest = hashlib.blake2b(counts.tobytes(), digest_size=DIGEST_BYTES).digest()
        row = np.frombuffer(digest, np.uint8).reshape(1, DIGEST_BYTES)
        digests = np.empty((self.size, DIGEST_BYTES), np.uint8)
        self.inner._all_gather(row, digests, None)
        return hashlib.blake2b(digests.tobytes(), digest_size=8).hexdigest()


@dataclass
class Record:
    """What one rank has done with one kind of call, since the Timed was made.

    messages, bytes  [size of the outermost Comm] int64: to each of its ranks. A message is one non-empty pair of
                     different ranks handed to the Comm; what the library below makes of it is not seen.
    seconds          spent in the calls, waiting for others included; device work may still be queued
    """

    messages: Counts
    bytes: Counts
    calls: int = 0
    seconds: float = 0.0


class Timed(_Wrapper):
    """Counts calls, messages, bytes and seconds, by kind, on this Comm and all that are split from it.

    record  kind -> Record. Kinds: "all_to_all" (equal blocks), "all_to_allv" (with counts), "all_gather", "all_reduce",
            "barrier", "split". The last three are the library's own business: their messages are not counted.

    Splitting a Timed costs one small all-gather more than splitting what it wraps.
    """

    def __init__(self, inner: Comm) -> None:
        super().__init__(inner)
        self.record: dict[str, Record] = {}
        # The outermost Comm is the one that the caller has wrapped: records are by its ranks.
        self._outermost = np.arange(self.size)
        self._outermost_size = self.size

    def __repr__(self) -> str:
        kinds = [f"{kind} {entry.calls}" for kind, entry in self.record.items()]
        return f"Timed({self.inner!r}, calls: {', '.join(kinds) or 'none'})"

    def clear(self) -> None:
        """Forget what was recorded. Not collective."""
        self.record.clear()

    @contextmanager
    def _timing(self, kind: str) -> Iterator[Record]:
        if kind not in self.record:
            zeros = np.zeros(self._outermost_size, np.int64)
            self.record[kind] = Record(zeros, zeros.copy())
        entry = self.record[kind]
        start = time.perf_counter()
        yield entry
        entry.seconds += time.perf_counter() - start
        entry.calls += 1

    def _count(self, entry: Record, counts: Counts | int, row_bytes: int) -> None:
        rows_to_rank = np.broadcast_to(np.asarray(counts, np.int64), self.size).copy()
        rows_to_rank[self.rank] = 0  # what stays here is no message
        bytes_to_rank = rows_to_rank * row_bytes
        entry.messages[self._outermost] += bytes_to_rank > 0
        entry.bytes[self._outermost] += bytes_to_rank

    def _all_to_all(self, rows: Array, out: Array, send_counts: Counts | None, recv_counts: Counts | None) -> None:
        kind = "all_to_all" if send_counts is None else "all_to_allv"
        with self._timing(kind) as entry:
            super()._all_to_all(rows, out, send_counts, recv_counts)
        block = rows.shape[0] // self.size
        self._count(entry, block if send_counts is None else send_counts, row_bytes(rows))

    def _start(self, rows: Array, out: Array, send_counts: Counts, recv_counts: Counts) -> Started:
        with self._timing("all_to_allv") as entry:
            started = super()._start(rows, out, send_counts, recv_counts)
        self._count(entry, send_counts, row_bytes(rows))
        return started

    def _all_gather(self, rows: Array, out: Array, recv_counts: Counts | None) -> None:
        with self._timing("all_gather") as entry:
            super()._all_gather(rows, out, recv_counts)
        self._count(entry, rows.shape[0], row_bytes(rows))

    def _all_reduce(self, array: Array) -> Array:
        with self._timing("all_reduce"):
            return super()._all_reduce(array)

    def _barrier(self) -> None:
        with self._timing("barrier"):
            super()._barrier()

    def _split(self, color: int, key: int) -> Comm:
        with self._timing("split"):
            group = Timed(self.inner._split(color, key))
        outermost_ranks = np.empty((group.size, 1), np.int64)
        group.inner._all_gather(self._outermost[self.rank].reshape(1, 1), outermost_ranks, None)
        group._outermost = outermost_ranks[:, 0]
        group._outermost_size = self._outermost_size
        group.record = self.record
        return group
