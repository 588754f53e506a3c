"""The quality claims of DeepSpeed-MoE (arXiv 2201.05596) in small: models trained alike on a text, held-out losses.

python bench/claims.py --text gcide.txt --seconds 600 --out bench/results/claims_h200.jsonl

A row is one kind of model, a run is a row and a seed; runs that are in --out are not made again, unless the row is
another model now: then the new record takes the place of the old one. --seconds stops the runs under way, which are
then lost; call it again to go on. Models are trained beside each other, so the times of a run
say what it cost here, not how fast a model is: for that, see bench/train_gpu.py.

The text: any UTF-8 file. For Debian's dictionary, 40 MB of English:
    apt-get download dict-gcide && dpkg -x dict-gcide_*.deb . && \
    zcat usr/share/dictd/gcide.dict.dz | iconv -c -f utf-8 -t utf-8 > gcide.txt
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, replace
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from environment import environment
from harness import replace as replace_record
from torch import Tensor

from moecomm.distill import Distiller, ModelTeacher, Schedule, student_config
from moecomm.nn import Config, TransformerLM
from moecomm.train.loop import Trainer, TrainingPlan
from moecomm.train.text import Text, read_text

TEACHER = "pr-moe"
STUDENTS = {"student": "none", "student, full": "full", "student, staged": "staged", "student, linear": "linear"}
STOP = 0.7
"""Share of the steps after which the staged student is alone: the paper's 400,000 of about 572,000."""
ROWS = (
    TEACHER,
    *list(STUDENTS)[:3],
    "residual",
    "top-2",
    "standard",
    "dense",
    "first half",
    "second half",
    "student, linear",
)
"""The most telling ones first."""


