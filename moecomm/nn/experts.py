"""The experts of a rank as one bank of weights, applied to rows that lie expert by expert."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from moecomm.nn.linear import Activation, check_activation
from moecomm.nn.part import Part
from moecomm.nn.seeds import Key, Portion, Slice, check_keywords, draw, parameter, part_of

FSDP = "FSDP would mix the experts of its ranks as shards of one bank: expected none where ranks share experts"
SLICED = {"up": 1, "gate": 1, "up_bias": 0, "down": 0}
"""The dimension of an expert's weight that is its inner width."""


class ExpertBank(Part):
    """The weights of the E' experts of a rank, each with the experts as its first dimension: rows to rows.

    experts      global ids of the experts here
    split        whether other ranks hold other experts, or other slices of them
    """

    weights: frozenset[str] = frozenset({"up"})
    """Names of parameters, in whatever module of the bank they are."""

    def __init__(self, experts: Sequence[int], split: bool) -> None:
        super().__init__()
        self.experts = tuple(experts)
        self.split = split
        self.slices = {}
        self.wrapper = 0
        """id of the DistributedDataParallel that was seen to leave the experts alone."""

    def place(self) -> list[int]:
        """As Part has it."""
        place = super().place() if self.slices else [0, 1]
        if self.split:
            place += self.experts
        return place

    def is_flattened(self) -> bool:
        """Whether FullyShardedDataParallel has put a view into its flat parameter in the place of a weight."""
        names: set[str] = set()
        for module in self.modules():
            names.update(vars(module))
        return not names.isdisjoint(self.weights)

    def __setattr__(self, name: str, value: Any) -> None:
        """Torch's fully_shard puts its shards here."""
        # Compared by name, so that torch.distributed.tensor need not be imported.
        if self.__dict__.get("split") and type(value).__name__ == "DTensor":
            raise ValueError(f"Experts: {FSDP}")
        super().__setattr__(name, value)


class ModuleBank(ExpertBank):
    """Experts of any kind, given as a module, in the place of `Experts`.

    module   called with rows [N, hidden] that lie expert by expert, and rows_per_expert [E'], how many rows each expert
             has, int64: numpy, or a tensor on the rows' device where the exchange keeps counts there. Their running sum
             is where each expert's rows end. Returns [N, hidden]. Rows behind those of the last expert are no expert's:
             a static exchange has some, and ignores what comes back for them. N may be 0
    experts  global ids of the E' experts here, in the order of the module's
    split    whether other ranks hold other experts

    Each parameter and each buffer that is saved has E' as its first dimension, one entry for each expert: so ranks add
    up the gradients of the same experts, and a checkpoint has each expert by its global id, for any split. The module
    draws its own first weights; copies of an expert on several ranks must get the same. Raises ValueError for a weight
    of another shape.
    """

    def __init__(self, module: nn.Module, experts: Sequence[int], split: bool) -> None:
        super().__init__(experts, split)
        count = len(self.experts)
        for name, weight in module.state_dict(keep_vars=True).items():
            if isinstance(weight, Tensor) and tuple(weight.shape[:1]) != (count,):
                raise ValueError(
                    f"MoE: {name} of experts has shape {tuple(weight.shape)}, expected ({count}, ...): one entry for "
                    f"each of the experts {list(self.experts)} of this rank"
                )
        self.module = module
        self.weights = frozenset(name.rpartition(".")[2] for name, _ in module.named_parameters())

    def extra_repr(self) -> str:
        """The experts of this rank, for `repr`."""
        return f"experts={list(self.experts)}"

    def forward(self, rows: Tensor, rows_per_expert: np.ndarray | Tensor) -> Tensor:
        """What the module makes of the rows. Not collective. Raises ValueError for an answer of another shape."""
        answers: Tensor = self.module(rows, rows_per_expert)
        shape = tuple(rows.shape)
        got = getattr(answers, "shape", type(answers).__name__)
        if got != shape:
            text = tuple(got) if isinstance(answers, Tensor) else got
            raise ValueError(f"MoE: experts returned {text}, expected {shape}, as the rows that they got")
        return answers


