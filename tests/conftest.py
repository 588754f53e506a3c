"""How the tests start ranks: as threads, as MPI processes (under mpirun), or as forked processes with gloo.

One failing rank must not hang the rest: `mpi_run` and `gloo_run` give every collective a time limit and bring the error
of one rank to all. pyproject.toml has two limits on the time of a test. At `timeout` seconds the test fails, and the
run goes on. A test that hangs inside C cannot be failed: at `faulthandler_timeout` seconds its process prints the stack
of each thread and exits. pytest-xdist then reports that test and starts another worker for the rest; an MPI job ends.
"""

from __future__ import annotations

import faulthandler
import os
import shutil
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moecomm import Comm

# transformers reads files by several threads. In a forked process they make torch's pool of threads anew at once, which
# is no longer there for some of them.
os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"
LIMIT = 100.0
"""Seconds that a collective of `mpi_run` or `gloo_run` waits for the other ranks."""
Body = Callable[[Comm], object]


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--only-mpi"):
        from mpi4py import MPI

        if MPI.COMM_WORLD.rank > 0:  # every rank meets every error, so rank 0's report is the report
            config.pluginmanager.unregister(name="terminalreporter")


def mpi_run(size: int, body: Body, limit: float | None = LIMIT) -> None:
    """body(comm) on the first `size` ranks of the world. Called by all; raises on all if one rank raised."""
    from mpi4py import MPI

    from moecomm.transports.mpi import MpiComm

    world = MPI.COMM_WORLD
    if world.size < size:
        raise ValueError(f"mpi_run: {size} ranks wanted, mpirun started {world.size}")
    ranks = world.Split(0 if world.rank < size else 1)
    problem = None
    if world.rank < size:
        try:
            body(MpiComm(ranks, limit=limit))
        except (Exception, pytest.fail.Exception):  # the latter: the test has taken too long
            problem = f"on rank {world.rank} of {size}:\n{traceback.format_exc()}"
    problems = [text for text in world.allgather(problem) if text]
    if problems:
        pytest.fail("\n".join(problems), pytrace=False)
    ranks.Free()


def gloo_run(size: int, body: Body) -> None:
    """body(comm) on `size` forked processes of a gloo group."""
    import tempfile

    import torch.multiprocessing as mp

    # A process that is forked while pytest's own timer runs inherits a lock that nothing releases, and waits for it
    # when it starts a timer; the ranks have their limits.
    faulthandler.cancel_dump_traceback_later()
    with tempfile.TemporaryDirectory() as folder:
        processes = mp.start_processes(_gloo_rank, (size, folder, body), size, join=False, start_method="fork")
        try:
            while not processes.join():  # raises the traceback of a rank that failed
                pass
        finally:
            for process in processes.processes:
                process.kill()  # does nothing to a process that has ended


def _gloo_rank(rank: int, size: int, folder: str, body: Body) -> None:
    import torch
    import torch.distributed as dist

    from moecomm.transports.torch import TorchComm

    # The threads of torch's pool, if the parent had used it, are not there after a fork: a rank would wait for them.
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    body(TorchComm(dist.group.WORLD, limit=LIMIT))
    dist.barrier()
    dist.destroy_process_group()


def check_group_of_a_library(ranks: Any) -> None:
    """All that takes a Comm takes `ranks`, a group of four of another library, and does the same with it."""
    from moecomm import FlatAllToAll, Nodes, RoutedExchange, TensorParallelExchange, Topology, build_groups
    from moecomm.cost import measure
    from moecomm.transports import as_comm

    comm = as_comm(ranks)
    nodes = Nodes.discover(ranks)
    assert nodes == Nodes.discover(comm)
    groups = build_groups(ranks, Topology(comm.size, tensor=2))
    assert [groups.tensor.size, groups.world.size] == [2, comm.size]
    assert measure(ranks, nodes).copy_bandwidth > 0
    # All ranks have the same tokens; each is a lane of its own, with all experts.
    alone = comm.split(comm.rank)
    exchange = TensorParallelExchange(RoutedExchange(FlatAllToAll(alone), 2), ranks)
    assert exchange.tensor.size == comm.size
    groups.free()
    alone.free()


def mpirun(num_ranks: int, *command: str, timeout: float = 60, **env: str) -> subprocess.CompletedProcess[str]:
    """`mpirun -n num_ranks python command...`, and what it printed."""
    launcher = shutil.which("mpirun", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert launcher, "mpirun is not installed: pip install 'moecomm[mpich]'"
    arguments = [launcher, "-n", str(num_ranks), sys.executable, *command]
    return subprocess.run(arguments, capture_output=True, text=True, timeout=timeout, env={**os.environ, **env})


def check_limits(name: str, use: Callable[[Any], object]) -> None:
    """`use(limit)` takes what is a number of seconds, and refuses the rest in the words of all transports.

    name  what the errors begin with
    """
    wanted = "expected seconds > 0, at most 1e+09, or None to wait without a limit"
    for limit in (0, -1, -0.5, float("inf"), float("nan"), 1e10, 10**400, True, "3", [1], np.bool_(True)):
        with pytest.raises((TypeError, ValueError)) as caught:
            use(limit)
        assert str(caught.value) == f"{name}: limit is {limit!r}, {wanted}"
        assert isinstance(caught.value, TypeError) == (type(limit) not in (int, float))
    for limit in (50, 50.5, 1e9, np.float32(50), np.int64(50), None):
        use(limit)


PROGRAMS = Path(__file__).parent / "programs"
ROOT = Path(__file__).parent.parent
