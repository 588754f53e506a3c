"""Routing: what a gate decides, and all that an exchange needs to know of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from moecomm.arrays import Array, is_torch


@dataclass(frozen=True, eq=False)
class Routing:
    """Which experts each token goes to, and with what weight.

    `route` fills every field; an exchange needs the first two. An assignment is a pair (token t, choice k), with the
    flat index t * K + k. Of one that was dropped, expert, slot and row are -1 and the weight is 0. weight is of x's own
    kind, numpy or torch; expert may be either.
    """

    expert: Array
    """[T, K] integers: global expert ids, the best first; -1: dropped."""
    weight: Array
    """[T, K] floats: the factor of each expert's answer; that of a dropped assignment is ignored."""
    slot: Array = None
    """[T, K] int32: place within its expert, 0 .. count - 1."""
    row: Array = None
    """[T, K] int32: token -> row, offset[expert] + slot."""
    source: Array = None
    """[N] int32: row -> assignment, as a flat index; -1: an empty row."""
    count: Array = None
    """[E] int32: assignments that each expert keeps."""
    offset: Array = None
    """[E + 1] int32: the first row of each expert; the last one: rows in use, padding included."""
    load: Array = None
    """[E] int32: tokens that chose each expert, before drops."""
    aux_loss: Array = None
    """float32 scalar: 1 when balanced, for every K."""
    z_loss: Array = None
    """float32 scalar: the mean of lse ** 2."""
    lse: Array = None
    """[T] float32: log(sum(exp(logits))); 0 where masked."""
    status: Array = None
    """int32 scalar: not 0 if logits, bias or recorded experts were unusable. See `check`."""
    capacity: int | None = None
    """Rows of each expert, or None: as many as it needs."""

    def check(self) -> Routing:
        """Return self. Raises ValueError if a logit was NaN or +inf, a whole row -inf, or a bias not finite, or if
        recorded experts were none of the layer's or stood twice in a token.

        On the CPU `route` has done so, unless it was told to note it; on a GPU this waits for the kernel.
        """
        check_status(0 if self.status is None else int(self.status))
        return self

    def __repr__(self) -> str:
        # Shapes alone: numbers on a GPU would have to be waited for.
        return f"Routing(expert {list(np.shape(self.expert))}, capacity {self.capacity}, {_kind(self.weight)})"


STATUSES = 8
"""One more than the highest Routing.status: each problem has a bit."""
MISRECORDED = 4
"""The bit of recorded experts that cannot be."""


def check_status(status: int) -> None:
    """Raise ValueError for what the bits of Routing.status say."""
    if status:
        raise ValueError(f"route: {problem(status)}")


def problem(status: int) -> str:
    """What the bits of Routing.status say."""
    problems = {
        1: "logits has a NaN or +inf, or a row of -inf alone",
        2: "bias has a number that is not finite",
        MISRECORDED: "expert has ids of no expert, or of one expert twice in a token",
    }
    return "; ".join(text for bit, text in problems.items() if status & bit)


def _kind(weight: Array) -> str:
    """What the weights are and where, for people."""
    dtype = getattr(weight, "dtype", type(weight).__name__)
    device = f" on {weight.device}" if is_torch(weight) else ""
    return f"weight {dtype}{device}"


@dataclass(frozen=True)
class Generator:
    """Random numbers by counter (Philox4x32-10): the same seed and offset give the same ones, on every device.

    seed    0 .. 2**63 - 1
    offset  0 .. 2**63 - 1, or a one-element int64 tensor on the logits' device, which is read when the kernel runs: a
            CUDA graph that adds to it draws new numbers at each replay. Use another one at each call.
    """

    seed: int
    offset: Any = 0


@dataclass(frozen=True)
class Noise:
    """Random exploration: the selection sees noisy logits; weights and losses see the clean ones.

    gumbel  logit + scale * G, G = -log(-log(U(0, 1))); with scale 1 experts are drawn in proportion to their softmax
    jitter  logit * U(1 - scale, 1 + scale), scale <= 1
    """

    kind: Literal["gumbel", "jitter"]
    scale: float = 1.0
