"""One run: the ranks, the model, the log, the checkpoints and the pictures."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
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
from moecomm.nodes import Nodes
from moecomm.together import together
from moecomm.train.loop import Trainer, TrainingPlan, balanced
from moecomm.train.progress import Progress, progress_of
from moecomm.train.text import Text, read_text
from moecomm.transports.launchers import started_by

LIMIT = 120.0
"""Seconds after which a rank that does not come counts as lost."""
Settings = dict[str, Any]
"""What JSON can say, by name: the settings of a run, or another record of its log."""


@contextmanager
def world() -> Iterator[tuple[Comm | None, torch.device]]:
    """All ranks that torchrun started and this one's device; None where it did not: this rank is alone."""
    cuda = torch.cuda.is_available()
    if not dist.is_torchelastic_launched():
        yield None, torch.device("cuda" if cuda else "cpu")
        return
    # Not above: a run of one rank needs no transport.
    from moecomm.transports.torch import TorchComm

    device = torch.device("cuda", dist.get_node_local_rank()) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    # Numbers of the host go through gloo also where the model is on GPUs.
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    comm = TorchComm(dist.group.WORLD, limit=LIMIT)
    share_cores(comm, len(os.sched_getaffinity(0)))
    yield comm, device
    # NCCL's groups go with the process: torch 2.11 was seen to wait for ever in destroying them.
    if not cuda:
        dist.destroy_process_group()


def warn_of_lone_ranks(environ: Mapping[str, str], program: str = "moecomm.train") -> None:
    """Warn if a launcher started several processes that know nothing of each other: the ranks are torchrun's alone."""
    if dist.is_torchelastic_launched():
        return
    launcher, started = started_by(environ, "MPICH's or Intel's mpirun", "Open MPI's mpirun", "srun")
    if started > 1:
        warnings.warn(
            f"{launcher} started {started} processes, and each runs alone; ranks that work together are started by "
            f"torchrun --nproc-per-node {started} -m {program}",
            RuntimeWarning,
            stacklevel=3,
        )


