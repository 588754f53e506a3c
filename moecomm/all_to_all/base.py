"""AllToAll: what every all-to-all algorithm offers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from moecomm.arrays import Array, Counts, as_rows, empty_rows
from moecomm.comm import Comm, check_out
from moecomm.errors import CommError
from moecomm.identity import Identity
from moecomm.nodes import Nodes

if TYPE_CHECKING:
    from typing_extensions import Self

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Hop:
    """The counts of one hop of a route."""

    sizes: Counts
    """[number of blocks] the rows of each block here before the hop."""
    send_counts: Counts
    """[size of the hop's group] rows to each of its ranks."""
    recv_counts: Counts
    """[size of the hop's group] rows from each of its ranks."""


@dataclass(frozen=True, eq=False)
class Route:
    """How many rows go where: made once by `AllToAll.route`, used any number of times, in both directions."""

    send_counts: Counts
    """[p] rows to each rank."""
    recv_counts: Counts
    """[p] rows from each rank."""
    hops: tuple[Hop, ...] = ()
    """Where an algorithm has several."""


class AllToAll(Identity, ABC):
    """Every rank of `comm` sends rows to every other. All algorithms give the same bytes; they differ in the hops.

    An algorithm writes `_even`, `_route`, `_send` and `_send_back`; `testing.check_all_to_all` says if they are right.
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
        self._as_one(self._even, x, out)
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
            f"{type(self).__name__}.rows", lambda: self._rows_arguments(rows, send_counts)
        )
        route = self._as_one(self._route, send_counts)
        return self._as_one(self._send, rows, route), route.recv_counts

    def route(self, send_counts: Sequence[int] | Counts) -> Route:
        """Exchange the counts alone, for rows that are to go this way several times, or back.

        send_counts  [p]  rows for each rank

        Collective over comm.
        """
        send_counts, _ = self.comm.checked(
            f"{type(self).__name__}.route", lambda: (self.comm.counts("send_counts", send_counts), ())
        )
        return self._as_one(self._route, send_counts.copy())  # the route outlives the call

    def send(self, rows: Array, route: Route) -> Array:
        """What `rows` returns, without exchanging the counts again. Collective over comm."""
        rows, _ = self.comm.checked(
            f"{type(self).__name__}.send", lambda: self._rows_arguments(rows, route.send_counts)
        )
        return self._as_one(self._send, rows, route)

    def send_back(self, rows: Array, route: Route) -> Array:
        """The way back: rows ordered by the rank that they came from -> ordered as those given to `send`.

        rows     [sum(route.recv_counts), ...]
        returns  [sum(route.send_counts), ...]

        Collective over comm.
        """
        rows, _ = self.comm.checked(
            f"{type(self).__name__}.send_back", lambda: self._rows_arguments(rows, route.recv_counts)
        )
        return self._as_one(self._send_back, rows, route)

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
    def _route(self, send_counts: Counts) -> Route: ...

    @abstractmethod
    def _send(self, rows: Array, route: Route) -> Array: ...

    @abstractmethod
    def _send_back(self, rows: Array, route: Route) -> Array: ...

    def _free(self) -> None:  # an algorithm that makes no groups leaves it out
        """Called once, by `free`."""

    def _as_one(self, step: Callable[..., T], *arguments: Any) -> T:
        """When a hop fails, no later call may start with another one: the ranks would meet in different hops."""
        if self._freed:
            raise CommError(f"{type(self).__name__}: it was freed{self.comm.where()}")
        try:
            return step(*arguments)
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

    def _rows_arguments(self, rows: Array, send_counts: Any) -> tuple[Array, Counts]:
        rows = as_rows(rows, "rows")
        return rows, self.comm.counts("send_counts", send_counts, rows.shape[0])


def agreed_nodes(comm: Comm, nodes: Nodes | None, algorithm: str) -> Nodes:
    """`nodes`, or those that are found. Collective: a rank with other nodes would wait in another group for ever."""
    comm.agree(f"{algorithm}: nodes", repr(nodes))
    if nodes is None:
        return Nodes.discover(comm)
    if not isinstance(nodes, Nodes) or nodes.world_size != comm.size:
        got = f"has {nodes.world_size} ranks" if isinstance(nodes, Nodes) else f"is a {type(nodes).__name__}"
        raise ValueError(f"{algorithm}: nodes {got}, expected Nodes of {comm.size} ranks{comm.where()}")
    return nodes
