"""Time the gate on a GPU: route, permute, unpermute, all of it, and the backward passes.

Every row is checked first: choices against torch's stable sort, rows bit for bit, sums against float64. Then it is
timed as a CUDA graph of calls over several sets of inputs, and as eager calls. "inputs" says where the sets are:
"memory", 256 MiB or more are touched before a set comes again; "cache", for few tokens: the second cache holds all
sets, as after a layer that has just made them.

    python bench/gating.py --tokens 64,4096 --experts 128 --top-k 1,8 --peers torch --out gating.jsonl
    python bench/gating.py --peers torch,torch.compile,deepspeed --deepspeed deepspeed-0.19.8.tar.gz

Columns: time is the median of the graph's replays, a call; eager the same for plain calls. floor is the time for the
bytes that must move, at the rate of a large copy measured in the same run; ceiling a kernel that only moves as
many bytes, in the same proportion of reading and writing but contiguously.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import gating_peers
import torch
from environment import environment, environment_lines
from gating_cases import STAGES, Inputs, Shape, call, wrong
from gating_ceiling import stream
from harness import Column, Record, append, positive, print_comment, print_header, print_row, refused

COLD_BYTES = 256 * 2**20
"""Between two uses of a set of inputs. The H200's second cache holds 50 MiB."""
WARM_BYTES = 16 * 2**20


