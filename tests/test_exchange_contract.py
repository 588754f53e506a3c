"""check_exchange, passed by all exchanges that run without a GPU, and failed by wrong ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from conftest import mpi_run

from moecomm import Comm, FlatAllToAll, HierarchicalAllToAll, Nodes, RoutedExchange, TensorParallelExchange, testing
from moecomm.exchange import Exchange, HierarchicalExchange
from moecomm.testing import ExchangeCase
from moecomm.transports import threads

torch = pytest.importorskip("torch")

from moecomm.nn import LocalExchange  # noqa: E402

Maker = Callable[[Comm, ExchangeCase], Exchange]


def ragged(size: int) -> Nodes:
    """The first node has one rank, the others two or three, and ranks of a node do not lie side by side."""
    order = [*range(0, size, 2), *range(1, size, 2)]
    places = [order[:1], order[1:3], order[3:]]
    return Nodes([node for node in places if node])


def shuffled(comm: Comm, case: ExchangeCase) -> list[list[int]]:
    """Experts in no order, and an uneven number of them: none on rank 0 where there are several ranks."""
    experts = np.random.default_rng(7).permutation(case.num_experts)
    if comm.size == 1:
        return [experts.tolist()]
    return [[], *(part.tolist() for part in np.array_split(experts, comm.size - 1))]


def routed(send: Any) -> Maker:
    return lambda comm, case: RoutedExchange(FlatAllToAll(comm), case.num_experts // comm.size, send=send)


def routed_shuffled(send: Any) -> Maker:
    return lambda comm, case: RoutedExchange(
        HierarchicalAllToAll(comm, ragged(comm.size)), shuffled(comm, case), send=send
    )


def relayed(comm: Comm, case: ExchangeCase) -> Exchange:
    return HierarchicalExchange(HierarchicalAllToAll(comm, ragged(comm.size)), shuffled(comm, case))


def lanes(output: Any, send: Any = "assignments") -> Maker:
    """Two lanes where the number of ranks is even, else each rank alone; a lane reaches all or half of the experts."""

    def make(comm: Comm, case: ExchangeCase) -> Exchange:
        L = 2 if comm.size % 2 == 0 else 1  # noqa: N806
        lane = comm.split(comm.rank % L)
        tensor = comm.split(comm.rank // L)
        each = case.num_experts // comm.size
        experts = [list(range((rank * L + comm.rank % L) * each, (rank * L + comm.rank % L + 1) * each))
                   for rank in range(lane.size)]  # fmt: skip
        return TensorParallelExchange(RoutedExchange(FlatAllToAll(lane), experts, send=send), tensor, output=output)

    return make


MAKERS: dict[str, Maker] = {
    "assignments": routed("assignments"),
    "tokens": routed("tokens"),
    "assignments, shuffled experts": routed_shuffled("assignments"),
    "tokens, shuffled experts": routed_shuffled("tokens"),
    "relayed": relayed,
    "lanes": lanes("replicated"),
    "lanes, tokens": lanes("replicated", "tokens"),
    "lanes, sequence": lanes("sequence"),
}
KINDS = {"numpy": np.asarray, "torch": torch.tensor}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MAKERS)
def test_over_threads(name: str, kind: str) -> None:
    testing.check_exchange(threads.run, MAKERS[name], sizes=(1, 2, 3, 6), make=KINDS[kind])


@pytest.mark.mpi(min_size=4)
@pytest.mark.parametrize("name", MAKERS)
def test_over_mpi(name: str) -> None:
    testing.check_exchange(mpi_run, MAKERS[name], sizes=(4,), make=torch.tensor, dtypes=("float32",))


@pytest.mark.parametrize("kind", KINDS)
def test_one_rank_alone(kind: str) -> None:
    testing.check_exchange(
        threads.run,
        lambda comm, case: LocalExchange(case.num_experts),
        sizes=(1,),
        make=KINDS[kind],
        dtypes=("float32",),
    )


class Wrong(RoutedExchange):
    """An exchange with a fault."""

    fault = ""

    def dispatch(self, x: Any, routing: Any) -> Any:
        rows, plan = super().dispatch(x, routing)
        if self.fault == "order" and len(rows) > 1:
            rows = rows[::-1] + 0 if isinstance(rows, np.ndarray) else rows.flip(0)
        if self.fault == "counts" and len(plan.rows_per_expert) > 1:
            plan.rows_per_expert[:] = plan.rows_per_expert[::-1].copy()
        return rows, plan

    def combine(self, rows: Any, plan: Any, dtype: Any = None) -> Any:
        y = super().combine(rows, plan, dtype)
        if self.fault == "gradient" and not isinstance(y, np.ndarray):
            return y.detach() + 2 * (y - y.detach())
        return y + 0.01 if self.fault == "sums" else y


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fault", ["order", "counts", "sums", "gradient"])
def test_faults_are_found(fault: str, kind: str) -> None:
    if fault == "gradient" and kind == "numpy":
        return

    def make(comm: Comm, case: ExchangeCase) -> Exchange:
        exchange = Wrong(FlatAllToAll(comm), case.num_experts // comm.size)
        exchange.fault = fault
        return exchange

    with pytest.raises(AssertionError):
        testing.check_exchange(threads.run, make, sizes=(2,), make=KINDS[kind])
