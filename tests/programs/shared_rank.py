"""Rank 1 fails in, or never comes to, an all-to-all through shared memory: mpirun -n 4 ... HOW LIMIT

how    stays | killed | raises, before the call; killed_inside: in the middle of it
limit  seconds, or none

Prints the names of the memory that is shared, and what the other ranks raise.
"""

import os
import re
import signal
import sys
import time
from pathlib import Path

import numpy as np
from mpi4py import MPI

from moecomm import CommError, Nodes
from moecomm.all_to_all import SharedAllToAll
from moecomm.transports.mpi import MpiComm

how, limit = sys.argv[1:]
comm = MpiComm(MPI.COMM_WORLD, limit=None if limit == "none" else float(limit))
a2a = SharedAllToAll(comm, Nodes.of_size(2, comm.size))
x = np.zeros((comm.size, 1 << 22), np.uint8)
a2a(x)
names = set(re.findall("memfd:(moecomm-[0-9a-f]+)", Path("/proc/self/maps").read_text()))
os.write(1, "".join(f"memory: {name}\n" for name in names).encode())  # in one piece: mpirun mixes what ranks print
comm.barrier()
if comm.rank == 1:
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "killed_inside":
        signal.setitimer(signal.ITIMER_REAL, 0.02)  # its handler is to die
        while True:
            a2a(x)
    if how == "raises":
        raise KeyError("before the call")
    time.sleep(300)
try:
    while True:
        a2a(x)
except CommError as error:
    os.write(1, f"first: {error}\n".encode())
try:
    a2a(x)
except CommError as error:
    os.write(1, f"then: {error}\n".encode())
time.sleep(3)  # let every rank print before the first one aborts the job
