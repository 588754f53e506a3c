"""LocalExchange: dispatch and combine where one rank holds all experts, so that nothing travels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from moecomm.gating import Routing, permute, unpermute


@dataclass(frozen=True, eq=False)
class LocalPlan:
    """Made by `LocalExchange.dispatch`, taken by its `combine`.

    rows_per_expert  [E]: a tensor on the rows' device, or numpy where a capacity makes it C for each
    """

    rows_per_expert: Any
    routing: Routing


class LocalExchange:
    """The exchange of one rank alone: rows are put into the order of the experts, and back. No host waits for a GPU.

    num_experts  E
    """

    def __init__(self, num_experts: int) -> None:
        self.num_experts = self.num_local_experts = num_experts

    def dispatch(self, x: Tensor, routing: Routing) -> tuple[Tensor, LocalPlan]:
        """x [T, H], a routing from `route` -> [N, H] grouped by expert, and the plan. Differentiable in x.

        N is T * K, or what `align` makes of it, or E * capacity; rows that no token fills are zeros.
        """
        rows, counts = permute(x, routing), routing.offset.diff()  # not routing.count: with `align` there are gaps
        if routing.capacity is not None:
            rows, counts = rows.flatten(0, 1), np.full(self.num_experts, routing.capacity)
        return rows, LocalPlan(counts, routing)

    def combine(self, rows: Tensor, plan: LocalPlan) -> Tensor:
        """rows [N, H] -> [T, H], for each token the weighted sum of its rows. Differentiable in rows and weights."""
        return unpermute(rows, plan.routing)
