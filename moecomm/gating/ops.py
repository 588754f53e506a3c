"""The gate as torch operators: on CPU and CUDA tensors, with gradients, under torch.compile and in CUDA graphs."""

# ruff: noqa: N806 - capitals are dimensions

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from moecomm.gating import host
from moecomm.gating.choices import Choices, Fields, Gradients, Inputs, Saved, new_fields

# ---- operators whose arguments are records -------------------------------------------------------------------------

RECORDS: dict[str, Any] = {"Inputs": Inputs, "Choices": Choices, "Gradients": Gradients, "Saved": Saved}
TYPES = {
    "Array": "Tensor",
    "Array | None": "Tensor?",
    "Tensor": "Tensor",
    "Tensor | None": "Tensor?",
    "int": "int",
    "int | None": "int?",
    "float": "float",
    "str": "str",
}
"""What torch calls the types of parameters and of records' fields."""
FIELDS = ", ".join(["Tensor"] * len(Fields._fields))


def operator(returns: str) -> Callable[[Any], Any]:
    """The function below as an operator that torch.compile knows, moecomm::<its name>.

    Its schema follows from the annotations. An operator has no records among its arguments: their fields stand there,
    one by one. `gather` makes the function's arguments of them; `kernel` is the function itself.
    """

    def register(function: Any) -> Any:
        kinds = {name: kind for name, kind in function.__annotations__.items() if name != "return"}
        schema = ", ".join(_parameters(kinds))

        def gather(fields: Iterable[Any]) -> list[Any]:
            remaining = iter(fields)
            return [_argument(kind, remaining) for kind in kinds.values()]

        def of_fields(*fields: Any) -> Any:
            return function(*gather(fields))

        name = f"moecomm::{function.__name__}"
        op: Any = torch.library.custom_op(name, of_fields, mutates_args=(), schema=f"({schema}) -> ({returns})")
        op.gather = gather
        op.kernel = function
        return op

    return register


def _parameters(kinds: dict[str, str]) -> Iterator[str]:
    """The parameters of a schema, for a function's own with their annotations."""
    for name, kind in kinds.items():
        record = RECORDS.get(kind)
        if record is None:
            yield f"{TYPES[kind]} {name}"
        else:
            # NamedTuple wraps annotations that are strings.
            for field, reference in record.__annotations__.items():
                yield f"{TYPES[reference.__forward_arg__]} {field}"


def _argument(kind: str, fields: Iterator[Any]) -> Any:
    """The next argument, a record if its annotation says so."""
    record = RECORDS.get(kind)
    if record is None:
        return next(fields)
    return record(*islice(fields, len(record._fields)))


def fake(op: Any) -> Callable[[Any], Any]:
    """Registers the function below: the shapes and dtypes of op's results, for torch.compile."""

    def register(function: Any) -> Any:
        op.register_fake(lambda *fields: function(*op.gather(fields)))
        return function

    return register


def call(op: Any, *arguments: Any) -> Any:
    """op's function of these arguments, through torch's dispatcher only where a gradient or a compiler needs it.

    The dispatcher costs about 30 us, as much as a small launch.
    """
    fields: list[Any] = []
    for argument in arguments:
        # The records are the tuples among the arguments. Appended one by one: the compiler of torch 2.11 knows no sum
        # of a list and a named tuple.
        record = argument if isinstance(argument, tuple) else (argument,)
        for field in record:
            fields.append(field)
    if torch.compiler.is_compiling():
        return op(*fields)
    if torch.is_grad_enabled() and any(isinstance(field, Tensor) and field.requires_grad for field in fields):
        return op(*fields)
    return op.kernel(*arguments)


def _numpy(tensor: Tensor | None) -> Any:
    """The tensor's memory as numpy sees it. numpy has no bfloat16: its bits go as uint16."""
    if tensor is None:
        return None
    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:
        tensor = tensor.view(torch.uint16)
    return tensor.numpy()


def _tensor(array: Any, like: Tensor) -> Tensor:
    tensor = torch.from_numpy(array)
    # uint16 are the bits of bfloat16.
    return tensor if tensor.dtype == like.dtype else tensor.view(like.dtype)


# ---- route ---------------------------------------------------------------------------------------------------------


@operator(returns=FIELDS)
def route(inputs: Inputs, choices: Choices) -> Fields:
    """The fields of a Routing."""
    if inputs.logits.is_cuda:
        from moecomm.gating import cuda

        return cuda.route(inputs, choices)
    # The C++ kernels take numbers alone: on a CPU nothing is waited for when one is read from a tensor.
    if inputs.step is not None:
        choices = choices._replace(offset=choices.offset + int(inputs.step))
    arrays = host.route(Inputs._make(map(_numpy, inputs)), choices)
    return Fields._make(map(torch.from_numpy, arrays))


