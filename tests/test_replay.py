"""route with recorded experts: nothing is chosen, all else follows from the logits as where route chose by itself."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from test_gating import EXACT, ROUNDED, draw, same

from moecomm import Comm, FlatAllToAll, RoutedExchange, Routing, Topology, build_groups, route
from moecomm.gating import Generator, Noise, reference, route_permute
from moecomm.transports import threads

KEPT = ("expert", "weight", "slot", "row", "source", "count", "offset")


def record(rng: np.random.Generator, num_tokens: int, num_experts: int, top_k: int, dropped: float) -> NDArray:
    """[T, K] different experts of each token in any order, some of them -1."""
    expert = rng.random((num_tokens, num_experts)).argsort(axis=1)[:, :top_k]
    return np.where(rng.random(expert.shape) < dropped, -1, expert)


def options(rng: np.random.Generator, num_tokens: int, num_experts: int, top_k: int) -> dict[str, Any]:
    """Any of route's options that do not select, drawn together."""

    def one_of(*values: Any) -> Any:
        return values[rng.integers(len(values))]

    capacity = one_of(None, 0, 1, num_tokens * top_k // num_experts + 1, num_tokens)
    return {
        "score": one_of("softmax", "sigmoid"),
        "normalize": one_of("none", "selected"),
        "scale": one_of(1.0, 2.5),
        "drop": one_of("position", "choice", "probability", "random"),
        "mask": one_of(None, rng.random(num_tokens) < 0.7),
        "generator": Generator(int(rng.integers(2**62))),
        "capacity": capacity,
        "align": one_of(1, 8) if capacity is None else 1,
    }


@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (0, 4, 2), (3, 5, 5), (17, 8, 2), (33, 31, 8), (12, 1024, 32), (515, 16, 4)], ids=str
)
@pytest.mark.parametrize("dropped", [0, 0.3, 1])
def test_as_the_definition(shape: tuple[int, int, int], dropped: float) -> None:
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(sum(shape))
    num_tokens, num_experts, top_k = shape
    for _ in range(20 if num_tokens < 100 else 6):
        logits = draw(rng, num_tokens, num_experts)
        given = options(rng, *shape)
        recorded = record(rng, *shape, dropped)
        got = route(logits, top_k, expert=recorded, **given)
        same(got, reference.route(logits.astype(np.float64), top_k, expert=recorded, **given))
        parallel = route(logits, top_k, expert=recorded.astype(np.int32), threads=3, **given)
        mask = None if given["mask"] is None else torch.from_numpy(given["mask"])
        of_tensors = route(
            torch.from_numpy(logits), top_k, expert=torch.from_numpy(recorded), **{**given, "mask": mask}
        )
        for name in EXACT + ROUNDED:
            np.testing.assert_array_equal(getattr(parallel, name), getattr(got, name), name)
            np.testing.assert_array_equal(getattr(of_tensors, name), getattr(got, name), name)


@pytest.mark.parametrize("drop", ["position", "choice", "probability", "random"])
@pytest.mark.parametrize("capacity", [None, 5])
def test_what_route_chose_gives_the_same_routing(drop: Any, capacity: int | None) -> None:
    """With a capacity the load is that of the choices that were kept: the others are not in the record."""
    rng = np.random.default_rng(1)
    logits = draw(rng, 40, 16)
    given: dict[str, Any] = {"drop": drop, "capacity": capacity, "normalize": "selected", "generator": Generator(2)}
    bias = rng.normal(size=16).astype(np.float32)
    first = route(logits, 3, bias=bias, num_groups=4, top_groups=2, noise=Noise("gumbel"), **given)
    again = route(logits, 3, expert=first.expert, **given)
    for name in KEPT if capacity else EXACT + ROUNDED:
        np.testing.assert_array_equal(getattr(again, name), getattr(first, name), name)


