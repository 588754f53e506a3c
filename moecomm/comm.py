"""Comm: a group of ranks that can move rows to each other. The contract that every transport keeps."""

from __future__ import annotations

import hashlib
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, Protocol, TypeVar

import numpy as np

from moecomm.arrays import (
    Array,
    Counts,
    as_dtype,
    as_rows,
    dtype_name,
    empty_rows,
    is_contiguous,
    is_torch,
    mark_written,
    num_axes,
    overlap,
    sum_dtype,
)
from moecomm.errors import CommError
from moecomm.identity import Identity

T = TypeVar("T")
Arguments = TypeVar("Arguments", bound="tuple[Any, ...]")
E = TypeVar("E", bound=BaseException)

SUMMABLE = ("float32", "float64", "float16", "bfloat16", "int64", "int32", "int8", "uint8")
"""What every transport can add."""

LARGEST_INT = 2**31 - 1
"""MPI takes colors and keys up to this."""

LARGEST_SUM = 2**63 - 1

SPLIT_FROM_A_FAILED_COMM = "the Comm that it was split from cannot be used"

TEXT_BYTES = 512
"""What a rank tells the others about its call, at most."""


class Started(Protocol):
    """A collective that may still be under way."""

    def done(self) -> bool:
        """Whether it is finished, on this rank. To be asked until it is: a transport may work in here alone."""


Missing = Callable[[], Sequence[int]]
"""Returns the ranks of a Comm that have not come to a call, as far as that can be seen from here."""


class _Done:
    def done(self) -> bool:
        return True


class Failing(Protocol):
    """What `collective` needs of a Comm, or of an exchange that talks without one."""

    def fail(self, why: str) -> None:
        """Refuse every later call."""


class collective:  # noqa: N801 - read as a word: with collective("dispatch", comm)
    """`with collective(call, *comms):` around all steps of a collective, its checks included.

    Whatever is raised inside leaves this rank between two steps: KeyboardInterrupt from a signal, MemoryError, a
    peer's failure. Its next call would meet the call that the other ranks are still in, and bring them its rows. So
    every Comm of the call fails, and with it all that were split from it. An error that says by `refused` that
    nothing was sent changes nothing.
    """

    __slots__ = ("_call", "_comms")

    def __init__(self, call: str, *comms: Failing) -> None:
        self._call = call
        self._comms = comms

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None or getattr(error, "nothing_was_sent", False):
            return
        reason = str(error) if isinstance(error, CommError) else f"{type(error).__name__}: {error}"
        for comm in self._comms:
            comm.fail(f"{self._call} failed: {reason}")


class Sharers:
    """The Comms of this rank over one communicator of a library: what makes one of them unusable does so for all."""

    def __init__(self) -> None:
        self._failure: str | None = None
        self._comms: weakref.WeakSet[Comm] = weakref.WeakSet()

    def add(self, comm: Comm) -> None:
        """A Comm that was made over it now: it has failed if an earlier one has."""
        self._comms.add(comm)
        comm.failure = self._failure

    def fail(self, why: str) -> None:
        """Called by the one that fails."""
        self._failure = self._failure or why
        for comm in self._comms:
            if comm.failure is None:
                comm.fail(why)


def refused(error: E) -> E:
    """The error, which is raised before anything was sent, or on all ranks together: the Comm stays usable."""
    error.nothing_was_sent = True  # type: ignore[attr-defined]
    return error


