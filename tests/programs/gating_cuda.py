"""The gate on a GPU against its definition, with fresh random inputs: python tests/programs/gating_cuda.py [CHECK ...]

Every output is poisoned before a kernel writes it: torch fills new memory with NaN or the largest integer.

    compute-sanitizer --tool racecheck python tests/programs/gating_cuda.py small
"""

# ruff: noqa: N803, N806 - capitals are dimensions

import argparse
import itertools
from dataclasses import fields, replace

import numpy as np
import torch
from torch.utils.checkpoint import checkpoint

from moecomm import Routing, route
from moecomm.gating import Generator, Noise, cuda, permute, permute_fp8, reference, route_permute, unpermute
from moecomm.nn import MoE

options = argparse.ArgumentParser(description=__doc__)
options.add_argument(
    "checks",
    nargs="*",
    metavar="CHECK",
    help="route, route_gradient, rows, fused, layer, graph, draws, bad_logits, small; default: all",
)
options.add_argument("--case", type=int, help="of small: this one alone")
options.add_argument("--seed", type=int, default=int.from_bytes(np.random.bytes(4), "little"))
options = options.parse_args()
draw = np.random.default_rng(options.seed)
torch.manual_seed(options.seed)
torch.use_deterministic_algorithms(True, warn_only=True)
torch.utils.deterministic.fill_uninitialized_memory = True
print(f"seed {options.seed}, {torch.cuda.get_device_name()}", flush=True)

INTEGERS = ("expert", "slot", "row", "source", "count", "offset", "load")
FLOATS = ("weight", "lse", "aux_loss", "z_loss")
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def on_cpu(routing: Routing) -> Routing:
    arrays = {f.name: getattr(routing, f.name) for f in fields(routing)}
    return Routing(**{name: a.cpu().numpy() if isinstance(a, torch.Tensor) else a for name, a in arrays.items()})


def error(got: torch.Tensor, wanted: np.ndarray | torch.Tensor) -> float:
    """||got - wanted|| / ||wanted||; NaN and a wrong shape are infinitely wrong."""
    got = got.detach().double().cpu()
    wanted = torch.as_tensor(wanted).detach().double().cpu()
    assert got.shape == wanted.shape, (got.shape, wanted.shape)
    result = float((got - wanted).norm() / max(float(wanted.norm()), 1e-30)) if got.numel() else 0.0
    return result if result == result else float("inf")


def check_routing(got: Routing, wanted: Routing, what: object) -> None:
    for name in INTEGERS:
        assert np.array_equal(getattr(got, name), np.asarray(getattr(wanted, name))), (name, what)
    for name in FLOATS:
        wrong = error(torch.as_tensor(getattr(got, name)), getattr(wanted, name))
        assert wrong < 2e-6 or np.abs(getattr(wanted, name)).max(initial=0) < 1e-12, (name, wrong, what)


def random_logits(T: int, E: int) -> torch.Tensor:
    """Half of the time few distinct numbers, so that ties decide; some experts ruled out."""
    logits = torch.from_numpy(draw.normal(size=(T, E)).astype(np.float32))
    logits = logits if draw.random() < 0.5 else (logits * 2).round()
    if E > 64:
        logits[:, draw.integers(E)] = -torch.inf
    return logits


def check_route() -> int:
    """All options, on the GPU, on the CPU and by the definition."""
    cases = 0
    for T, E, K in [
        (0, 8, 2), (1, 1, 1), (3, 8, 8), (64, 128, 1), (64, 128, 8), (64, 256, 8), (65, 7, 3), (100, 1024, 32),
        (257, 64, 2), (300, 60, 6), (512, 256, 8), (1000, 128, 1), (700, 96, 5),
    ]:  # fmt: skip
        for drop in ("position", "choice", "probability", "random"):
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
            mask = torch.from_numpy(draw.random(T) < 0.8) if draw.random() < 0.5 else None
            bias = torch.from_numpy(draw.normal(size=E).astype(np.float32)) if draw.random() < 0.4 else None
            dtype = (torch.float32, torch.bfloat16, torch.float16)[draw.integers(3)]
            logits = logits.to(dtype)
            beside = {"mask": mask, "bias": bias}
            there = {name: None if a is None else a.cuda() for name, a in beside.items()}
            got = on_cpu(route(logits.cuda(), K, **there, **choices).check())
            here = route(logits, K, **beside, **choices)
            check_routing(got, on_cpu(here), (T, E, K, dtype, choices))
            if T <= 300:
                arrays = {name: None if a is None else a.numpy() for name, a in beside.items()}
                wanted = reference.route(logits.double().numpy(), K, **arrays, **choices)
                check_routing(got, wanted, (T, E, K, dtype, choices))
            cases += 1
    return cases


