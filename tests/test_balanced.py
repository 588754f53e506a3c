"""Copies of hot experts: the planner against the exact optimum, the exchange against the one without copies."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from conftest import gloo_run, mpi_run

from moecomm import Comm, FlatAllToAll, HierarchicalAllToAll, Nodes, RoutedExchange, Routing, Topology, build_groups
from moecomm.exchange import BalancedExchange, balance
from moecomm.transports import threads

torch = pytest.importorskip("torch")

from moecomm.nn import MoE, reduce_gradients  # noqa: E402

# ---- the planner ---------------------------------------------------------------------------------------------------


def optimum(load: Sequence[int], experts: Sequence[Sequence[int]], slots: int) -> float:
    """The least load of the fullest rank over all ways to fill the slots, rows being divisible.

    For places that are given: the ranks R must take all of the experts that have no place elsewhere, so no division is
    better than their load / |R| for any R, and one is as good as the worst R (max-flow, min-cut).
    """
    p = len(experts)
    home = {expert: 1 << rank for rank, ids in enumerate(experts) for expert in ids}
    fillings = []
    for ids in experts:
        foreign = [expert for expert in home if expert not in ids]
        fillings.append(list(itertools.combinations(foreign, min(slots, len(foreign)))))
    best = float("inf")
    for filling in itertools.product(*fillings):
        places = dict(home)
        for rank, copied in enumerate(filling):
            for expert in copied:
                places[expert] |= 1 << rank
        worst = 0.0
        for ranks in range(1, 1 << p):
            bound = sum(load[expert] for expert, where in places.items() if not where & ~ranks)
            worst = max(worst, bound / ranks.bit_count())
        best = min(best, worst)
    return best


@pytest.mark.parametrize(("p", "per_rank", "slots"), [(1, 2, 1), (2, 1, 1), (2, 2, 1), (2, 3, 2), (3, 1, 1), (3, 2, 1)])
def test_the_fullest_rank_is_near_the_optimum(p: int, per_rank: int, slots: int) -> None:
    rng = np.random.default_rng([p, per_rank, slots])
    experts = [range(rank * per_rank, (rank + 1) * per_rank) for rank in range(p)]
    for _ in range(60):
        load = (rng.pareto(1, p * per_rank) * 1000).astype(int) * (rng.random(p * per_rank) < 0.8)
        placement = balance(load, slots, experts)
        check_placement(placement, load, experts, slots)
        assert placement.load().max() <= 1.1 * np.ceil(optimum(load.tolist(), experts, slots))


def check_placement(placement: Any, load: np.ndarray, experts: Sequence[Sequence[int]], slots: int) -> None:
    """All rows are where their expert or a copy is; no slot holds an expert of its own rank, or one twice."""
    assert placement.rows.sum(axis=0).tolist() == load.tolist()
    assert (placement.rows >= 0).all()
    assert placement.slots.shape == (len(experts), slots)
    for rank, ids in enumerate(experts):
        copied = [expert for expert in placement.slots[rank].tolist() if expert >= 0]
        assert len({*copied, *ids}) == len(copied) + len(ids)
        assert set(np.flatnonzero(placement.rows[rank])) <= {*copied, *ids}


@pytest.mark.parametrize("p", [2, 3, 8, 64])
def test_one_hot_expert_and_a_slot_on_each_rank(p: int) -> None:
    load = np.full(2 * p, 10)
    load[3] = 1000 * p
    placement = balance(load, 1, [[2 * rank, 2 * rank + 1] for rank in range(p)])
    assert placement.load().max() <= 1.05 * placement.load().mean()


def test_copies_go_inside_the_node_where_that_is_as_good() -> None:
    load = [900, 0, 0, 0]
    nodes = Nodes([[0, 3], [1, 2]])
    placement = balance(load, 1, [[0], [1], [2], [3]], nodes)
    assert placement.load().max() == 225
    # One copy is enough for two even ranks: it goes to the neighbour.
    half = balance([600, 300, 300, 0], 1, [[0], [1], [2], [3]], nodes)
    assert half.slots.tolist() == [[-1], [-1], [-1], [0]]


def test_nothing_to_balance() -> None:
    for load, slots in (([5, 5], 1), ([0, 0], 1), ([9, 1], 0), ([[3, 1], [1, 3]], 2)):
        placement = balance(load, slots, [[0], [1]])
        assert (placement.slots == -1).all()
    assert repr(balance([8, 0], 1, [[0], [1]])) == "Placement(1 copies, the fullest rank has 1.00 of the mean)"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (([1, -2], 1, [[0], [1]]), "load has numbers that are negative or not finite"),
        (([1, float("nan")], 1, [[0], [1]]), "load has numbers that are negative or not finite"),
        (([1, 2, 3], 1, [[0], [1]]), r"load has shape \(3,\), expected \(E,\) or \(p, E\) = \(2, 2\)"),
        (([1, 2], -1, [[0], [1]]), "slots is -1, expected an integer >= 0"),
        (([1, 2], 1, [[0], [0]]), r"experts is .* expected each of 0 .. E - 1 on one rank"),
        (([1, 2], 1, [[0], [1]], Nodes([[0]])), "nodes has 1 ranks, expected 2"),
    ],
)
def test_refused(arguments: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        balance(*arguments)


# ---- the exchange --------------------------------------------------------------------------------------------------


def skewed(rank: int, num_experts: int, top_k: int, hot: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x [T, 4], expert [T, K], weight [T, K]: most tokens choose `hot`; some assignments are dropped."""
    rng = np.random.default_rng(rank)
    num_tokens = 0 if rank == 1 else 11 + rank
    expert = np.argsort(rng.random((num_tokens, num_experts)), axis=1)[:, :top_k]
    for token in range(num_tokens):
        if hot not in expert[token] and rng.random() < 0.9:
            expert[token, 0] = hot
    expert[rng.random(expert.shape) < 0.1] = -1
    return rng.standard_normal((num_tokens, 4)), expert, rng.random((num_tokens, top_k))


