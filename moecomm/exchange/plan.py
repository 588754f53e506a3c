"""Plan: what `dispatch` decided and `combine` needs to undo it."""

from __future__ import annotations

from dataclasses import dataclass

from moecomm.arrays import Array, Counts
from moecomm.exchange.adjoint import Thread
from moecomm.exchange.path import Path
from moecomm.exchange.table import RowTable


@dataclass(frozen=True, eq=False)
class Plan:
    """Made by `dispatch`, taken by `combine`; several may be in flight.

    rows_per_expert  [local experts] int64: the rows that dispatch returned for each expert of this rank, in their order
    """

    rows_per_expert: Counts
    path: Path
    """From the tokens of this rank to the experts of others: table, leg, table."""
    at_home: RowTable
    """The first step: from the tokens of this rank to the rows that it sends."""
    away: RowTable
    """The last step: from the rows that came to those that the experts see."""
    home_weight: Array | None
    """[T, K] applied where the tokens are, or None."""
    away_weight: Array | None
    """[rows that came, K] applied where the experts are, or None."""
    thread: Thread
    """What ties combine's backward pass to dispatch's (torch), or None."""
