"""One rank meets a fault in the middle of a call: an exception, a full memory, a signal, a stop, its end.

An exception is raised by the rank that met it. Either nothing was lost, and everything goes on right when the rank
calls again; or its Comm is of no use (`comm.failure`), the others end with CommError within the limit, and so does
every later call, on all ranks. A rank that is stopped for a while is waited for within the limit. No rank gets wrong
rows.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import Any

from calls import UNITS, Step, World, num_steps, random_size
from case import Board, Case, Ended, Report, Verdict
from differing import CRASH
from injection import Interrupted, Places, alarm
from launch import launch

from moecomm import Comm
from moecomm.transports.wrappers import Checked

TURNS, COUNTED, STRUCK = 5, 1, 2
"""A unit is played in each turn; in one the places are counted, in the next the fault strikes."""
SHORT_STOP = 0.3
TOLD = "which gave up with it"
"""What Checked says on the ranks that did not meet the fault."""
GONE = "this Comm cannot be used"
"""What a CommError says of a Comm that has failed before."""
DIFFER = "the ranks differ"
"""What it says of calls that are not the same."""
RAISED = {"memory": MemoryError, "allocation": MemoryError, "interrupt": Interrupted, "alarm": Interrupted}


class Plan:
    """What all ranks know of a case. Subclasses say which faults."""

    def __init__(self, case: Case, faults: tuple[str, ...]) -> None:
        random = case.random(0)
        # The seed counts up, so that each fault meets each unit in turn, and each step of it, at places of every part.
        names = list(UNITS)
        self.unit = names[case.seed % len(names)]
        self.fault = faults[case.seed // len(names) % len(faults)]
        self.use_torch = case.transport in ("threads", "gloo") and bool(random.integers(2))
        self.is_checked = bool(random.integers(4) == 0)
        self.size = random_size(random, case.transport, self.unit)
        self.step = int(random.integers(num_steps(self.unit, self.use_torch)))
        self.victim = int(random.integers(self.size))
        self.place = float(random.random())
        self.late = random.random(self.size) < 0.5
        """Ranks that come to the call a little later than the others."""

    def __str__(self) -> str:
        checked = "Checked, " if self.is_checked else ""
        array = "torch" if self.use_torch else "numpy"
        return f"{self.size} ranks, {checked}{array}, {self.unit} step {self.step}, rank {self.victim}: {self.fault}"


# ---- on each rank ----------------------------------------------------------------------------------------------------


def play_with(plan: Plan, case: Case, comm: Comm, report: Report, board: Board) -> None:
    world = World(Checked(comm) if plan.is_checked else comm, case, plan.use_torch)
    world.prepare(plan.unit)
    player = _Player(plan, case, world, report, board)
    for turn in range(TURNS):
        unit = UNITS[plan.unit](world, turn)
        result, number = None, 0
        while True:
            try:
                step = unit.send(result)
            except StopIteration:
                break
            result, got = player.call(step, turn, number)
            is_last = number == num_steps(plan.unit, plan.use_torch) - 1 and plan.unit != "split"
            if got == "refused" or (got == "lost" and is_last):
                break  # refused on all ranks: the rest of the unit has lost what it builds on
            if got == "lost":
                return
            if got != "right":
                player.try_later_calls()
                return
            number += 1


class _Player:
    def __init__(self, plan: Plan, case: Case, world: World, report: Report, board: Board) -> None:
        self.plan = plan
        self.case = case
        self.world = world
        self.report = report
        self.board = board
        self.is_victim = world.rank == plan.victim
        self.done = 0
        self.num_places = 0
        self.seconds = 0.0

    def call(self, step: Step, turn: int, number: int) -> tuple[Any, str]:
        """One step: its result and what is to be said of it."""
        is_chosen = number == self.plan.step
        result, got = None, ""
        if is_chosen and turn == STRUCK and self.is_victim:
            result, got = self._struck(step)
        elif is_chosen and turn == COUNTED and self.is_victim:
            result, got = self._counted(step)
        else:
            if is_chosen and turn == STRUCK and self.plan.late[self.world.rank]:
                time.sleep(0.1)
            result, got = _tried(step)
        if self.plan.is_checked and TOLD in got and turn == STRUCK:
            got = "refused"
        self.report("step", turn=turn, step=step.name, got=got, failed=bool(self._failures()))
        if got == "right":
            self.done += 1
            self.board.numbers[self.world.rank, Board.FINISHED] = self.done
        if got == "refused":
            self.board.numbers[self.world.rank, Board.REFUSED] = 1
        return result, got

    def _counted(self, step: Step) -> tuple[Any, str]:
        places = Places()
        began = time.monotonic()
        with places.allocations() if self.plan.fault == "allocation" else places.lines():
            result, got = _tried(step)
        self.num_places = places.count
        self.seconds = time.monotonic() - began
        return result, got

    def _struck(self, step: Step) -> tuple[Any, str]:
        """The step with the fault in it. What is raised is met here, as a program would meet it."""
        places = Places(self._strike, int(self.plan.place * self.num_places))
        watched = places.allocations if self.plan.fault == "allocation" else places.lines
        if self.plan.fault == "alarm":
            seconds = max(1e-4, self.plan.place * (self.seconds / 2 + 0.1))
            watched = lambda: alarm(seconds)  # noqa: E731
        result: Any = None
        got = ""
        try:
            with watched():
                result, got = step.run()
        except BaseException as error:
            got = got or f"{type(error).__name__}: {error}"
            self.report("met", kind=type(error).__name__, where=places.where, failures=self._failures(), got=got)
            if got.startswith("CommError") or got == "right":
                return result, got
            return self._after(step, got)
        self.report("met" if places.has_struck else "missed", kind="", where=places.where, failures=[], got=got)
        return result, got

    def _after(self, step: Step, got: str) -> tuple[Any, str]:
        """An exception was met. Where no Comm failed, nothing may be lost: the call is made again, or is done."""
        if self._failures():
            return None, got
        others = self._others()
        self.report("unharmed", others=others)
        if others == "refused":
            return None, "refused"
        if others == "done":
            return None, "lost"  # the result, and nothing else
        return (None, "given up") if step.name.endswith("backward") else _tried(step)  # torch has freed the graph

    def _others(self) -> str:
        """Whether the others could do the call without another one of this rank."""
        deadline = time.monotonic() + self.case.limit / 3
        while time.monotonic() < deadline:
            if self.board.everybody(Board.FINISHED, self.done + 1, [self.world.rank]):
                return "done"
            if self.board.everybody(Board.REFUSED, 1, [self.world.rank]):
                return "refused"
            time.sleep(0.01)
        return "waiting"

    def _failures(self) -> list[str]:
        return [comm.failure for comm in self.world.comms() if comm.failure is not None]

    def _strike(self) -> None:
        fault = self.plan.fault
        if fault in RAISED:
            raise RAISED[fault](f"injected {fault}")
        self.report("struck", fault=fault)
        if fault == "ctrl-c":
            os.kill(os.getpid(), signal.SIGINT)
            return
        if fault == "kill":
            self.board.numbers[self.world.rank, Board.ENDED] = 1
            os.kill(os.getpid(), signal.SIGKILL)
        seconds = SHORT_STOP if fault.startswith("short") else self.case.limit + 1.0
        if fault.endswith("sleep"):
            time.sleep(seconds)
        else:
            self.board.numbers[self.world.rank, Board.STOPPED] = int(seconds * 1000)
            os.kill(os.getpid(), signal.SIGSTOP)

    def try_later_calls(self) -> None:
        """After an error: none of these may give an answer where a Comm has failed, and none a wrong one."""
        failed = [bool(self._failures()), self.world.comm.failure is not None]
        unit = UNITS[self.plan.unit](self.world, TURNS)
        calls: list[Callable[[], Step]] = [lambda: next(unit), lambda: Step("comm.barrier", self.world.comm.barrier)]
        for make, has_failed in zip(calls, failed, strict=True):
            try:
                step = make()
                got = _tried(step)[1]
                name = step.name
            except Exception as error:
                name, got = "later", f"{type(error).__name__}: {error}"
            self.report("later", step=name, got=got, has_failed=has_failed)


def _tried(step: Step) -> tuple[Any, str]:
    try:
        return step.run()
    except Exception as error:
        return None, f"{type(error).__name__}: {error}"


# ---- from outside ----------------------------------------------------------------------------------------------------


def run_with(plan: Plan, case: Case) -> tuple[Verdict, Ended]:
    ended = launch(case, plan.size)
    met = ended.fact(plan.victim, "met") or ended.fact(plan.victim, "struck")
    ended.text = f"{plan} {met.get('where', '') if met else ''}"
    return Verdict(_problem(case, plan, ended), is_void=met is None), ended


def _problem(case: Case, plan: Plan, ended: Ended) -> str:
    if ended.is_hung:
        return "hangs"
    crash = CRASH.search(ended.output)
    if crash:
        return f"crashes: {crash[0]}"
    for rank in range(plan.size):
        error = ended.fact(rank, "error")
        if error and plan.fault != "alarm":
            return f"rank {rank} raises outside of a call: {error['text']}"
        for step in ended.steps(rank):
            problem = _problem_of_step(plan, ended, step, rank)
            if problem:
                return f"rank {rank}, turn {step['turn']}, {step['step']}: {problem}"
    return _problem_of_victim(plan, ended) or _problem_of_end(case, plan, ended) or _problem_of_later(plan, ended)


def _problem_of_step(plan: Plan, ended: Ended, step: dict[str, Any], rank: int) -> str:
    got = step["got"]
    if got in ("right", "refused", "lost", "given up"):
        return ""
    if step["turn"] < STRUCK and GONE in got:
        return ""  # it is behind the victim, in a call that does not wait for all
    if step["turn"] < STRUCK or got.startswith("wrong"):
        return got
    if plan.is_checked and DIFFER in got and rank != plan.victim:
        return ""  # a rank has lost its result, and Checked says so when it makes another call
    if got.startswith("CommError") and not step["failed"]:
        return f"{got}, and comm.failure stays None"
    is_own = rank == plan.victim and plan.fault in RAISED and got.startswith(RAISED[plan.fault].__name__)
    return "" if is_own or got.startswith("CommError") else got


def _problem_of_victim(plan: Plan, ended: Ended) -> str:
    met = ended.fact(plan.victim, "met")
    if plan.fault not in RAISED or met is None or not met["kind"]:
        return ""
    wanted = RAISED[plan.fault].__name__
    if met["got"] != "right" and not met["got"].startswith(wanted):
        return f"rank {plan.victim} meets a {wanted} at {met['where']} and raises {met['got']}"
    if ended.fact(plan.victim, "unharmed") is None or not _goes_on(ended.steps(plan.victim)):
        return ""
    for rank in range(plan.size):
        for step in ended.steps(rank):
            if step["got"] not in ("right", "refused", "lost"):
                return f"{wanted} at {met['where']} leaves comm.failure None, and then {step['step']}: {step['got']}"
    return ""


def _goes_on(steps: list[dict[str, Any]]) -> bool:
    """Whether the victim made the call again, or could do without its result."""
    return not steps or steps[-1]["got"] not in ("lost", "given up")


def _problem_of_end(case: Case, plan: Plan, ended: Ended) -> str:
    is_short = plan.fault.startswith("short")
    if plan.fault == "ctrl-c" and ended.status == 0 and ended.fact(plan.victim, "struck"):
        return "SIGINT is lost: the process ends well"
    for rank in range(plan.size):
        steps = ended.steps(rank)
        if is_short and (not steps or steps[-1]["turn"] < TURNS - 1 or steps[-1]["got"] != "right"):
            return f"rank {rank} waits {SHORT_STOP} s for rank {plan.victim} and does not go on"
        if not ended.has_end(rank) and ended.status == 0:
            return f"rank {rank} ends without a word, status 0"
        if not ended.has_end(rank) and case.transport in ("threads", "gloo") and rank != plan.victim:
            return f"rank {rank} ends without a word, status {ended.status}"
    return ""


def _problem_of_later(plan: Plan, ended: Ended) -> str:
    for rank in range(plan.size):
        for event in ended.events[rank]:
            if event["name"] != "later" or event["got"].startswith("CommError"):
                continue
            if event["has_failed"] or event["got"].startswith("wrong"):
                return f"rank {rank}: after an error, {event['step']} gives {event['got']}"
    return ""
