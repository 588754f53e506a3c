"""A small PR-MoE language model on the sources of Python's standard library: splits, and ways of balancing.

splits   200 steps on one rank and on four, under torchrun with gloo: every loss of every step
balance  each way of balancing, several seeds, on one rank: how evenly the experts are used and the held-out loss

python bench/train_moe.py splits --out bench/results/train_splits.jsonl
python bench/train_moe.py balance --out bench/results/train_balance.jsonl

No times: they are not what this is about.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import torch
from environment import environment
from harness import append
from tqdm import tqdm

from moecomm.nn import TransformerLM, config_named, routing_report
from moecomm.train.loop import Balance, Trainer, TrainingPlan, balanced
from moecomm.train.run import read_log
from moecomm.train.text import Text, read_text

SPLITS: list[dict[str, int]] = [
    {"ranks": 1},
    {"ranks": 4, "expert": 4},
    {"ranks": 4, "expert": 2, "tensor": 2},
    {"ranks": 4, "expert": 2, "tensor": 2, "expert-tensor": 2},
]


def splits(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A record for each split; the losses are compared with those of one rank."""
    alone: list[float] = []
    for split in SPLITS:
        with tempfile.TemporaryDirectory() as folder:
            losses, validation = run_command(split, options, Path(folder))
        alone = alone or losses
        yield {
            "config": options.config,
            "steps": options.steps,
            **split,
            "largest_relative_difference": max(abs(a - b) / b for a, b in zip(losses, alone, strict=True)),
            "validation_loss": validation,
            "losses": losses,
        }


def run_command(split: dict[str, int], options: argparse.Namespace, out: Path) -> tuple[list[float], float]:
    """The losses and the validation loss of python -m moecomm.train under torchrun."""
    sizes = [text for name, size in split.items() if name != "ranks" for text in (f"--{name}", str(size))]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(split["ranks"])]
    command = ["-m", "moecomm.train", "--config", options.config, "--steps", str(options.steps), "--out", str(out)]
    subprocess.run([sys.executable, *launch, *command, *sizes], check=True)
    records = read_log(out)
    losses = [record["loss"] for record in records if "loss" in record]
    return losses, [record["validation_loss"] for record in records if "validation_loss" in record][-1]


def balance(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A record for each way and seed."""
    source = read_text([])
    for way in get_args(Balance):
        for seed in range(options.seeds):
            config = balanced(config_named(options.config), way)
            text = Text(source, config.context, seed)
            trainer = Trainer(TransformerLM(config, seed=seed), text, TrainingPlan(balance=way, seed=seed))
            losses = [
                trainer.step(step) for step in tqdm(range(options.steps), desc=f"{way}, seed {seed}", disable=None)
            ]
            validation = trainer.validate(16)
            reports = routing_report(trainer.model, text.validation(64)[:, :-1])
            yield {
                "config": options.config,
                "steps": options.steps,
                "balance": way,
                "seed": seed,
                "validation_loss": validation,
                "entropy": [report.entropy for report in reports],
                "most_over_mean": [max(r.load) * len(r.load) / sum(r.load) for r in reports],
                "least_over_mean": [min(r.load) * len(r.load) / sum(r.load) for r in reports],
                "load": [report.load for report in reports],
                "last_losses": losses[-10:],
            }


def main() -> int:
    """Run the command line and return the exit status."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("subject", choices=("splits", "balance"))
    parser.add_argument("--config", default="small", help="name in moecomm.nn.CONFIGS (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=200, help="(default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="of balance (default: %(default)s)")
    parser.add_argument("--out", metavar="FILE.jsonl", help="append the records as JSON Lines")
    options = parser.parse_args()
    torch.set_num_threads(1)
    ran_on = environment()
    for record in splits(options) if options.subject == "splits" else balance(options):
        print({key: value for key, value in record.items() if key not in ("losses", "load")}, flush=True)
        if options.out:
            append(options.out, record | ran_on)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