def check_route_gradient() -> int:
    """Through weights and losses, on the GPU and on the CPU."""
    cases = 0
    for (T, E, K), score, normalize in itertools.product(
        [(1, 4, 1), (65, 7, 3), (200, 128, 1), (300, 256, 8), (40, 1000, 32)],
        ("softmax", "sigmoid"),
        ("none", "selected"),
    ):
        kept = torch.from_numpy(draw.random(T) < 0.8) if draw.random() < 0.5 else None
        choices = {"score": score, "normalize": normalize, "scale": 1.5, "capacity": max(T * K // E, 1)}
        dtype = (torch.float32, torch.bfloat16, torch.float16)[draw.integers(3)]
        logits, direction = random_logits(T, E).to(dtype), torch.randn(T, K)
        grads = []
        for device in ("cpu", "cuda"):
            leaf = logits.to(device).requires_grad_()
            routing = route(leaf, K, mask=None if kept is None else kept.to(device), **choices)
            loss = (routing.weight * direction.to(device)).sum() + 2 * routing.aux_loss + 0.1 * routing.z_loss
            grads.append(torch.autograd.grad(loss, leaf)[0])
        wrong = error(grads[1], grads[0])
        assert wrong < {torch.float32: 3e-5}.get(dtype, 5e-3), (wrong, T, E, K, dtype, kept is not None, choices)
        cases += 1
    return cases


def a_routing(T: int, E: int, K: int, kind: str) -> Routing:
    choices = {
        "dropless": {"align": 1}, "aligned": {"align": 16}, "dropped": {"capacity": max(T * K // (2 * E), 1)},
        "roomy": {"capacity": T}, "masked": {"mask": torch.from_numpy(draw.random(T) < 0.5).cuda()},
    }[kind]  # fmt: skip
    return route(random_logits(T, E).cuda(), K, normalize="selected", **choices)


def misaligned(rows: torch.Tensor) -> torch.Tensor:
    """The same numbers, one element behind where memory begins."""
    memory = rows.new_empty(rows.numel() + 1)
    return memory[1:].view(rows.shape).copy_(rows)


def check_rows() -> int:
    """permute, permute_fp8, unpermute and the gradients of all: every size, with layouts, dtypes, alignments drawn."""
    cases = 0
    for (T, E, K), H in itertools.product(
        [
            (0, 8, 2),
            (1, 4, 1),
            (65, 8, 1),
            (64, 16, 2),
            (65, 7, 3),
            (63, 64, 4),
            (300, 128, 8),
            (33, 64, 13),
            (20, 64, 32),
        ],
        (1, 7, 8, 120, 128, 1000, 4096),
    ):
        kind = str(draw.choice(["dropless", "aligned", "dropped", "roomy", "masked"]))
        routing = a_routing(T, E, K, kind)
        there = on_cpu(routing)
        for dtype in TOLERANCE:
            shift = bool(draw.random() < 0.3)
            place = misaligned if shift else torch.clone
            x = place(torch.randn(T, H).to("cuda", dtype)).requires_grad_()
            what = (T, E, K, H, kind, dtype, shift)
            rows = permute(x, routing)
            flat = rows.detach().reshape(-1, H)
            wanted = reference.permute(x.detach().float().cpu().numpy(), there)
            assert np.array_equal(flat.float().cpu().numpy(), wanted), ("permute", what)

            quantised, scales = permute_fp8(x.detach(), routing)
            numbers, wanted_scales = reference.to_e4m3(wanted)
            assert np.array_equal(scales.reshape(wanted_scales.shape).cpu().numpy(), wanted_scales), ("scales", what)
            assert np.array_equal(quantised.reshape(-1, H).float().cpu().numpy(), numbers), ("fp8", what)

            answers = place(torch.randn(rows.shape).to("cuda", dtype))
            answers.view(-1, H)[routing.source < 0] = torch.nan  # rows that nobody may read
            answers.requires_grad_()
            residual = place(torch.randn(T, H).to("cuda", dtype)) if H % 2 else None
            weight = routing.weight.clone().requires_grad_()
            y = unpermute(answers, replace(routing, weight=weight), residual)
            exact = replace(there, weight=there.weight.astype(np.float64))
            double = answers.detach().double().reshape(-1, H).cpu().numpy()
            start = None if residual is None else residual.double().cpu().numpy()
            wanted_y = reference.unpermute(double, exact, start)
            assert error(y, wanted_y) < TOLERANCE[dtype], ("unpermute", error(y, wanted_y), what)

            grad_y, grad_rows = (
                place(torch.randn(T, H).to("cuda", dtype)),
                place(torch.randn(rows.shape).to("cuda", dtype)),
            )
            got = torch.autograd.grad(y, (answers, weight), grad_y)
            check_gradients(got, grad_y, double, there, dtype, what)
            got_x = torch.autograd.grad(rows, x, grad_rows)[0]
            ones = replace(there, weight=np.ones(there.row.shape))
            wanted_x = reference.unpermute(grad_rows.double().reshape(-1, H).cpu().numpy(), ones)
            assert error(got_x, wanted_x) < TOLERANCE[dtype], ("permute backward", what)
            cases += 1
    return cases


def check_gradients(
    got: tuple, grad_y: torch.Tensor, rows: np.ndarray, routing: Routing, dtype: torch.dtype, what: object
) -> None:
    """Of unpermute: grad_rows[row[t, k]] = weight[t, k] * grad_y[t], grad_weight[t, k] = grad_y[t] . that row."""
    grad_y = grad_y.double().cpu().numpy()
    grad_rows, grad_weight = np.zeros_like(rows), np.zeros(routing.row.shape)
    for t, k in np.ndindex(routing.row.shape):
        n = routing.row[t, k]
        if n >= 0:
            grad_rows[n] = routing.weight[t, k] * grad_y[t]
            grad_weight[t, k] = grad_y[t] @ rows[n]
    assert error(got[0].reshape(grad_rows.shape), grad_rows) < TOLERANCE[dtype], ("gradient of rows", what)
    size = np.linalg.norm(grad_y, axis=1).max(initial=0) * np.sqrt(grad_y.shape[1])
    assert np.abs(got[1].cpu().numpy() - grad_weight).max(initial=0) <= 1e-5 * max(size, 1), (
        "gradient of weight",
        what,
    )


def layer(logits: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """An expert multiplies its rows by 1, 2, 3 or 4: by 1 for a token's best expert, by 4 for its fourth."""
    routing = route(logits, 4, normalize="selected")
    return (
        unpermute(permute(x, routing) * (routing.source % 4 + 1)[:, None], routing, x),
        routing.aux_loss,
        routing.z_loss,
    )


def check_layer() -> None:
    """Gradients through the whole layer, eager and compiled, against the same mathematics in float64."""
    for call in (layer, torch.compile(layer, fullgraph=True)):
        logits = torch.randn(500, 64, device="cuda", requires_grad=True)
        x = torch.randn(500, 256, device="cuda", requires_grad=True)
        direction = torch.randn(500, 256, device="cuda")
        y, aux_loss, z_loss = call(logits, x)
        got = torch.autograd.grad((y * direction).sum() + 3 * aux_loss + 0.1 * z_loss, (logits, x))

        logits64, x64 = (a.detach().double().requires_grad_() for a in (logits, x))
        p = logits64.softmax(1)
        best, expert = p.topk(4)
        factor = best / best.sum(1, keepdim=True) * torch.arange(1, 5, device="cuda")
        wanted_y = x64 + x64 * factor.sum(1, keepdim=True)
        share = torch.nn.functional.one_hot(expert, 64).sum(1).double().mean(0)
        wanted_aux = 64 / 4 * (p.mean(0) * share).sum()
        wanted_z = logits64.logsumexp(1).square().mean()
        loss = (wanted_y * direction).sum() + 3 * wanted_aux + 0.1 * wanted_z
        wanted = torch.autograd.grad(loss, (logits64, x64))
        for name, a, b in (("y", y, wanted_y), ("aux", aux_loss, wanted_aux), ("z", z_loss, wanted_z)):
            assert error(a, b) < 1e-5, (name, error(a, b), call)
        for name, a, b in zip(("logits", "x"), got, wanted, strict=True):
            assert error(a, b) < 2e-5, ("gradient of", name, error(a, b), call)


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
    x = torch.randn(300, 64, device="cuda")

    def gradient(use_reentrant: bool | None) -> torch.Tensor:
        torch.manual_seed(options.seed)
        y = leaf = x.clone().requires_grad_()
        for one in layers:
            run = lambda y, one=one: one(y)[0]  # noqa: E731
            y = run(y) if use_reentrant is None else checkpoint(run, y, use_reentrant=use_reentrant)
        y.square().sum().backward()
        return leaf.grad

    for use_reentrant in (False, True):
        wrong = error(gradient(use_reentrant), gradient(None))
        assert wrong < 1e-5, ("checkpointing", use_reentrant, wrong)


def check_fused() -> int:
    """route_permute in one launch is route and then permute."""
    cases = 0
    for (T, E, K), H, capacity in itertools.product(
        [(1, 8, 1), (64, 128, 1), (64, 128, 8), (500, 64, 2), (4096, 128, 8), (3000, 256, 1)], (7, 64, 4096), (None, 40)
    ):
        logits = random_logits(T, E).cuda()
        x = torch.randn(T, H, device="cuda").bfloat16()
        got, rows = route_permute(logits, x, K, capacity=capacity)
        wanted = route(logits, K, capacity=capacity)
        what = (T, E, K, H, capacity)
        check_routing(on_cpu(got), on_cpu(wanted), what)
        assert torch.equal(rows, permute(x, wanted)), what
        cases += 1
    return cases


def check_bad_logits() -> None:
    """A GPU does not wait to complain: `check` does."""
    for bad in (torch.nan, torch.inf):
        logits = torch.randn(1000, 64, device="cuda")
        logits[777, 3] = bad
        routing = route(logits, 2)
        permute(torch.randn(1000, 8, device="cuda"), routing)
        try:
            routing.check()
        except ValueError:
            continue
        raise AssertionError(f"{bad} in the logits went unseen")


def everything(device: str, logits: torch.Tensor, x: torch.Tensor, K: int, choices: dict) -> list[torch.Tensor]:
    """What each kernel answers: logits and x, and tensors among the choices, are on the CPU."""
    choices = {name: a.to(device) if isinstance(a, torch.Tensor) else a for name, a in choices.items()}
    logits, x = (a.to(device).requires_grad_() for a in (logits, x))
    routing = route(logits, K, **choices)
    rows = permute(x, routing)
    y = unpermute(rows, routing, x)
    eight_bits, scales = permute_fp8(x.detach(), routing)
    roots = y, routing.weight, routing.aux_loss, routing.z_loss
    grads = torch.autograd.grad(roots, (logits, x), [torch.ones_like(a) for a in roots])
    again, fused = route_permute(logits.detach(), x.detach(), K, **choices)
    fields = (getattr(r, name) for r in (routing, again) for name in INTEGERS + FLOATS)
    return [*fields, rows, fused, eight_bits.float(), scales, y, *grads]


def check_small() -> int:
    """Every kernel and every way of cutting its launch, as if the GPU were small: for compute-sanitizer."""
    torch.utils.deterministic.fill_uninitialized_memory = False
    generator, mask, bias = Generator(5, 6), torch.arange(600) % 5 > 0, torch.linspace(-1, 1, 64)
    sure = {"score": "sigmoid", "bias": bias, "num_groups": 8, "top_groups": 4, "normalize": "selected"}
    cuda._device = lambda number: (4, 90)
    cases = [
        (600, 128, 2, 40, {}), (600, 64, 1, 7, {"align": 4}), (600, 64, 8, 128, sure),
        (600, 64, 4, 128, {"mask": mask, "noise": Noise("gumbel"), "generator": generator}),
        (40, 64, 2, 8, {"capacity": 2, "drop": "probability"}), (300, 16, 2, 7, {"capacity": 20, "drop": "choice"}),
        (1200, 16, 3, 8, {"capacity": 200}),
        (300, 16, 2, 128, {"capacity": 20, "drop": "probability", "normalize": "selected"}),
        (600, 64, 2, 24, {"capacity": 3, "drop": "random", "mask": mask, "generator": generator}),
        (40, 128, 1, 128, {}), (50, 64, 8, 24, {"normalize": "selected"}),  # clusters, which racecheck cannot follow
    ]  # fmt: skip
    for n, (T, E, K, H, choices) in enumerate(cases):
        if options.case not in (None, n):
            continue
        cuda.ONE_LAUNCH = range(T + 1)
        cuda.MOST_CHOICES_BYTES = 0 if n in (7, 8) else 96 * 1024
        dtype = (torch.bfloat16, torch.float32, torch.float16)[n % 3]
        logits, x = random_logits(T, E), torch.randn(T, H).to(dtype)
        answers = zip(*(everything(device, logits, x, K, choices) for device in ("cuda", "cpu")), strict=True)
        for i, (got, wanted) in enumerate(answers):
            assert error(got, wanted) < max(TOLERANCE[dtype], 3e-5), (i, error(got, wanted), T, E, K, H, choices)
    return len(cases) if options.case is None else 1


ALL = ("route", "route_gradient", "rows", "fused", "layer", "graph", "draws", "bad_logits", "small")
for name in options.checks or ALL:
    cases = globals()[f"check_{name}"]()
    torch.cuda.synchronize()
    print(f"{name}: as defined" + (f", {cases} cases" if cases else ""), flush=True)