@fake(route)
def _fake_route(inputs: Inputs, choices: Choices) -> Fields:
    T, E = inputs.logits.shape

    def ints(*shape: int) -> Tensor:
        return inputs.logits.new_empty(shape, dtype=torch.int32)

    def floats(*shape: int) -> Tensor:
        return inputs.logits.new_empty(shape, dtype=torch.float32)

    return new_fields(ints, floats, T, E, choices)


@operator(returns="Tensor")
def route_backward(grads: Gradients, saved: Saved, choices: Choices) -> Tensor:
    """grad_logits [T, E]."""
    # A sum's gradient is one number in a view of all places: the kernels read plain memory.
    grads = grads._replace(grad_weight=grads.grad_weight.contiguous())
    if saved.logits.is_cuda:
        from moecomm.gating import cuda

        return cuda.route_backward(grads, saved, choices)
    numbers = Gradients(_numpy(grads.grad_weight), float(grads.grad_aux_loss), float(grads.grad_z_loss))
    grad_logits = host.route_backward(numbers, Saved._make(map(_numpy, saved)), choices)
    return _tensor(grad_logits, saved.logits)


@fake(route_backward)
def _(grads: Gradients, saved: Saved, choices: Choices) -> Tensor:
    return torch.empty_like(saved.logits)


def _save_route(ctx: Any, inputs: Inputs, choices: Choices, fields: Fields) -> None:
    # Nothing that has a gradient follows from lse: without the mark autograd would make zeros for it.
    ctx.mark_non_differentiable(fields.lse)
    ctx.choices = choices
    ctx.save_for_backward(inputs.logits, fields.expert, fields.lse, fields.load, inputs.mask, inputs.live, fields.row)


def _grad_logits(ctx: Any, grads: Fields) -> tuple[Tensor | None, ...]:
    """The gradient in the logits, and None for each other field of Inputs and Choices."""
    *saved, _ = ctx.saved_tensors
    of_results = Gradients(grads.weight, grads.aux_loss, grads.z_loss)
    # Always the operator: a compiler traces this function with tensors that hold no numbers.
    grad_logits = route_backward(*of_results, *saved, *ctx.choices)
    without = len(Inputs._fields) - 1 + len(Choices._fields)
    return grad_logits, *[None] * without


