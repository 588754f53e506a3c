"""Waiting for a started collective until a limit."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

SPINS = 200
"""Calls of `done` before the pauses begin."""

LONGEST_PAUSE = 1e-3
"""Seconds."""

LONGEST_LIMIT = 1e9
"""Seconds, 30 years: the clocks of Python, MPI and torch can all add them to the time of day."""


def wait(done: Callable[[], bool], limit: float) -> bool:
    """Call `done` until it is true or `limit` seconds have passed, and return its last answer.

    The first calls only yield the processor, because a message between two ranks of a node takes some 10 us; then the
    pauses grow.
    """
    deadline = time.monotonic() + limit
    pause = 0.0
    spins = 0
    while not done():
        if time.monotonic() >= deadline:
            return False
        spins += 1
        # sleep(0) yields the processor; later ones leave it to the ranks that share it.
        if spins > SPINS:
            pause = min(pause + 1e-5, LONGEST_PAUSE)
        time.sleep(pause)
    return True


def check_limit(function: str, limit: float | None) -> float | None:
    """`limit` as a Python number. Raises TypeError or ValueError if it is no time to wait for.

    function  what the error begins with
    limit     seconds, > 0 and at most LONGEST_LIMIT; None: without a limit
    """
    if limit is None:
        return None
    expected = f"expected seconds > 0, at most {LONGEST_LIMIT:g}, or None to wait without a limit"
    is_number = isinstance(limit, int | float | np.integer | np.floating) and not isinstance(limit, bool)
    if not is_number:
        raise TypeError(f"{function}: limit is {limit!r}, {expected}")
    # Written so that nan is refused as well.
    if not 0 < limit <= LONGEST_LIMIT:
        raise ValueError(f"{function}: limit is {limit!r}, {expected}")
    # numpy's numbers become Python's own, which every library's timeout takes.
    return int(limit) if isinstance(limit, int | np.integer) else float(limit)
