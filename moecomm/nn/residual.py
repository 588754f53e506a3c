"""ResidualMoE: every token goes through a fixed MLP and through one expert that corrects it."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from moecomm.gating import Routing
from moecomm.nn.linear import MLP
from moecomm.nn.moe import MoE
from moecomm.nn.seeds import draw, parameter

OF_MOE = ("top_k", "groups", "exchange", "experts", "capacity_factor", "eval_capacity_factor", "choices")
"""Options that the MLP does not have."""


class ResidualMoE(nn.Module):
    """x [..., hidden] -> (y [..., hidden], routing): a fixed MLP plus one expert, at the traffic of top-1.

    combine  "sum": mlp(x) + moe(x), as in the paper. "learned": the two weighted by a softmax of a linear layer of x,
             coefficient 0 for the expert, as in DeepSpeed's code
    options  of MoE; the MLP is sliced over the tensor ranks of `groups`

    On CUDA the MLP runs on a stream of its own beside the exchange, forward and backward.
    Collective as MoE is. Source: DeepSpeed-MoE (arXiv 2201.05596), section 4.1.1.
    """

    def __init__(
        self,
        hidden: int,
        ffn: int,
        num_experts: int,
        *,
        combine: Literal["sum", "learned"] = "sum",
        **options: Any,
    ) -> None:
        super().__init__()
        if combine not in ("sum", "learned"):
            raise ValueError(f"ResidualMoE: combine is {combine!r}, expected 'sum' or 'learned'")
        self.moe = MoE(
            hidden,
            None if options.get("experts") is not None else ffn,
            num_experts,
            **options,
        )
        groups = options.get("groups")
        tensor = None if groups is None else groups.tensor
        shared = {name: value for name, value in options.items() if name not in OF_MOE}
        self.mlp = MLP(hidden, ffn, tensor=tensor, **shared)
        self.coefficient: nn.Linear | None = None
        if combine == "learned":
            like: dict[str, Any] = {name: shared[name] for name in ("device", "dtype") if name in shared}
            self.coefficient = nn.Linear(hidden, 2, **like)
            # Drawn as all weights are, so that it does not depend on what was drawn before it on this rank.
            std = options.get("std", 0.02)
            key = options.get("key", (0,))
            weight = draw((2, hidden), std, *key, "coefficient")
            self.coefficient.weight = parameter(weight, like)
            nn.init.zeros_(self.coefficient.bias)
        self._stream: Any = None

    def forward(self, x: Tensor) -> tuple[Tensor, Routing]:
        """Collective as MoE's."""
        if not x.is_cuda:
            corrected, routing = self.moe(x)
            fixed = self.mlp(x)
        else:
            current = torch.cuda.current_stream(x.device)
            self._stream = self._stream or torch.cuda.Stream(x.device)
            # x is made on the current stream, and the MLP must not read it earlier.
            self._stream.wait_stream(current)
            # The MLP is queued before the exchange, which may make the host wait for counts.
            with torch.cuda.stream(self._stream):
                fixed = self.mlp(x)
            # The allocator knows the stream that made a tensor, and would reuse its memory while another stream reads.
            x.record_stream(self._stream)
            corrected, routing = self.moe(x)
            current.wait_stream(self._stream)
            fixed.record_stream(current)
        if self.coefficient is None:
            return fixed + corrected, routing
        share = self.coefficient(x).softmax(-1)
        return corrected * share[..., :1] + fixed * share[..., 1:], routing
