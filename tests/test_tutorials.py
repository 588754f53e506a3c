"""The files of docs/tutorials print what the pages that show them say."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

SHOWN = re.compile(r"```sh\n((?:python|torchrun)[^\n]* docs/tutorials/\S+\.py)\n```\n\n```text\n(.*?)```\n", re.DOTALL)
RUNS = []
for page in sorted((ROOT / "docs").glob("*.md")):
    for match in SHOWN.finditer(page.read_text()):
        RUNS.append(pytest.param(match[1], match[2], id=f"{page.stem}-{match[1].rpartition('/')[2]}"))


def command(line: str) -> list[str]:
    """What a reader types, with this Python. Ranks meet at a free port: other jobs may run beside this one."""
    name, *arguments = shlex.split(line)
    if name == "python":
        return [sys.executable, *arguments]
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", *arguments]


@pytest.mark.slow
@pytest.mark.parametrize(("line", "text"), RUNS)
def test_prints(line: str, text: str) -> None:
    pytest.importorskip("torch")
    job = subprocess.run(command(line), cwd=ROOT, capture_output=True, text=True, check=False)
    assert job.returncode == 0, job.stderr
    assert job.stdout == text


def test_every_file_is_shown_and_run() -> None:
    text = "".join(page.read_text() for page in (ROOT / "docs").glob("*.md"))
    for file in (ROOT / "docs" / "tutorials").glob("*.py"):
        assert f"```{{literalinclude}} tutorials/{file.name}" in text
        assert f"](tutorials/{file.name})" in text  # for viewers that show no included files
        assert any(file.name in Path(run.values[0]).name for run in RUNS), file.name
