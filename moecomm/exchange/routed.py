"""RoutedExchange: tokens to the ranks of their experts, and the answers home."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from moecomm.all_to_all import AllToAll
from moecomm.arrays import Array, Counts, as_dtype, as_rows, dtype_name, is_torch, num_axes, sum_dtype
from moecomm.comm import Comm
from moecomm.exchange.adjoint import Thread, new_thread, weighted_sum
from moecomm.exchange.contract import Exchange
from moecomm.exchange.path import Leg, Path
from moecomm.exchange.plan import Plan
from moecomm.exchange.table import by_label, check_size, one_each
from moecomm.failures import Failing, collective, refused
from moecomm.gating import Routing
from moecomm.gating.routing import STATUSES, problem


class RoutedExchange(Exchange[Plan]):
    """Dispatch and combine over any AllToAll.

    all_to_all        among the ranks that share the experts
    experts_per_rank  how many experts each rank holds, 0 too: one number for all, or one for each rank; expert ids then
                      count up rank by rank. Or for each rank the list of the global ids that it holds
    send              "assignments": a row for each assignment; the weights stay at home.
                      "tokens": one row for each token and rank, however many of the rank's experts it goes to, and one
                      row back, weighted and summed there, as float32. Saves bytes where top-k is large beside p.

    Making one is not collective. Equal on all ranks: all arguments.
    Raises ValueError for experts that are held twice or lists that are not one per rank.
    """

    tells_unusable = True

    def __init__(
        self,
        all_to_all: AllToAll,
        experts_per_rank: int | Sequence[int] | Sequence[Sequence[int]],
        *,
        send: Literal["assignments", "tokens"] = "assignments",
    ) -> None:
        if not isinstance(all_to_all, AllToAll):
            raise TypeError(f"RoutedExchange: all_to_all is a {type(all_to_all).__name__}, expected an AllToAll")
        if send not in ("assignments", "tokens"):
            raise ValueError(f"RoutedExchange: send is {send!r}, expected 'assignments' or 'tokens'")
        self.all_to_all = all_to_all
        self.comm = all_to_all.comm
        self.send = send
        self._compared = False
        """Whether the ranks compared what must be the same."""
        experts = _expert_lists(experts_per_rank, self.comm.size)
        self.local_experts = experts[self.comm.rank]
        """The ids of this rank's experts, in the order of their rows."""
        self.num_local_experts = len(self.local_experts)
        """Experts of this rank."""
        self.experts = experts
        """The ids of those that each rank holds."""
        held = [expert for group in experts for expert in group]
        if len(set(held)) < len(held) or min(held, default=0) < 0:
            raise ValueError(f"RoutedExchange: experts_per_rank is {experts}, expected every expert on one rank only")
        self.num_experts = max(held, default=-1) + 1
        """E, one more than the highest id."""
        nobody = self.comm.size
        self._holder = np.full(self.num_experts + 1, nobody)  # [E + 1]: the last one is for -1, dropped
        self._local_id = np.full(self.num_experts + 1, -1)
        for rank, group in enumerate(experts):
            self._holder[group] = rank
            self._local_id[group] = np.arange(len(group))

    @property
    def comms(self) -> tuple[Failing, ...]:
        """The Comm of the all-to-all."""
        return (self.comm,)

    def rows_sent(self, plan: Plan) -> int:
        """Rows that this rank sends to other ranks in dispatch and combine, in all hops. Not collective."""
        return plan.path.rows_sent()

    def holds(self) -> NDArray[np.bool_]:
        """[E] whether any rank of this exchange holds the expert."""
        return self._holder[:-1] < self.comm.size

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
            status, expert = self._opened(x, routing)
            path, rows_per_expert = self._find_path(expert, status)
            path = path.for_rows_like(x)
            thread = new_thread(x)
            home_weight, away_weight = routing.weight, None
            if self.send == "tokens":
                home_weight = None
                # The experts' ranks weight the answers: the weights end where the rows arrive, before they are copied.
                away_weight, thread = path.part(0, -1).carry(routing.weight, thread)
            rows, thread = path.carry(x, thread)
            return rows, self._make_plan(rows_per_expert, path, home_weight, away_weight, thread)

    def combine(self, rows: Array, plan: Plan, dtype: Any = None) -> Array:
        """Bring the experts' answers home: for each token, their weighted sum.

        rows     [N, ...]  answers, in the order of what dispatch returned
        dtype    of the result; None: that of rows
        returns  [T, ...]  summed in float32 in a fixed order; a token without experts gets zeros

        Collective over the all-to-all's ranks. Differentiable in rows and in the weights given to dispatch.
        Raises ValueError if rows does not fit the plan.
        """
        with collective("combine", self.comm):
            self.comm.checked(f"{type(self).__name__}.combine", self._combine_arguments, rows, plan, same=_plan_text)
            dtype = rows.dtype if dtype is None else dtype
            if plan.home_weight is not None:
                answers, thread = plan.path.part(1, None).carry_back(rows, plan.thread)
                y = weighted_sum(answers, plan.home_weight, plan.at_home, dtype, self.comm)
            else:
                # The sums travel as wide as they are added: they are rounded when they are complete.
                partial = weighted_sum(rows, plan.away_weight, plan.away, sum_dtype(rows), self.comm)
                y, thread = plan.path.part(0, -1).carry_back(partial, plan.thread)
                y = as_dtype(y, dtype)
            return y if thread is None else y + thread.sum().to(dtype)

    # ---- who goes where --------------------------------------------------------------------------------------------

    def _find_path(self, expert: Counts, status: int) -> tuple[Path, Counts]:
        """expert [T, K] -> the path of a token's row, and the rows of each expert of this rank. Collective.

        The receiver orders what comes by labels: for each row the local ids of the experts that it is for, [N, 1], or
        [N, K] with -1 where a choice is not that rank's.
        """
        rank = self._holder[expert]
        if self.send == "assignments":
            at_home, destination = by_label(np.where(expert >= 0, rank, -1))
            labels = self._local_id[expert.reshape(-1)[at_home.source]].reshape(-1, 1)
        else:
            at_home, token, destination = one_each(rank, self.comm.size)
            labels = np.where(rank[token] == destination[:, None], self._local_id[expert[token]], -1)
        send_counts = np.bincount(destination, minlength=self.comm.size)
        if status:
            send_counts = np.ones(self.comm.size, np.int64)
            labels = alarms(self.comm, status, self.comm.size, labels.shape[1])
        leg = Leg.along(self.all_to_all, send_counts)
        labels = leg.out(labels)
        raise_alarm(labels, self.comm)
        away, local_id = by_label(labels)
        rows_per_expert = np.bincount(local_id, minlength=self.num_local_experts)
        return Path.over(self.comm, at_home, leg, away), rows_per_expert

    def _make_plan(
        self, rows_per_expert: Counts, path: Path, home_weight: Array | None, away_weight: Array | None, thread: Thread
    ) -> Plan:
        at_home, away = path.ends()
        return Plan(rows_per_expert, path, at_home, away, home_weight, away_weight, thread)

    # ---- checks ----------------------------------------------------------------------------------------------------

    def _opened(self, x: Array, routing: Routing) -> tuple[int, Counts]:
        """The status of the routing and the expert ids [T, K]. At the first dispatch the ranks compare arguments."""

        def same(checked: tuple[int, Counts]) -> str:
            return (
                f"{tokens_text(x)}, K = {checked[1].shape[1]}, send={self.send!r}, experts on each rank {self.experts}"
            )

        door = self.comm.checked if self._compared else self.comm.compared
        checked = door(f"{type(self).__name__}.dispatch", self._dispatch_arguments, x, routing, same=same)
        self._compared = True
        return checked

    def _dispatch_arguments(self, x: Array, routing: Routing) -> tuple[int, Counts]:
        if num_axes(x, "x") < 2:
            raise ValueError(f"x has shape {tuple(x.shape)}, expected (T, H)")
        of_torch = is_torch(x)
        # What has no bytes to move is found before the counts are sent.
        as_rows(x[:0].detach() if of_torch else x[:0], "x")
        num_axes(routing.weight, "routing.weight")
        if of_torch != is_torch(routing.weight):
            raise TypeError(f"routing.weight is a {type(routing.weight).__name__}, expected a {type(x).__name__}, as x")
        expert = on_host_as_int64(routing.expert)
        if expert.ndim != 2 or expert.shape[0] != x.shape[0]:
            raise ValueError(
                f"routing.expert has shape {expert.shape}, expected (T, K) with T = {x.shape[0]}, as x {tuple(x.shape)}"
            )
        if tuple(routing.weight.shape) != expert.shape:
            raise ValueError(f"routing.weight has shape {tuple(routing.weight.shape)}, expected {expert.shape}")
        if expert.size and not -1 <= expert.min() <= expert.max() < self.num_experts:
            raise ValueError(f"routing.expert has {expert.min()}..{expert.max()}, expected -1..{self.num_experts - 1}")
        lost = expert[(expert >= 0) & (self._holder[expert] == self.comm.size)]
        if lost.size:
            raise ValueError(f"routing.expert names expert {lost[0]}, which no rank holds")
        check_size(*expert.shape)
        status = 0 if routing.status is None else int(routing.status)  # of a GPU: expert has waited for it
        return status, expert

    def _combine_arguments(self, rows: Array, plan: Plan) -> tuple[Array, Plan]:
        if not isinstance(plan, Plan):
            raise TypeError(f"plan is a {type(plan).__name__}, expected one that dispatch returned")
        weight = plan.away_weight if plan.home_weight is None else plan.home_weight
        if is_torch(rows) != is_torch(weight):
            raise TypeError(
                f"rows is a {type(rows).__name__}, expected a {type(weight).__name__} as dispatch was given"
            )
        wanted = len(plan.away.source)
        if num_axes(rows, "rows") < 2 or rows.shape[0] != wanted:
            raise ValueError(
                f"rows has shape {tuple(rows.shape)}, expected ({wanted}, H): the rows that dispatch returned"
            )
        if "float" not in dtype_name(rows):
            raise TypeError(f"rows has dtype {dtype_name(rows)}, expected floats, which can be weighted and summed")
        return rows, plan


