"""Where a benchmark ran: commit, versions, machine."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any


def environment() -> dict[str, Any]:
    """Commit, versions and machine, as this process sees them. Starts git: for one rank alone."""
    return {"commit": commit(), "versions": versions(), "machine": machine()}


def environment_lines(environment: dict[str, Any]) -> list[str]:
    versions = ", ".join(f"{name} {number}" for name, number in environment["versions"].items() if number)
    cpu, cores, memory, kernel = environment["machine"].values()
    return [
        f"  commit: {environment['commit']}   versions: {versions}",
        f"  machine: {cpu}, {cores} cores, {memory} GiB, {kernel}",
    ]


def commit() -> str:
    """The commit of this file's repository, with -dirty behind it if tracked files have changed since."""
    command = ["git", "describe", "--always", "--dirty"]
    try:
        return subprocess.check_output(command, cwd=Path(__file__).parent, stderr=subprocess.DEVNULL, text=True).strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def versions() -> dict[str, Any]:
    """Of what this process has loaded; None: not loaded."""
    packages = ("moecomm", "numpy", "mpi4py", "torch")
    found = {name: version(name) if name in sys.modules else None for name in packages}
    return {"python": platform.python_version(), **found, "MPI library": mpi_library()}


def mpi_library() -> str | None:
    if "mpi4py.MPI" not in sys.modules:
        return None
    name, numbers = sys.modules["mpi4py.MPI"].get_vendor()
    return f"{name} {'.'.join(map(str, numbers))}"


def machine() -> dict[str, Any]:
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    kernel = f"{platform.system()} {platform.release()}"
    return {"cpu": cpu_model(), "cores": os.cpu_count(), "memory_GiB": round(memory, 1), "kernel": kernel}


def cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    model = re.search(r"^model name\s*:\s*(.*)$", text, re.MULTILINE)
    return model[1] if model else platform.processor() or platform.machine()
