"""A linear step on rows and its adjoint, which is its backward pass under torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from moecomm.all_to_all import AllToAll, Route
from moecomm.arrays import Array, is_torch
from moecomm.failures import Failing

Step: TypeAlias = Callable[[Array], Array]


def linear(x: Array, thread: Any, function: Step, adjoint: Step, *comms: Failing) -> tuple[Array, Any]:
    """(function(x), thread), differentiable where torch records gradients: the backward pass is adjoint(gradient).

    thread  as autograd.Adjoint says; None: none
    comms   made unusable where the backward pass fails: the ranks talk through them before or after it
    """
    if not is_torch(x):
        return function(x), thread
    from moecomm.exchange.autograd import Adjoint

    return Adjoint.apply(x, thread, function, adjoint, comms)


def move(all_to_all: AllToAll, rows: Array, thread: Any, route: Route) -> tuple[Array, Any]:
    """Rows along the route. Collective, and so is its backward pass: back along it."""
    return linear(
        rows,
        thread,
        lambda rows: all_to_all.send(rows, route),
        lambda grad: all_to_all.send_back(grad, route),
        all_to_all.comm,
    )


def move_back(all_to_all: AllToAll, rows: Array, thread: Any, route: Route) -> tuple[Array, Any]:
    """Rows back along the route. Collective, and so is its backward pass: along it."""
    return linear(
        rows,
        thread,
        lambda rows: all_to_all.send_back(rows, route),
        lambda grad: all_to_all.send(grad, route),
        all_to_all.comm,
    )


def new_thread(x: Array) -> Any:
    """Decided by torch's grad mode alone, which is the same on all ranks, as x.requires_grad may not be."""
    if not is_torch(x):
        return None
    from moecomm.exchange import autograd

    return autograd.new_thread(x)
