"""Everything here that needs a GPU: lists it, or runs the programs that check.

    python tests/programs/gpu.py                  lists all of it: what `make list-gpu` prints
    python tests/programs/gpu.py --seeds 20       runs the checks, one after the other: what `make test-gpu` does

They need an environment that has torch with CUDA and moecomm. Inputs are random; a failure that depends on the numbers
of a run shows with some of so many seeds.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
from collections.abc import Sequence
from typing import NamedTuple


class Job(NamedTuple):
    """A command that needs GPUs."""

    gpus: int
    """The fewest."""
    command: str
    about: str
    record: str = ""
    """For a benchmark: what it adds to, in bench/results."""


CHECKS = [
    Job(1, "python tests/programs/gating_cuda.py", "the gate against its definition"),
    Job(1, "python tests/programs/direct.py --threads 1", "DirectExchange, one rank"),
    Job(1, "torchrun --nproc-per-node gpu tests/programs/direct.py", "DirectExchange over torch's symmetric memory"),
    Job(2, "mpirun -n 2 python tests/programs/direct.py --mpi", "DirectExchange over CUDA IPC"),
    Job(1, "torchrun --nproc-per-node gpu tests/programs/nccl.py", "the conformance suites over torch and NCCL"),
    Job(2, "mpirun -n 2 python tests/programs/nccl.py", "the conformance suites over MPI and NCCL"),
]
BENCHMARKS = [
    Job(1, "python bench/gating.py", "times of the gate", "gating_h200.jsonl"),
    Job(2, "torchrun --nproc-per-node 2 bench/exchange_gpu.py", "dispatch and combine", "exchange_gpu_h200.jsonl"),
    Job(4, "torchrun --nproc-per-node 4 bench/exchange_gpu.py", "the same, 4 GPUs", "exchange_gpu_h200_x4.jsonl"),
    Job(
        4,
        "torchrun --nproc-per-node 4 bench/exchange.py --transport torch --device cuda",
        "what lanes save",
        "exchange_h200_x4.jsonl",
    ),
    Job(1, "python bench/train_gpu.py residual", "training steps of Residual-MoE", "train_h200.jsonl"),
    Job(2, "torchrun --nproc-per-node 2 bench/train_gpu.py exchange", "training steps by exchange", "train_h200.jsonl"),
    Job(1, "python bench/claims.py --text FILE", "the paper's claims on quality", "claims_h200.jsonl"),
]


def listing() -> list[str]:
    """A line for each job."""
    lines = ["GPUs  command"]
    for job in [*CHECKS, *BENCHMARKS]:
        record = f" -> bench/results/{job.record}" if job.record else ""
        lines.append(f"{job.gpus:4}  {job.command:80} {job.about}{record}")
    return lines


def run(num_gpus: int, seeds: int) -> int:
    """The number of checks that failed. Those that need more GPUs than there are count too: nothing is left out."""
    failed = 0
    for job in CHECKS:
        print(f"\n$ {job.command} --seeds {seeds}", flush=True)
        if job.gpus > num_gpus:
            print(f"not run: it needs {job.gpus} GPUs, there are {num_gpus}", flush=True)
            failed += 1
        elif subprocess.run([*shlex.split(job.command), "--seeds", str(seeds)]).returncode:
            failed += 1
    print(f"\n{failed} of {len(CHECKS)} failed" if failed else f"\nall {len(CHECKS)} passed")
    return failed


def main(arguments: Sequence[str] | None = None) -> int:
    """List or run. Returns the exit status."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--seeds", type=int, help="run the checks, each with so many seeds")
    options = parser.parse_args(arguments)
    if options.seeds is None:
        print("\n".join(listing()))
        return 0
    import torch

    return min(run(torch.cuda.device_count(), options.seeds), 1)


if __name__ == "__main__":
    raise SystemExit(main())
