"""Compare the all-to-all algorithms with the MPI library's own MPI_Alltoall(v), interleaved in one run.

    mpirun -n 64 python bench/alltoall.py
    mpirun -n 64 python bench/alltoall.py --skew zipf --out alltoall.jsonl
    python bench/alltoall.py --transport threads -n 16                          needs no MPI
    torchrun --nproc-per-node 8 bench/alltoall.py --transport torch             over gloo

A sample is the slowest rank's time for one call after a barrier. The answers are checked, and the exit status is 1 if
a row is wrong. docs/benchmarks.md says what the columns mean.
"""

from __future__ import annotations

import argparse
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, TypeAlias

import harness
import numpy as np
from harness import Column, Record
from numpy.typing import NDArray

from moecomm import AllToAll, AutoAllToAll, Comm, FlatAllToAll, HierarchicalAllToAll, Nodes, SharedAllToAll
from moecomm.cli.tables import rounded
from moecomm.transports import threads
from moecomm.transports.wrappers import Timed

Counts: TypeAlias = NDArray[np.int64]
Rows: TypeAlias = NDArray[np.int64]

ROW_BYTES = 16
NIC_CALLS = 3
"""Calls behind the counters of a network interface."""


class MpiAllToAll:
    """The MPI library's own all-to-all, called through mpi4py with nothing of moecomm between: the baseline."""

    def __init__(self) -> None:
        from mpi4py import MPI

        self.comm = MPI.COMM_WORLD
        self.byte = MPI.BYTE

    def __call__(self, x: Rows, out: Rows) -> Rows:
        self.comm.Alltoall(x, out)
        return out

    def rows(self, rows: Rows, send_counts: Counts) -> tuple[Rows, Counts]:
        recv_counts = np.empty_like(send_counts)
        self.comm.Alltoall(send_counts, recv_counts)
        out = np.empty((int(recv_counts.sum()), *rows.shape[1:]), rows.dtype)
        send, recv = send_counts * ROW_BYTES, recv_counts * ROW_BYTES
        sent, received = (send, send.cumsum() - send), (recv, recv.cumsum() - recv)
        self.comm.Alltoallv([rows, sent, self.byte], [out, received, self.byte])
        return out, recv_counts


Algorithm: TypeAlias = "MpiAllToAll | AllToAll"

ALGORITHMS: dict[str, Callable[[Comm, Nodes], Algorithm]] = {
    "mpi": lambda comm, nodes: MpiAllToAll(),  # left out where there is no MPI
    "flat": lambda comm, nodes: FlatAllToAll(comm),
    "hierarchical": HierarchicalAllToAll,
    "shared": SharedAllToAll,
    "auto": AutoAllToAll,
}
"""What is compared. The first is what the others are held against."""

COLUMNS = [
    Column("p", "p", "", 6, wide=True),
    Column("nodes", "nodes", "", 7, wide=True),
    Column("bytes_per_pair", "bytes", "(a pair)", 9),
    Column("algorithm", "algorithm", "", 14),
    Column("messages_intra", "messages", "(inside)", 10, wide=True),
    Column("messages_inter", "messages", "(between)", 10),
    Column("bytes_intra", "bytes", "(inside)", 11, wide=True),
    Column("bytes_inter", "bytes", "(between)", 11, wide=True),
    Column("time_us", "time", "(us)", 8),
    Column("p10_us", "p10", "(us)", 8),
    Column("p90_us", "p90", "(us)", 8),
    Column("algbw_GBps", "algbw", "(GB/s)", 9, wide=True),
    Column("busbw_GBps", "busbw", "(GB/s)", 11),
    Column("wrong", "wrong", "(rows)", 7),
]


# ---- what is sent --------------------------------------------------------------------------------------------------


def row_counts(p: int, bytes_per_pair: int, skew: str | None) -> Counts:
    """[p, p] rows from each source to each destination, the same on every rank.

    zipf: each source draws a destination for each of its rows. The k-th most popular rank has a share of 1 / k, and all
    sources find the same ranks popular.
    """
    rows_per_pair = bytes_per_pair // ROW_BYTES
    if skew is None:
        return np.full((p, p), rows_per_pair, np.int64)
    rng = np.random.default_rng(harness.SEED)
    share = rng.permutation(1 / np.arange(1, p + 1))
    return rng.multinomial(p * rows_per_pair, share / share.sum(), size=p)


