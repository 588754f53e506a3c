"""StaticExchange: the contract, what finds no room, and that nothing but blocks of one size is sent."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import gloo_run, mpi_run

from moecomm import Comm, FlatAllToAll, HierarchicalAllToAll, Nodes, RoutedExchange, Routing, testing
from moecomm.arrays import Array
from moecomm.conformance.exchanges import ExchangeCase
from moecomm.exchange import StaticExchange
from moecomm.transports import threads
from moecomm.transports.wrappers import Checked, Timed

torch = pytest.importorskip("torch")


def make(comm: Comm, case: ExchangeCase) -> StaticExchange:
    return StaticExchange(FlatAllToAll(comm), case.num_experts // comm.size, case.max_tokens)


def make_hierarchical(comm: Comm, case: ExchangeCase) -> StaticExchange:
    nodes = [list(range(0, comm.size, 2)), list(range(1, comm.size, 2))]
    all_to_all = HierarchicalAllToAll(comm, Nodes([node for node in nodes if node]))
    return StaticExchange(all_to_all, case.num_experts // comm.size, case.max_tokens)


@pytest.mark.parametrize("exchange", [make, make_hierarchical])
@pytest.mark.parametrize("array", [np.asarray, torch.tensor])
def test_contract_over_threads(exchange: object, array: object) -> None:
    testing.check_exchange(threads.run, exchange, make=array)  # type: ignore[arg-type]


def test_contract_over_gloo() -> None:
    testing.check_exchange(gloo_run, make, sizes=(2,), make=torch.tensor, dtypes=("float32",))


@pytest.mark.mpi(min_size=2)
def test_contract_over_mpi() -> None:
    testing.check_exchange(mpi_run, make, sizes=(2,), dtypes=("float32",))


def test_equals_routed_exchange_bit_for_bit() -> None:
    """Rows, answers and gradients; behind the rows are zeros."""

    def body(comm: Comm) -> None:
        rng = np.random.default_rng(comm.rank)
        T, K = 7 - 3 * comm.rank, 4  # noqa: N806
        expert = rng.permuted(np.tile(np.arange(6), (T, 1)), axis=1)[:, :K] if T else np.zeros((0, K), np.int64)
        expert[rng.random((T, K)) < 0.2] = -1
        x, weight = rng.standard_normal((T, 5)).astype(np.float32), rng.random((T, K)).astype(np.float32)
        results = []
        for exchange in (
            RoutedExchange(FlatAllToAll(comm), 2, send="tokens"),
            StaticExchange(FlatAllToAll(comm), 2, max_tokens=7),
        ):
            inputs = torch.tensor(x, requires_grad=True), torch.tensor(weight, requires_grad=True)
            rows, plan = exchange.dispatch(inputs[0], Routing(torch.from_numpy(expert), inputs[1]))
            y = exchange.combine(rows * rows, plan)
            grads = torch.autograd.grad((y * y).sum(), inputs)
            count = np.asarray(plan.rows_per_expert)
            results.append((rows[: count.sum()], rows[count.sum() :], count, y, *grads))
        routed, static = results
        for name, wanted, got in zip(("rows", "behind", "count", "y", "x", "weight"), routed, static, strict=True):
            if name == "behind":
                assert not got.any()
            else:
                assert np.array_equal(np.asarray(got.detach() if name != "count" else got), _numpy(wanted)), name

    threads.run(3, body)


def _numpy(array: Array) -> np.ndarray:
    return np.asarray(array.detach()) if isinstance(array, torch.Tensor) else array


@pytest.mark.parametrize("num_tokens", [0, 1, 5])
def test_sends_blocks_of_one_size_alone(num_tokens: int) -> None:
    """No counts, and the same bytes whatever the routing is: (p - 1) R rows, weights and places; then rows."""

    def body(comm: Comm) -> None:
        timed = Timed(comm)
        exchange = StaticExchange(FlatAllToAll(timed), 1, max_tokens=5, rows_per_pair=4)
        x = np.ones((num_tokens, 8), np.float32)
        routing = Routing(np.full((num_tokens, 2), -1), np.ones((num_tokens, 2), np.float32))
        exchange.dispatch(x, routing)  # the first call compares arguments
        timed.clear()
        rows, plan = exchange.dispatch(x, routing)
        assert set(timed.record) == {"all_to_all"}
        assert timed.record["all_to_all"].bytes.sum() == (comm.size - 1) * 4 * (8 * 4 + 2 * 4 + 2 * 4)
        timed.clear()
        exchange.combine(rows, plan)
        assert timed.record["all_to_all"].bytes.sum() == (comm.size - 1) * 4 * 8 * 4

    threads.run(3, body)


def test_rows_without_room_are_counted_and_the_others_are_right() -> None:
    """Every token wants expert 0: of 5 tokens of each of 2 ranks 3 may go, and of these 6 rows 4 find room."""

    def body(comm: Comm) -> None:
        exchange = StaticExchange(FlatAllToAll(comm), 1, max_tokens=5, rows_per_pair=3, max_rows=4)
        x = np.arange(1.0, 6)[:, None] + 10 * comm.rank
        routing = Routing(np.zeros((5, 1), np.int64), np.ones((5, 1)))
        rows, plan = exchange.dispatch(x, routing)
        assert plan.rows_per_expert.tolist() == [4 if comm.rank == 0 else 0]
        if comm.rank == 0:
            assert rows[:, 0].tolist() == [1, 2, 3, 11]
        y = exchange.combine(rows, plan)
        assert y[:, 0].tolist() == ([1, 2, 3, 0, 0] if comm.rank == 0 else [11, 0, 0, 0, 0])
        with pytest.raises(
            OverflowError,
            match=r"4 tokens found no room .* = 3; 2 rows found no room beyond max_rows = 4",
        ):
            exchange.check()
        exchange.check()

    threads.run(2, body)


def test_check_before_the_first_call_and_with_one_rank_that_lost() -> None:
    def body(comm: Comm) -> None:
        exchange = StaticExchange(FlatAllToAll(comm), 1, max_tokens=2, rows_per_pair=1)
        exchange.check()
        wanted = 1 if comm.rank == 0 else -1
        exchange.dispatch(np.ones((2, 1)), Routing(np.full((2, 1), wanted), np.ones((2, 1))))
        with pytest.raises(OverflowError, match="1 tokens found no room"):
            exchange.check()

    threads.run(2, body)


def test_arguments_are_refused() -> None:
    def body(comm: Comm) -> None:
        flat = FlatAllToAll(comm)
        for arguments, text in (
            ({"max_tokens": 0}, "max_tokens is 0, expected an integer >= 1"),
            ({"max_tokens": 1.5}, "max_tokens is 1.5"),
            ({"max_tokens": 2, "rows_per_pair": -1}, "rows_per_pair is -1"),
            ({"max_tokens": 2, "max_rows": 0}, "max_rows is 0"),
            ({"max_tokens": 2, "partial_sums": "half"}, "partial_sums is 'half'"),
        ):
            with pytest.raises(ValueError, match=text):
                StaticExchange(flat, 1, **arguments)  # type: ignore[arg-type]
        exchange = StaticExchange(flat, 1, 2)
        with pytest.raises(ValueError, match="x has 3 tokens, expected 2 at most: max_tokens"):
            exchange.dispatch(np.ones((3, 1)), Routing(np.zeros((3, 1), np.int64), np.ones((3, 1))))

    threads.run(1, body)


def test_ranks_with_other_sizes_are_refused_by_all() -> None:
    def body(comm: Comm) -> None:
        exchange = StaticExchange(FlatAllToAll(comm), 1, 2 + comm.rank)
        with pytest.raises(ValueError, match=r"the ranks differ: .*max_tokens=2.*max_tokens=3"):
            exchange.dispatch(np.ones((1, 1)), Routing(np.zeros((1, 1), np.int64), np.ones((1, 1))))

    threads.run(2, body)


def test_rows_that_do_not_fit_the_plan_are_refused_by_all_under_checked() -> None:
    def body(comm: Comm) -> None:
        exchange = StaticExchange(FlatAllToAll(Checked(comm)), 1, 2)
        x, routing = np.ones((1, 3), np.float32), Routing(np.zeros((1, 1), np.int64), np.ones((1, 1), np.float32))
        rows, plan = exchange.dispatch(x, routing)
        with pytest.raises(ValueError, match=r"rows has shape \(1, 3\), expected \(4, H\)"):
            exchange.combine(rows[:1] if comm.rank == 1 else rows, plan)

    threads.run(2, body)
