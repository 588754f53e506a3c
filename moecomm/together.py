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
    mine, problem = None, ""
    try:
        result = call()
    except CommError:
        raise  # nothing can be told to the others
    except Exception as error:
        kind = next((kind for kind in KINDS if isinstance(error, kind)), ValueError)
        mine, problem = error, f"{kind.__name__} {error}"
    for rank, text in enumerate(gather(comm, problem)):
        if text:
            kind_name, _, words = text.partition(" ")
            where = "" if comm is None else comm.where(rank)
            kind = next(kind for kind in KINDS if kind.__name__ == kind_name)
            raise refused(kind(f"{name}: {words}{where}")) from mine
    return result


def gather(comm: Comm | None, text: str) -> list[str]:
    """The texts of all ranks. Collective."""
    if comm is None:
        return [text]
    mine = np.frombuffer(text.encode(errors="backslashreplace"), np.uint8)  # as paths that are not UTF-8
    lengths = comm.all_gather(np.array([len(mine)]))
    flat, ends = comm.all_gather(mine, lengths), np.cumsum(lengths)
    return [bytes(flat[end - length : end]).decode() for length, end in zip(lengths, ends, strict=True)]
