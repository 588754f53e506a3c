"""Gradients of DirectExchange: the backward pass of dispatch is a combine, that of combine is a dispatch.

The gradients of the weights travel with the rows, so a backward pass is one launch too.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.function import once_differentiable

import moecomm.exchange.autograd  # noqa: F401 - tells `collective` that the end of a recomputation is no failure
from moecomm.exchange.direct.plan import DirectPlan

if TYPE_CHECKING:
    from torch import Tensor

    from moecomm.exchange.direct.launch import Launcher


class Dispatch(torch.autograd.Function):
    """x [T, H], weight [T, K] -> rows, plan.weight [slots, K], plan. Backward: both gradients to the tokens' ranks.

    `thread` needs a gradient, so that all ranks go through the backward pass or none, whatever x needs.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, thread: Tensor | None, expert: Tensor, launcher: Launcher
    ) -> tuple[Tensor, Tensor, DirectPlan]:
        """Collective."""
        rows, plan = launcher.send(x, expert, weight, compact=False)
        # plan.weight becomes an output, which refers to ctx: without `detach` they would keep each other alive.
        ctx.plan = replace(plan, weight=plan.weight.detach())
        return rows, plan.weight, plan

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_rows: Tensor, grad_weight: Tensor, _: None) -> tuple[Tensor | None, ...]:
        """Collective."""
        grad_x, grad_weight = ctx.plan.launcher.give_back(
            grad_rows.contiguous(), ctx.plan, weighted=False, grad_weight=grad_weight.contiguous()
        )
        return grad_x, grad_weight, grad_x.new_zeros(0), None, None


class Combine(torch.autograd.Function):
    """rows [N, H], plan.weight -> y [T, H]. Backward: y's gradient to all rows, and its product with each answer."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, plan: DirectPlan) -> Tensor:
        """Collective."""
        ctx.plan = replace(plan, weight=weight.detach())
        ctx.save_for_backward(rows)
        y, _ = plan.launcher.give_back(rows, plan, weighted=True)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        """Collective."""
        (rows,) = ctx.saved_tensors
        grad_rows, grad_weight = ctx.plan.launcher.spread(grad_y.contiguous(), rows.contiguous(), ctx.plan)
        return grad_rows, grad_weight, None