def answers(rows: Any, weight: Any, counts: Any) -> Any:
    """[N, 4] each row times its expert's matrix, row by row, so that the rows beside it do not matter."""
    expert = torch.repeat_interleave(torch.arange(len(counts)), torch.as_tensor(counts))
    return torch.tanh((rows[:, :, None] * weight[expert]).sum(1))


def check(comm: Comm, all_to_all: Any, experts: Any, slots: int, **options: Any) -> None:
    """Answers are those without copies bit for bit, gradients within rounding; fewer rows on the fullest rank."""
    plain = RoutedExchange(all_to_all, experts, **options)
    balanced = BalancedExchange(all_to_all, experts, slots, **options)
    x, expert, factor = skewed(comm.rank, plain.num_experts, 2, hot=1)
    routing = Routing(torch.from_numpy(expert), torch.from_numpy(factor).requires_grad_())
    generator = torch.Generator().manual_seed(comm.rank)
    weight = torch.randn(len(plain.local_experts), 4, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    inputs = torch.from_numpy(x).requires_grad_()
    direction = torch.randn(x.shape, generator=generator, dtype=torch.float64)

    rows, plan = plain.dispatch(inputs, routing)
    wanted = plain.combine(answers(rows, weight, plan.rows_per_expert), plan)
    wanted_grads = torch.autograd.grad(wanted, (inputs, routing.weight, weight), direction, materialize_grads=True)
    fullest = comm.all_gather(np.array([len(rows)])).max()

    rows, plan = balanced.dispatch(inputs, routing)
    weights = torch.cat([weight, balanced.copied(weight, plan)])
    got = balanced.combine(answers(rows, weights, plan.rows_per_expert), plan)
    grads = torch.autograd.grad(got, (inputs, routing.weight, weight), direction, materialize_grads=True)
    assert torch.equal(got, wanted)
    for grad, wanted_grad in zip(grads, wanted_grads, strict=True):
        torch.testing.assert_close(grad, wanted_grad, rtol=1e-12, atol=1e-12)
    assert len(rows) == plan.placement.load()[comm.rank]
    most = comm.all_gather(np.array([len(rows)])).max()
    # Two ranks with two choices of each token are even without copies.
    assert most < fullest if slots and comm.size > 2 else most <= fullest


@pytest.mark.parametrize("slots", [0, 1, 3])
@pytest.mark.parametrize(("p", "experts"), [(1, 3), (2, 1), (4, 2), (3, [[4, 1], [0], [2, 3, 5]])])
def test_over_threads(p: int, experts: Any, slots: int) -> None:
    threads.run(p, lambda comm: check(comm, FlatAllToAll(comm), experts, slots))


@pytest.mark.parametrize("options", [{"send": "tokens", "partial_sums": "wide"}])
def test_other_ways_to_send(options: dict[str, Any]) -> None:
    """Sums on the experts' ranks are made in another order there, so only within rounding."""

    def body(comm: Comm) -> None:
        x, expert, factor = skewed(comm.rank, 8, 2, hot=5)
        balanced = BalancedExchange(HierarchicalAllToAll(comm, Nodes.of_size(2, 4)), 2, 2, **options)
        rows, plan = balanced.dispatch(x, Routing(expert, factor))
        y = balanced.combine(rows, plan)
        np.testing.assert_allclose(y, x * np.where(expert >= 0, factor, 0).sum(axis=1, keepdims=True), rtol=1e-12)

    threads.run(4, body)


def test_over_gloo() -> None:
    gloo_run(3, lambda comm: check(comm, FlatAllToAll(comm), 2, 2))


@pytest.mark.mpi(min_size=4)
def test_over_mpi() -> None:
    mpi_run(4, lambda comm: check(comm, FlatAllToAll(comm), 2, 2))


def test_wrong_weights_and_plans_are_refused() -> None:
    def body(comm: Comm) -> None:
        exchange = BalancedExchange(FlatAllToAll(comm), 2, 1)
        x, routing = np.ones((1, 3)), Routing(np.zeros((1, 1), np.int64), np.ones((1, 1)))
        rows, plan = exchange.dispatch(x, routing)
        with pytest.raises(ValueError, match=r"weights has shape \(3, 4\), expected \(2, ...\)"):
            exchange.copied(np.ones((3, 4)), plan)
        with pytest.raises(TypeError, match="expected the BalancedPlan that dispatch returned"):
            exchange.combine(rows, plan.inner)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"routing.expert has 4\.\.4, expected -1\.\.3"):
            exchange.dispatch(x, Routing(np.full((1, 1), 4), np.ones((1, 1))))

    threads.run(2, body)


