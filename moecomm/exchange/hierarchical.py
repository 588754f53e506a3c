"""HierarchicalExchange: a token crosses the network once for each node that it needs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from moecomm.all_to_all import AllToAll, FlatAllToAll, HierarchicalAllToAll
from moecomm.arrays import Array, Counts, zeros
from moecomm.comm import Comm
from moecomm.exchange.block_counts import BlockCounts
from moecomm.exchange.holders import Holders
from moecomm.exchange.path import Path, Way
from moecomm.exchange.plan import Plan
from moecomm.exchange.routed import RoutedExchange
from moecomm.exchange.table import (
    BlockOrder,
    Blocks,
    Constant,
    Copies,
    arange,
    as_int32,
    by_label,
    copies,
    num_copies,
    repeated,
    table_of,
)
from moecomm.failures import collective


@dataclass(frozen=True, eq=False)
class RelayPlan(Plan):
    """The Plan of a HierarchicalExchange, whose path is a table, a leg between nodes, a table, one inside, a table."""


class HierarchicalExchange(RoutedExchange):
    """RoutedExchange in two hops with one row for each token and node, and then for each token and rank of that node.

    A token of local rank l goes, once for each node that holds any of its experts, to its relay there: local rank l
    mod the size of that node. The relay copies it to the ranks that hold them. On the way back the answers are weighted
    and summed on each rank, the relay sums these sums, and one row for each token and node goes home. Sums are added in
    float32 (float64 for float64 rows) and in a fixed order. Rows between nodes: for each token, the number of other
    nodes that it needs; inside: for each token and node, the number of ranks that it needs beside the relay.

    all_to_all        says which ranks share a node, and has the groups for both hops. Nodes may be of any size and
                      placed in any order
    experts_per_rank  as for RoutedExchange
    hop               makes the all-to-all of each hop, over the group of that hop
    partial_sums      as for RoutedExchange; "rows" rounds at each rank, relay and at home: three times
    fp8               as for RoutedExchange; rows are quantised once, at home

    With every row go its K weights, and four bytes for each of its assignments. Pays where top-k is large beside the
    number of nodes and the network is slower than the node. Memory beside input and output: the rows sent, relayed and
    received.

    Making one is collective over the all-to-all's ranks. What dispatch and combine take, return and raise is what
    RoutedExchange says, in the same order.
    Source: the dispatch of DeepSeek-V3 (arXiv 2412.19437), section 3.2.2, here for any nodes.
    """

    _plan_type = RelayPlan

    def __init__(
        self,
        all_to_all: HierarchicalAllToAll,
        experts_per_rank: int | Sequence[int] | Sequence[Sequence[int]],
        *,
        hop: Callable[[Comm], AllToAll] = FlatAllToAll,
        partial_sums: Literal["rows", "wide"] = "rows",
        fp8: Any = None,
    ) -> None:
        checked_hierarchical("HierarchicalExchange", all_to_all)
        super().__init__(all_to_all, experts_per_rank, send="tokens", partial_sums=partial_sums, fp8=fp8)
        nodes = all_to_all.nodes
        self._between, self._inside = hop(all_to_all.cross), hop(all_to_all.local)
        with collective("HierarchicalExchange", self.comm):
            sources, relay_place = relay_places(all_to_all)
            self._sources = sources
            """[ranks of cross] their ranks."""
            reach = np.full((1, self.comm.size), -1)
            reach[0, : len(sources)] = sources
            reaches = all_to_all.local.all_gather(reach)
        self._relay_place, self._local_rank = Constant(relay_place), Constant(nodes.local_rank)
        by_relay = np.lexsort((nodes.local_rank, relay_place[:-1]))
        self._holders = Holders.of(self.experts, by_relay.tolist())
        self._make_orders(int(nodes.sizes().max()), reaches)

    def _make_orders(self, largest_node: int, reaches: Counts) -> None:
        """The orders of blocks. reaches [ranks of this node, p]: the sources that each of them relays for, then -1."""
        widest = self._holders.widest
        self._largest_node = largest_node
        self._most_sources = int((reaches >= 0).sum(axis=1).max())
        # Between nodes blocks lie by source, local rank of the holder, expert. A relay sends on by local rank.
        source, local_rank, expert = np.indices((len(self._sources), largest_node, widest)).reshape(3, -1)
        self._by_local_rank = BlockOrder.sorted_by(local_rank, source, expert)
        # Inside a node they lie by relay, source, expert. Experts see them by expert, then source.
        relay, place, expert = np.indices((len(reaches), self._most_sources, widest)).reshape(3, -1)
        self._by_expert = BlockOrder.sorted_by(expert, reaches[relay, place])

    # ---- who goes where --------------------------------------------------------------------------------------------

    def _way(self, place: Array, status: Array) -> Way:
        """As RoutedExchange has it, with a relay. The counts of both hops go before anything else."""
        num_choices = place.shape[1]
        table, count = by_label(place, self._holders.num_places + 1)
        source = table.source
        token = source // max(num_choices, 1)
        rank = self._holders.on(place).rank[place.reshape(-1)[source]]
        relay = self._relay_place.at(place)[rank]
        rows = copies(relay, token, self._between.comm.size, place.shape)
        # Sources count the rows of hop two, so that the counts of both hops go first and the host waits for a GPU once.
        num_inside = num_copies(rank, token, self.comm.size, place.shape[0])
        between = self._count_between(count, rows.count, num_inside, self._alarm(status, count))
        inside = self._count_inside(between)
        # The alarms of all ranks have come through the relays: nobody goes on to a hop that others leave.
        inside.raise_alarm(self.comm)

        choice = between.send_choices(as_int32(rows.slot * num_choices + source % max(num_choices, 1)), num_choices)
        choice = Blocks(self._by_local_rank, between.assignments.reshape(-1)).out(choice)
        leg_between, leg_inside = between.leg_of_rows(), inside.leg_of_rows()
        relayed = self._relay(between, choice, (int(leg_between.route.recv_counts.sum()), num_choices))

        choice = as_int32(relayed.slot * num_choices + choice % max(num_choices, 1))
        choice = inside.send_choices(choice, num_choices)
        choice = Blocks(self._by_expert, inside.assignments.reshape(-1)).out(choice)
        away = table_of(choice, (int(leg_inside.route.recv_counts.sum()), num_choices))
        path = Path((rows.table, leg_between, relayed.table, leg_inside, away), self.comm)
        return Way(path, lambda: inside.received_on_host().reshape(-1, self._holders.widest).sum(axis=0))

    def _count_between(self, count: Array, num_rows: Array, num_inside: Array, alarm: Array) -> BlockCounts:
        """What each relay is told: blocks by local rank and expert, rows for it, rows that it sends to each local rank.

        count [P + 1] assignments of each place, num_rows [relays], num_inside [p] rows for each rank behind its relay
        """
        holders = self._holders.on(count)
        relay_place, local_rank = self._relay_place.at(count), self._local_rank.at(count)
        num_relays, rank = self._between.comm.size, holders.rank[:-2]
        assignments = zeros((num_relays, self._largest_node, holders.widest), "int64", count)
        assignments[relay_place[rank], local_rank[rank], holders.local[:-2]] = count[:-1]
        rows_inside = zeros((num_relays, self._largest_node), "int64", count)
        rows_inside[relay_place[:-1], local_rank] = num_inside
        return BlockCounts.exchange(
            self._between, assignments.reshape(num_relays, -1), num_rows, alarm, others=rows_inside
        )

    def _count_inside(self, between: BlockCounts) -> BlockCounts:
        """What a relay tells the ranks of its node: blocks by source and expert, and rows."""
        size, widest = self._inside.comm.size, self._holders.widest
        num_sources = len(self._sources)
        by_source = between.assignments.reshape(num_sources, self._largest_node, widest)
        assignments = zeros((size, self._most_sources, widest), "int64", by_source)
        # Relays of one node may have different numbers of sources; all tell as many, the last ones empty.
        for local_rank in range(size):
            assignments[local_rank, :num_sources] = by_source[:, local_rank]
        num_rows = between.others.sum(0)[:size]
        return BlockCounts.exchange(self._inside, assignments.reshape(size, -1), num_rows, between.alarm.max())

    def _relay(self, between: BlockCounts, choice: Array, shape: tuple[int, int]) -> Copies:
        """The rows that this relay sends on. choice [N]: of each assignment its row and choice, by local rank."""
        num_assignments = between.assignments.reshape(len(self._sources), self._largest_node, -1).sum(2).sum(0)
        local_rank = arange(self._largest_node, choice)
        local_rank = repeated(local_rank, num_assignments, len(choice))
        return copies(local_rank, choice // max(shape[1], 1), self._inside.comm.size, shape)

    def _combine_arguments(self, rows: Array, plan: Plan) -> tuple[Array, Plan]:
        if not isinstance(plan, RelayPlan):
            raise TypeError(f"plan is a {type(plan).__name__}, expected the RelayPlan that dispatch returned")
        return super()._combine_arguments(rows, plan)


def checked_hierarchical(exchange: str, all_to_all: AllToAll) -> None:
    """TypeError for another all-to-all than the exchange of that name takes."""
    if not isinstance(all_to_all, HierarchicalAllToAll):
        name = type(all_to_all).__name__
        raise TypeError(f"{exchange}: all_to_all is a {name}, expected a HierarchicalAllToAll")


def relay_places(all_to_all: HierarchicalAllToAll) -> tuple[Counts, Counts]:
    """The ranks of `cross`, and [p + 1] by the rank that holds an expert where in cross the way to it begins.

    The last entry: nowhere, the size of cross. Collective over cross.
    """
    nodes = all_to_all.nodes
    local_rank = nodes.local_rank[all_to_all.comm.rank]
    sources = all_to_all.cross.all_gather(np.array([all_to_all.comm.rank]))
    relays = [node[local_rank % len(node)] for node in nodes.ranks]
    return sources, np.append(np.searchsorted(sources, relays)[nodes.node_of], len(sources))
