"""StaticExchange: blocks of a fixed size, so that no host waits for a GPU and a CUDA graph can hold the calls."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from moecomm.all_to_all import AllToAll, FlatAllToAll, HierarchicalAllToAll
from moecomm.arrays import Array, zeros
from moecomm.comm import Comm
from moecomm.exchange.hierarchical import checked_hierarchical, relay_places
from moecomm.exchange.path import EvenLeg, Path, Step, Way
from moecomm.exchange.plan import Plan
from moecomm.exchange.routed import RoutedExchange
from moecomm.exchange.table import (
    LARGEST,
    Constant,
    RowTable,
    arange,
    as_int32,
    concatenated,
    padded_by_label,
    padded_copies,
    where,
)
from moecomm.failures import collective, refused
from moecomm.gating import Routing


@dataclass(frozen=True, eq=False)
class StaticHop:
    """A hop of equal blocks.

    rank   [P + 2] by the place of an expert: to which rank of the hop its rows go next; the size of the hop: to none
    room   rows of each block
    name   the argument that says so
    """

    all_to_all: AllToAll
    rank: Constant
    room: int
    name: str


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
    fp8               as for RoutedExchange

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
        fp8: Any = None,
    ) -> None:
        super().__init__(all_to_all, experts_per_rank, send="tokens", partial_sums=partial_sums, fp8=fp8)
        self.max_tokens = _size("max_tokens", max_tokens)
        self.rows_per_pair = self.max_tokens if rows_per_pair is None else _size("rows_per_pair", rows_per_pair)
        self._max_rows = None if max_rows is None else _size("max_rows", max_rows)
        self._first_place = sum(map(len, self.experts[: self.comm.rank]))
        self._hops = [StaticHop(all_to_all, Constant(self._holders.rank), self.rows_per_pair, "rows_per_pair")]
        self._lost: Array = None
        """[hops + 2] int64 on the device of the tokens: rows without room in each hop, rows without room among those
        of the experts, and assignments to experts that no rank holds. Made at the first dispatch, so that a CUDA graph
        adds to memory that stays."""

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
            *of_hops, of_experts, unknown = self.comm.all_reduce(self._lost).tolist()
            self._lost[:] = 0
            call = f"{type(self).__name__}.check"
            if unknown:
                raise refused(
                    ValueError(f"{call}: {unknown} assignments to experts that no rank holds{self.comm.where()}")
                )
            lost = []
            for hop, num_tokens in zip(self._hops, of_hops, strict=True):
                if num_tokens:
                    lost.append(f"{num_tokens} tokens found no room beyond {hop.name} = {hop.room}")
            if of_experts:
                lost.append(f"{of_experts} rows found no room beyond max_rows = {self._max_rows}")
            if lost:
                raise refused(OverflowError(f"{call}: {'; '.join(lost)}{self.comm.where()}"))

    # ---- who goes where --------------------------------------------------------------------------------------------

    def _way(self, place: Array, status: Array) -> Way:
        if self._lost is None:
            self._lost = zeros(len(self._hops) + 2, "int64", place)
        self._lost[-1] += (place == self._holders.num_places).sum()
        num_choices = place.shape[1]
        numbers = self._numbers(place)
        steps: list[Step] = []
        for index, hop in enumerate(self._hops):
            # What came in a block says by itself where it goes next, so that no count has to be known.
            rank = hop.rank.at(numbers)[numbers[:, :num_choices].reshape(-1) - 1]
            row = arange(len(rank), rank) // max(num_choices, 1)
            table, lost = padded_copies(rank, row, hop.all_to_all.comm.size, (len(numbers), num_choices), hop.room)
            steps += table, EvenLeg(hop.all_to_all, hop.room)
            numbers = Path((table, steps[-1]), self.comm).send(numbers)
            self._lost[index] += lost
        away, count, lost = self._order(numbers, num_choices)
        self._lost[-2] += lost
        return Way(Path((*steps, away), self.comm), lambda: count)

    def _numbers(self, place: Array) -> Array:
        """int32 that travel with the tokens: [T, K] the places, from 1: a row that no token fills comes as zeros."""
        return as_int32(place) + 1

    def _order(self, numbers: Array, num_choices: int) -> tuple[RowTable, Array, Array]:
        """The rows that the experts see, of those that came with numbers; how many each has; how many found no room."""
        local = numbers[:, :num_choices] - (1 + self._first_place)
        is_here = (local >= 0) & (local < self.num_local_experts)
        label = where(is_here, local, self.num_local_experts)
        max_rows = self._max_rows or len(label) * min(num_choices, self.num_local_experts)
        return padded_by_label(label, self.num_local_experts, max_rows, self._order_of_rows(numbers))

    def _order_of_rows(self, numbers: Array) -> Array | None:
        """The order of the rows that came by source and token. None: it is theirs."""
        return None

    # ---- checks ----------------------------------------------------------------------------------------------------

    def _dispatch_arguments(self, x: Array, routing: Routing) -> tuple[Array, Array]:
        expert, status = super()._dispatch_arguments(x, routing)
        if len(x) > self.max_tokens:
            raise ValueError(f"x has {len(x)} tokens, expected {self.max_tokens} at most: max_tokens")
        return expert, status

    def _sizes_text(self) -> str:
        sizes = f"max_tokens={self.max_tokens}, rows_per_pair={self.rows_per_pair}, max_rows={self._max_rows}"
        return f"{super()._sizes_text()}, {sizes}"


class StaticHierarchicalExchange(StaticExchange):
    """HierarchicalExchange in equal blocks: a row for each token and node, then for each token and rank of that node.

    all_to_all        as for HierarchicalExchange; the even form of each hop is used
    experts_per_rank  as for RoutedExchange
    max_tokens        the most tokens of a rank in a call, T
    rows_per_relay    room for the tokens of a rank that have experts on a node. None: T, always enough
    rows_inside       room for the rows that a relay has for a rank of its node. None: T for each rank that it relays
                      for, always enough
    max_rows          the rows that dispatch returns, N. None: always enough
    hop               makes the all-to-all of each hop, over the group of that hop
    partial_sums      as for HierarchicalExchange
    fp8               as for RoutedExchange

    What StaticExchange says holds, with these two rooms in place of rows_per_pair: the same rows, and behind them
    zeros; the answers are those of HierarchicalExchange, bit for bit. With nodes of G, p / G of them, a rank sends
    (p / G - 1) rows_per_relay rows between nodes and (G - 1) rows_inside inside, whatever the routing is, and K + 1
    int32 and K weights with each in dispatch. Where nodes are of several sizes blocks also go, all padding, to ranks
    that are not relays of the sender.

    Making one is collective over the all-to-all's ranks. Equal on all ranks: all arguments.
    Raises TypeError and ValueError for what HierarchicalExchange refuses, and ValueError for sizes below 1.
    Source: as HierarchicalExchange.
    """

    def __init__(
        self,
        all_to_all: HierarchicalAllToAll,
        experts_per_rank: int | Sequence[int] | Sequence[Sequence[int]],
        max_tokens: int,
        *,
        rows_per_relay: int | None = None,
        rows_inside: int | None = None,
        max_rows: int | None = None,
        hop: Callable[[Comm], AllToAll] = FlatAllToAll,
        partial_sums: Literal["rows", "wide"] = "rows",
        fp8: Any = None,
    ) -> None:
        checked_hierarchical(type(self).__name__, all_to_all)
        super().__init__(
            all_to_all, experts_per_rank, max_tokens, max_rows=max_rows, partial_sums=partial_sums, fp8=fp8
        )
        nodes, rank = all_to_all.nodes, self.comm.rank
        node = nodes.ranks[nodes.node_of[rank]]
        # All blocks of a hop are equal, so the relay with the most sources says how large they are.
        num_sources = int(np.bincount(nodes.local_rank % len(node)).max())
        self.rows_per_relay = self.max_tokens if rows_per_relay is None else _size("rows_per_relay", rows_per_relay)
        rows_inside = None if rows_inside is None else _size("rows_inside", rows_inside)
        self._sizes = f"rows_per_relay={self.rows_per_relay}, rows_inside={rows_inside}"
        self.rows_inside = rows_inside or num_sources * self.max_tokens
        if self.comm.size * self.max_tokens >= LARGEST:
            raise ValueError(f"StaticHierarchicalExchange: max_tokens is {self.max_tokens}, too many to number")
        with collective("StaticHierarchicalExchange", self.comm):
            _, relay_place = relay_places(all_to_all)
        # A relay sends on inside its node alone: what another node needs has gone there as a block of its own.
        is_near = np.append(nodes.same_node(rank), False)
        local_rank = np.where(is_near, np.append(nodes.local_rank, 0), len(node))
        between, inside = hop(all_to_all.cross), hop(all_to_all.local)
        holder = self._holders.rank
        self._hops = [
            StaticHop(between, Constant(relay_place[holder]), self.rows_per_relay, "rows_per_relay"),
            StaticHop(inside, Constant(local_rank[holder]), self.rows_inside, "rows_inside"),
        ]

    def _numbers(self, place: Array) -> Array:
        """[T, K + 1] also each token's number among those of all ranks."""
        # Rows arrive by relay, and within a relay by source: only the token itself can say where it belongs.
        token = arange(len(place), place) + self.comm.rank * self.max_tokens
        return concatenated(super()._numbers(place), as_int32(token)[:, None])

    def _order_of_rows(self, numbers: Array) -> Array | None:
        return numbers[:, -1].argsort()

    def _sizes_text(self) -> str:
        return f"{super()._sizes_text()}, {self._sizes}"


def _size(name: str, value: Any) -> int:
    try:
        size = operator.index(value)
    except TypeError:
        raise ValueError(f"StaticExchange: {name} is {value!r}, expected an integer >= 1") from None
    if size < 1:
        raise ValueError(f"StaticExchange: {name} is {size}, expected an integer >= 1")
    return size