def alarms(comm: Comm, status: int, num_rows: int, width: int) -> Counts:
    """[num_rows, width] labels below -1: what a rank with an unusable routing sends where others send expert ids."""
    return np.full((num_rows, width), -2 - (STATUSES * comm.rank + status))


def raise_alarm(labels: Counts, comm: Comm) -> None:
    """Raise ValueError if alarms came, which then every rank has got."""
    if labels.min(initial=0) < -1:
        rank, status = divmod(-2 - int(labels[labels < -1].max()), STATUSES)
        raise refused(
            ValueError(
                f"dispatch: the gate of rank {comm.world_rank(rank)} had no answer: {problem(status)}{comm.where()}"
            )
        )


def on_host(array: Array) -> np.ndarray:
    """As numpy, wherever it is."""
    return array.detach().cpu().numpy() if is_torch(array) else np.asarray(array)


def on_host_as_int64(expert: Array) -> Counts:
    """Expert ids as numpy, wherever they are."""
    ids = on_host(expert)
    if ids.dtype.kind not in "iu":
        raise TypeError(f"routing.expert has dtype {ids.dtype}, expected integers")
    return ids.astype(np.int64)


def _expert_lists(experts_per_rank: Any, size: int) -> list[list[int]]:
    if isinstance(experts_per_rank, int | np.integer):
        experts_per_rank = [int(experts_per_rank)] * size
    groups = list(experts_per_rank)
    if len(groups) != size:
        raise ValueError(f"RoutedExchange: experts_per_rank has {len(groups)} entries, expected {size}, one per rank")
    if all(isinstance(count, int | np.integer) for count in groups):
        if min(groups) < 0:
            raise ValueError(f"RoutedExchange: experts_per_rank is {groups}, expected counts >= 0")
        ends = np.cumsum(groups).tolist()
        groups = [range(end - count, end) for count, end in zip(groups, ends, strict=True)]
    return [[int(expert) for expert in group] for group in groups]


def tokens_text(x: Array) -> str:
    """What must be the same on every rank that dispatches or combines x."""
    return f"{dtype_name(x)} rows of shape {tuple(x.shape[1:])}"


def _plan_text(arguments: tuple[Array, Plan]) -> str:
    """What must be the same on every rank that combines: two ranks may have several plans, and mix them up."""
    rows, plan = arguments
    return plan.path.text(rows)
