"""A case: one try of one kind of fault over one transport, all of it decided by its seed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

LIMIT = 2.5
"""Seconds that a collective may take in a case."""

LIMIT_ERROR = "waited"
"""What a CommError says when a limit is over."""


class Case(NamedTuple):
    """What is tried, and where. `limit` is no part of its name: a slow machine needs more."""

    kind: str
    transport: str
    seed: int
    limit: float = LIMIT

    def __str__(self) -> str:
        return f"{self.kind}/{self.transport}/{self.seed}"

    @classmethod
    def parse(cls, text: str) -> Case:
        kind, transport, seed = text.split("/")
        return cls(kind, transport, int(seed))

    def random(self, *stream: int) -> np.random.Generator:
        """The same numbers on every rank."""
        return np.random.default_rng([self.seed, *stream])


class Verdict(NamedTuple):
    """How a case ended. `problem` is empty where all is as promised."""

    problem: str = ""
    is_void: bool = False
    """The fault never struck, as when a signal came after the call."""


@dataclass
class Ended:
    """What is left of the ranks of a case."""

    events: list[list[dict[str, Any]]]
    """By rank: what it reported, in its order."""
    status: int
    """0: all processes ended well."""
    output: str
    is_hung: bool = False
    text: str = ""
    seconds: float = field(default=0.0, compare=False)

    def has_end(self, rank: int) -> bool:
        """Whether a rank came to its end and could say so."""
        return any(event["name"] == "end" for event in self.events[rank])

    def steps(self, rank: int) -> list[dict[str, Any]]:
        """What a rank reported of its calls."""
        return [event for event in self.events[rank] if event["name"] == "step"]

    def fact(self, rank: int, name: str) -> Any:
        """The last event of that name, or None."""
        return next((event for event in reversed(self.events[rank]) if event["name"] == name), None)

    def story(self) -> str:
        """All of it, for a reader."""
        lines = [f"rank {rank}: {json.dumps(event)}" for rank, every in enumerate(self.events) for event in every]
        return "\n".join([*lines, f"status {self.status}", self.output[-3000:]])


class Report:
    """One rank's events, written at once: a rank that is killed has said what it did before."""

    def __init__(self, folder: Path, rank: int) -> None:
        self.file = (folder / f"rank-{rank}.jsonl").open("a", buffering=1)

    def __call__(self, name: str, **facts: Any) -> None:
        self.file.write(json.dumps({"name": name, **facts}) + "\n")


def read_events(folder: Path, size: int) -> list[list[dict[str, Any]]]:
    events: list[list[dict[str, Any]]] = []
    for rank in range(size):
        path = folder / f"rank-{rank}.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        events.append([json.loads(line) for line in lines if line.endswith("}")])
    return events


class Board:
    """How far each rank is, told without any Comm: numbers in a file that all ranks map."""

    FINISHED, REFUSED, STOPPED, PROCESS, ENDED = range(5)
    """Calls with a right answer, calls that all ranks refuse, milliseconds to be stopped, process, whether it ended."""

    def __init__(self, folder: Path, size: int) -> None:
        path = folder / "board"
        if not path.exists():
            np.zeros((size, 5), np.int64).tofile(path)
        self.numbers = np.memmap(path, np.int64, "r+", shape=(size, 5))

    def everybody(self, column: int, value: int, besides: Sequence[int] = ()) -> bool:
        """Whether all ranks, besides those, have come to a value."""
        return all(self.numbers[rank, column] >= value for rank in range(len(self.numbers)) if rank not in besides)
