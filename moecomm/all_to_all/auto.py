"""The all-to-all that chooses: by the cost model at first, then by its own measurements."""

from __future__ import annotations

import json
import math
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from moecomm import cost
from moecomm.all_to_all.base import AllToAll, Route, agreed_nodes
from moecomm.all_to_all.flat import FlatAllToAll
from moecomm.all_to_all.hierarchical import HierarchicalAllToAll
from moecomm.all_to_all.shared import SharedAllToAll, SharedRoute
from moecomm.arrays import Array, Counts, on_host, row_bytes
from moecomm.comm import CommLike
from moecomm.errors import CommError
from moecomm.failures import collective, refused
from moecomm.nodes import Nodes
from moecomm.transports import as_comm

Form = Literal["even", "uneven"]
FORMS: tuple[Form, Form] = ("even", "uneven")

TUNED_SIZES = tuple(16 << i for i in range(13))

LEAST_ROUNDS = 2
"""Rounds of `tune` after the first, which only warms up."""

MARGIN = 1.15
"""Ratio by which repeated measurements of one algorithm differ where ranks share cores."""

MOST_TUNED_BYTES = 1 << 26
"""Of one rank's rows in a measurement."""

MOST_CHOICES = 1000
"""Choices that are cached."""


@dataclass(frozen=True)
class Table:
    """How long each algorithm took on the nodes that it was measured on.

    node_sizes  ranks of each node
    seconds     form -> bytes a pair of ranks, on average -> name of the algorithm -> median of the slowest rank's time
    """

    node_sizes: tuple[int, ...]
    seconds: dict[Form, dict[int, dict[str, float]]]

    def fastest(self, form: Form, bytes_per_pair: float, names: Iterable[str]) -> str | None:
        """The one of these names that was fastest at the nearest size measured; None if none was measured.

        "flat", which needs no memory, is preferred unless another took less than 1 / MARGIN of its time.
        """
        sizes = self.seconds.get(form, {})
        if not sizes:
            return None
        size = min(sizes, key=lambda size: (abs(math.log2(size / max(bytes_per_pair, 1))), size))
        rated = {name: seconds for name, seconds in sizes[size].items() if name in names}
        if "flat" in rated:
            rated["flat"] /= MARGIN
        return _least(rated) if rated else None

    def to_json(self) -> str:
        """The table as text."""
        return json.dumps({"node_sizes": self.node_sizes, "seconds": self.seconds}, indent=1, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Table:
        """The table that `to_json` wrote. ValueError if the text is something else."""
        try:
            read = json.loads(text)
            seconds: dict[Form, dict[int, dict[str, float]]] = {}
            for form, sizes in read["seconds"].items():
                # JSON has only texts as keys: the sizes become numbers again.
                seconds[form] = {
                    int(size): {str(name): float(value) for name, value in times.items()}
                    for size, times in sizes.items()
                }
            table = cls(tuple(map(int, read["node_sizes"])), seconds)
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"Table.from_json: not a table of AutoAllToAll: {error!r}") from None
        if not set(seconds) <= set(FORMS) or any(size < 1 for sizes in seconds.values() for size in sizes):
            raise ValueError(f"Table.from_json: expected the forms {FORMS} and sizes >= 1, got {seconds}")
        return table


