"""What the benchmarks print, ask for and refuse; what they measure is the business of their own checks."""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from subprocess import PIPE

import pytest
from conftest import mpirun

from moecomm.train import progress

BENCH = Path(__file__).parents[1] / "bench"
sys.path.insert(0, str(BENCH))
import alltoall  # noqa: E402
import harness  # noqa: E402


def run(*command: str, **env: str) -> subprocess.CompletedProcess[str]:
    """A benchmark of bench/, in a process of its own, with its output in pipes."""
    name, *options = command
    line = [sys.executable, str(BENCH / name), *options]
    return subprocess.run(line, capture_output=True, text=True, timeout=100, env={**os.environ, **env})


def test_progress_without_a_terminal_is_a_plain_line_every_ten_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    now = 0.0
    lines = progress.ProgressLines(100, "calls", done=20, clock=lambda: now)
    lines.set_postfix({"loss": "1.5"})
    for _ in range(25):
        now += 1
        lines.update(2)
    lines.clear()
    lines.close()
    said = capsys.readouterr().err
    assert said == "40 of 100 calls, 10 s, loss 1.5\n60 of 100 calls, 20 s, loss 1.5\n"


def test_a_bar_is_for_terminals_alone() -> None:
    assert isinstance(progress.progress_of(3, "calls"), progress.ProgressLines)


def test_rows_have_three_digits_and_stand_on_lines_of_their_own(tmp_path: Path) -> None:
    options = ["--transport", "threads", "-n", "2", "-b", "8", "-e", "64", "--reps", "2", "--tune", "0"]
    job = run("alltoall.py", *options, "--out", str(tmp_path / "rows.jsonl"))
    assert job.returncode == 0, job.stderr
    assert "\r" not in job.stdout + job.stderr
    assert max(map(len, job.stdout.splitlines())) <= 80
    rows = [line.split() for line in job.stdout.splitlines() if not line.startswith("#")]
    assert [row[:2] for row in rows] == [
        [size, name] for size in ("16", "32", "64") for name in ("flat", "hierarchical", "shared", "auto")
    ]
    for row in rows:
        for number in row[3:7]:
            assert len(re.sub(r"^0*", "", number.replace(",", "").replace(".", "")).rstrip("0")) <= 3


def test_a_table_that_is_not_wide_fits_a_terminal() -> None:
    import exchange

    for columns in (alltoall.COLUMNS, exchange.COLUMNS):
        assert sum(column.width for column in harness.shown(columns, wide=False)) <= 80
        assert harness.shown(columns, wide=True) == columns


def test_the_fastest_is_marked_only_where_spreads_do_not_overlap() -> None:
    def record(size: int, name: str, p10: float, p90: float) -> harness.Record:
        return {"bytes_per_pair": size, "algorithm": name, "time_us": (p10 + p90) / 2, "p10_us": p10, "p90_us": p90}

    records = [
        record(16, "mpi", 10, 20),
        record(16, "flat", 1, 9),
        record(64, "mpi", 10, 20),
        record(64, "flat", 1, 10),
        record(256, "mpi", 1, 3),
        record(256, "flat", 4, 5),
    ]
    table = [line.split() for line in alltoall.speeds(records)[-3:]]
    assert table == [["16", "1.00", "3.00*"], ["64", "1.00", "2.73"], ["256", "1.00*", "0.444"]]
    # With nothing to compare there is no fastest.
    assert "*" not in "".join(alltoall.speeds(records[:1])[-1:])


@pytest.mark.parametrize(
    ("first", "last", "factor", "sizes"),
    [
        (8, 64, 2, [16, 32, 64]),
        (8, 64 << 10, 8, [16, 64, 512, 4096, 32768]),
        (1, 5, 2, [16]),
        (16, 100, 3, [16, 48]),
        (50, 100, 2, [64, 112]),
        (100, 100, 2, [112]),
    ],
)
def test_a_sweep_is_that_of_nccl_tests_in_whole_rows(first: int, last: int, factor: int, sizes: list[int]) -> None:
    assert harness.sweep(first, last, factor) == sizes


def test_sizes_have_the_letters_of_nccl_tests_too() -> None:
    assert harness.byte_sizes("16,4KiB,64K,1M,1MiB") == [16, 4096, 65536, 2**20, 2**20]
    for text in ("", "4k", "1.5K", "-16", "KiB"):
        with pytest.raises(argparse.ArgumentTypeError, match="no size"):
            harness.byte_size(text)


