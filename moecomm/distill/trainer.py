"""The trainer of moecomm.train with a teacher beside the text."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import asdict
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moecomm.comm import Comm
from moecomm.distill.loss import check_temperature, distillation_loss
from moecomm.distill.schedule import Schedule
from moecomm.distill.student import start_from, student_config
from moecomm.distill.teacher import CachedTeacher, ModelTeacher, Teacher
from moecomm.nn import Config, Output, TransformerLM, config_named
from moecomm.nn.files import regular
from moecomm.together import together
from moecomm.train.loop import Trainer, TrainingPlan
from moecomm.train.run import build as build_alone
from moecomm.train.run import read_log, restore, split_model
from moecomm.train.text import Text


class Distiller(Trainer):
    """Steps of AdamW on a student: the text's loss and, for as long as the schedule says, the teacher's.

    model, text, plan  as for Trainer. Batches, learning rate and schedule depend on a step's number alone, so a run
                       that was interrupted goes on as if it had not been
    temperature        of `distillation_loss`

    Raises ValueError if the teacher has another vocabulary or cannot read such long sequences, or for a temperature
    that is not above 0 and finite.
    """

    def __init__(
        self,
        model: TransformerLM,
        text: Text,
        plan: TrainingPlan,
        teacher: Teacher,
        schedule: Schedule,
        temperature: float = 1.0,
    ) -> None:
        check_sizes(teacher, model.config)
        check_temperature("Distiller", temperature)
        super().__init__(model, text, plan)
        self.teacher = teacher
        self.schedule = schedule
        self.temperature = temperature

    def settings(self) -> dict[str, Any]:
        """As Trainer's, and the distillation."""
        settings = super().settings()
        settings["distillation"] = {**asdict(self.schedule), "temperature": self.temperature}
        return settings

    def objective(self, number: int, tokens: Tensor, losses: Tensor, output: Output) -> Tensor:
        """As Trainer's, and alpha * T^2 * KL(teacher || student). Every tensor rank has whole logits."""
        alpha = self.schedule.at(number)
        # A teacher costs a forward pass, often of a larger model.
        if not alpha:
            return super().objective(number, tokens, losses, output)
        with self._precision():
            teacher = self.teacher(tokens[:, :-1])
        logits = output.logits.flatten(0, 1)
        teacher = teacher.flatten(0, 1)
        return distillation_loss(losses, logits, teacher, alpha=alpha, temperature=self.temperature) + output.loss


def check_sizes(teacher: Teacher | Config, student: Config) -> None:
    """Raises ValueError if the student cannot learn from the teacher."""
    if teacher.vocabulary != student.vocabulary:
        raise ValueError(
            f"teacher: its vocabulary is {teacher.vocabulary}, expected {student.vocabulary}, the student's"
        )
    if teacher.context < student.context:
        raise ValueError(f"teacher: it reads {teacher.context} tokens, expected >= {student.context}, as the student")


def build(options: Namespace, comm: Comm | None, device: torch.device) -> Distiller:
    """What trains the student. Collective. Raises ValueError for options that do not fit together."""
    schedule = Schedule(options.schedule, options.alpha, options.stop)
    if schedule.stop is not None and schedule.stop > options.steps:
        raise ValueError(f"stop is step {schedule.stop}, expected <= {options.steps}, the steps of the run")
    if options.cache_top and not options.cache:
        raise ValueError(f"cache-top is {options.cache_top}, expected none without a cache")
    if options.layers and options.config:
        raise ValueError(f"layers is {options.layers}, expected none with config {options.config!r}, which has its own")
    of_teacher = together(comm, "distill", lambda: config_of_run(options.teacher))
    if options.config is None:
        config = student_config(of_teacher, options.layers or of_teacher.num_layers * 7 // 8)
    else:
        config = config_named(options.config)
    # Before the teacher is read, which may take long.
    check_sizes(of_teacher, config)
    model = split_model(of_teacher, options, comm, device)
    try:
        restore(options.teacher, model, comm)
    except ValueError as error:
        raise ValueError(f"teacher: {error}") from None
    teacher: Teacher = ModelTeacher(model)
    if options.cache:
        top = options.cache_top or of_teacher.vocabulary
        asked = teacher
        # A folder for each teacher, since its answers are told apart by the tokens alone.
        folder = together(comm, "distill", lambda: options.cache / digest_of_run(options.teacher))
        teacher = together(comm, "distill", lambda: CachedTeacher(asked, folder, top, comm))
    # After the teacher: a wrong folder is told before the text is read.
    alone = build_alone(options, comm, device, config)
    if options.start == "teacher":
        start_from(alone.model, model)
    return Distiller(alone.model, alone.text, alone.plan, teacher, schedule, options.temperature)


def digest_of_run(folder: Path) -> str:
    """Of its log: no two runs have the same."""
    with open(folder / "log.jsonl", "rb", opener=regular) as log:
        return blake2b(log.read(), digest_size=6).hexdigest()


def config_of_run(folder: Path) -> Config:
    """The model that a run of moecomm.train or moecomm.distill has trained. Raises ValueError if there is none."""
    file = folder / "log.jsonl"
    try:
        sizes = dict(read_log(folder)[0]["config"])
        # JSON has made a list of the tuple.
        sizes["experts"] = tuple(sizes["experts"])
        return Config(**sizes)
    # The folder is what the user gave: whatever is wrong with it is bad input and no failure of the disk.
    except OSError as error:
        raise ValueError(f"teacher: {file}: {error.strerror}: no run of moecomm.train") from None
    except (ValueError, LookupError, TypeError, AttributeError):
        raise ValueError(f"teacher: {file} does not begin with the config of a model") from None
