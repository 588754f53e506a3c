"""What all benchmarks share: options, starting the ranks, the slowest rank's statistics, the table, the JSON Lines."""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Iterable
from contextlib import redirect_stderr, redirect_stdout
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moecomm import Comm
from moecomm.transports import threads

Record = dict[str, Any]
"""One measured row, as it is written: where a key has a unit, the unit ends the key."""


# ---- options and ranks ---------------------------------------------------------------------------------------------


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


def byte_sizes(text: str) -> list[int]:
    """16,4KiB,1MiB -> [16, 4096, 1048576]"""
    units = {"": 1, "KiB": 2**10, "MiB": 2**20}
    matches = [re.fullmatch(r"([0-9]+)(|KiB|MiB)", part) for part in text.split(",")]
    if not all(matches):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of sizes such as 16,4096,64KiB")
    return [int(match[1]) * units[match[2]] for match in matches if match]


def run_threads(size: int, body: Callable[[Comm], int]) -> int:
    return max(threads.run(size, body))


def run_mpi(body: Callable[[Comm], int]) -> int:
    from moecomm.transports.mpi import MpiComm  # before mpi4py: it says what to install if that is missing

    world = _mpi_world()

    def end_all_ranks(*error: Any) -> None:
        sys.__excepthook__(*error)
        sys.stderr.flush()
        world.Abort(1)  # the others wait for this rank

    sys.excepthook = end_all_ranks
    return body(MpiComm(world))


def run_torch(body: Callable[[Comm], int]) -> int:
    import torch.distributed as dist

    from moecomm.transports.torch import TorchComm

    dist.init_process_group("gloo")
    status = body(TorchComm(dist.group.WORLD))
    dist.destroy_process_group()
    return status


# ---- statistics ----------------------------------------------------------------------------------------------------


def largest(comm: Comm, values: ArrayLike) -> NDArray[Any]:
    """Element by element, the largest value that any rank has. Collective."""
    return np.asarray(comm.all_gather(np.asarray(values)[None])).max(axis=0)


def time_statistics(comm: Comm, seconds: NDArray[np.float64]) -> Record:
    """seconds [reps]: this rank's; the slowest rank's count. Collective."""
    samples = largest(comm, seconds) * 1e6
    p10, median, p90 = np.percentile(samples, (10, 50, 90)).round(3).tolist()
    return {"time_us": median, "p10_us": p10, "p90_us": p90, "samples_us": samples.round(3).tolist()}


def bandwidths(num_bytes: int, num_ranks: int, time_us: float) -> Record:
    """algbw and busbw of an all-to-all in which each rank sends num_bytes, its own share included."""
    algbw = num_bytes / (time_us * 1e3)  # bytes / ns
    return {"algbw_GBps": algbw, "busbw_GBps": algbw * (num_ranks - 1) / num_ranks}


# ---- table and JSON Lines ------------------------------------------------------------------------------------------


class Column(NamedTuple):
    key: str  # of the Record
    name: str
    unit: str
    width: int
    format: str = ""


def print_header(lines: Iterable[str], columns: list[Column]) -> None:
    """Lines about the run, then two lines over the columns: names and units."""
    names = "".join(f"{column.name:>{column.width}}" for column in columns)
    units = "".join(f"{column.unit:>{column.width}}" for column in columns)
    print_comment([*lines, "", names[1:], units[1:]])


def print_row(record: Record, columns: list[Column]) -> None:
    print("".join(f"{record[key]:>{width}{format}}" for key, _, _, width, format in columns), flush=True)


def print_comment(lines: Iterable[str]) -> None:
    print("\n".join(f"#{line}" for line in lines), flush=True)


def append(path: str, record: Record) -> None:
    with Path(path).open("a") as file:
        file.write(json.dumps(record, allow_nan=False) + "\n")


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


# ---- environment ---------------------------------------------------------------------------------------------------


def environment() -> Record:
    """Commit, versions and machine, as this process sees them. Starts git: for one rank alone."""
    return {"commit": commit(), "versions": versions(), "machine": machine()}


def environment_lines(environment: Record) -> list[str]:
    versions = ", ".join(f"{name} {number}" for name, number in environment["versions"].items() if number)
    cpu, cores, memory, kernel = environment["machine"].values()
    return [
        f"  commit: {environment['commit']}   versions: {versions}",
        f"  machine: {cpu}, {cores} cores, {memory} GiB, {kernel}",
    ]


def commit() -> str:
    """The commit of this file's repository, with -dirty behind it if tracked files have changed since."""
    command = ["git", "describe", "--always", "--dirty"]
    try:
        return subprocess.check_output(command, cwd=Path(__file__).parent, stderr=subprocess.DEVNULL, text=True).strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def versions() -> Record:
    """Of what this process has loaded; None: not loaded."""
    packages = ("moecomm", "numpy", "mpi4py", "torch")
    found = {name: version(name) if name in sys.modules else None for name in packages}
    return {"python": platform.python_version(), **found, "MPI library": mpi_library()}


def mpi_library() -> str | None:
    if "mpi4py.MPI" not in sys.modules:
        return None
    name, numbers = sys.modules["mpi4py.MPI"].get_vendor()
    return f"{name} {'.'.join(map(str, numbers))}"


def machine() -> Record:
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    kernel = f"{platform.system()} {platform.release()}"
    return {"cpu": cpu_model(), "cores": os.cpu_count(), "memory_GiB": round(memory, 1), "kernel": kernel}


def cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    model = re.search(r"^model name\s*:\s*(.*)$", text, re.MULTILINE)
    return model[1] if model else platform.processor() or platform.machine()


def utc_now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
