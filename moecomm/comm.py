"""Comm: a group of ranks that can move rows to each other. The contract that every transport keeps."""

from __future__ import annotations

import hashlib
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, Protocol, TypeAlias, TypeVar

import numpy as np

from moecomm.arrays import (
    Array,
    Counts,
    Rows,
    as_dtype,
    as_rows,
    dtype_name,
    empty_rows,
    is_torch,
    mark_written,
    num_axes,
    overlap,
    sum_dtype,
)
from moecomm.errors import CommError
from moecomm.failures import collective, refused
from moecomm.identity import Identity

T = TypeVar("T")
Arguments = TypeVar("Arguments", bound="tuple[Any, ...]")
CountsLike: TypeAlias = "Sequence[int] | Counts"

SUMMABLE = ("float32", "float64", "float16", "bfloat16", "int64", "int32", "int8", "uint8")
"""The dtypes that every transport can add."""

LARGEST_INT = 2**31 - 1
"""MPI takes colors and keys up to this."""

LARGEST_SUM = 2**63 - 1
"""Of counts, which are int64."""

SPLIT_FROM_A_FAILED_COMM = "the Comm that it was split from cannot be used"

TEXT_BYTES = 512
"""The longest text that a rank tells the others about its call."""


class Started(Protocol):
    """A collective that may still be under way."""

    def done(self) -> bool:
        """Whether it is finished on this rank. To be called until it is: a transport may work in here alone."""


class _Done:
    def done(self) -> bool:
        return True


