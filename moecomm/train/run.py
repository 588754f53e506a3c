"""One run: the ranks, the model, the log, the checkpoints and the pictures."""

from __future__ import annotations

import json
import signal
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from moecomm.comm import Comm
from moecomm.nn import Config, LayerReport, TransformerLM, checkpoint, config_named, layer_groups, plot_routing
from moecomm.nn.files import locked, regular, replacing
from moecomm.together import together
from moecomm.train.loop import Trainer, TrainingPlan, balanced
from moecomm.train.text import Text, read_text

LIMIT = 120.0
"""Seconds after which a rank that does not come counts as lost."""


@contextmanager
def world() -> Iterator[tuple[Comm | None, torch.device]]:
    """All ranks that torchrun started and this one's device; None where it did not: this rank is alone."""
    cuda = torch.cuda.is_available()
    if not dist.is_torchelastic_launched():
        yield None, torch.device("cuda" if cuda else "cpu")
        return
    from moecomm.transports.torch import TorchComm

    device = torch.device("cuda", dist.get_node_local_rank()) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    yield TorchComm(dist.group.WORLD, limit=LIMIT), device
    if not cuda:  # NCCL's groups go with the process: torch 2.11 was seen to wait for ever in destroying them
        dist.destroy_process_group()


def build(options: Namespace, comm: Comm | None, device: torch.device, config: Config | None = None) -> Trainer:
    """The model and what trains it. Collective. Raises ValueError for options that do not fit together.

    config  None: the one that the options name
    """
    config = balanced(config or config_named(options.config), options.balance)
    text = together(comm, "train", lambda: Text(read_text(options.text), config.context, options.seed))
    if comm is not None:
        comm.agree("train: text", f"{text.identity()}")
    model = split_model(config, options, comm, device)
    of_run = {name: getattr(options, name) for name in ("batch", "micro_batch", "learning_rate", "balance", "seed")}
    return Trainer(model, text, TrainingPlan(precision="bfloat16" if device.type == "cuda" else "float32", **of_run))


def split_model(config: Config, options: Namespace, comm: Comm | None, device: torch.device) -> TransformerLM:
    """The model, over all ranks as the options say. Collective. Raises ValueError for sizes that do not fit."""
    sizes = {name: getattr(options, name) for name in ("tensor", "expert", "expert_tensor")}
    if comm is None and any(size not in (None, 1) for size in sizes.values()):
        raise ValueError(f"sizes {sizes} need torchrun: this is one rank")
    groups = None if comm is None else layer_groups(comm, config.experts or (0,), **sizes)
    return TransformerLM(config, groups=groups, seed=options.seed, device=device)


def run(
    options: Namespace,
    comm: Comm | None,
    device: torch.device,
    make: Callable[[Namespace, Comm | None, torch.device], Trainer] = build,
) -> None:
    """Train what `make` makes as the options say; rank 0 writes. Collective.

    A signal to any rank ends the run after its step, with a checkpoint. Raises ValueError for options that do not fit
    together, if another run is using options.out, or if options.out has a checkpoint already that is not to be resumed,
    or of a run with other settings.
    """
    trainer, first = make(options, comm, device), comm is None or comm.rank == 0
    with ExitStack() as stack:
        together(comm, "run", lambda: stack.enter_context(alone(options.out, options.resume)) if first else None)
        if not options.resume and any(mean_of_ranks(comm, float(checkpoint.last(options.out) is not None))):
            raise ValueError(f"out: {options.out} has a run already, whose checkpoint would be lost: resume it")
        settings = trainer.settings()
        made = 0
        if options.resume:
            made, values = restore(options.out, trainer.model, comm, trainer.optimizer)
            together(comm, "resume", lambda: check_settings(options.out, settings, values) if first else None)
        log = together(comm, "log", lambda: Log(options.out, options.steps, settings, first, made))
        with stop_signals() as came:
            for step in range(made + 1, options.steps + 1):
                start = time.perf_counter()
                loss = trainer.step(step - 1)
                loss, stopped = mean_of_ranks(comm, loss, float(bool(came)))
                tokens = trainer.plan.batch * trainer.text.length
                log.step({"step": step, "loss": loss, "tokens_per_s": tokens / (time.perf_counter() - start)})
                if stopped or step % options.save_every == 0 or step == options.steps:
                    values = {"settings": settings}
                    path = checkpoint.save(
                        options.out, step, trainer.model, trainer.optimizer, comm=comm, values=values, keep=1
                    )
                    (validation,) = mean_of_ranks(comm, trainer.validate())
                    log.checkpoint({"step": step, "validation_loss": validation}, trainer.report(), path)
                if stopped:
                    break
        log.end()


@contextmanager
def alone(out: Path, resume: bool) -> Iterator[None]:
    """A block in which no other run uses out. Raises ValueError that names the run that does, by out/run.lock."""
    if resume and checkpoint.last(out) is None:
        raise ValueError(f"{out} has no checkpoint")
    out.mkdir(parents=True, exist_ok=True)
    with locked(out / "run.lock", f"another run is using {out}"):
        yield