THREADS = ("--transport", "threads", "-n", "4")
LACKING = [
    (["alltoall.py", *THREADS, "--tune", "-1"], "--tune: '-1' is no number of seconds >= 0"),
    (["alltoall.py", *THREADS, "-b", "8"], "-b 8 -e 64K -f 2"),
    (["alltoall.py", *THREADS, "-b", "8", "-e", "64", "--sizes", "16"], "exclude each other"),
    (["alltoall.py", *THREADS, "-b", "8", "-e", "64", "-f", "1"], "-f: '1' is no whole number >= 2"),
    (["alltoall.py"], "mpirun -n 64 python .*alltoall.py; or without MPI: --transport threads"),
    (["exchange.py", "--tensor", "1"], "mpirun -n 64 python .*exchange.py --tensor 1"),
    (["exchange.py", *THREADS, "--tensor", "8"], "--tensor 8 on 4 ranks: .* valid: 1, 2, 4"),
    (["alltoall.py", "--transport", "torch"], "torchrun --nproc-per-node 4 .*alltoall.py --transport torch"),
    (["forced.py", "-n", "4", "--out", "/dev/null"], "is not up: `cluster.py up`|only root|ip"),
]
"""(command, what its one line of output says)"""


@pytest.mark.parametrize(("command", "says"), LACKING, ids=lambda value: str(value)[:60])
def test_what_does_not_fit_is_said_in_one_line_with_what_to_do(command: list[str], says: str) -> None:
    job = run(*command)
    assert job.returncode == 2, job.stderr
    assert re.search(says, job.stderr), job.stderr
    assert job.stderr.count("\n") == 1 and not job.stdout


def test_the_gates_benchmark_without_a_gpu_says_which_needs_none() -> None:
    pytest.importorskip("torch")
    job = run("gating.py", CUDA_VISIBLE_DEVICES="")
    assert (job.returncode, job.stderr.count("\n")) == (2, 1)
    assert "python bench/gating_cpu.py" in job.stderr


def test_an_exchange_on_four_ranks_takes_the_tensor_sizes_that_fit() -> None:
    job = run("exchange.py", *THREADS, "--reps", "2", "--tokens", "8", "--hidden", "4")
    assert job.returncode == 0, job.stderr
    assert max(map(len, job.stdout.splitlines())) <= 80
    rows = [line.split() for line in job.stdout.splitlines() if not line.startswith("#")]
    assert {row[0] for row in rows} == {"1", "2", "4"}


def test_ctrl_c_ends_a_benchmark_over_threads_with_one_line() -> None:
    command = [sys.executable, str(BENCH / "alltoall.py"), *THREADS, "--reps", "100000", "--sizes", "16"]
    with subprocess.Popen(command, stdout=PIPE, stderr=PIPE, text=True) as job:
        assert job.stdout is not None
        # What it prints before the first call.
        while not job.stdout.readline().startswith("#(a pair)"):
            pass
        job.send_signal(signal.SIGINT)
        _, said = job.communicate(timeout=60)
    assert (job.returncode, said) == (130, "interrupted\n")


@pytest.mark.skipif(importlib.util.find_spec("mpi4py") is None, reason="needs mpi4py")
def test_ctrl_c_ends_ranks_inside_of_mpi() -> None:
    """A rank that waits in a barrier comes to no Python code before its process ends."""
    program = (
        f"import os, signal, sys, threading; sys.path.insert(0, {str(BENCH)!r}); import interrupts\n"
        "interrupts.end_at_interrupt()\n"
        "from mpi4py import MPI\n"
        "rank = MPI.COMM_WORLD.rank\n"
        "print(*interrupts.segments(), flush=True)\n"
        "interrupt = lambda: os.kill(os.getpid(), signal.SIGINT)\n"
        "threading.Timer(1.0, interrupt).start() if rank == 0 else None\n"
        "MPI.COMM_WORLD.Barrier() if rank == 0 else threading.Event().wait()\n"
    )
    job = mpirun(2, "-c", program)
    assert job.returncode != 0
    assert "interrupted\n" in job.stderr and "Traceback" not in job.stderr
    assert not any(Path(path).exists() for path in job.stdout.split())


def test_make_alone_prints_help_and_makes_nothing() -> None:
    makefile = BENCH.parent / "Makefile"
    if shutil.which("make") is None:
        pytest.skip("needs make")
    job = subprocess.run(["make", "-f", str(makefile)], capture_output=True, text=True, cwd=BENCH.parent, timeout=60)
    assert job.returncode == 0, job.stderr
    phony = re.search(r"^\.PHONY: (.*)$", makefile.read_text(), re.MULTILINE)
    assert phony
    listed = re.findall(r"make ([a-z-]+)", job.stdout)
    # The two halves of `make test` go without saying.
    assert set(phony[1].split()) - set(listed) == {"help", "test-threads", "test-mpi"}
