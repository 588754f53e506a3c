"""The C++ of csrc/cpu under AddressSanitizer with UndefinedBehaviorSanitizer, and under ThreadSanitizer.

The drivers are in tests/native; each takes a seed. They are built where they are missing or older than their sources.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import time
from functools import cache
from pathlib import Path

from case import Case, Ended, Verdict
from launch import ROOT

SANITIZERS = {
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "thread": ["-fsanitize=thread"],
}
TRANSPORTS = tuple(SANITIZERS)
"""There is no transport: in its place stands what watches."""
CPU, NATIVE, BUILD = ROOT / "csrc/cpu", ROOT / "tests/native", ROOT / "build/native"
DRIVERS = {"ring": ["node_ring.cpp"], "blocks": ["blocks.cpp"], "gate": ["gating.cpp"], "gate_baseline": ["gating.cpp"]}
OPTIONS = ["-std=c++17", "-O1", "-g", "-fno-omit-frame-pointer", "-ffp-contract=off", "-fno-math-errno", f"-I{CPU}"]
KERNELS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mfma", "-mf16c", "-mprefer-vector-width=512"],
}
"""As csrc/cpu/gating.cmake has them."""
LONGEST = 120.0


@cache
def build(sanitizer: str, driver: str) -> Path:
    """The program of a driver, newer than all sources."""
    program = BUILD / sanitizer / driver
    sources = [*CPU.glob("*.*"), *(ROOT / "csrc/gating").glob("*"), *NATIVE.glob("*")]
    if program.exists() and program.stat().st_mtime > max(path.stat().st_mtime for path in sources):
        return program
    program.parent.mkdir(parents=True, exist_ok=True)
    compiler = [os.environ.get("CXX", "c++"), *OPTIONS, *SANITIZERS[sanitizer]]
    has_all = driver == "gate" and platform.machine() in ("x86_64", "AMD64")
    objects = []
    for name, options in KERNELS.items() if driver.startswith("gate") else ():
        if has_all or name == "baseline":
            objects.append(f"{program}-{name}.o")
            macro = f"-DMOECOMM_KERNELS=kernels_{name}"
            subprocess.run(
                [*compiler, *options, macro, "-c", CPU / "gating_kernels.cpp", "-o", objects[-1]], check=True
            )
    macros = ["-DMOECOMM_X86"] if has_all else []
    files = [NATIVE / f"{driver.partition('_')[0]}.cpp", *(CPU / name for name in DRIVERS[driver])]
    subprocess.run([*compiler, *macros, *files, *objects, "-lpthread", "-o", program], check=True)
    return program


def run(case: Case) -> tuple[Verdict, Ended]:
    driver = list(DRIVERS)[case.seed % len(DRIVERS)]
    program = build(case.transport, driver)
    began = time.monotonic()
    # ThreadSanitizer of some compilers knows fewer random places of memory than the kernel uses.
    fixed = ["setarch", "-R"] if case.transport == "thread" and shutil.which("setarch") else []
    try:
        job = subprocess.run([*fixed, program, str(case.seed)], capture_output=True, text=True, timeout=LONGEST)
    except subprocess.TimeoutExpired as expired:
        output = (expired.stdout or b"").decode(errors="replace")
        return Verdict("hangs"), Ended([], 1, output, is_hung=True, text=driver)
    output = job.stdout + job.stderr
    ended = Ended([], job.returncode, output, text=driver, seconds=time.monotonic() - began)
    lines = [line for line in output.splitlines() if "ERROR" in line or "WARNING" in line or "error:" in line]
    problem = "" if job.returncode == 0 else (lines or output.splitlines() or [f"status {job.returncode}"])[0]
    return Verdict(problem), ended
