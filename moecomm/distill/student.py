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

    # Dense layers are 0, 2, 4 ..., and those with experts 1, 3, 5 ...: each kind is counted by itself.
    dense = _spread((num_teacher + 1) // 2, (num_student + 1) // 2)
    with_experts = _spread(num_teacher // 2, num_student // 2)
    sources = []
    for layer in range(num_student):
        kind = layer % 2
        number = (dense, with_experts)[kind][layer // 2]
        sources.append(2 * number + kind)
    return tuple(sources)


def _spread(num_sources: int, count: int) -> list[int]:
    """Numbers of `count` out of num_sources layers of a kind, evenly spread. A single one is the last."""
    if count == 1:
        return [num_sources - 1]
    return [round(i * (num_sources - 1) / (count - 1)) for i in range(count)]


def student_config(teacher: Config, num_layers: int) -> Config:
    """The teacher's config with so many layers, each with as many experts as the one that it stands for."""
    sources = kept_layers(teacher.num_layers, num_layers)
    experts = tuple(teacher.experts_of(layer) for layer in sources[1::2]) if teacher.experts else ()
    return replace(teacher, num_layers=num_layers, experts=experts)


@torch.no_grad()
def start_from(student: TransformerLM, teacher: TransformerLM) -> None:
    """Give the student its teacher's weights: embeddings, and of each layer those of the one that it stands for.

    Both are split alike over the ranks; not collective. Raises ValueError if a layer has another size.
    """
    sources = kept_layers(teacher.config.num_layers, student.config.num_layers)
    weights = teacher.state_dict()
    for name, value in student.state_dict().items():
        # A block is named by its number; embeddings and the last norm have the same names in both.
        if name.startswith("blocks."):
            _, layer, rest = name.split(".", 2)
            source = f"blocks.{sources[int(layer)]}.{rest}"
        else:
            source = name
        shape = tuple(weights[source].shape) if source in weights else None
        if shape != tuple(value.shape):
            raise ValueError(f"start_from: {name} is {tuple(value.shape)}, but the teacher's {source} is {shape}")
        value.copy_(weights[source])
