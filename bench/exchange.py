"""What lanes save: tokens to their experts and back, by tensor-parallel ranks that keep to their lane or do not.

    mpirun -n 64 python bench/exchange.py
    mpirun -n 64 python bench/exchange.py --top-k 8 --experts-per-rank 8 --expert 16 --send assignments,tokens,nodes
    python bench/exchange.py --transport threads -n 8 --ranks-per-node 2        needs no MPI
    torchrun --nproc-per-node 4 bench/exchange.py --transport torch --device cuda --tokens 4096 --hidden 7168

The L tensor ranks of a group hold the same T tokens. Three things that they can do, interleaved in one run:

    lane    each rank sends what the experts of its own lane are to get: p/L - 1 peers (TensorParallelExchange)
    all     tensor rank i sends slice i of the tokens, wherever their experts are: p - 1 peers. Frameworks that know
            tensor ranks but no lanes do this
    naive   every tensor rank sends all tokens: p - 1 peers and L times the rows, but nothing is left to share

p is the size of the expert group. A sample is the slowest rank's time for dispatch, after a barrier, and for combine,
after another; what the experts do between the two is not timed. The answers are checked, and the exit status is 1 if a
row is wrong.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import harness
import numpy as np
from exchange_cases import SENDS, Exchange, Setting, Traffic, innermost, ways
from harness import Column, Record
from numpy.typing import NDArray

from moecomm import Comm, Nodes, Topology
from moecomm.transports.wrappers import Timed

USUAL_TENSOR = (1, 2, 4, 8)
COLUMNS = [
    Column("tensor", "tensor", "(L)", 7),
    Column("algorithm", "algorithm", "", 13),
    Column("exchange", "exchange", "", 9),
    Column("send", "send", "", 12),
    Column("peers", "peers", "", 6),
    Column("messages_intra", "messages", "(inside)", 10, wide=True),
    Column("messages_inter", "messages", "(between)", 10, wide=True),
    Column("messages_counts", "messages", "(counts)", 10, wide=True),
    Column("bytes_intra", "bytes", "(inside)", 10, wide=True),
    Column("bytes_inter", "bytes", "(between)", 10, wide=True),
    Column("share_bytes", "bytes", "(shared)", 10, wide=True),
    Column("rows", "rows", "(sent)", 8, wide=True),
    Column("rows_saved", "rows", "(saved)", 8, wide=True),
    Column("time_us", "time", "(us)", 8),
    Column("p10_us", "p10", "(us)", 8),
    Column("p90_us", "p90", "(us)", 8),
    Column("dispatch_us", "dispatch", "(us)", 11, wide=True),
    Column("combine_us", "combine", "(us)", 11, wide=True),
    Column("wrong", "wrong", "(rows)", 7),
]


# ---- measuring -----------------------------------------------------------------------------------------------------


def timed_call(comm: Comm, traffic: Traffic, exchange: Exchange, check: bool) -> tuple[tuple[float, float], int]:
    """The seconds of dispatch and of combine on this rank and, if asked to check, how many of its answers are wrong."""
    traffic.renew()
    traffic.wait()
    comm.barrier()
    start = time.perf_counter()
    rows, plan = exchange.dispatch(traffic.x, traffic.routing)
    traffic.wait()
    dispatch = time.perf_counter() - start
    rows = traffic.answer(rows, innermost(plan).rows_per_expert)
    traffic.wait()
    comm.barrier()
    start = time.perf_counter()
    y = exchange.combine(rows, plan)
    traffic.wait()
    combine = time.perf_counter() - start
    return (dispatch, combine), traffic.num_wrong(y) if check else 0


def count_sent(
    timed: Timed, traffic: Traffic, exchange: Exchange, tensor: int, same_node: NDArray[np.bool_], static: bool
) -> Record:
    """Messages, bytes and rows of one dispatch and combine. `exchange` was made on `timed`.

    static  it sends no counts, and rows in blocks of one size. Their padding is in the bytes, and not in the rows
    """
    timed.clear()
    rows, plan = exchange.dispatch(traffic.x, traffic.routing)
    y = exchange.combine(traffic.answer(rows, innermost(plan).rows_per_expert), plan)
    record = timed.record
    messages = [record[kind].messages for kind in ("all_to_all", "all_to_allv") if kind in record]
    # What an all-gather moves was counted; of an all-reduce it is what a ring would send.
    shared = int(record["all_gather"].bytes.sum()) if "all_gather" in record else 0
    shared += 2 * (tensor - 1) * y.nbytes // tensor if "all_reduce" in record else 0
    peers, share_bytes = harness.largest(timed.inner, [int(np.count_nonzero(sum(messages))), shared]).tolist()
    num_rows = int((innermost(plan).at_home.source >= 0).sum())
    num_copies = int(innermost(plan).rows_per_expert.sum())
    num_rows, num_copies = timed.inner.all_reduce(np.array([num_rows, num_copies])).tolist()
    return {
        "peers": peers,
        **harness.most_sent(timed, same_node, {"all_to_all"} if static else {"all_to_allv"}),
        "share_bytes": share_bytes,
        "rows": num_rows,
        "rows_saved": num_copies - num_rows,
    }


def measure(comm: Comm, nodes: Nodes, options: argparse.Namespace, progress: Any) -> Iterator[Record]:
    """One record for each tensor size and case, as soon as all cases of that size are measured."""
    timed = Timed(comm)
    for tensor in options.tensor:
        plain, counted = (Setting(each, nodes, tensor, options) for each in (comm, timed))
        traffic = Traffic(plain.groups, options)
        calls = {case: partial(timed_call, comm, traffic, exchange) for case, exchange in plain.cases.items()}
        timings = harness.interleaved(comm, calls, options.reps, progress.update if progress else int)
        for case, timing in timings.items():
            dispatch_us, combine_us = np.median(timing.samples_us, axis=0).round(3).tolist()
            static = case.send.startswith("static")
            yield {
                "bench": "exchange",
                **case._asdict(),
                "tensor": tensor,
                **{key: getattr(options, key) for key in ("top_k", "tokens", "hidden", "experts_per_rank")},
                "expert": plain.groups.topology.expert,
                "transport": options.transport,
                "device": options.device,
                "p": comm.size,
                "ranks_per_node": int(nodes.sizes().max()),
                "nodes": len(nodes),
                "reps": options.reps,
                **timing.record(),
                "dispatch_us": dispatch_us,
                "combine_us": combine_us,
                **count_sent(timed, traffic, counted.cases[case], tensor, nodes.same_node(comm.rank), static),
                "date": harness.utc_now(),
            }
        plain.free()
        counted.free()


# ---- reporting -----------------------------------------------------------------------------------------------------

ONE_HOST = [
    "",
    " All ranks are on one host: the nodes are mere groups of ranks, nothing crosses a network, and ranks that share "
    "a core take turns. So what fewer peers save here is the work for each message, not a network's latency. Peers, "
    "messages, bytes and answers would be the same on a cluster; the times would not.",
]


def benchmark(comm: Comm, options: argparse.Namespace) -> int:
    """Measure and report. The exit status: 1 if a row was wrong, 2 if an option does not fit or --out is no use."""
    options.tensor = options.tensor or usual_tensor(comm.size, options)
    if problem := misfit(comm.size, options):
        if comm.rank == 0:
            print(f"error: {problem}", file=sys.stderr, flush=True)
        return 2
    if options.out and not harness.can_append(options.out, comm):
        return 2
    nodes, num_hosts = harness.choose_nodes(comm, options.ranks_per_node)
    cases = [3 if tensor > 1 else 1 for tensor in options.tensor]
    records = harness.report(
        comm,
        lambda progress: measure(comm, nodes, options, progress),
        harness.shown(COLUMNS, options.wide),
        about(options, nodes, num_hosts),
        options.out,
        num_calls=sum(cases) * len(ways(options.send)) * options.reps,
    )
    if comm.rank == 0:
        harness.print_comment(summary(records))
        if num_hosts == 1:
            harness.print_comment(ONE_HOST)
    return int(any(record["wrong"] for record in records))


def usual_tensor(world_size: int, options: argparse.Namespace) -> list[int]:
    """Those of USUAL_TENSOR that fit so many ranks and the other options."""
    fitting = [
        size
        for size in USUAL_TENSOR
        if not misfit(world_size, argparse.Namespace(**vars(options) | {"tensor": [size]}))
    ]
    return fitting or [1]


def misfit(world_size: int, options: argparse.Namespace) -> str:
    """What is wrong with the options for that many ranks, the same on all of them; empty: nothing."""
    expert = options.expert or world_size
    if options.top_k > expert * options.experts_per_rank:
        return f"--top-k {options.top_k} is more than there are experts: {expert} x {options.experts_per_rank}"
    for tensor in options.tensor:
        try:
            Topology(world_size, tensor=tensor, expert=expert)
        except ValueError as error:
            return f"--tensor {tensor} on {world_size} ranks: {error}"
        if max(expert, tensor) % min(expert, tensor):
            return f"--expert {expert} and --tensor {tensor}: one must divide the other, or a lane misses experts"
    return ""


def about(options: argparse.Namespace, nodes: Nodes, num_hosts: int) -> list[str]:
    per_node = " or ".join(str(size) for size in sorted({*nodes.sizes().tolist()}))
    expert = options.expert or nodes.world_size
    return [
        " exchange: dispatch and combine, balanced random routing",
        f"  transport: {options.transport}, {options.device}   ranks: {nodes.world_size}   nodes: {len(nodes)}   "
        f"ranks per node: {per_node}   hosts: {num_hosts}   reps: {options.reps}",
        f"  tokens of a tensor group: {options.tokens} x {options.hidden} float32   top-k: {options.top_k}   "
        f"experts: {expert * options.experts_per_rank}, {options.experts_per_rank} a rank, expert parallel {expert}",
        "  peers, messages, bytes: what a rank sends in dispatch and combine, to ranks of its node and of other nodes; "
        "(counts): how many rows will come; (shared): answers, among the tensor ranks; the most of any rank",
        "  rows: sent in dispatch by all ranks, and saved by sending a token once to a rank or node of several of its "
        "experts",
        "  time, p10, p90: median and percentiles of the slowest rank's time for dispatch and combine",
    ]


def summary(records: list[Record]) -> list[str]:
    """Who talked to how many, and how fast lane was against the others."""
    rows: dict[tuple[int, str, str], dict[str, Record]] = {}
    for record in records:
        if record["tensor"] > 1:
            rows.setdefault((record["tensor"], record["algorithm"], record["send"]), {})[record["exchange"]] = record
    if not rows:
        return ["", " One tensor rank has its tokens for itself: there are no lanes to keep to. Try --tensor 2,4,8."]
    lines = [
        "",
        " Peers: those of all -> those of lane, which then shares its answers with the L - 1 other tensor ranks.",
        " Speed of lane against the others: their median time / that of lane; above 1 lane was faster.",
        " ? The spreads, p10 to p90, overlap: the run does not say which is faster",
        f"{'tensor':>8}{'algorithm':>14}{'send':>13}{'peers':>12}{'all':>9}{'naive':>9}",
    ]
    found: dict[str, list[str]] = {"faster than": [], "slower than": [], "not to be told from": []}
    for (tensor, algorithm, send), cases in rows.items():
        lane, everywhere = cases["lane"], cases["all"]
        cells = f"{tensor:>8}{algorithm:>14}{send:>13}" + f"{everywhere['peers']} -> {lane['peers']}".rjust(12)
        for other in (everywhere, cases["naive"]):
            mark = "?" if compared(lane, other).startswith("not") else " "
            cells += f"{other['time_us'] / lane['time_us']:>8.2f}{mark}"
        lines.append(cells.rstrip())
        found[compared(lane, everywhere)].append(f"{tensor} {algorithm} {send}")
    return lines + [f" Lane was {verdict} all with tensor {', '.join(at)}" for verdict, at in found.items() if at]


def compared(lane: Record, other: Record) -> str:
    if lane["p90_us"] < other["p10_us"]:
        return "faster than"
    return "slower than" if other["p90_us"] < lane["p10_us"] else "not to be told from"


# ---- starting ------------------------------------------------------------------------------------------------------


def numbers(text: str) -> list[int]:
    """1,2,4 -> [1, 2, 4]"""
    return [harness.positive(part) for part in text.split(",")]


def sends(text: str) -> list[str]:
    names = text.split(",")
    if not set(names) <= set(SENDS):
        raise argparse.ArgumentTypeError(f"{text!r} is not of {', '.join(SENDS)}, with commas between")
    return names


def parse_options() -> argparse.Namespace:
    parser = harness.parser(__doc__)
    parser.set_defaults(reps=10)
    add = parser.add_argument
    harness.add_wide(parser)
    add("--tensor", type=numbers, metavar="L,...", help="tensor ranks (default: those of 1, 2, 4, 8 that fit)")
    add("--tokens", type=harness.positive, default=128, help="T, of a tensor group (default: %(default)s)")
    add("--hidden", type=harness.positive, default=256, help="H, float32 numbers a token (default: %(default)s)")
    add("--top-k", type=harness.positive, default=2, help="K, experts a token (default: %(default)s)")
    add("--experts-per-rank", type=harness.positive, default=1, help="held by each rank (default: %(default)s)")
    add("--expert", type=harness.positive, metavar="RANKS", help="among which the experts are divided (default: all)")
    add(
        "--send",
        type=sends,
        metavar="WHAT,...",
        default="assignments",
        help="assignments: a row for each; tokens: one row for all experts of a rank; nodes: for all of a node, in two "
        "hops; static, static_nodes: as tokens and nodes, in blocks of one size (default: %(default)s)",
    )
    add("--device", choices=("cpu", "cuda"), default="cpu", help="where tokens are; cuda: NCCL (default: %(default)s)")
    options = harness.parse(parser)
    if options.device == "cuda" and options.transport != "torch":
        parser.error("--device cuda is for --transport torch, started by torchrun")
    return options


if __name__ == "__main__":
    sys.exit(harness.run(harness.said_once(parse_options), benchmark))
