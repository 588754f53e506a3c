"""Plan: what `dispatch` decided and `combine` needs to undo it."""

from __future__ import annotations

from dataclasses import dataclass

from moecomm.arrays import Array
from moecomm.exchange.adjoint import Thread
from moecomm.exchange.path import Path
from moecomm.exchange.table import RowTable


@dataclass(frozen=True, eq=False)
class Plan:
    """Made by `dispatch`, taken by `combine`; several may be in flight.

    rows_per_expert  [local experts] int64: the rows that dispatch returned for each expert of this rank, in their
                     order. numpy; where the rows are for a StaticExchange
    num_rows         rows that dispatch returned
    scales           [num_rows, ceil(H / 128)] float32 where these rows are float8: a number is its value times the
                     scale of its 128; None otherwise
    """

    rows_per_expert: Array
    num_rows: int
    path: Path
    """From the tokens of this rank to the experts of others."""
    at_home: RowTable
    """The first step: from the tokens of this rank to the rows that it sends."""
    away: RowTable | None
    """The last step, from the rows that came to those that the experts see, where rows are summed there."""
    weight: Array
    """[T, K], or [rows that came, K] where rows are summed at the experts' ranks."""
    thread: Thread
    """What ties combine's backward pass to dispatch's (torch), or None."""
    scales: Array | None = None
