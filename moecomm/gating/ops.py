"""The gate as torch operators: on CPU and CUDA tensors, with gradients, under torch.compile and in CUDA graphs."""

# ruff: noqa: N806 - capitals are dimensions

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moecomm.gating import host

CHOICES = """int score, int num_groups, int top_groups, int best_in_group, float floor, float scale, int capacity,
    int drop, int noise, float noise_scale, int seed, int offset, int align, int threads, int unusable"""
"""As host.route takes them."""
ROUTE = f"Tensor logits, Tensor? bias, Tensor? mask, Tensor? step, int top_k, {CHOICES}"
FIELDS = "Tensor, " * 11 + "Tensor"
"""Of a Routing, in its order."""


def operator(schema: str) -> Any:
    """The function below as an operator that torch.compile knows, moecomm::<its name>."""

    def register(function: Any) -> Any:
        op = torch.library.custom_op(f"moecomm::{function.__name__}", function, mutates_args=(), schema=schema)
        op.kernel = function
        return op

    return register


def call(op: Any, *arguments: Any) -> Any:
    """op(*arguments), without the price of torch's dispatcher (about 30 us) where nobody asks for what it adds."""
    if torch.compiler.is_compiling() or (
        torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in arguments)
    ):
        return op(*arguments)
    return op.kernel(*arguments)


def _numpy(tensor: Any) -> Any:
    """Its memory; bfloat16 as uint16."""
    if tensor is None:
        return None
    tensor = tensor.detach()
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def _tensor(array: Any, like: Tensor) -> Tensor:
    tensor = torch.from_numpy(array)
    return tensor if tensor.dtype == like.dtype else tensor.view(like.dtype)


# ---- route ---------------------------------------------------------------------------------------------------------


@operator(f"({ROUTE}) -> ({FIELDS})")
def route(logits: Tensor, bias: Any, mask: Any, step: Any, top_k: int, *choices: Any) -> tuple[Tensor, ...]:
    """The fields of a Routing."""
    if logits.is_cuda:
        from moecomm.gating import cuda

        return cuda.route(logits, bias, mask, step, top_k, *choices[:-2])
    if step is not None:
        choices = (*choices[:11], choices[11] + int(step), *choices[12:])
    arrays = host.route(_numpy(logits), _numpy(bias), _numpy(mask), top_k, choices)
    return tuple(map(torch.from_numpy, arrays))


@route.register_fake
def _fake_route(logits: Tensor, bias: Any, mask: Any, step: Any, top_k: int, *choices: Any) -> tuple[Tensor, ...]:
    T, E = logits.shape
    capacity, align = choices[6], choices[12]

    def ints(*shape: Any) -> Tensor:
        return logits.new_empty(shape, dtype=torch.int32)

    def floats(*shape: Any) -> Tensor:
        return logits.new_empty(shape, dtype=torch.float32)

    source = ints(host.num_rows(T, E, top_k, capacity, align))
    tables = ints(T, top_k), floats(T, top_k), ints(T, top_k), ints(T, top_k), source
    return *tables, ints(E), ints(E + 1), ints(E), floats(), floats(), floats(T), ints()


@operator(
    """(Tensor grad_weight, Tensor grad_aux_loss, Tensor grad_z_loss, Tensor logits, Tensor expert, Tensor lse,
    Tensor load, Tensor? mask, int score, float floor, float scale, int threads) -> Tensor"""
)
def route_backward(
    grad_weight: Tensor, grad_aux_loss: Tensor, grad_z_loss: Tensor, logits: Tensor, expert: Tensor, lse: Tensor,
    load: Tensor, mask: Any, score: int, floor: float, scale: float, threads: int,
) -> Tensor:  # fmt: skip
    """grad_logits [T, E]."""
    grads, saved = (grad_weight.contiguous(), grad_aux_loss, grad_z_loss), (expert, lse, load, mask)
    if logits.is_cuda:
        from moecomm.gating import cuda

        return cuda.route_backward(*grads, logits, *saved, score, floor, scale)
    numbers = (_numpy(grads[0]), float(grad_aux_loss), float(grad_z_loss))
    grad = host.route_backward(numbers, _numpy(logits), tuple(map(_numpy, saved)), (score, floor, scale, threads))
    return _tensor(grad, logits)


