"""A test that takes too long fails alone: the tests behind it still run, also where it hangs inside C."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from conftest import ROOT, mpirun

SLOW = """
import ctypes, threading, time
import pytest
from conftest import gloo_run, mpi_run
from moecomm.transports import threads

def wait(comm):
    if comm.rank == 0:
        time.sleep(60)
    comm.barrier()
"""


def pytest_on(test: str, tmp_path: Path, *arguments: str) -> list[str]:
    """The arguments of a pytest that runs `test` and one test behind it, with this folder's conftest.py."""
    program = tmp_path / "test_program.py"
    program.write_text(f"{SLOW}\n{test}\ndef test_next(): pass\n")
    settings = [
        "-c",
        str(ROOT / "pyproject.toml"),
        f"--rootdir={tmp_path}",
        "-o",
        "timeout=1",
        "-p",
        "no:cacheprovider",
    ]
    return ["-m", "pytest", "-q", *settings, *arguments, str(program)]


def run(test: str, tmp_path: Path, *arguments: str) -> str:
    """What pytest prints. Raises AssertionError unless `test` alone has failed."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "tests")}
    command = [sys.executable, *pytest_on(test, tmp_path, "-p", "conftest", *arguments)]
    job = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment, cwd=tmp_path)
    assert "1 failed, 1 passed" in job.stdout, job.stdout + job.stderr
    return job.stdout


def test_ranks_that_are_threads(tmp_path: Path) -> None:
    assert "Timeout" in run("def test_slow(): threads.run(2, wait)", tmp_path)


def test_ranks_of_gloo(tmp_path: Path) -> None:
    """Nothing of it is left: pytest would wait for its child processes."""
    assert "Timeout" in run("def test_slow(): gloo_run(2, wait)", tmp_path)


def test_ranks_of_mpi(tmp_path: Path) -> None:
    """The rank that waits is told by the rank that was too slow."""
    mark = "@pytest.mark.mpi(min_size=2)\n"
    test = f"{mark}def test_slow(): mpi_run(2, wait, limit=20)\n{mark}"
    arguments = pytest_on(test, tmp_path, "-p", "conftest", "-m", "mpi", "--only-mpi")
    job = mpirun(2, *arguments, PYTHONPATH=str(ROOT / "tests"))
    assert "1 failed, 1 passed" in job.stdout, job.stdout + job.stderr
    assert "on rank 0 of 2" in job.stdout


def test_a_hang_inside_c(tmp_path: Path) -> None:
    """PyDLL keeps Python's lock: no thread and no signal handler of Python can run while the mutex is awaited."""
    lines = ["lib, mutex = ctypes.PyDLL(None), ctypes.create_string_buffer(64)", *["lib.pthread_mutex_lock(mutex)"] * 2]
    printed = run("\n    ".join(["def test_hanging():", *lines]), tmp_path, "-n", "1", "-o", "faulthandler_timeout=2")
    assert "crashed while running" in printed
