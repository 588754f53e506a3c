"""The gate's C++ kernels, built here for every instruction set, give the same bits."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path

import pytest
from conftest import PROGRAMS, ROOT

FLAGS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mfma", "-mf16c", "-mprefer-vector-width=512"],
}


@pytest.mark.slow
def test_every_instruction_set_gives_the_same_bits(tmp_path: Path) -> None:
    x86 = platform.machine() in ("x86_64", "AMD64")
    sources = ROOT / "csrc/cpu"
    compiler = ["c++", "-std=c++17", "-O2", "-ffp-contract=off", "-fno-math-errno", "-Wall", "-Wextra", "-Werror"]
    if x86:
        compiler.append("-DMOECOMM_X86")
    builds = []
    for name, flags in FLAGS.items():
        if x86 or name == "baseline":
            command = [
                *compiler,
                *flags,
                f"-DMOECOMM_KERNELS=kernels_{name}",
                "-c",
                str(sources / "gating_kernels.cpp"),
            ]
            builds.append((subprocess.Popen([*command, "-o", f"{name}.o"], cwd=tmp_path), f"{name}.o"))
    assert all(build.wait() == 0 for build, _ in builds)
    parts = [str(PROGRAMS / "gating_kernels.cpp"), str(sources / "gating.cpp"), *(name for _, name in builds)]
    subprocess.run([*compiler, f"-I{sources}", *parts, "-lpthread", "-o", "same"], cwd=tmp_path, check=True)
    job = subprocess.run([tmp_path / "same"], capture_output=True, text=True)
    assert job.returncode == 0, job.stdout
