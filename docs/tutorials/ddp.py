"""A model inside DistributedDataParallel: it averages all gradients but those of the experts.

torchrun --nproc-per-node 2 docs/tutorials/ddp.py
"""

import torch.distributed as dist
from laptop import STEPS, TEXT, Model, loss_of, optimizer_of
from torch.nn.parallel import DistributedDataParallel

from moecomm import Topology, build_groups
from moecomm.nn import exclude_experts, reduce_gradients
from moecomm.transports.torch import TorchComm


def main():
    dist.init_process_group("gloo")
    comm = TorchComm(dist.group.WORLD, limit=60)
    groups = build_groups(comm, Topology(comm.size, expert=comm.size))
    model = Model(groups)
    wrapped = DistributedDataParallel(exclude_experts(model))
    optimizer = optimizer_of(model)
    text = TEXT.chunk(comm.size)[comm.rank]
    for step in range(STEPS):
        loss, aux_loss = loss_of(wrapped, text)
        optimizer.zero_grad()
        (loss + 0.01 * aux_loss).backward()
        reduce_gradients(model, groups)  # for the experts; averaging the others again changes nothing
        optimizer.step()
        mean = comm.all_reduce(loss.detach()[None])[0] / comm.size
        if step % 5 == 4 and comm.rank == 0:
            print(f"step {step + 1}: loss {mean:.2f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
