"""The records that a gate's call carries from `route` through torch's operators to C++ and CUDA.

Each is a flat tuple of arrays, numbers and words. torch's operators know no records: ops.py gives them the fields one
by one and puts the record together again on the other side. C++ (gating_bindings.cpp) reads the fields by name, CUDA
(cuda.py) turns them into the macros and the argument struct of a kernel.
"""

# ruff: noqa: N803, N806 - capitals are dimensions

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from moecomm.arrays import Array

SCORES = ("softmax", "sigmoid")
NORMALIZATIONS = ("none", "selected")
DROPS = ("position", "choice", "probability", "random")
NOISES = ("none", "gumbel", "jitter")
UNUSABLE = ("raise", "note")
FLOOR = {"softmax": 2.0**-23, "sigmoid": 1e-20}
"""The least denominator of normalize="selected": DeepSpeed's for softmax, DeepSeek's for sigmoid."""


class Inputs(NamedTuple):
    """The arrays that `route` reads."""

    logits: Array
    """[T, E] float32, float16 or bfloat16."""
    bias: Array | None = None
    """[E] float32."""
    mask: Array | None = None
    """[T] bool."""
    step: Array | None = None
    """One int64 on the device, which the kernel adds to the generator's offset."""
    recorded: Array | None = None
    """[T, K] int32, the experts that were chosen before; -1: none."""
    live: Array | None = None
    """One int64, the tokens that are not masked: where recorded and mask are both given, the loads do not tell it."""


class Choices(NamedTuple):
    """What the caller of `route` chose, with the words and the defaults of `route`."""

    top_k: int
    score: str = "softmax"
    num_groups: int = 1
    top_groups: int = 1
    best_in_group: int = 2
    normalize: str = "none"
    scale: float = 1.0
    capacity: int | None = None
    drop: str = "position"
    noise: str = "none"
    noise_scale: float = 0.0
    seed: int = 0
    offset: int = 0
    align: int = 1
    unusable: str = "raise"
    threads: int = 1

    @property
    def floor(self) -> float:
        """The least sum by which a token's weights are divided; 0: they are not divided."""
        return FLOOR[self.score] if self.normalize == "selected" else 0.0

    def num_rows(self, T: int, E: int) -> int:
        """N: the most rows that a routing of T tokens to E experts has."""
        if self.capacity is not None:
            return E * self.capacity
        assignments = T * self.top_k
        # Each expert that has rows ends with up to align - 1 empty ones.
        padding = min(E, assignments) * (self.align - 1)
        return (assignments + padding) // self.align * self.align


class Fields(NamedTuple):
    """The arrays of a Routing, in the order of its fields."""

    expert: Array
    weight: Array
    slot: Array
    row: Array
    source: Array
    count: Array
    offset: Array
    load: Array
    aux_loss: Array
    z_loss: Array
    lse: Array
    status: Array


class Gradients(NamedTuple):
    """The gradients of the loss in what `route` returns."""

    grad_weight: Array
    """[T, K] float32."""
    grad_aux_loss: Array
    grad_z_loss: Array


class Saved(NamedTuple):
    """What the backward pass of `route` needs from the forward pass."""

    logits: Array
    expert: Array
    lse: Array
    load: Array
    mask: Array | None
    live: Array | None = None


def new_fields(ints: Callable[..., Array], floats: Callable[..., Array], T: int, E: int, choices: Choices) -> Fields:
    """Arrays for a routing of T tokens to E experts. ints(2, 3) allocates [2, 3] of int32, floats(2, 3) of float32."""
    # Weights and losses are float32 whatever dtype the logits have: bfloat16 would lose most of a sum over tokens.
    K = choices.top_k
    return Fields(
        expert=ints(T, K),
        weight=floats(T, K),
        slot=ints(T, K),
        row=ints(T, K),
        source=ints(choices.num_rows(T, E)),
        count=ints(E),
        offset=ints(E + 1),
        load=ints(E),
        aux_loss=floats(),
        z_loss=floats(),
        lse=floats(T),
        status=ints(),
    )
