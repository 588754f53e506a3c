"""ResidualMoE: every token goes through a fixed MLP and through one expert that corrects it."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from moecomm.gating import Routing
from moecomm.nn.linear import MLP
from moecomm.nn.moe import MoE
from moecomm.nn.seeds import draw, parameter


class ResidualMoE(nn.Module):
    """x [..., hidden] -> (y [..., hidden], routing): a fixed MLP plus one expert, at the traffic of top-1.

    combine  "sum": mlp(x) + moe(x), as in the paper. "learned": the two weighted by a softmax of a linear layer of x,
             coefficient 0 for the expert, as in DeepSpeed's code
    options  of MoE; the MLP is sliced over the tensor ranks of `groups`

    On CUDA the MLP runs on a stream of its own beside the exchange, forward and backward.
    Collective as MoE is. Source: DeepSpeed-MoE (arXiv 2201.05596), section 4.1.1.
    """

    def __init__(
        self, hidden: int, ffn: int, num_experts: int, *, combine: Literal["sum", "learned"] = "sum", **options: Any
    ) -> None:
        super().__init__()
        if combine not in ("sum", "learned"):
            raise ValueError(f"ResidualMoE: combine is {combine!r}, expected 'sum' or 'learned'")
        self.moe = MoE(hidden, ffn, num_experts, **options)
        groups = options.get("groups")
        of_moe = ("top_k", "groups", "exchange", "capacity_factor", "eval_capacity_factor", "choices")
        of_both = {name: value for name, value in options.items() if name not in of_moe}
        self.mlp = MLP(hidden, ffn, tensor=None if groups is None else groups.tensor, **of_both)
        self.coefficient: nn.Linear | None = None
        if combine == "learned":
            like: dict[str, Any] = {name: of_both[name] for name in ("device", "dtype") if name in of_both}
            self.coefficient = nn.Linear(hidden, 2, **like)
            weight = draw((2, hidden), options.get("std", 0.02), *options.get("key", (0,)), "coefficient")
            self.coefficient.weight = parameter(weight, like)
            nn.init.zeros_(self.coefficient.bias)
        self._stream: Any = None

    def forward(self, x: Tensor) -> tuple[Tensor, Routing]:
        """Collective as MoE's."""
        if not x.is_cuda:
            (corrected, routing), fixed = self.moe(x), self.mlp(x)
        else:
            here = torch.cuda.current_stream(x.device)
            self._stream = self._stream or torch.cuda.Stream(x.device)
            self._stream.wait_stream(here)
            with torch.cuda.stream(self._stream):  # first: the exchange makes the host wait for counts
                fixed = self.mlp(x)
            x.record_stream(self._stream)
            corrected, routing = self.moe(x)
            here.wait_stream(self._stream)
            fixed.record_stream(here)
        if self.coefficient is None:
            return fixed + corrected, routing
        share = self.coefficient(x).softmax(-1)
        return corrected * share[..., :1] + fixed * share[..., 1:], routing
