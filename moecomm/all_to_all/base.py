"""AllToAll: what every all-to-all algorithm offers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

from moecomm.arrays import Array, Counts, Rows, as_rows, empty_rows
from moecomm.comm import Comm, CountsLike, check_out, rows_text
from moecomm.errors import CommError
from moecomm.failures import collective, refused
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
    digest: str = ""
    """Of the counts of all ranks: which route this is, where the Comm is `Checked`."""


class AllToAll(Identity, ABC):
    """Every rank of `comm` sends rows to every other. All algorithms give the same bytes; they differ in the hops.

    An algorithm writes `_even`, `_route`, `_send` and `_send_back`; `testing.check_all_to_all` says if they are right.
    """

    comm: Comm
    """The ranks that take part."""
    _freed = False
    _compared = False
    """Whether dtype and row shape were compared among the ranks."""

    # ---- the collectives -------------------------------------------------------------------------------------------

    def __call__(self, x: Rows, out: Rows | None = None) -> Rows:
        """Even form: block i of x goes to rank i; block i of the result came from rank i.

        x        [p, ...]  the same dtype and shape on every rank
        out      [p, ...]  where to put the result: contiguous, like x, not overlapping it; may be used as scratch
        returns  [p, ...]  out, or a new array of x's type

        A non-contiguous x is copied first. Collective over comm. Raises ValueError or TypeError before anything is
        sent if x or out does not fit; on all ranks, at the first call, if dtype or row shape differ among them.
        """
        with collective(type(self).__name__, self.comm):
            blocks, result = self._opened("", self._even_arguments, _blocks_text, x, out)
            if result is None:
                result = empty_rows(blocks.shape[0], blocks)
            self._even(blocks, result)
        return result

    def rows(self, rows: Rows, send_counts: CountsLike) -> tuple[Rows, Counts]:
        """Uneven form: any number of rows to each rank.

        rows         [N, ...]  ordered by destination rank; the same dtype and row shape on every rank
        send_counts  [p]  rows for each rank, N in all
        returns      ([M, ...], [p])  the rows ordered by source rank, in the order their source had them, and how
                     many came from each rank (int64)

        Collective over comm. The counts are exchanged first. Raises like the even form.
        """
        with collective(type(self).__name__, self.comm):
            contiguous, counts = self._opened(".rows", self._rows_arguments, _uneven_text, rows, send_counts)
            route = self._route(counts)
            return self._send(contiguous, route), route.recv_counts

    def route(self, send_counts: CountsLike) -> Route:
        """Exchange the counts alone, for rows that are to go this way several times, or back.

        send_counts  [p]  rows for each rank

        Collective over comm.
        """
        with collective(type(self).__name__, self.comm):
            self._check_not_freed()
            counts = self.comm.checked(f"{type(self).__name__}.route", self.comm.counts, "send_counts", send_counts)
            digest = self.comm.digest(counts)
            route = self._route(counts.copy())  # the route outlives the call
            return replace(route, digest=digest) if digest else route

    def send(self, rows: Rows, route: Route) -> Rows:
        """What `rows` returns, without exchanging the counts again. Collective over comm."""
        with collective(type(self).__name__, self.comm):
            checked = self._opened(".send", self._arguments_along, _text_along(route), rows, route, "send_counts")
            if not route.digest:
                self.comm.compare_counts(route.send_counts, route.recv_counts)
            return self._send(checked, route)

    def send_back(self, rows: Rows, route: Route) -> Rows:
        """The way back: rows ordered by the rank that they came from -> ordered as those given to `send`.

        rows     [sum(route.recv_counts), ...]
        returns  [sum(route.send_counts), ...]

        Collective over comm.
        """
        with collective(type(self).__name__, self.comm):
            checked = self._opened(".send_back", self._arguments_along, _text_along(route), rows, route, "recv_counts")
            if not route.digest:
                self.comm.compare_counts(route.recv_counts, route.send_counts)
            return self._send_back(checked, route)

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

    # ---- what an algorithm writes ----------------------------------------------------------------------------------
    # Inside a call whose arguments were checked. A step that raises makes comm unusable, and with it the groups of all
    # hops: after a failed hop no rank may start another call, or the ranks would meet in different hops.

    @abstractmethod
    def _even(self, x: Array, out: Array) -> None: ...

    @abstractmethod
    def _route(self, send_counts: Counts) -> Route: ...

    # An exchange tells each rank several counts at once, and makes routes of them afterwards. An algorithm that can do
    # so without one more message for each route writes these two.

    def _tell(self, numbers: Array) -> tuple[Array, list[tuple[Array, Array, Array]]]:
        """numbers [p, C]: a row for each rank -> the rows of all ranks [p, C], and what each hop saw of the numbers.

        That are the fields of Hop, with an axis C. numbers may be on a device: nothing waits for it.
        """
        received = empty_rows(numbers.shape[0], numbers)
        self._even(numbers, received)
        return received, []

    def _told_route(self, send_counts: Counts, recv_counts: Counts, hops: list[Hop]) -> Route:
        """The route of counts that are one column, or the sum of some, of what was told. Collective."""
        return self._route(send_counts)

    @abstractmethod
    def _send(self, rows: Array, route: Route) -> Array: ...

    @abstractmethod
    def _send_back(self, rows: Array, route: Route) -> Array: ...

    def _check_route(self, route: Route) -> None:  # for an algorithm that needs no more than the counts
        """TypeError unless this algorithm can send along the route."""

    def _free(self) -> None:  # an algorithm that makes no groups leaves it out
        """Called once, by `free`."""

    # ---- checks ----------------------------------------------------------------------------------------------------

    def _opened(self, form: str, check: Callable[..., T], compared_text: Callable[[T], str], *arguments: Any) -> T:
        """What `check` returns; at this object's first call the ranks compare what `compared_text` says of it."""
        self._check_not_freed()
        call = type(self).__name__ + form
        if self._compared:
            return self.comm.checked(call, check, *arguments, compared_text=compared_text)
        result = self.comm.compared(call, check, *arguments, compared_text=compared_text)
        self._compared = True
        return result

    def _check_not_freed(self) -> None:
        if self._freed:
            raise refused(CommError(f"{type(self).__name__}: it was freed{self.comm.where()}"))

    def _even_arguments(self, x: Array, out: Array | None) -> tuple[Array, Array | None]:
        x = as_rows(x, "x")
        if x.shape[0] != self.comm.size:
            raise ValueError(f"x has shape {tuple(x.shape)}, expected ({self.comm.size}, ...): one block per rank")
        if out is not None:
            check_out(out, x, x.shape[0])
        return x, out

    def _rows_arguments(self, rows: Array, send_counts: CountsLike) -> tuple[Array, Counts]:
        rows = as_rows(rows, "rows")
        return rows, self.comm.counts("send_counts", send_counts, rows.shape[0])

    def _arguments_along(self, rows: Array, route: Route, counts: str) -> Array:
        if not isinstance(route, Route):
            raise TypeError(
                f"route is a {type(route).__name__}, expected one that {type(self).__name__}.route returned"
            )
        rows, _ = self._rows_arguments(rows, getattr(route, counts))
        self._check_route(route)
        return rows

    def __repr__(self) -> str:
        state = ", freed" if self._freed else ""
        return f"{type(self).__name__}({self.comm!r}{state})"


def _blocks_text(arguments: tuple[Array, Array | None]) -> str:
    blocks, _ = arguments
    return rows_text(blocks, in_equal_parts=True)


def _uneven_text(arguments: tuple[Array, Counts]) -> str:
    rows, _ = arguments
    return rows_text(rows, in_equal_parts=False)


def _text_along(route: Route) -> Callable[[Array], str]:
    """Says which rows go along which route: two ranks may have made several, and mix them up."""
    return lambda rows: f"{rows_text(rows, in_equal_parts=False)} of the route {route.digest or 'without a digest'}"


def agreed_nodes(comm: Comm, nodes: Nodes | None, algorithm: str) -> Nodes:
    """`nodes`, or those that are found. Collective: a rank with other nodes would wait in another group for ever."""
    comm.agree(f"{algorithm}: nodes", repr(nodes))
    if nodes is None:
        return Nodes.discover(comm)
    if not isinstance(nodes, Nodes) or nodes.world_size != comm.size:
        got = f"has {nodes.world_size} ranks" if isinstance(nodes, Nodes) else f"is a {type(nodes).__name__}"
        raise refused(ValueError(f"{algorithm}: nodes {got}, expected Nodes of {comm.size} ranks{comm.where()}"))
    return nodes
