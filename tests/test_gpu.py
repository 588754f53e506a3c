"""The list of what needs a GPU is complete, and its commands exist."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
from conftest import PROGRAMS, ROOT

LISTED = subprocess.run(
    [sys.executable, str(PROGRAMS / "gpu.py")], capture_output=True, text=True, check=True
).stdout.splitlines()[1:]


@pytest.mark.parametrize("line", LISTED)
def test_files_exist(line: str) -> None:
    for file in re.findall(r"(?:tests|bench)/\S+\.(?:py|jsonl)", line):
        assert (ROOT / file).exists(), file


def test_every_program_that_uses_cuda_is_listed() -> None:
    """A program is a file that reads arguments. Those that need a GPU name torch.cuda, cupy or NCCL.

    bench/harness.py reads arguments for other programs.
    """
    uses_cuda = re.compile(r"torch\.cuda\.\w|import cupy|\"nccl\"|choices=\(\"cpu\", \"cuda\"\)")
    for file in [*PROGRAMS.glob("*.py"), *(ROOT / "bench").glob("*.py")]:
        source = file.read_text()
        if file.name not in ("gpu.py", "harness.py") and "parse_args(" in source and uses_cuda.search(source):
            name = str(file.relative_to(ROOT))
            assert any(name in line for line in LISTED), f"{name} is not in tests/programs/gpu.py"


def test_every_record_from_a_gpu_is_listed() -> None:
    for file in (ROOT / "bench" / "results").glob("*h200*.jsonl"):
        assert any(file.name in line for line in LISTED), f"{file.name} is not in tests/programs/gpu.py"