def config_of(row: str, base: Config) -> Config:
    """The model of a row. base: its layers, width, context; experts in every second layer."""
    n = base.num_layers // 2
    base = replace(base, experts=(), residual="none", top_k=1)
    if row in STUDENTS:
        teacher = config_of(TEACHER, base)
        return student_config(teacher, teacher.num_layers - max(1, teacher.num_layers // 8))  # 24 -> 21, 8 -> 7
    changes: dict[str, dict[str, Any]] = {
        "dense": {},
        "standard": {"experts": (16,) * n},
        TEACHER: {"experts": (4,) * (n // 2) + (8,) * (n - n // 2), "residual": "sum"},  # half of standard's parameters
        "first half": {"experts": (16,) * (n // 2) + (0,) * (n - n // 2)},
        "second half": {"experts": (0,) * (n - n // 2) + (16,) * (n // 2)},
        "residual": {"experts": (8,) * n, "residual": "sum"},
        "top-2": {"experts": (8,) * n, "top_k": 2, "normalize": "selected"},
    }
    return replace(base, **changes[row])


def base_of(options: argparse.Namespace) -> Config:
    """Dense; whose layers, width and context all rows have."""
    hidden = options.hidden
    return Config(8, hidden, max(2, hidden // 64), vocabulary=256, context=options.context)


def active_parameters(config: Config) -> int:
    """That a token meets, embeddings included."""
    return replace(config, experts=tuple(min(e, config.top_k) for e in config.experts)).num_parameters()


@dataclass(frozen=True)
class Run:
    """One model to be trained."""

    row: str
    seed: int
    device: str
    deadline: float
    """time.time() when it gives up."""
    teachers: Path
    """Folder of their weights."""
    options: argparse.Namespace


class Counted(ModelTeacher):
    """A teacher that knows how often it was asked."""

    calls = 0

    def __call__(self, tokens: Tensor) -> Tensor:
        """Collective as ModelTeacher."""
        self.calls += 1
        return super().__call__(tokens)


def train(run: Run) -> dict[str, Any] | None:
    """The record of a run; None if the time was over before."""
    torch.set_num_threads(1)
    start, options = time.time(), run.options
    steps, config = options.steps, config_of(run.row, base_of(options))
    schedule = schedule_of(run.row, steps)
    trainer = trainer_of(run, config, schedule)
    losses, curve, seconds = [], [], []
    for step in range(steps):
        if time.time() > run.deadline:
            return None
        before = time.perf_counter()
        losses.append(trainer.step(step))
        seconds.append(time.perf_counter() - before)
        if (step + 1) % max(1, steps // 10) == 0:
            curve.append([step + 1, trainer.validate()])
    validation = trainer.validate(16)
    if run.row == TEACHER:
        unfinished = weights_of(run).with_suffix(".unfinished")  # renamed when whole: students begin when it is there
        torch.save(trainer.model.state_dict(), unfinished)
        unfinished.rename(weights_of(run))
    calls = trainer.teacher.calls if isinstance(trainer, Distiller) else 0  # type: ignore[attr-defined]
    return {
        **key_of(run),
        "validation_loss": validation,
        "validation_curve": curve,
        "losses": losses[:: max(1, steps // 50)],
        "tokens": steps * options.batch * config.context,
        "seconds": time.time() - start,
        "step_ms": float(np.median(seconds)) * 1e3,
        "parameters": config.num_parameters(),
        "active_parameters": active_parameters(config),
        "teacher_calls": calls,
        "schedule": None if schedule is None else asdict(schedule),
        "config": asdict(config),
        "device": torch.cuda.get_device_name() if run.device != "cpu" else "cpu",
        "beside_each_other": options.workers,
    }


def key_of(run: Run) -> dict[str, Any]:
    """What makes a run another one."""
    options = run.options
    text = ", ".join(Path(file).name for file in options.text) or "Python's standard library"
    chosen = {name: getattr(options, name) for name in ("hidden", "context", "steps", "batch", "learning_rate")}
    return {"row": run.row, "seed": run.seed, "text": text, **chosen}


def schedule_of(row: str, steps: int) -> Schedule | None:
    """None: a model without a teacher."""
    stop = {"student, staged": round(STOP * steps), "student, linear": steps}.get(row)
    kind: Any = STUDENTS.get(row, "none")
    return None if kind == "none" else Schedule(kind, 1.0, stop)


def trainer_of(run: Run, config: Config, schedule: Schedule | None) -> Trainer:
    options, cuda = run.options, run.device != "cpu"
    if cuda:
        torch.cuda.set_device(run.device)
    precision: Any = "bfloat16" if cuda else "float32"
    plan = TrainingPlan(
        options.batch, options.batch, options.learning_rate,
        decay_steps=options.steps, precision=precision, seed=run.seed,
    )  # fmt: skip
    text = Text(text_of(tuple(options.text)), config.context, run.seed)
    model = TransformerLM(config, seed=run.seed, device=run.device)
    if schedule is None:
        return Trainer(model, text, plan)
    teacher = TransformerLM(config_of(TEACHER, base_of(options)), device=run.device)
    teacher.load_state_dict(torch.load(weights_of(run), map_location=run.device, weights_only=True))
    return Distiller(model, text, plan, Counted(teacher), schedule)


@cache
def text_of(files: tuple[str, ...]) -> Tensor:
    return read_text(files)


def weights_of(run: Run) -> Path:
    return run.teachers / f"{run.seed}.pt"


def recorded(run: Run, out: Path) -> bool:
    """Whether out has its record, of the model that the row is now."""
    lines = out.read_text().splitlines() if out.exists() else []
    found = [record for record in map(json.loads, lines) if key_of(run).items() <= record.items()]
    config = config_of(run.row, base_of(run.options))
    return any(config == Config(**each["config"] | {"experts": tuple(each["config"]["experts"])}) for each in found)


def missing(runs: list[Run], out: Path) -> list[Run]:
    """The chosen ones that have no record, and the teachers of students among them: their weights are not kept."""
    new = [run for run in runs if run.row in run.options.rows and not recorded(run, out)]
    taught = {run.seed for run in new if schedule_of(run.row, 10)}
    return [run for run in runs if run in new or (run.row == TEACHER and run.seed in taught)]


def work(runs: list[Run], slots: list[str], deadline: float) -> Iterator[tuple[Run, dict[str, Any]]]:
    """Runs and their records as they come. A slot is a process with a device; students wait for their teachers."""
    pools = [ProcessPoolExecutor(1, get_context("spawn")) for _ in slots]
    busy: dict[Future[Any], tuple[int, Run]] = {}
    while True:
        free = [slot for slot in range(len(slots)) if slot not in [taken for taken, _ in busy.values()]]
        for slot in free:
            ready = [run for run in runs if not schedule_of(run.row, 10) or weights_of(run).exists()]
            if ready and time.time() < deadline:
                runs.remove(ready[0])
                busy[pools[slot].submit(train, replace(ready[0], device=slots[slot]))] = slot, ready[0]
        if not busy:
            break
        for future in wait(busy, return_when=FIRST_COMPLETED).done:
            _, run = busy.pop(future)
            if record := future.result():
                yield run, record
    for pool in pools:
        pool.shutdown()


def main() -> int:
    """Run the command line and return the exit status: 0, or 3 if runs are left to be made."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--text", nargs="+", default=[], metavar="FILE", help="default: the standard library's sources")
    parser.add_argument("--hidden", type=int, default=384, help="width of all models (default: %(default)s)")
    parser.add_argument("--context", type=int, default=512, help="bytes in a sequence (default: %(default)s)")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=ROWS, metavar="ROW", help=f"of {', '.join(ROWS)}")
    parser.add_argument("--seeds", type=int, default=2, help="(default: %(default)s)")
    parser.add_argument("--steps", type=int, default=800, help="(default: %(default)s)")
    parser.add_argument("--batch", type=int, default=32, help="sequences a step (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="falls to a tenth (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=1, help="runs at once on each GPU (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=3600, help="stop after these (default: %(default)s)")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.jsonl", help="the records, as JSON Lines")
    options = parser.parse_args()
    devices = [f"cuda:{i}" for i in range(torch.cuda.device_count())] or ["cpu"]
    deadline, ran_on = time.time() + options.seconds, environment()
    with tempfile.TemporaryDirectory() as folder:
        seeds = (range(min(2, options.seeds)), range(2, options.seeds))  # a third one when all rows have two
        runs = [
            Run(row, seed, "cpu", deadline, Path(folder), options) for some in seeds for row in ROWS for seed in some
        ]
        runs = missing(runs, options.out)
        left = len(runs)
        for run, record in work(runs, devices * options.workers, deadline):
            left -= 1
            loss, seconds, step = (record[name] for name in ("validation_loss", "seconds", "step_ms"))
            print(f"{run.row:16} seed {run.seed}  {loss:.4f}  {seconds:.1f} s, {step:.1f} ms a step", flush=True)
            if not recorded(run, options.out):
                replace_record(str(options.out), record | ran_on, key_of(run))
    print(f"{left} runs left")
    return 3 if left else 0


if __name__ == "__main__":
    raise SystemExit(main())
