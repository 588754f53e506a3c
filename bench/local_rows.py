"""What an exchange does inside a rank, on a CPU: rows copied by expert, and answers weighted and summed. One thread.

    python bench/local_rows.py --out bench/results/local_rows_cpu.jsonl
    python bench/local_rows.py --tokens 128 --top-k 2 --hidden 512

One rank, so nothing is sent: dispatch makes the tables and copies T K rows of H float32, combine sums them. "numpy" is
the definition in plain numpy: argsort, a copy by index, and a sum over the choices. All take turns in the same run, and
the answers are checked: the exit status is 1 if a row is wrong.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import harness
import numpy as np
from harness import Column, Record
from numpy.typing import NDArray

from moecomm import Comm, FlatAllToAll, RoutedExchange, Routing
from moecomm.exchange import StaticExchange
from moecomm.transports import threads

COLUMNS = [
    Column("impl", "impl", "", 13),
    Column("dispatch_us", "dispatch", "(us)", 9),
    Column("combine_us", "combine", "(us)", 9),
    Column("time_us", "time", "(us)", 9),
    Column("p10_us", "p10", "(us)", 9),
    Column("p90_us", "p90", "(us)", 9),
    Column("of_numpy", "numpy's", "time / ours", 12),
    Column("wrong", "wrong", "(rows)", 8),
]


class Definition:
    """Dispatch and combine of one rank in plain numpy."""

    def dispatch(self, x: NDArray[Any], routing: Routing) -> tuple[NDArray[Any], Any]:
        order = np.argsort(routing.expert, axis=None, kind="stable")
        place = np.empty_like(order)
        place[order] = np.arange(len(order))
        return x[order // routing.expert.shape[1]], (place.reshape(routing.expert.shape), routing.weight)

    def combine(self, rows: NDArray[Any], plan: Any) -> NDArray[Any]:
        place, weight = plan
        y = np.zeros((len(place), rows.shape[1]), rows.dtype)
        for choice in range(place.shape[1]):
            y += weight[:, choice, None] * rows[place[:, choice]]
        return y


def timed_call(x: NDArray[Any], routing: Routing, exchange: Any, check: bool) -> tuple[tuple[float, ...], int]:
    start = time.perf_counter()
    rows, plan = exchange.dispatch(x, routing)
    dispatched = time.perf_counter()
    y = exchange.combine(rows, plan)
    seconds = dispatched - start, time.perf_counter() - dispatched
    if not check:
        return seconds, 0
    order = np.argsort(routing.expert, axis=None, kind="stable")
    wrong = (rows[: len(order)] != x[order // routing.expert.shape[1]]).any(1).sum()
    far = ~np.isclose(y, x * routing.weight.sum(1, keepdims=True), rtol=1e-4, atol=1e-5)
    return seconds, int(wrong + far.any(1).sum())


def measure(comm: Comm, options: argparse.Namespace, progress: Any) -> Iterator[Record]:
    rng = np.random.default_rng(harness.SEED)
    shape = options.tokens, options.top_k
    x = rng.standard_normal((options.tokens, options.hidden)).astype(np.float32)
    choices = rng.permuted(np.tile(np.arange(options.experts), (options.tokens, 1)), axis=1)
    routing = Routing(choices[:, : options.top_k].copy(), rng.random(shape).astype(np.float32))
    flat = FlatAllToAll(comm)
    exchanges: dict[str, Any] = {
        "numpy": Definition(),
        "assignments": RoutedExchange(flat, options.experts),
        "tokens": RoutedExchange(flat, options.experts, send="tokens"),
        "static": StaticExchange(flat, options.experts, options.tokens),
    }
    calls = {name: partial(timed_call, x, routing, exchange) for name, exchange in exchanges.items()}
    timings = harness.interleaved(comm, calls, options.reps, progress.update)
    progress.clear()
    definition = float(np.median(timings["numpy"].samples_us.sum(axis=1)))
    for name, timing in timings.items():
        dispatch_us, combine_us = np.median(timing.samples_us, axis=0).round(1).tolist()
        record = timing.record()
        yield {
            "bench": "local_rows",
            "impl": name,
            **{"T": options.tokens, "k": options.top_k, "H": options.hidden, "E": options.experts, "dtype": "float32"},
            **{"threads": 1, "dispatch_us": dispatch_us, "combine_us": combine_us},
            **record,
            "of_numpy": definition / record["time_us"],
            "utc": harness.utc_now(),
        }


def benchmark(comm: Comm, options: argparse.Namespace) -> int:
    records = harness.report(
        comm,
        lambda progress: measure(comm, options, progress),
        COLUMNS,
        [
            f" local_rows: T {options.tokens}, k {options.top_k}, H {options.hidden}, E {options.experts}, float32, "
            f"one rank and thread; medians of {options.reps} samples"
        ],
        options.out,
        num_calls=4 * options.reps,
    )
    return int(any(record["wrong"] for record in records))


def parse_options() -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("--tokens", type=harness.positive, default=2048, help="T (default: %(default)s)")
    add("--top-k", type=harness.positive, default=8, help="(default: %(default)s)")
    add("--hidden", type=harness.positive, default=1024, help="H (default: %(default)s)")
    add("--experts", type=harness.positive, default=64, help="E (default: %(default)s)")
    add("--reps", type=harness.positive, default=30, help="timed turns (default: %(default)s)")
    add("--out", metavar="FILE.jsonl", help="append the rows as JSON Lines, with all samples")
    options = parser.parse_args()
    if options.top_k > options.experts:
        parser.error(f"--top-k {options.top_k} is more than --experts {options.experts}")
    return options


def main() -> int:
    """The exit status: 1 if a row was wrong."""
    options = parse_options()
    statuses: list[int] = threads.run(1, lambda comm: benchmark(comm, options))
    return statuses[0]


if __name__ == "__main__":
    sys.exit(main())
