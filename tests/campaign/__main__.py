"""The fault campaign: what goes wrong on purpose, at random places, and whether it ends as docs/reliability.md says.

    make campaign                                    10 minutes of all kinds over all transports that are installed
    make campaign SECONDS=180 SEED=1                 3 minutes, as CI does
    make campaign CASE=differing/threads/12          one case again, with all that its ranks said

A case is decided by its kind, its transport and its seed, and takes some seconds at most. How fast each rank is decides
nobody: a case that fails now and then needs a certain order of events.

kinds:
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from case import LIMIT, LIMIT_ERROR, Case, Ended, Verdict
from launch import available
from tqdm import tqdm

KINDS = ("differing", "exceptions", "kills", "stops", "checkpoints", "native")
SLOW = 6.0
"""Where a limit was over and should not have been, the case is played again with so many times the limit."""


@dataclass
class Line:
    """What came out of one kind over one transport."""

    kind: str
    transport: str
    cases: int = 0
    voids: int = 0
    slow: int = 0
    seconds: float = 0.0
    failed: list[str] = field(default_factory=list)

    def play(self, seed: int) -> tuple[Case, Verdict, Ended]:
        """One more case."""
        case = Case(self.kind, self.transport, seed)
        began = time.monotonic()
        verdict, ended = play(case)
        if LIMIT_ERROR in verdict.problem:
            again, ended_again = play(case._replace(limit=LIMIT * SLOW))
            if not again.problem:
                self.slow += 1
                verdict, ended = again, ended_again
        self.cases += 1
        self.voids += verdict.is_void and not verdict.problem
        self.seconds += time.monotonic() - began
        if verdict.problem:
            self.failed.append(str(case))
        return case, verdict, ended


def play(case: Case) -> tuple[Verdict, Ended]:
    """One case of its kind's module."""
    return importlib.import_module(case.kind).run(case)


def turns(lines: list[Line], seconds: float) -> Iterator[Line]:
    """Whose turn it is, until the time is over: that which had the least of it. Each gets one at least."""
    deadline = time.monotonic() + seconds
    while True:
        line = min(lines, key=lambda line: line.seconds)
        if time.monotonic() >= deadline and line.cases:
            return
        yield line


def campaign(options: argparse.Namespace) -> int:
    """Play cases and print what came out. The number of failures."""
    modules = {kind: importlib.import_module(kind) for kind in options.kinds}
    pairs = [(kind, transport) for kind in options.kinds for transport in modules[kind].TRANSPORTS]
    pairs = [(kind, transport) for kind, transport in pairs if transport in (options.transports or [transport])]
    absent = sorted({transport for _, transport in pairs if not available(transport)})
    lines = [Line(kind, transport) for kind, transport in pairs if transport not in absent]
    if not lines:
        sys.exit("nothing to do: none of these transports is installed")
    print(f"seed {options.seed}; not installed and left out: {', '.join(absent) or 'none'}", flush=True)
    seeds = {(line.kind, line.transport): itertools.count(options.seed) for line in lines}
    began = time.monotonic()
    shape = "{l_bar}{bar}| {n:.0f}/{total:.0f} s{postfix}"
    with tqdm(total=options.seconds, bar_format=shape, disable=options.quiet, mininterval=1) as bar:
        for line in turns(lines, options.seconds):
            bar.set_postfix_str(f", {line.kind}/{line.transport}")
            case, verdict, ended = line.play(next(seeds[line.kind, line.transport]))
            bar.update(min(time.monotonic() - began, options.seconds) - bar.n)
            if verdict.problem:
                bar.write(f"FAILED {case}: {ended.text}\n    {verdict.problem}\n    make campaign CASE={case}")
    print_table(lines)
    return sum(len(line.failed) for line in lines)


def print_table(lines: list[Line]) -> None:
    """kind x transport."""
    print(f"\n{'kind':12} {'transport':10} {'cases':>6} {'failed':>7} {'void':>5} {'slow':>5} {'seconds':>8}")
    for line in lines:
        numbers = f"{line.cases:6} {len(line.failed):7} {line.voids:5} {line.slow:5} {line.seconds:8.1f}"
        print(f"{line.kind:12} {line.transport:10} {numbers}")
    total = sum(line.cases for line in lines)
    print(f"{total} cases, {sum(len(line.failed) for line in lines)} failed")
    print("void: the fault did not strike; slow: right, when the limit was longer")


def again(case: Case) -> int:
    """One case, with all that its ranks said."""
    verdict, ended = play(case)
    print(ended.story())
    print(f"{case}: {ended.text}\n{'FAILED: ' + verdict.problem if verdict.problem else 'as promised'}")
    return bool(verdict.problem)


def parsed() -> argparse.Namespace:
    described = "\n".join(f"    {kind:12} {_first_line(kind)}" for kind in KINDS)
    parser = argparse.ArgumentParser(
        prog="python tests/campaign",
        description=f"{__doc__}{described}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--seconds", type=float, default=600.0, help="for how long, about (default: %(default).0f)")
    add("--seed", type=int, default=None, help="of each kind's first case; counts up (default: by chance)")
    add("--kinds", nargs="+", choices=KINDS, default=KINDS, metavar="KIND", help="default: all")
    add("--transports", nargs="+", metavar="TRANSPORT", help="threads, gloo, mpich, openmpi, ... (default: all)")
    add("--case", type=Case.parse, metavar="KIND/TRANSPORT/SEED", help="play this one alone and tell all")
    add("--quiet", action="store_true", help="no progress bar")
    options = parser.parse_args()
    if options.seed is None:
        options.seed = random.randrange(10**6)
    return options


def _first_line(kind: str) -> str:
    return (importlib.import_module(kind).__doc__ or "").partition("\n")[0]


if __name__ == "__main__":
    tqdm.monitor_interval = 0  # no thread beside this one: it forks
    chosen = parsed()
    sys.exit(again(chosen.case) if chosen.case else bool(campaign(chosen)))
