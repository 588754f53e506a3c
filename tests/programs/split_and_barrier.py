"""Rank 1 calls barrier, or is lost between split's two steps, while the others split or ask for their node.

First argument: split | node_key. Second: barrier | lost.
"""

import os
import sys
import time

from mpi4py import MPI

from moecomm import CommError
from moecomm.transports.mpi import MpiComm

call, fault = sys.argv[1:]
comm = MpiComm(MPI.COMM_WORLD, limit=2)
comm.barrier()
if comm.rank == 1 and fault == "lost":

    def never(*arguments: object) -> None:
        time.sleep(300)

    comm._split = never  # type: ignore[method-assign]
    comm._node_key = lambda: comm._barrier() or never()  # type: ignore[method-assign,func-returns-value,return-value]
try:
    if comm.rank == 1 and fault == "barrier":
        comm.barrier()
    elif call == "split":
        comm.split(0)
    else:
        comm.node_key()
    outcome = "returned"
except CommError as error:
    outcome = f"CommError: {error}"
os.write(1, f"rank {comm.rank}: {outcome}\n".encode())
time.sleep(3)
