"""RoutedExchange against plain loops over tokens and experts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest

from moecomm import Comm, FlatAllToAll, HierarchicalAllToAll, Nodes, RoutedExchange, Routing
from moecomm.transports import threads
from moecomm.transports.wrappers import Checked, Timed

torch = pytest.importorskip("torch")

EXPERTS = [(4, 2), (3, [1, 0, 3]), (5, [2, 1, 1, 0, 4]), (1, 3), (2, [[3, 0], [1, 4, 2]])]
"""(p, experts_per_rank)"""


def expert_ids(p: int, experts_per_rank: int | Sequence) -> list[list[int]]:
    """The global ids of each rank's experts, in their local order."""
    if isinstance(experts_per_rank, int):
        experts_per_rank = [experts_per_rank] * p
    if isinstance(experts_per_rank[0], list):
        return list(experts_per_rank)
    starts = np.cumsum([0, *experts_per_rank])
    return [list(range(starts[r], starts[r + 1])) for r in range(p)]


def make_world(p: int, E: int, K: int, seed: int = 0) -> list[tuple[np.ndarray, Routing]]:  # noqa: N803
    """For each rank x [T, H] and its routing: some assignments dropped, rank 1 without tokens, expert 0 popular."""
    rng = np.random.default_rng(seed)
    world = []
    for rank in range(p):
        T = 0 if rank == 1 else int(rng.integers(1, 9))  # noqa: N806
        expert = np.array([rng.permutation(E)[:K] for _ in range(T)], np.int64).reshape(T, K)
        if T and K == 1:
            expert[: T // 2] = 0
        expert[rng.random(expert.shape) < 0.2] = -1
        world.append((rng.standard_normal((T, 3)), Routing(expert, rng.random((T, K)))))
    return world


def rows_of(world: list[tuple[np.ndarray, Routing]], experts: list[int]) -> np.ndarray:
    """What dispatch must return to the rank of these experts: by expert, then source rank, then token."""
    rows = [
        x[t]
        for expert in experts
        for x, routing in world
        for t in range(len(x))
        for k in range(routing.expert.shape[1])
        if routing.expert[t, k] == expert
    ]
    return np.array(rows).reshape(-1, 3)


def answer(row: np.ndarray, expert: int) -> np.ndarray:
    return np.tanh(row) * (expert + 2)


def combined(x: np.ndarray, routing: Routing) -> np.ndarray:
    y = np.zeros_like(x)
    for t, k in np.ndindex(*routing.expert.shape):
        if routing.expert[t, k] >= 0:
            y[t] += routing.weight[t, k] * answer(x[t], routing.expert[t, k])
    return y


@pytest.mark.parametrize("nodes", [None, 2])
@pytest.mark.parametrize("send", ["assignments", "tokens"])
@pytest.mark.parametrize("K", [1, 2, 3])
@pytest.mark.parametrize(("p", "experts_per_rank"), EXPERTS)
def test_dispatch_and_combine(p: int, experts_per_rank: int, K: int, send: str, nodes: int | None) -> None:  # noqa: N803
    ids = expert_ids(p, experts_per_rank)
    world = make_world(p, sum(map(len, ids)), K)

    def body(comm: Comm) -> None:
        a2a = HierarchicalAllToAll(comm, Nodes.of_size(nodes, p)) if nodes else FlatAllToAll(comm)
        exchange = RoutedExchange(a2a, experts_per_rank, send=send)
        x, routing = world[comm.rank]
        rows, plan = exchange.dispatch(x, routing)
        wanted = rows_of(world, ids[comm.rank])
        assert rows.shape == wanted.shape
        assert (rows == wanted).all()
        assert plan.rows_per_expert.tolist() == [len(rows_of(world, [expert])) for expert in ids[comm.rank]]
        answers = [answer(r, e) for r, e in zip(rows, np.repeat(ids[comm.rank], plan.rows_per_expert), strict=True)]
        y = exchange.combine(np.array(answers).reshape(-1, 3), plan)
        assert y.dtype == x.dtype
        np.testing.assert_allclose(y, combined(x, routing), rtol=1e-13)

    threads.run(p, body)


def test_two_ranks_by_hand() -> None:
    """Rank 0 has tokens a b, rank 1 has c; experts 0, 1 are on rank 0 and expert 2 on rank 1.

    a -> 2, 0    b -> 0, dropped    c -> 0, 2
    """
    x = [np.array([["a"], ["b"]]), np.array([["c"]])]
    expert = [np.array([[2, 0], [0, -1]]), np.array([[0, 2]])]
    wanted = [["a", "b", "c"], ["a", "c"]]
    per_expert = [[3, 0], [2]]

    def body(comm: Comm) -> None:
        exchange = RoutedExchange(FlatAllToAll(comm), [2, 1])
        rows, plan = exchange.dispatch(x[comm.rank], Routing(expert[comm.rank], np.ones(expert[comm.rank].shape)))
        assert rows[:, 0].tolist() == wanted[comm.rank]
        assert plan.rows_per_expert.tolist() == per_expert[comm.rank]

    threads.run(2, body)


def test_two_batches_in_flight() -> None:
    worlds = [make_world(3, 6, 2, seed) for seed in (1, 2)]

    def body(comm: Comm) -> None:
        exchange = RoutedExchange(FlatAllToAll(comm), 2)
        (rows1, plan1), (rows2, plan2) = (exchange.dispatch(*world[comm.rank]) for world in worlds)
        y2, y1 = exchange.combine(rows2, plan2), exchange.combine(rows1, plan1)
        for y, world in ((y1, worlds[0]), (y2, worlds[1])):
            x, routing = world[comm.rank]
            factor = np.where(routing.expert >= 0, routing.weight, 0).sum(axis=1, keepdims=True)
            np.testing.assert_allclose(y, x * factor, rtol=1e-12)

    threads.run(3, body)


def test_nobody_has_tokens() -> None:
    for K in (0, 2):  # noqa: N806
        routing = Routing(np.zeros((0, K), np.int64), np.zeros((0, K)))

        def body(comm: Comm, routing: Routing = routing) -> None:
            exchange = RoutedExchange(FlatAllToAll(comm), 2)
            rows, plan = exchange.dispatch(np.zeros((0, 5), np.float32), routing)
            assert rows.shape == exchange.combine(rows, plan).shape == (0, 5)

        threads.run(3, body)


def test_one_row_for_each_token_and_rank() -> None:
    """k = 8, two experts a rank on 4 ranks: all tokens go to all experts, so 8 assignments are 4 rows."""
    T, p = 5, 4  # noqa: N806
    routing = Routing(np.tile(np.arange(8), (T, 1)), np.ones((T, 8), np.float32))

    def bytes_sent(comm: Comm, send: str) -> tuple[int, int]:
        timed = Timed(comm)
        exchange = RoutedExchange(FlatAllToAll(timed), 2, send=send)
        rows, plan = exchange.dispatch(np.ones((T, 1024), np.float32), routing)
        dispatched = timed.record["all_to_allv"].bytes.sum()
        timed.clear()
        assert (exchange.combine(rows, plan) == 8).all()
        return int(dispatched), int(timed.record["all_to_allv"].bytes.sum())

    def body(comm: Comm) -> None:
        row = 1024 * 4
        number, weights = 4, 8 * 4
        assert bytes_sent(comm, "assignments") == (T * (p - 1) * 2 * row, T * (p - 1) * 2 * row)
        assert bytes_sent(comm, "tokens") == (T * (p - 1) * (row + 2 * number + weights), T * (p - 1) * row)

    threads.run(p, body)


@pytest.mark.parametrize("send", ["assignments", "tokens"])
def test_counts_are_exchanged_once(send: str) -> None:
    """For labels, weights, rows, the answers, and both backward passes: one small exchange for each hop."""

    def body(comm: Comm) -> None:
        timed = Timed(comm)
        exchange = RoutedExchange(HierarchicalAllToAll(timed, Nodes.of_size(2, 4)), 2, send=send)
        x = torch.ones(3, 2, requires_grad=True)
        timed.clear()
        rows, plan = exchange.dispatch(x, Routing(torch.tensor([[0, 3], [5, 1], [7, 6]]), torch.ones(3, 2)))
        exchange.combine(rows, plan).sum().backward()
        assert timed.record["all_to_all"].calls == 2

    threads.run(4, body)


# ---- torch ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nodes", [None, 2])
@pytest.mark.parametrize("send", ["assignments", "tokens"])
@pytest.mark.parametrize("K", [1, 2, 3])
def test_gradients(K: int, send: str, nodes: int | None) -> None:  # noqa: N803
    p, per_rank = 4, [2, 0, 3, 1]
    ids = expert_ids(p, per_rank)
    world = make_world(p, 6, K, seed=K)

    def body(comm: Comm) -> None:
        a2a = HierarchicalAllToAll(comm, Nodes.of_size(nodes, p)) if nodes else FlatAllToAll(comm)
        exchange = RoutedExchange(a2a, per_rank, send=send)
        x, routing = torch.tensor(world[comm.rank][0], requires_grad=True), world[comm.rank][1]
        weight = torch.tensor(routing.weight, requires_grad=True)
        rows, plan = exchange.dispatch(x, Routing(torch.from_numpy(routing.expert), weight))
        scale = torch.from_numpy(np.repeat(np.array(ids[comm.rank], int), plan.rows_per_expert) + 2)[:, None]
        y = exchange.combine(torch.tanh(rows) * scale, plan)
        direction = torch.from_numpy(np.random.default_rng(comm.rank).standard_normal(x.shape))
        grad_x, grad_weight = torch.autograd.grad(y, (x, weight), direction)

        x2, weight2 = x.detach().requires_grad_(), weight.detach().requires_grad_()
        kept = torch.from_numpy(routing.expert >= 0)
        scales = torch.from_numpy(routing.expert + 2)[:, :, None]
        y2 = (torch.tanh(x2)[:, None] * scales * (weight2 * kept)[:, :, None]).sum(1)
        wanted_x, wanted_weight = torch.autograd.grad(y2, (x2, weight2), direction)
        torch.testing.assert_close(y, y2)
        torch.testing.assert_close(grad_x, wanted_x)
        torch.testing.assert_close(grad_weight, wanted_weight)

    threads.run(p, body)


@pytest.mark.parametrize("send", ["assignments", "tokens"])
def test_gradcheck(send: str) -> None:
    expert = [torch.tensor([[0, 3], [2, -1], [1, 0]]), torch.tensor([[3, 2], [3, 1], [-1, -1]])]

    def body(comm: Comm) -> None:
        exchange = RoutedExchange(FlatAllToAll(comm), 2, send=send)

        def layer(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            rows, plan = exchange.dispatch(x, Routing(expert[comm.rank], weight))
            return exchange.combine(torch.tanh(rows), plan)

        generator = torch.Generator().manual_seed(comm.rank)
        x = torch.randn(3, 2, dtype=torch.float64, generator=generator, requires_grad=True)
        weight = torch.rand(3, 2, dtype=torch.float64, generator=generator, requires_grad=True)
        assert torch.autograd.gradcheck(layer, (x, weight))

    threads.run(2, body)


FROZEN = ("x on all", "x on rank 1", "weight on rank 1", "everything on rank 1")


def check_backward_is_collective(frozen: str, make: Callable[[Comm, list[int]], RoutedExchange]) -> None:
    """Rank 1 has no experts, and some inputs need no gradient: nobody may wait for a rank that goes no further."""

    def body(comm: Comm) -> None:
        exchange = make(comm, [2, 0, 1])
        x, weight = torch.ones(4, 2, dtype=torch.float64), torch.ones(4, 2, dtype=torch.float64)
        x.requires_grad_(frozen != "x on all" and (comm.rank != 1 or frozen == "weight on rank 1"))
        weight.requires_grad_(comm.rank != 1 or frozen.startswith("x"))
        rows, plan = exchange.dispatch(x, Routing(torch.tensor([[0, 2], [2, 1], [1, 0], [-1, 2]]), weight))
        answers = 3 * rows if comm.rank != 1 else torch.zeros(0, 2, dtype=torch.float64)  # cut off from its rows
        exchange.combine(answers, plan).sum().backward()
        if x.requires_grad:
            assert x.grad.tolist() == [[6, 6], [6, 6], [6, 6], [3, 3]]
        if weight.requires_grad:
            assert weight.grad.tolist() == [[6, 6], [6, 6], [6, 6], [0, 6]]

    threads.run(3, body)


@pytest.mark.parametrize("frozen", FROZEN)
@pytest.mark.parametrize("send", ["assignments", "tokens"])
def test_backward_is_collective_whatever_needs_a_gradient(send: str, frozen: str) -> None:
    check_backward_is_collective(frozen, lambda comm, held: RoutedExchange(FlatAllToAll(comm), held, send=send))


@pytest.mark.parametrize("send", ["assignments", "tokens"])
def test_transposed_inputs(send: str) -> None:
    def body(comm: Comm) -> None:
        exchange = RoutedExchange(FlatAllToAll(comm), 2, send=send)
        x, weight = torch.ones(3, 4).T.requires_grad_(), torch.ones(2, 4).T.requires_grad_()
        rows, plan = exchange.dispatch(x, Routing(torch.tensor([[0, 1, 2, 3], [1, 2, 3, 0]]).T, weight))
        exchange.combine(rows, plan).sum().backward()
        assert (x.grad == 2).all()
        assert (weight.grad == 3).all()

    threads.run(2, body)


def test_no_gradients_are_recorded_where_none_are_wanted() -> None:
    def body(comm: Comm) -> None:
        exchange = RoutedExchange(FlatAllToAll(comm), 2)
        with torch.no_grad():
            rows, plan = exchange.dispatch(torch.ones(2, 2), Routing(torch.tensor([[0], [1]]), torch.ones(2, 1)))
            assert not exchange.combine(rows, plan).requires_grad

    threads.run(1, body)  # grad mode belongs to a thread, so each rank sets its own


def test_second_derivatives_are_refused() -> None:
    def body(comm: Comm) -> None:
        x = torch.ones(2, 2, requires_grad=True)
        exchange = RoutedExchange(FlatAllToAll(comm), 2)
        rows, plan = exchange.dispatch(x, Routing(torch.tensor([[0], [1]]), torch.ones(2, 1)))
        (grad,) = torch.autograd.grad((exchange.combine(rows, plan) ** 2).sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            grad.sum().backward()

    threads.run(2, body)


@pytest.mark.parametrize("dtype", ["int64", "complex64"])
def test_rows_that_cannot_be_weighted(dtype: str) -> None:
    def body(comm: Comm) -> None:
        exchange = RoutedExchange(FlatAllToAll(comm), 2)
        rows, plan = exchange.dispatch(np.ones((2, 4), dtype), GOOD)
        with pytest.raises(TypeError, match=f"combine: rows has dtype {dtype}, expected floats"):
            exchange.combine(rows, plan)

    threads.run(2, body)


@pytest.mark.parametrize("send", ["assignments", "tokens"])
def test_bfloat16_is_summed_in_float32(send: str) -> None:
    """256 + 1 + 1 + 1 is 256 if each sum is rounded to bfloat16, and 260 if only the last one is."""

    def body(comm: Comm) -> None:
        exchange = RoutedExchange(FlatAllToAll(comm), 4, send=send, partial_sums="wide")
        routing = Routing(torch.tensor([[0, 6, 2, 7]]), torch.tensor([[256.0, 1, 1, 1]]))
        rows, plan = exchange.dispatch(torch.ones(1, 6).bfloat16(), routing)
        y = exchange.combine(rows, plan)
        assert y.dtype == torch.bfloat16
        assert (y == 260).all()

    threads.run(2, body)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sending_tokens_gives_the_same_within_rounding(dtype: torch.dtype) -> None:
    def body(comm: Comm) -> None:
        generator = torch.Generator().manual_seed(comm.rank)
        x = torch.randn(17, 8, generator=generator).to(dtype)
        routing = Routing(
            torch.stack([torch.randperm(12, generator=generator)[:4] for _ in range(17)]),
            torch.rand(17, 4, generator=generator),
        )
        plain, dedup = (
            exchange.combine(*exchange.dispatch(x, routing))
            for exchange in (
                RoutedExchange(FlatAllToAll(comm), 4, send=send, partial_sums="wide")
                for send in ("assignments", "tokens")
            )
        )
        # float32 sums in another order, rounded once: nearly all 16-bit results are the same
        assert dtype == torch.float32 or (plain != dedup).sum() <= 0.02 * plain.numel()
        torch.testing.assert_close(plain, dedup)

    threads.run(3, body)


def test_partial_sums_travel_in_the_dtype_of_the_rows() -> None:
    """Half the bytes of float32, for one more rounding of each rank's part: 256 + 1 is 256, 1 + 1 is 2."""

    def body(comm: Comm) -> None:
        for partial_sums, wanted, width in (("rows", 258, 2), ("wide", 260, 4)):
            timed = Timed(comm)
            exchange = RoutedExchange(FlatAllToAll(timed), 4, send="tokens", partial_sums=partial_sums)
            routing = Routing(torch.tensor([[0, 6, 2, 7]]), torch.tensor([[256.0, 1, 1, 1]]))
            rows, plan = exchange.dispatch(torch.ones(1, 6).bfloat16(), routing)
            timed.clear()
            assert (exchange.combine(rows, plan) == wanted).all()
            assert timed.record["all_to_allv"].bytes.sum() == 6 * width

    threads.run(2, body)


def test_a_profile_names_what_an_exchange_does() -> None:
    def body(comm: Comm) -> set[str]:
        x = torch.ones(3, 4, requires_grad=True)
        exchange = RoutedExchange(FlatAllToAll(comm), 2)
        with torch.profiler.profile() as profile:
            rows, plan = exchange.dispatch(x, Routing(torch.tensor([[0, 1], [1, 0], [0, -1]]), torch.ones(3, 2)))
            exchange.combine(rows, plan).sum().backward()
        return {event.key for event in profile.key_averages()}

    (names,) = threads.run(1, body)
    calls = {"moecomm.dispatch", "moecomm.combine", "moecomm.backward pass"}
    assert names >= calls | {"moecomm.copy or sum rows", "moecomm.send rows", "moecomm.order rows"}


# ---- bad input -----------------------------------------------------------------------------------------------------

GOOD = Routing(np.zeros((2, 1), int), np.ones((2, 1)))


@pytest.mark.parametrize(
    ("x", "routing", "error", "match"),
    [
        (np.zeros((3, 4)), GOOD, ValueError, r"expert has shape \(2, 1\), expected \(T, K\) with T = 3, as x \(3, 4\)"),
        (np.zeros((2, 4)), Routing(np.zeros(2, int), np.ones(2)), ValueError, r"expert has shape \(2,\)"),
        (np.zeros((2, 4)), Routing(GOOD.expert, np.ones((2, 2))), ValueError, r"weight has shape \(2, 2\), expected"),
        (np.zeros((2, 4)), Routing(GOOD.expert + 4, GOOD.weight), ValueError, r"has 4\.\.4, expected -1\.\.3"),
        (np.zeros((2, 4)), Routing(GOOD.expert - 2, GOOD.weight), ValueError, r"has -2\.\.-2, expected -1\.\.3"),
        (np.zeros((2, 4)), Routing(GOOD.expert * 1.0, GOOD.weight), TypeError, "dtype float64, expected integers"),
        (np.zeros((2, 4)), Routing(GOOD.expert, torch.ones(2, 1)), TypeError, "weight is a Tensor, expected a ndarray"),
        ([[1.0]], GOOD, TypeError, "x is a list, expected a numpy array or a torch tensor"),
    ],
)
def test_bad_routing(x: np.ndarray, routing: Routing, error: type, match: str) -> None:
    def body(comm: Comm) -> None:
        exchange = RoutedExchange(FlatAllToAll(comm), 2)
        with pytest.raises(error, match=f"dispatch: .*{match}.*rank {comm.rank} of 2"):
            exchange.dispatch(x, routing)
        exchange.dispatch(np.zeros((2, 4)), GOOD)

    threads.run(2, body)


def test_bad_routing_on_one_rank_raises_on_all_under_checked() -> None:
    def body(comm: Comm) -> None:
        exchange = RoutedExchange(FlatAllToAll(Checked(comm)), 2)
        bad = Routing(GOOD.expert + 9, GOOD.weight)
        with pytest.raises(ValueError, match=r"has 9\.\.9, expected -1\.\.5"):
            exchange.dispatch(np.zeros((2, 4)), bad if comm.rank == 1 else GOOD)
        exchange.dispatch(np.zeros((2, 4)), GOOD)

    threads.run(3, body)


def test_an_expert_that_nobody_holds() -> None:
    def body(comm: Comm) -> None:
        exchange = RoutedExchange(FlatAllToAll(comm), [[0], [2]])
        with pytest.raises(ValueError, match="names expert 1, which no rank holds"):
            exchange.dispatch(np.zeros((2, 4)), Routing(GOOD.expert + 1, GOOD.weight))

    threads.run(2, body)


def test_rows_that_do_not_fit_the_plan() -> None:
    def body(comm: Comm) -> None:
        exchange = RoutedExchange(FlatAllToAll(comm), 2)
        rows, plan = exchange.dispatch(np.zeros((2, 4)), GOOD)
        with pytest.raises(ValueError, match=rf"combine: rows has shape .*, expected \({len(rows)}, H\)"):
            exchange.combine(np.zeros((len(rows) + 1, 4)), plan)
        with pytest.raises(TypeError, match="combine: rows is a Tensor, expected a ndarray as dispatch was given"):
            exchange.combine(torch.zeros(rows.shape), plan)
        with pytest.raises(TypeError, match="combine: plan is a NoneType, expected one that dispatch returned"):
            exchange.combine(rows, None)

    threads.run(2, body)


def test_tokens_that_cannot_be_moved_are_refused_before_anything_is_sent() -> None:
    def body(comm: Comm) -> None:
        exchange = RoutedExchange(FlatAllToAll(comm), 2)
        for x in (np.full((2, 4), None), np.ma.masked_array(np.zeros((2, 4)), mask=np.eye(2, 4))):
            if comm.rank == 0:
                with pytest.raises(TypeError, match="dispatch: x "):
                    exchange.dispatch(x, GOOD)
        exchange.combine(*exchange.dispatch(np.zeros((2, 4)), GOOD))

    threads.run(2, body)


@pytest.mark.parametrize(
    ("experts_per_rank", "match"),
    [
        ([1], "has 1 entries, expected 2, one per rank"),
        ([1, -1], "expected counts >= 0"),
        ([[0, 1], [1]], "expected every expert on one rank only"),
        ([[0], [-1]], "expected every expert on one rank only"),
    ],
)
def test_bad_experts(experts_per_rank: list, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        threads.run(2, lambda comm: RoutedExchange(FlatAllToAll(comm), experts_per_rank))


def test_bad_send() -> None:
    with pytest.raises(ValueError, match="send is 'rows', expected 'assignments' or 'tokens'"):
        threads.run(1, lambda comm: RoutedExchange(FlatAllToAll(comm), 1, send="rows"))  # type: ignore[arg-type]
