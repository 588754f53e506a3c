"""The same on GPUs, one for each process; without any, the processes use the CPU.

torchrun --nproc-per-node gpu docs/tutorials/gpus.py
"""

import torch
import torch.distributed as dist
from laptop import STEPS, TEXT, Model, loss_of, optimizer_of

from moecomm import Topology, build_groups
from moecomm.nn import reduce_gradients
from moecomm.transports.torch import TorchComm


def main():
    on_gpu = torch.cuda.is_available()
    # Counts are exchanged in host memory, rows between GPUs.
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo")
    device = torch.device("cuda", dist.get_node_local_rank()) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    comm = TorchComm(dist.group.WORLD, limit=60)
    groups = build_groups(comm, Topology(comm.size, expert=comm.size))
    model = Model(groups).to(device)
    optimizer = optimizer_of(model)
    text = TEXT.chunk(comm.size)[comm.rank].to(device)
    for step in range(STEPS):
        with torch.autocast(device.type, torch.bfloat16):
            loss, aux_loss = loss_of(model, text)
        optimizer.zero_grad()
        (loss + 0.01 * aux_loss).backward()
        reduce_gradients(model, groups)
        optimizer.step()
        if step % 5 == 4 and comm.rank == 0:
            print(f"step {step + 1}: loss of rank 0 {loss:.2f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
