"""Linear layers sliced over the tensor ranks, which all hold the same tokens (Megatron-LM, arXiv 1909.08053)."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from moecomm.comm import Comm
from moecomm.exchange.lanes import replicated, summed
from moecomm.nn.part import Part
from moecomm.nn.seeds import Slice, draw, parameter, part_of

Activation = Literal["gelu", "swiglu"]


def part_in(tensor: Comm | None) -> tuple[int, int]:
    """(rank, size), or (0, 1) where there is no group."""
    return (0, 1) if tensor is None else (tensor.rank, tensor.size)


def check_activation(function: str, activation: str) -> None:
    """Raises ValueError unless there is such a one."""
    if activation not in get_args(Activation):
        raise ValueError(f"{function}: activation is {activation!r}, expected 'gelu' or 'swiglu'")


class ColumnLinear(Part):
    """x [..., inputs], the same on all tensor ranks -> this rank's slice [..., blocks * outputs / L] of the outputs.

    blocks  how many matrices lie side by side, each of which is sliced: 3 for query, key and value
    tensor  the L ranks that share the layer; None: this rank alone
    key     seed and name of the layer, for its first weights
    like    device, dtype

    Biases begin at 0. Differentiable; the backward pass is collective over tensor.
    """

    def __init__(
        self, inputs: int, outputs: int, *, blocks: int = 1, tensor: Comm | None = None, std: float = 0.02,
        key: tuple[object, ...] = (), **like: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        self.tensor = tensor
        weight = part_of(draw((blocks, outputs, inputs), std, *key), 1, part_in(tensor))
        self.weight = parameter(weight.reshape(-1, inputs), like)
        self.bias = parameter(torch.zeros(len(self.weight)), like)
        self.slices = dict.fromkeys(("weight", "bias"), Slice(0, part_in(tensor), blocks))

    def forward(self, x: Tensor) -> Tensor:
        """Not collective."""
        if self.tensor is not None and self.tensor.size > 1:
            x = replicated(x, self.tensor)
        return F.linear(x, self.weight, self.bias)


class RowLinear(Part):
    """This rank's slice x [..., inputs / L] of the inputs -> [..., outputs], the same on all tensor ranks.

    As ColumnLinear. Collective over tensor.
    """

    def __init__(
        self, inputs: int, outputs: int, *, tensor: Comm | None = None, std: float = 0.02,
        key: tuple[object, ...] = (), **like: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        self.tensor = tensor
        self.weight = parameter(part_of(draw((outputs, inputs), std, *key), 1, part_in(tensor)), like)
        self.bias = parameter(torch.zeros(outputs), like)
        self.slices = {"weight": Slice(1, part_in(tensor))}

    def forward(self, x: Tensor) -> Tensor:
        """Collective over tensor."""
        y = F.linear(x, self.weight)
        if self.tensor is not None and self.tensor.size > 1:
            y = summed(y, self.tensor)
        return y + self.bias.to(y.dtype)


class MLP(nn.Module):
    """The dense feed-forward layer: x [..., hidden] -> [..., hidden], its inner width sliced over the tensor ranks.

    activation  "gelu", or "swiglu": silu(x A) * (x B)

    Arguments as for ColumnLinear. Collective over tensor. Raises ValueError for an unknown activation.
    """

    def __init__(
        self, hidden: int, ffn: int, *, activation: Activation = "gelu", key: tuple[object, ...] = (), **options: Any
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
        gate, up = inner.chunk(2, -1)
        return self.down(F.silu(gate) * up)