class Traffic:
    """What this rank sends in a call, and the answer that it must get.

    A row holds its source and destination in the first word, the number of the call and its place among the rows of
    that pair in the second: a row that went astray is noticed, and so is the right answer to an earlier call.
    """

    def __init__(self, rank: int, counts: Counts, even: bool) -> None:
        ranks = np.arange(len(counts))
        self.even = even
        self.all_rows = counts.sum()
        self.send_counts, self.recv_counts = counts[rank].copy(), counts[:, rank].copy()
        self.rows = labelled_rows(rank << 32 | ranks, self.send_counts)
        self.expected = labelled_rows(ranks << 32 | rank, self.recv_counts)
        self.x = self.rows.reshape(len(counts), -1, 2) if even else self.rows
        self.out = np.empty_like(self.x) if even else None

    def renew(self) -> None:
        """Number the next call, and poison the place for its answer."""
        self.rows[:, 1] += 1 << 32
        self.expected[:, 1] += 1 << 32
        if self.out is not None:
            self.out.fill(-1)

    def call(self, algorithm: Algorithm) -> tuple[Rows, Counts]:
        if self.out is None:
            return algorithm.rows(self.rows, self.send_counts)
        return algorithm(self.x, self.out), self.recv_counts

    def num_wrong(self, rows: Rows, recv_counts: Counts) -> int:
        if rows.size != self.expected.size or not np.array_equal(recv_counts, self.recv_counts):
            return max(1, len(self.expected))
        return int((rows.reshape(-1, 2) != self.expected).any(axis=1).sum())


def labelled_rows(pairs: Counts, counts: Counts) -> Rows:
    rows = np.empty((int(counts.sum()), 2), np.int64)
    rows[:, 0] = np.repeat(pairs, counts)
    rows[:, 1] = np.arange(len(rows)) - np.repeat(counts.cumsum() - counts, counts)
    return rows


# ---- measuring -----------------------------------------------------------------------------------------------------


def timed_call(comm: Comm, traffic: Traffic, algorithm: Algorithm, check: bool) -> tuple[tuple[float], int]:
    """The seconds that this rank took and, if asked to check, how many of its rows were wrong."""
    traffic.renew()
    comm.barrier()
    start = time.perf_counter()
    answer = traffic.call(algorithm)
    seconds = time.perf_counter() - start
    return (seconds,), traffic.num_wrong(*answer) if check else 0


def count_sent(timed: Timed, algorithm: Algorithm, traffic: Traffic, same_node: NDArray[np.bool_]) -> Record:
    """Messages and bytes of one call: of the rank that has most of each. `algorithm` was made on `timed`."""
    timed.clear()
    traffic.call(algorithm)
    return harness.most_sent(timed, same_node, {"all_to_all", "all_to_allv"} if traffic.even else {"all_to_allv"})


def chosen(algorithm: Algorithm, traffic: Traffic) -> str | None:
    """What an algorithm that chooses takes for this."""
    if not isinstance(algorithm, AutoAllToAll):
        return None
    p = len(traffic.send_counts)
    mean = int(traffic.all_rows) * ROW_BYTES // p**2
    return algorithm.choose("even" if traffic.even else "uneven", mean)


def extra_bytes(comm: Comm, algorithm: Algorithm, traffic: Traffic) -> int | None:
    """The most that a call has allocated beside input and output, on the rank that allocates most."""
    if isinstance(comm, threads.ThreadComm):
        return None  # tracemalloc sees all threads as one
    tracemalloc.start()
    answer = traffic.call(algorithm)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    returned = 0 if traffic.even else sum(array.nbytes for array in answer)
    return int(harness.largest(comm, [peak - returned])[0])


