"""StaticExchange: blocks of a fixed size, so that no host waits for a GPU and a CUDA graph can hold the calls."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, Literal

from moecomm.all_to_all import AllToAll
from moecomm.arrays import Array, zeros
from moecomm.exchange.path import EvenLeg, Path, Way
from moecomm.exchange.plan import Plan
from moecomm.exchange.routed import RoutedExchange
from moecomm.exchange.table import arange, as_int32, padded_by_label, padded_copies, where
from moecomm.failures import collective, refused
from moecomm.gating import Routing


class StaticExchange(RoutedExchange):
    """RoutedExchange in equal blocks: one row for each token and rank, and padding up to the same number for each pair.

    No number leaves the device, so on a GPU nothing waits for the host, and a CUDA graph can capture dispatch, combine
    and their backward passes where the all-to-all and its Comm can be captured (NCCL without a limit). Warm up with one
    eager call: the first one compares the ranks' arguments.

    all_to_all        among the ranks that share the experts; its even form is used
    experts_per_rank  as for RoutedExchange
    max_tokens        the most tokens of a rank in a call, T
    rows_per_pair     room for the tokens of one rank that have experts on another, R. None: max_tokens, always enough
    max_rows          the rows that dispatch returns, N. None: p R min(K, experts of the rank), always enough
    partial_sums      as for RoutedExchange

    Tokens that find no room are not sent, or not processed: they are counted, and `check` raises.

    A rank sends (p - 1) R rows of H numbers, K weights and K int32 in dispatch, and (p - 1) R rows of H numbers in
    combine, whatever the routing is. RoutedExchange with send="tokens" sends no padding: of K independent choices a
    share of 1 - (1 - 1/p)^K of the rows has a token, so 66 % with K = 8 and 8 ranks, and an eighth with K = 1.

    Making one is not collective. Equal on all ranks: all arguments.
    Raises ValueError for what RoutedExchange refuses and for sizes below 1.
    """

    tells_unusable = False

    def __init__(
        self,
        all_to_all: AllToAll,
        experts_per_rank: int | Sequence[int] | Sequence[Sequence[int]],
        max_tokens: int,
        *,
        rows_per_pair: int | None = None,
        max_rows: int | None = None,
        partial_sums: Literal["rows", "wide"] = "rows",
    ) -> None:
        super().__init__(all_to_all, experts_per_rank, send="tokens", partial_sums=partial_sums)
        self.max_tokens = _size("max_tokens", max_tokens)
        self.rows_per_pair = self.max_tokens if rows_per_pair is None else _size("rows_per_pair", rows_per_pair)
        self._max_rows = None if max_rows is None else _size("max_rows", max_rows)
        self._first_place = sum(map(len, self.experts[: self.comm.rank]))
        self._lost: Array = None
        """[3] int64 on the device of the tokens: tokens without room for their pair of ranks, rows without room among
        those of the experts, and assignments to experts that no rank holds. Made at the first dispatch, so that a CUDA
        graph adds to memory that stays."""

    def dispatch(self, x: Array, routing: Routing) -> tuple[Array, Plan]:
        """Send every token to its experts.

        x        [T, H]  numpy or torch, T <= max_tokens; a rank may have no tokens
        returns  ([N, H], plan)  the rows for this rank's experts, grouped by expert, then source rank, then token, and
                 zeros behind them. plan.rows_per_expert [local experts] says how many each has, on the device of x

        Collective, differentiable and checked as RoutedExchange's, but for what a GPU alone knows: a routing of
        unusable logits and ids that no rank holds are found by `check`.
        Source: Shazeer et al. 2017 (arXiv 1701.06538), eq. 1; DeepSpeed-MoE (arXiv 2201.05596), section 5.
        """
        return super().dispatch(x, routing)

    def check(self) -> None:
        """Raise on all ranks what any rank lost since the last check: OverflowError for rows without room, ValueError
        for ids that no rank holds. Collective over the all-to-all's ranks; waits for the calls so far."""
        with collective("check", self.comm):
            if self._lost is None:  # no dispatch yet, on no rank
                return
            of_pairs, of_experts, unknown = self.comm.all_reduce(self._lost).tolist()
            self._lost[:] = 0
            call = f"{type(self).__name__}.check"
            if unknown:
                raise refused(
                    ValueError(f"{call}: {unknown} assignments to experts that no rank holds{self.comm.where()}")
                )
            lost = []
            if of_pairs:
                lost.append(f"{of_pairs} tokens found no room beyond rows_per_pair = {self.rows_per_pair}")
            if of_experts:
                lost.append(f"{of_experts} rows found no room beyond max_rows = {self._max_rows}")
            if lost:
                raise refused(OverflowError(f"{call}: {'; '.join(lost)}{self.comm.where()}"))

    # ---- who goes where --------------------------------------------------------------------------------------------

    def _way(self, place: Array, status: Array) -> Way:
        num_tokens, num_choices = place.shape
        holders = self._holders.on(place)
        rank = holders.rank[place.reshape(-1)]
        token = arange(num_tokens * num_choices, place) // max(num_choices, 1)
        at_home, lost_of_pairs = padded_copies(
            rank, token, self.comm.size, (num_tokens, num_choices), self.rows_per_pair
        )
        leg = EvenLeg(self.all_to_all, self.rows_per_pair)
        # A row that no token fills comes as zeros: the places count from 1.
        received = Path((at_home, leg), self.comm).send(as_int32(place) + 1)
        local = received - (1 + self._first_place)
        is_here = (local >= 0) & (local < self.num_local_experts)
        label = where(is_here, local, self.num_local_experts)
        max_rows = self._max_rows or len(label) * min(num_choices, self.num_local_experts)
        away, count, lost_of_experts = padded_by_label(label, self.num_local_experts, max_rows)
        if self._lost is None:
            self._lost = zeros(3, "int64", place)
        self._lost[0] += lost_of_pairs
        self._lost[1] += lost_of_experts
        self._lost[2] += (place == self._holders.num_places).sum()
        return Way(Path((at_home, leg, away), self.comm), lambda: count)

    # ---- checks ----------------------------------------------------------------------------------------------------

    def _dispatch_arguments(self, x: Array, routing: Routing) -> tuple[Array, Array]:
        expert, status = super()._dispatch_arguments(x, routing)
        if len(x) > self.max_tokens:
            raise ValueError(f"x has {len(x)} tokens, expected {self.max_tokens} at most: max_tokens")
        return expert, status

    def _sizes_text(self) -> str:
        sizes = f"max_tokens={self.max_tokens}, rows_per_pair={self.rows_per_pair}, max_rows={self._max_rows}"
        return f"{super()._sizes_text()}, {sizes}"


def _size(name: str, value: Any) -> int:
    try:
        size = operator.index(value)
    except TypeError:
        raise ValueError(f"StaticExchange: {name} is {value!r}, expected an integer >= 1") from None
    if size < 1:
        raise ValueError(f"StaticExchange: {name} is {size}, expected an integer >= 1")
    return size