class Timing(NamedTuple):
    samples_us: list[float]

    @property
    def median(self) -> float:
        return sorted(self.samples_us)[len(self.samples_us) // 2]


def replayed(calls: Sequence[Callable[[], Any]], num: int, reps: int) -> Timing:
    """A call's share of the time of a graph of `num` calls. What they return changes places as their inputs do."""
    for warm_up in calls[:2]:
        warm_up()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = deque((calls[i % len(calls)]() for i in range(num)), maxlen=len(calls))
    graph.replay()
    samples = [elapsed_us(graph.replay) / num for _ in range(reps)]
    del results
    return Timing(samples)


def elapsed_us(work: Callable[[], Any]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3


def eager(calls: Sequence[Callable[[], Any]], reps: int) -> Timing:
    few = (list(calls) * 8)[:8]

    def work() -> None:
        for each in few:
            each()

    work()
    return Timing([elapsed_us(work) / len(few) for _ in range(reps)])


def peak_bytes(work: Callable[[], Any]) -> int:
    """The most memory in use during a call, beside what was in use before it."""
    work()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def copy_rate() -> float:
    """Bytes read and written a second by a copy of 1 GiB."""
    a, b = (torch.randint(2**31, (2**28,), dtype=torch.int32, device="cuda") for _ in range(2))
    timing = replayed([lambda: stream(a, b, 1, 1, a.nbytes), lambda: stream(b, a, 1, 1, a.nbytes)], 8, 9)
    return 2 * a.nbytes / timing.median * 1e6


@cache
def ceiling(shape: Shape, stage: str, reps: int) -> float | None:
    reads, writes = shape.streams(stage)
    if not reads or stage in ("whole", "route_permute"):
        return None
    row_bytes = shape.row_bytes(1, 0)
    sets = num_sets(shape, stage, COLD_BYTES)
    sources = [torch.randint(2**31, (reads * row_bytes // 4,), dtype=torch.int32, device="cuda") for _ in range(sets)]
    targets = [torch.empty(writes * row_bytes // 4, dtype=torch.int32, device="cuda") for _ in range(sets)]
    calls = [partial(stream, a, b, reads, writes, row_bytes) for a, b in zip(sources, targets, strict=True)]
    return replayed(calls, num_calls(shape, stage, sets), reps).median


def num_sets(shape: Shape, stage: str, enough: int) -> int:
    return max(2, min(-(-enough // shape.least_bytes(stage)), 320))


def num_calls(shape: Shape, stage: str, sets: int) -> int:
    """So many that the start of a graph, some 8 us, does not count."""
    return max(sets, min(128, 16 * 2**30 // shape.least_bytes(stage)))


def measure(shape: Shape, peer: Any, stage: str, rate: float, options: argparse.Namespace) -> Iterator[Record]:
    ceiling_us = ceiling(shape._replace(E=0), stage, options.reps)
    cold = num_sets(shape, stage, COLD_BYTES)
    is_cold = cold * shape.least_bytes(stage) >= COLD_BYTES
    for inputs in ["memory"] * is_cold + ["cache"] * (shape.T <= 512 or not is_cold):
        count = cold if inputs == "memory" else num_sets(shape, stage, WARM_BYTES)
        sets = [Inputs(shape, peer, stage) for _ in range(count)]
        is_wrong = wrong(peer, stage, sets[-1])
        calls = [partial(call, peer, stage, a) for a in sets]
        timing = replayed(calls, num_calls(shape, stage, count), options.reps)
        unrolled = eager(calls, options.reps)
        record = {
            "bench": "gating", "impl": peer.name, "stage": stage, **shape._asdict(), "dtype": "bfloat16",
            "inputs": inputs, "sets": len(sets), "time_us": round(timing.median, 3),
            "eager_us": round(unrolled.median, 3), "floor_us": round(shape.least_bytes(stage) / rate * 1e6, 3),
            "ceiling_us": ceiling_us and round(ceiling_us, 3), "wrong": int(is_wrong),
            "samples_us": [round(sample, 3) for sample in timing.samples_us],
        }  # fmt: skip
        if stage == "whole":
            y, rows = call(peer, stage, sets[0])
            record |= {"output_bytes": y.nbytes + rows.nbytes}
            del y, rows
            record |= {"peak_bytes": peak_bytes(calls[0])}
        yield record
        del sets, calls
        torch.cuda.empty_cache()


COLUMNS = [
    Column("impl", "impl", "", 18), Column("stage", "stage", "", 15), Column("T", "T", "", 7), Column("E", "E", "", 5),
    Column("k", "k", "", 3), Column("inputs", "inputs", "", 8), Column("time_us", "time", "us", 11),
    Column("eager_us", "eager", "us", 11), Column("floor_us", "floor", "us", 10),
    Column("shown_ceiling", "ceiling", "us", 10), Column("wrong", "#wrong", "", 7),
]  # fmt: skip


def main() -> int:
    options = parse()
    if not torch.cuda.is_available():
        return refused("no GPU that torch can use; for the gate on CPU cores: python bench/gating_cpu.py")
    try:
        import cupy  # noqa: F401
    except ImportError as error:
        return refused(f"the gate's kernels need cupy ({error}): pip install 'moecomm[cuda12]' or 'moecomm[cuda13]'")
    rate = copy_rate()
    ran_on = environment()
    gpu = torch.cuda.get_device_name()
    print_header([*environment_lines(ran_on), f"  {gpu}: copies {rate / 1e12:.2f} TB/s"], COLUMNS)
    ran_on["machine"]["gpu"], ran_on["versions"]["cupy"] = gpu, sys.modules["cupy"].__version__
    num_wrong = 0
    for shape in shapes(options):
        for name in ["moecomm", *options.peers]:
            if name != "moecomm" and shape[:3] not in options.peers_at:
                continue
            peer = gating_peers.make(name, shape.k, options.deepspeed)
            for stage in options.stages if name == "moecomm" else [s for s in options.stages if s in STAGES[:4]]:
                for record in measure(shape, peer, stage, rate, options):
                    shown = record["ceiling_us"]
                    print_row(record | {"shown_ceiling": shown or "-"}, COLUMNS)
                    num_wrong += record["wrong"]
                    if options.out:
                        append(options.out, record | ran_on)
    print_comment([f" wrong rows: {num_wrong}"])
    return 1 if num_wrong else 0


def shapes(options: argparse.Namespace) -> Iterator[Shape]:
    for tokens, experts, top_k in itertools.product(options.tokens, options.experts, options.top_k):
        yield Shape(tokens, experts, top_k, options.hidden)


def parse() -> argparse.Namespace:
    description, _, rest = (__doc__ or "").partition("\n\n")
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, epilog=rest, formatter_class=raw)
    add = parser.add_argument
    add("--tokens", type=numbers, default="64,512,4096,32768", metavar="T,..", help="(default: %(default)s)")
    add("--experts", type=numbers, default="8,64,128,256", metavar="E,..", help="(default: %(default)s)")
    add("--top-k", type=numbers, default="1,2,8", metavar="K,..", help="(default: %(default)s)")
    add("--hidden", type=positive, default=4096, metavar="H", help="of bfloat16 (default: %(default)s)")
    add("--stages", type=words(STAGES), default=",".join(STAGES), metavar="S,..", help="(default: all: %(default)s)")
    known = ["torch", "torch.compile", "deepspeed", "deepspeed einsum"]
    add("--peers", type=words(known), default="", metavar="P,..", help=f"of {', '.join(known)} (default: none)")
    add(
        "--peers-at", type=triples, default="64x128x1,64x128x8,4096x128x1,4096x128x8", metavar="TxExK,..",
        help="the shapes that peers are measured at (default: %(default)s)",
    )  # fmt: skip
    add(
        "--deepspeed",
        type=Path,
        metavar="FILE.tar.gz",
        help="a source archive: pip download deepspeed --no-deps --no-binary :all:",
    )
    add("--reps", type=positive, default=11, help="timed replays behind each row (default: %(default)s)")
    add("--out", metavar="FILE.jsonl", help="append the rows as JSON Lines, with all samples")
    options = parser.parse_args()
    if any(name.startswith("deepspeed") for name in options.peers) and not options.deepspeed:
        parser.error("--peers deepspeed needs --deepspeed, its source archive")
    return options


def numbers(text: str) -> list[int]:
    return [positive(part) for part in text.split(",")]


def words(known: list[str]) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        parts = [part for part in text.split(",") if part]
        if set(parts) - set(known):
            raise argparse.ArgumentTypeError(f"{text!r}: expected some of {', '.join(known)}")
        return parts

    return parse


def triples(text: str) -> list[tuple[int, ...]]:
    found = [tuple(map(positive, part.split("x"))) for part in text.split(",")]
    if any(len(triple) != 3 for triple in found):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of shapes such as 64x128x1,4096x128x8")
    return found


if __name__ == "__main__":
    raise SystemExit(main())
