"""The torch side of an exchange: functions whose backward pass is their adjoint."""

from __future__ import annotations

from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor
from torch.autograd.function import once_differentiable

from moecomm.exchange.adjoint import Linear, Thread
from moecomm.exchange.table import RowTable
from moecomm.failures import Failing, collective, refused
from moecomm.gating.row_tensors import spread_rows
from moecomm.gating.rows import sum_rows

# Activation checkpointing raises this to end a pass that it computes again, at the same operation on all ranks: no call
# has failed.
refused(torch.utils.checkpoint._StopRecomputationError)  # type: ignore[type-var]


class Adjoint(torch.autograd.Function):
    """function(x). Backward: adjoint(gradient). Either both are collective or neither is.

    A collective must run on all ranks or on none, and in one order, whatever the graph of each rank looks like: a rank
    may have no experts, or an input that needs no gradient. So the steps of a dispatch and of its combine also take and
    return a `thread`, an empty tensor that needs a gradient. It ties them to each other and the last one to the result:
    a backward pass that begins at the result goes through all of them.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, thread: Thread, function: Linear, adjoint: Linear, comms: tuple[Failing, ...]
    ) -> Any:
        """comms: what the ranks talk through before or after this step."""
        ctx.adjoint = adjoint
        ctx.comms = comms
        return function(x), None if thread is None else thread.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, thread: Thread) -> Any:
        """Collective as adjoint is."""
        # A rank that fails here does not come to the collectives of the backward pass that the others wait in.
        with collective("backward pass", *ctx.comms):
            return ctx.adjoint(grad.contiguous()), thread, None, None, None


class WeightedSum(torch.autograd.Function):
    """rows [N, ...], weight [T, S] -> [T, ...]. Backward: each copy gets the gradient of its row times its weight."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, table: RowTable, dtype: torch.dtype, comm: Failing) -> Tensor:
        """dtype: of the result."""
        ctx.table = table
        ctx.comm = comm
        rows = rows.contiguous()
        ctx.save_for_backward(rows, weight)
        return sum_rows(rows, table.row, table.source, weight, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        """grad [T, ...] -> those of rows and weight."""
        rows, weight = ctx.saved_tensors
        with collective("backward pass", ctx.comm):
            return *spread_rows(grad, rows, ctx.table.row, ctx.table.source, weight), None, None, None


def new_thread(like: Tensor) -> Thread:
    """The start of a `thread`, or None where torch records no gradients."""
    return torch.zeros(0, device=like.device, requires_grad=True) if torch.is_grad_enabled() else None
