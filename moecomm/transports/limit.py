"""Waiting for a started collective, but not for ever."""

from __future__ import annotations

import time
from collections.abc import Callable

SPINS = 200
LONGEST_PAUSE = 1e-3


def wait(done: Callable[[], bool], limit: float) -> bool:
    """Call `done` until it is true or `limit` seconds have passed, and return its last answer.

    The first calls only yield the processor, as a message between two ranks of a node takes some 10 us; then the pauses
    grow.
    """
    deadline = time.monotonic() + limit
    pause = 0.0
    spins = 0
    while not done():
        if time.monotonic() >= deadline:
            return False
        spins += 1
        if spins > SPINS:
            pause = min(pause + 1e-5, LONGEST_PAUSE)
        time.sleep(pause)
    return True


def check_limit(limit: float | None) -> float | None:
    if limit is not None and not limit > 0:
        raise ValueError(f"limit is {limit!r}, expected seconds > 0, or None to wait without a limit")
    return limit
