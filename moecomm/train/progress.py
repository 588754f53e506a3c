"""How far a run is: tqdm's bar on a terminal, and plain lines in a file, a pipe or the log of a job."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any, Protocol

SECONDS_BETWEEN_LINES = 10.0
"""Of a progress that no terminal shows."""


class Progress(Protocol):
    """What a bar of tqdm and lines have in common."""

    def update(self, count: int = 1) -> object:
        """So many more are done."""

    def set_postfix(self, values: dict[str, Any]) -> object:
        """What else to show, by name."""

    def clear(self) -> object:
        """Make room for what is printed next."""

    def write(self, text: str) -> object:
        """A line of its own, on stdout."""

    def close(self) -> object:
        """Nothing follows."""


class ProgressLines:
    """A line on stderr at most every SECONDS_BETWEEN_LINES, never a carriage return.

    total, done  of `unit`: in all, and from the start
    clock        seconds that only grow
    """

    def __init__(self, total: int, unit: str, done: int = 0, clock: Callable[[], float] = time.monotonic) -> None:
        self.total = total
        self.unit = unit
        self.done = done
        self.values: dict[str, Any] = {}
        self._clock = clock
        self._start = self._last = clock()

    def update(self, count: int = 1) -> None:
        """Print a line if the last one is old enough."""
        self.done += count
        now = self._clock()
        if now - self._last >= SECONDS_BETWEEN_LINES:
            self._last = now
            values = "".join(f", {name} {value}" for name, value in self.values.items())
            text = f"{self.done} of {self.total} {self.unit}, {now - self._start:.0f} s{values}"
            print(text, file=sys.stderr, flush=True)

    def set_postfix(self, values: dict[str, Any]) -> None:
        """Values for the end of the next line."""
        self.values = values

    def clear(self) -> None:
        """A line needs no room."""

    def write(self, text: str) -> None:
        """Print the text."""
        print(text, flush=True)

    def close(self) -> None:
        """A last line would tell what the program's own output tells."""


def progress_of(total: int, unit: str, done: int = 0) -> Progress:
    """A bar where stderr is a terminal; else, or without tqdm, lines."""
    if not sys.stderr.isatty():
        return ProgressLines(total, unit, done)
    try:
        from tqdm import tqdm
    except ImportError:
        print("a progress bar needs tqdm: pip install 'moecomm[bench]' or 'moecomm[train]'", file=sys.stderr)
        return ProgressLines(total, unit, done)
    bar: Progress = tqdm(total=total, initial=done, unit=f" {unit}", leave=False, file=sys.stderr)
    return bar
