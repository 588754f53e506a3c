"""Programs for the type checker alone, as `make lint` runs it: the right ones pass, and each wrong one is refused.

A wrong line carries an ignore of the error that it must give. An ignore that is not needed is an error here, so a wrong
line that the checker accepts fails the lint.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from moecomm import AutoAllToAll, Comm, FlatAllToAll, HierarchicalAllToAll, Nodes, RoutedExchange
from moecomm.all_to_all import Route, SharedAllToAll
from moecomm.transports.wrappers import Checked, Timed


class IntracommOfMpi4py:
    """The methods by which a communicator of mpi4py is known."""

    def Get_rank(self) -> int:  # noqa: N802
        return 0

    def Get_size(self) -> int:  # noqa: N802
        return 1


class ProcessGroupOfTorch:
    """And those of torch's group."""

    def rank(self) -> int:
        return 0

    def size(self) -> int:
        return 1


def what_goes_in_comes_out(comm: Comm, x: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    a2a = HierarchicalAllToAll(comm, nodes=Nodes.of_size(2, 4))
    route: Route = a2a.route([1, 1])
    rows, counts = a2a.rows(x, np.ones(4, np.int64))
    total: npt.NDArray[np.int64] = counts + comm.all_gather(counts)
    wrong: npt.NDArray[np.int64] = a2a(x)  # type: ignore[arg-type]
    del total, wrong
    return comm.all_reduce(a2a.send_back(a2a.send(rows, route), route))


def groups_of_ranks() -> None:
    FlatAllToAll(IntracommOfMpi4py())
    AutoAllToAll(ProcessGroupOfTorch())
    FlatAllToAll("x")  # type: ignore[arg-type]
    HierarchicalAllToAll(7)  # type: ignore[arg-type]
    SharedAllToAll(np.zeros(3))  # type: ignore[arg-type]


def arguments(comm: Comm, a2a: FlatAllToAll) -> None:
    comm.split(color=1, key=2)
    comm.split("red")  # type: ignore[arg-type]
    comm.all_to_all([1.0, 2.0])  # type: ignore[type-var]
    comm.all_to_all(np.zeros(4), send_counts=["1"], recv_counts=[1])  # type: ignore[list-item]
    a2a.send(np.zeros(4), [1, 2])  # type: ignore[arg-type]
    HierarchicalAllToAll(comm, nodes=[[0, 1]])  # type: ignore[arg-type]
    RoutedExchange(a2a, experts_per_rank=2, send="rows")  # type: ignore[arg-type]
    RoutedExchange(comm, experts_per_rank=2)  # type: ignore[arg-type]


def wrappers(comm: Comm) -> float:
    timed = Timed(Checked(comm))
    Checked("comm")  # type: ignore[arg-type]
    return timed.record["barrier"].seconds
