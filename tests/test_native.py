"""The programs in tests/native that a sanitizer watches: they keep up with the headers of csrc/cpu."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COMPILER = os.environ.get("CXX", "c++")


@pytest.mark.skipif(shutil.which(COMPILER) is None, reason="no C++ compiler")
@pytest.mark.parametrize("source", sorted((ROOT / "tests/native").glob("*.cpp")), ids=lambda path: path.stem)
def test_compiles(source: Path) -> None:
    """-Wextra also finds a record that got a new field and is filled in without it."""
    options = ["-std=c++17", "-fsyntax-only", "-Wall", "-Wextra", "-Werror", f"-I{ROOT / 'csrc/cpu'}"]
    job = subprocess.run([COMPILER, *options, str(source)], capture_output=True, text=True)
    assert job.returncode == 0, job.stderr
