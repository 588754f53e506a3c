"""Rank 0 is interrupted inside a collective that rank 1 comes to later, and goes on with another one.

First argument: which collective. Prints what each rank has got of the first, and of the one behind it.
"""

import os
import signal
import sys
import time

import numpy as np
from mpi4py import MPI

from moecomm import CommError, FlatAllToAll, HierarchicalAllToAll, Nodes, RoutedExchange, Routing
from moecomm.all_to_all import SharedAllToAll
from moecomm.transports.mpi import MpiComm


class InterruptedError(Exception):
    """What the handler of the signal raises; no kind of CommError, ValueError or RuntimeError."""


def interrupt(number: int, frame: object) -> None:
    raise InterruptedError("by a signal")


comm = MpiComm(MPI.COMM_WORLD, limit=2)
nodes = Nodes.of_size(2, comm.size)
exchange = RoutedExchange(FlatAllToAll(comm), 1)
routing = Routing(np.arange(comm.size).reshape(1, -1), np.ones((1, comm.size), np.float32))
calls = {
    "all_to_all": comm.all_to_all,
    "all_reduce": comm.all_reduce,
    "flat": FlatAllToAll(comm),
    "hierarchical": HierarchicalAllToAll(comm, nodes),
    "shared": SharedAllToAll(comm, nodes),
    "dispatch": lambda x: exchange.dispatch(x[:1], routing)[0],
}
call = calls[sys.argv[1]]
call(np.full((comm.size, 3), comm.rank))  # the first call compares the arguments
later = FlatAllToAll(MPI.COMM_WORLD)  # of the same communicator, made before


def new(rows: np.ndarray) -> np.ndarray:
    """Made after the interrupt."""
    return FlatAllToAll(MPI.COMM_WORLD)(rows)


turns = ("first", call), ("then", comm.all_to_all), ("later", later), ("new", new)
comm.barrier()
if comm.rank == 0:
    signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.5)
elif comm.rank == 1:
    time.sleep(1.2)
for name, one in turns:
    try:
        rows = one(np.full((comm.size, 3), 100 * (name != "first") + comm.rank))
        outcome = f"got {rows.reshape(-1).tolist()}"
    except (CommError, InterruptedError) as error:
        outcome = f"{type(error).__name__}: {error}"
    os.write(1, f"rank {comm.rank} {name}: {outcome}\n".encode())  # in one piece: mpirun mixes what the ranks print
time.sleep(6)  # let every rank print before the first one aborts the job
