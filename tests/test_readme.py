"""The README's programs run as printed, the first one over threads and under mpirun."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, mpirun

README = (ROOT / "README.md").read_text()
THREADS, MPI = re.findall(r"```python program=first\n(.*?)```", README, re.DOTALL)
ALONE = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
PRINTED = {f"rank {rank}: blocks from [0 1 2 3], rows from [1 2 2 3 3 3]" for rank in range(4)}


def printed(text: str) -> set[str]:
    """The lines, also where mpirun has put two ranks' on one."""
    return set(re.findall(r"rank \d: blocks from \[.*?\], rows from \[.*?\]", text))


def test_over_threads(tmp_path: Path) -> None:
    program = tmp_path / "first.py"
    program.write_text(THREADS)
    job = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, check=True)
    assert printed(job.stdout) == PRINTED


@pytest.mark.parametrize("program", ALONE, ids=lambda program: re.findall(r"import (\w+)", program)[-1])
def test_programs_that_run_alone(program: str) -> None:
    if "import torch" in program:
        pytest.importorskip("torch")
    exec(program, {"__name__": "__main__"})


def test_under_mpirun(tmp_path: Path) -> None:
    program = tmp_path / "first.py"
    program.write_text(THREADS.replace("threads.run(4, main)\n", MPI))
    job = mpirun(4, str(program))
    assert job.returncode == 0, job.stderr
    assert printed(job.stdout) == PRINTED
