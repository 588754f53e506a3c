"""What all benchmarks share: options, starting the ranks, the slowest rank's statistics, the table, the JSON Lines."""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import re
import sys
import textwrap
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import redirect_stderr, redirect_stdout
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeVar

import interrupts  # also for what it does when it is imported
import numpy as np
from environment import environment, environment_lines
from numpy.typing import ArrayLike, NDArray

from moecomm import Comm, Nodes
from moecomm.cli.tables import WIDTH, rounded
from moecomm.train.progress import Progress, progress_of
from moecomm.transports import threads
from moecomm.transports.wrappers import Timed

Record = dict[str, Any]
"""One measured row, as it is written: where a key has a unit, the unit ends the key."""

Key = TypeVar("Key", bound=Hashable)

SEED = 1


# ---- options and ranks ---------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """Errors in one line."""

    def error(self, message: str) -> NoReturn:
        """As argparse has it, without the usage."""
        self.exit(2, f"{self.prog}: error: {message}; see --help\n")


def parser(doc: str | None) -> argparse.ArgumentParser:
    """With what a module's docstring says, and the options that every benchmark has."""
    description, _, rest = (doc or "").partition("\n\n")
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(description=description, epilog=rest, formatter_class=raw)
    add = parser.add_argument
    add("--transport", choices=("mpi", "threads", "torch"), default="mpi", help="what carries the rows (default: mpi)")
    add("-n", type=positive, metavar="RANKS", help="number of ranks, with --transport threads")
    add(
        "--ranks-per-node",
        type=positive,
        metavar="G",
        help="call each G consecutive ranks a node (default: the hosts that the ranks are on; 8 on one host)",
    )
    add("--reps", type=positive, default=15, help="timed calls behind each row (default: %(default)s)")
    add("--out", metavar="FILE.jsonl", help="append the rows as JSON Lines, with all samples")
    return parser


def add_sizes(parser: argparse.ArgumentParser, default: str) -> None:
    """--sizes, or a sweep by the options of nccl-tests; `parse` makes one list of both."""
    add = parser.add_argument
    add("--sizes", type=byte_sizes, metavar="BYTES,...", help=f"bytes a pair of ranks, multiples of 16 ({default})")
    add("-b", type=byte_size, metavar="BYTES", help="a sweep in place of --sizes, as nccl-tests has it: from -b")
    add("-e", type=byte_size, metavar="BYTES", help="to -e, such as 8 and 64K; each is rounded up to 16 bytes")
    add("-f", type=factor, metavar="FACTOR", help="each size so many times the one before (default: 2)")
    parser.set_defaults(usual_sizes=byte_sizes(default))


def add_wide(parser: argparse.ArgumentParser) -> None:
    """For a benchmark that has more columns than a terminal."""
    parser.add_argument("--wide", action="store_true", help="all columns, however wide the table becomes")


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    options = parser.parse_args()
    if options.transport == "threads" and not options.n:
        parser.error("--transport threads needs -n, the number of ranks")
    if options.transport != "threads" and options.n:
        parser.error("-n is for --transport threads; elsewhere mpirun or torchrun says how many ranks there are")
    if "usual_sizes" in options:
        try:
            options.sizes = sizes_of(options)
        except ValueError as error:
            parser.error(str(error))
    return options


def sizes_of(options: argparse.Namespace) -> list[int]:
    """The sizes that --sizes or -b, -e and -f ask for. Raises ValueError for both."""
    if options.b is None and options.e is None and options.f is None:
        return options.sizes or options.usual_sizes
    if options.sizes:
        raise ValueError("--sizes and -b, -e, -f exclude each other")
    if options.b is None or options.e is None or options.b > options.e or not options.b:
        raise ValueError("a sweep needs its first and its last size: -b 8 -e 64K -f 2")
    return sweep(options.b, options.e, options.f or 2)