class Experts(ExpertBank):
    """E' feed-forward networks: rows [N, hidden] -> [N, hidden], each row through its own expert.

    hidden, ffn  width of the rows, and inside
    experts      global ids of the E' experts here. An expert's first weights depend on its id and the seed alone, not
                 on which rank holds it
    activation   "gelu": gelu(x up + b) down + b'. "swiglu": (silu(x gate) * (x up)) down, without biases
    part         (i, n): hold slice i of n of each expert's inner width; the n answers are to be added. Slice 0 adds b'
    num_experts  of all ranks; None: those here are all
    key          seed and name of the layer
    like         device, dtype

    Weights are [E', hidden, ffn / n] and [E', ffn / n, hidden]. Rows in bfloat16 go through torch's grouped GEMM, if
    this torch has it; others expert by expert. Raises ValueError if n does not divide ffn.
    """

    def __init__(
        self,
        hidden: int,
        ffn: int,
        experts: Sequence[int],
        *,
        activation: Activation = "gelu",
        part: Portion = (0, 1),
        num_experts: int | None = None,
        std: float = 0.02,
        key: Key = (),
        **like: Any,
    ) -> None:
        number, slices = part
        super().__init__(experts, split=slices > 1 or num_experts not in (None, len(experts)))
        check_activation("Experts", activation)
        check_keywords("Experts", like)
        if ffn % slices:
            raise ValueError(f"Experts: ffn is {ffn}, which {slices} slices cannot share")
        self.activation = activation
        self.slices = {name: Slice(dim, part) for name, dim in SLICED.items()}
        """Of one expert's weights."""

        def bank(name: str, rows: int, columns: int) -> nn.Parameter:
            matrices = []
            for expert in experts:
                weight = draw((rows, columns), std, *key, "expert", expert, name)
                matrices.append(part_of(weight, SLICED[name], part))
            # A rank may have no expert at all; torch.stack needs one.
            return parameter(torch.stack(matrices) if matrices else torch.zeros(0, rows, columns), like)

        self.up = bank("up", hidden, ffn)
        self.down = bank("down", ffn, hidden)
        if activation == "swiglu":
            self.gate = bank("gate", hidden, ffn)
            return
        self.up_bias = parameter(torch.zeros(len(experts), ffn // slices), like)
        # The answers of the slices are added, so only one slice may add the bias.
        self.down_bias = parameter(torch.zeros(len(experts), hidden), like) if number == 0 else None

    def extra_repr(self) -> str:
        """The sizes and the experts of this rank, for `repr`."""
        number, slices = self.slices["up"].portion
        shape = f"{tuple(self.up.shape[1:])}, activation={self.activation!r}, experts={list(self.experts)}"
        return shape if slices == 1 else f"{shape}, part={(number, slices)}"

    def forward(self, rows: Tensor, rows_per_expert: np.ndarray | Tensor) -> Tensor:
        """rows [N, hidden], rows_per_expert [E'] of them for each expert, in this order -> [N, hidden].

        rows_per_expert may be numpy, or a tensor on the rows' device that sums up to less than N: the rows behind
        are no expert's and give zeros. Not collective.
        """
        multiply = _Grouped if _is_grouped(rows, self.up) else _Loop
        product = multiply(rows, rows_per_expert)
        if self.activation == "swiglu":
            gate = product(rows, self.gate, None)
            inner = F.silu(gate) * product(rows, self.up, None)
            return product(inner, self.down, None)
        inner = F.gelu(product(rows, self.up, self.up_bias))
        return product(inner, self.down, self.down_bias)


def _is_grouped(rows: Tensor, weight: Tensor) -> bool:
    # torch's kernel takes bfloat16 and rows of a multiple of 16 bytes. For other dtypes it has a loop, as _Loop.
    fits = all(length % 8 == 0 for length in weight.shape[1:])
    return rows.dtype == torch.bfloat16 and hasattr(F, "grouped_mm") and fits


class _Loop:
    """Products of an expert's rows and its weight, one expert after the other."""

    def __init__(self, rows: Tensor, rows_per_expert: np.ndarray | Tensor) -> None:
        counts: list[int] = rows_per_expert.tolist()
        self.lengths = [*counts, len(rows) - sum(counts)]

    def __call__(self, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        *groups, padding = rows.split(self.lengths)
        # unbind, not weight[e] in the loop: the gradient of that is as large as the bank, once for each expert.
        weights = weight.to(rows.dtype).unbind()
        biases = [None] * len(weights) if bias is None else bias.to(rows.dtype).unbind()
        products = []
        for group, matrix, vector in zip(groups, weights, biases, strict=True):
            products.append(F.linear(group, matrix.T, vector))
        products.append(padding.new_zeros(len(padding), weight.shape[2]))
        return torch.cat(products)


class _Grouped:
    """All products in one kernel, which reads on the device where each expert's rows end."""

    def __init__(self, rows: Tensor, rows_per_expert: np.ndarray | Tensor) -> None:
        counts = torch.as_tensor(rows_per_expert, device=rows.device)
        self.ends = counts.cumsum(0, dtype=torch.int32)
        # Of each row its expert's place in the bank; E' for the rows behind the last expert's.
        index = torch.arange(len(rows), dtype=torch.int32, device=rows.device)
        self.expert = torch.bucketize(index, self.ends, right=True)
        # Counts that the host knows add up to all rows: the exchange made as many as it needs.
        self.padding = None
        if isinstance(rows_per_expert, Tensor):
            self.padding = (self.expert == len(counts))[:, None]

    def __call__(self, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y = F.grouped_mm(rows, weight.to(rows.dtype), offs=self.ends)
        if bias is not None:
            # A product instead of bias[expert]: its gradient is a product too, which adds up in a fixed order.
            chosen = self.expert[:, None] == torch.arange(len(bias), device=rows.device)
            y = torch.addmm(y, chosen.to(y.dtype), bias.to(y.dtype))
        return y if self.padding is None else y.masked_fill(self.padding, 0)
