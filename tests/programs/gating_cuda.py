"""The gate on a GPU against its definition, with random inputs: python tests/programs/gating_cuda.py [CHECK ...]

Every output is poisoned before a kernel writes it: torch fills new memory with NaN or the largest integer. Integers and
rows that are only moved must be the same; sums may be as far away as the rounding of their terms explains.

    python tests/programs/gating_cuda.py --seeds 20
    compute-sanitizer --tool racecheck python tests/programs/gating_cuda.py small
    python tests/programs/gating_cuda.py route route_gradient small --device cpu
"""

# ruff: noqa: N803, N806 - capitals are dimensions

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from rounding import ROUNDING, additions, distance, route_gradient, route_gradient_roundings, route_sizes
from seeds import add_seeds, repeated_by, seeds_of
from torch.utils.checkpoint import checkpoint

from moecomm import Routing, route
from moecomm.gating import Generator, Noise, cuda, permute, permute_fp8, reference, route_permute, unpermute
from moecomm.nn import MoE

INTEGERS = ("expert", "slot", "row", "source", "count", "offset", "load")
FLOATS = ("weight", "lse", "aux_loss", "z_loss")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

options: argparse.Namespace
draw: np.random.Generator
farthest = 0.0
"""The largest distance of a float32 sum from what is right since the check began."""


def on_device(tensor: Any) -> Any:
    return tensor.to(options.device) if isinstance(tensor, torch.Tensor) else tensor


def on_cpu(routing: Routing) -> Routing:
    arrays = {f.name: getattr(routing, f.name) for f in fields(routing)}
    return Routing(
        **{name: a.detach().cpu().numpy() if isinstance(a, torch.Tensor) else a for name, a in arrays.items()}
    )


def wide(tensor: torch.Tensor) -> np.ndarray:
    """The same numbers in float64, on the host."""
    return tensor.detach().double().cpu().numpy()


def near(name: str, got: torch.Tensor, wanted: Any, size: Any, roundings: Any, what: object, narrowed: int = 1) -> None:
    """See rounding.distance."""
    global farthest
    far = distance(got, wanted, size, roundings, narrowed)
    assert far <= 1, (name, far, what)
    if got.dtype == torch.float32:  # others are as far as their last rounding
        farthest = max(farthest, far)


def definition(routing: Routing, mask: Any, choices: dict) -> dict[str, Any]:
    """The arguments of reference.values and of rounding's functions, but for the logits."""
    mask = np.ones(len(routing.expert), bool) if mask is None else wide(mask).astype(bool)
    kinds = {"score": "softmax", "normalize": "none", "scale": 1.0}
    chosen = {name: choices.get(name, default) for name, default in kinds.items()}
    return {"expert": routing.expert, "load": routing.load, "mask": mask, **chosen}


def check_routing(got: Routing, wanted: Routing, logits: torch.Tensor, choices: dict, what: object) -> None:
    """got on any device, wanted on the CPU. Its integers are right; the numbers that follow from them are near."""
    there, wanted = on_cpu(got), on_cpu(wanted)
    for name in INTEGERS:
        assert np.array_equal(getattr(there, name), getattr(wanted, name)), (name, what)
    arguments = definition(wanted, choices.get("mask"), choices)
    weight, aux_loss, z_loss, lse = reference.values(wide(logits), *arguments.values())
    sizes = route_sizes(wide(logits), **arguments)
    for name, exact in zip(FLOATS, (weight, lse, aux_loss, z_loss), strict=True):
        near(name, torch.as_tensor(getattr(got, name)), exact, getattr(sizes, name), 1, what)


def random_logits(T: int, E: int) -> torch.Tensor:
    """Half of the time few distinct numbers, so that ties decide; some experts ruled out."""
    logits = torch.from_numpy(draw.normal(size=(T, E)).astype(np.float32))
    logits = logits if draw.random() < 0.5 else (logits * 2).round()
    if E > 64:
        logits[:, draw.integers(E)] = -torch.inf
    return logits


