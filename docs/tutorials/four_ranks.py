"""The same model on four processes: each has a quarter of the text and two of the eight experts.

torchrun --nproc-per-node 4 docs/tutorials/four_ranks.py
"""

import torch.distributed as dist
from laptop import STEPS, TEXT, Model, loss_of, optimizer_of

from moecomm import Topology, build_groups
from moecomm.nn import reduce_gradients
from moecomm.transports.torch import TorchComm


def main():
    dist.init_process_group("gloo")
    comm = TorchComm(dist.group.WORLD, limit=60)  # seconds that a rank waits for the others
    groups = build_groups(comm, Topology(comm.size, expert=comm.size))
    model = Model(groups)
    optimizer = optimizer_of(model)
    text = TEXT.chunk(comm.size)[comm.rank]
    for step in range(STEPS):
        loss, aux_loss = loss_of(model, text)
        optimizer.zero_grad()
        (loss + 0.01 * aux_loss).backward()
        reduce_gradients(model, groups)  # experts: the sum over all tokens; the rest: the mean of the ranks
        optimizer.step()
        mean = comm.all_reduce(loss.detach()[None])[0] / comm.size
        if step % 5 == 4 and comm.rank == 0:
            print(f"step {step + 1}: loss {mean:.2f}")
    _, routing = model(text[:, :-1])
    count = comm.all_reduce(routing.count)
    if comm.rank == 0:
        print("tokens of each expert:", *count.tolist())
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
