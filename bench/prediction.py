"""Hold the cost model against the clock: in one run, measure the figures of the machine, predict, and time the calls.

    python bench/cluster.py run -n 64 python bench/prediction.py --out prediction.jsonl

Even form, MPI only. docs/scaling.md shows what came out.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from typing import Any

import alltoall
import harness

from moecomm import Comm, Nodes, cost

PREDICTED_AS = {"mpi": "library", "hierarchical": "hierarchical", "shared": "shared"}
COLUMNS = [
    harness.Column("algorithm", "algorithm", "", 14),
    harness.Column("bytes_per_pair", "bytes", "(a pair)", 10),
    harness.Column("time_us", "time", "(us)", 11),
    harness.Column("predicted_us", "predicted", "(us)", 11),
    harness.Column("wrong", "wrong", "(rows)", 8),
]


def measure(
    comm: Comm, nodes: Nodes, num_hosts: int, options: argparse.Namespace, progress: Any
) -> Iterator[harness.Record]:
    """One record for each size and algorithm."""
    algorithms = {name: alltoall.ALGORITHMS[name](comm, nodes) for name in PREDICTED_AS}
    for size in (options.sizes[0], options.sizes[-1]):  # all connections are made before anything is measured
        traffic = alltoall.Traffic(comm.rank, alltoall.row_counts(comm.size, size, None), even=True)
        for algorithm in algorithms.values():
            traffic.call(algorithm)
    links = cost.measure(comm, nodes)
    for size in options.sizes:
        predicted = cost.predict(links, nodes, size)
        traffic = alltoall.Traffic(comm.rank, alltoall.row_counts(comm.size, size, None), even=True)
        calls = {name: partial(alltoall.timed_call, comm, traffic, algorithm) for name, algorithm in algorithms.items()}
        timings = harness.interleaved(comm, calls, options.reps, progress.update if progress else int)
        for name in algorithms:
            yield {
                "bench": "prediction",
                "algorithm": name,
                "library": harness.mpi_family(),
                "hosts": num_hosts,
                "p": comm.size,
                "ranks_per_node": int(nodes.sizes().max()),
                "bytes_per_pair": size,
                "reps": options.reps,
                **timings[name].record(),
                "predicted_us": predicted[PREDICTED_AS[name]].seconds * 1e6,
                "links": asdict(links),  # so that the model can be held against this run again
                "date": harness.utc_now(),
            }


def benchmark(comm: Comm, options: argparse.Namespace) -> int:
    """Measure and report. The exit status: 1 if a row was wrong, 2 if --out cannot be written."""
    if options.out and not harness.can_append(options.out, comm):
        return 2
    nodes, num_hosts = harness.choose_nodes(comm, options.ranks_per_node)
    records = harness.report(
        comm,
        lambda progress: measure(comm, nodes, num_hosts, options, progress),
        COLUMNS,
        [f" prediction: {comm.size} ranks on {num_hosts} hosts   reps: {options.reps}"],
        options.out,
        num_calls=len(options.sizes) * len(PREDICTED_AS) * options.reps,
    )
    if comm.rank == 0:
        errors = sorted(abs(record["predicted_us"] / record["time_us"] - 1) for record in records)
        harness.print_comment(["", f" median error {errors[len(errors) // 2]:.0%} of {len(errors)}"])
    return int(any(record["wrong"] for record in records))


def parse_options() -> argparse.Namespace:
    parser = harness.parser(__doc__)
    harness.add_sizes(parser, "16,64,256,512,1KiB,2KiB,4KiB,8KiB,16KiB,64KiB")
    return harness.parse(parser)


if __name__ == "__main__":
    sys.exit(harness.run(harness.said_once(parse_options), benchmark))
