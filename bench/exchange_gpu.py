"""Time dispatch and combine between GPUs: DirectExchange, NCCL's all-to-all and the exchanges over it.

    torchrun --nproc-per-node 2 bench/exchange_gpu.py --tokens 1,8,128,4096 --out exchange_gpu.jsonl
    torchrun --nproc-per-node 2 bench/exchange_gpu.py --tokens 4096 --sms 4,8,12,16,24,32,64

One process a GPU, random tokens and experts. All paths of a case take turns in the same run, and every answer is
checked before it is timed: rows bit for bit, sums against float32. time is the slowest rank's median. "graph" is the
share of a call in a CUDA graph of many; "eager" are calls from Python.

A "dispatch" here includes the small kernel that frees its rows, 1 to 2 us, which combine spares; "dispatch, combine" is
the pair. "in place": the tokens lie in `DirectExchange.tokens`. "dispatch, gemm" is an expanded dispatch and then a
matrix product [T, H] x [H, 2048], "dispatch + gemm" both at once, by `DirectExchange.start`: give --sms for both to
have room.

Over NCCL: "routed" sends a row for each choice, "tokens" for each token and rank, "nodes" for each token and node, with
the first and the second half of the ranks as nodes; "static" and "static nodes" are the last two in blocks of one size,
from Python and in a CUDA graph. "nccl" moves as many rows as there are choices, and nothing else.

Columns: floor is the time for the bytes that must leave a rank, one row for each token and other rank that needs it, at
the rate of a large copy between the GPUs, all ranks sending at once, measured in the same run; rate is what did leave
over time, of rank 0, padding and what stays inside a node included. A "dispatch" of DirectExchange is everything
from expert ids to rows; NCCL's is the movement of rows alone, and its time counts for dispatch and for combine.
"""

# ruff: noqa: N803, N806 - capitals are dimensions

from __future__ import annotations

import argparse
import os
import random
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from environment import environment, environment_lines
from harness import SEED, Column, Record, append, can_append, positive, print_header, print_row

from moecomm import Comm, FlatAllToAll, HierarchicalAllToAll, Nodes, RoutedExchange, Routing
from moecomm.exchange import DirectExchange, HierarchicalExchange, StaticExchange, StaticHierarchicalExchange
from moecomm.transports.torch import TorchComm

Call = Callable[[], Any]
BATCH_US = 2000
"""Of calls in a CUDA graph, about."""


class Case(NamedTuple):
    """A size, and what rows travel as."""

    T: int
    H: int
    k: int
    E: int
    dtype: str
    sms: int | None


class Path(NamedTuple):
    """One way to do it."""

    name: str
    stage: str
    graph: bool
    call: Call
    wrong: Call
    """How many rows of what `call` returns are wrong."""
    wire_bytes: int
    floor_bytes: int


