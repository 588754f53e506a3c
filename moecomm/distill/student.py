"""The student: its teacher's sizes, with fewer layers."""

from __future__ import annotations

from dataclasses import replace

import torch

from moecomm.nn import Config, TransformerLM


def kept_layers(num_teacher: int, num_student: int) -> tuple[int, ...]:
    """For each layer of the student, the one of the teacher's that it stands for, both counted from 0.

    A layer with experts stands for one with experts, a dense one for a dense one; each kind is spread evenly over the
    teacher, its first and last layer kept; a single one is the last.

    Raises ValueError unless 2 <= num_student <= num_teacher.
    """
    if not 2 <= num_student <= num_teacher:
        raise ValueError(f"student: num_layers is {num_student}, expected 2 .. {num_teacher}, those of the teacher")

    def kept(kind: int) -> list[int]:
        theirs, ours = ((num + 1 - kind) // 2 for num in (num_teacher, num_student))
        if ours == 1:
            return [2 * (theirs - 1) + kind]
        return [2 * round(i * (theirs - 1) / (ours - 1)) + kind for i in range(ours)]

    kinds = kept(0), kept(1)
    return tuple(kinds[layer % 2][layer // 2] for layer in range(num_student))


def student_config(teacher: Config, num_layers: int) -> Config:
    """The teacher's config with so many layers, each with as many experts as the one that it stands for."""
    kept = kept_layers(teacher.num_layers, num_layers)
    experts = tuple(teacher.experts_of(layer) for layer in kept[1::2]) if teacher.experts else ()
    return replace(teacher, num_layers=num_layers, experts=experts)


@torch.no_grad()
def start_from(student: TransformerLM, teacher: TransformerLM) -> None:
    """Give the student its teacher's weights: embeddings, and of each layer those of the one that it stands for.

    Both are split alike over the ranks; not collective. Raises ValueError if a layer has another size.
    """
    kept = kept_layers(teacher.config.num_layers, student.config.num_layers)
    theirs = teacher.state_dict()
    for name, value in student.state_dict().items():
        if name.startswith("blocks."):
            _, layer, rest = name.split(".", 2)
            source = f"blocks.{kept[int(layer)]}.{rest}"
        else:
            source = name
        shape = tuple(theirs[source].shape) if source in theirs else None
        if shape != tuple(value.shape):
            raise ValueError(f"start_from: {name} is {tuple(value.shape)}, but the teacher's {source} is {shape}")
        value.copy_(theirs[source])
