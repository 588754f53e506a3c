"""Memory that the ranks of a node share."""

from __future__ import annotations

import contextlib
import mmap
import os
import secrets
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moecomm.comm import Comm

NUM_SLOTS = 4
"""Chunks for another node that are under way at a time."""

CHUNK_BYTES = 1 << 21
"""The largest message to another node."""

LEAST_CHUNK_BYTES = 1 << 12

MOST_BYTES = 1 << 26
"""Memory that the ranks of a node share at most, unless so many nodes would get chunks below LEAST_CHUNK_BYTES."""


def chunk_bytes(num_nodes: int) -> int:
    """Bytes of a chunk, where each slot holds one to and one from each other node, and one inside the node."""
    fits = MOST_BYTES // (NUM_SLOTS * (2 * num_nodes - 1)) // 64 * 64
    return max(min(CHUNK_BYTES, fits), LEAST_CHUNK_BYTES)


def shared_memory(comm: Comm, num_bytes: int) -> NDArray[np.uint8] | None:
    """Zeroed memory [num_bytes] that all ranks of comm read and write, or None on all of them if they share none.

    Collective over comm. The memory has no name in a file system: it is released with the last rank that maps it,
    however that rank ends. Linux only, for ranks of one machine and one PID namespace; page-aligned.
    """
    file = -1
    nonce = 0
    if comm.rank == 0:
        nonce = secrets.randbits(62)
        # Suppressed: not Linux (AttributeError), or less memory than this. `file` then stays -1, or has no pages.
        with contextlib.suppress(OSError, AttributeError):
            file = os.memfd_create(_name(nonce))
            # Pages are reserved now: a page that is missing later would end the process by SIGBUS.
            os.posix_fallocate(file, 0, num_bytes)
    try:
        process, remote_file, nonce = comm.all_gather(np.array([[os.getpid(), file, nonce]], np.int64))[0].tolist()
        memory = _mapped(process, remote_file, nonce, num_bytes)
        on_all_ranks = comm.all_gather(np.array([memory is not None])).all()
    finally:
        # The mappings keep the memory.
        if file >= 0:
            os.close(file)
    return memory if on_all_ranks else None


def _name(nonce: int) -> str:
    return f"moecomm-{nonce:x}"


def _mapped(process: int, file: int, nonce: int, num_bytes: int) -> NDArray[np.uint8] | None:
    """The memory behind a file descriptor of another process, or None where it is not to be had."""
    path = Path(f"/proc/{process}/fd/{file}")
    flags = mmap.MAP_SHARED | mmap.MAP_POPULATE
    try:
        # On another machine or in another container that process number belongs to somebody else.
        if not str(path.readlink()).startswith(f"/memfd:{_name(nonce)} "):
            return None
        with path.open("r+b") as opened:
            return np.frombuffer(mmap.mmap(opened.fileno(), num_bytes, flags=flags), np.uint8)
    except (OSError, ValueError):
        return None
