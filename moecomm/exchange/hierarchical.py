"""HierarchicalExchange: a token crosses the network once for each node that it needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from moecomm.all_to_all import FlatAllToAll, HierarchicalAllToAll, Route
from moecomm.arrays import Array, Counts, sum_dtype
from moecomm.exchange.adjoint import move, move_back, new_thread
from moecomm.exchange.copies import Copies, by_label, copy_out, one_each, sum_back
from moecomm.exchange.plan import Plan
from moecomm.exchange.routed import (
    RoutedExchange,
    alarms,
    combine_arguments,
    raise_alarm,
    rows_to_others,
    tokens_text,
)
from moecomm.failures import collective
from moecomm.gating import Routing


@dataclass(frozen=True, eq=False)
class RelayPlan(Plan):
    """The Plan of a HierarchicalExchange.

    at_home and route are those of the hop between nodes: from the tokens here to the relays, over `all_to_all.cross`.
    away is from the rows that the relays sent here to those that the experts see.
    """

    relayed: Copies = field(kw_only=True)
    """From the rows that came to this rank as a relay to those that it sends on, over `all_to_all.local`."""
    inside: Route = field(kw_only=True)
    """How many of them went to and came from each rank of this node."""


class HierarchicalExchange(RoutedExchange):
    """RoutedExchange in two hops with one row for each token and node, and then for each token and rank of that node.

    A token of local rank l goes, once for each node that holds any of its experts, to its relay there: local rank l
    mod the size of that node. The relay copies it to the ranks that hold them. On the way back the answers are weighted
    and summed on each rank, the relay sums these sums, and one row for each token and node goes home. Partial sums are
    float32 (float64 for float64 rows) and in a fixed order. Rows between nodes: for each token, the number of other
    nodes that it needs; inside: for each token and node, the number of ranks that it needs beside the relay.

    all_to_all        says which ranks share a node, and has the groups for both hops. Nodes may be of any size and
                      placed in any order
    experts_per_rank  as for RoutedExchange

    With every row go the ids of its K experts and K weights. Pays where top-k is large beside the number of nodes and
    the network is slower than the node. Memory beside input and output: the rows sent, relayed and received.

    Making one is collective over all_to_all.cross. What dispatch and combine take, return and raise is what
    RoutedExchange says, in the same order.
    Source: the dispatch of DeepSeek-V3 (arXiv 2412.19437), section 3.2.2, here for any nodes.
    """

    def __init__(
        self,
        all_to_all: HierarchicalAllToAll,
        experts_per_rank: int | Sequence[int] | Sequence[Sequence[int]],
    ) -> None:
        if not isinstance(all_to_all, HierarchicalAllToAll):
            name = type(all_to_all).__name__
            raise TypeError(f"HierarchicalExchange: all_to_all is a {name}, expected a HierarchicalAllToAll")
        super().__init__(all_to_all, experts_per_rank, send="tokens")
        nodes, rank = all_to_all.nodes, self.comm.rank
        self._between, self._inside = FlatAllToAll(all_to_all.cross), FlatAllToAll(all_to_all.local)
        with collective("HierarchicalExchange", self.comm):
            self._sources = all_to_all.cross.all_gather(np.array([rank]))
        """[size of cross] its ranks."""
        relays = [node[nodes.local_rank[rank] % len(node)] for node in nodes.ranks]
        places = np.searchsorted(self._sources, relays)
        # [p + 1] by the rank that holds an expert, the last one for none: where in either hop's group the way leads
        self._relay = np.append(places[nodes.node_of], all_to_all.cross.size)
        here = np.where(nodes.same_node(rank), nodes.local_rank, all_to_all.local.size)
        self._receiver = np.append(here, all_to_all.local.size)

    def dispatch(self, x: Array, routing: Routing) -> tuple[Array, RelayPlan]:
        """Send every token to its experts. As RoutedExchange.dispatch; the counts are exchanged once in each hop."""
        with collective("dispatch", self.comm):
            status, expert = self._opened(x, routing)
            at_home, place = one_each(self._relay[self._holder[expert]], self._between.comm.size)
            expert = expert[at_home.row]
            if status:
                place = np.unique(self._relay[:-1])
                expert = alarms(self.comm, status, len(place), expert.shape[1])
            route = self._between.route(np.bincount(place, minlength=self._between.comm.size))
            expert = self._between.send(expert, route)
            alarm, expert = expert[expert.min(axis=1, initial=0) < -1], np.maximum(expert, -1)
            relayed, place = one_each(self._receiver[self._holder[expert]], self._inside.comm.size)
            labels = self._labels(expert, np.repeat(self._sources, route.recv_counts), relayed, place)
            if len(alarm):  # on to every rank of this node
                place = np.repeat(np.arange(self._inside.comm.size), len(alarm))
                labels = np.tile(alarm, (self._inside.comm.size, 1))
            inside = self._inside.route(np.bincount(place, minlength=self._inside.comm.size))
            labels = self._inside.send(labels, inside)
            raise_alarm(labels, self.comm)
            away, label = by_label(labels)
            rows_per_expert = np.bincount(label // self.comm.size, minlength=self.num_local_experts)

            def carry(rows: Array, thread: Any) -> tuple[Array, Any]:
                rows, thread = move(self._between, copy_out(rows, at_home), thread, route)
                return move(self._inside, copy_out(rows, relayed), thread, inside)

            weight, thread = carry(routing.weight, new_thread(x))
            rows, thread = carry(x, thread)
            plan = RelayPlan(
                rows_per_expert, at_home, away, route, None, weight, thread, relayed=relayed, inside=inside
            )
            return copy_out(rows, away), plan

    def combine(self, rows: Array, plan: Plan, dtype: Any = None) -> Array:
        """Bring the experts' answers home: for each token, their weighted sum. As RoutedExchange.combine."""
        with collective("combine", self.comm):
            relay_plan = self.comm.checked(
                f"{type(self).__name__}.combine", _relay_plan, rows, plan, same=lambda _: tokens_text(rows)
            )
            partial = sum_back(rows, plan.away, plan.away_weight, sum_dtype(rows))
            partial, thread = move_back(self._inside, partial, plan.thread, relay_plan.inside)
            partial, thread = move_back(self._between, sum_back(partial, relay_plan.relayed), thread, plan.route)
            y = sum_back(partial, plan.at_home, None, rows.dtype if dtype is None else dtype)
            return y if thread is None else y + thread.sum().to(y.dtype)

    def rows_sent(self, plan: Plan) -> int:
        """Rows that this rank sends to other ranks in dispatch and combine, in both hops. Not collective."""
        rows = rows_to_others(plan.route, self._between.comm.rank)
        if isinstance(plan, RelayPlan):
            rows += rows_to_others(plan.inside, self._inside.comm.rank)
        return rows

    def _labels(self, expert: Counts, source: Counts, relayed: Copies, place: Counts) -> Counts:
        """[N, K] for each row to send on, what it is ordered by where it comes: the receiver's expert, then the source.

        -1 where a choice is not that rank's.
        """
        expert, source = expert[relayed.row], source[relayed.row]
        is_there = self._receiver[self._holder[expert]] == place[:, None]
        return np.where(is_there, self._local_id[expert] * self.comm.size + source[:, None], -1)


def _relay_plan(rows: Array, plan: Plan) -> RelayPlan:
    if not isinstance(plan, RelayPlan):
        raise TypeError(f"plan is a {type(plan).__name__}, expected the RelayPlan that dispatch returned")
    combine_arguments(rows, plan)
    return plan
