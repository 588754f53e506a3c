"""HierarchicalExchange against the same plain loops as RoutedExchange, and its rows against the formula."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from conftest import gloo_run, mpi_run
from test_exchange import (
    FROZEN,
    GOOD,
    answer,
    check_backward_is_collective,
    combined,
    expert_ids,
    make_world,
    rows_of,
)

from moecomm import (
    Comm,
    CommError,
    FlatAllToAll,
    HierarchicalAllToAll,
    Nodes,
    RoutedExchange,
    Routing,
    TensorParallelExchange,
    Topology,
    build_groups,
)
from moecomm.exchange import HierarchicalExchange
from moecomm.transports import threads
from moecomm.transports.wrappers import Checked, Timed

torch = pytest.importorskip("torch")

PLACES = [
    ([[0, 1], [2, 3]], 3),
    ([[0, 2], [1, 3]], [2, 0, 3, 1]),  # dealt out like cards
    ([[0, 3, 4], [1], [2]], [3, 1, 0, 2, 4]),
    ([[0, 1, 2, 3], [4, 5], [6]], 2),
    ([[0, 5], [1, 2, 6], [3, 4]], [[9], [0, 3], [], [1, 2, 8], [4], [7, 5], [6]]),
    ([[0], [1], [2], [3]], 2),
    ([[0, 1, 2, 3]], 2),
    ([[0]], 8),
]
"""(ranks of each node, experts_per_rank)"""

FOUR = [place for place in PLACES if sum(map(len, place[0])) == 4]


def make(comm: Comm, nodes: Sequence[Sequence[int]], experts: object, **options: Any) -> HierarchicalExchange:
    return HierarchicalExchange(HierarchicalAllToAll(comm, Nodes(nodes)), experts, **options)  # type: ignore[arg-type]


def check(comm: Comm, nodes: list[list[int]], experts: object, K: int) -> None:  # noqa: N803
    """Rows, their order, the answers and all gradients. Collective over comm."""
    ids = expert_ids(comm.size, experts)  # type: ignore[arg-type]
    world = make_world(comm.size, sum(map(len, ids)), K, seed=K)
    exchange = make(comm, nodes, experts)
    x, routing = world[comm.rank]

    rows, plan = exchange.dispatch(x, routing)
    wanted = rows_of(world, ids[comm.rank])
    assert rows.shape == wanted.shape
    assert (rows == wanted).all()
    assert plan.rows_per_expert.tolist() == [len(rows_of(world, [expert])) for expert in ids[comm.rank]]
    expert_of = np.repeat(np.array(ids[comm.rank], int), plan.rows_per_expert)
    answers = [answer(row, expert) for row, expert in zip(rows, expert_of, strict=True)]
    y = exchange.combine(np.array(answers).reshape(-1, 3), plan)
    assert y.dtype == x.dtype
    np.testing.assert_allclose(y, combined(x, routing), rtol=1e-12)

    x = torch.tensor(x, requires_grad=True)
    weight = torch.tensor(routing.weight, requires_grad=True)
    rows, plan = exchange.dispatch(x, Routing(torch.from_numpy(routing.expert), weight))
    y = exchange.combine(torch.tanh(rows) * torch.from_numpy(expert_of + 2)[:, None], plan)
    direction = torch.from_numpy(np.random.default_rng(comm.rank).standard_normal(x.shape))
    grads = torch.autograd.grad(y, (x, weight), direction)
    factor = torch.from_numpy(np.where(routing.expert >= 0, routing.expert + 2, 0))
    y2 = torch.tanh(x) * (weight * factor).sum(1, keepdim=True)
    torch.testing.assert_close(y, y2)
    for got, correct in zip(grads, torch.autograd.grad(y2, (x, weight), direction), strict=True):
        torch.testing.assert_close(got, correct)


@pytest.mark.parametrize("K", [1, 2, 5, 8])
@pytest.mark.parametrize(("nodes", "experts"), PLACES)
def test_over_threads(nodes: list[list[int]], experts: object, K: int) -> None:  # noqa: N803
    p = sum(map(len, nodes))
    K = min(K, sum(map(len, expert_ids(p, experts))))  # type: ignore[arg-type]  # noqa: N806
    threads.run(p, lambda comm: check(comm, nodes, experts, K))


@pytest.mark.mpi(min_size=4)
@pytest.mark.parametrize(("nodes", "experts"), FOUR)
def test_over_mpi(nodes: list[list[int]], experts: object) -> None:
    for K in (1, 6):  # noqa: N806
        mpi_run(4, lambda comm, K=K: check(comm, nodes, experts, K))  # type: ignore[misc]  # noqa: N803


def test_over_gloo() -> None:
    def body(comm: Comm) -> None:
        for nodes, experts in FOUR:
            check(comm, nodes, experts, 6)

    gloo_run(4, body)


def test_nobody_has_tokens() -> None:
    for K in (0, 2):  # noqa: N806
        routing = Routing(np.zeros((0, K), np.int64), np.zeros((0, K)))

        def body(comm: Comm, routing: Routing = routing) -> None:
            exchange = make(comm, [[0, 2], [1]], 2)
            rows, plan = exchange.dispatch(np.zeros((0, 5), np.float32), routing)
            assert rows.shape == exchange.combine(rows, plan).shape == (0, 5)

        threads.run(3, body)


def test_two_batches_in_flight() -> None:
    worlds = [make_world(4, 8, 3, seed) for seed in (1, 2)]

    def body(comm: Comm) -> None:
        exchange = make(comm, [[0, 1], [2, 3]], 2)
        (rows1, plan1), (rows2, plan2) = (exchange.dispatch(*world[comm.rank]) for world in worlds)
        y2, y1 = exchange.combine(rows2, plan2), exchange.combine(rows1, plan1)
        for y, world in ((y1, worlds[0]), (y2, worlds[1])):
            x, routing = world[comm.rank]
            factor = np.where(routing.expert >= 0, routing.weight, 0).sum(axis=1, keepdims=True)
            np.testing.assert_allclose(y, x * factor, rtol=1e-12)

    threads.run(4, body)


# ---- what is sent --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("K", [1, 3, 8])
@pytest.mark.parametrize(("nodes", "experts"), PLACES[:6])
def test_rows_between_and_inside_nodes_are_those_of_the_formula(
    nodes: list[list[int]],
    experts: object,
    K: int,  # noqa: N803
) -> None:
    p = sum(map(len, nodes))
    ids = expert_ids(p, experts)  # type: ignore[arg-type]
    K = min(K, sum(map(len, ids)))  # noqa: N806
    world = make_world(p, sum(map(len, ids)), K, seed=K)
    node_of = {rank: node for node, ranks in enumerate(nodes) for rank in ranks}
    between = inside = numbers_between = numbers_inside = 0
    for rank, (_, routing) in enumerate(world):
        for experts_of_token in routing.expert.tolist():
            holders = {holder for holder in range(p) if set(ids[holder]) & set(experts_of_token)}
            needed = {node_of[holder] for holder in holders}
            between += len(needed - {node_of[rank]})
            for node in needed:
                relay = nodes[node][nodes[node_of[rank]].index(rank) % len(nodes[node])]
                inside += len({holder for holder in holders if node_of[holder] == node} - {relay})
                for holder in (h for h in holders if node_of[h] == node):
                    num_assignments = len(set(ids[holder]) & set(experts_of_token))
                    numbers_between += num_assignments if node != node_of[rank] else 0
                    numbers_inside += num_assignments if holder != relay else 0

    def body(comm: Comm) -> list[list[int]]:
        timed = Timed(comm)
        exchange = make(timed, nodes, experts)
        x, routing = world[comm.rank]
        other_node = np.array([node_of[rank] != node_of[comm.rank] for rank in range(p)])

        def count() -> list[int]:
            sent = timed.record["all_to_allv"].bytes
            timed.clear()
            return [int(sent[other_node].sum()), int(sent[~other_node].sum())]

        timed.clear()
        rows, plan = exchange.dispatch(x, routing)
        assert timed.record["all_to_all"].calls == 2, "the counts are exchanged once in each hop"
        dispatched = count()
        exchange.combine(rows, plan)
        return [dispatched, count()]

    dispatched, combined = np.sum(threads.run(p, body), axis=0).tolist()
    row, weights, number = 3 * 8, K * 8, 4  # three float64, a float64 weight for each choice, an int32
    assert combined == [between * row, inside * row]
    assert dispatched == [
        between * (row + weights) + numbers_between * number,
        inside * (row + weights) + numbers_inside * number,
    ]


def test_counts_are_exchanged_once_for_both_directions() -> None:
    def body(comm: Comm) -> None:
        timed = Timed(comm)
        exchange = make(timed, [[0, 1], [2, 3]], 2)
        x = torch.ones(3, 2, requires_grad=True)
        timed.clear()
        rows, plan = exchange.dispatch(x, Routing(torch.tensor([[0, 3], [5, 1], [7, 6]]), torch.ones(3, 2)))
        exchange.combine(rows, plan).sum().backward()
        assert timed.record["all_to_all"].calls == 2

    threads.run(4, body)


# ---- numbers -------------------------------------------------------------------------------------------------------


def test_bfloat16_is_summed_in_float32_until_it_is_home() -> None:
    """256 + 1 + 1 + 1 + 1 is 256 if any partial sum is rounded to bfloat16, and 260 if only the last one is."""

    def body(comm: Comm) -> None:
        exchange = make(comm, [[0, 1], [2, 3]], 2, partial_sums="wide")
        routing = Routing(torch.tensor([[0, 1, 2, 4, 7]]), torch.tensor([[256.0, 1, 1, 1, 1]]))
        rows, plan = exchange.dispatch(torch.ones(1, 6).bfloat16(), routing)
        y = exchange.combine(rows, plan)
        assert y.dtype == torch.bfloat16
        assert (y == 260).all()
        assert exchange.combine(rows, plan, torch.float32).dtype == torch.float32

    threads.run(4, body)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_it_gives_what_routed_exchange_gives_and_always_the_same(dtype: torch.dtype) -> None:
    def body(comm: Comm) -> None:
        generator = torch.Generator().manual_seed(comm.rank)
        x = torch.randn(17, 8, generator=generator).to(dtype)
        expert = torch.stack([torch.randperm(20, generator=generator)[:6] for _ in range(17)])
        routing = Routing(expert, torch.rand(17, 6, generator=generator))
        exchange = make(comm, [[0, 4], [1, 2, 3]], 4, partial_sums="wide")
        first, again, flat = (
            one.combine(*one.dispatch(x, routing))
            for one in (exchange, exchange, RoutedExchange(FlatAllToAll(comm), 4))
        )
        assert torch.equal(first, again)
        # float32 sums in another order, rounded once: nearly all 16-bit results are the same
        assert dtype == torch.float32 or (first != flat).sum() <= 0.02 * flat.numel()
        torch.testing.assert_close(first, flat)

    threads.run(5, body)


def test_gradcheck() -> None:
    expert = torch.tensor([[0, 3, 5], [2, -1, 7], [1, 0, 6]])

    def body(comm: Comm) -> None:
        exchange = make(comm, [[0, 3], [1, 2]], 2)

        def layer(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            rows, plan = exchange.dispatch(
                x, Routing((expert + comm.rank) % 8 * (expert >= 0) - (expert < 0).long(), weight)
            )
            return exchange.combine(torch.tanh(rows), plan)

        generator = torch.Generator().manual_seed(comm.rank)
        x = torch.randn(3, 2, dtype=torch.float64, generator=generator, requires_grad=True)
        weight = torch.rand(3, 3, dtype=torch.float64, generator=generator, requires_grad=True)
        assert torch.autograd.gradcheck(layer, (x, weight))

    threads.run(4, body)


@pytest.mark.parametrize("frozen", FROZEN)
def test_backward_is_collective_whatever_needs_a_gradient(frozen: str) -> None:
    check_backward_is_collective(frozen, lambda comm, held: make(comm, [[0, 1], [2]], held))


def test_under_tensor_parallel_exchange() -> None:
    """Inside a lane, whose nodes are what it has of each node."""
    topology = Topology(8, tensor=2, expert=8)
    worlds = make_world(8, 8, 3)

    def body(comm: Comm) -> None:
        groups = build_groups(comm, topology)
        members = topology.group_of(comm.rank, "expert_lane")
        lane = HierarchicalAllToAll(groups.expert_lane, Nodes([[0, 1], [2, 3]]))
        inner = HierarchicalExchange(lane, [[member] for member in members])
        exchange = TensorParallelExchange(inner, groups.tensor)
        x, routing = worlds[comm.rank - comm.rank % 2]
        rows, plan = exchange.dispatch(x, routing)
        y = exchange.combine(np.tanh(rows) * (comm.rank + 2), plan)
        np.testing.assert_allclose(y, combined(x, routing), rtol=1e-12)

    threads.run(8, body)


# ---- errors --------------------------------------------------------------------------------------------------------


def test_bad_routing_on_one_rank_raises_on_all_under_checked() -> None:
    def body(comm: Comm) -> None:
        exchange = make(Checked(comm), [[0, 2], [1]], 2)
        bad = Routing(GOOD.expert + 9, GOOD.weight)
        with pytest.raises(ValueError, match=r"dispatch: routing.expert has 9\.\.9, expected -1\.\.5"):
            exchange.dispatch(np.zeros((2, 4)), bad if comm.rank == 1 else GOOD)
        exchange.combine(*exchange.dispatch(np.zeros((2, 4)), GOOD))

    threads.run(3, body)


def test_plans_and_all_to_alls_of_another_kind() -> None:
    def body(comm: Comm) -> None:
        with pytest.raises(TypeError, match="all_to_all is a FlatAllToAll, expected a HierarchicalAllToAll"):
            HierarchicalExchange(FlatAllToAll(comm), 2)  # type: ignore[arg-type]
        exchange = make(comm, [[0], [1]], 2)
        rows, plan = RoutedExchange(FlatAllToAll(comm), 2).dispatch(np.zeros((2, 4)), GOOD)
        with pytest.raises(TypeError, match="combine: plan is a Plan, expected the RelayPlan that dispatch returned"):
            exchange.combine(rows, plan)
        rows, plan = exchange.dispatch(np.zeros((2, 4)), GOOD)
        with pytest.raises(ValueError, match=rf"combine: rows has shape .*, expected \({len(rows)}, H\)"):
            exchange.combine(np.zeros((len(rows) + 1, 4)), plan)

    threads.run(2, body)


def test_a_failed_hop_ends_the_exchange_for_all() -> None:
    """Rank 3 leaves; whoever met it in one hop must not wait for the others in the other."""

    def body(comm: Comm) -> None:
        exchange = make(comm, [[0, 1], [2, 3]], 2)
        comm.barrier()  # else a slow rank may hear of it while it still makes its exchange
        if comm.rank == 3:
            return
        for _ in range(2):
            with pytest.raises(CommError):
                exchange.dispatch(np.zeros((2, 4)), GOOD)
        if comm.failure is None:  # it met rank 3 in no hop, but one who did
            raise AssertionError("the whole exchange's Comm is still said to work")

    threads.run(4, body)


def test_importing_it_loads_no_torch() -> None:
    program = (
        "import sys, numpy as np, moecomm as m\n"
        "from moecomm.exchange import HierarchicalExchange\n"
        "from moecomm.transports import threads\n"
        "def body(comm):\n"
        "    exchange = HierarchicalExchange(m.HierarchicalAllToAll(comm, m.Nodes.of_size(1, 2)), 1)\n"
        "    routing = m.Routing(np.array([[0, 1]]), np.ones((1, 2)))\n"
        "    return exchange.combine(*exchange.dispatch(np.ones((1, 3)), routing)).tolist()\n"
        "print(threads.run(2, body)[0], 'torch' in sys.modules)"
    )
    job = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert job.stdout == "[[2.0, 2.0, 2.0]] False\n"