@route_backward.register_fake
def _(grad_weight: Tensor, grad_aux_loss: Tensor, grad_z_loss: Tensor, logits: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(logits)


def _save_route(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, _, mask, _, _, score, _, _, _, floor, scale, *_, threads, _ = inputs
    expert, _, _, row, _, _, _, load, _, _, lse, *_ = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(logits, expert, lse, load, mask, row)
    ctx.choices = score, floor, scale, threads


def _route_gradient(ctx: Any, *grads: Any) -> tuple[Any, ...]:
    logits, expert, lse, load, mask, _ = ctx.saved_tensors
    grad = route_backward(grads[1], grads[8], grads[9], logits, expert, lse, load, mask, *ctx.choices)
    return grad, *(None,) * 19


route.register_autograd(_route_gradient, setup_context=_save_route)

# ---- rows ----------------------------------------------------------------------------------------------------------


@operator("(Tensor x, Tensor row, Tensor source, int threads) -> Tensor")
def permute(x: Tensor, row: Tensor, source: Tensor, threads: int) -> Tensor:
    """x [T, H] -> rows [N, H]."""
    if x.is_cuda:
        from moecomm.gating import cuda_rows

        return cuda_rows.permute(x, row, source)
    if not (x.numel() and len(source)):
        return x.new_zeros(len(source), x.shape[1])  # numpy's strides of nothing are none that view takes
    words = x.detach() if x.dtype in (torch.float32, torch.float64) else x.detach().view(torch.uint8)
    return torch.from_numpy(host.permute(words.numpy(), row.numpy(), source.numpy(), threads)).view(x.dtype)


@permute.register_fake
def _(x: Tensor, row: Tensor, source: Tensor, threads: int) -> Tensor:
    return x.new_empty((source.shape[0], x.shape[1]))


@operator("(Tensor grad_rows, Tensor row, int threads) -> Tensor")
def permute_backward(grad_rows: Tensor, row: Tensor, threads: int) -> Tensor:
    """grad_rows [N, H] -> grad_x [T, H]: the sum over each token's rows."""
    if grad_rows.is_cuda:
        from moecomm.gating import cuda_rows

        return cuda_rows.permute_backward(grad_rows.contiguous(), row)
    grad = host.unpermute(_numpy(grad_rows.contiguous()), row.numpy(), None, None, threads)
    return _tensor(grad, grad_rows)


@permute_backward.register_fake
def _(grad_rows: Tensor, row: Tensor, threads: int) -> Tensor:
    return grad_rows.new_empty((row.shape[0], grad_rows.shape[1]))


def _save_permute(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, row, _, ctx.threads = inputs
    ctx.save_for_backward(row)


def _permute_gradient(ctx: Any, grad_rows: Tensor) -> tuple[Any, ...]:
    return permute_backward(grad_rows, *ctx.saved_tensors, ctx.threads), None, None, None


permute.register_autograd(_permute_gradient, setup_context=_save_permute)


@operator("(Tensor x, Tensor row, Tensor source, int threads) -> (Tensor, Tensor)")
def permute_fp8(x: Tensor, row: Tensor, source: Tensor, threads: int) -> tuple[Tensor, Tensor]:
    """x [T, H] -> rows [N, H] float8_e4m3fn and scales [N, ceil(H / 128)]."""
    if x.is_cuda:
        from moecomm.gating import cuda_rows

        return cuda_rows.permute_fp8(x, row, source)
    rows, scales = host.permute_fp8(_numpy(x), row.numpy(), source.numpy(), threads)
    return torch.from_numpy(rows).view(torch.float8_e4m3fn), torch.from_numpy(scales)


@permute_fp8.register_fake
def _(x: Tensor, row: Tensor, source: Tensor, threads: int) -> tuple[Tensor, Tensor]:
    N, H = source.shape[0], x.shape[1]
    rows = x.new_empty((N, H), dtype=torch.float8_e4m3fn)
    return rows, x.new_empty((N, (H + 127) // 128), dtype=torch.float32)


@operator("(Tensor rows, Tensor row, Tensor weight, Tensor source, Tensor? residual, int threads) -> Tensor")
def unpermute(rows: Tensor, row: Tensor, weight: Tensor, source: Tensor, residual: Any, threads: int) -> Tensor:
    """rows [N, H] -> y [T, H]. source is for the backward pass."""
    if rows.is_cuda:
        from moecomm.gating import cuda_rows

        return cuda_rows.unpermute(rows, row, weight, residual)
    y = host.unpermute(_numpy(rows), row.numpy(), _numpy(weight.contiguous()), _numpy(residual), threads)
    return _tensor(y, rows)


@unpermute.register_fake
def _(rows: Tensor, row: Tensor, *rest: Any) -> Tensor:
    return rows.new_empty((row.shape[0], rows.shape[1]))


@operator("(Tensor grad_y, Tensor rows, Tensor row, Tensor weight, Tensor source, int threads) -> (Tensor, Tensor)")
def unpermute_backward(
    grad_y: Tensor, rows: Tensor, row: Tensor, weight: Tensor, source: Tensor, threads: int
) -> tuple[Tensor, Tensor]:
    """grad_rows [N, H], grad_weight [T, K]."""
    grad_y, weight = grad_y.contiguous(), weight.contiguous()
    if rows.is_cuda:
        from moecomm.gating import cuda_rows

        return cuda_rows.unpermute_backward(grad_y, rows, row, weight, source)
    arrays = map(_numpy, (grad_y, rows, row, weight, source))
    grads = host.unpermute_backward(*(*arrays, threads))
    return _tensor(grads[0], rows), torch.from_numpy(grads[1])


@unpermute_backward.register_fake
def _(grad_y: Tensor, rows: Tensor, row: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(rows), weight.new_empty(row.shape)


def _save_unpermute(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    rows, row, weight, source, residual, ctx.threads = inputs
    ctx.has_residual = residual is not None
    ctx.save_for_backward(rows, row, weight, source)


def _unpermute_gradient(ctx: Any, grad_y: Tensor) -> tuple[Any, ...]:
    grad_rows, grad_weight = unpermute_backward(grad_y, *ctx.saved_tensors, ctx.threads)
    return grad_rows, None, grad_weight, None, grad_y if ctx.has_residual else None, None


unpermute.register_autograd(_unpermute_gradient, setup_context=_save_unpermute)


# ---- both in one ---------------------------------------------------------------------------------------------------


@operator(f"(Tensor x, {ROUTE}) -> ({FIELDS}, Tensor)")
def route_permute(x: Tensor, logits: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """The fields of a Routing, and the rows [N, H] of x [T, H]. On CUDA one launch, where that is faster than two."""
    if x.is_cuda:
        from moecomm.gating import cuda

        if len(x) in cuda.ONE_LAUNCH:
            return cuda.route_permute(x, logits, *rest[:-2])
    fields = route.kernel(logits, *rest)
    return *fields, permute.kernel(x, fields[3], fields[4], rest[-2])


@route_permute.register_fake
def _(x: Tensor, *of_route: Any) -> tuple[Tensor, ...]:
    fields = _fake_route(*of_route)
    return *fields, x.new_empty((fields[4].shape[0], x.shape[1]))


def _save_both(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _save_route(ctx, inputs[1:], output[:-1])


def _gradient_of_both(ctx: Any, *grads: Any) -> tuple[Any, ...]:
    grad_x = permute_backward(grads[-1], ctx.saved_tensors[-1], ctx.choices[-1])
    return grad_x, *_route_gradient(ctx, *grads[:-1])


route_permute.register_autograd(_gradient_of_both, setup_context=_save_both)
