"""The conformance suites over NCCL, through torch.distributed and through cupy, for a machine with GPUs:

    torchrun --nproc-per-node 2 tests/programs/nccl.py
    mpirun -n 2 python tests/programs/nccl.py

Numbers are random where exchanges are checked; `--seeds 20` checks those so many times.

cupy's NCCL is bootstrapped over what has started the ranks: torch.distributed or MPI.

With more ranks than GPUs, give each rank beyond a GPU's first another NCCL_HOSTID: then NCCL takes it for a rank on
another node. `--ranks-per-host G` does that before NCCL starts: ranks 0 .. G-1 are host 0, and so on. The GPUs then
serve the processes in turn, and less is checked.
"""

import argparse
import os
import socket
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

import cupy
import numpy as np
import torch
import torch.distributed as dist
from rounding import distance
from seeds import add_seeds, repeated_by, seeds_of

from moecomm import (
    Comm,
    CommError,
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
from moecomm.conformance.exchanges import ExchangeCase
from moecomm.exchange import HierarchicalExchange, StaticExchange, StaticHierarchicalExchange
from moecomm.transports.nccl import NcclComm
from moecomm.transports.torch import TorchComm
from moecomm.transports.wrappers import Checked, Timed

options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
options.add_argument("--ranks-per-host", type=int)
add_seeds(options)
options = options.parse_args()
ranks_per_host = options.ranks_per_host
over_mpi = "RANK" not in os.environ
if over_mpi:
    from mpi4py import MPI

    from moecomm.transports.mpi import MpiComm

    world = MPI.COMM_WORLD
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = world.bcast(free.getsockname()[1])
    os.environ.update(RANK=str(world.rank), WORLD_SIZE=str(world.size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
rank = int(os.environ["RANK"])
if ranks_per_host:
    os.environ["NCCL_HOSTID"] = f"{socket.gethostname()}-{rank // ranks_per_host}"
torch.cuda.set_device(rank % torch.cuda.device_count())
cupy.cuda.Device(torch.cuda.current_device()).use()
dist.init_process_group("nccl", device_id=torch.device("cuda", torch.cuda.current_device()))
through_torch = TorchComm(dist.group.WORLD)
through_cupy = NcclComm(MpiComm(world, limit=60) if over_mpi else dist.group.WORLD)
shares_gpu = through_torch.size > torch.cuda.device_count()
seeds = [int(through_torch.all_gather(np.array([seed]))[0]) for seed in seeds_of(options)]  # rank 0's
starter = f"mpirun -n {through_torch.size} python" if over_mpi else f"torchrun --nproc-per-node {through_torch.size}"
beside = f" --ranks-per-host {ranks_per_host}" if ranks_per_host else ""
if rank == 0:
    print(f"seeds {seeds[0]} to {seeds[-1]}", flush=True)
began = time.monotonic()


E4M3 = torch.float8_e4m3fn


def on_gpu(array: np.ndarray) -> torch.Tensor:
    """A copy with the same strides, so that non-contiguous arrays stay so."""
    return torch.from_numpy(array).cuda()


def done(what: str) -> None:
    global began
    if rank == 0:
        print(f"{through_torch.size} ranks: {what} holds, {time.monotonic() - began:.1f} s", flush=True)
    began = time.monotonic()


def check_transport(comm: Comm, makes: list[Callable]) -> None:
    for make in makes:
        testing.check_comm(lambda size, body: body(comm), sizes=[comm.size], make=make)
    for wrapped in (comm,) if shares_gpu else (comm, Checked(comm), Timed(comm)):
        for ranks_per_node in (2,) if shares_gpu else (1, 2):
            a2a = HierarchicalAllToAll(wrapped, Nodes.of_size(ranks_per_node, comm.size))
            for make in makes:
                testing.check_all_to_all_on(wrapped, FlatAllToAll(wrapped), make)
                testing.check_all_to_all_on(wrapped, a2a, make)
            a2a.free()


def check_stream(comm: Comm) -> None:
    """On a stream of its own, behind work that takes long."""
    a2a = HierarchicalAllToAll(comm, Nodes.of_size(2, comm.size))
    with a2a, torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(100_000_000)
        got = a2a(torch.full((comm.size, 1 << 20), comm.rank, device="cuda").bfloat16())
        assert torch.equal(got, torch.arange(comm.size, device="cuda").bfloat16()[:, None].expand(-1, 1 << 20))


# ---- exchanges -----------------------------------------------------------------------------------------------------


def again(seed: int) -> AbstractContextManager:
    return repeated_by(f"{starter} {sys.argv[0]}{beside} --seed {seed}   (rank {rank})")


def answer(rows: torch.Tensor) -> torch.Tensor:
    """What every expert does, but for a factor: not linear, and exact, as is its gradient."""
    return rows.clamp(-1, 1)


def near_answers(comm: Comm, got: Iterable, x: Any, routing: Routing, direction: Any, factor: Any) -> None:
    """got: y and its gradients in x and in the weights, in the direction. factor [T, K]: that of the choice's expert.

    A term of y or of the gradient in x is a product of three, which K others are added to and then those of p ranks,
    none of another sign. The gradient in a weight is a sum of H products, of both signs: it may nearly cancel out.
    """
    hidden, passed = x.shape[1], routing.expert.shape[1] + comm.size + 4
    factor = factor.double() * (routing.expert >= 0)
    sums = (routing.weight.double() * factor).sum(1, keepdim=True)
    along = direction.double()
    y, of_x, of_weight = answer(x).double() * sums, along * (x.abs() <= 1) * sums, along * answer(x).double()
    wanted = y, of_x, of_weight.sum(1, keepdim=True) * factor
    sizes = y.abs(), of_x.abs(), of_weight.abs().sum(1, keepdim=True) * factor
    names, roundings = ("y", "gradient of x", "gradient of weight"), (passed, passed, hidden + 2)
    for name, *numbers in zip(names, got, wanted, sizes, roundings, strict=True):
        far = distance(*numbers)
        assert far <= 1, f"{name} is {far} times as far from what is right as rounding explains"


def check_exchange(comm: Comm, exchange: TensorParallelExchange, num_experts: int, seed: int) -> None:
    """Every expert answers the same, so that each rank can compute its own answer and gradients alone."""
    x, routing, direction = batch(seed, num_experts, 2)
    rows, plan = exchange.dispatch(x, routing)
    y = exchange.combine(answer(rows), plan)
    grads = torch.autograd.grad(y, (x, routing.weight), direction)
    near_answers(comm, (y, *grads), x, routing, direction, torch.ones_like(routing.weight))


def batch(seed: int, num_experts: int, top_k: int) -> tuple[torch.Tensor, Routing, torch.Tensor]:
    """x [33, 64], its routing with some choices dropped, and a direction for the gradients."""
    generator = torch.Generator().manual_seed(seed)
    expert = torch.stack([torch.randperm(num_experts, generator=generator)[:top_k] for _ in range(33)])
    expert[torch.rand(expert.shape, generator=generator) < 0.1] = -1
    x, direction = torch.randn(2, 33, 64, generator=generator).cuda()
    weight = torch.rand(expert.shape, generator=generator).cuda()
    return x.requires_grad_(), Routing(expert.cuda(), weight.requires_grad_()), direction


def check_exchanges(comm: Comm, ranks_per_node: int) -> None:
    """Flat and in two hops, with and without a row for each token and node: the same rows, answers and gradients."""
    timed = Timed(comm)
    a2a = HierarchicalAllToAll(timed, Nodes.of_size(ranks_per_node, comm.size))
    for seed in seeds:
        with again(seed):
            check_batch(comm, timed, a2a, seed)
    a2a.free()


def check_batch(comm: Comm, timed: Timed, a2a: HierarchicalAllToAll, seed: int) -> None:
    top_k = min(8, 2 * comm.size)
    x, routing, direction = batch(seed * comm.size + comm.rank, 2 * comm.size, top_k)

    def outcome(exchange: RoutedExchange) -> torch.Tensor:
        rows, plan = exchange.dispatch(x, routing)
        count = torch.as_tensor(plan.rows_per_expert).cuda()
        expert = torch.repeat_interleave(2 * comm.rank + torch.arange(2, device="cuda"), count)
        factor = torch.zeros(len(rows), 1, device="cuda")  # each expert multiplies by a number of its own
        factor[: len(expert), 0] = expert + 1.0
        y = exchange.combine(answer(rows) * factor, plan)
        grads = torch.autograd.grad(y, (x, routing.weight), direction)
        near_answers(comm, (y, *grads), x, routing, direction, routing.expert + 1)
        return rows[: len(expert)]

    wanted = outcome(RoutedExchange(FlatAllToAll(comm), 2))
    exchange = HierarchicalExchange(a2a, 2)
    static = StaticExchange(FlatAllToAll(comm), 2, 33), StaticHierarchicalExchange(a2a, 2, 33)
    for other in (RoutedExchange(a2a, 2), RoutedExchange(a2a, 2, send="tokens"), exchange, *static):
        assert torch.equal(outcome(other), wanted)
    for each in static:
        each.check()
    flat = FlatAllToAll(comm)
    check_eight_bits(RoutedExchange(flat, 2, fp8=E4M3), x, routing, wanted)
    check_eight_bits(RoutedExchange(flat, 2, send="tokens", fp8=E4M3), x, routing, wanted)
    check_eight_bits(HierarchicalExchange(a2a, 2, fp8=E4M3), x, routing, wanted)
    check_eight_bits(StaticHierarchicalExchange(a2a, 2, 33, fp8=E4M3), x, routing, wanted)
    timed.clear()
    with torch.no_grad():
        exchange.combine(*exchange.dispatch(x, routing))
    assert timed.record["all_to_all"].calls == 2
    check_rows(comm, routing.expert.cpu().numpy() // 2, a2a.nodes, timed.record["all_to_allv"].bytes, 4 * top_k + 512)


def check_eight_bits(exchange: RoutedExchange, x: torch.Tensor, routing: Routing, wanted: torch.Tensor) -> None:
    """wanted [N, 64]: the rows that are quantised, each of less than 128 numbers."""
    largest = wanted.detach().abs().amax(1, keepdim=True)
    # By a tensor: a number's reciprocal would be multiplied with.
    scale = torch.where(largest > 0, largest.clamp(min=2.0**-100) / torch.full_like(largest, 448), 1.0)
    with torch.no_grad():
        rows, plan = exchange.dispatch(x, routing)
    assert torch.equal(rows[: len(wanted)].view(torch.uint8), (wanted / scale).to(E4M3).view(torch.uint8))
    assert torch.equal(plan.scales[: len(wanted)], scale)


def check_contract(comm: Comm, ranks_per_node: int) -> None:
    """Two hops, with counts and in blocks of one size, against loops over tokens and choices."""
    with HierarchicalAllToAll(comm, Nodes.of_size(ranks_per_node, comm.size)) as a2a:

        def counted(comm: Comm, case: ExchangeCase) -> HierarchicalExchange:
            return HierarchicalExchange(a2a, case.num_experts // comm.size)

        def static(comm: Comm, case: ExchangeCase) -> StaticExchange:
            return StaticHierarchicalExchange(a2a, case.num_experts // comm.size, case.max_tokens)

        for make in (counted, static):
            testing.check_exchange(lambda size, body: body(comm), make, sizes=[comm.size], make=on_gpu)


def check_graph(comm: Comm, exchange: StaticExchange, seed: int) -> None:
    """Forward and backward in a CUDA graph have the bits of the calls without one, for other tokens too."""
    num_experts, top_k = 2 * comm.size, min(8, 2 * comm.size)
    x, routing, direction = batch(seed, num_experts, top_k)

    def step() -> tuple[torch.Tensor, ...]:
        rows, plan = exchange.dispatch(x, routing)
        y = exchange.combine(answer(rows), plan)
        return (y.detach(), *torch.autograd.grad(y, (x, routing.weight), direction))

    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # what is made once is made before
        step()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    comm.barrier()
    with torch.cuda.graph(graph):
        captured = step()
    for again_seed in (seed, seed + 1000):
        tokens, other, along = batch(again_seed, num_experts, top_k)
        with torch.no_grad():
            for kept, new in ((x, tokens), (routing.weight, other.weight), (routing.expert, other.expert)):
                kept.copy_(new)
            direction.copy_(along)
        wanted = step()
        graph.replay()
        torch.cuda.synchronize()
        for name, got, correct in zip(("y", "gradient of x", "gradient of weight"), captured, wanted, strict=True):
            assert torch.equal(got, correct), f"{name} of the graph"
    exchange.check()


def check_rows(comm: Comm, holder: np.ndarray, nodes: Nodes, sent: np.ndarray, bytes_of_row: int) -> None:
    """sent [p] bytes by this rank to each; holder [T, K] of each expert, -1: dropped.

    bytes_of_row  there and back, with its weights; beside it go 4 bytes for each of its assignments
    """
    node, local = nodes.node_of[comm.rank], nodes.local_rank[comm.rank]
    between = inside = 0
    for holders in holder.tolist():
        needed = {int(nodes.node_of[other]) for other in holders if other >= 0}
        for there in needed:
            near = [other for other in holders if other in nodes.ranks[there]]
            relay = nodes.ranks[there][local % len(nodes.ranks[there])]
            between += bytes_of_row + 4 * len(near) if there != node else 0
            sent_on = [other for other in near if other != relay]
            inside += bytes_of_row * len(set(sent_on)) + 4 * len(sent_on)
    same_node = nodes.same_node(comm.rank)
    counted = comm.all_reduce(np.array([sent[~same_node].sum(), sent[same_node].sum()]))
    wanted = comm.all_reduce(np.array([between, inside]))
    assert (counted == wanted).all(), f"{counted} bytes, expected {wanted}"


# ---- what is checked -----------------------------------------------------------------------------------------------

everything = [on_gpu, torch.from_numpy, np.asarray]
check_transport(through_cupy, [cupy.asarray, *everything] if over_mpi and not shares_gpu else [on_gpu])
done("cupy's NCCL")
for comm in (through_cupy, through_torch):
    for ranks_per_node in {2: (1, 2), 4: (2, 3)}.get(comm.size, (2,)):
        check_exchanges(comm, ranks_per_node)
        check_contract(comm, ranks_per_node)
    done(f"exchanges over {type(comm).__name__}")
if shares_gpu or not over_mpi:
    check_transport(through_torch, [on_gpu] if shares_gpu else everything)
    done("torch's NCCL")

if not shares_gpu:
    for comm in (through_cupy, through_torch):
        check_stream(comm)
        for topology in (Topology(comm.size, tensor=2, expert=comm.size), Topology(comm.size, tensor=2)):
            groups = build_groups(comm, topology)
            members = topology.group_of(rank, "expert_lane")
            experts = [[2 * topology.coords(member)["expert"] + i for i in (0, 1)] for member in members]
            flat = FlatAllToAll(groups.expert_lane)
            for inner in (RoutedExchange(flat, experts), StaticExchange(flat, experts, 33)):
                exchange = TensorParallelExchange(inner, groups.tensor)
                for seed in seeds:  # the ranks of a tensor group have the same tokens
                    with again(seed):
                        own = seed * comm.size + topology.coords(rank)["data"]
                        check_exchange(comm, exchange, 2 * topology.expert, own)
            groups.free()
    done("streams, tensor-parallel exchange")
    for comm in (through_torch,) if over_mpi else (through_torch, through_cupy):  # a limit waits on the host
        with HierarchicalAllToAll(comm, Nodes.of_size(-(-comm.size // 2), comm.size)) as a2a:
            for exchange in (StaticExchange(FlatAllToAll(comm), 2, 33), StaticHierarchicalExchange(a2a, 2, 33)):
                for seed in seeds:
                    with again(seed):
                        check_graph(comm, exchange, seed * comm.size + rank)
    done("CUDA graphs")

if over_mpi and not shares_gpu:  # rank 1 comes, but sends nothing: the others' kernels wait for it
    limited = NcclComm(MpiComm(world.Dup(), limit=2))
    y = torch.ones(limited.size, 3, device="cuda")
    limited.all_to_all(y)
    try:
        if rank == 1:
            limited._bootstrap.barrier()
        else:
            limited.all_to_all(y)
    except CommError as error:
        assert "all_to_all waited 2 s" in str(error)
        assert limited.size * 3 == y.sum().item(), "the GPU is of no use any more"
    else:
        assert rank == 1, "what rank 1 never sent has come"
    world.Barrier()
    done("the limit")

if rank == 0:
    num_gpus = torch.cuda.device_count()
    print(f"NCCL {torch.cuda.nccl.version()}, {through_torch.size} ranks on {num_gpus} GPUs: conformance holds")
through_cupy.free()
dist.barrier()
dist.destroy_process_group()
