"""Path: the way of rows from the tokens of one rank to the experts of others, and back."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moecomm.all_to_all import AllToAll, Route
from moecomm.arrays import Array, Counts, as_rows, on_host
from moecomm.comm import Comm, rows_text
from moecomm.exchange.adjoint import Thread, linear
from moecomm.exchange.table import RowTable


@dataclass(frozen=True, eq=False)
class Leg:
    """Along a route and back. The caller has checked the rows and made the route."""

    all_to_all: AllToAll
    route: Route

    @classmethod
    def along(cls, all_to_all: AllToAll, send_counts: Counts) -> Leg:
        """The leg of so many rows to each rank. Collective: the counts are exchanged."""
        all_to_all._check_not_freed()
        return cls(all_to_all, all_to_all._route(send_counts))

    def out(self, rows: Array) -> Array:
        """Collective."""
        self.all_to_all._check_not_freed()
        return self.all_to_all._send(rows, self.route)

    def back(self, rows: Array) -> Array:
        """Collective."""
        self.all_to_all._check_not_freed()
        return self.all_to_all._send_back(rows, self.route)


@dataclass(frozen=True, eq=False)
class Path:
    """Steps in turn. Collective over comm where one of them is a leg.

    digest  stands for the counts of all ranks, where comm is `Checked`: two ranks on different paths are found
    """

    steps: tuple[RowTable | Leg, ...]
    comm: Comm
    digest: str

    @classmethod
    def over(cls, comm: Comm, *steps: RowTable | Leg) -> Path:
        """A path of new legs. Collective under `Checked`."""
        counts = [step.route.send_counts for step in steps if isinstance(step, Leg)]
        return cls(steps, comm, comm.digest(np.concatenate(counts)))

    def for_rows_like(self, x: Array) -> Path:
        """The same path, with its tables where x is."""
        if on_host(x):
            return self
        steps = [step.on(x.device) if isinstance(step, RowTable) else step for step in self.steps]
        return Path(tuple(steps), self.comm, self.digest)

    def part(self, first: int, end: int | None) -> Path:
        """The steps from first on, up to end."""
        return Path(self.steps[first:end], self.comm, self.digest)

    def ends(self) -> tuple[RowTable, RowTable]:
        """The first and the last step."""
        at_home, away = self.steps[0], self.steps[-1]
        assert isinstance(at_home, RowTable)
        assert isinstance(away, RowTable)
        return at_home, away

    def rows_sent(self) -> int:
        """Rows that this rank sends to other ranks, there and back."""
        rows = 0
        for step in self.steps:
            if isinstance(step, Leg):
                both_ways = step.route.send_counts + step.route.recv_counts
                rows += int(both_ways.sum() - both_ways[step.all_to_all.comm.rank])
        return rows

    def carry(self, rows: Array, thread: Thread) -> tuple[Array, Thread]:
        """Rows of tokens to the experts. Differentiable: the gradient comes back along the path, summed over copies."""
        return linear(rows, thread, self._out, self._gradient_back, self.comm)

    def carry_back(self, rows: Array, thread: Thread) -> tuple[Array, Thread]:
        """Rows of experts to the tokens, summed over copies. Differentiable: the gradient goes out along the path."""
        return linear(rows, thread, self._back, self._gradient_out, self.comm)

    def text(self, rows: Array) -> str:
        """What must be the same on all ranks."""
        return f"{rows_text(rows, in_equal_parts=False)} of the route {self.digest or 'without a digest'}"

    def _out(self, rows: Array) -> Array:
        for step in self.steps:
            rows = step.out(rows)
        return rows

    def _back(self, rows: Array) -> Array:
        for step in reversed(self.steps):
            rows = step.back(rows)
        return rows

    def _gradient_out(self, grad: Array) -> Array:
        return self._out(self.comm.checked("backward pass of combine", as_rows, grad, "gradient", same=self.text))

    def _gradient_back(self, grad: Array) -> Array:
        return self._back(self.comm.checked("backward pass of dispatch", as_rows, grad, "gradient", same=self.text))
