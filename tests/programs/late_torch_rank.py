"""Rank 1 does not come to a collective of a gloo group. Arguments: rank, file for the rendezvous, which collective.

all_to_all  never
split       to connecting to the new group it comes when the other one has given up
"""

import sys
import time

import numpy as np
import torch.distributed as dist

from moecomm import CommError
from moecomm.transports import torch as transport

rank, store, call = int(sys.argv[1]), sys.argv[2], sys.argv[3]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
comm = transport.TorchComm(dist.group.WORLD, limit=1)
comm.barrier()
if rank == 1 and call == "all_to_all":
    time.sleep(300)
if rank == 1:
    new_group = transport._new_group
    transport._new_group = lambda *arguments, **options: (time.sleep(3), new_group(*arguments, **options))
try:
    if call == "all_to_all":
        comm.all_to_all(np.zeros((2, 3)))
    else:
        comm.split(0)
except CommError as error:
    print(error, flush=True)
try:
    comm.barrier()
except CommError as error:
    print("then:", error, flush=True)
