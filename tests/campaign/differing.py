"""One rank calls something else than the others.

Under Checked: a ValueError or TypeError on every rank, and right answers afterwards. Without it: on every rank a right
answer or an error within the limit; wrong rows only where no contract rules them out.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from calls import UNITS, Step, World, as_numpy, fits, num_steps, random_size
from case import Board, Case, Ended, Report, Verdict
from launch import launch

from moecomm import Comm, Nodes
from moecomm.transports.wrappers import Checked

TRANSPORTS = ("threads", "gloo", "mpich", "openmpi")
BEFORE, AFTER = 2, 3
"""Right units around the one with a difference."""
GLOO_SAYS = "Is there a distributed collective mismatch in your code?"
"""gloo ends the process of a rank that gets another number of bytes than it waits for, with this text."""
CRASH = re.compile(r"signal (4|6|7|8|11)\b|Segmentation|Floating point|terminate called|Abort(ed)? \(core|double free")


class Plan:
    """What all ranks know of a case."""

    def __init__(self, case: Case) -> None:
        random = case.random(0)
        self.is_checked = bool(random.integers(2))
        self.use_torch = case.transport in ("threads", "gloo") and bool(random.integers(2))
        self.unit = str(random.choice(list(UNITS)))
        self.size = random_size(random, case.transport, self.unit)
        names = [name for name in UNITS if fits(name, self.size, self.use_torch)]
        if self.unit != "lanes":
            names = [name for name in names if name != "lanes"]
        before, after = random.choice(names, BEFORE).tolist(), random.choice(names, AFTER).tolist()
        self.units = [*before, self.unit, *after]
        self.other = str(random.choice([name for name in names if name != self.unit]))
        self.step = int(random.integers(num_steps(self.unit, self.use_torch)))
        self.victim = int(random.integers(self.size))
        self.turn = BEFORE
        self.draw = random.random(4)


# ---- differences: each changes the step of one rank and says whether it can ------------------------------------------

Change = Callable[[Plan, World, Step], bool]


def _rows_of(step: Step) -> str:
    return next((name for name in ("rows", "x", "array") if name in step.arguments), "")


def another_dtype(plan: Plan, world: World, step: Step) -> bool:
    name = _rows_of(step)
    if not name or step.name.endswith("combine"):
        return False
    rows = as_numpy(step.arguments[name])
    wide = np.float64 if rows.dtype != np.float64 else np.int64
    dtype = wide if plan.draw[0] < 0.5 else np.float32
    if step.name.endswith("dispatch") and dtype == np.int64:
        dtype = np.float32
    step.arguments[name] = world.make(rows.astype(dtype))
    return True


def another_row_shape(plan: Plan, world: World, step: Step) -> bool:
    name = _rows_of(step)
    if not name or step.name.endswith("combine"):
        return False
    rows = as_numpy(step.arguments[name])
    rest = rows.shape[1:]
    if rows.ndim == 2 and rest[0] % 2 == 0 and plan.draw[0] < 0.4:
        changed = rows.reshape(len(rows), 2, rest[0] // 2)
    elif plan.draw[0] < 0.7 or rows.ndim < 2:
        changed = np.zeros((len(rows), *rest, 3), rows.dtype) if rows.ndim < 2 else np.repeat(rows, 2, axis=1)
    else:
        changed = rows[:, :0]
    step.arguments[name] = world.make(np.ascontiguousarray(changed))
    return True


def other_counts(plan: Plan, world: World, step: Step) -> bool:
    if step.name == "comm.all_to_allv":
        counts = step.arguments["send_counts"].copy()
        source = int(counts.argmax())
        if not counts[source]:
            return False
        counts[source] -= 1
        counts[(source + 1) % world.size] += 1
        step.arguments["send_counts"] = counts
        return True
    if step.name == "comm.all_gatherv":
        counts = step.arguments["recv_counts"].copy()
        counts[(world.rank + 1) % world.size] += 1
        step.arguments["recv_counts"] = counts
        return True
    return False


def other_number_of_rows(plan: Plan, world: World, step: Step) -> bool:
    if step.name not in ("comm.all_to_all", "comm.all_gather", "comm.all_reduce"):
        return False
    name = _rows_of(step)
    rows = as_numpy(step.arguments[name])
    step.arguments[name] = world.make(np.concatenate([rows, rows]))
    return True


def another_route(plan: Plan, world: World, step: Step) -> bool:
    if "_other" not in step.arguments:
        return False
    step.arguments["rows"], step.arguments["route"] = step.arguments["_other"]
    return True


def other_nodes(plan: Plan, world: World, step: Step) -> bool:
    if "nodes" not in step.arguments:
        return False
    choices = [Nodes.of_size(n, world.size) for n in range(1, world.size + 1)]
    others = [nodes for nodes in choices if nodes != world.nodes]
    step.arguments["nodes"] = None if plan.draw[0] < 0.3 else others[int(plan.draw[1] * len(others))]
    return True


def another_call(plan: Plan, world: World, step: Step) -> bool:
    other = next(UNITS[plan.other](world, plan.turn))
    if other.name == step.name or other.name.endswith(".make"):
        return False
    if step.name.endswith(".free") or step.name.startswith("lanes"):
        return False  # free says nothing to the others where there is nothing to give back; lanes are other Comms
    step.function, step.arguments, step.wanted, step.read = other.function, other.arguments, None, other.read
    return True


def bad_arguments(plan: Plan, world: World, step: Step) -> bool:
    name = _rows_of(step)
    if "counts" in step.arguments:
        step.arguments["counts"] = np.full(world.size, -1)
    elif step.name == "comm.split":
        step.arguments["color"] = -1
    elif "routing" in step.arguments and plan.draw[0] < 0.5:
        routing = step.arguments["routing"]
        expert = np.full((len(routing.expert) + 1, routing.expert.shape[1]), 0)
        step.arguments["routing"] = type(routing)(expert, routing.weight)
    elif "nodes" in step.arguments:
        step.arguments["nodes"] = Nodes.of_size(1, world.size + 1)
    elif name:
        step.arguments[name] = [1.0, 2.0] if plan.draw[1] < 0.5 else world.make(np.array(1.0))
    else:
        return False
    return True


def late(plan: Plan, world: World, step: Step) -> bool:
    time.sleep(0.2 * float(plan.draw[0]))
    return True


CHANGES: dict[str, Change] = {
    "another call": another_call,
    "dtype": another_dtype,
    "row shape": another_row_shape,
    "counts": other_counts,
    "number of rows": other_number_of_rows,
    "route": another_route,
    "nodes": other_nodes,
    "bad argument": bad_arguments,
    "late": late,
}
ON_EVERY_TRANSPORT = {"nodes"}
"""What is compared without Checked too."""


def chosen_change(plan: Plan, world: World, step: Step) -> str:
    """Apply the first change that fits, in an order that the seed gives."""
    names = list(CHANGES)
    for i in np.random.default_rng(int(plan.draw[3] * 2**40)).permutation(len(names)):
        if CHANGES[names[i]](plan, world, step):
            return names[i]
    return ""


# ---- on each rank ----------------------------------------------------------------------------------------------------


def play(case: Case, comm: Comm, report: Report, board: Board) -> None:
    plan = Plan(case)
    world = World(Checked(comm) if plan.is_checked else comm, case, plan.use_torch)
    change = ""
    for name in (*plan.units, plan.other):
        world.prepare(name)
    for turn, name in enumerate(plan.units):
        unit = UNITS[name](world, turn)
        step_number, result = 0, None
        while True:
            try:
                step = unit.send(result)
            except StopIteration:
                break
            is_changed = turn == plan.turn and step_number == plan.step
            if is_changed and comm.rank == plan.victim:
                change = chosen_change(plan, world, step)
                report("change", what=change, step=step.name)
            try:
                result, got = step.run()
            except Exception as error:
                report("step", turn=turn, step=step.name, got=f"{type(error).__name__}: {error}", changed=is_changed)
                if plan.is_checked and not isinstance(error, RuntimeError):
                    break  # the rest of the unit has lost what it builds on, on all ranks
                return  # as a program would
            report("step", turn=turn, step=step.name, got=got, changed=is_changed)
            if is_changed and change == "another call":
                return  # it has no result to go on with
            step_number += 1


# ---- from outside ----------------------------------------------------------------------------------------------------


def run(case: Case) -> tuple[Verdict, Ended]:
    plan = Plan(case)
    ended = launch(case, plan.size)
    change = ended.fact(plan.victim, "change")
    what = change["what"] if change else ""
    checked = "Checked" if plan.is_checked else "not checked"
    ended.text = f"{plan.size} ranks, {checked}, {plan.unit} step {plan.step}, rank {plan.victim}: {what}"
    return Verdict(_problem(case, plan, ended, what), is_void=not what), ended


def _problem(case: Case, plan: Plan, ended: Ended, what: str) -> str:
    if ended.is_hung:
        return "hangs"
    crash = CRASH.search(ended.output)
    if crash and (plan.is_checked or GLOO_SAYS not in ended.output):
        return f"crashes: {crash[0]}"
    for rank in range(plan.size):
        error = ended.fact(rank, "error")
        if error:
            return f"rank {rank} raises outside of a call: {error['text']}"
        for step in ended.steps(rank):
            problem = _problem_of_step(case, plan, what, step, rank)
            if problem:
                return f"rank {rank}, turn {step['turn']}, {step['step']}: {problem}"
    if (
        plan.is_checked
        and what == "another call"
        and any(s["changed"] and s["got"] == "right" for s in ended.steps(plan.victim))
    ):
        return f"rank {plan.victim} gets an answer to another call"
    missing = [rank for rank in range(plan.size) if not ended.has_end(rank)]
    if missing and (plan.is_checked or ended.status == 0):
        return f"rank {missing[0]} ends without a word, status {ended.status}"
    if plan.is_checked or what in ("late", ""):
        for rank in range(plan.size):
            if not ended.steps(rank) or ended.steps(rank)[-1]["turn"] != len(plan.units) - 1:
                return f"rank {rank} does not come to the last turn"
    return ""


def _is_compared(case: Case, plan: Plan, what: str) -> bool:
    """Whether a contract rules out wrong rows without Checked: threads see all but shared memory."""
    return what in ON_EVERY_TRANSPORT or (case.transport == "threads" and not plan.unit.startswith(("shared", "auto")))


def _problem_of_step(case: Case, plan: Plan, what: str, step: dict[str, Any], rank: int) -> str:
    got = step["got"]
    is_refused = got.startswith(("ValueError", "TypeError"))
    if what in ("late", "") or step["turn"] < plan.turn:
        return "" if got == "right" else got
    if plan.is_checked:
        if not step["changed"]:
            return "" if got == "right" else got
        return "" if is_refused else f"{got}, expected ValueError or TypeError"
    if got.startswith("wrong") and rank != plan.victim and _is_compared(case, plan, what):
        return got
    if got.startswith(("right", "wrong", "CommError")) or is_refused:
        return ""
    return got
