"""Gradients of DirectExchange: dispatch and combine are each other's, with the weights travelling along."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch.autograd.function import once_differentiable

import moecomm.exchange.autograd  # noqa: F401 - lets checkpointing end what it computes again


class Dispatch(torch.autograd.Function):
    """x [T, H], weight [T, K] -> rows, plan.weight [slots, K]. Backward: both gradients home, in one launch.

    `thread` needs a gradient, so that all ranks go through the backward pass or none, whatever x needs.
    """

    @staticmethod
    def forward(ctx: Any, x: Any, weight: Any, thread: Any, exchange: Any, expert: Any, plans: list[Any]) -> Any:
        """Collective. Appends the plan to plans."""
        rows, plan = exchange.send(x, expert, weight, False)
        ctx.exchange, ctx.plan = exchange, replace(plan, weight=plan.weight.detach())  # no cycle through the output
        plans.append(plan)
        return rows, plan.weight

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_rows: Any, grad_weight: Any) -> Any:
        """Collective."""
        grad_x, grad_weight = ctx.exchange.give_back(grad_rows.contiguous(), ctx.plan, None, grad_weight.contiguous())
        return grad_x, grad_weight, grad_x.new_zeros(0), None, None, None


class Combine(torch.autograd.Function):
    """rows [N, H], plan.weight -> y [T, H]. Backward: the gradient to every row, and its product with the answer."""

    @staticmethod
    def forward(ctx: Any, rows: Any, weight: Any, exchange: Any, plan: Any) -> Any:
        """Collective."""
        ctx.exchange, ctx.plan = exchange, replace(plan, weight=weight.detach())
        ctx.save_for_backward(rows)
        return exchange.give_back(rows, plan, weight)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Any) -> Any:
        """Collective."""
        (rows,) = ctx.saved_tensors
        grad_rows, grad_weight = ctx.exchange.spread(grad_y.contiguous(), rows.contiguous(), ctx.plan)
        return grad_rows, grad_weight, None, None
