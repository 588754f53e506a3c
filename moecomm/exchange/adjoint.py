"""Functions of rows and their adjoints, which are their backward passes under torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

from moecomm.arrays import Array, is_torch
from moecomm.exchange.table import RowTable
from moecomm.failures import Failing
from moecomm.gating.rows import sum_rows

if TYPE_CHECKING:
    from torch import Tensor

Linear: TypeAlias = Callable[[Array], Array]
Thread: TypeAlias = "Tensor | None"
"""What ties the backward passes of a dispatch and of its combine to each other, see autograd.Adjoint. None: nothing."""


def linear(x: Array, thread: Thread, function: Linear, adjoint: Linear, *comms: Failing) -> tuple[Array, Thread]:
    """(function(x), thread), differentiable where torch records gradients: the backward pass is adjoint(gradient).

    comms  made unusable where the backward pass fails: the ranks talk through them before or after it
    """
    if not is_torch(x):
        return function(x), thread
    from moecomm.exchange.autograd import Adjoint

    return Adjoint.apply(x, thread, function, adjoint, comms)


def weighted_sum(rows: Array, weight: Array, table: RowTable, dtype: Any, comm: Failing) -> Array:
    """rows [N, ...], weight [T, S] -> [T, ...] of that dtype: each row's sum of its copies times their weights.

    Differentiable in rows and weight. comm: as for `linear`
    """
    if not is_torch(rows):
        return sum_rows(rows, table.row, table.source, weight, dtype)
    from moecomm.exchange.autograd import WeightedSum

    return WeightedSum.apply(rows, weight, table, dtype, comm)


def new_thread(x: Array) -> Thread:
    """Decided by torch's grad mode alone, which is the same on all ranks, as x.requires_grad may not be."""
    if not is_torch(x):
        return None
    from moecomm.exchange import autograd

    return autograd.new_thread(x)
