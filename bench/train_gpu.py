"""A PR-MoE language model on GPUs: exchanges against each other, Residual-MoE against top-2.

quality   a kind of layer and a seed: the held-out loss after some steps
residual  step times of Residual-MoE, top-2 and top-1 on one GPU
exchange  two GPUs, experts shared: losses beside those of one GPU, and step times; the residual MLP beside the exchange
          and after it

python bench/train_gpu.py quality --kind top-2 --seed 1 --out train_h200.jsonl
torchrun --nproc-per-node 2 bench/train_gpu.py exchange --exchange direct --out train_h200.jsonl

Times: the median, p10 and p90 of the slowest rank's, models taking turns step by step; host clock, GPU synchronised.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import MethodType
from typing import Any

import numpy as np
import torch
from environment import environment
from harness import replace as replace_record

from moecomm import Comm
from moecomm.nn import Config, ResidualMoE, TransformerLM, config_named, layer_groups, pyramid
from moecomm.train.loop import Trainer, TrainingPlan
from moecomm.train.run import mean_of_ranks, world
from moecomm.train.text import Text, read_text

BIG = Config(8, 1024, 16, pyramid(4, 8), residual="sum", vocabulary=256, context=1024)
MEDIUM = config_named("medium")
KINDS: dict[str, dict[str, Any]] = {
    "residual": {"residual": "sum", "top_k": 1},
    "top-2": {"residual": "none", "top_k": 2, "normalize": "selected"},
    "top-1": {"residual": "none", "top_k": 1},
}
SAME = ("subject", "exchange", "kind", "precision", "seed", "steps", "model", "part", "gpu", "gpus")
"""A record takes the place of an earlier one with the same values."""
FEW = 24
SOURCE = read_text([])
Make = Callable[[Config, TrainingPlan], Trainer]


def maker(comm: Comm | None, device: torch.device, exchange: str, num_sms: int | None = None) -> Make:
    """Makes a model and its trainer, the experts shared by all ranks of comm. num_sms: of DirectExchange."""

    def make(config: Config, plan: TrainingPlan) -> Trainer:
        groups = None if comm is None else layer_groups(comm, config.experts)

        def direct(of_layer: Any, num_experts: int) -> Any:
            from moecomm.exchange.direct import DirectExchange

            dtype = torch.bfloat16 if plan.precision == "bfloat16" else torch.float32
            tokens = plan.micro_batch * config.context
            return DirectExchange(
                of_layer.expert, tokens, config.hidden, num_experts, config.top_k, dtype, num_sms=num_sms
            )

        made = direct if exchange == "direct" and comm is not None else None
        model = TransformerLM(config, groups=groups, exchange=made, seed=plan.seed, device=device)
        return Trainer(model, Text(SOURCE, config.context, plan.seed), plan)

    return make


def quality(make: Make, kind: str, seed: int, steps: int) -> dict[str, Any]:
    """The record of one kind and seed."""
    config = replace(MEDIUM, **KINDS[kind])
    trainer = make(config, TrainingPlan(32, 32, 6e-4, seed=seed, precision="bfloat16"))
    losses = [trainer.step(step) for step in range(steps)]
    return {
        "kind": kind,
        "seed": seed,
        "steps": steps,
        "parameters": config.num_parameters(),
        "validation_loss": trainer.validate(16),
        "losses": losses[:: max(1, steps // 50)],
    }


def step_times(trainers: dict[str, Trainer], comm: Comm | None, reps: int) -> Iterator[dict[str, Any]]:
    """A record for each model: a pass forward and backward, and a whole step."""
    samples: dict[tuple[str, str], list[float]] = {}
    for rep in range(-5, reps):
        for name, trainer in trainers.items():
            for part, call in (("pass", one_pass), ("step", Trainer.step)):
                torch.cuda.synchronize()
                if comm is not None:
                    comm.barrier()
                start = time.perf_counter()
                call(trainer, max(rep, 0))
                torch.cuda.synchronize()
                if rep >= 0:
                    samples.setdefault((name, part), []).append(time.perf_counter() - start)
    for (name, part), seconds in samples.items():
        slowest = np.array([seconds]) if comm is None else comm.all_gather(np.array([seconds]))
        p10, median, p90 = (np.percentile(slowest.max(0), (10, 50, 90)) * 1e3).round(3).tolist()
        yield {"model": name, "part": part, "time_ms": median, "p10_ms": p10, "p90_ms": p90, "reps": reps}


def one_pass(trainer: Trainer, number: int) -> None:
    """Forward and backward over one micro-batch of this rank."""
    tokens = trainer._micro_batches(trainer.text.batch(number, trainer.plan.batch))[0]
    losses, output = trainer._losses(tokens)
    (losses.mean() + output.loss).backward()
    trainer.optimizer.zero_grad()


def residual(make: Make, reps: int, comm: Comm | None = None, small: Make | None = None) -> Iterator[dict[str, Any]]:
    """Step times of each kind; 16 sequences of 1024 tokens a rank. small: with exchanges on few multiprocessors."""
    plan = TrainingPlan(16 * (comm.size if comm else 1), 16, precision="bfloat16")
    trainers = {kind: make(replace(BIG, **choices), plan) for kind, choices in KINDS.items()}
    trainers["residual, one after the other"] = after = make(BIG, plan)
    for layer in after.model.modules():
        if isinstance(layer, ResidualMoE):
            layer.forward = MethodType(one_after_the_other, layer)  # type: ignore[method-assign]
    if small is not None:
        trainers[f"residual, exchange on {FEW} multiprocessors"] = small(BIG, plan)
    shape = {"hidden": BIG.hidden, "experts": BIG.experts, "tokens_per_rank": 16 * BIG.context}
    for record in step_times(trainers, comm, reps):
        yield record | shape


def one_after_the_other(layer: ResidualMoE, x: torch.Tensor) -> tuple[torch.Tensor, Any]:
    """ResidualMoE.forward on one stream."""
    corrected, routing = layer.moe(x)
    return layer.mlp(x) + corrected, routing


def equality(make: Make, alone: Make, comm: Comm, steps: int) -> Iterator[dict[str, Any]]:
    """The losses of each step beside those of one GPU."""
    for precision in ("float32", "bfloat16"):
        for kind in ("residual", "top-2"):
            config = replace(config_named("small"), **KINDS[kind])
            plan = TrainingPlan(16, 4, precision=precision)  # type: ignore[arg-type]
            shared, one = make(config, plan), alone(config, plan)
            losses = [mean_of_ranks(comm, shared.step(step))[0] for step in range(steps)]
            wanted = [one.step(step) for step in range(steps)]
            difference = max(abs(a - b) / b for a, b in zip(losses, wanted, strict=True))
            yield {
                "kind": kind,
                "precision": precision,
                "steps": steps,
                "largest_relative_difference": difference,
                "losses": losses,
                "losses_of_one_gpu": wanted,
            }


def records(options: argparse.Namespace, comm: Comm | None, device: torch.device) -> Iterator[dict[str, Any]]:
    """Those of the subject. Collective."""
    make, alone = maker(comm, device, options.exchange), maker(None, device, "")
    if options.subject == "quality":
        yield quality(make, options.kind, options.seed, options.steps)
    elif options.subject == "residual" or comm is None:
        yield from residual(make, options.reps)
    else:
        for record in equality(make, alone, comm, 30):
            yield {"exchange": options.exchange, **record}
        small = maker(comm, device, "direct", FEW) if options.exchange == "direct" else None
        for record in residual(make, options.reps, comm, small):
            yield {"exchange": options.exchange, **record}


def main() -> int:
    """Run the command line and return the exit status."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("subject", choices=("quality", "residual", "exchange"))
    parser.add_argument("--exchange", choices=("routed", "direct"), default="routed")
    parser.add_argument("--kind", choices=KINDS, default="residual", help="for quality")
    parser.add_argument("--seed", type=int, default=0, help="for quality")
    parser.add_argument("--steps", type=int, default=300, help="of quality (default: %(default)s)")
    parser.add_argument("--reps", type=int, default=20, help="timed steps (default: %(default)s)")
    parser.add_argument("--out", metavar="FILE.jsonl", help="the records, as JSON Lines")
    options = parser.parse_args()
    with world() as (comm, device):
        first = comm is None or comm.rank == 0
        ran_on = environment() if first else {}
        gpu = {"gpu": torch.cuda.get_device_name(device), "gpus": comm.size if comm else 1}
        for record in records(options, comm, device):
            if first:
                print({k: v for k, v in record.items() if not k.startswith("losses")}, flush=True)
                if options.out:
                    replace_record(options.out, {"subject": options.subject, **record, **gpu, **ran_on}, SAME)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
