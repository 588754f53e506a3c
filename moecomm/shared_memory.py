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
"""The most that goes to another node in one message."""

LEAST_CHUNK_BYTES = 1 << 12

MOST_BYTES = 1 << 26
"""Of memory that a node shares; more nodes get smaller chunks, but not below LEAST_CHUNK_BYTES."""


def chunk_bytes(num_nodes: int) -> int:
    """Bytes of a chunk where a node has NUM_SLOTS for what it sends and receives."""
    fits = MOST_BYTES // (NUM_SLOTS * (2 * num_nodes - 1)) // 64 * 64
    return max(min(CHUNK_BYTES, fits), LEAST_CHUNK_BYTES)


def shared_memory(comm: Comm, num_bytes: int) -> NDArray[np.uint8] | None:
    """Zeroed memory [num_bytes] that all ranks of comm read and write, or None on all of them if they share none.

    Collective over comm. The memory has no name: it goes when the last rank drops it, however that rank ends. Linux
    only, for ranks of one machine and one PID namespace; page-aligned.
    """
    file, nonce = -1, 0
    if comm.rank == 0:
        nonce = secrets.randbits(62)
        with contextlib.suppress(OSError, AttributeError):  # no such memory here, or not as much as this
            file = os.memfd_create(_name(nonce))
            os.posix_fallocate(file, 0, num_bytes)
    try:
        process, file_there, nonce = comm.all_gather(np.array([[os.getpid(), file, nonce]], np.int64))[0].tolist()
        memory = _mapped(process, file_there, nonce, num_bytes)
        everywhere = comm.all_gather(np.array([memory is not None])).all()
    finally:
        if file >= 0:
            os.close(file)
    return memory if everywhere else None


def _name(nonce: int) -> str:
    return f"moecomm-{nonce:x}"


def _mapped(process: int, file: int, nonce: int, num_bytes: int) -> NDArray[np.uint8] | None:
    path = Path(f"/proc/{process}/fd/{file}")
    try:
        if not str(path.readlink()).startswith(f"/memfd:{_name(nonce)} "):
            return None  # another machine's, or another container's, process of that number
        with path.open("r+b") as opened:
            return np.frombuffer(
                mmap.mmap(opened.fileno(), num_bytes, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE), np.uint8
            )
    except (OSError, ValueError):
        return None
