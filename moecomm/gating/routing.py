"""Routing: what a gate decides, and all that an exchange needs to know of it."""

from __future__ import annotations

from dataclasses import dataclass

from moecomm.arrays import Array


@dataclass(frozen=True, eq=False)
class Routing:
    """Which experts each token goes to, and with what weight.

    expert  [T, K] integers: global expert ids, -1: dropped
    weight  [T, K] floats: the factor of each expert's answer; that of a dropped assignment is ignored

    weight is of x's own kind, numpy or torch; expert may be either. An assignment is a pair (token t, choice k), with
    the flat index t * K + k.
    """

    expert: Array
    weight: Array
