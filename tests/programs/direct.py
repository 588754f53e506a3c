"""DirectExchange on a machine with GPUs, against plain loops on the host, with random inputs.

python tests/programs/direct.py --threads 1 2         ranks as threads, as many as there are GPUs or fewer
mpirun -n 2 python tests/programs/direct.py --mpi     CUDA IPC between processes
torchrun --nproc-per-node 2 tests/programs/direct.py  torch's symmetric memory, and RoutedExchange over NCCL
each with --seeds 20                                  all cases so many times, with other numbers

Tables and rows must be the same to the bit; sums may be as far away as the rounding of their terms explains.
"""

# ruff: noqa: N806 - capitals are dimensions

import argparse
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from rounding import ROUNDING, additions, distance
from seeds import add_seeds, repeated_by, seeds_of

from moecomm import Comm, CommError, FlatAllToAll, RoutedExchange, Routing
from moecomm.exchange import DirectExchange
from moecomm.exchange.direct.kernels import KernelShape
from moecomm.exchange.symmetric import ipc_memory, torch_memory

F8 = torch.float8_e4m3fn


class Case(NamedTuple):
    """What an exchange is made for."""

    max_tokens: int
    hidden: int
    experts: int
    top_k: int
    dtype: torch.dtype = torch.bfloat16
    fp8: Any = None


CASES = [
    Case(40, 64, 3, 2),  # tags in every 8 bytes
    Case(17, 33, 5, 3, torch.float32),  # rows that start anywhere
    Case(300, 2048, 16, 8),  # flags
    Case(300, 1030, 1, 1, torch.float16),
    Case(900, 520, 40, 5, torch.float32),
    Case(300, 2048, 16, 8, fp8=F8),
    Case(20, 200, 4, 2, fp8=F8),
]