def restore(folder: Path, model: TransformerLM, comm: Comm | None, optimizer: Any = None) -> tuple[int, dict[str, Any]]:
    """Fill model and optimizer from the last checkpoint of a run, whatever its split.

    Returns how many steps it had made and the values saved. Collective. Raises ValueError if there is no checkpoint, or
    one of another model.
    """
    path = checkpoint.last(folder)
    if any(mean_of_ranks(comm, float(path is None))) or path is None:  # on one rank or more
        raise ValueError(f"{folder} has no checkpoint")
    values = checkpoint.load(path, model, optimizer, comm=comm)
    return int(path.name.removeprefix("step-")), values


def check_settings(out: Path, settings: dict[str, Any], values: dict[str, Any]) -> None:
    """Raises ValueError unless the run in out began with these, by its log and by the values of its checkpoint.

    A log without a text, and a checkpoint without settings, are old ones and take any. What an old one does not say of
    the config had its default.
    """
    defaults = {field.name: field.default for field in fields(Config) if field.default is not MISSING}

    def flat(record: dict[str, Any]) -> dict[str, Any]:
        parts = {"text": settings["text"], **record, "config": defaults | record["config"]}
        named = {f"{part} {name}": value for part, values in parts.items() for name, value in values.items()}
        return dict(json.loads(json.dumps(named)))  # as a log has them

    now = flat(settings)
    try:
        began = flat(read_log(out)[0])
        saved = flat(values["settings"]) if "settings" in values else now
    except (OSError, ValueError, LookupError, AttributeError, TypeError) as error:
        reason = f" ({error})" if isinstance(error, OSError) else ""
        raise ValueError(f"{out / 'log.jsonl'} does not say which settings the run began with{reason}") from None
    for before, source in ((began, f"the run in {out} began"), (saved, f"the run of its checkpoint in {out} began")):
        other = [name for name in before | now if before.get(name) != now.get(name)]
        if other:
            got = ", ".join(f"{name} is {now.get(name)!r}, expected {before.get(name)!r}" for name in other)
            raise ValueError(f"{got}, as {source}")


def mean_of_ranks(comm: Comm | None, *values: float) -> list[float]:
    """Each value's mean over all ranks. Collective."""
    if comm is None:
        return list(values)
    means: list[float] = (comm.all_reduce(np.array(values)) / comm.size).tolist()
    return means


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """The signals to stop that have come, Ctrl-C or a termination. torchrun sends its own after the terminal's."""
    came: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda number, _: came.append(number)) for number in numbers]
    try:
        yield came
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


class Log:
    """out/log.jsonl, a progress bar, and pictures at the end. Silent on all ranks but the first.

    made  steps that an earlier run has made: what its log says of them is kept
    """

    def __init__(self, out: Path, steps: int, settings: dict[str, Any], first: bool, made: int = 0) -> None:
        from tqdm import tqdm

        self.out, self.first = out, first
        self.steps: list[dict[str, Any]] = []
        self.checkpoints: list[dict[str, Any]] = []
        self.reports: list[LayerReport] = []
        self.bar = tqdm(total=steps, initial=made, unit=" steps", disable=not first)
        if first:
            out.mkdir(parents=True, exist_ok=True)
            kept = [record for record in read_log(out)[1:] if record["step"] <= made] if made else []
            self.steps = [record for record in kept if "loss" in record]
            self.checkpoints = [record for record in kept if "validation_loss" in record]
            with replacing(out / "log.jsonl") as unfinished:
                unfinished.write_text("".join(json.dumps(record) + "\n" for record in (settings, *kept)))

    def step(self, record: dict[str, Any]) -> None:
        """A step, for the file and the bar."""
        self.steps.append(record)
        self._write(record)
        self.bar.set_postfix({"loss": f"{record['loss']:.3f}", "tokens/s": f"{record['tokens_per_s']:,.0f}"})
        self.bar.update()

    def checkpoint(self, record: dict[str, Any], reports: list[LayerReport], path: Path) -> None:
        """What was measured at a checkpoint, for the file; where that is, above the bar."""
        self.checkpoints.append(record)
        self.reports = reports
        self._write(record)
        for report in reports:
            self._write({"step": record["step"], **asdict(report)})
        if self.first:
            self.bar.write(f"step {record['step']}: validation loss {record['validation_loss']:.3f}, saved in {path}")

    def end(self) -> None:
        """Draw the losses and the last routing report. Needs matplotlib."""
        self.bar.close()
        if self.first:
            if self.reports:
                with replacing(self.out / "routing.png") as picture:
                    plot_routing(self.reports, picture)
            with replacing(self.out / "loss.png") as picture:
                plot_losses({"training": self.steps, "validation": self.checkpoints}, picture)

    def _write(self, record: dict[str, Any]) -> None:
        if self.first:
            with open(self.out / "log.jsonl", "a", opener=regular) as file:
                file.write(json.dumps(record) + "\n")


def read_log(out: Path) -> list[dict[str, Any]]:
    """The records of a run: its settings first. A line that a full disk has cut off is none."""
    with open(out / "log.jsonl", opener=regular) as file:
        return [json.loads(line) for line in file.read().split("\n")[:-1]]


def plot_losses(curves: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """A curve for each name: records with a step and a loss or validation_loss."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, records in curves.items():
        losses = [record["loss" if "loss" in record else "validation_loss"] for record in records]
        axes.plot([record["step"] for record in records], losses, ".-", label=name)
    axes.set(xlabel="step", ylabel="loss, nats per byte")
    axes.legend()
    figure.savefig(path)
