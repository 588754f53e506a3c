"""Plan: what `dispatch` decided and `combine` needs to undo it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from moecomm.all_to_all import Route
from moecomm.arrays import Array, Counts
from moecomm.exchange.copies import Copies


@dataclass(frozen=True, eq=False)
class Plan:
    """Made by `dispatch`, taken by `combine`; several may be in flight.

    rows_per_expert  [local experts] int64: the rows that dispatch returned for each expert of this rank, in their order
    """

    rows_per_expert: Counts
    at_home: Copies
    """From the tokens here to the rows sent."""
    away: Copies
    """From the rows that came to those that the experts see."""
    route: Route
    """How many rows went to and came from each rank."""
    home_weight: Array | None
    """[T, K] applied where the tokens are, or None."""
    away_weight: Array | None
    """[rows that came, K] applied where the experts are, or None."""
    thread: Any
    """What ties combine's backward pass to dispatch's (torch), or None."""
