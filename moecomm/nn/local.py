"""LocalExchange: dispatch and combine where one rank holds all experts, so that nothing travels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moecomm.arrays import Array
from moecomm.exchange.contract import Exchange
from moecomm.gating import Routing, permute, unpermute


@dataclass(frozen=True, eq=False)
class LocalPlan:
    """Made by `LocalExchange.dispatch`, taken by its `combine`.

    rows_per_expert  [E]: like the rows and on their device, or numpy where a capacity makes it C for each
    """

    rows_per_expert: Array
    routing: Routing


class LocalExchange(Exchange[LocalPlan]):
    """The exchange of one rank alone: rows are put into the order of the experts, and back. No host waits for a GPU.

    num_experts  E
    """

    needs_table = True

    def __init__(self, num_experts: int) -> None:
        self.num_experts = self.num_local_experts = num_experts
        self.local_experts = list(range(num_experts))
        self.experts = [self.local_experts]

    def dispatch(self, x: Array, routing: Routing) -> tuple[Array, LocalPlan]:
        """x [T, H], a routing from `route` -> [N, H] grouped by expert, and the plan. Differentiable in x.

        N is T * K, or what `align` makes of it, or E * capacity; rows that no token fills are zeros.
        """
        rows = permute(x, routing)
        if routing.capacity is not None:
            # Each expert has its capacity of rows, filled or not: the host knows the counts.
            counts = np.full(self.num_experts, routing.capacity)
            return rows.reshape(-1, x.shape[1]), LocalPlan(counts, routing)
        # Not routing.count: with `align` there are gaps behind the rows of an expert.
        counts = routing.offset[1:] - routing.offset[:-1]
        return rows, LocalPlan(counts, routing)

    def combine(self, rows: Array, plan: LocalPlan) -> Array:
        """rows [N, H] -> [T, H], for each token the weighted sum of its rows. Differentiable in rows and weights."""
        return unpermute(rows, plan.routing)