def spoil(logits: torch.Tensor, mask: torch.Tensor | None) -> None:
    """Most of the time, put into the rows of masked tokens what no gate could use: nothing may come of it."""
    if mask is not None and draw.random() < 0.7:
        logits[~mask] = torch.from_numpy(draw.choice([-np.inf, np.inf, np.nan, 300.0, -300.0], logits.shape[1])).float()


# ---- checks, each of one case --------------------------------------------------------------------------------------


def check_route(T: int, E: int, K: int, drop: str) -> None:
    """All options, on the GPU, on the CPU and by the definition."""
    logits = random_logits(T, E)
    groups = [g for g in (2, 4, 8) if E % g == 0 and E // g * (g // 2) >= K]
    choices = {
        "score": str(draw.choice(["softmax", "sigmoid"])), "normalize": str(draw.choice(["none", "selected"])),
        "drop": drop, "scale": float(draw.choice([1.0, 2.5])),
        "capacity": draw.choice([None, max(T * K // (2 * E), 1), T]),
        "generator": Generator(int(draw.integers(2**40)), int(draw.integers(2**40))),
        "noise": draw.choice([None, Noise("gumbel", 1.0), Noise("jitter", 0.01)], p=[0.6, 0.2, 0.2]),
    }  # fmt: skip
    if groups and draw.random() < 0.4:
        choices |= {"num_groups": int(draw.choice(groups))}
        choices["top_groups"] = choices["num_groups"] // 2
        choices["best_in_group"] = int(draw.choice([1, 2]))
    if choices["capacity"] is None:
        choices["align"] = int(draw.choice([1, 8, 128]))
    else:
        choices["capacity"] = int(choices["capacity"])
    choices["mask"] = torch.from_numpy(draw.random(T) < 0.8) if draw.random() < 0.5 else None
    choices["bias"] = torch.from_numpy(draw.normal(size=E).astype(np.float32)) if draw.random() < 0.4 else None
    spoil(logits, choices["mask"])
    logits = logits.to(DTYPES[draw.integers(3)])
    there = {name: on_device(choice) for name, choice in choices.items()}
    got = route(on_device(logits), K, **there).check()
    what = T, E, K, logits.dtype, choices
    check_routing(got, route(logits, K, **choices), logits, choices, what)
    if T <= 300:
        arrays = {name: c.numpy() if isinstance(c, torch.Tensor) else c for name, c in choices.items()}
        check_routing(got, reference.route(wide(logits), K, **arrays), logits, choices, what)


def check_replay(T: int, E: int, K: int, drop: str) -> None:
    """Recorded experts, some of them dropped: routing and gradient; then one that stands twice in a token."""
    logits = random_logits(T, E)
    chosen = draw.random((T, E)).argsort(axis=1)[:, :K]
    recorded = torch.from_numpy(np.where(draw.random((T, K)) < draw.choice([0, 0.3]), -1, chosen))
    mask = torch.from_numpy(draw.random(T) < 0.8) if draw.random() < 0.5 else None
    spoil(logits, mask)
    logits = logits.to(DTYPES[draw.integers(3)])
    choices = {
        "score": str(draw.choice(["softmax", "sigmoid"])), "normalize": str(draw.choice(["none", "selected"])),
        "drop": drop, "scale": 1.5, "capacity": draw.choice([None, max(T * K // (2 * E), 1)]), "expert": recorded,
        "generator": Generator(int(draw.integers(2**40))), "mask": mask,
    }  # fmt: skip
    there = {name: on_device(choice) for name, choice in choices.items()}
    leaf = on_device(logits.clone()).requires_grad_()
    got, what = route(leaf, K, **there).check(), (T, E, K, logits.dtype, choices)
    check_routing(got, route(logits, K, **choices), logits, choices, what)
    direction = torch.randn(T, K)
    loss = (got.weight * on_device(direction)).sum() + 2 * got.aux_loss + 0.1 * got.z_loss
    grad = torch.autograd.grad(loss, leaf)[0]
    near_route_gradient(grad, logits, (direction, direction.abs(), 0), (2, 0.1), got, mask, choices, what)
    if options.device == "cuda" and K > 1 and T and mask is None:
        there["expert"][0, :2] = 0
        assert int(route(leaf, K, **there).status) == 4, what


def check_route_gradient(shape: tuple[int, int, int], score: str, normalize: str) -> None:
    """Through weights and losses."""
    T, E, K = shape
    choices = {"score": score, "normalize": normalize, "scale": 1.5, "capacity": max(T * K // E, 1)}
    mask = torch.from_numpy(draw.random(T) < 0.8) if draw.random() < 0.5 else None
    logits = random_logits(T, E)
    spoil(logits, mask)
    logits, direction = logits.to(DTYPES[draw.integers(3)]), torch.randn(T, K)
    leaf = on_device(logits.clone()).requires_grad_()
    routing = route(leaf, K, mask=on_device(mask), **choices)
    loss = (routing.weight * on_device(direction)).sum() + 2 * routing.aux_loss + 0.1 * routing.z_loss
    got = torch.autograd.grad(loss, leaf)[0]
    what = T, E, K, logits.dtype, mask is not None, choices
    near_route_gradient(got, logits, (direction, direction.abs(), 0), (2, 0.1), routing, mask, choices, what)


def near_route_gradient(
    got: torch.Tensor, logits: torch.Tensor, of_weight: tuple[Any, Any, int], of_losses: tuple[float, float],
    routing: Routing, mask: Any, choices: dict, what: object,
) -> None:  # fmt: skip
    """of_weight: the gradient in the weights, the size of its own terms, and the roundings that those have passed."""
    grad, size, roundings = of_weight
    exact, arguments = wide(logits), definition(on_cpu(routing), mask, choices)
    wanted = route_gradient((wide(grad), *of_losses), exact, **arguments)
    terms = route_gradient((wide(size), *of_losses), exact, **arguments, sizes=True)
    passed = roundings + route_gradient_roundings(exact, arguments["mask"], arguments["score"], arguments["normalize"])
    near("gradient of logits", got, wanted, terms, passed, what)


def a_routing(T: int, E: int, K: int, kind: str) -> Routing:
    choices = {
        "dropless": {"align": 1},
        "aligned": {"align": 16},
        "dropped": {"capacity": max(T * K // (2 * E), 1)},
        "roomy": {"capacity": min(T, 2 * T * K // E + 4)},
        "masked": {"mask": on_device(torch.from_numpy(draw.random(T) < 0.5))},
    }[kind]
    return route(on_device(random_logits(T, E)), K, normalize="selected", **choices)


def misaligned(rows: torch.Tensor) -> torch.Tensor:
    """The same numbers, one element behind where memory begins."""
    memory = rows.new_empty(rows.numel() + 1)
    return memory[1:].view(rows.shape).copy_(rows)


def check_rows(shape: tuple[int, int, int], H: int) -> None:
    """permute, permute_fp8, unpermute and the gradients of all: every size, with layouts, dtypes, alignments drawn."""
    T, E, K = shape
    kind = str(draw.choice(["dropless", "aligned", "dropped", "roomy", "masked"]))
    routing = a_routing(T, E, K, kind)
    there = on_cpu(routing)
    weight = there.weight.astype(np.float64)
    for dtype in DTYPES:
        shift = bool(draw.random() < 0.3)
        place = misaligned if shift else torch.clone

        def random(*size: int, dtype: torch.dtype = dtype, place: Callable = place) -> torch.Tensor:
            return place(torch.randn(size).to(options.device, dtype))

        x = random(T, H).requires_grad_()
        what = T, E, K, H, kind, dtype, shift
        rows = permute(x, routing)
        check_moved(x, rows, permute_fp8(x.detach(), routing), there, what)

        answers = random(*rows.shape)
        answers.view(-1, H)[routing.source < 0] = torch.nan  # rows that nobody may read
        answers.requires_grad_()
        residual = random(T, H) if H % 2 else None
        leaf = routing.weight.clone().requires_grad_()
        y = unpermute(answers, replace(routing, weight=leaf), residual)
        double, start = wide(answers).reshape(-1, H), None if residual is None else wide(residual)
        near_sum("unpermute", y, double, replace(there, weight=weight), start, what)

        grad_y, grad_rows = random(T, H), random(*rows.shape)
        got = torch.autograd.grad(y, (answers, leaf), grad_y)
        check_gradients(got, wide(grad_y), double, there, what)
        got_x = torch.autograd.grad(rows, x, grad_rows)[0]
        ones = replace(there, weight=np.ones(there.row.shape))
        near_sum("permute backward", got_x, wide(grad_rows).reshape(-1, H), ones, None, what)


def check_moved(
    x: torch.Tensor, rows: torch.Tensor, fp8: tuple[torch.Tensor, ...], routing: Routing, what: Any
) -> None:
    """The rows of permute and of permute_fp8, to the bit."""
    exact = x.detach().float().cpu().numpy()
    numbers, scales = reference.to_e4m3(exact)
    wanted_scales = reference.permute(scales, routing)
    wanted_scales[routing.source < 0] = 1
    expected = reference.permute(exact, routing), reference.permute(numbers, routing), wanted_scales
    for name, got, wanted in zip(("permute", "fp8", "scales"), (rows, *fp8), expected, strict=True):
        assert np.array_equal(got.detach().float().cpu().numpy().reshape(wanted.shape), wanted), (name, what)


def near_sum(name: str, y: torch.Tensor, rows: np.ndarray, routing: Routing, start: Any, what: object) -> None:
    """K products, or rows, added one by one to a start. Weights are not negative."""
    wanted = reference.unpermute(rows, routing, start)
    size = reference.unpermute(np.abs(rows), routing, None if start is None else np.abs(start))
    near(name, y, wanted, size, routing.row.shape[1] + 1, what)


def check_gradients(got: tuple, grad_y: np.ndarray, rows: np.ndarray, routing: Routing, what: object) -> None:
    """Of unpermute: grad_rows[row[t, k]] = weight[t, k] * grad_y[t], grad_weight[t, k] = grad_y[t] . that row."""
    kept = routing.row >= 0
    token, at = np.nonzero(kept)[0], routing.row[kept]
    grad_rows = np.zeros_like(rows)
    grad_rows[at] = routing.weight[kept, None] * grad_y[token]
    grad_weight, size = np.zeros((2, *kept.shape))
    grad_weight[kept] = (grad_y[token] * rows[at]).sum(1)
    size[kept] = np.abs(grad_y[token] * rows[at]).sum(1)
    near("gradient of rows", got[0].reshape(rows.shape), grad_rows, np.abs(grad_rows), 1, what)
    near("gradient of weight", got[1], grad_weight, size, additions(rows.shape[1]) + 1, what)


def layer(logits: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """An expert multiplies its rows by 1, 2, 3 or 4: by 1 for a token's best expert, by 4 for its fourth."""
    routing = route(logits, 4, normalize="selected")
    return (
        unpermute(permute(x, routing) * (routing.source % 4 + 1)[:, None], routing, x),
        routing.aux_loss,
        routing.z_loss,
    )


def check_layer(compiled: bool) -> None:
    """Gradients through the whole layer, eager and compiled, against the same mathematics in float64."""
    call = torch.compile(layer, fullgraph=True) if compiled else layer
    T, E, K, H = 500, 64, 4, 256
    logits = torch.randn(T, E, device=options.device, requires_grad=True)
    x = torch.randn(T, H, device=options.device, requires_grad=True)
    direction = torch.randn(T, H, device=options.device)
    y, aux_loss, z_loss = call(logits, x)
    got = torch.autograd.grad((y * direction).sum() + 3 * aux_loss + 0.1 * z_loss, (logits, x))

    choices = {"normalize": "selected"}
    routing = route(logits.detach(), K, **choices)
    probabilities = logits.detach().double().softmax(1)
    best = probabilities.gather(1, routing.expert.long())
    assert torch.equal(best, probabilities.topk(K).values)  # of a tie it may take another one
    check_routing(replace(routing, aux_loss=aux_loss, z_loss=z_loss), routing, logits, choices, compiled)
    factor = torch.arange(1, K + 1, device=options.device)
    sums = 1 + (best / best.sum(1, keepdim=True) * factor).sum(1, keepdim=True)
    # A weight's own roundings, its product and the expert's, then the K + 1 terms: none is of another sign.
    passed = weight_roundings(logits, routing) + K + 4
    for name, result, start in (("y", y, x), ("gradient of x", got[1], direction)):
        wanted = start.double() * sums
        near(name, result, wanted, wanted.abs(), passed, compiled)
    product = direction.double() * x.double()
    of_weight = product.sum(1, keepdim=True) * factor, product.abs().sum(1, keepdim=True) * factor, additions(H) + 2
    near_route_gradient(got[0], logits, of_weight, (3, 0.1), routing, None, choices, compiled)


def weight_roundings(logits: torch.Tensor, routing: Routing) -> np.ndarray:
    """[T, 1] that the weights of a token, normalised, are off at most."""
    arguments = definition(on_cpu(routing), None, {"normalize": "selected"})
    exact = reference.values(wide(logits), *arguments.values())[0]
    return (route_sizes(wide(logits), **arguments).weight / exact).max(1, keepdims=True)


def check_graph() -> None:
    """A captured layer computes from what its inputs hold at each replay, on any stream."""
    logits, x = torch.randn(300, 128, device="cuda"), torch.randn(300, 512, device="cuda", dtype=torch.bfloat16)
    for _ in range(2):
        layer(logits, x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, *_ = layer(logits, x)
    for _ in range(5):
        logits.normal_(), x.normal_(), y.fill_(torch.nan)
        graph.replay()
        assert torch.equal(y, layer(logits, x)[0]), "a replayed graph and an eager call differ"


def check_draws() -> None:
    """Noise by a number from torch's generator: new at each replay of a graph, and drawn again under checkpointing."""
    logits = torch.randn(300, 64, device="cuda")

    def drawn() -> torch.Tensor:
        number = torch.randint(2**63 - 1, (1,), device="cuda")
        return route(logits, 2, noise=Noise("gumbel"), generator=Generator(3, number)).expert

    for _ in range(2):
        drawn()
    graph, seen = torch.cuda.CUDAGraph(), []
    with torch.cuda.graph(graph):
        expert = drawn()
    for _ in range(3):
        graph.replay()
        seen.append(expert.tolist())
    assert seen[0] != seen[1] != seen[2] != seen[0], "replays of a graph draw the same"

    layers = [MoE(64, 128, 16, 2, key=(n,), choices={"noise": Noise("gumbel")}, device="cuda") for n in range(2)]
    x, state = torch.randn(300, 64, device="cuda"), int(draw.integers(2**62))

    def gradient(use_reentrant: bool | None) -> torch.Tensor:
        torch.manual_seed(state)
        y = leaf = x.clone().requires_grad_()
        for one in layers:
            run = lambda y, one=one: one(y)[0]  # noqa: E731
            y = run(y) if use_reentrant is None else checkpoint(run, y, use_reentrant=use_reentrant)
        y.square().sum().backward()
        return leaf.grad

    # Other draws give another gradient altogether. The same ones repeat the same operations: what may differ is the
    # order in which autograd adds the gradients of a tensor. 1e-5 of all numbers together is 168 roundings.
    for use_reentrant in (False, True):
        got, wanted = gradient(use_reentrant), gradient(None)
        assert (got - wanted).norm() < 1e-5 * wanted.norm(), ("checkpointing", use_reentrant)


def check_fused(shape: tuple[int, int, int], H: int, capacity: int | None) -> None:
    """route_permute in one launch is route and then permute."""
    T, E, K = shape
    logits = on_device(random_logits(T, E))
    x = torch.randn(T, H, device=options.device).bfloat16()
    got, rows = route_permute(logits, x, K, capacity=capacity)
    wanted = route(logits, K, capacity=capacity)
    what = T, E, K, H, capacity
    check_routing(got, wanted, logits, {}, what)
    assert torch.equal(rows, permute(x, wanted)), what


def check_bad_logits(bad: float) -> None:
    """A GPU does not wait to complain: `check` does."""
    logits = torch.randn(1000, 64, device=options.device)
    logits[777, 3] = bad
    try:
        routing = route(logits, 2)
        permute(torch.randn(1000, 8, device=options.device), routing)
        routing.check()
    except ValueError:
        return
    raise AssertionError(f"{bad} in the logits went unseen")


def check_small(n: int, T: int, E: int, K: int, H: int, choices: dict) -> None:
    """Every kernel and every way of cutting its launch, as if the GPU were small: for compute-sanitizer."""
    dtype = (torch.bfloat16, torch.float32, torch.float16)[n % 3]
    logits, x = random_logits(T, E), torch.randn(T, H).to(dtype)
    there = {name: on_device(choice) for name, choice in choices.items()}
    leaf, tokens = (on_device(a.clone()).requires_grad_() for a in (logits, x))
    with (
        patch.object(cuda, "_device", lambda number: (4, 90)),
        patch.object(cuda, "ONE_LAUNCH", range(T + 1)),
        patch.object(cuda, "MOST_CHOICES_BYTES", 0 if n in (7, 8) else 96 * 1024),
    ):
        routing = route(leaf, K, **there)
        rows = permute(tokens, routing)
        y = unpermute(rows, routing, tokens)
        fp8 = permute_fp8(tokens.detach(), routing)
        roots = y, routing.weight, routing.aux_loss, routing.z_loss
        grads = torch.autograd.grad(roots, (leaf, tokens), [torch.ones_like(a) for a in roots])
        again, fused = route_permute(leaf.detach(), tokens.detach(), K, **there)
    what = T, E, K, H, choices
    wanted = on_cpu(route(logits, K, **choices))
    for result in (routing, again):
        check_routing(result, wanted, logits, choices, what)
    for moved in (rows, fused):
        check_moved(x, moved, fp8, wanted, what)

    # The weights of a token's rows, which are all its x: their own roundings, then a product and K + 1 terms.
    arguments, exact = definition(wanted, choices.get("mask"), choices), wide(x)
    weight = reference.values(wide(logits), *arguments.values())[0]
    of_weight = route_sizes(wide(logits), **arguments).weight.sum(1, keepdims=True)
    sums = 1 + weight.sum(1, keepdims=True)
    passed = of_weight / sums + K + 2
    near("y", y, exact * sums, np.abs(exact) * sums, passed, what)
    # grad_x, of ones: rows of weights, their sum, and that plus 1 are each rounded to dtype.
    of_x = sums.repeat(H, 1)
    near("gradient of x", grads[1], of_x, of_x, passed + 2 * ROUNDING[dtype], what, narrowed=K + 2)
    kept = wanted.expert >= 0
    grad = np.where(kept, exact.sum(1, keepdims=True), 0) + 1
    size = np.where(kept, np.abs(exact).sum(1, keepdims=True), 0) + 1
    of_grad = torch.from_numpy(grad), torch.from_numpy(size), additions(H) + 2
    near_route_gradient(grads[0], logits, of_grad, (1, 1), wanted, choices.get("mask"), choices, what)


# ---- all cases -----------------------------------------------------------------------------------------------------


def small_cases() -> list[tuple]:
    generator, mask, bias = Generator(5, 6), torch.arange(600) % 5 > 0, torch.linspace(-1, 1, 64)
    sure = {"score": "sigmoid", "bias": bias, "num_groups": 8, "top_groups": 4, "normalize": "selected"}
    cases = [
        (600, 128, 2, 40, {}), (600, 64, 1, 7, {"align": 4}), (600, 64, 8, 128, sure),
        (600, 64, 4, 128, {"mask": mask, "noise": Noise("gumbel"), "generator": generator}),
        (40, 64, 2, 8, {"capacity": 2, "drop": "probability"}), (300, 16, 2, 7, {"capacity": 20, "drop": "choice"}),
        (1200, 16, 3, 8, {"capacity": 200}),
        (300, 16, 2, 128, {"capacity": 20, "drop": "probability", "normalize": "selected"}),
        (600, 64, 2, 24, {"capacity": 3, "drop": "random", "mask": mask, "generator": generator}),
        (40, 128, 1, 128, {}), (50, 64, 8, 24, {"normalize": "selected"}),  # clusters, which racecheck cannot follow
    ]  # fmt: skip
    return [(n, *case) for n, case in enumerate(cases)]


ROUTES = [
    (0, 8, 2), (1, 1, 1), (3, 8, 8), (64, 128, 1), (64, 128, 8), (64, 256, 8), (65, 7, 3), (100, 1024, 32),
    (257, 64, 2), (300, 60, 6), (512, 256, 8), (1000, 128, 1), (700, 96, 5),
]  # fmt: skip
GRADIENTS = [(1, 4, 1), (65, 7, 3), (200, 128, 1), (300, 256, 8), (40, 1000, 32)]
ROWS = [
    (0, 8, 2), (1, 4, 1), (65, 8, 1), (64, 16, 2), (65, 7, 3), (63, 64, 4), (300, 128, 8), (33, 64, 13), (20, 64, 32),
]  # fmt: skip
FUSED = [(1, 8, 1), (64, 128, 1), (64, 128, 8), (500, 64, 2), (4096, 128, 8), (3000, 256, 1)]
product = itertools.product
CHECKS: dict[str, tuple[Callable, list[tuple]]] = {
    "route": (check_route, [(*r, d) for r, d in product(ROUTES, ("position", "choice", "probability", "random"))]),
    "replay": (check_replay, [(*r, d) for r, d in product(ROUTES, ("position", "choice", "probability", "random"))]),
    "route_gradient": (check_route_gradient, [*product(GRADIENTS, ("softmax", "sigmoid"), ("none", "selected"))]),
    "rows": (check_rows, [*product(ROWS, (1, 7, 8, 120, 128, 1000, 4096))]),
    "fused": (check_fused, [*product(FUSED, (7, 64, 4096), (None, 40))]),
    "layer": (check_layer, [(False,), (True,)]),
    "graph": (check_graph, [()]),
    "draws": (check_draws, [()]),
    "bad_logits": (check_bad_logits, [(torch.nan,), (torch.inf,)]),
    "small": (check_small, small_cases()),
}


ON_GPUS_ALONE = ("graph", "draws")


def run(name: str, seed: int) -> int:
    """All cases of a check, or the one that was asked for. Returns how many failed."""
    global draw, farthest
    check, cases = CHECKS[name]
    began, failed, farthest = time.monotonic(), 0, 0.0
    torch.utils.deterministic.fill_uninitialized_memory = name != "small"  # compute-sanitizer sees what is not written
    numbers = range(len(cases)) if options.case is None else [options.case]
    for n in numbers:
        draw = np.random.default_rng([seed, n, *name.encode()])
        torch.manual_seed(int(draw.integers(2**62)))
        try:
            with repeated_by(f"python {sys.argv[0]} {name} --device {options.device} --seed {seed} --case {n}"):
                check(*cases[n])
                if options.device == "cuda":
                    torch.cuda.synchronize()
        except AssertionError:
            failed += 1
    says = f"{failed} of {len(numbers)} cases are wrong" if failed else f"as defined, {len(numbers)} cases"
    share = f"float32 off by at most {farthest:.0%} of what rounding explains"
    print(f"seed {seed}, {name}: {says}, {share}, {time.monotonic() - began:.1f} s", flush=True)
    return failed


def main() -> int:
    """The exit status: 1 if a case failed."""
    global options
    description, _, rest = __doc__.partition("\n\n")
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, epilog=rest, formatter_class=raw)
    parser.add_argument("checks", nargs="*", metavar="CHECK", help=f"of {', '.join(CHECKS)} (default: all)")
    parser.add_argument("--case", type=int, help="of each check: this one alone")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: to try this program")
    add_seeds(parser)
    options = parser.parse_args()
    if unknown := set(options.checks) - set(CHECKS):
        parser.error(f"{', '.join(sorted(unknown))}: expected some of {', '.join(CHECKS)}")
    torch.use_deterministic_algorithms(True, warn_only=True)
    print(torch.cuda.get_device_name() if options.device == "cuda" else "CPU", flush=True)
    names = options.checks or [name for name in CHECKS if options.device == "cuda" or name not in ON_GPUS_ALONE]
    return int(sum(run(name, seed) for seed in seeds_of(options) for name in names) > 0)


if __name__ == "__main__":
    sys.exit(main())