def by_torch(logits: Any, expert: Any, mask: Any, score: str, normalize: str) -> Any:
    """weight, aux_loss and z_loss in plain torch operations."""
    import torch

    num_experts, top_k = logits.shape[1], expert.shape[1]
    scores = torch.softmax(logits, 1) if score == "softmax" else torch.sigmoid(logits)
    taken = (expert >= 0) & mask[:, None]
    weight = torch.where(taken, scores.gather(1, expert.clamp(0)), 0)
    if normalize == "selected":
        weight = weight / weight.sum(1, keepdim=True).clamp(reference.FLOOR[score])
    num_tokens = mask.sum()
    share = scores / scores.sum(1, keepdim=True)
    load = torch.bincount(expert[taken], minlength=num_experts)
    aux_loss = num_experts / top_k * (share[mask].sum(0) / num_tokens * load / num_tokens).sum()
    return weight, aux_loss, (torch.logsumexp(logits[mask], 1) ** 2).mean()


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("normalize", ["none", "selected"])
@pytest.mark.parametrize("masked", [False, True])
def test_gradients(score: Any, normalize: Any, masked: bool) -> None:
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(3)
    recorded = torch.from_numpy(record(rng, 30, 8, 3, 0.3))
    mask = torch.from_numpy(rng.random(30) < (0.7 if masked else 2))
    pull = torch.from_numpy(rng.normal(size=(30, 3)))
    logits = torch.from_numpy(draw(rng, 30, 8)).requires_grad_()
    routing = route(logits, 3, expert=recorded, mask=mask if masked else None, score=score, normalize=normalize)
    ((routing.weight * pull).sum() + 3 * routing.aux_loss + 0.1 * routing.z_loss).backward()
    wide = logits.detach().double().requires_grad_()
    weight, aux_loss, z_loss = by_torch(wide, recorded, mask, score, normalize)
    ((weight * pull).sum() + 3 * aux_loss + 0.1 * z_loss).backward()
    torch.testing.assert_close(logits.grad, wide.grad.float(), rtol=1e-4, atol=1e-6)


