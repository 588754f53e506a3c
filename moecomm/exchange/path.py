"""Path: the way of rows from the tokens of one rank to the experts of others, and back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from moecomm.all_to_all import AllToAll, Route
from moecomm.arrays import Array, as_rows, empty_rows
from moecomm.comm import Comm, rows_text
from moecomm.exchange.adjoint import Thread, linear
from moecomm.exchange.table import Blocks, RowTable
from moecomm.profiling import in_range


class Leg:
    """Along a route and back. The caller has checked the rows.

    make_route  returns the route, which all_to_all made. It is called when rows first go this way: until then the
                counts may still be on their way from a GPU. Collective
    """

    def __init__(self, all_to_all: AllToAll, make_route: Callable[[], Route]) -> None:
        all_to_all._check_not_freed()
        self.all_to_all = all_to_all
        self.digest = ""
        """Of the counts of all ranks, where the Comm is `Checked`: two ranks on different paths are found."""
        self._make_route = make_route
        self._route: Route | None = None

    @property
    def route(self) -> Route:
        """Collective where it is not known yet."""
        # Not a cached_property: before Python 3.12 that holds a lock, and ranks that are threads would wait in it.
        if self._route is None:
            self._route = self._make_route()
        return self._route

    def out(self, rows: Array) -> Array:
        """Collective. Rows behind those of the last rank stay at home. One rank alone moves nothing."""
        self.all_to_all._check_not_freed()
        route = self.route
        num_rows = int(route.send_counts.sum())
        # A table that a device made ends with copies of assignments that go nowhere.
        if len(rows) != num_rows:
            rows = rows[:num_rows]
        return rows if len(route.send_counts) == 1 else self.all_to_all._send(rows, route)

    def back(self, rows: Array) -> Array:
        """Collective."""
        self.all_to_all._check_not_freed()
        return rows if len(self.route.send_counts) == 1 else self.all_to_all._send_back(rows, self.route)


class EvenLeg(Leg):
    """Equal blocks of rows to every rank, of which nothing has to be counted."""

    def __init__(self, all_to_all: AllToAll, rows_per_pair: int) -> None:
        counts = np.full(all_to_all.comm.size, rows_per_pair)
        super().__init__(all_to_all, lambda: Route(counts, counts))
        self._rows_per_pair = rows_per_pair

    def out(self, rows: Array) -> Array:
        """[p R, ...] -> [p R, ...] Collective."""
        self.all_to_all._check_not_freed()
        blocks = rows.reshape((self.all_to_all.comm.size, self._rows_per_pair, *rows.shape[1:]))
        received = empty_rows(len(blocks), blocks)
        self.all_to_all._even(blocks, received)
        return received.reshape(rows.shape)

    def back(self, rows: Array) -> Array:
        """The way there once more: block i of every rank is rank i's. Collective."""
        return self.out(rows)


Step: TypeAlias = "RowTable | Blocks | Leg"
RANGES = {RowTable: "copy or sum rows", Blocks: "order rows", Leg: "send rows", EvenLeg: "send rows"}
"""What each step is called in a profile."""


@dataclass(frozen=True, eq=False)
class Path:
    """Steps in turn. Collective over comm where one of them is a leg."""

    steps: tuple[Step, ...]
    comm: Comm

    def part(self, first: int, end: int | None) -> Path:
        """The steps from first on, up to end."""
        return Path(self.steps[first:end], self.comm)

    def legs(self) -> list[Leg]:
        """The steps that go to other ranks."""
        return [step for step in self.steps if isinstance(step, Leg)]

    def agree(self) -> None:
        """Give the legs, whose counts are known by now, the digest of all ranks. Collective under `Checked`."""
        legs = self.legs()
        counts = [leg.route.send_counts for leg in legs]
        digest = self.comm.digest(counts[0] if len(counts) == 1 else np.concatenate(counts))
        for leg in legs:
            leg.digest = digest

    def rows_sent(self) -> int:
        """Rows that this rank sends to other ranks, there and back."""
        rows = 0
        for leg in self.legs():
            both_ways = leg.route.send_counts + leg.route.recv_counts
            # A rank's rows to itself cross nothing.
            rows += int(both_ways.sum() - both_ways[leg.all_to_all.comm.rank])
        return rows

    def carry(self, rows: Array, thread: Thread) -> tuple[Array, Thread]:
        """Rows of tokens to the experts. Differentiable: the gradient comes back along the path, summed over copies."""
        return linear(rows, thread, self.send, self._gradient_back, self.comm)

    def carry_back(self, rows: Array, thread: Thread) -> tuple[Array, Thread]:
        """Rows of experts to the tokens, summed over copies. Differentiable: the gradient goes out along the path."""
        return linear(rows, thread, self._back, self._gradient_out, self.comm)

    def text(self, rows: Array) -> str:
        """What must be the same on all ranks."""
        # All legs of a path have the same.
        digest = self.legs()[0].digest
        return f"{rows_text(rows, in_equal_parts=False)} of the route {digest or 'without a digest'}"

    def send(self, rows: Array) -> Array:
        """`carry` of rows without a gradient, such as numbers."""
        for step in self.steps:
            rows = in_range(RANGES[type(step)], step.out, rows)
        return rows

    def _back(self, rows: Array) -> Array:
        for step in reversed(self.steps):
            rows = in_range(RANGES[type(step)], step.back, rows)
        return rows

    def _gradient_out(self, grad: Array) -> Array:
        return self.send(
            self.comm.checked("backward pass of combine", as_rows, grad, "gradient", compared_text=self.text)
        )

    def _gradient_back(self, grad: Array) -> Array:
        return self._back(
            self.comm.checked("backward pass of dispatch", as_rows, grad, "gradient", compared_text=self.text)
        )


@dataclass(frozen=True, eq=False)
class Way:
    """Where the rows of a dispatch go.

    path             from the tokens of this rank to the experts of others: a table, a leg, and so on
    rows_per_expert  returns [local experts or more]: the rows for each expert of this rank, first
    """

    path: Path
    rows_per_expert: Callable[[], Array]

    def at_home(self) -> RowTable:
        """The first step, of the rows that are sent."""
        table = self.path.steps[0]
        assert isinstance(table, RowTable)
        # A table that a device made ends with the assignments that go nowhere.
        return RowTable(table.row, table.source[: self.path.legs()[0].route.send_counts.sum()])

    def away(self) -> RowTable | None:
        """The last step where rows are summed after it on their way back."""
        table = self.path.steps[-1]
        return table if isinstance(table, RowTable) else None