class Comm(Identity, ABC):
    """A group of `size` ranks, of which this one is `rank`.

    Every method is collective: all ranks of the group call it, in the same order, and it returns on all of them or
    raises. `rows` is a numpy array, a torch tensor or a cupy array [num_rows, ...]; the result has its type, dtype and
    device. A non-contiguous array is copied first. Counts are in rows, int64, on the host, one per rank. A result in
    host memory is ready on return; one in device memory is ready for work queued after the call on the current stream.

    Bad arguments raise ValueError or TypeError before anything is sent, on the rank that passed them: wrap the Comm in
    `Checked` to raise on all ranks and to compare the arguments among them. The first call of each kind compares dtype
    and row shape among the ranks in any case. A collective that does not come to its end, because it fails or because
    anything else is raised in it (KeyboardInterrupt, MemoryError), makes this Comm and all that were split from it
    unusable on this rank: every later call raises CommError.

    To write a transport, set `rank` and `size`, write the methods marked below, and call `testing.check_comm`.
    """

    rank: int
    size: int
    failure: str | None = None
    """Why this Comm cannot be used any more, or None."""
    _limit: float | None = None
    """Seconds that a collective may take, for a transport that knows such a thing."""
    _world_ranks: Sequence[int] | None = None
    """[size] the rank of each rank in the Comm that was not split, or None: this one was not."""
    _world_size: int = 0
    _part_of: str | None = None
    """The caller's call, while a smaller one is made for it: for errors."""
    _children: tuple[weakref.ref[Comm], ...] = ()
    """What was split from this Comm."""
    _compares_rows = False
    """Whether the transport itself compares what comes with what it expects."""
    _compared: frozenset[str] = frozenset()
    """The kinds of calls whose rows were compared among the ranks."""

    # ---- the collectives -------------------------------------------------------------------------------------------

    def all_to_all(
        self,
        rows: Array,
        send_counts: Sequence[int] | Counts | None = None,
        recv_counts: Sequence[int] | Counts | None = None,
        *,
        out: Array | None = None,
    ) -> Array:
        """Send each rank its rows and return what every rank sent to this one.

        rows         [num_rows, ...]  ordered by destination rank
        send_counts  [size]  rows for each rank, num_rows in all; None: equal blocks of num_rows / size rows
        recv_counts  [size]  rows from each rank; None if and only if send_counts is
        out          [sum(recv_counts), ...]  where to put the result: contiguous, like rows, not overlapping them
        returns      [sum(recv_counts), ...]  ordered by source rank

        Equal blocks go through the library's own all-to-all, with its algorithms for small messages.
        """
        with collective("all_to_all", self):
            rows, send, recv, out = self._opened(
                "all_to_all", self._all_to_all_arguments, rows, send_counts, recv_counts, out
            )
            if send is not None:
                self.compare_counts(send, recv)
            if out is None:
                out = empty_rows(rows.shape[0] if recv is None else int(recv.sum()), rows)
            self._all_to_all(rows, out, send, recv)
        return out

    def move(
        self, rows: Array, out: Array, send_counts: Counts | None = None, recv_counts: Counts | None = None
    ) -> None:
        """`all_to_all` into out without checking the arguments: for algorithms, which have checked their caller's."""
        self.check_usable("all_to_all")
        self._all_to_all(rows, out, send_counts, recv_counts)

    def start(self, rows: Array, out: Array, send_counts: Counts, recv_counts: Counts) -> Started:
        """`move` that may return before it is done. Rows and out may not be touched until the result is.

        Several may be under way, started in the same order on all ranks. A transport without such a thing does it here.
        """
        self.check_usable("all_to_all")
        return self._start(rows, out, send_counts, recv_counts)

    def all_gather(self, rows: Array, recv_counts: Sequence[int] | Counts | None = None) -> Array:
        """Return the rows of all ranks, in rank order.

        rows         [num_rows, ...]
        recv_counts  [size]  rows of each rank; None: every rank has num_rows
        returns      [sum(recv_counts), ...]
        """
        with collective("all_gather", self):
            rows, recv = self._opened("all_gather", self._all_gather_arguments, rows, recv_counts)
            if recv is not None:
                self.compare_gathered(recv)
            out = empty_rows(rows.shape[0] * self.size if recv is None else int(recv.sum()), rows)
            self._all_gather(rows, out, recv)
        return out

    def all_reduce(self, array: Array) -> Array:
        """Return the element-wise sum over all ranks, as a new array. 16-bit floats are summed in float32."""
        with collective("all_reduce", self):
            array, _ = self._opened("all_reduce", self._all_reduce_arguments, array)
            if dtype_name(array) not in ("float16", "bfloat16"):
                return self._all_reduce(array)
            return as_dtype(self._all_reduce(as_dtype(array, sum_dtype(array))), array.dtype)

    def barrier(self) -> None:
        """Return when every rank has come."""
        with collective("barrier", self):
            self.checked("barrier", _no_arguments)
            self._barrier()

    def split(self, color: int, key: int | None = None) -> Comm:
        """Return the Comm of the ranks that gave the same `color`, ordered by `key`, ties by rank.

        color  0 .. 2**31 - 1
        key    None: this Comm's own rank order
        """
        with collective("split", self):
            color, key = self.checked("split", self._split_arguments, color, key)
            every = np.empty((self.size, 2), np.int64)
            self._all_gather(np.array([[color, key]], np.int64), every, None)
            members = np.flatnonzero(every[:, 0] == color)
            members = members[np.argsort(every[members, 1], kind="stable")]
            part = self._split(color, key)
            part._world_ranks = [self.world_rank(rank) for rank in members.tolist()]
            part._world_size = self._world_size or self.size
            self._adopt(part)
        return part

    def node_key(self) -> int:
        """A number in [0, 2**63) that is the same on two ranks if and only if they share a node's memory."""
        with collective("node_key", self):
            self.checked("node_key", _no_arguments)
            return self._node_key()

    def free(self) -> None:
        """Give back what `split` made. A communicator that the caller brought stays the caller's."""
        if self.failure is None:
            self._free()
            self.failure = "it was freed"

    # ---- what a transport writes -----------------------------------------------------------------------------------
    # Arguments are checked and contiguous; out is allocated; counts are int64 [size], or both None for equal blocks.

    @abstractmethod
    def _all_to_all(self, rows: Array, out: Array, send_counts: Counts | None, recv_counts: Counts | None) -> None: ...

    @abstractmethod
    def _all_gather(self, rows: Array, out: Array, recv_counts: Counts | None) -> None: ...

    @abstractmethod
    def _all_reduce(self, array: Array) -> Array: ...

    @abstractmethod
    def _barrier(self) -> None: ...

    @abstractmethod
    def _split(self, color: int, key: int) -> Comm: ...

    @abstractmethod
    def _node_key(self) -> int: ...

    def _start(self, rows: Array, out: Array, send_counts: Counts, recv_counts: Counts) -> Started:
        self._all_to_all(rows, out, send_counts, recv_counts)
        return _Done()

    def progress(self) -> None:  # for a transport that moves by itself there is nothing to do
        """Move on what others wait for. For an algorithm whose ranks wait outside of the transport. Not collective."""

    def waiting(self, call: str, seconds: float, missing: Missing = list) -> None:
        """Raise CommError if `call` need not be waited for: the Comm has failed, its limit is over, or a rank is gone.

        missing  a rank that has ended counts as gone if it had not begun the call
        """
        self.check_usable(call)
        if self._limit is not None and seconds > self._limit:
            self._give_up(call)

    def _give_up(self, call: str) -> NoReturn:
        why = f"{call} waited {self._limit} s for the other {self.size - 1} rank(s) to come and send"
        self.fail(why)
        raise CommError(f"{why}{self.where()}")

    def fail(self, why: str) -> None:
        """Refuse every later call on this Comm and on all that were split from it. Not collective."""
        self.failure = self.failure or why
        for reference in self._children:
            part = reference()
            if part is not None:
                part.fail(f"{SPLIT_FROM_A_FAILED_COMM}: {why}")

    def _adopt(self, part: Comm) -> None:
        alive = [reference for reference in self._children if reference() is not None]
        self._children = (*alive, weakref.ref(part))

    def _free(self) -> None:  # a transport that has nothing to give back leaves it out
        """Called once, by `free`."""

    # ---- checks ----------------------------------------------------------------------------------------------------

    def checked(self, call: str, check: Callable[..., T], *arguments: Any, same: Callable[[T], str] | None = None) -> T:
        """check(*arguments), with the call and the rank added to the ValueError or TypeError that it raises.

        check  looks at what one rank can see alone
        same   says of its result, in a text, what must be the same on all ranks

        `Checked` makes this a collective: the texts are compared, and what one rank refuses is raised on all of them.
        """
        self.check_usable(call)
        try:
            return check(*arguments)
        except (TypeError, ValueError) as error:
            raise refused(type(error)(f"{call}: {error}{self.where()}")) from None

    def compared(self, call: str, check: Callable[..., T], *arguments: Any, same: Callable[[T], str]) -> T:
        """`checked`, and the texts are compared in any case: for the first call of an object. Collective."""
        result = self.checked(call, check, *arguments)
        self.compare_texts(text_of_call(call, result, same))
        return result

    def _opened(self, call: str, check: Callable[..., Arguments], *arguments: Any) -> Arguments:
        """The arguments, whose rows the ranks compare at the first call of each kind."""
        if call in self._compared or self._compares_rows:
            return self.checked(call, check, *arguments, same=_rows_text)
        result = self.compared(call, check, *arguments, same=_rows_text)
        self._compared |= {call}
        return result

    def tell_refusal(self, error: Exception) -> None:
        """Under `Checked`, raise what this rank refuses on the others, which are in `checked`. Collective there."""

    def compare_texts(self, text: str) -> None:
        """ValueError on all ranks, with two ranks and their texts, unless all gave the same. Collective.

        text  which call, with what. A text that begins with "!" is what its rank refuses: all others raise it
        """
        every = self._gather_texts(text)
        for rank, other in enumerate(every):
            if other.startswith("!") and not text.startswith("!"):
                raise refused(
                    ValueError(
                        f"{other[1:]}, found by rank {self.world_rank(rank)}; this is rank "
                        f"{self.world_rank(self.rank)}, which gave up with it"
                    )
                )
        for rank, other in enumerate(every):
            if other != every[0] and not text.startswith("!"):
                raise refused(
                    ValueError(
                        f"the ranks differ: rank {self.world_rank(0)} called {every[0]}, rank {self.world_rank(rank)} "
                        f"called {other}{self.where()}"
                    )
                )

    def _gather_texts(self, text: str) -> list[str]:
        """The texts of all ranks, cut where they are long. Collective."""
        row = np.zeros((1, TEXT_BYTES), np.uint8)
        encoded = text.encode(errors="backslashreplace")
        if len(encoded) > TEXT_BYTES:  # what does not fit still counts
            encoded = encoded[: TEXT_BYTES - 16] + hashlib.blake2b(encoded, digest_size=8).hexdigest().encode()
        row[0, : len(encoded)] = np.frombuffer(encoded, np.uint8)
        out = np.empty((self.size, TEXT_BYTES), np.uint8)
        self._part_of = text.partition(" ")[0]
        try:
            self._all_gather(row, out, None)
        finally:
            self._part_of = None
        return [bytes(line).rstrip(b"\0").decode(errors="replace") for line in out]

    def compare_counts(self, send_counts: Counts, recv_counts: Counts) -> None:
        """ValueError on all ranks unless each sends what the other expects, under `Checked`. Collective."""

    def compare_gathered(self, recv_counts: Counts) -> None:
        """ValueError on all ranks unless they all have the same counts, under `Checked`. Collective."""

    def digest(self, counts: Counts) -> str:
        """A text that stands for the counts of all ranks, under `Checked`; else "". Collective."""
        return ""

    def check_usable(self, call: str) -> None:
        """Raise CommError if this Comm has failed or was freed."""
        if self.failure is not None:
            raise refused(CommError(f"{call}: this Comm cannot be used: {self.failure}{self.where()}"))

    def agree(self, name: str, text: str) -> None:
        """Raise ValueError on every rank unless all of them gave the same text. Collective.

        name  what the text says, for the error
        """
        digest = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "big")
        every = self.all_gather(np.array([digest], np.int64)).tolist()
        other = next((rank for rank, theirs in enumerate(every) if theirs != every[0]), None)
        if other is not None:
            raise refused(
                ValueError(
                    f"{name} of rank {self.world_rank(other)} is not that of rank {self.world_rank(0)}; this rank's "
                    f"is {text}{self.where()}"
                )
            )

    def world_rank(self, rank: int) -> int:
        """The rank, of the Comm that this one and its parents were split from, that is `rank` here."""
        return rank if self._world_ranks is None else self._world_ranks[rank]

    def where(self, rank: int | None = None) -> str:
        """Which rank this is, or another one, for the end of an error message: in the Comm that was not split."""
        rank = self.rank if rank is None else rank
        if self._world_ranks is None:
            return f"  (rank {rank} of {self.size})"
        return f"  (rank {self.world_rank(rank)} of {self._world_size}, {rank} of {self.size} in its group)"

    def _all_to_all_arguments(self, rows: Array, send: Any, recv: Any, out: Any) -> tuple[Array, Any, Any, Any]:
        rows = as_rows(rows, "rows")
        if (send is None) != (recv is None):
            raise ValueError("give both send_counts and recv_counts, or neither")
        if send is None:
            if rows.shape[0] % self.size:
                raise ValueError(f"rows has {rows.shape[0]} rows, which {self.size} ranks cannot share in equal blocks")
            num_out = rows.shape[0]
        else:
            send, recv = self.counts("send_counts", send, rows.shape[0]), self.counts("recv_counts", recv)
            num_out = int(recv.sum())
        if out is not None:
            check_out(out, rows, num_out)
        return rows, send, recv, out

    def _all_gather_arguments(self, rows: Array, recv: Any) -> tuple[Array, Any]:
        rows = as_rows(rows, "rows")
        if recv is not None:
            recv = self.counts("recv_counts", recv)
            if recv[self.rank] != rows.shape[0]:
                raise ValueError(f"recv_counts[{self.rank}] is {recv[self.rank]}, but rows has {rows.shape[0]} rows")
        return rows, recv

    def _all_reduce_arguments(self, array: Array) -> tuple[Array, None]:
        if num_axes(array, "array") == 0:
            return self._all_reduce_arguments(array.reshape(1))[0].reshape(()), None
        array = as_rows(array, "array")
        if dtype_name(array) not in SUMMABLE:
            raise TypeError(f"array has dtype {dtype_name(array)}, expected one that is summed: {', '.join(SUMMABLE)}")
        return array, None

    def _split_arguments(self, color: int, key: int | None) -> tuple[Any, Any]:
        for name, value in (("color", color), ("key", key)):
            if value is not None and not isinstance(value, int | np.integer):
                raise TypeError(f"{name} is {value!r}, expected an int")
        if not 0 <= color <= LARGEST_INT:
            raise ValueError(f"color is {color}, expected 0 .. {LARGEST_INT}")
        if key is not None and not -LARGEST_INT <= key <= LARGEST_INT:
            raise ValueError(f"key is {key}, expected -{LARGEST_INT} .. {LARGEST_INT}")
        return int(color), self.rank if key is None else int(key)

    def counts(self, name: str, counts: Any, num_rows: int | None = None) -> Counts:
        """`counts` as int64 [size]. Raises if they are not that many whole numbers >= 0 with the sum num_rows."""
        array = np.asarray(counts)
        if array.dtype.kind not in "iu":
            raise TypeError(f"{name} has dtype {array.dtype}, expected whole numbers")
        if array.shape != (self.size,):
            raise ValueError(f"{name} has shape {array.shape}, expected ({self.size},): one count per rank")
        array = np.ascontiguousarray(array, np.int64)
        most = LARGEST_SUM // self.size
        if array.view(np.uint64).max() > most:  # negative ones too
            at = int(array.view(np.uint64).argmax())
            raise ValueError(f"{name}[{at}] is {array[at]}, expected {'>= 0' if array[at] < 0 else f'<= {most}'}")
        if num_rows is not None and array.sum() != num_rows:
            raise ValueError(f"{name} sums to {array.sum()}, expected {num_rows}, the number of rows given")
        return array