Missing = Callable[[], Sequence[int]]
"""Returns the ranks of a Comm that have not come to a call, as far as this rank can see."""


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
    """For errors: the caller's call, while this Comm makes a smaller one for it."""
    _groups: tuple[weakref.ref[Comm], ...] = ()
    """The Comms that were split from this one."""
    _compares_rows = False
    """Whether the transport itself compares the rows that arrive with those that it expects."""
    _compared: frozenset[str] = frozenset()
    """The kinds of calls whose rows were compared among the ranks."""

    # ---- the collectives -------------------------------------------------------------------------------------------

    def all_to_all(
        self,
        rows: Rows,
        send_counts: CountsLike | None = None,
        recv_counts: CountsLike | None = None,
        *,
        out: Rows | None = None,
    ) -> Rows:
        """Send each rank its rows and return what every rank sent to this one.

        rows         [num_rows, ...]  ordered by destination rank
        send_counts  [size]  rows for each rank, num_rows in all; None: equal blocks of num_rows / size rows
        recv_counts  [size]  rows from each rank; None if and only if send_counts is
        out          [sum(recv_counts), ...]  where to put the result: contiguous, like rows, not overlapping them
        returns      [sum(recv_counts), ...]  ordered by source rank

        Equal blocks go through the library's own all-to-all, with its algorithms for small messages.
        """
        with collective("all_to_all", self):
            arguments = self._opened("all_to_all", self._all_to_all_arguments, rows, send_counts, recv_counts, out)
            contiguous, send, recv, result = arguments
            if send is not None:
                self.compare_counts(send, recv)
            if result is None:
                num_rows = contiguous.shape[0] if recv is None else int(recv.sum())
                result = empty_rows(num_rows, contiguous)
            self._all_to_all(contiguous, result, send, recv)
        return result

    def move(
        self, rows: Array, out: Array, send_counts: Counts | None = None, recv_counts: Counts | None = None
    ) -> None:
        """`all_to_all` into out without any check: for algorithms, inside a call that has been checked."""
        self._all_to_all(rows, out, send_counts, recv_counts)

    def start(self, rows: Array, out: Array, send_counts: Counts, recv_counts: Counts) -> Started:
        """`move` that may return before it is done. Rows and out may not be touched until the result is.

        Several may be under way, started in the same order on all ranks. A transport without such a thing does it here.
        """
        return self._start(rows, out, send_counts, recv_counts)

    def all_gather(self, rows: Rows, recv_counts: CountsLike | None = None) -> Rows:
        """Return the rows of all ranks, in rank order.

        rows         [num_rows, ...]
        recv_counts  [size]  rows of each rank; None: every rank has num_rows
        returns      [sum(recv_counts), ...]
        """
        with collective("all_gather", self):
            contiguous, recv = self._opened("all_gather", self._all_gather_arguments, rows, recv_counts)
            if recv is not None:
                self.compare_gathered(recv)
            num_rows = contiguous.shape[0] * self.size if recv is None else int(recv.sum())
            result = empty_rows(num_rows, contiguous)
            self._all_gather(contiguous, result, recv)
        return result

    def all_reduce(self, array: Rows) -> Rows:
        """Return the element-wise sum over all ranks, as a new array. 16-bit floats are summed in float32."""
        with collective("all_reduce", self):
            contiguous, _ = self._opened("all_reduce", self._all_reduce_arguments, array)
            if dtype_name(contiguous) not in ("float16", "bfloat16"):
                return self._all_reduce(contiguous)
            # A sum of many ranks rounded to 16 bits at each step would depend on the library's order of additions.
            total = self._all_reduce(as_dtype(contiguous, sum_dtype(contiguous)))
            return as_dtype(total, contiguous.dtype)

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
            # The library's split may block for ever. All ranks first meet in a collective that has a limit, which also
            # tells who the members are: errors name them by their rank in the world.
            wishes = np.empty((self.size, 2), np.int64)
            self._all_gather(np.array([[color, key]], np.int64), wishes, None)
            members = np.flatnonzero(wishes[:, 0] == color)
            members = members[np.argsort(wishes[members, 1], kind="stable")]
            group = self._split(color, key)
            group._world_ranks = [self.world_rank(rank) for rank in members.tolist()]
            group._world_size = self._world_size or self.size
            self._adopt(group)
        return group

    def node_key(self) -> int:
        """A number in [0, 2**63) that is the same on two ranks if and only if they share a node's memory."""
        with collective("node_key", self):
            self.checked("node_key", _no_arguments)
            return self._node_key()

    def free(self) -> None:
        """Give back what `split` made. A communicator that the caller brought stays the caller's."""
        # After a failure the library may still be inside a call: what it holds stays until the process ends.
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
        # The first reason is the cause; later ones follow from it.
        self.failure = self.failure or why
        for reference in self._groups:
            group = reference()
            if group is not None:
                group.fail(f"{SPLIT_FROM_A_FAILED_COMM}: {why}")

    def _adopt(self, group: Comm) -> None:
        """Remember what was split from this Comm, for `fail`."""
        alive = [reference for reference in self._groups if reference() is not None]
        self._groups = (*alive, weakref.ref(group))

    def _free(self) -> None:  # a transport that has nothing to give back leaves it out
        """Called once, by `free`."""

    # ---- agreement -------------------------------------------------------------------------------------------------

    def checked(
        self, call: str, check: Callable[..., T], *arguments: Any, compared_text: Callable[[T], str] | None = None
    ) -> T:
        """check(*arguments), with the call and the rank added to the ValueError or TypeError that it raises.

        check          looks at what one rank can see alone
        compared_text  says of its result, in a text, what must be the same on all ranks

        `Checked` makes this a collective: the texts are compared, and what one rank refuses is raised on all of them.
        """
        self.check_usable(call)
        try:
            return check(*arguments)
        except (TypeError, ValueError) as error:
            raise refused(type(error)(f"{call}: {error}{self.where()}")) from None

    def compared(self, call: str, check: Callable[..., T], *arguments: Any, compared_text: Callable[[T], str]) -> T:
        """`checked`, and the texts are compared in any case: for the first call of an object. Collective."""
        result = self.checked(call, check, *arguments)
        self.compare_texts(text_of_call(call, result, compared_text))
        return result

    def _opened(self, call: str, check: Callable[..., Arguments], *arguments: Any) -> Arguments:
        """The checked arguments. The ranks compare dtype and row shape at the first call of each kind.

        Later ones are left to `Checked`: to compare whenever a rank changes its rows would hang where another does not.
        """
        # A transport that compares what arrives, as threads do, needs no message for it.
        if call in self._compared or self._compares_rows:
            return self.checked(call, check, *arguments, compared_text=_rows_text)
        result = self.compared(call, check, *arguments, compared_text=_rows_text)
        self._compared |= {call}
        return result

    def tell_refusal(self, error: Exception) -> None:
        """Under `Checked`, raise what this rank refuses on the others, which are in `checked`. Collective there."""

    def compare_texts(self, text: str) -> None:
        """ValueError on all ranks, with two ranks and their texts, unless all gave the same. Collective.

        text  which call, with what. A text that begins with "!" is what its rank refuses, and all others raise
        """
        texts = self._gather_texts(text)
        if text.startswith("!"):
            return  # the caller raises its own error
        for rank, told in enumerate(texts):
            if told.startswith("!"):
                raise refused(
                    ValueError(
                        f"{told[1:]}, found by rank {self.world_rank(rank)}; this is rank "
                        f"{self.world_rank(self.rank)}, which gave up with it"
                    )
                )
        for rank, told in enumerate(texts):
            if told != texts[0]:
                raise refused(
                    ValueError(
                        f"the ranks differ: rank {self.world_rank(0)} called {texts[0]}, rank {self.world_rank(rank)} "
                        f"called {told}{self.where()}"
                    )
                )

    def agree(self, name: str, text: str) -> None:
        """Raise ValueError on every rank unless all of them gave the same text. Collective.

        name  what the text says, for the error
        """
        with collective(name, self):
            self.check_usable(name)
            texts = self._gather_texts(f"{name}: {text}")
            for rank, told in enumerate(texts):
                if told != texts[0]:
                    raise refused(
                        ValueError(
                            f"{name} of rank {self.world_rank(rank)} is not that of rank {self.world_rank(0)}; this "
                            f"rank's is {text}{self.where()}"
                        )
                    )

    def _gather_texts(self, text: str) -> list[str]:
        """The texts of all ranks, cut where they are long. Collective."""
        encoded = text.encode(errors="backslashreplace")
        if len(encoded) > TEXT_BYTES:
            # A difference behind the cut must not be lost: a digest of the whole text ends it.
            digest = hashlib.blake2b(encoded, digest_size=8).hexdigest().encode()
            encoded = encoded[: TEXT_BYTES - len(digest)] + digest
        # Rows of one length need no exchange of lengths before.
        row = np.zeros((1, TEXT_BYTES), np.uint8)
        row[0, : len(encoded)] = np.frombuffer(encoded, np.uint8)
        table = np.empty((self.size, TEXT_BYTES), np.uint8)
        self._part_of = text.partition(" ")[0]
        try:
            self._all_gather(row, table, None)
        finally:
            self._part_of = None
        return [bytes(line).rstrip(b"\0").decode(errors="replace") for line in table]

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
            # Not `refused`: inside of a larger collective earlier steps may have been made, and its Comms fail too.
            raise CommError(f"{call}: this Comm cannot be used: {self.failure}{self.where()}")

    # ---- names of ranks, for errors --------------------------------------------------------------------------------

    def world_rank(self, rank: int) -> int:
        """The rank, in the Comm that this one and its parents were split from, of this Comm's `rank`."""
        return rank if self._world_ranks is None else self._world_ranks[rank]

    def where(self, rank: int | None = None) -> str:
        """The end of an error message: this rank, or another one, in the Comm that was not split."""
        rank = self.rank if rank is None else rank
        if self._world_ranks is None:
            return f"  (rank {rank} of {self.size})"
        return f"  (rank {self.world_rank(rank)} of {self._world_size}, {rank} of {self.size} in its group)"

    def __repr__(self) -> str:
        state = "" if self.failure is None else f", unusable: {self.failure}"
        return f"{type(self).__name__}({self.where().strip(' ()')}{state})"

    # ---- checks of one rank ----------------------------------------------------------------------------------------

    def _all_to_all_arguments(
        self, rows: Array, send_counts: Any, recv_counts: Any, out: Array | None
    ) -> tuple[Array, Any, Any, Array | None]:
        rows = as_rows(rows, "rows")
        if (send_counts is None) != (recv_counts is None):
            raise ValueError("give both send_counts and recv_counts, or neither")
        num_rows = rows.shape[0]
        if send_counts is not None:
            send_counts = self.counts("send_counts", send_counts, num_rows)
            recv_counts = self.counts("recv_counts", recv_counts)
            num_rows = int(recv_counts.sum())
        elif num_rows % self.size:
            raise ValueError(f"rows has {num_rows} rows, which {self.size} ranks cannot share in equal blocks")
        if out is not None:
            check_out(out, rows, num_rows)
        return rows, send_counts, recv_counts, out

    def _all_gather_arguments(self, rows: Array, recv_counts: Any) -> tuple[Array, Any]:
        rows = as_rows(rows, "rows")
        if recv_counts is None:
            return rows, None
        counts = self.counts("recv_counts", recv_counts)
        if counts[self.rank] != rows.shape[0]:
            raise ValueError(f"recv_counts[{self.rank}] is {counts[self.rank]}, but rows has {rows.shape[0]} rows")
        return rows, counts

    def _all_reduce_arguments(self, array: Array) -> tuple[Array, None]:
        if num_axes(array, "array") == 0:
            one_number, _ = self._all_reduce_arguments(array.reshape(1))
            return one_number.reshape(()), None
        array = as_rows(array, "array")
        if dtype_name(array) not in SUMMABLE:
            raise TypeError(f"array has dtype {dtype_name(array)}, expected one that is summed: {', '.join(SUMMABLE)}")
        return array, None

    def _split_arguments(self, color: int, key: int | None) -> tuple[int, int]:
        for name, value in (("color", color), ("key", key)):
            if value is not None and not isinstance(value, int | np.integer):
                raise TypeError(f"{name} is {value!r}, expected an int")
        if not 0 <= color <= LARGEST_INT:
            raise ValueError(f"color is {color}, expected 0 .. {LARGEST_INT}")
        if key is not None and not -LARGEST_INT <= key <= LARGEST_INT:
            raise ValueError(f"key is {key}, expected -{LARGEST_INT} .. {LARGEST_INT}")
        return int(color), self.rank if key is None else int(key)

    def counts(self, name: str, counts: object, num_rows: int | None = None) -> Counts:
        """`counts` as int64 [size]. Raises if they are not that many whole numbers >= 0 with the sum num_rows."""
        array = np.asarray(counts)
        if array.dtype.kind not in "iu":
            raise TypeError(f"{name} has dtype {array.dtype}, expected whole numbers")
        if array.shape != (self.size,):
            raise ValueError(f"{name} has shape {array.shape}, expected ({self.size},): one count per rank")
        array = np.ascontiguousarray(array, np.int64)
        # Counts whose sum wraps around in 64 bits could pass for the number of rows. As unsigned numbers, negative
        # counts are beyond this bound as well.
        bound = LARGEST_SUM // self.size
        unsigned = array.view(np.uint64)
        if unsigned.max() > bound:
            worst = int(unsigned.argmax())
            wanted = ">= 0" if array[worst] < 0 else f"<= {bound}"
            raise ValueError(f"{name}[{worst}] is {array[worst]}, expected {wanted}")
        if num_rows is not None and array.sum() != num_rows:
            raise ValueError(f"{name} sums to {array.sum()}, expected {num_rows}, the number of rows given")
        return array


