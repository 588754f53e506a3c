"""The README's program runs as printed, over threads and under mpirun."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
from conftest import ROOT, mpirun

from moecomm import Comm
from moecomm.transports import threads

THREADS, MPI, EXCHANGE = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
PRINTED = {f"rank {rank}: blocks from [0 1 2 3], rows from [1 2 2 3 3 3]" for rank in range(4)}


def printed(text: str) -> set[str]:
    """The lines, also where mpirun has put two ranks' on one."""
    return set(re.findall(r"rank \d: blocks from \[.*?\], rows from \[.*?\]", text))


def test_over_threads(tmp_path: Path) -> None:
    program = tmp_path / "first.py"
    program.write_text(THREADS)
    job = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, check=True)
    assert printed(job.stdout) == PRINTED


def test_the_exchange() -> None:
    names = {"x": np.ones((3, 2)), "logits": np.eye(3, 8, 1, np.float32)}

    def body(comm: Comm) -> None:
        mine = dict(names, comm=comm, my_experts=lambda rows, rows_per_expert: 2 * rows)
        exec(EXCHANGE, mine)
        np.testing.assert_allclose(mine["y"], 2, rtol=1e-6)

    threads.run(4, body)


def test_under_mpirun(tmp_path: Path) -> None:
    program = tmp_path / "first.py"
    program.write_text(THREADS.replace("threads.run(4, main)\n", MPI))
    job = mpirun(4, str(program))
    assert job.returncode == 0, job.stderr
    assert printed(job.stdout) == PRINTED
