"""HierarchicalExchange: a token crosses the network once for each node that it needs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from moecomm.all_to_all import AllToAll, FlatAllToAll, HierarchicalAllToAll
from moecomm.arrays import Array, Counts
from moecomm.comm import Comm
from moecomm.exchange.adjoint import Thread
from moecomm.exchange.path import Leg, Path
from moecomm.exchange.plan import Plan
from moecomm.exchange.routed import RoutedExchange, alarms, raise_alarm
from moecomm.exchange.table import by_label, one_each
from moecomm.failures import collective


@dataclass(frozen=True, eq=False)
class RelayPlan(Plan):
    """The Plan of a HierarchicalExchange, whose path is a table, a leg between nodes, a table, one inside, a table."""


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
    hop               makes the all-to-all of each hop, over the group of that hop

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
        *,
        hop: Callable[[Comm], AllToAll] = FlatAllToAll,
    ) -> None:
        if not isinstance(all_to_all, HierarchicalAllToAll):
            name = type(all_to_all).__name__
            raise TypeError(f"HierarchicalExchange: all_to_all is a {name}, expected a HierarchicalAllToAll")
        super().__init__(all_to_all, experts_per_rank, send="tokens")
        nodes, rank = all_to_all.nodes, self.comm.rank
        self._between, self._inside = hop(all_to_all.cross), hop(all_to_all.local)
        with collective("HierarchicalExchange", self.comm):
            self._sources = all_to_all.cross.all_gather(np.array([rank]))
        """[size of cross] its ranks."""
        relays = [node[nodes.local_rank[rank] % len(node)] for node in nodes.ranks]
        places = np.searchsorted(self._sources, relays)
        # [p + 1] by the rank that holds an expert, the last one for none: where in either hop's group the way leads
        self._relay = np.append(places[nodes.node_of], all_to_all.cross.size)
        here = np.where(nodes.same_node(rank), nodes.local_rank, all_to_all.local.size)
        self._receiver = np.append(here, all_to_all.local.size)

    def _find_path(self, expert: Counts, status: int) -> tuple[Path, Counts]:
        """As RoutedExchange has it. The counts are exchanged once in each hop."""
        at_home, token, place = one_each(self._relay[self._holder[expert]], self._between.comm.size)
        relayed_expert = expert[token]
        if status:
            place = np.unique(self._relay[:-1])
            relayed_expert = alarms(self.comm, status, len(place), expert.shape[1])
        between = Leg.along(self._between, np.bincount(place, minlength=self._between.comm.size))
        relayed_expert = between.out(relayed_expert)
        alarm = relayed_expert[relayed_expert.min(axis=1, initial=0) < -1]
        relayed_expert = np.maximum(relayed_expert, -1)
        relayed, token, place = one_each(self._receiver[self._holder[relayed_expert]], self._inside.comm.size)
        source = np.repeat(self._sources, between.route.recv_counts)
        labels = self._labels(relayed_expert[token], source[token], place)
        if len(alarm):
            # All ranks of this node must learn it, or they would wait for rows that do not come.
            place = np.repeat(np.arange(self._inside.comm.size), len(alarm))
            labels = np.tile(alarm, (self._inside.comm.size, 1))
        inside = Leg.along(self._inside, np.bincount(place, minlength=self._inside.comm.size))
        labels = inside.out(labels)
        raise_alarm(labels, self.comm)
        away, label = by_label(labels)
        rows_per_expert = np.bincount(label // self.comm.size, minlength=self.num_local_experts)
        return Path.over(self.comm, at_home, between, relayed, inside, away), rows_per_expert

    def _labels(self, expert: Counts, source: Counts, place: Counts) -> Counts:
        """[N, K] what the receiver orders each row by: the number of its expert there, then the source.

        expert [N, K], source [N] and place [N], the rank inside the node, are of the rows to send on. -1 where a choice
        is not that rank's.
        """
        is_there = self._receiver[self._holder[expert]] == place[:, None]
        return np.where(is_there, self._local_id[expert] * self.comm.size + source[:, None], -1)

    def _make_plan(
        self, rows_per_expert: Counts, path: Path, home_weight: Array | None, away_weight: Array | None, thread: Thread
    ) -> RelayPlan:
        at_home, away = path.ends()
        return RelayPlan(rows_per_expert, path, at_home, away, home_weight, away_weight, thread)

    def _combine_arguments(self, rows: Array, plan: Plan) -> tuple[Array, Plan]:
        if not isinstance(plan, RelayPlan):
            raise TypeError(f"plan is a {type(plan).__name__}, expected the RelayPlan that dispatch returned")
        return super()._combine_arguments(rows, plan)