def share_cores(comm: Comm, cores: int) -> None:
    """Give each rank of this host its share of the host's cores as threads of torch, at least one. Collective.

    Threads that take turns on a core wait for each other in every product. Never more threads than there were: who has
    set fewer meant it. Rank 0 says what was changed.
    """
    neighbors = int(Nodes.discover(comm).same_node(comm.rank).sum())
    share = max(1, cores // neighbors)
    before = torch.get_num_threads()
    if before <= share:
        return
    torch.set_num_threads(share)
    if comm.rank == 0:
        text = f"{neighbors} ranks share {cores} cores of this host: torch uses {share} thread(s) a rank, not {before}"
        print(text, file=sys.stderr)


def build(options: Namespace, comm: Comm | None, device: torch.device, config: Config | None = None) -> Trainer:
    """The model and what trains it. Collective. Raises ValueError for options that do not fit together.

    config  None: the one that the options name
    """
    config = balanced(config or config_named(options.config), options.balance)
    text = together(comm, "train", lambda: Text(read_text(options.text), config.context, options.seed))
    # Each rank reads the files itself, and may have others under the same names.
    if comm is not None:
        comm.agree("train: text", f"{text.identity()}")
    model = split_model(config, options, comm, device)
    plan = TrainingPlan(
        batch=options.batch,
        micro_batch=options.micro_batch,
        learning_rate=options.learning_rate,
        balance=options.balance,
        # Only GPUs are sure to have fast products in bfloat16.
        precision="bfloat16" if device.type == "cuda" else "float32",
        seed=options.seed,
    )
    return Trainer(model, text, plan)


def split_model(config: Config, options: Namespace, comm: Comm | None, device: torch.device) -> TransformerLM:
    """The model, over all ranks as the options say. Collective. Raises ValueError for sizes that do not fit."""
    sizes = {"tensor": options.tensor, "expert": options.expert, "expert_tensor": options.expert_tensor}
    groups = None
    if comm is not None:
        # A model without experts has the groups of its dense layers.
        groups = layer_groups(comm, config.experts or (0,), **sizes)
    elif any(size not in (None, 1) for size in sizes.values()):
        raise ValueError(f"sizes {sizes} need torchrun: this is one rank")
    return TransformerLM(config, groups=groups, seed=options.seed, device=device)


def run(
    options: Namespace,
    comm: Comm | None,
    device: torch.device,
    make: Callable[[Namespace, Comm | None, torch.device], Trainer] = build,
) -> bool:
    """Train what `make` makes as the options say; rank 0 writes. Returns whether a signal ended it. Collective.

    A signal to any rank ends the run after its step, with a checkpoint. Raises ValueError for options that do not fit
    together, if another run is using options.out, or if options.out has a checkpoint already that is not to be resumed,
    or of a run with other settings.
    """
    trainer = make(options, comm, device)
    out = options.out
    steps = options.steps
    writes = comm is None or comm.rank == 0
    with ExitStack() as stack:
        together(comm, "run", lambda: stack.enter_context(alone(out, options.resume)) if writes else None)
        occupied = mean_of_ranks(comm, float(checkpoint.last(out) is not None))
        if any(occupied) and not options.resume:
            raise ValueError(f"out: {out} has a run already, whose checkpoint would be lost: resume it")
        settings = trainer.settings()
        done = 0
        if options.resume:
            done, values = restore(out, trainer.model, comm, trainer.optimizer)
            together(comm, "resume", lambda: check_settings(out, settings, values) if writes else None)
        if done >= steps:
            if writes:
                print(f"nothing to do: the run in {out} has made {done} steps, and --steps is {steps}")
            return False
        log = together(comm, "log", lambda: Log(out, steps, settings, writes, done))
        signals = stack.enter_context(stop_signals())
        for step in range(done + 1, steps + 1):
            stopped = _logged_step(trainer, log, step, comm, signals)
            if stopped or step % options.save_every == 0 or step == steps:
                model = trainer.model
                values = {"settings": settings}
                # Only the newest stays: each has the whole model with its optimizer, and the log has all losses.
                path = checkpoint.save(out, step, model, trainer.optimizer, comm=comm, values=values, keep=1)
                (validation,) = mean_of_ranks(comm, trainer.validate())
                log.checkpoint({"step": step, "validation_loss": validation}, trainer.report(), path)
            if stopped:
                break
        log.end()
    # One that comes in the last step ends nothing.
    is_interrupted = stopped and step < steps
    if is_interrupted and writes:
        print(f"interrupted after step {step}: --resume goes on from there", file=sys.stderr)
    return is_interrupted


def _logged_step(
    trainer: Trainer,
    log: Log,
    step: int,
    comm: Comm | None,
    signals: list[int],
) -> bool:
    """Train for a step, counted from 1. Returns whether a signal has come to any rank. Collective."""
    start = time.perf_counter()
    loss = trainer.step(step - 1)
    # A signal comes to the ranks between different steps, but all of them end after the same one.
    loss, stopped = mean_of_ranks(comm, loss, float(bool(signals)))
    seconds = time.perf_counter() - start
    tokens = trainer.plan.batch * trainer.text.length
    log.step({"step": step, "loss": loss, "tokens_per_s": tokens / seconds})
    return stopped > 0


@contextmanager
def alone(out: Path, resume: bool) -> Iterator[None]:
    """A block in which no other run uses out. Raises ValueError that names the run that does, by out/run.lock."""
    if resume and checkpoint.last(out) is None:
        raise ValueError(f"{out} has no checkpoint")
    out.mkdir(parents=True, exist_ok=True)
    with locked(out / "run.lock", f"another run is using {out}"):
        yield


def restore(
    folder: Path, model: TransformerLM, comm: Comm | None, optimizer: torch.optim.Optimizer | None = None
) -> tuple[int, Settings]:
    """Fill model and optimizer from the last checkpoint of a run, whatever its split.

    Returns how many steps it had made and the values saved. Collective. Raises ValueError if there is no checkpoint, or
    one of another model.
    """
    path = checkpoint.last(folder)
    # All ranks raise where one has none, as with a folder that they do not share.
    if any(mean_of_ranks(comm, float(path is None))) or path is None:
        raise ValueError(f"{folder} has no checkpoint")
    values = checkpoint.load(path, model, optimizer, comm=comm)
    return int(path.name.removeprefix("step-")), values


def check_settings(out: Path, settings: Settings, values: Settings) -> None:
    """Raises ValueError unless the run in out began with these, by its log and by the values of its checkpoint.

    A log without a text, and a checkpoint without settings, are old ones and take any. What an old one does not say of
    the config had its default.
    """
    current = _flat(settings, settings)
    try:
        logged = _flat(read_log(out)[0], settings)
        saved = _flat(values["settings"], settings) if "settings" in values else current
    except (OSError, ValueError, LookupError, AttributeError, TypeError) as error:
        reason = f" ({error})" if isinstance(error, OSError) else ""
        raise ValueError(f"{out / 'log.jsonl'} does not say which settings the run began with{reason}") from None
    for source, expected in {"": logged, " of its checkpoint": saved}.items():
        differences = []
        for name in expected | current:
            if expected.get(name) != current.get(name):
                differences.append(f"{name} is {current.get(name)!r}, expected {expected.get(name)!r}")
        if differences:
            raise ValueError(f"{', '.join(differences)}, as the run{source} in {out} began")


def _flat(record: Settings, settings: Settings) -> Settings:
    """A record by names such as "plan batch". An old one gets the text of settings, and the defaults of Config."""
    defaults = {field.name: field.default for field in fields(Config) if field.default is not MISSING}
    sections = {"text": settings["text"], **record, "config": defaults | record["config"]}
    flat = {}
    for section, values in sections.items():
        for name, value in values.items():
            flat[f"{section} {name}"] = value
    # As a log has them: JSON makes lists of tuples.
    return dict(json.loads(json.dumps(flat)))


def mean_of_ranks(comm: Comm | None, *values: float) -> list[float]:
    """Each value's mean over all ranks. Collective."""
    if comm is None:
        return list(values)
    # One collective for all values: each has the latency of a whole one.
    means: list[float] = (comm.all_reduce(np.array(values)) / comm.size).tolist()
    return means


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """The signals to stop that have come, Ctrl-C or a termination. torchrun sends its own after the terminal's."""
    signals: list[int] = []

    # It only notes the signal: an exception within a collective would leave the other ranks waiting.
    def note(number: int, frame: object) -> None:
        signals.append(number)

    handlers = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield signals
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


class Log:
    """out/log.jsonl, progress, and pictures at the end.

    writes  whether this rank does: all others are silent
    done    steps that an earlier run has made: what its log says of them stays
    """

    def __init__(
        self,
        out: Path,
        steps: int,
        settings: Settings,
        writes: bool,
        done: int = 0,
    ) -> None:
        self.out = out
        self.writes = writes
        self.records: list[Settings] = []
        self.reports: list[LayerReport] = []
        self.progress: Progress | None = progress_of(steps, "steps", done) if writes else None
        if not writes:
            return
        out.mkdir(parents=True, exist_ok=True)
        if done:
            # Steps after the checkpoint are made again, and would be in the log twice.
            self.records = [record for record in read_log(out)[1:] if record["step"] <= done]
        with replacing(out / "log.jsonl") as unfinished:
            lines = [json.dumps(record) + "\n" for record in (settings, *self.records)]
            unfinished.write_text("".join(lines))

    def step(self, record: Settings) -> None:
        """A step, for the file and the bar."""
        self._write(record)
        if self.progress is not None:
            self.progress.set_postfix({"loss": f"{record['loss']:.3f}", "tokens/s": f"{record['tokens_per_s']:,.0f}"})
            self.progress.update()

    def checkpoint(self, record: Settings, reports: list[LayerReport], path: Path) -> None:
        """What was measured at a checkpoint, for the file; where that is, above the bar."""
        self.reports = reports
        self._write(record)
        for report in reports:
            self._write({"step": record["step"], **asdict(report)})
        if self.progress is not None:
            # Not print, which would write into a bar.
            validation = f"validation loss {record['validation_loss']:.3f}"
            self.progress.write(f"step {record['step']}: {validation}, saved in {path}")

    def end(self) -> None:
        """Draw the losses and the last routing report. Needs matplotlib."""
        if self.progress is None:
            return
        self.progress.close()
        if self.reports:
            with replacing(self.out / "routing.png") as picture:
                plot_routing(self.reports, picture)
        with replacing(self.out / "loss.png") as picture:
            plot_losses(self.records, picture)

    def _write(self, record: Settings) -> None:
        if self.writes:
            self.records.append(record)
            # Opened for each record: what is written stays when the process is killed.
            with open(self.out / "log.jsonl", "a", opener=regular) as file:
                file.write(json.dumps(record) + "\n")


def read_log(out: Path) -> list[Settings]:
    """The records of a run: its settings first. A line that a full disk has cut off is none."""
    with open(out / "log.jsonl", opener=regular) as file:
        *lines, _ = file.read().split("\n")
    return [json.loads(line) for line in lines]


def plot_losses(records: list[Settings], path: Path) -> None:
    """The losses of the steps, and those of validation."""
    from matplotlib.figure import Figure

    # Figure and not pyplot: it needs no display and keeps no figures open.
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, label in {"loss": "training", "validation_loss": "validation"}.items():
        measured = [record for record in records if name in record]
        steps = [record["step"] for record in measured]
        losses = [record[name] for record in measured]
        axes.plot(steps, losses, ".-", label=label)
    axes.set(xlabel="step", ylabel="loss, nats per byte")
    axes.legend()
    figure.savefig(path)