def paths(comm: Comm, case: Case, peers: bool) -> Iterator[tuple[int, list[Path]]]:
    """The blocks of DirectExchange's kernels, and what is measured in turns; the memory of that is given back when the
    next one is asked for."""
    p, rank = comm.size, comm.rank
    T, H, k, E, dtype, sms = case
    fp8 = torch.float8_e4m3fn if dtype == "float8_e4m3fn" else None
    exchange = DirectExchange(comm, T, H, E, k, torch.bfloat16, fp8=fp8, num_sms=sms, limit=20)
    with ThreadPoolExecutor(16) as pool:  # rank 0 first: the others find its results on disk
        for turn in (0, 1):
            if (rank > 0) == bool(turn):
                list(pool.map(lambda kernel: _load(kernel, rank), exchange.shape.kernels()))
            comm.barrier()
    generator = torch.Generator("cuda").manual_seed(SEED + rank)
    x = torch.randn((T, H), device="cuda", generator=generator).bfloat16()
    expert = torch.rand((T, E), device="cuda", generator=generator).topk(k).indices.int()
    weight = torch.rand((T, k), device="cuda", generator=generator)
    routing = Routing(expert, weight)
    everyone = comm.all_gather(x)  # [p * T, H]: by slot
    to = torch.zeros((T, p), dtype=torch.bool, device="cuda").scatter_(1, (expert // (E // p)).long(), True)
    ranks = to.sum(1, keepdim=True)
    others = int(to.sum() - to[:, rank].sum())
    row_bytes = H * 2 if fp8 is None else H + 4 * -(-H // 128)
    floor = others * row_bytes

    rows, plan = exchange.dispatch(x, routing)
    n = int(plan.offset[-1])
    slots = plan.slot[:n].long()
    wanted, scales = (everyone, everyone) if fp8 is None else _quantised(everyone)  # scales: of float8 alone
    answers = rows.clone() if fp8 is None else None

    def wrong_rows(got: Any, index: Any, into: Any) -> int:
        new, plan = got
        bad = (new.view(torch.uint8)[into] != wanted.view(torch.uint8)[index]).any(1)
        if fp8 is not None:
            bad |= (plan.scales[into] != scales[index]).any(1)
        return int(bad.sum())

    def compact() -> Any:
        got = exchange.dispatch_compact(x, routing)
        exchange.free_rows(got[1])
        return got

    def in_place() -> Any:
        place = exchange.tokens()
        assert place is not None  # asked before this is measured
        here = place[:T]
        if not torch.cuda.is_current_stream_capturing():
            here.copy_(x)
        got = exchange.dispatch_compact(here, routing)
        exchange.free_rows(got[1])
        return got

    def pair() -> Any:
        got = exchange.dispatch_compact(x, routing)
        return exchange.combine(everyone, got[1])

    compact_rows = exchange.dispatch_compact(x, routing)
    exchange.free_rows(compact_rows[1])
    unique = slots.unique()
    mine = [
        Path("direct", "dispatch", True, compact, lambda: wrong_rows(compact(), unique, unique), floor, floor),
        Path(
            "direct", "dispatch_expanded", True, lambda: exchange.dispatch(x, routing),
            lambda: wrong_rows(exchange.dispatch(x, routing), slots, slice(0, n)), floor, floor,
        ),
    ]  # fmt: skip
    if exchange.tokens() is not None:
        wrong = lambda: wrong_rows(in_place(), unique, unique)  # noqa: E731
        mine.append(Path("direct", "dispatch, in place", True, in_place, wrong, floor, floor))
    counted = (ranks * x.float()).bfloat16()
    wrong_pair = lambda: int((pair() != counted).any(1).sum())  # noqa: E731
    back = others * H * 2
    mine.append(Path("direct", "dispatch, combine", True, pair, wrong_pair, floor + back, floor + back))
    sums = weight.sum(1, keepdim=True) * x.float()
    if fp8 is None:
        mine += [
            Path(
                "direct", "combine", True, lambda: exchange.combine(everyone, compact_rows[1]),
                lambda: int((exchange.combine(everyone, compact_rows[1]) != counted).any(1).sum()), floor, floor,
            ),
            Path(
                "direct", "combine_expanded", True, lambda: exchange.combine(answers, plan),
                lambda: _far(exchange.combine(answers, plan), sums), floor, floor,
            ),
        ]  # fmt: skip
        mine += list(_overlap(exchange, x, routing, mine[1].wrong, floor))
    if peers:
        order = _order(comm, routing, E // p, T)
        if fp8 is None:
            mine += list(_nccl(comm, case, floor))
        for name, peer in _peers(comm, case, fp8).items():
            checks = [lambda got: wrong_rows(got, order, slice(0, len(order))), lambda y: _far(y, sums)]
            mine += list(_over_nccl(name, peer, x, routing, checks, row_bytes, floor))
    yield exchange.shape.num_sms, mine
    exchange.check()
    exchange.free()


def _overlap(exchange: DirectExchange, x: Any, routing: Routing, wrong: Call, floor: int) -> Iterator[Path]:
    """A matrix product such as a residual MLP's, alone, after a dispatch, and while the dispatch runs."""
    weight = torch.randn((x.shape[1], 2048), device="cuda").bfloat16()

    def after() -> Any:
        got = exchange.dispatch(x, routing)
        return got, x @ weight

    def under() -> Any:
        started = exchange.start(exchange.dispatch, x, routing)
        product = x @ weight
        return started.wait(), product

    yield Path("gemm", "alone", True, lambda: x @ weight, lambda: 0, 0, floor)
    yield Path("direct", "dispatch, gemm", True, after, wrong, floor, floor)
    yield Path("direct", "dispatch + gemm", True, under, wrong, floor, floor)


def _nccl(comm: Comm, case: Case, floor: int) -> Iterator[Path]:
    """NCCL's own all-to-all of as many rows as there are choices."""
    p, (T, H, k, *_) = comm.size, case
    if T * k % p:
        return
    generator = torch.Generator("cuda").manual_seed(SEED + comm.rank)  # else all ranks send the same
    sent = torch.randn((T * k, H), device="cuda", generator=generator).bfloat16()
    got = torch.empty_like(sent)
    moved = sent.nbytes // p * (p - 1)
    expected = _meant_for(comm, sent)

    def all_to_all() -> Any:
        dist.all_to_all_single(got, sent)
        return got

    def wrong() -> int:
        return int((all_to_all() != expected).any(1).sum())

    for graph in (True, False):
        yield Path("nccl", "all_to_all", graph, all_to_all, wrong, moved, floor)


def _peers(comm: Comm, case: Case, fp8: Any) -> dict[str, RoutedExchange]:
    """The exchanges over NCCL."""
    held, two_hops, flat = case.E // comm.size, _two_hops(comm), FlatAllToAll(comm)
    return {
        "routed": RoutedExchange(flat, held, fp8=fp8),
        "tokens": RoutedExchange(flat, held, send="tokens", fp8=fp8),
        "nodes": HierarchicalExchange(two_hops, held, fp8=fp8),
        "static": StaticExchange(flat, held, case.T, fp8=fp8),
        "static nodes": StaticHierarchicalExchange(two_hops, held, case.T, fp8=fp8),
    }


@cache
def _two_hops(comm: Comm) -> HierarchicalAllToAll:
    """With two nodes. Its groups serve all cases: each costs NCCL memory. Collective."""
    return HierarchicalAllToAll(comm, Nodes.of_size(-(-comm.size // 2), comm.size))


def _over_nccl(
    name: str,
    exchange: RoutedExchange,
    x: Any,
    routing: Routing,
    checks: list[Callable[[Any], int]],
    row_bytes: int,
    floor: int,
) -> Iterator[Path]:
    """Dispatch and combine from Python, and in a graph where one can hold them. checks: the wrong rows of each."""
    rows, plan = exchange.dispatch(x, routing)

    def dispatch() -> Any:
        return exchange.dispatch(x, routing)

    def combine() -> Any:
        return exchange.combine(rows, plan)

    stages = {"dispatch_expanded": (dispatch, checks[0])}
    if exchange.fp8 is None:  # otherwise these rows are no answers
        stages["combine_expanded"] = (combine, checks[1])
    sent = exchange.rows_sent(plan) // 2 * row_bytes
    for stage, (call, check) in stages.items():
        for graph in (True, False) if isinstance(exchange, StaticExchange) else (False,):
            yield Path(name, stage, graph, call, partial(_checked, call, check), sent, floor)


def _checked(call: Call, check: Callable[[Any], int]) -> int:
    return check(call())


def _meant_for(comm: Comm, sent: Any) -> Any:
    """Block `rank` of what each rank sends, by rank: gathered block by block, as all of it is p times as much."""
    for to, block in enumerate(sent.chunk(comm.size)):
        blocks = comm.all_gather(block)
        if to == comm.rank:
            mine = blocks
    return mine


def _order(comm: Comm, routing: Routing, experts: int, T: int) -> Any:
    """The slots of the rows of this rank's experts, by expert, source rank and token."""
    every = comm.all_gather(routing.expert).reshape(-1).cpu().numpy()
    mine = np.flatnonzero(every // experts == comm.rank)
    order = mine[np.argsort(every[mine], kind="stable")]
    return torch.from_numpy(order // routing.expert.shape[1]).cuda()


def _far(y: Any, sums: Any) -> int:
    """Rows off by more than bfloat16's rounding explains: of a rank's part, of a relay's and of the sum, each by 2^-8
    of it. All terms have one sign, so the sum is as large as they are, and float32's roundings do not count."""
    return int(((y.float() - sums).abs() > ((1 + 2**-8) ** 3 - 1) * sums.abs()).any(1).sum())


def _quantised(x: Any) -> tuple[Any, Any]:
    padded = torch.nn.functional.pad(x.float(), (0, -x.shape[1] % 128)).reshape(x.shape[0], -1, 128)
    amax = padded.abs().amax(2)
    scale = torch.where(amax > 0, amax.clamp(min=2.0**-100) / torch.full_like(amax, 448), 1.0)
    values = (padded / scale[..., None]).reshape(x.shape[0], -1)[:, : x.shape[1]]
    return values.to(torch.float8_e4m3fn), scale


def _load(kernel: Any, device: int) -> None:
    with torch.cuda.device(device):
        kernel.load()


def elapsed_us(work: Call) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3


def prepared(comm: Comm, path: Path) -> tuple[Call, int]:
    """What is timed, and how many calls that is."""
    path.call()
    torch.cuda.synchronize()
    comm.barrier()
    once = elapsed_us(path.call)
    num = int(max(1, min(50, BATCH_US // max(once if not path.graph else once / 4, 1))))
    num = int(comm.all_gather(np.array([num])).min())
    if not path.graph:

        def calls() -> None:
            for _ in range(num):
                path.call()

        return calls, num
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    comm.barrier()
    with torch.cuda.graph(graph):
        for _ in range(num):
            path.call()
    torch.cuda.synchronize()
    comm.barrier()
    graph.replay()
    return graph.replay, num


def measure(comm: Comm, case: Case, options: argparse.Namespace, rate: float) -> Iterator[Record]:
    """The records of a case. Collective."""
    with torch.no_grad():
        for num_sms, group in paths(comm, case, options.peers == "yes"):
            wrong = [int(comm.all_reduce(np.array([int(path.wrong())]))[0]) for path in group]
            timed = [prepared(comm, path) for path in group]
            samples: list[list[float]] = [[] for _ in group]
            order = list(range(len(group)))
            shuffle = random.Random(SEED).shuffle
            for _ in range(options.reps):
                shuffle(order)
                for i in order:
                    torch.cuda.synchronize()
                    comm.barrier()
                    samples[i].append(elapsed_us(timed[i][0]) / timed[i][1])
            for i, path in enumerate(group):
                slowest = np.asarray(comm.all_gather(np.array([samples[i]]))).max(axis=0)
                time_us = float(np.median(slowest))
                yield {
                    "bench": "exchange_gpu", "stage": path.stage, "path": path.name,
                    "how": "graph" if path.graph else "eager", "ranks": comm.size, **case._asdict(),
                    "sms": num_sms if path.name == "direct" else None,
                    "time_us": round(time_us, 3), "floor_us": round(path.floor_bytes / rate * 1e6, 3),
                    "wire_bytes": path.wire_bytes, "wire_GBps": round(path.wire_bytes / time_us / 1e3, 1),
                    "link_GBps": round(rate / 1e9, 1), "wrong": wrong[i],
                    "samples_us": [round(float(sample), 3) for sample in slowest],
                }  # fmt: skip
            del timed


def link_rate(comm: Comm) -> float:
    """Bytes a second that a rank sends to its neighbour by copies of 256 MiB, all ranks at once."""
    from cupy.cuda import runtime

    from moecomm.exchange.symmetric import ipc_memory

    size = 256 * 2**20
    memory = ipc_memory(comm, 2 * size)
    to = memory.pointers[(comm.rank + 1) % comm.size] + size
    stream = torch.cuda.current_stream().cuda_stream

    def copy() -> None:
        for _ in range(8):
            runtime.memcpyAsync(to, memory.pointers[comm.rank], size, runtime.memcpyDeviceToDevice, stream)

    copy()
    times = []
    for _ in range(5):
        torch.cuda.synchronize()
        comm.barrier()
        times.append(elapsed_us(copy))
    slowest = np.asarray(comm.all_gather(np.array([times]))).max(axis=0)
    memory.free()
    return float(8 * size / np.median(slowest) * 1e6)


COLUMNS = [
    Column("T", "T", "", 7), Column("H", "H", "", 6), Column("k", "k", "", 3), Column("E", "E", "", 5),
    Column("dtype", "travels as", "", 15), Column("sms", "SMs", "", 6), Column("path", "path", "", 13),
    Column("stage", "stage", "", 19), Column("how", "", "", 7), Column("time_us", "time", "us", 11),
    Column("floor_us", "floor", "us", 9), Column("wire_GBps", "rate", "GB/s", 8),
    Column("wrong", "#wrong", "", 8),
]  # fmt: skip


def parse() -> argparse.Namespace:
    description, _, rest = (__doc__ or "").partition("\n\n")
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, epilog=rest, formatter_class=raw)
    add = parser.add_argument

    def whole(text: str) -> list[int]:
        return [positive(part) for part in text.split(",")]

    add("--tokens", type=whole, default=[1, 8, 128, 1024, 4096], metavar="T,..", help="a rank (default: %(default)s)")
    add("--hidden", type=positive, default=7168, help="(default: %(default)s)")
    add("--top-k", type=positive, default=8, help="(default: %(default)s)")
    add("--experts", type=positive, default=256, help="(default: %(default)s)")
    add("--dtypes", default="bfloat16,float8_e4m3fn", help="what dispatch's rows travel as (default: %(default)s)")
    add("--sms", type=whole, default=[None], metavar="N,..", help="blocks of a kernel (default: DirectExchange's)")
    add(
        "--peers",
        choices=("yes", "no"),
        default="yes",
        help="NCCL and the exchanges over it too (default: %(default)s)",
    )
    add("--reps", type=positive, default=15, help="timed turns (default: %(default)s)")
    add("--out", metavar="FILE.jsonl", help="append the rows as JSON Lines, with all samples")
    options = parser.parse_args()
    if "RANK" not in os.environ:
        parser.error("start it with torchrun, one process for each GPU")
    if not torch.cuda.is_available():
        parser.error("there is no GPU here")
    return options


def main() -> int:
    """All cases. The exit status: 1 if a row was wrong."""
    options = parse()
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl", device_id=torch.device("cuda", torch.cuda.current_device()))
    comm = TorchComm(dist.group.WORLD)
    if options.out and not can_append(options.out, comm):
        return 2
    rate = link_rate(comm)
    ran_on: Record = {}
    if comm.rank == 0:
        ran_on = environment()
        lines = environment_lines(ran_on)
        ran_on["machine"] |= {"gpu": torch.cuda.get_device_name(), "gpus": comm.size}
        ran_on["versions"] |= {"NCCL": ".".join(map(str, torch.cuda.nccl.version()))}
        about = [f" exchange_gpu: {comm.size} ranks, link {rate / 1e9:.0f} GB/s each way", *lines]
        print_header(about, COLUMNS)
    wrong = 0
    for dtype in options.dtypes.split(","):
        for T in options.tokens:
            for sms in options.sms:
                case = Case(T, options.hidden, options.top_k, options.experts, dtype, sms)
                for record in measure(comm, case, options, rate):
                    wrong += record["wrong"]
                    if comm.rank == 0:
                        print_row(record | {"sms": record["sms"] or "-"}, COLUMNS)
                        if options.out:
                            append(options.out, record | ran_on)
                torch.cuda.empty_cache()
    dist.destroy_process_group()
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
