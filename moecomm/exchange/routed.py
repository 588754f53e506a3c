"""RoutedExchange: tokens to the ranks of their experts, and the answers home."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from moecomm.all_to_all import AllToAll
from moecomm.arrays import Array, Counts, as_dtype, as_rows, dtype_name, is_torch, num_axes, sum_dtype, zeros
from moecomm.arrays import on_host as is_on_host
from moecomm.exchange import float8
from moecomm.exchange.adjoint import new_thread, weighted_sum
from moecomm.exchange.block_counts import ALARMS, UNKNOWN_EXPERT, BlockCounts
from moecomm.exchange.contract import Exchange
from moecomm.exchange.holders import Holders, expert_lists
from moecomm.exchange.path import Path, Way
from moecomm.exchange.plan import Plan
from moecomm.exchange.table import (
    BlockOrder,
    Blocks,
    RowTable,
    as_int32,
    by_label,
    check_size,
    copies,
    table_of,
)
from moecomm.failures import Failing, collective
from moecomm.gating import Routing


class RoutedExchange(Exchange[Plan]):
    """Dispatch and combine over any AllToAll.

    all_to_all        among the ranks that share the experts
    experts_per_rank  how many experts each rank holds, 0 too: one number for all, or one for each rank; expert ids then
                      count up rank by rank. Or for each rank the list of the global ids that it holds
    send              "assignments": a row for each assignment; the weights stay at home.
                      "tokens": one row for each token and rank, however many of the rank's experts it goes to, and one
                      row back, weighted and summed there. Saves bytes where top-k is large beside p.
    partial_sums      how such sums travel. "rows": rounded to the dtype of the rows, and their sum at home once more.
                      "wide": as they are added, in float32 (float64 for float64 rows), and rounded at home alone
    fp8               the type in which dispatch sends and returns rows. None: that of x; torch.float8_e4m3fn, or its
                      name: quantised at home, with a scale for every 128 numbers (`plan.scales`), and without gradients

    Making one is not collective. Equal on all ranks: all arguments.
    Raises ValueError for experts that are held twice or lists that are not one per rank.
    """

    tells_unusable = True
    _plan_type: type[Plan] = Plan

    def __init__(
        self,
        all_to_all: AllToAll,
        experts_per_rank: int | Sequence[int] | Sequence[Sequence[int]],
        *,
        send: Literal["assignments", "tokens"] = "assignments",
        partial_sums: Literal["rows", "wide"] = "rows",
        fp8: Any = None,
    ) -> None:
        if not isinstance(all_to_all, AllToAll):
            raise TypeError(f"RoutedExchange: all_to_all is a {type(all_to_all).__name__}, expected an AllToAll")
        if send not in ("assignments", "tokens"):
            raise ValueError(f"RoutedExchange: send is {send!r}, expected 'assignments' or 'tokens'")
        if partial_sums not in ("rows", "wide"):
            raise ValueError(f"RoutedExchange: partial_sums is {partial_sums!r}, expected 'rows' or 'wide'")
        self.partial_sums = partial_sums
        self.fp8 = float8.checked_dtype(type(self).__name__, fp8)
        self.all_to_all = all_to_all
        self.comm = all_to_all.comm
        self.send = send
        self._compared = False
        """Whether the ranks compared what must be the same."""
        self.experts = expert_lists(experts_per_rank, self.comm.size)
        """The ids of those that each rank holds."""
        self.local_experts = self.experts[self.comm.rank]
        """The ids of this rank's experts, in the order of their rows."""
        self.num_local_experts = len(self.local_experts)
        """Experts of this rank."""
        self._holders = Holders.of(self.experts)
        self.num_experts = self._holders.num_experts
        """E, one more than the highest id."""
        # Ranks with fewer experts than the widest one have blocks that stay empty.
        source, local = np.divmod(np.arange(self.comm.size * self._holders.widest), max(self._holders.widest, 1))
        self._by_expert = BlockOrder.sorted_by(local, source)

    @property
    def comms(self) -> tuple[Failing, ...]:
        """The Comm of the all-to-all."""
        return (self.comm,)

    def rows_sent(self, plan: Plan) -> int:
        """Rows that this rank sends to other ranks in dispatch and combine, in all hops. Not collective."""
        return plan.path.rows_sent()

    def holds(self) -> NDArray[np.bool_]:
        """[E] whether any rank of this exchange holds the expert."""
        return self._holders.is_held()

    def dispatch(self, x: Array, routing: Routing) -> tuple[Array, Plan]:
        """Send every token to its experts.

        x        [T, H]  numpy or torch; a rank may have no tokens
        returns  ([N, H], plan)  the rows for this rank's experts, grouped by expert, then source rank, then token;
                 plan.rows_per_expert says how many each has

        x's row shape and dtype and K are the same on all ranks. Collective over the all-to-all's ranks. Differentiable
        in x; the backward pass is collective too: all ranks go through it or none. Raises ValueError or TypeError
        before anything is sent if the routing does not fit x or names an expert that no rank holds. A routing of
        unusable logits, as its status says, raises ValueError on all ranks, which then go on together.
        Source: Shazeer et al. 2017 (arXiv 1701.06538), eq. 1; DeepSpeed-MoE (arXiv 2201.05596), section 5.
        """
        with collective("dispatch", self.comm):
            expert, status = self._opened(x, routing)
            # One thread through all steps: their backward passes then run on all ranks in one order.
            thread = new_thread(x) if self.fp8 is None else None
            way = self._way(self._holders.on(expert).places(expert), status)
            away = way.away()
            weight = routing.weight
            if away is not None:
                # The experts' ranks weight the answers: the weights end where the rows arrive, before they are copied.
                weight, thread = way.path.part(0, -1).carry(weight, thread)
            scales = None
            if self.fp8 is None:
                rows, thread = way.path.carry(x, thread)
            else:
                rows, scales = float8.send(x, way.path)
            # Not before the rows are on their way: until then the counts may still be on a GPU.
            way.path.agree()
            count = way.rows_per_expert()[: self.num_local_experts]
            return rows, self._plan_type(count, len(rows), way.path, way.at_home(), away, weight, thread, scales)

    def combine(self, rows: Array, plan: Plan, dtype: Any = None) -> Array:
        """Bring the experts' answers home: for each token, their weighted sum.

        rows     [N, ...]  answers, in the order of what dispatch returned
        dtype    of the result; None: that of rows
        returns  [T, ...]  summed in float32 in a fixed order; a token without experts gets zeros

        Collective over the all-to-all's ranks. Differentiable in rows and in the weights given to dispatch.
        Raises ValueError if rows does not fit the plan.
        """
        with collective("combine", self.comm):
            self.comm.checked(
                f"{type(self).__name__}.combine", self._combine_arguments, rows, plan, compared_text=_plan_text
            )
            dtype = rows.dtype if dtype is None else dtype
            if plan.away is None:
                # Without the first step: at home the answers are summed with their weights, not plainly.
                answers, thread = plan.path.part(1, None).carry_back(rows, plan.thread)
                y = weighted_sum(answers, plan.weight, plan.at_home, dtype, self.comm)
            else:
                travelling = rows.dtype if self.partial_sums == "rows" else sum_dtype(rows)
                partial = weighted_sum(rows, plan.weight, plan.away, travelling, self.comm)
                y, thread = plan.path.part(0, -1).carry_back(partial, plan.thread)
                y = as_dtype(y, dtype)
            # The sum of nothing: it ties the result to all steps of the backward pass, whatever of it is used.
            return y if thread is None else y + thread.sum().to(dtype)

    # ---- who goes where --------------------------------------------------------------------------------------------

    def _way(self, place: Array, status: Array) -> Way:
        """place [T, K] of each assignment's expert, status of the routing -> the way of the rows. Collective.

        Assignments are sent in the order of their experts' places: the count of each source and expert is all that a
        receiver needs to bring them in order.
        """
        # One label more counts the ids that no rank holds, which on a device are not looked at before.
        at_home, count = by_label(place, self._holders.num_places + 1)
        alarm = self._alarm(status, count)
        if self.send == "tokens":
            return self._way_of_tokens(place, at_home, count, alarm)
        counts = BlockCounts.exchange(self.all_to_all, self._by_holder(count), None, alarm)
        path = Path((at_home, counts.leg_of_rows(alarmed=self.comm), self._blocks(counts)), self.comm)
        return Way(path, lambda: counts.received_on_host().sum(axis=0))

    def _way_of_tokens(self, place: Array, assignments: RowTable, count: Array, alarm: Array) -> Way:
        """One row for each token and rank. With each assignment goes a number: its row's place there, and its choice.

        assignments, count  in the order of places, and of each place
        """
        num_choices = place.shape[1]
        source = assignments.source
        rank = self._holders.on(place).rank[place.reshape(-1)[source]]
        rows = copies(rank, source // max(num_choices, 1), self.comm.size, place.shape)
        counts = BlockCounts.exchange(self.all_to_all, self._by_holder(count), rows.count, alarm)
        # Before anything is sent that not all ranks would come to.
        counts.raise_alarm(self.comm)
        choice = as_int32(rows.slot * num_choices + source % max(num_choices, 1))
        choice = self._blocks(counts).out(counts.send_choices(choice, num_choices))
        leg = counts.leg_of_rows()
        away = table_of(choice, (int(leg.route.recv_counts.sum()), num_choices))
        return Way(Path((rows.table, leg, away), self.comm), lambda: counts.received_on_host().sum(axis=0))

    def _alarm(self, status: Array, count: Array) -> Array:
        """The alarm of BlockCounts. count [P + 1] of each place; the last one is of experts that no rank holds."""
        status = status + (count[-1] > 0) * UNKNOWN_EXPERT
        return (status > 0) * ((self.comm.size - self.comm.rank) * ALARMS) + status

    def _by_holder(self, count: Array) -> Array:
        """count [P + 1] of each place -> [p, widest], by rank and expert."""
        holders = self._holders.on(count)
        counts = zeros((self.comm.size, holders.widest), "int64", count)
        counts[holders.rank[:-2], holders.local[:-2]] = count[:-1]
        return counts

    def _blocks(self, counts: BlockCounts) -> Blocks:
        """What comes lies in blocks by source, then expert; experts see it by expert, then source."""
        return Blocks(self._by_expert, counts.assignments.reshape(-1))

    # ---- checks ----------------------------------------------------------------------------------------------------

    def _opened(self, x: Array, routing: Routing) -> tuple[Array, Array]:
        """The expert ids [T, K] and the status, where x is. The ranks compare their first arguments."""

        def compared_text(checked: tuple[Array, Array]) -> str:
            return f"{tokens_text(x)}, K = {checked[0].shape[1]}, {self._sizes_text()}"

        # Later calls are left to `Checked`: a text of each call would cost a message.
        door = self.comm.checked if self._compared else self.comm.compared
        checked = door(
            f"{type(self).__name__}.dispatch", self._dispatch_arguments, x, routing, compared_text=compared_text
        )
        self._compared = True
        return checked

    def _sizes_text(self) -> str:
        """What was given to the constructor, which must be the same on all ranks."""
        options = f"send={self.send!r}, partial_sums={self.partial_sums!r}, fp8={self.fp8}"
        return f"{options}, experts on each rank {self.experts}"

    def _dispatch_arguments(self, x: Array, routing: Routing) -> tuple[Array, Array]:
        if num_axes(x, "x") < 2:
            raise ValueError(f"x has shape {tuple(x.shape)}, expected (T, H)")
        of_torch = is_torch(x)
        # What has no bytes to move is found before the counts are sent.
        as_rows(x[:0].detach() if of_torch else x[:0], "x")
        num_axes(routing.weight, "routing.weight")
        if of_torch != is_torch(routing.weight):
            raise TypeError(f"routing.weight is a {type(routing.weight).__name__}, expected a {type(x).__name__}, as x")
        if of_torch and routing.weight.device != x.device:
            raise ValueError(f"routing.weight is on {routing.weight.device}, expected {x.device} as x is")
        expert = expert_ids(routing.expert, x)
        if expert.ndim != 2 or expert.shape[0] != x.shape[0]:
            raise ValueError(
                f"routing.expert has shape {tuple(expert.shape)}, expected (T, K) with T = {x.shape[0]}, "
                f"as x {tuple(x.shape)}"
            )
        if tuple(routing.weight.shape) != tuple(expert.shape):
            raise ValueError(f"routing.weight has shape {tuple(routing.weight.shape)}, expected {tuple(expert.shape)}")
        check_size(*expert.shape)
        if self.fp8 is not None:
            float8.check_tokens(x, routing.weight)
        if is_torch(expert):
            # On a device nothing is read: status and ids are told to all ranks with the counts.
            return expert, 0 if routing.status is None else routing.status
        self._check_ids(expert)
        return expert, 0 if routing.status is None else int(routing.status)

    def _check_ids(self, expert: Counts) -> None:
        if expert.size and not -1 <= expert.min() <= expert.max() < self.num_experts:
            raise ValueError(f"routing.expert has {expert.min()}..{expert.max()}, expected -1..{self.num_experts - 1}")
        # Ids between those that are held: experts need not be numbered without gaps.
        lost = expert[self._holders.place[expert] == self._holders.num_places]
        if lost.size:
            raise ValueError(f"routing.expert names expert {lost[0]}, which no rank holds")

    def _combine_arguments(self, rows: Array, plan: Plan) -> tuple[Array, Plan]:
        if not isinstance(plan, Plan):
            raise TypeError(f"plan is a {type(plan).__name__}, expected one that dispatch returned")
        if is_torch(rows) != is_torch(plan.weight):
            raise TypeError(
                f"rows is a {type(rows).__name__}, expected a {type(plan.weight).__name__} as dispatch was given"
            )
        if num_axes(rows, "rows") < 2 or rows.shape[0] != plan.num_rows:
            raise ValueError(
                f"rows has shape {tuple(rows.shape)}, expected ({plan.num_rows}, H): the rows that dispatch returned"
            )
        if "float" not in dtype_name(rows):
            raise TypeError(f"rows has dtype {dtype_name(rows)}, expected floats, which can be weighted and summed")
        if self.fp8 is not None:
            float8.check_gradients(rows=rows)
        return rows, plan


def on_host(array: Array) -> np.ndarray:
    """As numpy, wherever it is."""
    return array.detach().cpu().numpy() if is_torch(array) else np.asarray(array)


def expert_ids(expert: Array, x: Array) -> Array:
    """Expert ids as numpy where x is on the host, and as a tensor on the device of x otherwise."""
    if is_on_host(x):
        return on_host_as_int64(expert)
    import torch

    ids = torch.as_tensor(expert, device=x.device)
    if ids.dtype.is_floating_point or ids.dtype.is_complex or ids.dtype == torch.bool:
        raise TypeError(f"routing.expert has dtype {dtype_name(ids)}, expected integers")
    return ids.long()


def on_host_as_int64(expert: Array) -> Counts:
    """Expert ids as numpy, wherever they are."""
    ids = on_host(expert)
    if ids.dtype.kind not in "iu":
        raise TypeError(f"routing.expert has dtype {ids.dtype}, expected integers")
    return ids.astype(np.int64)


def tokens_text(x: Array) -> str:
    """What must be the same on every rank that dispatches or combines x."""
    return f"{dtype_name(x)} rows of shape {tuple(x.shape[1:])}"


def _plan_text(arguments: tuple[Array, Plan]) -> str:
    """What must be the same on every rank that combines: two ranks may have several plans, and mix them up."""
    rows, plan = arguments
    return plan.path.text(rows)
