"""Ctrl-C ends a benchmark at once, with one line: while it imports, while MPI starts, and inside of a call of MPI.

Imported by harness.py before all that takes long. Python's own handler would show a traceback of each rank, or run when
MPI returns, which it may never do.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SEGMENT = r"/dev/shm/(mpich_shm_|vader_segment|sm_segment)\S*$"
"""As MPICH and Open MPI call their files."""
INTERRUPTED = 128 + signal.SIGINT
"""The exit status after Ctrl-C."""


def end_at_interrupt() -> None:
    """From now on SIGINT ends the process. Of the ranks of an mpirun the first says so."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    # Python's C handler writes there at once, on whatever thread the signal comes to.
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    signal.signal(signal.SIGINT, lambda *_: None)
    first = all(os.environ.get(rank, "0") == "0" for rank in ("PMI_RANK", "OMPI_COMM_WORLD_RANK", "RANK"))

    def wait() -> None:
        while os.read(reading, 1) != bytes([signal.SIGINT]):
            pass
        for path in segments():
            path.unlink(missing_ok=True)
        if first:
            os.write(2, b"interrupted\n")
        os._exit(INTERRUPTED)

    threading.Thread(target=wait, daemon=True).start()


def segments() -> set[Path]:
    """Shared memory that the MPI library of this process has made for the job and removes in MPI_Finalize alone."""
    maps = Path("/proc/self/maps")
    lines = maps.read_text().splitlines() if maps.exists() else []
    return {Path(match[0]) for line in lines if (match := re.search(SEGMENT, line))}


@contextmanager
def at_once() -> Iterator[None]:
    """A block in which Python's threads cannot run, as while MPI starts: there SIGINT ends the process by itself."""
    handler = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


# A test that imports a benchmark keeps its own Ctrl-C.
if Path(getattr(sys.modules["__main__"], "__file__", None) or "").resolve().parent == Path(__file__).resolve().parent:
    end_at_interrupt()