def _save_for_route(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    of_route, choices = route.gather(inputs)
    _save_route(ctx, of_route, choices, Fields._make(output))


def _route_gradient(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    return _grad_logits(ctx, Fields._make(grads))


route.register_autograd(_route_gradient, setup_context=_save_for_route)

# ---- rows ----------------------------------------------------------------------------------------------------------


@operator(returns="Tensor")
def permute(x: Tensor, row: Tensor, source: Tensor, threads: int) -> Tensor:
    """x [T, H] -> rows [N, H]."""
    if x.is_cuda:
        from moecomm.gating import cuda_rows

        return cuda_rows.permute(x, row, source)
    if x.numel() == 0 or len(source) == 0:
        # numpy gives empty arrays strides that Tensor.view refuses.
        return x.new_zeros(len(source), x.shape[1])
    words = x.detach()
    if x.dtype not in (torch.float32, torch.float64):
        # Rows are only moved: as bytes they need no dtype that numpy knows.
        words = words.view(torch.uint8)
    rows = host.permute(words.numpy(), row.numpy(), source.numpy(), threads)
    return torch.from_numpy(rows).view(x.dtype)


@permute.register_fake
def _(x: Tensor, row: Tensor, source: Tensor, threads: int) -> Tensor:
    return x.new_empty((source.shape[0], x.shape[1]))


@operator(returns="Tensor")
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
    _, row, _, threads = inputs
    ctx.threads = threads
    ctx.save_for_backward(row)


def _permute_gradient(ctx: Any, grad_rows: Tensor) -> tuple[Tensor | None, ...]:
    (row,) = ctx.saved_tensors
    grad_x = permute_backward(grad_rows, row, ctx.threads)
    return grad_x, None, None, None


permute.register_autograd(_permute_gradient, setup_context=_save_permute)


@operator(returns="Tensor, Tensor")
def permute_fp8(x: Tensor, row: Tensor, source: Tensor, threads: int) -> tuple[Tensor, Tensor]:
    """x [T, H] -> rows [N, H] float8_e4m3fn and scales [N, ceil(H / 128)]."""
    if x.is_cuda:
        from moecomm.gating import cuda_rows

        return cuda_rows.permute_fp8(x, row, source)
    rows, scales = host.permute_fp8(_numpy(x), row.numpy(), source.numpy(), threads)
    return torch.from_numpy(rows).view(torch.float8_e4m3fn), torch.from_numpy(scales)


@permute_fp8.register_fake
def _(x: Tensor, row: Tensor, source: Tensor, threads: int) -> tuple[Tensor, Tensor]:
    N = source.shape[0]
    H = x.shape[1]
    rows = x.new_empty((N, H), dtype=torch.float8_e4m3fn)
    scales = x.new_empty((N, (H + 127) // 128), dtype=torch.float32)
    return rows, scales


@operator(returns="Tensor")
def unpermute(
    rows: Tensor, row: Tensor, weight: Tensor, source: Tensor, residual: Tensor | None, threads: int
) -> Tensor:
    """rows [N, H] -> y [T, H]. source is for the backward pass."""
    if rows.is_cuda:
        from moecomm.gating import cuda_rows

        return cuda_rows.unpermute(rows, row, weight, residual)
    weight = weight.contiguous()
    y = host.unpermute(_numpy(rows), row.numpy(), _numpy(weight), _numpy(residual), threads)
    return _tensor(y, rows)


@unpermute.register_fake
def _(rows: Tensor, row: Tensor, *_: Any) -> Tensor:
    return rows.new_empty((row.shape[0], rows.shape[1]))


@operator(returns="Tensor, Tensor")
def unpermute_backward(
    grad_y: Tensor, rows: Tensor, row: Tensor, weight: Tensor, source: Tensor, threads: int
) -> tuple[Tensor, Tensor]:
    """grad_rows [N, H], grad_weight [T, K]."""
    # As in route_backward.
    grad_y = grad_y.contiguous()
    weight = weight.contiguous()
    if rows.is_cuda:
        from moecomm.gating import cuda_rows

        return cuda_rows.unpermute_backward(grad_y, rows, row, weight, source)
    grad_rows, grad_weight = host.unpermute_backward(
        _numpy(grad_y), _numpy(rows), row.numpy(), _numpy(weight), source.numpy(), threads
    )
    return _tensor(grad_rows, rows), torch.from_numpy(grad_weight)


@unpermute_backward.register_fake
def _(grad_y: Tensor, rows: Tensor, row: Tensor, weight: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(rows), weight.new_empty(row.shape)


def _save_unpermute(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    rows, row, weight, source, residual, threads = inputs
    ctx.threads = threads
    ctx.has_residual = residual is not None
    ctx.save_for_backward(rows, row, weight, source)


def _unpermute_gradient(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    rows, row, weight, source = ctx.saved_tensors
    grad_rows, grad_weight = unpermute_backward(grad_y, rows, row, weight, source, ctx.threads)
    # y is the residual plus a sum: the residual's gradient is y's.
    grad_residual = grad_y if ctx.has_residual else None
    return grad_rows, None, grad_weight, None, grad_residual, None


unpermute.register_autograd(_unpermute_gradient, setup_context=_save_unpermute)


# ---- both in one ---------------------------------------------------------------------------------------------------


@operator(returns=f"{FIELDS}, Tensor")
def route_permute(x: Tensor, inputs: Inputs, choices: Choices) -> tuple[Tensor, ...]:
    """The fields of a Routing, and the rows [N, H] of x [T, H]. On CUDA one launch, where that is faster than two."""
    if x.is_cuda:
        from moecomm.gating import cuda

        if len(x) in cuda.ONE_LAUNCH:
            return cuda.route_permute(x, inputs, choices)
    fields = route.kernel(inputs, choices)
    rows = permute.kernel(x, fields.row, fields.source, choices.threads)
    return *fields, rows


@fake(route_permute)
def _(x: Tensor, inputs: Inputs, choices: Choices) -> tuple[Tensor, ...]:
    fields = _fake_route(inputs, choices)
    rows = x.new_empty((fields.source.shape[0], x.shape[1]))
    return *fields, rows


def _save_for_both(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, of_route, choices = route_permute.gather(inputs)
    *fields, _ = output
    _save_route(ctx, of_route, choices, Fields._make(fields))


def _gradient_of_both(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    *of_fields, grad_rows = grads
    *_, row = ctx.saved_tensors
    grad_x = permute_backward(grad_rows, row, ctx.choices.threads)
    return grad_x, *_grad_logits(ctx, Fields._make(of_fields))


route_permute.register_autograd(_gradient_of_both, setup_context=_save_for_both)
