"""Rank 1 never comes to a collective of a gloo group. Arguments: rank, file for the rendezvous."""

import sys
import time

import numpy as np
import torch.distributed as dist

from moecomm import CommError
from moecomm.transports.torch import TorchComm

rank, store = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
comm = TorchComm(dist.group.WORLD, limit=1)
comm.barrier()
if rank == 1:
    time.sleep(300)
try:
    comm.all_to_all(np.zeros((2, 3)))
except CommError as error:
    print(error, flush=True)
