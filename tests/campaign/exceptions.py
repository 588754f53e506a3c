"""An exception in the middle of a call on one rank: at a line, at an allocation, from a handler of a signal.

faults.py says what must follow.
"""

from __future__ import annotations

import faults
from case import Board, Case, Ended, Report, Verdict

from moecomm import Comm

TRANSPORTS = ("threads", "gloo", "mpich", "openmpi")
FAULTS = ("allocation", "interrupt", "memory", "alarm")


def play(case: Case, comm: Comm, report: Report, board: Board) -> None:
    faults.play_with(faults.Plan(case, FAULTS), case, comm, report, board)


def run(case: Case) -> tuple[Verdict, Ended]:
    return faults.run_with(faults.Plan(case, FAULTS), case)
