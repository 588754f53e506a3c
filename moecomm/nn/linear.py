"""Linear layers sliced over the tensor ranks, which all hold the same tokens (Megatron-LM, arXiv 1909.08053)."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from moecomm.comm import Comm
from moecomm.exchange.lanes import replicated, summed
from moecomm.nn.part import Part
from moecomm.nn.seeds import Key, Portion, Slice, check_keywords, draw, parameter, part_of

Activation = Literal["gelu", "swiglu"]


def part_in(tensor: Comm | None) -> Portion:
    """(rank, size), or (0, 1) where there is no group."""
    return (0, 1) if tensor is None else (tensor.rank, tensor.size)


def check_activation(function: str, activation: str) -> None:
    """Raises ValueError unless there is such a one."""
    if activation not in get_args(Activation):
        raise ValueError(f"{function}: activation is {activation!r}, expected 'gelu' or 'swiglu'")


class _SlicedLinear(Part):
    """A linear layer whose matrices [outputs, inputs] are sliced along `dim` over the tensor ranks."""

    dim: int

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        blocks: int = 1,
        tensor: Comm | None = None,
        std: float = 0.02,
        key: Key = (),
        **like: Any,
    ) -> None:
        super().__init__()
        portion = part_in(tensor)
        # None on one rank alone, which has nobody to send to.
        self.tensor = tensor if portion[1] > 1 else None
        # Drawn whole and cut afterwards, so that the numbers do not depend on the split.
        matrices = draw((blocks, outputs, inputs), std, *key)
        weight = part_of(matrices, self.dim + 1, portion).flatten(0, 1)
        check_keywords(type(self).__name__, like)
        self.weight = parameter(weight, like)
        self.bias = parameter(torch.zeros(len(weight)), like)
        self.slices = {"weight": Slice(self.dim, portion, blocks)}


class ColumnLinear(_SlicedLinear):
    """x [..., inputs], the same on all tensor ranks -> this rank's slice [..., blocks * outputs / L] of the outputs.

    blocks  how many matrices lie side by side, each of which is sliced: 3 for query, key and value
    tensor  the L ranks that share the layer; None: this rank alone
    key     seed and name of the layer, for its first weights
    like    device, dtype

    Biases begin at 0. Differentiable; the backward pass is collective over tensor.
    """

    dim = 0

    def __init__(self, inputs: int, outputs: int, **options: Any) -> None:
        super().__init__(inputs, outputs, **options)
        self.slices["bias"] = self.slices["weight"]

    def forward(self, x: Tensor) -> Tensor:
        """Not collective."""
        if self.tensor is not None:
            x = replicated(x, self.tensor)
        return F.linear(x, self.weight, self.bias)


class RowLinear(_SlicedLinear):
    """This rank's slice x [..., inputs / L] of the inputs -> [..., outputs], the same on all tensor ranks.

    As ColumnLinear, of one matrix. Collective over tensor.
    """

    dim = 1

    def forward(self, x: Tensor) -> Tensor:
        """Collective over tensor."""
        y = F.linear(x, self.weight)
        if self.tensor is not None:
            y = summed(y, self.tensor)
        # After the sum, which would add a bias of each rank.
        return y + self.bias.to(y.dtype)


class MLP(nn.Module):
    """The dense feed-forward layer: x [..., hidden] -> [..., hidden], its inner width sliced over the tensor ranks.

    activation  "gelu", or "swiglu": silu(x A) * (x B)

    Arguments as for ColumnLinear. Collective over tensor. Raises ValueError for an unknown activation.
    """

    def __init__(
        self,
        hidden: int,
        ffn: int,
        *,
        activation: Activation = "gelu",
        key: Key = (),
        **options: Any,
    ) -> None:
        super().__init__()
        check_activation("MLP", activation)
        self.activation = activation
        blocks = 2 if activation == "swiglu" else 1
        self.up = ColumnLinear(hidden, ffn, blocks=blocks, key=(*key, "up"), **options)
        self.down = RowLinear(ffn, hidden, key=(*key, "down"), **options)

    def forward(self, x: Tensor) -> Tensor:
        """Collective over tensor."""
        inner = self.up(x)
        if self.activation == "gelu":
            return self.down(F.gelu(inner))
        # The two matrices lie side by side, so that one product makes both.
        gate, up = inner.chunk(2, -1)
        return self.down(F.silu(gate) * up)
