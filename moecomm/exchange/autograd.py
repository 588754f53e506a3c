"""The torch side of an exchange: each function's gradient is one of the others."""

from __future__ import annotations

from typing import Any

import torch

from moecomm.all_to_all import AllToAll
from moecomm.arrays import Counts
from moecomm.comm import Comm
from moecomm.exchange.copies import Copies
from moecomm.exchange.lanes import Share, sum_over_lanes


class CopyOut(torch.autograd.Function):
    """x [T, H] -> [N, H]. Backward: the gradients of all copies of a row, summed in order of choice."""

    @staticmethod
    def forward(ctx: Any, x: Any, copies: Copies) -> Any:
        """copies says which row each copy is of."""
        ctx.copies = copies
        return x.index_select(0, _index(copies.row, x))

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        """grad [N, H] -> [T, H]."""
        return sum_copies(grad, ctx.copies, None).to(grad.dtype), None


class SumBack(torch.autograd.Function):
    """rows [N, H], weight [T, K] -> [T, H]. Backward: each copy gets its row's gradient times its weight."""

    @staticmethod
    def forward(ctx: Any, rows: Any, weight: Any, copies: Copies, dtype: Any) -> Any:
        """weight may be None: 1."""
        ctx.copies = copies
        ctx.rows_dtype = rows.dtype
        ctx.save_for_backward(None if weight is None else rows, weight)  # rows: for the gradient of weight
        return sum_copies(rows, copies, weight).to(rows.dtype if dtype is None else dtype)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        """grad [T, H] -> [N, H] and [T, K]."""
        rows, weight = ctx.saved_tensors
        wide = sum_dtype(ctx.rows_dtype)
        grad_rows = grad.index_select(0, _index(ctx.copies.row, grad)).to(wide)
        if weight is None:
            return grad_rows.to(ctx.rows_dtype), None, None, None
        grad_weight = torch.zeros_like(weight)
        flat = torch.from_numpy(ctx.copies.row * ctx.copies.num_choices + ctx.copies.choice).to(grad.device)
        grad_weight.view(-1)[flat] = (grad_rows * rows.to(wide)).flatten(1).sum(1).to(weight.dtype)
        factor = weight.reshape(-1)[flat].to(wide)
        return (grad_rows * _as_column(factor, grad_rows)).to(ctx.rows_dtype), grad_weight, None, None


class Move(torch.autograd.Function):
    """rows [N, H] -> [M, H] through an all-to-all. Backward: the same all-to-all, the other way."""

    @staticmethod
    def forward(ctx: Any, rows: Any, all_to_all: AllToAll, send_counts: Counts) -> Any:
        """Collective."""
        moved, ctx.recv_counts = all_to_all.rows(rows, send_counts)
        ctx.all_to_all = all_to_all
        return moved

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        """grad [M, H] -> [N, H]. Collective."""
        return ctx.all_to_all.rows(grad.contiguous(), ctx.recv_counts)[0], None, None


class Replicated(torch.autograd.Function):
    """x, the same on all tensor ranks. Backward: the gradients summed over them."""

    @staticmethod
    def forward(ctx: Any, x: Any, tensor: Comm) -> Any:
        """Not collective."""
        ctx.tensor = tensor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        """Collective over tensor."""
        return ctx.tensor.all_reduce(grad.contiguous()), None


class ShareAnswers(torch.autograd.Function):
    """answers [T, H], of this lane -> their sum over the lanes. Backward: the whole gradient, on every lane."""

    @staticmethod
    def forward(ctx: Any, answers: Any, plan: Share, tensor: Comm) -> Any:
        """Collective over tensor."""
        ctx.plan, ctx.tensor = plan, tensor
        return sum_over_lanes(answers, plan, tensor)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        """Collective over tensor where the gradient comes in parts."""
        if ctx.plan.output == "sequence":
            grad = ctx.tensor.all_gather(grad.contiguous(), ctx.plan.part_sizes())
        return grad, None, None


def sum_copies(rows: Any, copies: Copies, weight: Any) -> Any:
    """`sum_back` without rounding and without a gradient."""
    total = rows.new_zeros((copies.num_rows, *rows.shape[1:]), dtype=sum_dtype(rows.dtype))
    for choice, these, of in copies.by_choice():
        target = _index(of, rows)
        part = rows.index_select(0, _index(these, rows)).to(total.dtype)
        if weight is not None:
            part = part * _as_column(weight[target, choice].to(total.dtype), part)
        total.index_add_(0, target, part)  # a choice meets each row once: nothing is added in an unknown order
    return total


def _index(index: Counts, like: Any) -> Any:
    return torch.from_numpy(index).to(like.device)


def sum_dtype(dtype: Any) -> Any:
    """float32, or float64 if dtype is that."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _as_column(weight: Any, rows: Any) -> Any:
    return weight.reshape(-1, *(1,) * (rows.ndim - 1))
