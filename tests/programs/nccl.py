"""The conformance suites over NCCL, for a machine with GPUs: torchrun --nproc-per-node 2 tests/programs/nccl.py

With more ranks than GPUs, give each rank beyond a GPU's first another NCCL_HOSTID: then NCCL takes it for a rank on
another node. `--ranks-per-host G` does that before NCCL starts: ranks 0 .. G-1 are host 0, and so on.
"""

import argparse
import os
import socket

import numpy as np
import torch
import torch.distributed as dist

from moecomm import (
    FlatAllToAll,
    HierarchicalAllToAll,
    Nodes,
    RoutedExchange,
    Routing,
    TensorParallelExchange,
    Topology,
    build_groups,
    testing,
)
from moecomm.transports.torch import TorchComm
from moecomm.transports.wrappers import Checked, Timed

options = argparse.ArgumentParser(description=__doc__)
options.add_argument("--ranks-per-host", type=int)
ranks_per_host = options.parse_args().ranks_per_host
rank = int(os.environ["RANK"])
if ranks_per_host:
    os.environ["NCCL_HOSTID"] = f"{socket.gethostname()}-{rank // ranks_per_host}"
torch.cuda.set_device(rank % torch.cuda.device_count())
dist.init_process_group("nccl", device_id=torch.device("cuda", torch.cuda.current_device()))
comm = TorchComm(dist.group.WORLD)


def on_gpu(array: np.ndarray) -> torch.Tensor:
    """A copy with the same strides, so that non-contiguous arrays stay so."""
    return torch.from_numpy(array).cuda()


def here(size: int, body: testing.Callable) -> None:
    body(comm)


for make in (on_gpu, torch.from_numpy, np.asarray):
    testing.check_comm(here, sizes=[comm.size], make=make)
    for wrapped in (comm, Checked(comm), Timed(comm)):
        testing.check_all_to_all_on(wrapped, FlatAllToAll(wrapped), make)
        for G in sorted({1, 2, 3, comm.size}):
            testing.check_all_to_all_on(wrapped, HierarchicalAllToAll(wrapped, Nodes.of_size(G, comm.size)), make)


def check_exchange(exchange: RoutedExchange | TensorParallelExchange, num_experts: int, seed: int) -> None:
    """Every expert is the same tanh, so that each rank can compute its own answer and gradients alone."""
    generator = torch.Generator().manual_seed(seed)
    expert = torch.stack([torch.randperm(num_experts, generator=generator)[:2] for _ in range(33)]).cuda()
    x = torch.randn(33, 64, generator=generator).cuda().requires_grad_()
    weight = torch.rand(33, 2, generator=generator).cuda().requires_grad_()
    direction = torch.randn(33, 64, generator=generator).cuda()
    rows, plan = exchange.dispatch(x, Routing(expert, weight))
    y = exchange.combine(torch.tanh(rows), plan)
    wanted = torch.tanh(x) * weight.sum(1, keepdim=True)
    torch.testing.assert_close(y, wanted)
    for got, correct in zip(
        torch.autograd.grad(y, (x, weight), direction), torch.autograd.grad(wanted, (x, weight), direction), strict=True
    ):
        torch.testing.assert_close(got, correct)


for a2a in (FlatAllToAll(comm), HierarchicalAllToAll(comm, Nodes.of_size(2, comm.size))):
    for send in ("assignments", "tokens"):
        check_exchange(RoutedExchange(a2a, 3, send=send), 3 * comm.size, seed=rank)
for topology in (Topology(comm.size, tensor=2, expert=comm.size), Topology(comm.size, tensor=2)):
    groups = build_groups(comm, topology)
    members = topology.group_of(rank, "expert_lane")
    experts = [[2 * topology.coords(member)["expert"] + i for i in (0, 1)] for member in members]
    inner = RoutedExchange(FlatAllToAll(groups.expert_lane), experts)
    check_exchange(
        TensorParallelExchange(inner, groups.tensor), 2 * topology.expert, seed=topology.coords(rank)["data"]
    )

x = torch.randn(comm.size, 4096, device="cuda").bfloat16()
wanted = FlatAllToAll(dist.group.WORLD)(x)
assert torch.equal(HierarchicalAllToAll(dist.group.WORLD, Nodes.of_size(2, comm.size))(x), wanted)
if rank == 0:
    print(f"NCCL {torch.cuda.nccl.version()}, {comm.size} ranks on {torch.cuda.device_count()} GPUs: conformance holds")
dist.barrier()
dist.destroy_process_group()
