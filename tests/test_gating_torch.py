"""The gate on torch tensors: the same answers as on numpy arrays, gradients, torch.compile."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from moecomm import Routing, route  # noqa: E402
from moecomm.gating import Generator, Noise, ops, permute, permute_fp8, reference, route_permute, unpermute  # noqa: E402
from moecomm.gating.choices import Choices, Inputs  # noqa: E402

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
CHOICES: list[dict[str, Any]] = [
    {"score": score, "normalize": normalize, "scale": 1.5, **more}
    for score, normalize, more in itertools.product(
        ("softmax", "sigmoid"), ("none", "selected"), ({}, {"capacity": 3}, {"capacity": 4, "drop": "probability"})
    )
]


def tensors(seed: int, *shapes: tuple[int, ...], dtype: Any = torch.float32) -> list[Any]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_as_on_numpy(dtype: Any) -> None:
    logits, bias = *tensors(0, (70, 16), dtype=dtype), *tensors(1, (16,))
    mask = torch.arange(70) % 7 > 0
    options: dict[str, Any] = {"score": "sigmoid", "noise": Noise("gumbel"), "normalize": "selected", "capacity": 9}
    wide = logits.float().numpy()
    step = Generator(5, torch.tensor([12]))
    got = route(logits, 3, bias=bias, mask=mask, generator=step, **options)
    wanted = route(wide, 3, bias=bias.numpy(), mask=mask.numpy(), generator=Generator(5, 12), **options)
    for name, value in vars(wanted).items():
        assert name == "capacity" or torch.equal(getattr(got, name), torch.from_numpy(value)), name
    assert got.check() is got


@pytest.mark.parametrize("dtype", (*DTYPES, torch.float64, torch.int16, torch.bool), ids=str)
@pytest.mark.parametrize("width", [1, 7, 64, 300])
def test_rows_of_every_dtype(dtype: Any, width: int) -> None:
    routing = route(*tensors(0, (30, 8)), 2, capacity=6)
    x = tensors(1, (30, width))[0].mul(5).to(dtype)
    rows = permute(x, routing)
    assert rows.shape == (8, 6, width)
    token = routing.source.long() // 2
    wanted = torch.where((routing.source >= 0)[:, None], x[token], torch.zeros((), dtype=dtype))
    assert torch.equal(rows.reshape(-1, width), wanted)
    if dtype not in DTYPES:
        return
    residual = tensors(2, (30, width), dtype=dtype)[0]
    wanted = residual.float()
    for k in range(2):  # in order of choice
        picked = rows.reshape(-1, width)[routing.row[:, k].clamp(min=0).long()].float()
        wanted = wanted + routing.weight[:, k, None] * picked
    assert torch.equal(unpermute(rows, routing, residual), wanted.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fp8(dtype: Any) -> None:
    routing = route(*tensors(0, (30, 8)), 2)
    x = tensors(1, (30, 300), dtype=dtype)[0]
    rows, scales = permute_fp8(x, routing)
    values, wanted_scales = reference.to_e4m3(x.float().numpy())
    token = routing.source.long() // 2
    assert rows.dtype == torch.float8_e4m3fn
    assert torch.equal(rows.float(), torch.from_numpy(values)[token])
    assert torch.equal(scales, torch.from_numpy(wanted_scales)[token])


# ---- gradients -----------------------------------------------------------------------------------------------------


class Against(torch.autograd.Function):
    """The definition's values in float64, with the operator's gradients: gradcheck compares the two."""

    @staticmethod
    def forward(ctx: Any, definition: Callable, operator: Callable, *inputs: Any) -> Any:
        ctx.operator = operator
        ctx.save_for_backward(*inputs)
        return tuple(torch.from_numpy(np.asarray(value)) for value in definition(*(i.numpy() for i in inputs)))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        inputs = [saved.float().requires_grad_() for saved in ctx.saved_tensors]
        with torch.enable_grad():
            outputs = ctx.operator(*inputs)
        narrow = torch.autograd.grad(outputs, inputs, [grad.float() for grad in grads])
        return None, None, *(grad.double() for grad in narrow)


def gradcheck(definition: Callable, operator: Callable, *inputs: Any) -> None:
    wide = [value.double().requires_grad_() for value in inputs]
    torch.autograd.gradcheck(lambda *i: Against.apply(definition, operator, *i), wide, eps=1e-5, atol=2e-5, rtol=2e-4)


@pytest.mark.parametrize("choices", CHOICES, ids=str)
@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_route_gradient(choices: dict[str, Any], top_k: int) -> None:
    logits = tensors(top_k, (21, 7))[0] * 2
    mask = torch.arange(21) % 5 > 0
    given = route(logits, top_k, mask=mask, **choices)
    kept = {name: choices[name] for name in ("score", "normalize", "scale")}

    def definition(x: Any) -> Any:
        return reference.values(x, given.expert.numpy(), given.load.numpy(), mask.numpy(), **kept)[:3]

    def operator(x: Any) -> Any:
        routing = route(x, top_k, mask=mask, **choices)
        return routing.weight, routing.aux_loss, routing.z_loss

    gradcheck(definition, operator, logits)


def test_gradient_of_large_and_of_impossible_logits() -> None:
    """Where exp(x - lse) in float32 would have three digits left; -inf passes nothing on."""
    logits = torch.tensor([[4096.0, 4097.0, 4095.0, -torch.inf]], requires_grad=True)
    route(logits, 2).weight[0, 0].backward()
    p = torch.softmax(logits.detach().double(), 1)[0]
    wanted = p[1] * (torch.tensor([0.0, 1, 0, 0]) - p)
    torch.testing.assert_close(logits.grad[0].double(), wanted, rtol=1e-6, atol=1e-9)


def test_gradient_of_a_sigmoid_near_one() -> None:
    """s * (1 - s), where 1 - s in float32 would have three digits left."""
    logits = torch.tensor([[9.0, 8.0, -9.0, -torch.inf]], requires_grad=True)
    route(logits, 1, score="sigmoid").weight.sum().backward()
    wide = logits.detach().double()[0]
    wanted = torch.tensor([1.0, 0, 0, 0]) * torch.sigmoid(wide) * torch.sigmoid(-wide)
    torch.testing.assert_close(logits.grad[0].double(), wanted, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_gradient_has_the_dtype_of_the_logits(dtype: Any) -> None:
    logits = tensors(1, (40, 8), dtype=dtype)[0]
    grads = []
    for given in (logits.clone().requires_grad_(), logits.float().requires_grad_()):
        routing = route(given, 2, normalize="selected")
        (routing.weight.square().sum() + routing.aux_loss).backward()
        grads.append(given.grad)
    assert grads[0].dtype == dtype
    assert torch.equal(grads[0], grads[1].to(dtype))


@pytest.mark.parametrize("options", [{}, {"capacity": 4}, {"align": 4}], ids=str)
@pytest.mark.parametrize("width", [1, 6, 17])
def test_rows_gradient(options: dict[str, Any], width: int) -> None:
    given = route(*tensors(0, (9, 4)), 2, **options)
    tables = reference_tables(given)
    x, weight, residual = tensors(1, (9, width), (9, 2), (9, width))
    rows = tensors(2, (len(given.source), width))[0]

    def with_weight(routing: Routing, value: Any) -> Routing:
        return Routing(**{**vars(routing), "weight": value})

    gradcheck(lambda a: (reference.permute(a, tables),), lambda a: flat(permute(a, given)), x)
    gradcheck(
        lambda a, w, r: (reference.unpermute(a, with_weight(tables, w.astype(np.float64)), r),),
        lambda a, w, r: (unpermute(a, with_weight(given, w), r),),
        rows,
        weight,
        residual,
    )


def reference_tables(routing: Routing) -> Routing:
    """The same on numpy arrays."""
    return Routing(**{k: v.numpy() if isinstance(v, torch.Tensor) else v for k, v in vars(routing).items()})


def flat(rows: Any) -> tuple[Any]:
    return (rows.reshape(-1, rows.shape[-1]),)


def test_threads_change_no_gradient() -> None:
    """Enough rows for several threads to start."""
    grads = []
    for threads in (1, 3):
        logits, x = (t.requires_grad_() for t in tensors(6, (20001, 64), (20001, 192)))
        routing, rows = route_permute(logits, x, 2, normalize="selected", threads=threads)
        y = unpermute(rows.square(), routing, x, threads=threads)
        grads.append(torch.autograd.grad(y.square().sum() + routing.aux_loss, (logits, x)))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


# ---- torch.compile -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"capacity": 3, "score": "sigmoid", "normalize": "selected"}], ids=str)
def test_route_and_permute_in_one(options: dict[str, Any]) -> None:
    grads = []
    for fused in (False, True):
        logits, x = (t.requires_grad_() for t in tensors(0, (30, 8), (30, 12)))
        if fused:
            routing, rows = route_permute(logits, x, 2, **options)
        else:
            routing = route(logits, 2, **options)
            rows = permute(x, routing)
        loss = (rows.square().sum() + routing.weight.square().sum() + routing.aux_loss) * routing.z_loss
        grads.append((rows, *torch.autograd.grad(loss, (logits, x))))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    array_routing, array_rows = route_permute(logits.detach().numpy(), x.detach().numpy(), 2, **options)
    assert np.array_equal(array_rows, rows.detach().numpy())
    assert np.array_equal(array_routing.row, routing.row.numpy())
    with pytest.raises(ValueError, match=r"route_permute: x has shape \(29, 12\), expected \(30, H\)"):
        route_permute(logits, x[1:], 2)


def layer(logits: Any, x: Any) -> tuple[Any, Any, Any]:
    routing = route(logits, 2, normalize="selected", capacity=8, drop="probability")
    y = unpermute(permute(x, routing) * 2, routing, x)
    return y, routing.aux_loss + 0.1 * routing.z_loss, routing.expert


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_compiled_in_one_graph(backend: str, requires_grad: bool) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    for num_tokens in (33, 18):
        logits, x = (t.requires_grad_(requires_grad) for t in tensors(num_tokens, (num_tokens, 8), (num_tokens, 40)))
        results = []
        for function in (layer, compiled):
            y, loss, expert = function(logits, x)
            grads = torch.autograd.grad(y.square().sum() + loss, (logits, x)) if requires_grad else ()
            results.append((y, loss, expert, *grads))
        for got, wanted in zip(*results, strict=True):
            torch.testing.assert_close(got, wanted)


def test_operators_keep_torchs_rules() -> None:
    """Schema, fake kernel and autograd of each operator, as torch itself checks them.

    Its fourth check adds up all outputs, which integers among them do not survive; the compiled layer stands for it.
    """
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    logits, x = (t.requires_grad_() for t in tensors(0, (12, 8), (12, 20)))
    routing = route(logits.detach(), 2, capacity=4)
    table, source = routing.row, routing.source
    rows = permute(x.detach(), routing).reshape(-1, 20).requires_grad_()
    of_route = (*Inputs(logits), *Choices(top_k=2, capacity=4))
    for op, arguments in (
        (ops.route, of_route),
        (ops.route_permute, (x, *of_route)),
        (ops.permute, (x, table, source, 1)),
        (ops.permute_fp8, (x.detach(), table, source, 1)),
        (ops.unpermute, (rows, table, routing.weight.requires_grad_(), source, x, 1)),
    ):
        torch.library.opcheck(op, arguments, test_utils=checks)


def test_unusable_logits_raise() -> None:
    with pytest.raises(ValueError, match="NaN"):
        route(torch.full((4, 4), torch.nan), 1)
    noted = route(torch.full((4, 4), torch.nan), 1, unusable="note")
    assert noted.status.dtype == torch.int32 and (noted.expert == -1).all()
    bad = Routing(None, None, status=torch.tensor(3, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"NaN .*; bias"):
        bad.check()


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"bias": np.zeros(8, np.float32)}, TypeError, "bias is a ndarray, expected a Tensor"),
        ({"mask": torch.ones(4)}, ValueError, r"mask is float32 \(4,\), expected bool \(4,\)"),
        ({"drop": "random", "generator": Generator(1, torch.tensor([1.0]))}, ValueError, "expected one int64 on cpu"),
    ],
)
def test_bad_arguments(given: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        route(torch.zeros(4, 8), 2, **given)
