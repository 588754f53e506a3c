"""StaticExchange: the contract, what finds no room, and that nothing but blocks of one size is sent."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from conftest import gloo_run, mpi_run

from moecomm import Comm, CommError, FlatAllToAll, HierarchicalAllToAll, Nodes, RoutedExchange, Routing, testing
from moecomm.arrays import Array
from moecomm.conformance.exchanges import ExchangeCase
from moecomm.exchange import HierarchicalExchange, StaticExchange, StaticHierarchicalExchange
from moecomm.transports import threads
from moecomm.transports.wrappers import Checked, Timed

torch = pytest.importorskip("torch")


def make(comm: Comm, case: ExchangeCase) -> StaticExchange:
    return StaticExchange(FlatAllToAll(comm), case.num_experts // comm.size, case.max_tokens)


def over_two_hops(comm: Comm) -> HierarchicalAllToAll:
    """Two nodes, which differ in size where the number of ranks is odd."""
    nodes = [list(range(0, comm.size, 2)), list(range(1, comm.size, 2))]
    return HierarchicalAllToAll(comm, Nodes([node for node in nodes if node]))


def make_over_two_hops(comm: Comm, case: ExchangeCase) -> StaticExchange:
    return StaticExchange(over_two_hops(comm), case.num_experts // comm.size, case.max_tokens)


def make_hierarchical(comm: Comm, case: ExchangeCase) -> StaticExchange:
    return StaticHierarchicalExchange(over_two_hops(comm), case.num_experts // comm.size, case.max_tokens)


@pytest.mark.parametrize("exchange", [make, make_over_two_hops, make_hierarchical])
@pytest.mark.parametrize("array", [np.asarray, torch.tensor])
def test_contract_over_threads(exchange: object, array: object) -> None:
    testing.check_exchange(threads.run, exchange, make=array)  # type: ignore[arg-type]


def test_contract_over_gloo() -> None:
    testing.check_exchange(gloo_run, make, sizes=(2,), make=torch.tensor, dtypes=("float32",))


def test_contract_over_gloo_in_two_hops() -> None:
    testing.check_exchange(gloo_run, make_hierarchical, sizes=(3,), make=torch.tensor, dtypes=("float32",))


@pytest.mark.mpi(min_size=2)
def test_contract_over_mpi() -> None:
    testing.check_exchange(mpi_run, make, sizes=(2,), dtypes=("float32",))
    testing.check_exchange(mpi_run, make_hierarchical, sizes=(2,), dtypes=("float32",))


@pytest.mark.parametrize("nodes", [None, [[0, 2], [1]], [[0, 1, 2, 3]], [[0, 3], [1, 2]], [[0, 2, 4], [1], [3, 5]]])
def test_equals_the_exchange_with_counts_bit_for_bit(nodes: list[list[int]] | None) -> None:
    """Rows, answers and gradients; behind the rows are zeros. nodes: of a hierarchical exchange."""
    size = 3 if nodes is None else sum(map(len, nodes))

    def exchanges(comm: Comm) -> tuple[RoutedExchange, StaticExchange]:
        if nodes is None:
            flat = FlatAllToAll(comm)
            return RoutedExchange(flat, 2, send="tokens"), StaticExchange(flat, 2, max_tokens=7)
        a2a = HierarchicalAllToAll(comm, Nodes(nodes))
        return HierarchicalExchange(a2a, 2), StaticHierarchicalExchange(a2a, 2, max_tokens=7)

    def body(comm: Comm) -> None:
        rng = np.random.default_rng(comm.rank)
        T, K = max(7 - 3 * comm.rank, 0) if comm.rank < 3 else comm.rank, 4  # noqa: N806
        expert = np.array([rng.permutation(2 * size)[:K] for _ in range(T)], np.int64).reshape(T, K)
        expert[rng.random((T, K)) < 0.2] = -1
        x, weight = rng.standard_normal((T, 5)).astype(np.float32), rng.random((T, K)).astype(np.float32)
        results = []
        for exchange in exchanges(comm):
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

    threads.run(size, body)


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


def test_rows_without_room_in_each_hop_are_counted() -> None:
    """Nodes of ranks 0, 1 and 2, 3. All 3 tokens of ranks 0 and 1 want expert 2, whose relays are 2 and 3."""

    def body(comm: Comm) -> None:
        def lost(**room: Any) -> tuple[list[float], str]:
            a2a = HierarchicalAllToAll(comm, Nodes.of_size(2, 4))
            exchange = StaticHierarchicalExchange(a2a, 1, max_tokens=3, **room)
            x = np.arange(1.0, 4)[:, None] + 10 * comm.rank
            expert = np.full((3, 1), 2 if comm.rank < 2 else -1)
            y = exchange.combine(*exchange.dispatch(x, Routing(expert, np.ones((3, 1)))))
            try:
                exchange.check()
            except OverflowError as error:
                return y[:, 0].tolist(), str(error)
            return y[:, 0].tolist(), ""

        x = [10 * comm.rank + 1, 10 * comm.rank + 2, 10 * comm.rank + 3] if comm.rank < 2 else [0, 0, 0]
        assert lost() == (x, "")
        assert lost(rows_per_relay=3, rows_inside=3, max_rows=6) == (x, "")
        y, text = lost(rows_per_relay=2)
        assert (y, "2 tokens found no room beyond rows_per_relay = 2" in text) == ([*x[:2], 0], True)
        y, text = lost(rows_inside=1)
        assert (y, "4 tokens found no room beyond rows_inside = 1" in text) == ([x[0], 0, 0], True)
        _, text = lost(max_rows=4)
        assert "2 rows found no room beyond max_rows = 4" in text

    threads.run(4, body)


def test_hops_send_blocks_of_one_size_alone() -> None:
    def body(comm: Comm) -> None:
        timed = Timed(comm)
        a2a = HierarchicalAllToAll(timed, Nodes.of_size(2, 4))
        exchange = StaticHierarchicalExchange(a2a, 1, max_tokens=5, rows_per_relay=4, rows_inside=3)
        x, routing = np.ones((1, 8), np.float32), Routing(np.full((1, 2), -1), np.ones((1, 2), np.float32))
        rows, plan = exchange.dispatch(x, routing)  # the first call compares arguments
        for row_bytes, call in (
            (8 * 4 + 2 * 4 + 3 * 4, lambda: exchange.dispatch(x, routing)),
            (8 * 4, lambda: exchange.combine(rows, plan)),
        ):
            timed.clear()
            call()
            assert set(timed.record) == {"all_to_all"}
            sent = timed.record["all_to_all"].bytes
            other_node = ~a2a.nodes.same_node(comm.rank)
            assert (sent[other_node].sum(), sent[~other_node].sum()) == (4 * row_bytes, 3 * row_bytes)

    threads.run(4, body)


def test_check_before_the_first_call_and_with_one_rank_that_lost() -> None:
    def body(comm: Comm) -> None:
        exchange = StaticExchange(FlatAllToAll(comm), 1, max_tokens=2, rows_per_pair=1)
        exchange.check()
        wanted = 1 if comm.rank == 0 else -1
        exchange.dispatch(np.ones((2, 1)), Routing(np.full((2, 1), wanted), np.ones((2, 1))))
        with pytest.raises(OverflowError, match="1 tokens found no room"):
            exchange.check()

    threads.run(2, body)


def test_a_rank_that_leaves_ends_both_hops_for_all() -> None:
    def body(comm: Comm) -> None:
        exchange = StaticHierarchicalExchange(HierarchicalAllToAll(comm, Nodes.of_size(2, 4)), 1, 2)
        comm.barrier()  # else a slow rank may hear of it while it still makes its exchange
        if comm.rank == 3:
            return
        for _ in range(2):
            with pytest.raises(CommError):
                exchange.dispatch(np.ones((1, 1)), Routing(np.zeros((1, 1), np.int64), np.ones((1, 1))))
        assert comm.failure is not None

    threads.run(4, body)


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
        for sizes in ({"rows_per_relay": 0}, {"rows_inside": -1}):
            with pytest.raises(ValueError, match=r"rows_\w+ is -?\d, expected an integer >= 1"):
                StaticHierarchicalExchange(HierarchicalAllToAll(comm, Nodes([[0]])), 1, 2, **sizes)
        with pytest.raises(TypeError, match="StaticHierarchicalExchange: all_to_all is a FlatAllToAll"):
            StaticHierarchicalExchange(flat, 1, 2)  # type: ignore[arg-type]
        exchange = StaticExchange(flat, 1, 2)
        with pytest.raises(ValueError, match="x has 3 tokens, expected 2 at most: max_tokens"):
            exchange.dispatch(np.ones((3, 1)), Routing(np.zeros((3, 1), np.int64), np.ones((3, 1))))

    threads.run(1, body)


def test_ranks_with_other_sizes_are_refused_by_all() -> None:
    def body(comm: Comm) -> None:
        a2a = over_two_hops(comm)
        for exchange, text in (
            (StaticExchange(FlatAllToAll(comm), 1, 2 + comm.rank), r"max_tokens=2.*max_tokens=3"),
            (StaticHierarchicalExchange(a2a, 1, 2, rows_per_relay=1 + comm.rank), r"per_relay=1.*per_relay=2"),
            (StaticHierarchicalExchange(a2a, 1, 2, rows_inside=1 + comm.rank), r"rows_inside=1.*rows_inside=2"),
        ):
            with pytest.raises(ValueError, match=rf"the ranks differ: .*{text}"):
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