def tune(algorithms: dict[str, Algorithm], sizes: list[int], seconds: float) -> None:
    """Let those that choose measure first. Collective."""
    for algorithm in algorithms.values():
        if isinstance(algorithm, AutoAllToAll):
            algorithm.tune(sizes, seconds=seconds)


def counted_twin(algorithm: Algorithm, name: str, timed: Timed, nodes: Nodes) -> Algorithm:
    """The same on `timed`. MPI_Alltoall is handed what the flat algorithm hands on to it. Collective."""
    if isinstance(algorithm, AutoAllToAll):
        return AutoAllToAll(timed, nodes, table=algorithm.table)
    return ALGORITHMS["flat" if name == "mpi" else name](timed, nodes)


def nic_sent(comm: Comm, nodes: Nodes, call: Callable[[], object]) -> Record:
    """What leaves all hosts in a call: packets and bytes of every interface but the loopback. Collective."""

    def sent() -> NDArray[np.int64]:
        comm.barrier()
        reads = nodes.local_rank[comm.rank] == 0
        return comm.all_reduce(harness.nic_counters() if reads else np.zeros(2, np.int64))

    first, before = sent(), sent()
    for _ in range(NIC_CALLS):
        call()
    packets, num_bytes = ((sent() - before) - (before - first)) / NIC_CALLS
    return {"nic_packets": round(packets, 1), "nic_bytes": round(num_bytes, 1)}


def measure(
    comm: Comm, nodes: Nodes, num_hosts: int, names: list[str], options: argparse.Namespace, progress: Any
) -> Iterator[Record]:
    """One record for each size and algorithm, as soon as it is measured."""
    timed = Timed(comm)
    library = harness.mpi_family() if options.transport == "mpi" else None
    plain = {name: ALGORITHMS[name](comm, nodes) for name in names}
    tune(plain, options.sizes, options.tune)
    counted = {name: counted_twin(plain[name], name, timed, nodes) for name in names}
    for size in options.sizes:
        traffic = Traffic(comm.rank, row_counts(comm.size, size, options.skew), even=options.skew is None)
        calls = {name: partial(timed_call, comm, traffic, plain[name]) for name in names}
        timings = harness.interleaved(comm, calls, options.reps, progress.update if progress else int)
        for name in names:
            yield {
                "bench": "alltoall" if num_hosts == 1 else "cluster",
                "algorithm": f"mpi:{options.forced}" if options.forced and name == "mpi" else name,
                "chosen": chosen(plain[name], traffic),
                "transport": options.transport,
                "library": library,
                "forced": options.forced,
                "hosts": num_hosts,
                "p": comm.size,
                "ranks_per_node": int(nodes.sizes().max()),
                "nodes": len(nodes),
                "bytes_per_pair": size,
                "skew": options.skew,
                "reps": options.reps,
                **(times := timings[name].record()),
                **harness.bandwidths(comm.size * size, comm.size, times["time_us"]),
                **count_sent(timed, counted[name], traffic, nodes.same_node(comm.rank)),
                "extra_bytes": extra_bytes(comm, plain[name], traffic),
                **(nic_sent(comm, nodes, partial(traffic.call, plain[name])) if num_hosts > 1 else {}),
                "date": harness.utc_now(),
            }


# ---- reporting -----------------------------------------------------------------------------------------------------

ONE_HOST = [
    "",
    " All ranks are on one host: the nodes are mere groups of ranks, and no message crosses a network. What the "
    "hierarchical all-to-all saves, messages between nodes, costs little here, while it copies everything once more: "
    "without a network expect it to be slower from about 1 KiB a pair up (at 64 KiB it depends on the MPI library). "
    "The shared one sends no messages inside a node, and so few here. auto was tuned in this very run. "
    "Measure over a network, real or emulated on this machine by bench/cluster.py: docs/benchmarks.md, Across nodes.",
]


