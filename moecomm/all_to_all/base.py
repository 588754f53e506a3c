"""AllToAll: what every all-to-all algorithm offers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from moecomm.arrays import Array, Counts, as_rows, empty_rows
from moecomm.comm import Comm, check_out
from moecomm.errors import CommError

if TYPE_CHECKING:
    from typing_extensions import Self


class AllToAll(ABC):
    """Every rank of `comm` sends rows to every other. All algorithms give the same bytes; they differ in the hops.

    An algorithm writes `_even` and `_uneven`; `testing.check_all_to_all` says whether they are right.
    """

    comm: Comm
    """The ranks that take part."""
    _freed = False

    def __call__(self, x: Array, out: Array | None = None) -> Array:
        """Even form: block i of x goes to rank i; block i of the result came from rank i.

        x        [p, ...]  the same dtype and shape on every rank
        out      [p, ...]  where to put the result: contiguous, like x, not overlapping it; may be used as scratch
        returns  [p, ...]  out, or a new array of x's type

        A non-contiguous x is copied first. Collective over comm. Raises ValueError or TypeError before anything is
        sent if x or out does not fit.
        """
        x, _, out = self.comm.checked(type(self).__name__, lambda: self._even_arguments(x, out))
        if out is None:
            out = empty_rows(x.shape[0], x)
        with self._failing_as_one():
            self._even(x, out)
        return out

    def rows(self, rows: Array, send_counts: Sequence[int] | Counts) -> tuple[Array, Counts]:
        """Uneven form: any number of rows to each rank.

        rows         [N, ...]  ordered by destination rank; the same dtype and row shape on every rank
        send_counts  [p]  rows for each rank, N in all
        returns      ([M, ...], [p])  the rows ordered by source rank, in the order their source had them, and how
                     many came from each rank (int64)

        Collective over comm. The counts are exchanged first. Raises like the even form.
        """
        rows, send_counts = self.comm.checked(
            f"{type(self).__name__}.rows", lambda: self._uneven_arguments(rows, send_counts)
        )
        with self._failing_as_one():
            return self._uneven(rows, send_counts)

    def free(self) -> None:
        """Give back the groups that the constructor made. Collective. comm stays, but not for this all-to-all."""
        if not self._freed:
            self._freed = True
            self._free()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if error[0] is None:  # after an error the other ranks may be elsewhere
            self.free()

    @abstractmethod
    def _even(self, x: Array, out: Array) -> None: ...

    @abstractmethod
    def _uneven(self, rows: Array, send_counts: Counts) -> tuple[Array, Counts]: ...

    def _free(self) -> None:  # noqa: B027 - an algorithm that makes no groups leaves it out
        """Called once, by `free`."""

    @contextmanager
    def _failing_as_one(self) -> Iterator[None]:
        """When a hop fails, no later call may start with another one: the ranks would meet in different hops."""
        if self._freed:
            raise CommError(f"{type(self).__name__}: it was freed{self.comm.where()}")
        try:
            yield
        except CommError as error:
            self.comm.failure = self.comm.failure or f"{type(self).__name__} failed: {error}"
            raise

    def _even_arguments(self, x: Array, out: Array | None) -> tuple[Array, None, Array | None]:
        x = as_rows(x, "x")
        if x.shape[0] != self.comm.size:
            raise ValueError(f"x has shape {tuple(x.shape)}, expected ({self.comm.size}, ...): one block per rank")
        if out is not None:
            check_out(out, x, x.shape[0])
        return x, None, out

    def _uneven_arguments(self, rows: Array, send_counts: Any) -> tuple[Array, Counts]:
        rows = as_rows(rows, "rows")
        return rows, self.comm.counts("send_counts", send_counts, rows.shape[0])
