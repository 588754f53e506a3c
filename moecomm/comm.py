"""Comm: a group of ranks that can move rows to each other. The contract that every transport keeps."""

from __future__ import annotations

import hashlib
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

T = TypeVar("T", bound="tuple[Any, ...]")

SUMMABLE = ("float32", "float64", "float16", "bfloat16", "int64", "int32", "int8", "uint8")
"""What every transport can add."""

LARGEST_INT = 2**31 - 1
LARGEST_SUM = 2**63 - 1
"""MPI takes colors and keys up to this."""


class Started(Protocol):
    """A collective that may still be under way."""

    def done(self) -> bool:
        """Whether it is finished, on this rank. To be asked until it is: a transport may work in here alone."""


class _Done:
    def done(self) -> bool:
        return True


class Comm(Identity, ABC):
    """A group of `size` ranks, of which this one is `rank`.

    Every method is collective: all ranks of the group call it, in the same order, and it returns on all of them or
    raises. `rows` is a numpy array, a torch tensor or a cupy array [num_rows, ...]; the result has its type, dtype and
    device. A non-contiguous array is copied first. Counts are in rows, int64, on the host, one per rank. A result in
    host memory is ready on return; one in device memory is ready for work queued after the call on the current stream.

    Bad arguments raise ValueError or TypeError before anything is sent, on the rank that passed them: wrap the Comm in
    `Checked` to raise on all ranks and to compare the arguments among them. A collective that fails raises CommError,
    and so does every later call on the same Comm.

    To write a transport, set `rank` and `size`, write the methods marked below, and call `testing.check_comm`.
    """

    rank: int
    size: int
    failure: str | None = None
    """Why this Comm cannot be used any more, or None."""
    _limit: float | None = None
    """Seconds that a collective may take, for a transport that knows such a thing."""

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
        rows, send, recv, out = self.checked(
            "all_to_all", lambda: self._all_to_all_arguments(rows, send_counts, recv_counts, out)
        )
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
        rows, recv = self.checked("all_gather", lambda: self._all_gather_arguments(rows, recv_counts))
        out = empty_rows(rows.shape[0] * self.size if recv is None else int(recv.sum()), rows)
        self._all_gather(rows, out, recv)
        return out

    def all_reduce(self, array: Array) -> Array:
        """Return the element-wise sum over all ranks, as a new array. 16-bit floats are summed in float32."""
        array, _ = self.checked("all_reduce", lambda: self._all_reduce_arguments(array))
        if dtype_name(array) not in ("float16", "bfloat16"):
            return self._all_reduce(array)
        return as_dtype(self._all_reduce(as_dtype(array, sum_dtype(array))), array.dtype)

    def barrier(self) -> None:
        """Return when every rank has come."""
        self.checked("barrier", tuple)
        self._barrier()

    def split(self, color: int, key: int | None = None) -> Comm:
        """Return the Comm of the ranks that gave the same `color`, ordered by `key`, ties by rank.

        color  0 .. 2**31 - 1
        key    None: this Comm's own rank order
        """
        color, key = self.checked("split", lambda: self._split_arguments(color, key))
        return self._split(color, key)

    def node_key(self) -> int:
        """A number in [0, 2**63) that is the same on two ranks if and only if they share a node's memory."""
        self.checked("node_key", tuple)
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

    def waiting(self, call: str, seconds: float) -> None:
        """Raise CommError if `call` need not be waited for: a rank has failed, or the Comm's limit is over."""
        self.check_usable(call)
        if self._limit is not None and seconds > self._limit:
            self._give_up(call)

    def _give_up(self, call: str) -> NoReturn:
        self.failure = f"{call} waited {self._limit} s for the other {self.size - 1} rank(s) to come and send"
        raise CommError(f"{self.failure}{self.where()}")

    def _free(self) -> None:  # a transport that has nothing to give back leaves it out
        """Called once, by `free`."""

    # ---- checks ----------------------------------------------------------------------------------------------------

    def checked(self, call: str, arguments: Callable[[], T]) -> T:
        """`arguments()`, with the call and the rank added to what it raises. `Checked` makes this a collective.

        arguments  checks what one rank can check alone and returns a tuple; where it begins with an array and its
                   counts (or None), those must fit those of the other ranks; a function in it returns a text that must
                   be the same on all of them, and is called by `Checked` alone
        """
        self.check_usable(call)
        try:
            return arguments()
        except (TypeError, ValueError) as error:
            raise type(error)(f"{call}: {error}{self.where()}") from None

    def check_usable(self, call: str) -> None:
        """Raise CommError if this Comm has failed or was freed."""
        if self.failure is not None:
            raise CommError(f"{call}: this Comm cannot be used: {self.failure}{self.where()}")

    def agree(self, name: str, text: str) -> None:
        """Raise ValueError on every rank unless all of them gave the same text. Collective.

        name  what the text says, for the error
        """
        digest = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "big")
        every = self.all_gather(np.array([digest], np.int64)).tolist()
        other = next((rank for rank, theirs in enumerate(every) if theirs != every[0]), None)
        if other is not None:
            raise ValueError(f"{name} of rank {other} is not that of rank 0; this rank's is {text}{self.where()}")

    def where(self) -> str:
        """Which rank this is, for the end of an error message."""
        return f"  (rank {self.rank} of {self.size})"

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
