"""The torch side of an exchange: steps whose backward pass is their adjoint."""

from __future__ import annotations

from typing import Any

import torch
import torch.utils.checkpoint
from torch.autograd.function import once_differentiable

from moecomm.arrays import Counts, sum_dtype
from moecomm.exchange.adjoint import Step
from moecomm.exchange.copies import Copies
from moecomm.failures import Failing, collective, refused

# Activation checkpointing raises this to end a pass that it computes again, at the same operation on all ranks: no call
# has failed.
refused(torch.utils.checkpoint._StopRecomputationError)  # type: ignore[type-var]


class CopyOut(torch.autograd.Function):
    """x [T, H] -> [N, H]. Backward: the gradients of all copies of a row, summed in order of choice."""

    @staticmethod
    def forward(ctx: Any, x: Any, copies: Copies) -> Any:
        """copies says which row each copy is of."""
        ctx.copies = copies
        return x.index_select(0, _index(copies.row, x))

    @staticmethod
    @once_differentiable
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
        ctx.save_for_backward(rows if ctx.needs_input_grad[1] else None, weight)  # rows: for the gradient of weight
        return sum_copies(rows, copies, weight).to(rows.dtype if dtype is None else dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Any) -> Any:
        """grad [T, H] -> [N, H] and [T, K]."""
        rows, weight = ctx.saved_tensors
        grad_rows = grad.index_select(0, _index(ctx.copies.row, grad))
        if weight is None:
            return grad_rows.to(ctx.rows_dtype), None, None, None
        flat = _index(ctx.copies.row * ctx.copies.num_choices + ctx.copies.choice, grad)
        grad_weight = None
        wide = sum_dtype(weight if rows is None else rows)
        grad_rows = grad_rows.to(wide)
        if rows is not None:
            products = (grad_rows * rows.to(wide)).flatten(1).sum(1)
            grad_weight = products.new_zeros(weight.numel()).index_copy_(0, flat, products).to(weight.dtype)
            grad_weight = grad_weight.reshape(weight.shape)
        factor = weight.reshape(-1)[flat].to(wide)
        return (grad_rows * _as_column(factor, grad_rows)).to(ctx.rows_dtype), grad_weight, None, None


class Adjoint(torch.autograd.Function):
    """function(x). Backward: adjoint(gradient). Either both are collective or neither is.

    A collective must run on all ranks or on none, and in one order, whatever the graph of each rank looks like: a rank
    may have no experts, or an input that needs no gradient. So the steps of a dispatch and of its combine also take and
    return a `thread`, an empty tensor that needs a gradient. It ties them to each other and the last one to the result:
    a backward pass that begins at the result goes through all of them.
    """

    @staticmethod
    def forward(ctx: Any, x: Any, thread: Any, function: Step, adjoint: Step, comms: tuple[Failing, ...]) -> Any:
        """comms: what the ranks talk through before or after this step."""
        ctx.adjoint = adjoint
        ctx.comms = comms
        return function(x), None if thread is None else thread.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Any, thread: Any) -> Any:
        """Collective as adjoint is."""
        # A rank that fails here does not come to the collectives of the backward pass that the others wait in.
        with collective("backward pass", *ctx.comms):
            return ctx.adjoint(grad.contiguous()), thread, None, None, None


def new_thread(like: Any) -> Any:
    """The start of a `thread`, or None where torch records no gradients."""
    return torch.zeros(0, device=like.device, requires_grad=True) if torch.is_grad_enabled() else None


def sum_copies(rows: Any, copies: Copies, weight: Any) -> Any:
    """`sum_back` without rounding and without a gradient."""
    places = copies.places()
    if weight is None and places is not None:
        return rows.index_select(0, _index(places, rows))
    total = rows.new_zeros((copies.num_rows, *rows.shape[1:]), dtype=sum_dtype(rows))
    order, parts = copies.by_choice()
    of, order = _index(copies.row[order], rows), _index(order, rows)  # to a GPU at once, not choice by choice
    for choice, here in enumerate(parts):
        target = of[here]
        part = rows.index_select(0, order[here]).to(total.dtype)
        if weight is not None:
            part = part * _as_column(weight[target, choice].to(total.dtype), part)
        total.index_add_(0, target, part)  # a choice meets each row once: nothing is added in an unknown order
    return total


def _index(index: Counts, like: Any) -> Any:
    return torch.from_numpy(index).to(like.device)


def _as_column(weight: Any, rows: Any) -> Any:
    return weight.reshape(-1, *(1,) * (rows.ndim - 1))