# ---- the layer -----------------------------------------------------------------------------------------------------


def test_a_layer_trains_as_without_copies() -> None:
    """Ten steps with a gate that prefers one expert: the losses of both are equal within 1e-5."""

    def losses(comm: Comm, slots: int) -> list[float]:
        groups = build_groups(comm, Topology(4, expert=4))
        layer = MoE(8, 16, 8, 2, groups=groups, slots=slots, key=(3,))
        with torch.no_grad():
            layer.bias[6] += 10
        optimizer = torch.optim.SGD(layer.parameters(), 0.5)
        x = torch.randn(12, 8, generator=torch.Generator().manual_seed(comm.rank))
        found = []
        for _ in range(10):
            y, _ = layer(x)
            loss = (y - x.flip(1)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            reduce_gradients(layer, groups)
            optimizer.step()
            found.append(loss.item())
        return found

    plain = threads.run(4, lambda comm: losses(comm, 0))
    copied = threads.run(4, lambda comm: losses(comm, 2))
    np.testing.assert_allclose(copied, plain, rtol=1e-5)


def test_slices_of_experts_are_not_copied() -> None:
    def body(comm: Comm) -> None:
        groups = build_groups(comm, Topology(2, tensor=2, expert=2))
        with pytest.raises(ValueError, match="slots is 1, expected 0: slices of experts cannot be copied"):
            MoE(8, 16, 4, groups=groups, slots=1)

    threads.run(2, body)
