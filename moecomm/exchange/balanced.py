"""BalancedExchange: hot experts have copies on other ranks for the time of one batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from moecomm.all_to_all import AllToAll, FlatAllToAll, Route
from moecomm.arrays import Array, Counts, dtype_name, is_torch, num_axes, zeros
from moecomm.exchange.adjoint import Thread
from moecomm.exchange.contract import Exchange
from moecomm.exchange.path import Leg, Path
from moecomm.exchange.placement import Placement, balance
from moecomm.exchange.plan import Plan
from moecomm.exchange.routed import RoutedExchange, on_host_as_int64
from moecomm.exchange.table import by_label, constant
from moecomm.failures import Failing, collective
from moecomm.gating import Routing
from moecomm.nodes import Nodes


@dataclass(frozen=True, eq=False)
class BalancedPlan:
    """Made by `BalancedExchange.dispatch`, taken by its `combine`.

    rows_per_expert  [local experts + slots] int64: the rows of this rank's experts, then those of the copies here
    placement        which expert each slot of each rank holds in this batch
    """

    rows_per_expert: Counts
    placement: Placement
    inner: Plan
    threads: list[Thread]
    """The inner plan's, and of the weights that were copied since: combine's backward pass comes before theirs."""


class BalancedExchange(Exchange[BalancedPlan]):
    """RoutedExchange that copies hot experts to ranks with few rows, anew in each batch.

    Before each dispatch the ranks gather how many rows they have for each expert, and all make the same `Placement` of
    it: which experts get copies, and how many rows go to each. The caller computes the rows of the copies with the
    weights that `copied` brings; their gradients come home and are added to those of the expert. The answers are those
    without copies, as far as an expert gives a row the same answer whatever rows are beside it.

    all_to_all        among the ranks that share the experts; weights go over it too
    experts_per_rank  as for RoutedExchange; all ids 0 .. E - 1 are held
    slots             copies that each rank has room for: their weights live from dispatch to the backward pass
    nodes             the ranks' nodes: copies go inside a node where that is as good. None: one node
    options           of RoutedExchange

    Making one is not collective. Equal on all ranks: all arguments. Raises ValueError as RoutedExchange and `balance`.
    Source: the load of experts decides a layer's time, DeepSpeed-MoE (arXiv 2201.05596), section 5. docs/balance.md
    says what copies within a batch save and cost.
    """

    def __init__(
        self,
        all_to_all: AllToAll,
        experts_per_rank: int | Sequence[int] | Sequence[Sequence[int]],
        slots: int,
        *,
        nodes: Nodes | None = None,
        **options: Any,
    ) -> None:
        # It checks what comes: to the one below, ids of copies would be as good as those of experts.
        self._plain = plain = RoutedExchange(all_to_all, experts_per_rank, **options)
        self.comm = plain.comm
        self.experts, self.local_experts = plain.experts, plain.local_experts
        self.num_local_experts = plain.num_local_experts
        """Experts of this rank, without copies."""
        self.num_experts = plain.num_experts
        self.slots = slots
        self.nodes = nodes
        # What balance refuses is refused now, not in the first batch.
        balance([0] * self.num_experts, slots, self.experts, nodes)
        # A copy has an id of its own: E + rank * slots + slot. The exchange below knows no difference.
        first = self.num_experts
        with_slots = [
            [*ids, *range(first + rank * slots, first + (rank + 1) * slots)] for rank, ids in enumerate(self.experts)
        ]
        self._inner = RoutedExchange(all_to_all, with_slots, **options)
        self._of_weights = FlatAllToAll(self.comm)
        place = plain._holders.place[: self.num_experts]
        self._holder, self._local = plain._holders.rank[place], plain._holders.local[place]
        """[E] the rank that holds each expert, and the expert's number there."""
        self.tells_unusable = self._inner.tells_unusable
        self.fp8 = self._inner.fp8

    @property
    def comms(self) -> tuple[Failing, ...]:
        """The Comm of the all-to-all."""
        return self._inner.comms

    def rows_sent(self, plan: BalancedPlan) -> int:
        """Rows that this rank sends to other ranks in dispatch and combine, weights left out. Not collective."""
        return self._inner.rows_sent(plan.inner)

    def dispatch(self, x: Array, routing: Routing) -> tuple[Array, BalancedPlan]:
        """Send every token to its experts or to copies of them. As RoutedExchange.dispatch, with one more all-gather.

        returns  ([N, H], plan)  the rows for this rank's experts, then for the copies in its slots, each grouped by
                 source rank and token
        """
        with collective("dispatch", self.comm):
            expert, status = self._plain._opened(x, routing)
            if is_torch(expert):
                # Counts and placement are the host's; the rows go as ever.
                expert = on_host_as_int64(expert)
            load, number = self._numbered(expert, int(status))
            placement = balance(load, self.slots, self.experts, self.nodes)
            physical = self._physical(expert, number + load[: self.comm.rank].sum(axis=0)[expert], placement)
            rows, inner = self._inner.dispatch(x, replace(routing, expert=constant(physical, x)))
            return rows, BalancedPlan(inner.rows_per_expert, placement, inner, [inner.thread])

    def combine(self, rows: Array, plan: BalancedPlan, dtype: Any = None) -> Array:
        """rows [N, ...], answers in the order of what dispatch returned -> [T, ...], as RoutedExchange.combine."""
        if not isinstance(plan, BalancedPlan):
            raise TypeError(f"plan is a {type(plan).__name__}, expected the BalancedPlan that dispatch returned")
        return self._inner.combine(rows, replace(plan.inner, thread=plan.threads[-1]), dtype)

    def copied(self, weights: Array, plan: BalancedPlan) -> Array:
        """The weights of the copies in this rank's slots.

        weights  [local experts, ...] of this rank's experts
        returns  [slots, ...]; those of an empty slot are zeros

        Collective, between a dispatch and its combine, and so is the backward pass: the gradients of an expert's copies
        are added to its own in the order of their ranks. Differentiable in weights. Raises ValueError where weights has
        another number of experts.
        """
        with collective("copied", self.comm):
            self.comm.checked("BalancedExchange.copied", self._copied_arguments, weights, plan)
            slots = plan.placement.slots
            copies = zeros((self.slots, *weights.shape[1:]), dtype_name(weights), weights)
            if not (slots >= 0).any():
                # So it is on all ranks.
                return copies
            received, thread = self._path_of_weights(weights, plan.placement).carry(weights, plan.threads[-1])
            plan.threads.append(thread)
            # They come by the rank that holds them, then by their number there.
            filled = np.flatnonzero(slots[self.comm.rank] >= 0)
            ids = slots[self.comm.rank, filled]
            order = np.lexsort((self._local[ids], self._holder[ids]))
            copies[constant(filled[order], received)] = received
            return copies

    # ---- who goes where --------------------------------------------------------------------------------------------

    def _numbered(self, expert: Counts, status: int) -> tuple[Counts, Counts]:
        """[p, E] rows for each expert by rank, and for each assignment [T, K] how many of its expert come before here.

        Collective.
        """
        table, count = by_label(np.where(expert >= 0, expert, self.num_experts), self.num_experts)
        # Of dropped assignments the number means nothing: no copy takes them.
        number = table.row - (count.cumsum() - count)[expert]
        # A routing of unusable logits is refused by the inner dispatch, on all ranks.
        own = count * (status == 0)
        load: Counts = self.comm.all_gather(own[None])
        return load, number

    def _physical(self, expert: Counts, number: Counts, placement: Placement) -> Counts:
        """[T, K] the id of the expert or the copy that takes each assignment.

        number  [T, K] of the assignment among all of its expert, of all ranks: rank r takes the next rows[r, e] of them
        """
        # The rows of an expert, numbered through all ranks, are cut into one stretch for each rank that takes some.
        rank_ends = placement.rows.cumsum(axis=0)
        physical = expert.copy()
        for rank in range(self.comm.size):
            for slot, copied in enumerate(placement.slots[rank].tolist()):
                if copied < 0:
                    continue
                end = rank_ends[rank, copied]
                is_taken = (expert == copied) & (number < end) & (number >= end - placement.rows[rank, copied])
                physical[is_taken] = self.num_experts + rank * self.slots + slot
        return physical

    def _path_of_weights(self, weights: Array, placement: Placement) -> Path:
        """From this rank's experts to the slots of all ranks."""
        size, rank = self.comm.size, self.comm.rank
        # [local experts, p] the rank that a copy goes to; p: none. A rank has no two copies of one expert.
        destination = np.full((self.num_local_experts, size), size)
        for target in range(size):
            ids = placement.slots[target]
            local = self._local[ids[(ids >= 0) & (self._holder[ids] == rank)]]
            destination[local, target] = target
        send_counts = np.count_nonzero(destination < size, axis=0)
        ids = placement.slots[rank]
        recv_counts = np.bincount(self._holder[ids[ids >= 0]], minlength=size)
        table, _ = by_label(constant(destination, weights), size)
        return Path((table, Leg(self._of_weights, lambda: Route(send_counts, recv_counts))), self.comm)

    # ---- checks ----------------------------------------------------------------------------------------------------

    def _copied_arguments(self, weights: Array, plan: BalancedPlan) -> None:
        if not isinstance(plan, BalancedPlan):
            raise TypeError(f"plan is a {type(plan).__name__}, expected the BalancedPlan that dispatch returned")
        if num_axes(weights, "weights") < 1 or weights.shape[0] != self.num_local_experts:
            wanted = f"({self.num_local_experts}, ...), a weight for each expert of this rank"
            raise ValueError(f"weights has shape {tuple(weights.shape)}, expected {wanted}")
