"""DirectExchange: tokens to their experts' GPUs and back over NVLink, one kernel each way."""

from __future__ import annotations

import ctypes
import operator
from collections.abc import Callable
from dataclasses import replace
from math import inf
from typing import Any

from moecomm.arrays import is_torch
from moecomm.errors import CommError
from moecomm.exchange.contract import Exchange
from moecomm.exchange.direct_kernels import Buffers, Shape, Table
from moecomm.exchange.direct_plan import DirectPlan, Started, tensors_in
from moecomm.exchange.symmetric import SymmetricMemory, ipc_memory
from moecomm.failures import Failing, collective, refused
from moecomm.gating import Routing
from moecomm.identity import Identity
from moecomm.together import gather, together
from moecomm.transports import as_comm

DTYPES = ("float32", "bfloat16", "float16")
RANKS = (1, 2, 4, 8)
NCCL_SMS = 32
"""Multiprocessors that a collective of NCCL takes at most."""
USED_UP = 7
PHASES = {
    1: "to have read the rows of an earlier call", 2: "to say how many tokens it has", 3: "to say where its tokens go",
    4: "to send its rows", 5: "for its own blocks", 6: "to send the gradients of weights", USED_UP: "",
}  # fmt: skip


class DirectExchange(Exchange[DirectPlan], Identity):
    """Dispatch and combine by kernels that write into each other's memory, for CUDA ranks of one node.

    comm         1, 2, 4 or 8 ranks that share the experts: rank r holds experts r * E / p and up. Each rank's current
                 device is its GPU, which no other rank has
    max_tokens   the most tokens that a rank may bring to a call
    hidden       H
    num_experts  E, a multiple of the number of ranks
    top_k        K, 1 .. 32
    dtype        of the rows: torch.float32, bfloat16 or float16
    fp8          what dispatch's rows travel and arrive as: None: dtype; torch.float8_e4m3fn: with a scale for each 128
                 values, quantised on the way. combine stays dtype
    max_rows     room for rows ordered by expert; None: for all that can come, p * max_tokens * min(K, E / p). A row
                 that finds no room is lost, and its answer counts as zeros: `check` raises
    num_buffers  plans of `dispatch_compact` that may wait for their combine at a time, at least
    num_sms      blocks of a kernel, one to a multiprocessor, which wait for those of other ranks. None: all but 32, so
                 that NCCL's kernels, which also wait for each other, find room beside them. All of them are faster
                 for many tokens, where nothing else runs
    limit        seconds that a kernel waits for another rank
    memory       ipc_memory, or torch_memory for a torch process group

    Rows are moved once to each rank that needs them, however many experts it has for them. Nothing waits for the host
    or asks it: calls can be captured in a CUDA graph, after one call of the same kind. All calls of an exchange, of a
    rank, are to be in the order of one stream. Ranks make the same calls in the same order.

    Making one is collective. Equal on all ranks: all arguments. Raises ValueError, on all ranks, for bad arguments;
    RuntimeError where a GPU cannot reach another. A rank that does not come within the limit, or has died, makes the
    kernels of the others give up: `check` and every later call raise CommError, and what the calls in between returned
    means nothing.
    Source: DeepSpeed-MoE (arXiv 2201.05596), section 5, for one node.
    """

    def __init__(
        self,
        comm: Any,
        max_tokens: int,
        hidden: int,
        num_experts: int,
        top_k: int,
        dtype: Any,
        *,
        fp8: Any = None,
        max_rows: int | None = None,
        num_buffers: int = 2,
        num_sms: int | None = None,
        limit: float = 60.0,
        memory: Callable[[Any, int], SymmetricMemory] = ipc_memory,
    ) -> None:
        import torch

        self.comm = as_comm(comm)
        p = self.comm.size

        def checked() -> tuple[list[int], int, str]:
            """The sizes, this rank's GPU, and its name everywhere."""
            properties = torch.cuda.get_device_properties("cuda")
            available = properties.multi_processor_count
            T, H, E, K, buffers, sms = sizes = [  # noqa: N806
                _integer("max_tokens", max_tokens), _integer("hidden", hidden), _integer("num_experts", num_experts),
                _integer("top_k", top_k), _integer("num_buffers", num_buffers),
                max(2, available - NCCL_SMS) if num_sms is None else _integer("num_sms", num_sms),
            ]  # fmt: skip
            rows = p * T * min(K, E // p) if max_rows is None else _integer("max_rows", max_rows)
            name = str(dtype).removeprefix("torch.")
            for problem, message in (
                (p not in RANKS, f"comm has {p} ranks, expected one of {RANKS}"),
                (name not in DTYPES, f"dtype is {dtype}, expected one of {', '.join(DTYPES)}"),
                (fp8 not in (None, torch.float8_e4m3fn), f"fp8 is {fp8}, expected None or torch.float8_e4m3fn"),
                (T < 1, f"max_tokens is {T}, expected >= 1"),
                (H < 1, f"hidden is {H}, expected >= 1"),
                (not 1 <= K <= 32, f"top_k is {K}, expected 1 .. 32"),
                (E % p or p > E, f"num_experts is {E}, expected a multiple of {p}"),
                (1024 * p < E, f"num_experts is {E}, expected at most {1024 * p}"),
                (buffers < 1, f"num_buffers is {buffers}, expected >= 1"),
                (not 2 <= sms <= available, f"num_sms is {sms}, expected 2 .. {available}"),
                (rows < 1, f"max_rows is {rows}, expected >= 1"),
                (not 0 < limit < inf, f"limit is {limit}, expected seconds > 0"),
                (T * p * K >= 2**31, f"max_tokens is {T}, expected p * K * it < 2**31"),
            ):
                if problem:
                    raise ValueError(message)
            return [*sizes, rows], torch.cuda.current_device(), str(properties.uuid)

        sizes, device, name = together(self.comm, "DirectExchange", checked)
        names = gather(self.comm, name)
        if len(set(names)) < p:
            first = next(rank for rank in range(p) if names[rank] in names[:rank])
            raise ValueError(
                f"DirectExchange: ranks {names.index(names[first])} and {first} have the same GPU, expected one each: "
                f"a kernel waits for those of all ranks, which a GPU need not run at the same time{self.comm.where()}"
            )
        text = f"{sizes} {dtype} {fp8} {limit} {getattr(memory, '__name__', '')}"
        self.comm.agree("DirectExchange: the arguments", text)
        max_tokens, hidden, num_experts, top_k, num_buffers, num_sms, self.max_rows = sizes
        self.dtype = dtype
        self.fp8 = fp8
        self.device = device
        experts = num_experts // p
        self.shape = Shape(
            str(dtype).removeprefix("torch."), fp8 is not None, hidden, top_k, max_tokens, p, experts, num_sms
        )
        self.experts = [list(range(rank * experts, (rank + 1) * experts)) for rank in range(p)]
        self.local_experts = self.experts[self.comm.rank]
        self.num_local_experts = experts
        """Experts of this rank."""
        self.num_experts = num_experts
        self._buffers = Buffers(self.comm, self.shape, num_buffers, limit, memory)
        self._held: list[Any] = [None] * num_buffers  # plan.place of whose rows lie there
        self._calls = [0, 0]
        self._stream: Any = None
        self.failure: str | None = None
        """Why this exchange cannot be used any more, or None."""
        self.comm.barrier()

    @property
    def comms(self) -> tuple[Failing, ...]:
        """This exchange itself, which talks without a Comm."""
        return (self,)

    # ---- the calls -------------------------------------------------------------------------------------------------

    def dispatch(self, x: Any, routing: Routing) -> tuple[Any, DirectPlan]:
        """Send every token to its experts.

        x        [T, H]  CUDA; T may be 0 and differ between ranks, up to max_tokens
        routing  expert [T, K] and weight [T, K] on the same device; an id outside 0 .. E - 1 counts as dropped, and
                 one that is not -1 makes `check` raise
        returns  ([max_rows, H], plan)  the rows for this rank's experts in the order of RoutedExchange: by expert,
                 source rank, token; the first plan.offset[-1] of them, the rest is not written

        Collective, and so is its backward pass. Differentiable in x and in routing.weight, unless fp8.
        """
        return self._dispatch("dispatch", x, routing, False)

    def dispatch_compact(self, x: Any, routing: Routing) -> tuple[Any, DirectPlan]:
        """Send every token to its experts' ranks, where it stays as one row: as `dispatch`, with less to copy.

        returns  ([p * max_tokens, H], plan)  the row of each slot; only slots that some plan.place names are written.
                 They may lie where they came: they are to be read, by work queued in order, before `combine` of this
                 plan, or before `free_rows` if it has none

        Not differentiable. Raises RuntimeError if num_buffers plans hold their rows already.
        """
        return self._dispatch("dispatch_compact", x, routing, True)

    def tokens(self) -> Any:
        """[max_tokens, H] where this rank's tokens are to lie for `dispatch_compact`, if that is the next dispatch or
        backward pass of all: write x there, pass its first T rows, and they are not copied. None for rows that travel
        with tags or as float8, or are no multiple of 16 bytes. Not collective. Raises RuntimeError as
        `dispatch_compact` does."""
        shape, calls = self.shape, list(self._calls)
        buffer = self._buffers.to[self._next_buffer(0)]
        self._calls = calls
        if shape.tagged or shape.fp8 or shape.hidden * self.dtype.itemsize % 16:
            return None
        size = shape.max_tokens * shape.hidden * self.dtype.itemsize
        return self._buffers.part(buffer.rows + self.comm.rank * size, (shape.max_tokens, shape.hidden), self.dtype)

    def combine(self, rows: Any, plan: DirectPlan) -> Any:
        """Bring the experts' answers home: for each token, their weighted sum.

        rows     after `dispatch`: [at least plan.offset[-1], H] answers, in the order of its rows; one that is missing
                 counts as zeros, and `check` raises.
                 after `dispatch_compact`: [p * max_tokens, H] one answer for each slot, which the caller has weighted
                 and summed (`moecomm.unpermute` with plan.place and plan.weight does)
        returns  [T, H]  a token without experts gets zeros

        Sums are float32, in order of choice inside a rank and then of rank, always the same bits; the sum of another
        rank comes rounded to dtype. Collective, and so is its backward pass. Differentiable in rows and plan.weight
        after `dispatch` without fp8; the gradient of rows beyond plan.offset[-1] is not written. Raises RuntimeError if
        another wants a gradient.
        """
        self._usable("combine")
        self._check_rows(rows, plan)
        if plan.compact or not _wants_gradients(rows, plan.weight):
            return self.give_back(rows, plan, None if plan.compact else plan.weight)[0]
        from moecomm.exchange.direct_autograd import Combine

        return Combine.apply(rows, plan.weight, self, plan)

    def start(self, call: Callable[..., Any], *arguments: Any) -> Started:
        """Begin `call(*arguments)`, dispatch or combine of this exchange, on a stream of its own; returns a handle.

        It runs after the work queued so far on the current stream, and beside what comes then: give the exchange fewer
        num_sms than the GPU has. Wait for one handle before the next call of this exchange.

        Raises RuntimeError while torch records gradients: the backward passes of calls on two streams could meet.
        """
        import torch

        if torch.is_grad_enabled():
            raise RuntimeError(f"start: torch records gradients, expected torch.no_grad(){self.comm.where()}")
        if self._stream is None:
            self._stream = torch.cuda.Stream()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            result = call(*arguments)
        for tensor in tensors_in(arguments):
            tensor.record_stream(self._stream)
        return Started(result, self._stream.record_event())

    def free_rows(self, plan: DirectPlan) -> None:
        """Say that the rows of a plan of `dispatch_compact` have been read, instead of `combine`. Collective."""
        self._usable("free_rows")
        self._check_plan("free_rows", plan)
        if self._holds(plan):
            part = self._buffers.to[plan.buffer]
            self.shape.free()(1, 32, (self._buffers.memory, ctypes.c_void_p(part.counters), part.credit))
            self._held[plan.buffer] = None

    def load(self) -> None:
        """Compile and load all kernels, for tensors whose rows lie side by side; about 2 s each the first time. A CUDA
        graph can capture loaded kernels only. Not collective."""
        for kernel in self.shape.kernels():
            kernel.load()

    def check(self) -> None:
        """Wait for the calls so far. Raises CommError if a rank did not come, ValueError if a routing named experts
        that do not exist, OverflowError if rows found no room, since the last check."""
        import torch

        for stream in (torch.cuda.current_stream(), self._stream):
            if stream is not None:
                stream.synchronize()
        self._usable("check")
        _, lost, unknown = self._buffers.report.tolist()
        if unknown:
            self._buffers.report[2] = 0  # what else there is comes with the next check
            raise ValueError(
                f"dispatch: routing.expert has {unknown} ids outside -1 .. {self.num_experts - 1}{self.comm.where()}"
            )
        if lost:
            self._buffers.report[1] = 0
            raise OverflowError(
                f"dispatch, combine: {lost} rows were lost, beyond max_rows = {self.max_rows} or beyond the rows that "
                f"combine was given{self.comm.where()}"
            )

    def free(self) -> None:
        """Give the memory back. Collective, after the last call. After a failure it stays until the process ends,
        because a rank that has not noticed may still write there."""
        self._usable("free")
        self.failure = "it was freed"
        self._buffers.symmetric.free()

    def fail(self, why: str) -> None:
        """Refuse every later call: this rank may have launched fewer kernels than the others. Not collective."""
        self.failure = self.failure or why

    # ---- the kernels: direct_autograd.py calls these too -----------------------------------------------------------

    def send(self, x: Any, expert: Any, weight: Any, compact: bool) -> tuple[Any, DirectPlan]:
        """One launch of dispatch. expert [T, K] int32, weight [T, K] float32, contiguous."""
        import torch

        with collective("dispatch", self):
            x, shape, index = x.contiguous(), self.shape, self._next_buffer(0)
            buffer, slots = self._buffers.to[index], shape.ranks * shape.max_tokens
            new = x.new_empty
            place = new((slots, shape.top_k), dtype=torch.int32)
            numbers = new(2 * shape.experts + 1 + shape.ranks, dtype=torch.int32)
            offset, count, num_tokens = numbers.split([shape.experts + 1, shape.experts, shape.ranks])
            plan = DirectPlan(
                count, offset, new(self.max_rows, dtype=torch.int32), place,
                new((slots, shape.top_k), dtype=torch.float32), num_tokens, None, torch.empty_like(expert), self, index,
                compact,
            )  # fmt: skip
            wire = x.dtype if self.fp8 is None else self.fp8
            in_place = compact and not shape.tagged
            if in_place:
                width = shape.pieces(shape.fp8) * 16 // wire.itemsize
                rows = self._buffers.part(buffer.rows, (slots, width), wire)[:, : shape.hidden]
            else:
                rows = new((slots if compact else self.max_rows, shape.hidden), dtype=wire)
            scales = None
            if shape.fp8:
                size = (rows.shape[0], shape.scales)
                kind = torch.float32
                scales = self._buffers.part(buffer.scales, size, kind) if in_place else new(size, dtype=kind)
            output = "compact" if compact else "expanded"
            kernel, cut, shared = shape.dispatch(output, _aligned(x, None if in_place else rows))
            kernel(
                shape.num_sms, cut.threads,
                (self._buffers.memory, buffer, self._table(plan, self.max_rows), x, expert, weight, x.shape[0], None,
                 rows, scales, None, cut.pushers),
                shared,
            )  # fmt: skip
            self._held[index] = place if in_place else None
            return rows, replace(plan, scales=scales)

    def give_back(self, rows: Any, plan: DirectPlan, weight: Any, numbers: Any = None) -> tuple[Any, Any]:
        """One launch of combine. weight None: a plain sum. numbers [slots, K] float32: come back as [T, K] too."""
        import torch

        with collective("combine", self):
            shape, tokens = self.shape, plan.expert.shape[0]
            buffer = self._buffers.back[self._next_buffer(1)]
            y = rows.new_empty((tokens, shape.hidden))
            returned = None if numbers is None else rows.new_empty((tokens, shape.top_k), dtype=torch.float32)
            kernel, cut = shape.combine(plan.compact, weight is not None, numbers is not None, _aligned(rows, y))
            done = self._buffers.to[plan.buffer] if self._holds(plan) else None
            credit = (None, 0) if done is None else (ctypes.c_void_p(done.counters), done.credit)
            kernel(
                shape.num_sms, cut.threads,
                (self._buffers.memory, buffer, self._table(plan, len(rows)), rows, rows.stride(0), plan.expert, numbers,
                 tokens, y, returned, cut.pushers, *credit),
            )  # fmt: skip
            if done is not None:
                self._held[plan.buffer] = None
            return y, returned

    def spread(self, grad_y: Any, rows: Any, plan: DirectPlan) -> tuple[Any, Any]:
        """The backward pass of combine, one launch: the gradients of rows, and of plan.weight."""
        import torch

        with collective("combine", self):
            shape = self.shape
            buffer = self._buffers.to[self._next_buffer(0)]
            grad_rows = torch.empty_like(rows)
            grad_weight = torch.empty_like(plan.weight)
            kernel, cut, shared = shape.dispatch("spread", _aligned(grad_y, rows, grad_rows))
            kernel(
                shape.num_sms, cut.threads,
                (self._buffers.memory, buffer, self._table(plan, len(rows)), grad_y, plan.expert, None, grad_y.shape[0],
                 rows, grad_rows, None, grad_weight, cut.pushers),
                shared,
            )  # fmt: skip
            return grad_rows, grad_weight

    def _dispatch(self, call: str, x: Any, routing: Routing, compact: bool) -> tuple[Any, DirectPlan]:
        import torch

        self._usable(call)
        expert, weight = self._check_dispatch(call, x, routing, compact)
        if compact or not torch.is_grad_enabled() or self.fp8 is not None:
            return self.send(x.detach(), expert, weight.detach(), compact)
        from moecomm.exchange.autograd import new_thread
        from moecomm.exchange.direct_autograd import Dispatch

        plans: list[DirectPlan] = []
        rows, weight = Dispatch.apply(x, weight, new_thread(x), self, expert, plans)
        return rows, replace(plans[0], weight=weight)

    def _table(self, plan: DirectPlan, num_rows: int) -> Table:
        tensors = plan.place, plan.weight, plan.slot, plan.offset, plan.rows_per_expert, plan.num_tokens, plan.expert
        tiles = self._buffers.tiles[plan.buffer]
        return Table(*(tensor.data_ptr() for tensor in tensors), tiles.data_ptr(), num_rows)

    def _next_buffer(self, kind: int) -> int:
        """Of dispatch (0) or combine (1): in turn, the same on all ranks."""
        for _ in self._held:
            index = self._calls[kind] % len(self._held)
            self._calls[kind] += 1
            if kind == 1 or self._held[index] is None:
                return index
        raise refused(
            RuntimeError(
                f"dispatch: all {len(self._held)} buffers hold compact rows of plans without a combine or free_rows: "
                f"give num_buffers={len(self._held) + 1} or more{self.comm.where()}"
            )
        )

    def _holds(self, plan: DirectPlan) -> bool:
        """Whether the rows of this plan lie in their buffer."""
        return self._held[plan.buffer] is plan.place

    # ---- checks ----------------------------------------------------------------------------------------------------

    def _usable(self, call: str) -> None:
        report = int(self._buffers.report[0])
        if report and self.failure is None:
            peer, phase = report >> 8 & 0xFF, report & 0xFF
            self.failure = (
                f"a kernel waited {self._buffers.memory.limit / 1e9:g} s for rank {peer} {PHASES[phase]} "
                f"(use {report >> 32} of the buffer)"
            )
            if phase == USED_UP:
                self.failure = "a buffer was used 2**32 - 1 times: make another exchange"
        if self.failure is not None:
            raise CommError(f"{call}: this DirectExchange cannot be used: {self.failure}{self.comm.where()}")

    def _check_dispatch(self, call: str, x: Any, routing: Routing, compact: bool) -> tuple[Any, Any]:
        import torch

        shape, expert, weight = self.shape, routing.expert, routing.weight
        where = self.comm.where()
        for name, tensor in (("x", x), ("routing.expert", expert), ("routing.weight", weight)):
            if not is_torch(tensor) or not tensor.is_cuda:
                raise TypeError(f"{call}: {name} is a {type(tensor).__name__}, expected a CUDA tensor{where}")
            self._check_device(call, name, tensor)
        if x.ndim != 2 or x.shape[1] != shape.hidden or x.dtype != self.dtype:
            raise ValueError(
                f"{call}: x is {x.dtype} {list(x.shape)}, expected {self.dtype} [T, {shape.hidden}]{where}"
            )
        if x.shape[0] > shape.max_tokens:
            raise ValueError(f"{call}: x has {x.shape[0]} tokens, expected at most {shape.max_tokens}{where}")
        wanted = (x.shape[0], shape.top_k)
        for name, tensor in (("expert", expert), ("weight", weight)):
            if tuple(tensor.shape) != wanted:
                raise ValueError(
                    f"{call}: routing.{name} has shape {list(tensor.shape)}, expected {list(wanted)}{where}"
                )
        if expert.dtype.is_floating_point or expert.dtype == torch.bool:
            raise TypeError(f"{call}: routing.expert has dtype {expert.dtype}, expected integers{where}")
        self._check_gradients(call, compact, {"x": x, "routing.weight": weight})
        if expert.dtype == torch.int64:
            expert = expert.clamp(-2, self.num_experts)  # what int32 cannot hold is no expert either
        return expert.to(torch.int32).contiguous(), weight.to(torch.float32).contiguous()

    def _check_device(self, call: str, name: str, tensor: Any) -> None:
        import torch

        current = torch.cuda.current_device()
        if not self.device == tensor.device.index == current:
            raise ValueError(
                f"{call}: {name} is on {tensor.device} and the current device is {current}, expected {self.device} for "
                f"both, as when this DirectExchange was made{self.comm.where()}"
            )

    def _check_rows(self, rows: Any, plan: DirectPlan) -> None:
        where = self.comm.where()
        self._check_plan("combine", plan)
        self._check_gradients("combine", plan.compact, {"rows": rows, "plan.weight": plan.weight})
        if not is_torch(rows) or not rows.is_cuda or rows.dtype != self.dtype or rows.ndim != 2:
            got = f"{rows.dtype} {list(rows.shape)} on {rows.device}" if is_torch(rows) else type(rows).__name__
            raise TypeError(f"combine: rows is {got}, expected a CUDA tensor of {self.dtype} with two axes{where}")
        self._check_device("combine", "rows", rows)
        slots = self.shape.ranks * self.shape.max_tokens
        fits = rows.shape[0] == slots if plan.compact else rows.shape[0] <= self.max_rows
        if rows.shape[1] != self.shape.hidden or not fits:
            size = slots if plan.compact else f"up to {self.max_rows}"
            raise ValueError(f"combine: rows is {list(rows.shape)}, expected [{size}, {self.shape.hidden}]{where}")
        if rows.numel() and rows.stride(1) != 1:
            raise ValueError(f"combine: rows has strides {rows.stride()}, expected values of a row side by side{where}")

    def _check_gradients(self, call: str, compact: bool, tensors: dict[str, Any]) -> None:
        if (compact or self.fp8 is not None) and _wants_gradients(*tensors.values()):
            raise RuntimeError(
                f"{call}: {' or '.join(tensors)} asks for a gradient, which compact and fp8 rows do not have"
                f"{self.comm.where()}"
            )

    def _check_plan(self, call: str, plan: DirectPlan) -> None:
        if not isinstance(plan, DirectPlan):
            raise TypeError(
                f"{call}: plan is a {type(plan).__name__}, expected one that dispatch returned{self.comm.where()}"
            )
        if plan.exchange is not self:
            raise ValueError(f"{call}: plan is of another DirectExchange, expected one of this{self.comm.where()}")


def _integer(name: str, value: Any) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise ValueError(f"{name} is {value!r}, expected an integer") from None


def _wants_gradients(*tensors: Any) -> bool:
    import torch

    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _aligned(*tensors: Any) -> bool:
    """Whether 16 bytes at a time begin and end with every row of every tensor, or with what lies between rows."""
    return all(
        tensor.data_ptr() % 16 == 0
        and (tensor.stride(0) if tensor.shape[0] > 1 else tensor.shape[1]) * tensor.element_size() % 16 == 0
        for tensor in tensors
        if tensor is not None
    )
