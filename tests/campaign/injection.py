"""Faults that strike inside of a call: at its n-th line or its n-th allocation in moecomm's own code, or at a moment.

A line is where Python delivers a signal, so `raise` at a line is what a handler that raises does; a rank that is killed
or stopped at a line is in the middle of the call, wherever that is.
"""

from __future__ import annotations

import ctypes
import linecache
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

import moecomm

PACKAGE = str(Path(moecomm.__file__).parent)
# What makes an array in moecomm's code.
NUMPY = ["array", "ascontiguousarray", "asarray", "empty", "empty_like", "zeros", "zeros_like", "ones", "ones_like"]
NUMPY += ["full", "full_like", "arange", "concatenate", "stack", "repeat", "where", "flatnonzero", "nonzero"]
NUMPY += ["bincount", "argsort", "cumsum", "unique", "searchsorted", "isin", "append"]
TORCH = ["empty", "empty_like", "zeros", "zeros_like", "full", "full_like", "cat", "arange", "as_tensor", "tensor"]
TENSOR = ["new_empty", "new_zeros", "new_full", "clone", "contiguous", "index_select", "to"]


class Interrupted(KeyboardInterrupt):
    """What a signal's handler raises here."""


class Places:
    """Counts the places where a fault could strike, and strikes at the n-th."""

    def __init__(self, strike: Callable[[], None] | None = None, at: int = -1) -> None:
        self.count = 0
        self.has_struck = False
        self.where = ""
        self._strike = strike
        self._at = at
        self._thread = threading.get_ident()

    def _here(self, frame: Any) -> None:
        self.count += 1
        if self.count - 1 == self._at and self._strike is not None and not self.has_struck:
            self.has_struck = True
            self.where = f"{Path(frame.f_code.co_filename).relative_to(PACKAGE)}:{frame.f_lineno}"
            self._strike()

    @contextmanager
    def lines(self) -> Iterator[Places]:
        """Every line of moecomm's Python code on this thread."""

        def each_frame(frame: Any, event: str, argument: Any) -> Any:
            return each_line if frame.f_code.co_filename.startswith(PACKAGE) else None

        def each_line(frame: Any, event: str, argument: Any) -> Any:
            if event == "line" and not _is_with(frame):
                self._here(frame)
            return each_line

        sys.settrace(each_frame)
        try:
            yield self
        finally:
            sys.settrace(None)

    @contextmanager
    def allocations(self) -> Iterator[Places]:
        """Every call of a function of numpy or torch that makes an array, from moecomm's code on this thread."""
        patched: list[tuple[Any, str, Any]] = []

        def patch(owner: Any, name: str) -> None:
            original = getattr(owner, name)

            def counted(*arguments: Any, **options: Any) -> Any:
                frame = sys._getframe(1)
                if threading.get_ident() == self._thread and frame.f_code.co_filename.startswith(PACKAGE):
                    self._here(frame)
                return original(*arguments, **options)

            patched.append((owner, name, original))
            setattr(owner, name, counted)

        for name in NUMPY:
            patch(np, name)
        torch = sys.modules.get("torch")
        if torch is not None:
            for name in TORCH:
                patch(torch, name)
            for name in TENSOR:
                patch(torch.Tensor, name)
        try:
            yield self
        finally:
            for owner, name, original in reversed(patched):
                setattr(owner, name, original)


def _is_with(frame: Any) -> bool:
    """The line comes again when its block is left; what is raised there keeps a lock for ever: Python's flaw."""
    return linecache.getline(frame.f_code.co_filename, frame.f_lineno).lstrip().startswith("with ")


@contextmanager
def alarm(seconds: float) -> Iterator[None]:
    """Raise Interrupted on this thread when so many seconds have passed, if the block is not left by then."""
    if threading.current_thread() is threading.main_thread():

        def handler(number: int, frame: Any) -> None:
            raise Interrupted("SIGALRM")

        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        return
    # Another thread than the main one gets no signals: this is what Python has for it.
    done, thread = threading.Event(), ctypes.c_ulong(threading.get_ident())

    def raise_there() -> None:
        if not done.wait(seconds):
            ctypes.pythonapi.PyThreadState_SetAsyncExc(thread, ctypes.py_object(Interrupted))

    timer = threading.Thread(target=raise_there, daemon=True)
    timer.start()
    try:
        yield
    finally:
        done.set()
        timer.join()
        time.sleep(0)