def benchmark(comm: Comm, options: argparse.Namespace) -> int:
    """Measure and report. The exit status: 1 if a row was wrong, 2 if --out cannot be written."""
    if options.out and not harness.can_append(options.out, comm):
        return 2
    nodes, num_hosts = harness.choose_nodes(comm, options.ranks_per_node)
    names = [name for name in options.algorithms if name != "mpi" or options.transport == "mpi"]
    records = harness.report(
        comm,
        lambda progress: measure(comm, nodes, num_hosts, names, options, progress),
        harness.shown(COLUMNS, options.wide),
        setting(options, nodes, num_hosts),
        options.out,
        num_calls=len(options.sizes) * len(names) * options.reps,
    )
    if comm.rank == 0:
        harness.print_comment(speeds(records))
        if num_hosts == 1 and len(nodes) > 1:
            harness.print_comment(ONE_HOST)
    return int(any(record["wrong"] for record in records))


def setting(options: argparse.Namespace, nodes: Nodes, num_hosts: int) -> list[str]:
    form = "equal blocks"
    if options.skew:
        form = "uneven counts, Zipf(1) over the destinations; the counts are exchanged inside the timing"
    per_node = " or ".join(str(size) for size in sorted({*nodes.sizes().tolist()}))
    lines = [
        f" alltoall: {form}",
        f"  transport: {options.transport}   ranks: {nodes.world_size}   nodes: {len(nodes)}   "
        f"ranks per node: {per_node}   hosts: {num_hosts}   reps: {options.reps}",
        "  messages and bytes: what a rank sends in a call, inside its node and between nodes; the most of any rank",
        "  time, p10, p90: median and percentiles of the slowest rank's time",
    ]
    return lines


def speeds(records: list[Record]) -> list[str]:
    """How fast each algorithm was against the first of them, and which was the fastest, size by size."""
    by_size: dict[int, dict[str, Record]] = {}
    for record in records:
        by_size.setdefault(record["bytes_per_pair"], {})[record["algorithm"]] = record
    names = list(by_size[records[0]["bytes_per_pair"]])
    owner = "MPI library" if names[0] == "mpi" else "transport"
    lines = [
        "",
        f" Speed against {names[0]}, the {owner}'s own all-to-all (its median time / theirs)",
        " * The fastest: its spread, p10 to p90, overlaps with that of none of the others",
        f"{'bytes a pair':>13}" + "".join(f"{name:>13}" for name in names),
    ]
    for size, row in by_size.items():
        cells = f"{size:>13}"
        for name in names:
            others = [record for other, record in row.items() if other != name]
            star = "*" if others and harness.is_fastest(row[name], others) else " "
            cells += f"{rounded(row[names[0]]['time_us'] / row[name]['time_us']):>12}{star}"
        lines.append(cells.rstrip())
    return lines


# ---- starting ------------------------------------------------------------------------------------------------------


def algorithm_names(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in ALGORITHMS:
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(ALGORITHMS)}")
    return names


def parse_options() -> argparse.Namespace:
    parser = harness.parser(__doc__)
    harness.add_wide(parser)
    harness.add_sizes(parser, "16,64,256,1KiB,4KiB,16KiB,64KiB")
    parser.add_argument(
        "--skew",
        choices=("zipf",),
        help="uneven counts, Zipf(1) over the destinations, bytes a pair on average; the exchange of the counts is "
        "timed as well (mpi: MPI_Alltoall of the counts, then MPI_Alltoallv)",
    )
    parser.add_argument(
        "--algorithms",
        type=algorithm_names,
        metavar="NAME,...",
        default=",".join(ALGORITHMS),
        help="what to compare, the first with the others (default: %(default)s)",
    )
    parser.add_argument(
        "--tune",
        type=harness.seconds,
        metavar="SECONDS",
        default=5.0,
        help="how long auto measures before it is measured (default: %(default)s)",
    )
    parser.add_argument(
        "--forced",
        metavar="NAME",
        help="what the environment makes the MPI library do in this run: mpi is then called mpi:NAME in the rows",
    )
    options = harness.parse(parser)
    if any(size % ROW_BYTES or not size for size in options.sizes):
        parser.error(f"argument --sizes: a row has {ROW_BYTES} bytes, so give multiples of {ROW_BYTES}")
    return options


if __name__ == "__main__":
    sys.exit(harness.run(harness.said_once(parse_options), benchmark))