class AutoAllToAll(AllToAll):
    """Each call uses the algorithm that is expected to be fastest for its size; all ranks always use the same.

    comm   an mpi4py communicator, a torch ProcessGroup or a moecomm Comm
    nodes  the partition of its ranks into nodes, the same on every rank; None: the nodes found by Nodes.discover
    links  the machine as the cost model assumes it until `tune` has measured it, the same on every rank
    table  the result of an earlier `tune` on nodes of the same sizes, the same on every rank; None: no measurements

    The algorithms are "flat", "hierarchical", and "shared" where the ranks of each node can share memory. Arrays on a
    device never use "shared". The size of a call is bytes a pair of ranks: of a block in the even form, the mean over
    all pairs in the uneven form, where it is exchanged with the counts. Memory: that of the algorithm used, and of
    "shared" in any case.

    The constructor is collective over comm. Raises ValueError on every rank if an argument is wrong or differs among
    them.
    """

    table: Table
    """What was measured so far."""
    algorithms: dict[str, AllToAll]
    """The algorithms to choose from, by name."""

    def __init__(
        self,
        comm: CommLike,
        nodes: Nodes | None = None,
        *,
        links: cost.Links = cost.CPU_NODES,
        table: Table | None = None,
    ) -> None:
        self.comm = as_comm(comm)
        with collective(type(self).__name__, self.comm):
            self.nodes = agreed_nodes(self.comm, nodes, type(self).__name__)
            self.links = links
            self.table = self._agreed_table(links, table)
            self.algorithms = {
                "flat": FlatAllToAll(self.comm),
                "hierarchical": HierarchicalAllToAll(self.comm, self.nodes),
            }
            try:
                self.algorithms["shared"] = SharedAllToAll(self.comm, self.nodes)
            except CommError:
                # No memory is shared, which all ranks know, or a rank did not come: then the Comm is unusable, and
                # the other ranks may have found memory and chosen another algorithm than this one would.
                self.comm.check_usable(type(self).__name__)
            # One algorithm exchanges the counts: the size that decides is known only with them.
            self._counts_by = self.algorithms.get("shared") or self.algorithms["hierarchical"]
            self._chosen: dict[tuple[Form, int, bool], str] = {}

    def _agreed_table(self, links: cost.Links, table: Table | None) -> Table:
        """The table to begin with, once links and table are checked. Collective."""
        call = type(self).__name__
        self.comm.agree(f"{call}: links", repr(links))
        self.comm.agree(f"{call}: table", table.to_json() if isinstance(table, Table) else repr(table))
        sizes = tuple(self.nodes.sizes().tolist())
        if table is None:
            table = Table(sizes, {})
        problem = None
        if not isinstance(links, cost.Links):
            problem = f"links is a {type(links).__name__}, expected Links"
        elif not isinstance(table, Table):
            problem = f"table is a {type(table).__name__}, expected Table"
        elif table.node_sizes != sizes:
            problem = f"table is of nodes of {list(table.node_sizes)} ranks, expected {list(sizes)}"
        if problem:
            raise refused(ValueError(f"{call}: {problem}{self.comm.where()}"))
        return table

    def choose(self, form: Form, bytes_per_pair: float) -> str:
        """The name of the algorithm that rows in host memory would use. Not collective."""
        return self._choose(form, int(bytes_per_pair), True)

    def _choose(self, form: Form, bytes_per_pair: int, is_on_host: bool) -> str:
        key = form, bytes_per_pair, is_on_host
        if key not in self._chosen:
            # Training repeats few sizes; where they vary without end the cache must not grow with them.
            if len(self._chosen) >= MOST_CHOICES:
                self._chosen.clear()
            names = self._names(form, is_on_host)
            measured = self.table.fastest(form, bytes_per_pair, names)
            self._chosen[key] = measured or self._predicted(form, bytes_per_pair, names)
        return self._chosen[key]

    def _names(self, form: Form, is_on_host: bool) -> list[str]:
        """The algorithms that such a call can use."""
        names = [name for name in self.algorithms if is_on_host or name != "shared"]
        if form == "uneven":
            # A route serves the algorithm that made it, and the flat one, which needs nothing but its counts.
            names = [name for name in names if name == "flat" or self.algorithms[name] is self._counts_by]
        return names

    def _predicted(self, form: Form, bytes_per_pair: int, names: list[str]) -> str:
        costs = cost.predict(self.links, self.nodes, bytes_per_pair)
        seconds = {name: costs[name].seconds for name in names}
        if form == "even":
            # FlatAllToAll is then one call of the library, which may choose a better algorithm than pairwise messages.
            seconds["flat"] = costs["library"].seconds
        return _least(seconds)

    def _even(self, x: Array, out: Array) -> None:
        self.algorithms[self._choose("even", row_bytes(x), on_host(x))]._even(x, out)

    def _route(self, send_counts: Counts) -> Route:
        route = self._counts_by._route(send_counts)
        # The shared algorithm learns the sum with the counts; the other needs one more collective.
        if isinstance(route, SharedRoute):
            num_rows = route.num_rows
        else:
            num_rows = int(self.comm.all_reduce(np.array([send_counts.sum()], np.int64))[0])
        return _AutoRoute(send_counts, route.recv_counts, inner=route, num_rows=num_rows)

    def _check_route(self, route: Route) -> None:
        if not isinstance(route, _AutoRoute):
            raise TypeError(f"route is a {type(route).__name__}, expected one of {type(self).__name__}")

    def _send(self, rows: Array, route: Route) -> Array:
        assert isinstance(route, _AutoRoute)
        return self._uneven(rows, route)._send(rows, route.inner)

    def _send_back(self, rows: Array, route: Route) -> Array:
        assert isinstance(route, _AutoRoute)
        return self._uneven(rows, route)._send_back(rows, route.inner)

    def _uneven(self, rows: Array, route: _AutoRoute) -> AllToAll:
        mean = route.num_rows * row_bytes(rows) // self.comm.size**2
        return self.algorithms[self._choose("uneven", mean, on_host(rows))]

    def tune(self, sizes: Iterable[int] = TUNED_SIZES, *, seconds: float = 5.0) -> Table:
        """Measure every algorithm at every size, in turn, and choose by the measurements from now on.

        sizes    bytes a pair; a size between two of them uses the nearest. Left out if a rank had more than 64 MiB
        seconds  for how long, the same for each size; each algorithm is called three times in any case
        returns  the new table, also in `table`: the same on every rank

        Collective over comm. Raises ValueError on every rank if an argument is wrong or differs among them.
        """
        sizes = list(sizes)
        self.comm.agree("AutoAllToAll.tune: sizes and seconds", repr((sizes, seconds)))
        if not sizes or not all(isinstance(size, int) and size >= 1 for size in sizes) or not seconds >= 0:
            raise ValueError(
                f"AutoAllToAll.tune: sizes is {sizes}, seconds {seconds}, expected whole numbers >= 1, seconds >= 0"
            )
        sizes = [size for size in sizes if size * self.comm.size <= MOST_TUNED_BYTES] or [min(sizes)]
        measured: dict[Form, dict[int, dict[str, float]]] = {form: {} for form in FORMS}
        for size in sizes:
            samples = self._samples(size, seconds / len(sizes))
            for form in FORMS:
                measured[form][size] = {
                    name: float(np.median(samples[form, name])) for name in self._names(form, is_on_host=True)
                }
        self.table = Table(self.table.node_sizes, measured)
        self._chosen.clear()
        return self.table

    def _samples(self, size: int, seconds: float) -> dict[tuple[Form, str], list[float]]:
        """The slowest rank's seconds for calls of each algorithm, measured for `seconds`. Collective."""
        samples: dict[tuple[Form, str], list[float]] = defaultdict(list)
        began = time.monotonic()
        elapsed = 0.0
        rounds = 0
        # In turn, so that a change of the machine's load meets all algorithms alike.
        while rounds <= LEAST_ROUNDS or elapsed < seconds:
            for form in FORMS:
                for name in self._names(form, is_on_host=True):
                    sample, elapsed = self._measure(form, size, self.algorithms[name], began)
                    if rounds > 0:
                        samples[form, name].append(sample)
            rounds += 1
        return samples

    def _measure(self, form: Form, size: int, algorithm: AllToAll, began: float) -> tuple[float, float]:
        """The slowest rank's seconds for one call, and rank 0's seconds since `began`: the same on all ranks."""
        with collective("AutoAllToAll.tune", self.comm):
            self._check_not_freed()
            rows = np.zeros((self.comm.size, size), np.uint8)
            out = np.empty_like(rows)
            ones = np.ones(self.comm.size, np.int64)
            self.comm.barrier()
            start = time.perf_counter()
            if form == "even":
                algorithm._even(rows, out)
            else:
                # As `_uneven` has it: the counts by one algorithm, the rows by the one that is measured.
                algorithm._send(rows, self._counts_by._route(ones))
            sample = time.perf_counter() - start
            # The clock of one rank decides when to stop: otherwise some ranks would go on alone.
            clocks = self.comm.all_gather(np.array([[sample, time.monotonic() - began]]))
        return float(clocks[:, 0].max()), float(clocks[0, 1])

    def _free(self) -> None:
        for algorithm in self.algorithms.values():
            algorithm.free()


@dataclass(frozen=True, eq=False)
class _AutoRoute(Route):
    inner: Route = field(kw_only=True)
    """The route of the algorithm that exchanged the counts."""
    num_rows: int = field(kw_only=True)
    """Rows of all ranks together."""


def _least(seconds: dict[str, float]) -> str:
    """The name with the least time; of equal times the first by name, so that all ranks return the same."""
    return min(seconds, key=lambda name: (seconds[name], name))