def text_of_call(call: str, result: T, same: Callable[[T], str] | None) -> str:
    return call if same is None else f"{call} with {same(result)}"


def _no_arguments() -> tuple[()]:
    """The check of a call that has none."""
    return ()


def _rows_text(arguments: tuple[Any, ...]) -> str:
    """What must be the same on every rank, of arguments that begin with rows and one kind of their counts, or None."""
    rows, counts = arguments[:2]
    return rows_text(rows, counts is None)


def rows_text(rows: Array, in_equal_parts: bool) -> str:
    """What must be the same on every rank that moves such rows."""
    if in_equal_parts:
        return f"{dtype_name(rows)} {tuple(rows.shape)} in equal parts"
    return f"{dtype_name(rows)} rows of shape {tuple(rows.shape[1:])} and counts"


def check_out(out: Array, rows: Array, num_rows: int) -> None:
    """Raise unless `out` can take num_rows rows like `rows` while `rows` is read."""
    shape = (num_rows, *rows.shape[1:])
    if not (is_torch(out) if is_torch(rows) else isinstance(out, type(rows))):
        raise TypeError(f"out is a {type(out).__name__}, expected a {type(rows).__name__} like the rows given")
    if out.dtype != rows.dtype or (is_torch(out) and out.device != rows.device):
        raise TypeError(f"out has dtype {dtype_name(out)}, expected {dtype_name(rows)} on the same device as the rows")
    if tuple(out.shape) != shape:
        raise ValueError(f"out has shape {tuple(out.shape)}, expected {shape}")
    if not is_contiguous(out):
        raise ValueError("out is not contiguous")
    if isinstance(out, np.ndarray) and not out.flags.writeable:
        raise ValueError("out is read-only")
    if overlap(out, rows):
        raise ValueError("out shares memory with the rows given")
    mark_written(out)
