"""The gate on a CPU beside plain torch: route, permute and unpermute, float32.

    python bench/gating_cpu.py --out bench/results/gating_cpu.jsonl
    python bench/gating_cpu.py --tokens 512 --experts 64 --top-k 2 --threads 1

For each T, E, k and number of threads, interleaved in one run:

    route       logits [T, E] to everything in a Routing, without a capacity. torch: softmax, topk, one_hot, cumsum
    permute     x [T, H] to rows [T * k, H], expert by expert. torch: index_select
    unpermute   rows to y [T, H], weighted and summed. torch: index_add
    copy        torch's copy of as many bytes as permute and unpermute read and write: what the memory can do

GB/s count each row read and each row written once: (1 + k) * T * H * 4 bytes. Where `memory` is "new" a call makes its
result, as permute and unpermute do, and most of its time may be the kernel's handing out of pages; "reused" writes
where the call before it has written. The answers are checked, and the exit status is 1 if one is wrong.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any, NamedTuple

import harness
import numpy as np
import torch
from harness import Column, Record

from moecomm import Comm, Routing, _core, route
from moecomm.gating import permute, unpermute
from moecomm.transports import threads

COLUMNS = [
    Column("T", "T", "", 6),
    Column("E", "E", "", 6),
    Column("k", "k", "", 4),
    Column("threads", "threads", "", 9),
    Column("stage", "stage", "", 11),
    Column("memory", "memory", "", 8),
    Column("impl", "impl", "", 9),
    Column("time_us", "time", "(us)", 11),
    Column("p10_us", "p10", "(us)", 11),
    Column("p90_us", "p90", "(us)", 11),
    Column("GBps", "rate", "(GB/s)", 9),
    Column("of_torch", "torch's", "time / ours", 12),
    Column("of_copy", "rate /", "copy's", 8),
    Column("wrong", "wrong", "", 7),
]
SAMPLE_SECONDS = 1e-3
"""A sample is the mean of as many calls as take about so long, or one."""


class Case(NamedTuple):
    stage: str
    memory: str
    impl: str


class Plain(NamedTuple):
    """What plain torch finds out about the same tokens."""

    expert: Any
    weight: Any
    slot: Any
    row: Any
    source: Any
    count: Any
    aux_loss: Any
    z_loss: Any


def plain_route(logits: Any, top_k: int) -> Plain:
    num_tokens, num_experts = logits.shape
    probabilities = torch.softmax(logits, 1)
    weight, expert = probabilities.topk(top_k, 1)
    flat = expert.reshape(-1)
    places = torch.nn.functional.one_hot(flat, num_experts).cumsum(0)
    slot = places.gather(1, flat[:, None])[:, 0] - 1
    count = places[-1]
    row = (count.cumsum(0) - count)[flat] + slot
    source = torch.empty_like(row)
    source[row] = torch.arange(len(row))
    aux_loss = num_experts / top_k * (probabilities.mean(0) * count / num_tokens).sum()
    z_loss = torch.logsumexp(logits, 1).square().mean()
    return Plain(expert, weight, slot.view_as(expert), row.view_as(expert), source, count, aux_loss, z_loss)


class Cell:
    """The calls of one T, E, k and number of threads, and their answers."""

    def __init__(self, num_tokens: int, num_experts: int, top_k: int, num_threads: int, hidden: int) -> None:
        torch.manual_seed(harness.SEED)
        torch.set_num_threads(num_threads)
        self.top_k, self.threads = top_k, num_threads
        self.logits, self.x = torch.randn(num_tokens, num_experts), torch.randn(num_tokens, hidden)
        self.plain = plain_route(self.logits, top_k)
        self.routing = route(self.logits, top_k)
        self.token = self.plain.source // top_k
        self.in_order = self.plain.weight.reshape(-1)[self.plain.source][:, None]
        self.rows, self.y = self.x[self.token], torch.empty_like(self.x)
        self.answer = (self.rows.double() * self.in_order).view(-1, hidden)
        self.answer = torch.zeros_like(self.x, dtype=torch.float64).index_add_(0, self.token, self.answer)
        self.bytes = (1 + top_k) * num_tokens * hidden * 4
        self.out = torch.empty_like(self.rows)
        # Half of those bytes are read, half are written.
        self.from_here, self.to_here = (torch.ones(self.bytes // 8) for _ in range(2))

    def calls(self) -> dict[Case, Callable[[], Any]]:
        rows, y, out = self.rows.numpy(), self.y.numpy(), self.out.numpy()
        row, source = self.routing.row.numpy(), self.routing.source.numpy()
        weight, x = self.routing.weight.numpy(), self.x.numpy()

        def fill(kernel: Callable[..., None], result: Any, *arguments: Any) -> Any:
            kernel(*arguments, self.threads)
            return result

        return {
            Case("route", "new", "moecomm"): lambda: route(self.logits, self.top_k, threads=self.threads),
            Case("route", "new", "torch"): lambda: plain_route(self.logits, self.top_k),
            Case("permute", "new", "moecomm"): lambda: permute(self.x, self.routing, threads=self.threads),
            Case("permute", "new", "torch"): lambda: self.x.index_select(0, self.token),
            Case("permute", "reused", "moecomm"): lambda: fill(_core.permute, self.out, x, row, source, out),
            Case("permute", "reused", "torch"): lambda: torch.index_select(self.x, 0, self.token, out=self.out),
            Case("unpermute", "new", "moecomm"): lambda: unpermute(self.rows, self.routing, threads=self.threads),
            Case("unpermute", "new", "torch"): lambda: self.add(torch.zeros_like(self.x)),
            Case("unpermute", "reused", "moecomm"): lambda: fill(_core.unpermute, self.y, rows, row, weight, None, y),
            Case("unpermute", "reused", "torch"): lambda: self.add(self.y.zero_()),
            Case("copy", "new", "torch"): lambda: self.from_here.clone(),
            Case("copy", "reused", "torch"): lambda: self.to_here.copy_(self.from_here),
        }

    def add(self, zeros: Any) -> Any:
        return zeros.index_add_(0, self.token, self.rows * self.in_order)

    def num_wrong(self, stage: str, got: Any) -> int:
        """Rows (route: tokens) of an answer that are wrong."""
        if stage == "route":
            return self._wrong_tokens(got)
        wanted = {"permute": self.rows, "unpermute": self.answer, "copy": self.from_here}[stage]
        right = torch.isclose(got.double(), wanted.double(), rtol=1e-5, atol=1e-5 if stage == "unpermute" else 0)
        return int((~right.view(right.shape[0], -1).all(1)).sum())

    def _wrong_tokens(self, got: Routing | Plain) -> int:
        wrong = torch.zeros(len(self.logits), dtype=torch.bool)
        for name in ("expert", "slot", "row"):
            wrong |= (getattr(got, name) != getattr(self.plain, name)).any(1)
        wrong |= ~torch.isclose(got.weight, self.plain.weight, rtol=1e-5).all(1)
        whole = torch.equal(got.source.long(), self.plain.source) and torch.equal(got.count.long(), self.plain.count)
        losses = (got.aux_loss, self.plain.aux_loss), (got.z_loss, self.plain.z_loss)
        whole = whole and all(bool(torch.isclose(a, b, rtol=1e-5)) for a, b in losses)
        return int(wrong.sum()) if whole else len(wrong)

    def timed(self, case: Case, call: Callable[[], Any]) -> Callable[[bool], tuple[tuple[float, ...], int]]:
        """For harness.interleaved."""
        start = time.perf_counter()
        call()
        repeats = max(1, int(SAMPLE_SECONDS / (time.perf_counter() - start)))

        def sample(check: bool) -> tuple[tuple[float, ...], int]:
            start = time.perf_counter()
            for _ in range(repeats):
                result = call()
            seconds = (time.perf_counter() - start) / repeats
            return (seconds,), self.num_wrong(case.stage, result) if check else 0

        return sample


def measure(comm: Comm, options: argparse.Namespace, progress: Any) -> Iterator[Record]:
    """The records of each cell, as soon as it is measured."""
    for num_tokens, num_experts, top_k, num_threads in product(
        options.tokens, options.experts, options.top_k, options.threads
    ):
        cell = Cell(num_tokens, num_experts, top_k, num_threads, options.hidden)
        calls = {case: cell.timed(case, call) for case, call in cell.calls().items()}
        timings = harness.interleaved(comm, calls, options.reps, progress.update)
        progress.clear()
        median = {case: float(np.median(timing.samples_us)) for case, timing in timings.items()}
        for case, timing in timings.items():
            moved = case.stage != "route"
            yield {
                "bench": "gating_cpu",
                **case._asdict(),
                **{"T": num_tokens, "E": num_experts, "k": top_k, "H": options.hidden, "dtype": "float32"},
                "threads": num_threads,
                **timing.record(),
                "GBps": cell.bytes / median[case] / 1e3 if moved else 0.0,
                "of_torch": median[case._replace(impl="torch")] / median[case],
                "of_copy": median[Case("copy", case.memory, "torch")] / median[case] if moved else 0.0,
                "utc": harness.utc_now(),
            }


def benchmark(comm: Comm, options: argparse.Namespace) -> int:
    cells = len(options.tokens) * len(options.experts) * len(options.top_k) * len(options.threads)
    about = [f" gating_cpu: H {options.hidden}, float32; medians of {options.reps} samples"]
    num_calls = cells * 12 * options.reps
    records = harness.report(comm, lambda tick: measure(comm, options, tick), COLUMNS, about, options.out, num_calls)
    return int(any(record["wrong"] for record in records))


def main() -> int:
    description, _, rest = (__doc__ or "").partition("\n\n")
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, epilog=rest, formatter_class=raw)
    add = parser.add_argument
    add("--tokens", type=harness.positive, nargs="+", default=[512, 8192], metavar="T")
    add("--experts", type=harness.positive, nargs="+", default=[8, 64, 256], metavar="E")
    add("--top-k", type=harness.positive, nargs="+", default=[1, 2, 8], metavar="K")
    add("--threads", type=harness.positive, nargs="+", default=[1, 2], metavar="N")
    add("--hidden", type=harness.positive, default=1024, metavar="H")
    add("--reps", type=harness.positive, default=11, help="samples behind each row (default: %(default)s)")
    add("--out", metavar="FILE.jsonl", help="append the rows as JSON Lines, with all samples")
    options = parser.parse_args()
    return threads.run(1, lambda comm: benchmark(comm, options))[0]


if __name__ == "__main__":
    sys.exit(main())