def routings(case: Case, size: int, seed: int, n: int) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """x, expert, weight of every rank, on the host: ragged, skewed, empty or ragged, by n, and some dropped."""
    generator = torch.Generator().manual_seed(1000 * seed + n)
    E, k = case.experts * size, case.top_k
    world = []
    for rank in range(size):
        T = int(torch.randint(0, case.max_tokens + 1, (1,), generator=generator))
        T = {0: T, 1: case.max_tokens, 2: 0 if rank == 0 else T}.get(n % 4, T)
        score = torch.rand((T, E), generator=generator)
        if n % 4 == 1:
            score[:, : max(k, E // 4)] += 1  # the first ranks get nearly all
        expert = score.topk(min(k, E), dim=1).indices
        if expert.shape[1] < k:
            expert = torch.cat([expert, torch.full((T, k - expert.shape[1]), -1)], 1)
        expert[torch.rand(expert.shape, generator=generator) < 0.1] = -1
        x = torch.randn((T, case.hidden), generator=generator).to(case.dtype)
        world.append((x, expert.int(), torch.rand((T, k), generator=generator)))
    return world


def wanted_rows(world: Any, case: Case, rank: int) -> tuple[torch.Tensor, list[int], list[tuple[int, int, int]]]:
    """The rows of a rank's experts, how many each has, and which (source, token, choice) each is."""
    which: list[list[tuple[int, int, int]]] = [[] for _ in range(case.experts)]
    for source, (_, expert, _) in enumerate(world):
        for token, choices in enumerate(expert.tolist()):
            for choice, e in enumerate(choices):
                if e // case.experts == rank and e >= 0:
                    which[e - rank * case.experts].append((source, token, choice))
    order = [assignment for expert_rows in which for assignment in expert_rows]
    rows = [world[source][0][token] for source, token, _ in order]
    stacked = torch.stack(rows) if rows else torch.zeros((0, case.hidden), dtype=case.dtype)
    return stacked, [len(expert_rows) for expert_rows in which], order


def quantised(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """e4m3 and scales of rows, as moecomm.permute's."""
    T, H = x.shape
    padded = torch.nn.functional.pad(x.float(), (0, -H % 128)).reshape(T, -(-H // 128), 128)
    amax = padded.abs().amax(2)
    scale = torch.where(amax > 0, amax.clamp(min=2.0**-100) / 448, 1.0)
    return (padded / scale[..., None]).flatten(1)[:, :H].to(F8), scale


def answer(rows: torch.Tensor) -> torch.Tensor:
    """What every expert does: not linear, and exact in every dtype, as is its gradient."""
    return rows.clamp(-1, 1)


def near(name: str, got: torch.Tensor, wanted: torch.Tensor, size: torch.Tensor, *roundings: int) -> None:
    """See rounding.distance."""
    far = distance(got, wanted, size, *roundings)
    assert far <= 1, f"{name} is {far} times as far from what is right as rounding explains"


def near_answer(name: str, y: torch.Tensor, x: torch.Tensor, routing: Routing, num_ranks: int) -> None:
    """y [T, H]: a token's answer times the sum of its weights, as all its experts answer the same.

    No term is of another sign. Each passes a product, a rank's sum, which travels as x.dtype, and the sum of ranks.
    """
    factor = torch.where(routing.expert >= 0, routing.weight, 0).double().sum(1, keepdim=True)
    wanted = answer(x).double() * factor
    near(name, y, wanted, wanted.abs(), 1 + routing.expert.shape[1] + num_ranks + ROUNDING[x.dtype], num_ranks + 1)


def check_case(comm: Comm, case: Case, num_sms: int | None, memory: Callable[..., Any], seed: int) -> None:
    """All calls, several times on other numbers; forward, backward, compact, graph."""
    p, rank = comm.size, comm.rank
    E = case.experts * p
    exchange = DirectExchange(
        comm, case.max_tokens, case.hidden, E, case.top_k, case.dtype, fp8=case.fp8, num_sms=num_sms, memory=memory,
        limit=20,
    )  # fmt: skip
    for n in range(6):
        world = routings(case, p, seed, n)
        wanted, counts, order = wanted_rows(world, case, rank)
        x, expert, weight = (tensor.cuda() for tensor in world[rank])
        routing = Routing(expert, weight)
        for _ in range(2):
            with torch.no_grad():
                started = exchange.start(exchange.dispatch, x, routing)
                rows, plan = started.wait()
                check_rows(rows, plan, wanted, counts, order, case)
                if case.fp8 is None:
                    y = exchange.combine(answer(rows), plan)
                    near_answer("combine", y, x, routing, p)
                    again = exchange.combine(answer(rows), plan)
                    assert torch.equal(y, again), "combine gave other bits the second time"
        compact(exchange, x, routing, world, order, case)
        if case.fp8 is None:
            gradients(exchange, x, routing)
    replayed(exchange, case, seed)
    exchange.check()
    exchange.free()


def check_rows(rows: Any, plan: Any, wanted: Any, counts: Any, order: Any, case: Case) -> None:
    """Rows, counts and the table of an expanded dispatch."""
    n = len(order)
    assert plan.rows_per_expert.tolist() == counts, (plan.rows_per_expert.tolist(), counts)
    assert plan.offset.tolist() == np.cumsum([0, *counts]).tolist()
    source, token, choice = torch.tensor(order, dtype=torch.int64).reshape(-1, 3).T
    slots = source * case.max_tokens + token
    assert torch.equal(plan.slot[:n].cpu(), slots.int()), "slot"
    place = torch.full(plan.place.shape, -1, dtype=torch.int32)
    place[slots, choice] = torch.arange(n, dtype=torch.int32)
    assert torch.equal(plan.place.cpu(), place), "place"
    if case.fp8 is None:
        assert torch.equal(rows[:n].cpu(), wanted), "rows"
    else:
        values, scales = quantised(wanted)
        assert torch.equal(plan.scales[:n].cpu(), scales), "scales"
        assert torch.equal(rows[:n].cpu().view(torch.uint8), values.view(torch.uint8)), "float8 rows"


def compact(exchange: Any, x: Any, routing: Any, world: Any, order: Any, case: Case) -> None:
    """The compact form holds the same rows; its combine sums one answer a slot."""
    with torch.no_grad():
        rows, plan = exchange.dispatch_compact(x, routing)
        slots = sorted({source * case.max_tokens + token for source, token, _ in order})
        wanted = [world[s // case.max_tokens][0][s % case.max_tokens] for s in slots]
        want = torch.stack(wanted) if wanted else torch.zeros((0, case.hidden), dtype=case.dtype)
        if case.fp8 is not None:
            values, scales = quantised(want)
            got = rows.view(torch.uint8)[slots].cpu()
            assert torch.equal(got, values.view(torch.uint8)), "compact float8 rows"
            assert torch.equal(plan.scales[slots].cpu(), scales), "compact scales"
            exchange.free_rows(plan)
            return
        assert torch.equal(rows[slots].cpu(), want), "compact rows"
        into = exchange.tokens()
        if into is not None:  # the same from memory where nothing is copied
            exchange.free_rows(plan)
            into = exchange.tokens()[: len(x)]
            into.copy_(x)
            rows, plan = exchange.dispatch_compact(into, routing)
            assert torch.equal(rows[slots].cpu(), want), "compact rows in place"
        factor = torch.where(plan.place >= 0, plan.weight, 0).sum(1, keepdim=True)
        answers = (answer(rows).float() * factor).to(case.dtype)
        y = exchange.combine(answers, plan)
        near_answer("compact combine", y, x, routing, exchange.comm.size)


def gradients(exchange: Any, x: torch.Tensor, routing: Routing) -> None:
    """Of x and of the weights."""
    x, weight = x.clone().requires_grad_(), routing.weight.clone().requires_grad_()
    rows, plan = exchange.dispatch(x, replace(routing, weight=weight))
    y = exchange.combine(answer(rows[: int(plan.offset[-1])]), plan)
    direction = torch.linspace(-1, 1, y.numel(), device="cuda").reshape(y.shape).to(y.dtype)
    grads = torch.autograd.grad(y, (x, weight), direction)
    near_gradients(grads, x.detach(), routing, direction, exchange.comm.size)


def near_gradients(grads: Any, x: torch.Tensor, routing: Routing, direction: torch.Tensor, num_ranks: int) -> None:
    """Of x and of the weights, in a direction of y.

    Those of x are sums as y is, of parts of each choice that are rounded to x.dtype too. Those of the weights are sums
    of a float32 product for each number of a row, of both signs: they may nearly cancel out.
    """
    kept, along, (num_choices, hidden) = routing.expert >= 0, direction.double(), (routing.expert.shape[1], x.shape[1])
    wanted = along * (x.abs() <= 1) * torch.where(kept, routing.weight, 0).double().sum(1, keepdim=True)
    roundings = 2 + num_choices + num_ranks + 2 * ROUNDING[x.dtype]
    near("gradient of x", grads[0], wanted, wanted.abs(), roundings, num_choices + num_ranks + 1)
    terms = along * answer(x).double()
    wanted, size = (part.sum(1, keepdim=True) * kept for part in (terms, terms.abs()))
    near("gradient of weight", grads[1], wanted, size, additions(hidden) + 1)


def replayed(exchange: Any, case: Case, seed: int) -> None:
    """A captured dispatch and combine follow their inputs."""
    p, rank = exchange.comm.size, exchange.comm.rank
    worlds = [routings(case, p, seed, n) for n in (1, 5, 9)]  # all with max_tokens tokens
    x, expert, weight = (tensor.cuda() for tensor in worlds[0][rank])
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    exchange.comm.barrier()
    stream = torch.cuda.Stream()  # torch's own for this is one for all threads
    with torch.no_grad(), torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        rows, plan = exchange.dispatch(x, Routing(expert, weight))
        if case.fp8 is None:
            exchange.combine(rows, plan)
    exchange.comm.barrier()  # a capture waits for its whole GPU, where another rank's kernel may wait for this one
    for world in worlds:
        for tensor, new in zip((x, expert, weight), world[rank], strict=True):
            tensor.copy_(new)
        graph.replay()
        check_rows(rows, plan, *wanted_rows(world, case, rank), case)


def check_failures(comm: Comm, num_sms: int | None) -> None:
    """Rows without room, ids of no expert, bad arguments, held buffers, and a rank that does not come."""
    p = comm.size
    make = lambda **options: DirectExchange(comm, 8, 16, 2 * p, 1, torch.float32, num_sms=num_sms, **options)  # noqa: E731
    exchange = make(max_rows=3, limit=1.0)
    exchange.load()  # which may take longer than a second
    comm.barrier()
    x = torch.ones((8, 16), device="cuda")
    routing = Routing(torch.zeros((8, 1), dtype=torch.int32, device="cuda"), torch.ones((8, 1), device="cuda"))
    with torch.no_grad():
        rows, plan = exchange.dispatch(x, routing)
        y = exchange.combine(rows, plan)
    if comm.rank == 0:
        raises(OverflowError, f"{8 * p - 3} rows", exchange.check)
        assert y.sum(1).tolist() == [16.0] * 3 + [0.0] * 5
    exchange.check()
    routing.expert[3] = 2 * p + 1
    exchange.dispatch(x, routing)
    raises(ValueError, "1 ids outside", exchange.check)
    raises(ValueError, "9 tokens", lambda: exchange.dispatch(torch.ones((9, 16), device="cuda"), routing))
    raises(TypeError, "CUDA tensor", lambda: exchange.dispatch(x.cpu(), routing))
    raises(ValueError, "expected torch.float32 [T, 16]", lambda: exchange.dispatch(x[:, 1:], routing))
    raises(ValueError, "top_k", lambda: DirectExchange(comm, 8, 16, 2 * p, 33, torch.float32))
    raises(RuntimeError, "records gradients", lambda: exchange.start(exchange.dispatch, x, routing))
    raises(TypeError, "integers", lambda: exchange.dispatch(x, replace(routing, expert=routing.expert > 0)))
    exchange.dispatch(x, replace(routing, expert=routing.expert.long() + 2**32))
    raises(ValueError, "8 ids outside", exchange.check)
    raises(ValueError, "another DirectExchange", lambda: make(max_rows=2).combine(rows, plan))

    def none_on_the_last(comm: Comm, num_bytes: int) -> Any:
        return ipc_memory(comm, num_bytes if comm.rank < p - 1 else 2**60)

    raises(RuntimeError, f"rank {p - 1} of {p}", lambda: make(memory=none_on_the_last))
    if p > 1:
        comm.barrier()
        if comm.rank:
            exchange.dispatch(x, routing)
            raises(CommError, "for rank 0", exchange.check)
            raises(CommError, "cannot be used", lambda: exchange.dispatch(x, routing))
        comm.barrier()


def raises(error: type[Exception], match: str, call: Callable[[], object]) -> None:
    """call() raises that error, and says that."""
    try:
        call()
    except error as caught:
        assert match in str(caught), f"{caught} does not say {match!r}"
    else:
        raise AssertionError(f"expected {error.__name__} with {match!r}")


def against_routed(comm: Comm, memory: Callable[..., Any], seed: int) -> None:
    """Both exchanges, same numbers: the paper's size."""
    case = Case(4096, 7168, 128, 8)
    E = case.experts * comm.size
    exchange = DirectExchange(comm, *case[:2], E, case.top_k, case.dtype, memory=memory)
    routed = RoutedExchange(FlatAllToAll(comm), case.experts)
    torch.manual_seed(seed * comm.size + comm.rank)
    for T in (4096, 4000, 1):
        x = torch.randn((T, case.hidden), device="cuda", dtype=case.dtype).clamp(-1, 1)  # what `answer` leaves as it is
        expert = torch.rand((T, E), device="cuda").topk(case.top_k).indices.int()
        routing = Routing(expert, torch.rand((T, case.top_k), device="cuda"))
        with torch.no_grad():
            rows, plan = exchange.dispatch(x, routing)
            wanted, routed_plan = routed.dispatch(x, routing)
            assert torch.equal(rows[: len(wanted)], wanted), "rows differ from RoutedExchange's"
            assert plan.rows_per_expert.tolist() == routed_plan.rows_per_expert.tolist()
            near_answer("combine", exchange.combine(rows, plan), x, routing, comm.size)
            near_answer("RoutedExchange's combine", routed.combine(wanted, routed_plan), x, routing, comm.size)
    exchange.check()
    exchange.free()


def load(size: int, num_sms: int, cases: list[Case]) -> None:
    """Compile what the cases need at once, on all cores."""
    kernels = []
    for case in cases:
        shape = KernelShape(
            str(case.dtype)[6:],
            case.fp8 is not None,
            case.hidden,
            case.top_k,
            case.max_tokens,
            size,
            case.experts,
            num_sms,
        )
        kernels += shape.kernels()
    devices = range(torch.cuda.device_count()) if "RANK" not in os.environ else [torch.cuda.current_device()]

    def one(kernel: Any, device: int) -> None:
        with torch.cuda.device(device):
            kernel.load()

    with ThreadPoolExecutor(24) as pool:
        for device in devices:
            list(pool.map(lambda kernel, device=device: one(kernel, device), kernels))


def main() -> None:
    """One of the three ways."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--threads", type=int, nargs="*")
    options.add_argument("--mpi", action="store_true")
    options.add_argument("--cases", type=int, nargs="+", default=range(len(CASES)), metavar="N", help="these alone")
    add_seeds(options)
    chosen = options.parse_args()
    cases, start = [CASES[n] for n in chosen.cases], time.perf_counter()
    available = torch.cuda.get_device_properties(0).multi_processor_count

    def agreed_seeds(comm: Comm) -> list[int]:
        """Rank 0's: each process has drawn its own."""
        return [int(comm.all_gather(np.array([seed]))[0]) for seed in seeds_of(chosen)]

    def body(comm: Comm, num_sms: int | None, memory: Callable[..., Any], starter: str) -> None:
        for seed in agreed_seeds(comm):
            for n, case in zip(chosen.cases, cases, strict=True):
                with repeated_by(f"{starter} --cases {n} --seed {seed}   (rank {comm.rank} of {comm.size}, {case})"):
                    check_case(comm, case, num_sms, memory, seed)
                comm.barrier()
            if comm.rank == 0:
                print(
                    f"seed {seed}, {comm.size} ranks: {len(cases)} cases ok, {time.perf_counter() - start:.0f} s",
                    flush=True,
                )
        check_failures(comm, num_sms)

    if chosen.threads is not None:
        from moecomm.transports import threads

        def rank_body(comm: Comm) -> None:
            torch.cuda.set_device(comm.rank)
            with torch.cuda.stream(torch.cuda.Stream()):
                body(comm, available, ipc_memory, f"python {sys.argv[0]} --threads {comm.size}")

        def on_one_gpu(comm: Comm) -> None:
            make = lambda: DirectExchange(comm, 8, 16, 2, 1, torch.float32)  # noqa: E731
            raises(ValueError, "ranks 0 and 1 have the same GPU", make)

        threads.run(2, on_one_gpu)
        for size in chosen.threads:
            load(size, available, cases)
            threads.run(size, rank_body, limit=120)
    elif chosen.mpi:
        from mpi4py import MPI

        from moecomm.transports.mpi import MpiComm

        comm = MpiComm(MPI.COMM_WORLD, limit=120)
        torch.cuda.set_device(comm.rank % torch.cuda.device_count())
        load(comm.size, available, cases)
        body(comm, available, ipc_memory, f"mpirun -n {comm.size} python {sys.argv[0]} --mpi")
    else:
        import torch.distributed as dist

        from moecomm.transports.torch import TorchComm

        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl", device_id=torch.device("cuda", torch.cuda.current_device()))
        comm = TorchComm(dist.group.WORLD)
        available -= 32  # NCCL's kernels wait for each other too
        load(comm.size, available, cases)
        starter = f"torchrun --nproc-per-node {comm.size} {sys.argv[0]}"
        body(comm, available, torch_memory, starter)
        for seed in agreed_seeds(comm):
            with repeated_by(f"{starter} --cases 0 --seed {seed}   (rank {comm.rank}, against RoutedExchange)"):
                against_routed(comm, ipc_memory, seed)
        dist.destroy_process_group()
    print("ok", sys.argv[1:], f"{time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