def test_compiled_in_one_graph() -> None:
    torch = pytest.importorskip("torch")
    logits = torch.randn(20, 8).requires_grad_()
    recorded = torch.from_numpy(record(np.random.default_rng(0), 20, 8, 2, 0.2))

    def layer(logits: Any, x: Any, recorded: Any) -> Any:
        routing, rows = route_permute(logits, x, 2, expert=recorded, mask=recorded[:, 0] >= 0)
        return routing.weight, routing.aux_loss, rows

    x = torch.randn(20, 12)
    results = []
    for function in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        weight, aux_loss, rows = function(logits, x, recorded)
        (grad,) = torch.autograd.grad(weight.square().sum() + aux_loss, logits)
        results.append((weight, aux_loss, rows, grad))
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize(
    ("expert", "given", "message"),
    [
        ([[0, 1], [2, 4]], {}, r"expert\[1\] has an id outside -1 .. 3"),
        ([[0, -2], [2, 3]], {}, r"expert\[0\] has an id outside -1 .. 3"),
        ([[0, 1], [2**32, 3]], {}, r"expert\[1\] has an id outside -1 .. 3"),
        ([[0, 1], [3, 3]], {}, r"expert\[1\] has an expert twice"),
        ([[0, 1]], {}, r"expert is int64 \(1, 2\), expected int32 or int64 \(2, 2\), \[T, K\]"),
        ([[0], [1]], {}, r"expert is int64 \(2, 1\), expected int32 or int64 \(2, 2\)"),
        ([[0.0, 1.0], [2.0, 3.0]], {}, r"expert is float64 \(2, 2\), expected int32 or int64"),
        ([[0, 1], [2, 3]], {"bias": np.zeros(4, np.float32)}, "expert is given, so nothing is selected"),
        ([[0, 1], [2, 3]], {"noise": Noise("gumbel"), "generator": Generator(1)}, "expected no bias, no noise"),
        ([[0, 1], [2, 3]], {"num_groups": 2, "top_groups": 2}, "num_groups = 1"),
    ],
)
def test_what_it_refuses(expert: Any, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        route(np.zeros((2, 4), np.float32), 2, expert=np.array(expert), **given)


def test_what_it_notes_where_it_must_not_raise() -> None:
    logits = np.zeros((2, 4), np.float32)
    noted = route(logits, 2, expert=np.array([[0, 1], [3, 3]]), unusable="note")
    assert int(noted.status) == 4
    assert (noted.expert == -1).all()
    with pytest.raises(ValueError, match="expert has ids of no expert, or of one expert twice in a token"):
        noted.check()


def test_a_list_is_no_array() -> None:
    with pytest.raises(TypeError, match="expert is a list, expected a ndarray as logits is"):
        route(np.zeros((1, 4), np.float32), 2, expert=[[0, 1]])


def test_a_gpus_note_is_told_to_all_ranks() -> None:
    """As the kernel leaves it: status 4, the wrong ids dropped."""

    def body(comm: Comm) -> None:
        exchange = RoutedExchange(FlatAllToAll(comm), 1)
        status = np.int32(4 if comm.rank == 2 else 0)
        routing = Routing(np.full((2, 1), 1), np.ones((2, 1), np.float32), status=status)
        with pytest.raises(ValueError, match="the gate of rank 2 had no answer: expert has ids of no expert"):
            exchange.dispatch(np.ones((2, 3), np.float32), routing)

    threads.run(3, body)


def layer_rows(comm: Comm, num_passes: int, recorded: Any = None) -> tuple[list[Any], Any, Any]:
    """The rows that each pass through a layer's dispatch brought to this rank, the gradient, and the experts."""
    import torch
    from torch.utils.checkpoint import checkpoint

    exchange = RoutedExchange(FlatAllToAll(comm), 2)
    generator = torch.Generator().manual_seed(comm.rank)
    x = torch.randn(9 + comm.rank, 6, generator=generator).requires_grad_()
    gate = torch.randn(6, 2 * comm.size, generator=torch.Generator().manual_seed(9)).requires_grad_()
    seen: list[Any] = []

    def layer(x: Any, gate: Any) -> Any:
        routing = route(x @ gate, 2, expert=recorded, normalize="selected")
        rows, plan = exchange.dispatch(x, routing)
        seen.append((routing.expert, rows.detach().clone(), plan.rows_per_expert))
        return exchange.combine(rows * rows, plan)

    y = checkpoint(layer, x, gate, use_reentrant=False) if num_passes == 2 else layer(x, gate)
    y.square().sum().backward()
    assert len(seen) == num_passes
    return [(rows, rows_per_expert) for _, rows, rows_per_expert in seen], (x.grad, gate.grad), seen[0][0]


GATES: list[dict[str, Any]] = [
    {},
    {"choices": {"score": "sigmoid", "normalize": "selected", "num_groups": 3, "top_groups": 2}},
    {"choices": {"noise": Noise("gumbel")}, "capacity_factor": 1.0},
    {"choices": {"drop": "random"}, "capacity_factor": 0.7},
]


@pytest.mark.parametrize("options", GATES, ids=str)
def test_a_layer_replays_what_it_recorded(options: dict[str, Any]) -> None:
    """After its gate has changed: the same rows, other weights, and a gradient for the gate."""
    torch = pytest.importorskip("torch")
    from moecomm.nn import MoE

    def body(comm: Comm) -> None:
        groups = build_groups(comm, Topology(comm.size, expert=comm.size))
        layer = MoE(8, 12, 6, 2, groups=groups, key=(3,), **options)
        x = torch.randn(2, 20, 8, generator=torch.Generator().manual_seed(comm.rank))
        y, recorded = layer(x)
        torch.testing.assert_close(layer(x, recorded.expert)[0], y)
        with torch.no_grad():
            layer.gate.neg_()
            layer.bias.copy_(torch.arange(6.0))
        replayed_y, replayed = layer(x, recorded.expert)
        for name in ("expert", "slot", "row", "source"):
            assert torch.equal(getattr(replayed, name), getattr(recorded, name))
        assert not torch.equal(replayed.weight, recorded.weight)
        replayed_y.square().sum().backward()
        assert layer.gate.grad.abs().sum() > 0
        wrong = recorded.expert.clone()
        if comm.rank == 2:
            wrong[5] = 1
        with pytest.raises(ValueError, match="the gate of rank 2 had no answer: expert has ids of no expert"):
            layer(x, wrong)

    threads.run(3, body)


def test_recomputed_and_replayed_rows_are_the_same() -> None:
    torch = pytest.importorskip("torch")

    def body(comm: Comm) -> None:
        (wanted,), gradients, expert = layer_rows(comm, 1)
        computed, of_checkpoint, _ = layer_rows(comm, 2)
        replayed, of_replay, again = layer_rows(comm, 2, expert)
        assert torch.equal(again, expert)
        for rows, rows_per_expert in (*computed, *replayed):
            assert torch.equal(rows, wanted[0])
            assert np.array_equal(rows_per_expert, wanted[1])
        for got in (of_checkpoint, of_replay):
            assert all(torch.equal(a, b) for a, b in zip(got, gradients, strict=True))

    threads.run(3, body)
