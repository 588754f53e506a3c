"""torchtitan: moecomm brings the tokens of its Mixture-of-Experts models to their experts.

    torchrun ... -m torchtitan.train ... --override.imports moecomm.integrations.torchtitan.dispatcher

torchtitan imports this module where its command line names it, and calls `dispatcher` for each layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

from moecomm.all_to_all import FlatAllToAll
from moecomm.exchange import Plan, RoutedExchange
from moecomm.gating import Routing
from moecomm.transports.torch import TorchComm

TESTED = "0.3"
"""The version of torchtitan that `make torchtitan` trains with."""


def _check_version() -> None:
    """Raise ImportError unless there is a torchtitan that moecomm was tested with."""
    try:
        installed = version("torchtitan")
    except PackageNotFoundError as error:
        raise ImportError("moecomm.integrations.torchtitan: needs torchtitan: pip install torchtitan==0.3.0") from error
    if ".".join(installed.split(".")[:2]) != TESTED:
        raise ImportError(
            f"moecomm.integrations.torchtitan: torchtitan is {installed}, expected {TESTED}, with which moecomm was "
            "tested: pip install torchtitan==0.3.0"
        )


_check_version()

# Of the version that was just found to be known.
from torchtitan.config import derive, override  # noqa: E402
from torchtitan.models.common.token_dispatcher import (  # noqa: E402
    AllToAllTokenDispatcher,
    BaseEPTokenDispatcher,
    LocalTokenDispatcher,
)


class TokenDispatcher(BaseEPTokenDispatcher):
    """torchtitan's token dispatcher, of one layer, over a RoutedExchange among the ranks of its "ep" mesh."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseEPTokenDispatcher.Config):
        """limit: seconds that a rank waits for the others; None: as long as the process group does."""

        limit: float | None = None

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.limit = config.limit
        self.exchange: RoutedExchange | None = None

    def init_buffer(self) -> None:
        """Make the exchange; torchtitan calls it when it has divided the layer. Without an "ep" mesh there is none."""
        if self.ep_mesh is None:
            return
        comm = TorchComm(self.ep_mesh.get_group(), limit=self.limit)
        if self.num_experts % comm.size:
            raise ValueError(
                f"moecomm: the layer has {self.num_experts} experts, which {comm.size} ranks cannot share evenly"
            )
        self.exchange = RoutedExchange(FlatAllToAll(comm), self.num_experts // comm.size)

    def dispatch(
        self, x: Tensor, topk_scores: Tensor, topk_expert_ids: Tensor, num_local_tokens_per_expert: Tensor
    ) -> tuple[Tensor, Tensor, Any]:
        """Send every token to its experts.

        x            [T, H]
        topk_scores  [T, K], and so are topk_expert_ids
        num_local_tokens_per_expert  [E], which the exchange counts itself
        returns      ([N, H] rows for this rank's experts, grouped by expert, then source rank, then token;
                     [local experts] int64, the rows of each; what combine takes)

        Collective over the "ep" mesh, and so is the backward pass. Differentiable in x.
        """
        if self.exchange is None:
            local: tuple[Tensor, Tensor, Any] = LocalTokenDispatcher.dispatch(
                self, x, topk_scores, topk_expert_ids, num_local_tokens_per_expert
            )
            return local
        rows, plan = self.exchange.dispatch(x, Routing(topk_expert_ids, topk_scores))
        return rows, torch.as_tensor(plan.rows_per_expert, device=x.device), plan

    def combine(self, rows: Tensor, metadata: Any, x: Tensor) -> Tensor:
        """rows [N, H], the experts' answers -> [T, H], for each token their sum, weighted in float32.

        Collective over the "ep" mesh, and so is the backward pass. Differentiable in rows and in the scores.
        """
        if self.exchange is None:
            local: Tensor = LocalTokenDispatcher.combine(self, rows, metadata, x)
            return local
        plan: Plan = metadata
        y: Tensor = self.exchange.combine(rows, plan)
        return y


@override(
    target=AllToAllTokenDispatcher.Config,
    description="moecomm brings tokens to their experts",
    exact=True,
)
def dispatcher(config: Any, *, limit: float | None = None) -> TokenDispatcher.Config:
    """What torchtitan puts in the place of its own all-to-all dispatcher. limit: as TokenDispatcher.Config has it."""
    replacement: TokenDispatcher.Config = derive(config, TokenDispatcher.Config, limit=limit)
    return replacement
