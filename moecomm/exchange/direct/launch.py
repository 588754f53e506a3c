"""The launches of DirectExchange: which buffer a call uses, the tensors that its kernel fills, and its arguments.

Nothing here checks the caller's tensors or knows of gradients.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

from moecomm.comm import Comm
from moecomm.errors import CommError
from moecomm.exchange.direct.kernels import KernelShape
from moecomm.exchange.direct.memory import Buffer, Buffers, PlanTable
from moecomm.exchange.direct.plan import DirectPlan
from moecomm.failures import collective, refused

if TYPE_CHECKING:
    from torch import Tensor

USED_UP = 7
PHASES = {
    1: "to have read the rows of an earlier call",
    2: "to say how many tokens it has",
    3: "to say where its tokens go",
    4: "to send its rows",
    5: "for its own blocks",
    6: "to send the gradients of weights",
    USED_UP: "",
}
"""enum Phase of direct.cuh: what a kernel waited for."""


class Launcher:
    """Launches the kernels of one exchange, and keeps count of its buffers."""

    def __init__(self, comm: Comm, shape: KernelShape, buffers: Buffers, max_rows: int) -> None:
        self.comm = comm
        self.shape = shape
        self.buffers = buffers
        self.max_rows = max_rows
        self.failure: str | None = None
        """Why no more kernels may be launched, or None."""
        # The plan.place of the plan whose compact rows lie in each buffer of dispatch. The tensor stands for the plan,
        # which may be replaced by one with another weight.
        self._rows_of: list[Tensor | None] = [None] * len(buffers.dispatch)
        self._num_dispatches = 0
        self._num_combines = 0

    # ---- failures --------------------------------------------------------------------------------------------------

    def fail(self, why: str) -> None:
        """Refuse every later call: this rank may have launched fewer kernels than the others. Not collective."""
        self.failure = self.failure or why

    def check_usable(self, call: str) -> None:
        """Raises CommError after a failure, also one that a kernel has reported since. Does not wait for the GPU."""
        # Pinned memory that a kernel writes when it gives up: reading it costs no synchronisation.
        report = int(self.buffers.report[0])
        if report and self.failure is None:
            use, peer, phase = report >> 32, report >> 8 & 0xFF, report & 0xFF
            seconds = self.buffers.peers.limit / 1e9
            self.failure = f"a kernel waited {seconds:g} s for rank {peer} {PHASES[phase]} (use {use} of the buffer)"
            if phase == USED_UP:
                self.failure = "a buffer was used 2**32 - 1 times: make another exchange"
        if self.failure is not None:
            raise CommError(f"{call}: this DirectExchange cannot be used: {self.failure}{self.comm.where()}")

    # ---- one kernel each -------------------------------------------------------------------------------------------

    def send(self, x: Tensor, expert: Tensor, weight: Tensor, compact: bool) -> tuple[Tensor, DirectPlan]:
        """The kernel of dispatch. expert [T, K] int32, weight [T, K] float32, contiguous."""
        # A failure in here, as for want of memory, leaves the buffers' turns different from those of the other ranks.
        with collective("dispatch", self):
            x = x.contiguous()
            index = self._take_dispatch_buffer()
            buffer = self.buffers.dispatch[index]
            # Rows with tags are spread over twice their bytes: the kernel must copy them out.
            in_place = compact and not self.shape.tagged
            rows, scales = self._new_rows(x, buffer, compact, in_place)
            plan = self._new_plan(expert, scales, index, compact)
            kind = "compact" if compact else "expanded"
            # Rows in place are whole pieces, whatever `hidden` is: only the caller's rows count.
            kernel = self.shape.dispatch(kind, _aligned(x) if in_place else _aligned(x, rows))
            answers = grad_weight = None  # of the backward pass of combine
            kernel(
                self.buffers.peers,
                buffer,
                self._table(plan, self.max_rows),
                x,
                expert,
                weight,
                len(x),
                answers,
                rows,
                scales,
                grad_weight,
                kernel.split.pushers,
            )
            self._rows_of[index] = plan.place if in_place else None
            return rows, plan

    def spread(self, grad_y: Tensor, answers: Tensor, plan: DirectPlan) -> tuple[Tensor, Tensor]:
        """The backward pass of combine, by the kernel of dispatch: the gradients of answers and of plan.weight."""
        import torch

        with collective("combine", self):
            buffer = self.buffers.dispatch[self._take_dispatch_buffer()]
            grad_answers = torch.empty_like(answers)
            grad_weight = torch.empty_like(plan.weight)
            kernel = self.shape.dispatch("spread", _aligned(grad_y, answers, grad_answers))
            weight = scales = None  # the table holds the weights; gradients are not quantised
            kernel(
                self.buffers.peers,
                buffer,
                self._table(plan, len(answers)),
                grad_y,
                plan.expert,
                weight,
                len(grad_y),
                answers,
                grad_answers,
                scales,
                grad_weight,
                kernel.split.pushers,
            )
            return grad_answers, grad_weight

    def give_back(
        self, rows: Tensor, plan: DirectPlan, weighted: bool, grad_weight: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """The kernel of combine, also for the backward pass of dispatch.

        weighted     whether rows are multiplied by plan.weight, or just added
        grad_weight  [slots, K] float32 of plan.weight: the ranks of the tokens get theirs as [T, K], the second result
        """
        import torch

        with collective("combine", self):
            shape = self.shape
            num_tokens = len(plan.expert)
            buffer = self._take_combine_buffer()
            y = rows.new_empty((num_tokens, shape.hidden))
            grad_routing = None
            if grad_weight is not None:
                grad_routing = rows.new_empty((num_tokens, shape.top_k), dtype=torch.float32)
            kernel = shape.combine(plan.compact, weighted, grad_weight is not None, _aligned(rows, y))
            # The kernel also gives credit for the buffer of dispatch if the plan's rows still lie there.
            frees = self._holds_rows(plan)
            source = self.buffers.dispatch[plan.buffer]
            kernel(
                self.buffers.peers,
                buffer,
                self._table(plan, len(rows)),
                rows,
                rows.stride(0),
                plan.expert,
                grad_weight,
                num_tokens,
                y,
                grad_routing,
                kernel.split.pushers,
                ctypes.c_void_p(source.counters) if frees else None,
                source.credit if frees else 0,
            )
            if frees:
                self._rows_of[plan.buffer] = None
            return y, grad_routing

    def free_rows(self, plan: DirectPlan) -> None:
        """Give credit for the rows of a compact plan without a combine. Does nothing where that has happened."""
        if not self._holds_rows(plan):
            return
        buffer = self.buffers.dispatch[plan.buffer]
        self.shape.free()(1, 32, (self.buffers.peers, ctypes.c_void_p(buffer.counters), buffer.credit))
        self._rows_of[plan.buffer] = None

    # ---- buffers ---------------------------------------------------------------------------------------------------

    def next_dispatch_buffer(self) -> Buffer:
        """The buffer that the next dispatch, or backward pass of combine, will use."""
        return self.buffers.dispatch[self._next_dispatch() % len(self._rows_of)]

    def _next_dispatch(self) -> int:
        """The number of the next dispatch. Buffers take turns, in the same order on all ranks, so the ranks agree
        without a message; a turn of a buffer that holds compact rows is skipped."""
        num_buffers = len(self._rows_of)
        for number in range(self._num_dispatches, self._num_dispatches + num_buffers):
            if self._rows_of[number % num_buffers] is None:
                return number
        raise refused(
            RuntimeError(
                f"dispatch: all {num_buffers} buffers hold compact rows of plans without a combine or free_rows: "
                f"give num_buffers={num_buffers + 1} or more{self.comm.where()}"
            )
        )

    def _take_dispatch_buffer(self) -> int:
        number = self._next_dispatch()
        self._num_dispatches = number + 1
        return number % len(self._rows_of)

    def _take_combine_buffer(self) -> Buffer:
        # Nothing stays in these: a kernel of combine has read all when it ends.
        number = self._num_combines
        self._num_combines += 1
        return self.buffers.combine[number % len(self.buffers.combine)]

    def _holds_rows(self, plan: DirectPlan) -> bool:
        """Whether the rows of this plan lie in their buffer."""
        return self._rows_of[plan.buffer] is plan.place

    # ---- tensors ---------------------------------------------------------------------------------------------------

    def _new_rows(self, x: Tensor, buffer: Buffer, compact: bool, in_place: bool) -> tuple[Tensor, Tensor | None]:
        """Rows and their scales: where they arrive, or memory to which the kernel copies them."""
        import torch

        shape, view = self.shape, self.buffers.view
        num_rows = shape.slots if compact else self.max_rows
        dtype = torch.float8_e4m3fn if shape.fp8 else x.dtype
        scales = None
        if in_place:
            # A row fills whole pieces of 16 bytes; the caller sees its first `hidden` values.
            width = shape.pieces(shape.fp8) * 16 // dtype.itemsize
            rows = view(buffer.rows, (num_rows, width), dtype)[:, : shape.hidden]
            if shape.fp8:
                scales = view(buffer.scales, (num_rows, shape.scales), torch.float32)
        else:
            rows = x.new_empty((num_rows, shape.hidden), dtype=dtype)
            if shape.fp8:
                scales = x.new_empty((num_rows, shape.scales), dtype=torch.float32)
        return rows, scales

    def _new_plan(self, expert: Tensor, scales: Tensor | None, buffer: int, compact: bool) -> DirectPlan:
        """Memory for what the kernel of dispatch finds out."""
        import torch

        shape = self.shape
        choices = (shape.slots, shape.top_k)
        # The small tensors are one allocation, which costs the host as much time as a large one.
        lengths = [shape.experts + 1, shape.experts, shape.ranks]
        offset, count, num_tokens = expert.new_empty(sum(lengths)).split(lengths)
        return DirectPlan(
            rows_per_expert=count,
            offset=offset,
            slot=expert.new_empty(self.max_rows),
            place=expert.new_empty(choices),
            weight=expert.new_empty(choices, dtype=torch.float32),
            num_tokens=num_tokens,
            scales=scales,
            expert=torch.empty_like(expert),
            launcher=self,
            buffer=buffer,
            compact=compact,
        )

    def _table(self, plan: DirectPlan, max_rows: int) -> PlanTable:
        """max_rows: rows for which there is memory, or that the caller has passed."""
        tensors = (
            plan.place,
            plan.weight,
            plan.slot,
            plan.offset,
            plan.rows_per_expert,
            plan.num_tokens,
            plan.expert,
            self.buffers.tiles[plan.buffer],
        )
        return PlanTable(*(tensor.data_ptr() for tensor in tensors), max_rows)


def _aligned(*tensors: Tensor) -> bool:
    """Whether every row of every tensor begins at a multiple of 16 bytes, and so does what follows its last row."""
    for tensor in tensors:
        # The stride of a single row is arbitrary and says nothing about its end.
        step = tensor.stride(0) if tensor.shape[0] > 1 else tensor.shape[1]
        if tensor.data_ptr() % 16 or step * tensor.element_size() % 16:
            return False
    return True
