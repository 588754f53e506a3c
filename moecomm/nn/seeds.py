"""First weights: each is drawn from a seed and a name, so it is the same however a model is split over ranks.

And the seeds of layers that draw later, and `Slice`, which says how it is split.
"""

from __future__ import annotations

import hashlib
from typing import Any, NamedTuple

import torch
from torch import Tensor

Key = tuple[object, ...]
"""A seed, then names or numbers that say what is drawn from it."""
Portion = tuple[int, int]
"""(i, n): number i of n equal slices or stages."""


class Slice(NamedTuple):
    """Which slice of a whole weight a rank has along a dimension.

    blocks  how many matrices lie side by side along it, each of which is sliced
    """

    dim: int
    portion: Portion
    blocks: int = 1


def draw(shape: tuple[int, ...], std: float, *key: object) -> Tensor:
    """Normal random numbers, float32, on the CPU: the same key gives the same ones on every rank and device.

    key  the seed and name of the weight
    """
    # On the CPU, and of its own: a device's generator or torch's default one would give other numbers.
    generator = torch.Generator().manual_seed(number(*key))
    return torch.randn(shape, generator=generator, dtype=torch.float32) * std


def number(*key: object) -> int:
    """A number below 2**56 that depends on the key alone, and is another one for another key."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=7).digest(), "big")


def check_keywords(layer: str, keywords: dict[str, Any]) -> None:
    """TypeError for what is neither device nor dtype, by name."""
    unknown = [name for name in keywords if name not in ("device", "dtype")]
    if unknown:
        raise TypeError(f"{layer}: unknown keyword {', '.join(unknown)}; beside its own it takes device and dtype")


def parameter(values: Tensor, like: dict[str, Any]) -> torch.nn.Parameter:
    """values as a parameter of its own memory.

    like  device and dtype, or nothing: torch's default dtype
    """
    like = {"dtype": torch.get_default_dtype(), **like}
    # A copy, since values may be a slice: it would keep the memory of the whole weight.
    return torch.nn.Parameter(values.to(**like, copy=True).contiguous())


def part_of(values: Tensor, dim: int, portion: Portion) -> Tensor:
    """A slice of values along a dimension. Raises ValueError if the number of slices does not divide it."""
    number, ranks = portion
    if values.shape[dim] % ranks:
        raise ValueError(f"a weight {tuple(values.shape)} has {values.shape[dim]} slices, which {ranks} cannot share")
    return values.chunk(ranks, dim)[number]
