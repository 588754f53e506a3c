"""torchrun: train, and kill rank 1 in the middle of a step, as a machine that fails would."""

from __future__ import annotations

import os
import sys

from moecomm.train.__main__ import main
from moecomm.train.loop import Trainer

whole_step = Trainer.step


def step(self: Trainer, number: int) -> float:
    if number == 3 and self.data is not None and self.data.rank == 1:
        os._exit(9)
    return whole_step(self, number)


Trainer.step = step  # type: ignore[method-assign]
status = main()
sys.exit(status)
