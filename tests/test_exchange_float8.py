"""Rows that travel as 8-bit floats: the bits and scales of the definition, and the order of every exchange."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from moecomm import Comm, FlatAllToAll, HierarchicalAllToAll, Nodes, RoutedExchange, Routing
from moecomm.exchange import HierarchicalExchange, StaticExchange, StaticHierarchicalExchange
from moecomm.gating import reference
from moecomm.transports import threads
from moecomm.transports.wrappers import Checked, Timed

torch = pytest.importorskip("torch")

E4M3 = torch.float8_e4m3fn

EXCHANGES: dict[str, Callable[..., RoutedExchange]] = {
    "assignments": lambda comm, fp8: RoutedExchange(FlatAllToAll(comm), 2, fp8=fp8),
    "tokens": lambda comm, fp8: RoutedExchange(FlatAllToAll(comm), 2, send="tokens", fp8=fp8),
    "nodes": lambda comm, fp8: HierarchicalExchange(_two_hops(comm), 2, fp8=fp8),
    "static": lambda comm, fp8: StaticExchange(FlatAllToAll(comm), 2, 9, fp8=fp8),
    "static nodes": lambda comm, fp8: StaticHierarchicalExchange(_two_hops(comm), 2, 9, fp8=fp8),
}


def _two_hops(comm: Comm) -> HierarchicalAllToAll:
    return HierarchicalAllToAll(comm, Nodes([[0, 2], [1]]))


def batch(rank: int, hidden: int) -> tuple[np.ndarray, Routing]:
    rng = np.random.default_rng(rank)
    T = (9, 0, 4)[rank]  # noqa: N806
    x = (rng.standard_normal((T, hidden)) * np.exp2(rng.integers(-20, 20, (T, hidden)))).astype(np.float32)
    x[: T // 4] = 0
    expert = np.array([rng.permutation(6)[:3] for _ in range(T)], np.int64).reshape(T, 3)
    expert[rng.random((T, 3)) < 0.2] = -1
    return x, Routing(expert, rng.random((T, 3)).astype(np.float32))


def bits_of(values: np.ndarray) -> np.ndarray:
    return torch.from_numpy(values).to(E4M3).view(torch.uint8).numpy()


@pytest.mark.parametrize("hidden", [1, 128, 300])
@pytest.mark.parametrize("kind", EXCHANGES)
def test_rows_are_those_of_the_definition(kind: str, hidden: int) -> None:
    def body(comm: Comm) -> None:
        x, routing = batch(comm.rank, hidden)
        plain, eight = (EXCHANGES[kind](comm, fp8) for fp8 in (None, "float8_e4m3fn"))
        wanted, wanted_plan = plain.dispatch(x, routing)
        count = int(np.sum(wanted_plan.rows_per_expert))
        values, scales = reference.to_e4m3(wanted[:count])
        rows, plan = eight.dispatch(x, routing)
        assert (rows.dtype, plan.scales.dtype) == (np.uint8, np.float32)
        assert np.array_equal(rows[:count], bits_of(values))
        assert np.array_equal(plan.scales[:count], scales)
        assert (rows.shape, plan.scales.shape) == (wanted.shape, (len(wanted), -(-hidden // 128)))
        assert not rows[count:].any()
        assert np.array_equal(plan.rows_per_expert, wanted_plan.rows_per_expert)
        assert wanted_plan.scales is None
        # Answers go home in their own dtype.
        assert np.array_equal(eight.combine(wanted, plan), plain.combine(wanted, wanted_plan))

    threads.run(3, body)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", EXCHANGES)
def test_tensors(kind: str, dtype: Any) -> None:
    def body(comm: Comm) -> None:
        x, routing = batch(comm.rank, 130)
        tokens = torch.from_numpy(x).clamp(-60000, 60000).to(dtype)
        exchange = EXCHANGES[kind](comm, E4M3)
        rows, plan = exchange.dispatch(tokens, Routing(routing.expert, torch.from_numpy(routing.weight)))
        same, numbers = EXCHANGES[kind](comm, E4M3).dispatch(tokens.float().numpy(), routing)
        assert (rows.dtype, plan.scales.dtype) == (E4M3, torch.float32)
        assert np.array_equal(rows.view(torch.uint8), same)
        assert np.array_equal(plan.scales, numbers.scales)
        y = exchange.combine(rows.to(torch.bfloat16), plan)
        assert (y.dtype, y.shape) == (torch.bfloat16, tokens.shape)

    threads.run(3, body)


def test_bytes_that_travel() -> None:
    """A byte for each number and four for each 128."""

    def body(comm: Comm) -> None:
        timed = Timed(comm)
        exchange = StaticExchange(FlatAllToAll(timed), 1, 4, fp8=E4M3)
        x, routing = np.ones((4, 300), np.float32), Routing(np.zeros((4, 1), np.int64), np.ones((4, 1), np.float32))
        exchange.dispatch(x, routing)  # the first call compares arguments
        timed.clear()
        exchange.dispatch(x, routing)
        assert timed.record["all_to_all"].bytes.sum() == 4 * (300 + 3 * 4 + 4 + 4)

    threads.run(2, body)


def test_a_layer_refuses_such_an_exchange() -> None:
    from moecomm.nn import MoE

    def body(comm: Comm) -> None:
        with pytest.raises(ValueError, match=r"MoE: the exchange.s rows are float8_e4m3fn, expected those of"):
            MoE(4, 8, 2, 1, exchange=RoutedExchange(FlatAllToAll(comm), 2, fp8=E4M3))

    threads.run(1, body)


def test_refused_by_all_ranks() -> None:
    def body(comm: Comm) -> None:
        with pytest.raises(ValueError, match=r"StaticExchange: fp8 is torch.float8_e5m2, expected None or float8_e4m3"):
            StaticExchange(FlatAllToAll(comm), 1, 2, fp8=torch.float8_e5m2)
        exchange = RoutedExchange(FlatAllToAll(Checked(comm)), 1, fp8=E4M3)
        expert, weight = torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1)

        def refused(text: str, x: torch.Tensor, weight: torch.Tensor = weight) -> None:
            good = torch.ones(1, 3), Routing(expert, torch.ones(1, 1))
            with pytest.raises((TypeError, ValueError), match=text):
                exchange.dispatch(*((x, Routing(expert, weight)) if comm.rank == 1 else good))

        refused("x asks for a gradient, which fp8 rows do not have", torch.ones(1, 3, requires_grad=True))
        asks = torch.ones(1, 1, requires_grad=True)
        refused("routing.weight asks for a gradient", torch.ones(1, 3), asks)
        refused("x has dtype float64, expected float32", torch.ones(1, 3).double())
        refused(r"x has shape \(1, 3, 1\)", torch.ones(1, 3, 1))
        with torch.no_grad():
            rows, plan = exchange.dispatch(torch.ones(1, 3), Routing(expert, asks))
        answers = rows.float().requires_grad_(comm.rank == 0)
        with pytest.raises(ValueError, match="rows asks for a gradient"):
            exchange.combine(answers, plan)
        assert exchange.combine(answers.detach(), plan).shape == (1, 3)
        mixed = RoutedExchange(FlatAllToAll(comm), 1, fp8=None if comm.rank else E4M3)
        with pytest.raises(ValueError, match=r"the ranks differ: .*fp8="):
            mixed.dispatch(torch.ones(1, 3), Routing(expert, weight))

    threads.run(2, body)
