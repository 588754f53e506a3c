"""Rank 1 never comes to a collective, or is killed before it (first argument: stays | killed)."""

import os
import signal
import sys
import time

import numpy as np
from mpi4py import MPI

from moecomm import CommError
from moecomm.transports.mpi import MpiComm

comm = MpiComm(MPI.COMM_WORLD, limit=2)
comm.barrier()
if comm.rank == 1:
    if sys.argv[1] == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(300)
try:
    comm.all_to_all(np.zeros((comm.size, 3)))
except CommError as error:
    os.write(1, f"first: {error}\n".encode())  # in one piece: mpirun mixes what the ranks print
try:
    comm.barrier()
except CommError as error:
    os.write(1, f"then: {error}\n".encode())
time.sleep(3)  # let every rank print before the first one aborts the job
