"""A rank is stopped in the middle of a call, for less than the limit or for more.

faults.py says what must follow.
"""

from __future__ import annotations

import faults
from case import Board, Case, Ended, Report, Verdict

from moecomm import Comm

TRANSPORTS = ("threads", "gloo", "mpich", "openmpi")


def faults_of(case: Case) -> tuple[str, ...]:
    """A thread cannot be stopped alone: it sleeps."""
    word = "sleep" if case.transport == "threads" else "stop"
    return f"short {word}", f"long {word}"


def play(case: Case, comm: Comm, report: Report, board: Board) -> None:
    faults.play_with(faults.Plan(case, faults_of(case)), case, comm, report, board)


def run(case: Case) -> tuple[Verdict, Ended]:
    return faults.run_with(faults.Plan(case, faults_of(case)), case)
