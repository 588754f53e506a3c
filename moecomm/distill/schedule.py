"""How long a student listens to its teacher."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

Kind = Literal["none", "full", "staged", "linear"]


@dataclass(frozen=True)
class Schedule:
    """The weight alpha of the distillation loss at each step.

    kind   "full": the same at every step. "staged": 0 from step `stop` on, as the paper's. "linear": it falls along a
           line, to 0 at step `stop`. "none": 0 always
    alpha  at the first step
    stop   of "staged" and "linear"; steps count from 0

    Raises ValueError for another kind, an alpha below 0 or not finite, and a kind and a stop step that do not fit
    together.
    """

    kind: Kind = "full"
    alpha: float = 1.0
    stop: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"Schedule: kind is {self.kind!r}, expected one of {', '.join(get_args(Kind))}")
        # A stop that a kind does not read would be ignored in silence.
        if (self.kind in ("staged", "linear")) != (self.stop is not None):
            expected = "a step" if self.stop is None else "none"
            raise ValueError(f"Schedule: stop is {self.stop}, expected {expected} with {self.kind!r}")
        if self.stop is not None and self.stop < 1:
            raise ValueError(f"Schedule: stop is {self.stop}, expected >= 1")
        # Also false for NaN.
        if not 0 <= self.alpha < math.inf:
            raise ValueError(f"Schedule: alpha is {self.alpha}, expected >= 0 and finite")

    def at(self, step: int) -> float:
        """alpha of a step; where it is 0 nobody asks the teacher."""
        if self.kind == "none" or (self.stop is not None and step >= self.stop):
            return 0.0
        if self.kind == "linear" and self.stop is not None:
            return self.alpha * (1 - step / self.stop)
        return self.alpha
