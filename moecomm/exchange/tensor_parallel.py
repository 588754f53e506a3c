"""TensorParallelExchange: ranks that hold the same tokens share the work of sending them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from moecomm.arrays import Array, Counts, as_dtype, is_torch, num_axes, sum_dtype
from moecomm.comm import Comm, CommLike, rows_text
from moecomm.exchange.contract import Exchange
from moecomm.exchange.lanes import Share, replicated, share
from moecomm.exchange.plan import Plan
from moecomm.exchange.routed import RoutedExchange, expert_ids, on_host
from moecomm.exchange.table import Constant, arange, where
from moecomm.failures import Failing, collective, refused
from moecomm.gating import Routing
from moecomm.together import together
from moecomm.transports import as_comm

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class LanePlan:
    """Made by `TensorParallelExchange.dispatch`, taken by its `combine`.

    rows_per_expert  [local experts] int64: the rows that dispatch returned for each expert of this rank, in their order
    """

    rows_per_expert: Counts
    inner: Plan
    share: Share


class TensorParallelExchange(Exchange[LanePlan]):
    """Tensor-parallel ranks hold the same tokens, so each sends only what the experts of its own lane need.

    inner   among the ranks of this rank's expert group that are on its lane, groups("expert_lane"): p/L peers, not p
    tensor  the L ranks that hold the same tokens
    output  "replicated": every tensor rank gets all tokens back. "sequence": tensor rank i gets its part of them,
            np.array_split(tokens, L)[i]
    part    (i, n): this rank holds slice i of n of each of its experts, so (coords(rank)["expert_tensor"],
            expert_tensor); the tensor ranks together must hold all slices. (0, 1): experts are whole

    Each assignment is processed once in a tensor group (once for each slice of a sliced expert). Where R of its lanes
    reach an expert, assignment t * K + k goes through lane number (t * K + k) mod R of them. Afterwards the lanes share
    their answers: an all-gather of the answered rows or an all-reduce, whichever moves fewer bytes. If every token is
    answered by one lane alone, as for K = 1, the bits are those of the exchange without lanes; else float32 sums are
    added, lane by lane after the all-gather, in the library's order by the all-reduce. On a GPU the host does not know
    which tokens a lane answers: all T rows are summed, by the all-reduce, or part by part where output is "sequence".

    x and the routing must be the same on all tensor ranks: give a `Checked` tensor Comm to have the routing and the
    shape of x compared.
    The gradients of x and of the weights come out summed over the lanes, the same on all of them.

    Making one is collective over tensor. Raises ValueError, on all of them, if an argument is wrong or output or n
    differ, or no lane reaches some slice of an expert.
    Source: DeepSpeed-MoE (arXiv 2201.05596), section 5.3: O(p) becomes O(p/L) + O(L).
    """

    on_lanes = True

    def __init__(
        self,
        inner: RoutedExchange,
        tensor: CommLike,
        *,
        output: Literal["replicated", "sequence"] = "replicated",
        part: tuple[int, int] = (0, 1),
    ) -> None:

        def checked() -> None:
            if output not in ("replicated", "sequence"):
                raise ValueError(f"output is {output!r}, expected 'replicated' or 'sequence'")
            if not (isinstance(part, tuple) and len(part) == 2 and 0 <= part[0] < part[1]):
                raise ValueError(f"part is {part!r}, expected (i, n), slice i of n")

        tensor = as_comm(tensor)
        self.inner = inner
        self.tensor: Comm = tensor
        self.output = output
        self.experts, self.local_experts = inner.experts, inner.local_experts
        self.num_local_experts = inner.num_local_experts
        """Experts of this rank."""
        self.tells_unusable = inner.tells_unusable
        self.fp8 = inner.fp8
        with collective("TensorParallelExchange", tensor):
            together(tensor, "TensorParallelExchange", checked)
            tensor.agree("TensorParallelExchange: output and the number of slices", f"{output}, {part[1]}")
            slices, reach = _gather_reach(inner, tensor, part)
        self.num_experts = reach.shape[1]
        """E, one more than the highest id that some lane reaches."""
        turn, num_replicas = _turns(slices, reach)
        self._turn, self._num_replicas = Constant(turn), Constant(num_replicas)

    @property
    def comms(self) -> tuple[Failing, ...]:
        """That of the tensor ranks and those of inner."""
        return (self.tensor, *self.inner.comms)

    def rows_sent(self, plan: LanePlan) -> int:
        """Rows that this rank sends along its lane in dispatch and combine. Not collective."""
        return self.inner.rows_sent(plan.inner)

    def dispatch(self, x: Array, routing: Routing) -> tuple[Array, LanePlan]:
        """Send every token to its experts. Collective over tensor and over inner's ranks.

        x        [T, H]  the same on all tensor ranks, as is the routing
        returns  ([N, H], plan)  the rows for this rank's experts, grouped by expert, then source rank, then token

        Differentiable in x. Raises like RoutedExchange.dispatch.
        """
        with collective("dispatch", self.tensor, self.inner.comm):
            expert = self._opened(
                "dispatch",
                self._dispatch_arguments,
                x,
                routing,
                compared_text=lambda expert: _same_text(x, routing, expert),
            )
            # From the routing alone, which all tensor ranks have, each knows what the others will answer.
            tokens = None
            if not is_torch(expert):
                tokens = [np.flatnonzero(self._goes_by(lane, expert).any(axis=1)) for lane in range(self.tensor.size)]
            # Each lane gives the gradient of its own assignments; the tokens need the sum.
            x, weight = replicated(x, self.tensor), replicated(routing.weight, self.tensor)
            on_lane = where(self._goes_by(self.tensor.rank, expert), expert, -1)
            rows, plan = self.inner.dispatch(x, replace(routing, expert=on_lane, weight=weight))
            return rows, LanePlan(plan.rows_per_expert, plan, Share(tokens, expert.shape, self.output))

    def combine(self, rows: Array, plan: LanePlan, dtype: Any = None) -> Array:
        """Bring the experts' answers home: for each token, their weighted sum. Collective as dispatch is.

        rows     [N, ...]  answers, in the order of what dispatch returned
        dtype    of the result; None: that of rows
        returns  [T, ...] the same on all tensor ranks, or this rank's part of it where output is "sequence"

        Differentiable in rows and in the weights given to dispatch.
        """
        with collective("combine", self.tensor, self.inner.comm):
            self._opened(
                "combine", _checked_plan, rows, plan, compared_text=lambda _: rows_text(rows, in_equal_parts=False)
            )
            dtype = rows.dtype if dtype is None else dtype
            # What is still to be added must not be rounded before.
            partial = self.inner.combine(rows, plan.inner, dtype if plan.share.one_lane_each() else sum_dtype(rows))
            return as_dtype(share(partial, plan.share, self.tensor), dtype)

    def _goes_by(self, lane: int, expert: Array) -> Array:
        """[T, K] whether an assignment goes by the lane. So does an id of no expert, which inner then refuses."""
        turn, num_replicas = self._turn.at(expert), self._num_replicas.at(expert)
        # Ids on a device are not checked before they get here; as an index such an id would stop the kernel.
        is_known = (expert >= -1) & (expert < self.num_experts)
        ids = where(is_known, expert, -1)
        number = arange(ids.shape[0] * ids.shape[1], ids).reshape(ids.shape)
        # Lanes that reach the same expert take its assignments in turn.
        return (turn[lane][ids] == number % num_replicas[lane][ids]) | ~is_known

    def _opened(self, call: str, check: Callable[..., T], *arguments: Any, compared_text: Callable[[T], str]) -> T:
        """What `check` returns. What the tensor ranks refuse, the lanes of all of them are told."""
        try:
            return self.tensor.checked(f"{type(self).__name__}.{call}", check, *arguments, compared_text=compared_text)
        except (TypeError, ValueError) as error:
            # Lanes have their own Comm: its ranks would wait for this one in the dispatch that it does not come to.
            self.inner.comm.tell_refusal(error)
            raise

    def _dispatch_arguments(self, x: Array, routing: Routing) -> Array:
        num_axes(x, "x")
        expert = expert_ids(routing.expert, x)
        if expert.ndim != 2:
            raise ValueError(f"routing.expert has shape {tuple(expert.shape)}, expected (T, K)")
        if not is_torch(expert) and expert.size and not -1 <= expert.min() <= expert.max() < self.num_experts:
            raise ValueError(f"routing.expert has {expert.min()}..{expert.max()}, expected -1..{self.num_experts - 1}")
        return expert


def _checked_plan(rows: Array, plan: LanePlan) -> LanePlan:
    num_axes(rows, "rows")
    if not isinstance(plan, LanePlan):
        raise TypeError(f"plan is a {type(plan).__name__}, expected the LanePlan that dispatch returned")
    return plan


def _same_text(x: Array, routing: Routing, expert: Array) -> str:
    """Of what all tensor ranks have."""
    digest = hashlib.blake2b(on_host(expert).tobytes() + on_host(routing.weight).tobytes(), digest_size=6).hexdigest()
    return f"{rows_text(x, in_equal_parts=True)}, routing {digest}"


def _gather_reach(inner: RoutedExchange, tensor: Comm, piece: tuple[int, int]) -> tuple[Counts, NDArray[np.bool_]]:
    """[L] the slice of each lane, and [L, E] which experts it reaches. piece: this rank's slice, and of how many.

    Collective.
    """
    told = tensor.all_gather(np.array([[*piece, inner.num_experts]], np.int64))
    slices, num_slices, num_experts = told[:, 0], int(told[:, 1].max()), int(told[:, 2].max())
    is_held = np.zeros((1, num_experts), np.int64)
    is_held[0, : inner.num_experts] = inner.holds()
    reach: NDArray[np.bool_] = tensor.all_gather(is_held).astype(np.bool_)
    for number in range(num_slices):
        lost = np.flatnonzero(~reach[slices == number].any(axis=0))
        if lost.size:
            raise refused(
                ValueError(
                    f"TensorParallelExchange: no tensor rank reaches part {number} of expert {lost[0]}{tensor.where()}"
                )
            )
    return slices, reach


def _turns(slices: Counts, reach: NDArray[np.bool_]) -> tuple[Counts, Counts]:
    """For each lane and expert, [L, E + 1]: which of the lanes that reach the same slice it is, and how many they are.

    -1: it does not reach it. The last column is for the assignments that were dropped.
    """
    num_lanes, num_experts = reach.shape
    turn = np.full((num_lanes, num_experts + 1), -1)
    num_replicas = np.ones((num_lanes, num_experts + 1), np.int64)
    for lane in range(num_lanes):
        replicas = reach & (slices == slices[lane])[:, None]
        turn[lane, :num_experts] = np.where(reach[lane], replicas[:lane].sum(axis=0), -1)
        num_replicas[lane, :num_experts] = replicas.sum(axis=0)
    return turn, num_replicas