def sweep(first: int, last: int, factor: int, row_bytes: int = 16) -> list[int]:
    """first, first * factor, ... up to last, each rounded up to whole rows; a size that two become comes once."""
    sizes: list[int] = []
    while first <= last:
        size = -(-first // row_bytes) * row_bytes
        if size not in sizes:
            sizes.append(size)
        first *= factor
    return sizes


def said_once(parse: Callable[[], argparse.Namespace]) -> argparse.Namespace:
    """The options that `parse` finds. Where all ranks refuse them, or are asked for help, the first alone speaks."""
    said = io.StringIO()
    try:
        with redirect_stdout(said), redirect_stderr(said):
            return parse()
    except SystemExit as end:
        if _mpi_rank() == 0:
            print(said.getvalue(), end="", file=sys.stderr if end.code else sys.stdout, flush=True)
        raise


def _mpi_rank() -> int:
    try:
        return int(_mpi_world().rank)
    except (ImportError, RuntimeError):  # no mpi4py, or no MPI library for it
        return 0


def _mpi_world() -> Any:
    from mpi4py import MPI

    return MPI.COMM_WORLD


def positive(text: str) -> int:
    if not re.fullmatch(r"0*[1-9][0-9]*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number >= 1")
    return int(text)


def factor(text: str) -> int:
    if not text.isdecimal() or int(text) < 2:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number >= 2")
    return int(text)


def seconds(text: str) -> float:
    if not re.fullmatch(r"[0-9]+([.][0-9]*)?|[.][0-9]+", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds >= 0, such as 5 or 0.5")
    return float(text)


def byte_sizes(text: str) -> list[int]:
    """16,4KiB,1MiB -> [16, 4096, 1048576]"""
    return [byte_size(part) for part in text.split(",")]


def byte_size(text: str) -> int:
    """4096, or 4KiB, or 4K as nccl-tests has it -> 4096"""
    match = re.fullmatch(r"([0-9]+)(|[KMG](iB)?)", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is no size such as 16, 4096, 64KiB or 64K")
    return int(match[1]) * {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}[match[2][:1]]


def run(options: argparse.Namespace, benchmark: Callable[[Comm, argparse.Namespace], int]) -> int:
    """Call benchmark(comm, options) on every rank. The exit status."""

    def body(comm: Comm) -> int:
        return benchmark(comm, options)

    try:
        if options.transport == "threads":
            return max(threads.run(options.n, body))
        if options.transport == "mpi":
            return run_mpi(body)
        return run_torch(body, "nccl" if vars(options).get("device") == "cuda" else "gloo")
    except ImportError as error:
        return refused(f"{error}")


def refused(problem: str) -> int:
    """Say why a benchmark does not run. The exit status."""
    print(f"error: {problem}", file=sys.stderr, flush=True)
    return 2


def run_mpi(body: Callable[[Comm], int]) -> int:
    with interrupts.at_once():
        from moecomm.transports.mpi import MpiComm  # before mpi4py: it says what to install if that is missing

        world = _mpi_world()
    program = " ".join([sys.argv[0], *sys.argv[1:]])
    if world.size == 1:
        alone = "one rank has nobody to send to. Start several"
        return refused(f"{alone}: mpirun -n 64 python {program}; or without MPI: --transport threads -n 16")

    def end_all_ranks(*error: Any) -> None:
        sys.__excepthook__(*error)
        sys.stderr.flush()
        world.Abort(1)  # the others wait for this rank

    sys.excepthook = end_all_ranks
    return body(MpiComm(world))


def run_torch(body: Callable[[Comm], int], backend: str) -> int:
    from moecomm.transports.torch import TorchComm  # before torch: it says what to install if that is missing

    import torch  # isort: skip
    import torch.distributed as dist  # isort: skip

    if not {"RANK", "WORLD_SIZE"} <= os.environ.keys():
        program = " ".join([sys.argv[0], *sys.argv[1:]])
        return refused(f"--transport torch needs ranks: torchrun --nproc-per-node 4 {program}")
    if backend == "nccl":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group(backend)
    with torch.no_grad():
        status = body(TorchComm(dist.group.WORLD))
    dist.destroy_process_group()
    return status


def choose_nodes(comm: Comm, ranks_per_node: int | None) -> tuple[Nodes, int]:
    """The nodes to measure with, and on how many hosts the ranks are. Collective."""
    found = Nodes.discover(comm)
    if ranks_per_node or len(found) == 1:
        return Nodes.of_size(ranks_per_node or 8, comm.size), len(found)
    return found, len(found)


# ---- measuring -----------------------------------------------------------------------------------------------------


class Timing(NamedTuple):
    samples_us: NDArray[np.float64]  # [reps, parts of the call] the slowest rank's
    wrong: int  # rows of all ranks, in the first and the last call

    def record(self) -> Record:
        samples = self.samples_us.sum(axis=1)
        p10, median, p90 = np.percentile(samples, (10, 50, 90)).round(3).tolist()
        spread = {"time_us": median, "p10_us": p10, "p90_us": p90}
        return {**spread, "samples_us": samples.round(3).tolist(), "wrong": self.wrong}


def interleaved(
    comm: Comm,
    calls: Mapping[Key, Callable[[bool], tuple[tuple[float, ...], int]]],
    reps: int,
    tick: Callable[[], Any],
) -> dict[Key, Timing]:
    """Each repetition makes every call once, in an order drawn anew. Collective.

    calls  call(check) returns the seconds of its parts on this rank and, if asked to check, how many rows were wrong
    """
    seconds: dict[Key, list[tuple[float, ...]]] = {key: [] for key in calls}
    wrong = dict.fromkeys(calls, 0)
    order = list(calls)
    shuffle = random.Random(SEED).shuffle  # the same order on all ranks
    for rep in range(reps + 1):  # the first only warms up
        shuffle(order)
        for key in order:
            parts, num_wrong = calls[key](rep in (0, reps))
            seconds[key].append(parts)
            wrong[key] += num_wrong
            if rep > 0:
                tick()
    return {
        key: Timing(largest(comm, seconds[key][1:]) * 1e6, int(comm.all_reduce(np.array([wrong[key]]))[0]))
        for key in calls
    }


def most_sent(timed: Timed, same_node: NDArray[np.bool_], row_kinds: set[str]) -> Record:
    """Messages and bytes since `timed` was cleared: of the rank that has most of each. Collective.

    row_kinds  the kinds of all-to-all that carry rows; the others carry counts
    """
    messages, num_bytes, counts = (np.zeros(timed.size, np.int64) for _ in range(3))
    for kind in {"all_to_all", "all_to_allv"} & timed.record.keys():
        entry = timed.record[kind]
        if kind in row_kinds:
            messages += entry.messages
            num_bytes += entry.bytes
        else:
            counts += entry.messages
    numbers = {
        "messages_intra": messages[same_node].sum(),
        "messages_inter": messages[~same_node].sum(),
        "messages_counts": counts.sum(),
        "bytes_intra": num_bytes[same_node].sum(),
        "bytes_inter": num_bytes[~same_node].sum(),
    }
    most = largest(timed.inner, list(numbers.values()))
    return dict(zip(numbers, most.tolist(), strict=True))


def nic_counters() -> NDArray[np.int64]:
    """Packets and bytes that this host has sent, through every interface but the loopback."""
    lines = Path("/proc/self/net/dev").read_text().splitlines()[2:]
    fields = [line.split(":", 1)[1].split() for line in lines if line.split(":")[0].strip() != "lo"]
    return np.array([sum(int(field[9]) for field in fields), sum(int(field[8]) for field in fields)], np.int64)


def mpi_family() -> str:
    """mpich or openmpi; anything else by the first words of its own name."""
    from mpi4py import MPI

    version = MPI.Get_library_version()
    for family, word in {"openmpi": "Open MPI", "mpich": "MPICH"}.items():
        if word in version:
            return family
    return version.splitlines()[0][:40]


def largest(comm: Comm, values: ArrayLike) -> NDArray[Any]:
    """Element by element, the largest value that any rank has. Collective."""
    return np.asarray(comm.all_gather(np.asarray(values)[None])).max(axis=0)


def bandwidths(num_bytes: int, num_ranks: int, time_us: float) -> Record:
    """algbw and busbw of an all-to-all in which each rank sends num_bytes, its own share included."""
    algbw = num_bytes / (time_us * 1e3)  # bytes / ns
    return {"algbw_GBps": algbw, "busbw_GBps": algbw * (num_ranks - 1) / num_ranks}


# ---- table and JSON Lines ------------------------------------------------------------------------------------------


def report(
    comm: Comm,
    measure: Callable[[Any], Iterator[Record]],
    columns: list[Column],
    about: list[str],
    out: str | None,
    num_calls: int,
) -> list[Record]:
    """The records of measure(progress). Rank 0 prints each and appends it to `out` as soon as it comes. Collective."""
    if comm.rank > 0:
        return list(measure(None))
    ran_on = environment()
    print_header([*about, *environment_lines(ran_on)], columns)
    records = []
    progress: Progress = progress_of(num_calls, "calls")
    for record in measure(progress):
        progress.clear()  # the bar and the rows go different ways to the terminal
        print_row(record, columns)
        if out:
            append(out, record | ran_on)
        records.append(record)
    progress.close()
    return records


class Column(NamedTuple):
    key: str  # of the Record
    name: str
    unit: str
    width: int
    wide: bool = False  # left out of a table that has to fit a terminal


def shown(columns: list[Column], wide: bool) -> list[Column]:
    """The columns of a table: all of them, or those that a terminal has room for."""
    return [column for column in columns if wide or not column.wide]


def print_header(lines: Iterable[str], columns: list[Column]) -> None:
    """Lines about the run, then two lines over the columns: names and units."""
    names = "".join(f"{column.name:>{column.width}}" for column in columns)
    units = "".join(f"{column.unit:>{column.width}}" for column in columns)
    print_comment([*lines, ""])
    print(f"#{names[1:]}\n#{units[1:]}", flush=True)


def print_row(record: Record, columns: list[Column]) -> None:
    cells = []
    for key, _, _, width, _ in columns:
        value = record[key]
        text = rounded(value) if isinstance(value, float) else str(value)
        cells.append(f" {text:>{width - 1}}")
    print("".join(cells), flush=True)


def print_comment(lines: Iterable[str]) -> None:
    """Lines after a #; a long one goes on below, indented as it began."""
    for line in lines:
        indent = " " * (len(line) - len(line.lstrip()))
        broken = textwrap.wrap(line, WIDTH - 1, subsequent_indent=indent, break_on_hyphens=False) or [""]
        print("\n".join(f"#{part}" for part in broken), flush=True)


def is_fastest(record: Record, others: Iterable[Record]) -> bool:
    """Whether the run says so: its spread, p10 to p90, ends below those of all others."""
    return all(record["p90_us"] < other["p10_us"] for other in others)


def append(path: str, record: Record) -> None:
    with Path(path).open("a") as file:
        file.write(json.dumps(record, allow_nan=False) + "\n")


def replace(path: str, record: Record, same: Iterable[str]) -> None:
    """`append`, in the place of earlier records that have this one's values under the keys `same`, or lack them too."""
    wanted, file = [record.get(key) for key in same], Path(path)
    lines = file.read_text().splitlines() if file.exists() else []
    kept = [line for line in lines if [json.loads(line).get(key) for key in same] != wanted]
    unfinished = file.with_suffix(".unfinished")  # whole at any time
    unfinished.write_text("".join(line + "\n" for line in (*kept, json.dumps(record, allow_nan=False))))
    unfinished.rename(file)


def can_append(path: str, comm: Comm) -> bool:
    """Whether rank 0 can write there, known to all ranks; rank 0 says why not. Collective."""
    problem = ""
    if comm.rank == 0:
        try:
            Path(path).open("a").close()
        except OSError as error:
            problem = f"{path}: {error.strerror}"
            print(f"error: argument --out: {problem}", file=sys.stderr, flush=True)
    return not comm.all_reduce(np.array([len(problem)]))[0]


def utc_now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