class MpiCommunicator(Protocol):
    """An mpi4py communicator, as far as a type checker needs to know it."""

    def Get_rank(self) -> int:  # noqa: N802 - mpi4py's name
        """This rank."""

    def Get_size(self) -> int:  # noqa: N802
        """The number of ranks."""


class TorchGroup(Protocol):
    """A torch ProcessGroup, likewise."""

    def rank(self) -> int:
        """This rank."""

    def size(self) -> int:
        """The number of ranks."""


CommLike: TypeAlias = Comm | MpiCommunicator | TorchGroup
"""What algorithms and exchanges take as a group of ranks; `transports.as_comm` makes a Comm of it."""


def text_of_call(call: str, result: T, compared_text: Callable[[T], str] | None) -> str:
    """What a rank tells the others about its call."""
    return call if compared_text is None else f"{call} with {compared_text(result)}"


def _no_arguments() -> tuple[()]:
    """The check of a call that has none."""
    return ()


def _rows_text(arguments: tuple[Any, ...]) -> str:
    rows, counts = arguments[:2]
    return rows_text(rows, in_equal_parts=counts is None)


def rows_text(rows: Array, in_equal_parts: bool) -> str:
    """What must be the same on every rank that moves such rows."""
    if in_equal_parts:
        return f"{dtype_name(rows)} {tuple(rows.shape)} in equal parts"
    return f"{dtype_name(rows)} rows of shape {tuple(rows.shape[1:])} and counts"


def check_out(out: Array, rows: Array, num_rows: int) -> None:
    """Raise unless `out` can take num_rows rows like `rows` while `rows` is read."""
    of_torch = is_torch(rows)
    if not (is_torch(out) if of_torch else isinstance(out, type(rows))):
        raise TypeError(f"out is a {type(out).__name__}, expected a {type(rows).__name__} like the rows given")
    if out.dtype != rows.dtype or (of_torch and out.device != rows.device):
        raise TypeError(f"out has dtype {dtype_name(out)}, expected {dtype_name(rows)} on the same device as the rows")
    shape = (num_rows, *rows.shape[1:])
    if tuple(out.shape) != shape:
        raise ValueError(f"out has shape {tuple(out.shape)}, expected {shape}")
    if not (out.is_contiguous() if of_torch else out.flags.c_contiguous):
        raise ValueError("out is not contiguous")
    if isinstance(out, np.ndarray) and not out.flags.writeable:
        raise ValueError("out is read-only")
    # The library may write out while it still reads rows.
    if overlap(out, rows):
        raise ValueError("out shares memory with the rows given")
    if of_torch:
        mark_written(out)
