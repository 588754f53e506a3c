"""The experts of a rank as one bank of weights, applied to rows that lie expert by expert."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from moecomm.nn.linear import Activation, check_activation
from moecomm.nn.part import Part
from moecomm.nn.seeds import Slice, draw, parameter, part_of

FSDP = "FSDP would mix the experts of its ranks as shards of one bank: expected none where ranks share experts"
SLICED = {"up": 1, "gate": 1, "up_bias": 0, "down": 0}
"""The dimension of an expert's weight that is its inner width."""


class Experts(Part):
    """E' feed-forward networks: rows [N, hidden] -> [N, hidden], each row through its own expert.

    hidden, ffn  width of the rows, and inside
    experts      global ids of the E' experts here. An expert's first weights depend on its id and the seed alone, not
                 on which rank holds it
    activation   "gelu": gelu(x up + b) down + b'. "swiglu": (silu(x gate) * (x up)) down, without biases
    part         (i, n): hold slice i of n of each expert's inner width; the n answers are to be added. Slice 0 adds b'
    num_experts  of all ranks; None: those here are all
    weights      weights(e, name) gives the whole weight of expert e, such as "up" [hidden, ffn]; None: drawn
    key          seed and name of the layer, of those drawn
    like         device, dtype

    Weights are [E', hidden, ffn / n] and [E', ffn / n, hidden]. Rows in bfloat16 go through torch's grouped GEMM, if
    this torch has it; others expert by expert. Raises ValueError if n does not divide ffn.
    """

    def __init__(
        self, hidden: int, ffn: int, experts: Sequence[int], *, activation: Activation = "gelu",
        part: tuple[int, int] = (0, 1), num_experts: int | None = None, std: float = 0.02,
        key: tuple[object, ...] = (), weights: Callable[[int, str], Tensor] | None = None, **like: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        check_activation("Experts", activation)
        if ffn % part[1]:
            raise ValueError(f"Experts: ffn is {ffn}, which {part[1]} slices cannot share")
        self.experts = tuple(experts)
        self.activation = activation
        self.slices = {name: Slice(dim, part) for name, dim in SLICED.items()}
        """Of one expert's weights."""
        self.split = part[1] > 1 or num_experts not in (None, len(self.experts))
        """Whether other ranks hold other experts, or other slices."""
        self.wrapper = 0
        """id of the DistributedDataParallel that was found to leave them alone."""

        def bank(name: str, shape: tuple[int, int]) -> nn.Parameter:
            whole = weights or (lambda e, name: draw(shape, std, *key, "expert", e, name))
            slices = [part_of(whole(e, name), SLICED[name], part) for e in experts]
            return parameter(torch.stack(slices) if slices else torch.zeros(0, *shape), like)

        self.up = bank("up", (hidden, ffn))
        self.down = bank("down", (ffn, hidden))
        if activation == "swiglu":
            self.gate = bank("gate", (hidden, ffn))
        else:
            self.up_bias = parameter(torch.zeros(len(experts), ffn // part[1]), like)
            self.down_bias = parameter(torch.zeros(len(experts), hidden), like) if part[0] == 0 else None

    def place(self) -> list[int]:
        """As Part has it."""
        return [*super().place(), *self.experts] if self.split else super().place()

    def __setattr__(self, name: str, value: Any) -> None:
        """Torch's fully_shard puts its shards here."""
        if self.__dict__.get("split") and type(value).__name__ == "DTensor":
            raise ValueError(f"Experts: {FSDP}")
        super().__setattr__(name, value)

    def forward(self, rows: Tensor, rows_per_expert: Any) -> Tensor:
        """rows [N, hidden], rows_per_expert [E'] of them for each expert, in this order -> [N, hidden].

        rows_per_expert may be numpy, or a tensor on the rows' device that sums up to less than N: the rows behind
        are no expert's and give zeros. Not collective.
        """
        multiply = _Grouped if _is_grouped(rows, self.up) else _Loop
        product = multiply(rows, rows_per_expert)
        if self.activation == "swiglu":
            inner = F.silu(product(rows, self.gate, None)) * product(rows, self.up, None)
            return product(inner, self.down, None)
        return product(F.gelu(product(rows, self.up, self.up_bias)), self.down, self.down_bias)


def _is_grouped(rows: Tensor, weight: Tensor) -> bool:
    """torch's kernel takes bfloat16 and multiples of 16 bytes; for other dtypes it loops as we do."""
    lengths_fit = all(length % 8 == 0 for length in weight.shape[1:])
    return rows.dtype == torch.bfloat16 and hasattr(F, "grouped_mm") and lengths_fit


class _Loop:
    """Products of an expert's rows and its weight, one expert after the other."""

    def __init__(self, rows: Tensor, rows_per_expert: Any) -> None:
        self.counts = rows_per_expert.tolist()
        self.beyond = len(rows) - sum(self.counts)

    def __call__(self, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        *parts, rest = rows.split([*self.counts, self.beyond])
        weights = weight.to(rows.dtype).unbind()  # not weight[e]: its gradient is as large as the whole bank
        biases = [None] * len(weights) if bias is None else bias.to(rows.dtype).unbind()
        products = [F.linear(x, w.T, b) for x, w, b in zip(parts, weights, biases, strict=True)]
        return torch.cat([*products, rest.new_zeros(self.beyond, weight.shape[2])])


class _Grouped:
    """All products in one kernel, which reads on the device where each expert's rows end."""

    def __init__(self, rows: Tensor, rows_per_expert: Any) -> None:
        on_host = isinstance(rows_per_expert, np.ndarray)
        counts = torch.from_numpy(rows_per_expert).to(rows.device) if on_host else rows_per_expert
        self.ends = counts.cumsum(0, dtype=torch.int32)
        place = torch.arange(len(rows), dtype=torch.int32, device=rows.device)
        self.expert = torch.bucketize(place, self.ends, right=True)  # of each row; E' behind the last one
        self.beyond = None if on_host else (self.expert == len(counts))[:, None]

    def __call__(self, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y = F.grouped_mm(rows, weight.to(rows.dtype), offs=self.ends)
        if bias is not None:  # as a product: its gradient is a product too, in a fixed order
            here = self.expert[:, None] == torch.arange(len(bias), device=rows.device)
            y = torch.addmm(y, here.to(y.dtype), bias.to(y.dtype))
        return y if self.beyond is None else y.masked_fill(self.beyond, 0)
