"""What one rank alone can fail at, done on all: they go on together or raise together."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import numpy as np

from moecomm.comm import Comm
from moecomm.errors import CommError
from moecomm.failures import refused

T = TypeVar("T")
KINDS = (OSError, RuntimeError, ValueError)


def together(comm: Comm | None, name: str, call: Callable[[], T]) -> T:
    """call() on every rank. What fails on one is raised on all, as an OSError, RuntimeError or ValueError. Collective.

    comm  None: this is the only rank
    name  of what is done, for the error
    """
    cause: Exception | None = None
    report = ""
    try:
        result = call()
    except CommError:
        raise  # the Comm is of no use: nothing can be told to the other ranks
    except Exception as error:
        kind = next((kind for kind in KINDS if isinstance(error, kind)), ValueError)
        cause = error
        report = f"{kind.__name__} {error}"
    for rank, problem in enumerate(gather(comm, report)):
        if problem:
            # The lowest rank that has failed: all ranks raise the same error.
            kind_name, _, message = problem.partition(" ")
            kind = next(kind for kind in KINDS if kind.__name__ == kind_name)
            where = "" if comm is None else comm.where(rank)
            raise refused(kind(f"{name}: {message}{where}")) from cause
    return result


def gather(comm: Comm | None, text: str) -> list[str]:
    """The texts of all ranks, of any length. Collective."""
    if comm is None:
        return [text]
    # A path need not be UTF-8; it is shown with escapes.
    encoded = np.frombuffer(text.encode(errors="backslashreplace"), np.uint8)
    lengths = comm.all_gather(np.array([len(encoded)]))
    letters = comm.all_gather(encoded, lengths)
    ends = np.cumsum(lengths)
    return [bytes(letters[end - length : end]).decode() for length, end in zip(lengths, ends, strict=True)]
