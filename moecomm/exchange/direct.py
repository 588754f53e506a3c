"""DirectExchange: tokens to their experts' GPUs and back over NVLink, one kernel each way."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from moecomm.arrays import is_torch
from moecomm.errors import CommError
from moecomm.exchange.direct_kernels import Buffers, Shape, Table
from moecomm.exchange.symmetric import SymmetricMemory, ipc_memory
from moecomm.gating import Routing
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


@dataclass(frozen=True, eq=False)
class DirectPlan:
    """Made by `dispatch`, taken by `combine`. Everything is on the device; a slot is source rank * max_tokens + token.

    rows_per_expert  [local experts] int32: rows of each expert of this rank
    offset           [local experts + 1] int32: where each expert's rows begin among the rows ordered by expert; the
                     last one is how many there are
    slot             [max_rows] int32: the slot of each of those rows: what a grouped GEMM gathers compact rows by
    place            [slots, K] int32: the other way, where the row of each choice is; -1: not of this rank, -2: no
                     room. With weight it is what `moecomm.unpermute` takes to sum the answers of compact rows
    weight           [slots, K] float32: of the choices; differentiable, as routing.weight is
    num_tokens       [ranks] int32: tokens of each rank
    scales           [rows, ceil(H / 128)] float32, if the rows are float8
    """

    rows_per_expert: Any
    offset: Any
    slot: Any
    place: Any
    weight: Any
    num_tokens: Any
    scales: Any
    expert: Any
    """[T, K] int32: this rank's own choices."""
    exchange: Any
    """The one that made it."""
    buffer: int
    """Which one dispatch used."""
    compact: bool


class Started:
    """A dispatch or combine on a stream of its own; work queued after `start` on other streams runs meanwhile."""

    def __init__(self, result: Any, done: Any) -> None:
        self._result, self._done = result, done

    def wait(self) -> Any:
        """What the call returned, for work queued on the current stream from now on. The host does not wait."""
        import torch

        stream = torch.cuda.current_stream()
        stream.wait_event(self._done)
        for tensor in _tensors(self._result):
            tensor.record_stream(stream)
        return self._result


class DirectExchange:
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
                 that NCCL's kernels, which also wait for each other, find room beside them; all where nothing else runs
    limit        seconds that a kernel waits for another rank
    memory       ipc_memory, or torch_memory for a torch process group

    Rows are moved once to each rank that needs them, however many experts it has for them. Nothing waits for the host
    or asks it: calls can be captured in a CUDA graph, after one call of the same kind. All calls of an exchange, of a
    rank, are to be in the order of one stream. Ranks make the same calls in the same order.

    Making one is collective. Equal on all ranks: all arguments. Raises ValueError or TypeError, on all ranks, for bad
    arguments; RuntimeError where a GPU cannot reach another. A rank that does not come within the limit, or has died,
    makes the kernels of the others give up: `check` and every later call raise CommError, and what the calls in between
    returned means nothing.
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
        device, available, name = together(self.comm, "DirectExchange", _current_gpu)
        names = gather(self.comm, name)
        if len(set(names)) < p:
            first = next(rank for rank in range(p) if names[rank] in names[:rank])
            raise ValueError(
                f"DirectExchange: ranks {names.index(names[first])} and {first} have the same GPU, expected one each: "
                f"a kernel waits for those of all ranks, which a GPU need not run at the same time{self.comm.where()}"
            )
        num_sms = max(2, available - NCCL_SMS) if num_sms is None else num_sms

        def arguments() -> tuple[None, tuple[()], object]:
            name = str(dtype).removeprefix("torch.")
            for problem, message in (
                (p not in RANKS, f"comm has {p} ranks, expected one of {RANKS}"),
                (name not in DTYPES, f"dtype is {dtype}, expected one of {', '.join(DTYPES)}"),
                (fp8 not in (None, torch.float8_e4m3fn), f"fp8 is {fp8}, expected None or torch.float8_e4m3fn"),
                (max_tokens < 1, f"max_tokens is {max_tokens}, expected >= 1"),
                (hidden < 1, f"hidden is {hidden}, expected >= 1"),
                (not 1 <= top_k <= 32, f"top_k is {top_k}, expected 1 .. 32"),
                (num_experts % p or num_experts < p, f"num_experts is {num_experts}, expected a multiple of {p}"),
                (num_experts > 1024 * p, f"num_experts is {num_experts}, expected at most {1024 * p}"),
                (num_buffers < 1, f"num_buffers is {num_buffers}, expected >= 1"),
                (not 2 <= num_sms <= available, f"num_sms is {num_sms}, expected 2 .. {available}"),
                (max_rows is not None and max_rows < 1, f"max_rows is {max_rows}, expected >= 1"),
                (limit <= 0, f"limit is {limit}, expected seconds > 0"),
                (max_tokens * p * top_k >= 2**31, f"max_tokens is {max_tokens}, expected p * K * it < 2**31"),
            ):
                if problem:
                    raise ValueError(message)
            rest = f"{num_experts} {top_k} {dtype} {fp8} {max_rows} {num_buffers} {num_sms} {limit}"
            name = getattr(memory, "__name__", "")
            return None, (), lambda: f"{max_tokens} {hidden} {rest} {name}"

        text = self.comm.checked("DirectExchange", arguments)[2]()  # type: ignore[operator]
        self.comm.agree("DirectExchange: the arguments", text)
        self.dtype = dtype
        self.fp8 = fp8
        self.device = device
        experts = num_experts // p
        self.shape = Shape(
            str(dtype).removeprefix("torch."), fp8 is not None, hidden, top_k, max_tokens, p, experts, num_sms
        )
        self.num_local_experts = experts
        """Experts of this rank."""
        self.num_experts = num_experts
        self.max_rows = p * max_tokens * min(top_k, experts) if max_rows is None else max_rows
        self._buffers = Buffers(self.comm, self.shape, num_buffers, limit, memory)
        self._held: list[Any] = [None] * num_buffers  # plan.place of whose rows lie there
        self._calls = [0, 0]
        self._stream: Any = None
        self.failure: str | None = None
        """Why this exchange cannot be used any more, or None."""
        self.comm.barrier()

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

        rows     after `dispatch`: [at least plan.offset[-1], H] answers, in the order of its rows.
                 after `dispatch_compact`: [p * max_tokens, H] one answer for each slot, which the caller has weighted
                 and summed (`moecomm.unpermute` with plan.place and plan.weight does)
        returns  [T, H]  a token without experts gets zeros

        Sums are float32, in order of choice inside a rank and then of rank, always the same bits; the sum of another
        rank comes rounded to dtype. Collective, and so is its backward pass. Differentiable in rows and plan.weight;
        the gradient of rows beyond plan.offset[-1] is not written.
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
        for tensor in _tensors(arguments):
            tensor.record_stream(self._stream)
        return Started(result, self._stream.record_event())

    def free_rows(self, plan: DirectPlan) -> None:
        """Say that the rows of a plan of `dispatch_compact` have been read, instead of `combine`. Collective."""
        self._usable("free_rows")
        if self._holds(plan):
            part = self._buffers.to[plan.buffer]
            self.shape.free()(1, 32, (self._buffers.memory, ctypes.c_void_p(part.counters), part.credit))
            self._held[plan.buffer] = None

    def load(self) -> None:
        """Compile and load all kernels, for rows that start at multiples of 16 bytes; about 2 s each the first time. A
        CUDA graph can capture loaded kernels only. Not collective."""
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
        self._buffers.report[1:] = 0
        if unknown:
            raise ValueError(
                f"dispatch: routing.expert has {unknown} ids outside -1 .. {self.num_experts - 1}{self.comm.where()}"
            )
        if lost:
            raise OverflowError(f"dispatch: {lost} rows beyond max_rows = {self.max_rows} were lost{self.comm.where()}")

    def free(self) -> None:
        """Give the memory back. Collective, after the last call. After a failure it stays until the process ends,
        because a rank that has not noticed may still write there."""
        self._usable("free")
        self.failure = "it was freed"
        self._buffers.symmetric.free()

    # ---- the kernels: direct_autograd.py calls these too -----------------------------------------------------------

    def send(self, x: Any, expert: Any, weight: Any, compact: bool) -> tuple[Any, DirectPlan]:
        """One launch of dispatch. expert [T, K] int32, weight [T, K] float32, contiguous."""
        import torch

        x, shape, index = x.contiguous(), self.shape, self._next_buffer(0)
        buffer, slots = self._buffers.to[index], shape.ranks * shape.max_tokens
        new = x.new_empty
        place = new((slots, shape.top_k), dtype=torch.int32)
        numbers = new(2 * shape.experts + 1 + shape.ranks, dtype=torch.int32)
        offset, count, num_tokens = numbers.split([shape.experts + 1, shape.experts, shape.ranks])
        plan = DirectPlan(
            count, offset, new(self.max_rows, dtype=torch.int32), place,
            new((slots, shape.top_k), dtype=torch.float32), num_tokens, None, expert, self, index, compact,
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
            (self._buffers.memory, buffer, self._table(plan), x, expert, weight, x.shape[0], None, rows, scales, None,
             cut.pushers),
            shared,
        )  # fmt: skip
        self._held[index] = place if in_place else None
        return rows, replace(plan, scales=scales)

    def give_back(self, rows: Any, plan: DirectPlan, weight: Any, numbers: Any = None) -> tuple[Any, Any]:
        """One launch of combine. weight None: a plain sum. numbers [slots, K] float32: come back as [T, K] too."""
        import torch

        shape, tokens = self.shape, plan.expert.shape[0]
        buffer = self._buffers.back[self._next_buffer(1)]
        y = rows.new_empty((tokens, shape.hidden))
        returned = None if numbers is None else rows.new_empty((tokens, shape.top_k), dtype=torch.float32)
        kernel, cut = shape.combine(plan.compact, weight is not None, numbers is not None, _aligned(rows, y))
        done = self._buffers.to[plan.buffer] if self._holds(plan) else None
        credit = (None, 0) if done is None else (ctypes.c_void_p(done.counters), done.credit)
        kernel(
            shape.num_sms, cut.threads,
            (self._buffers.memory, buffer, self._table(plan), rows, rows.stride(0), plan.expert, numbers, tokens, y,
             returned, cut.pushers, *credit),
        )  # fmt: skip
        if done is not None:
            self._held[plan.buffer] = None
        return y, returned

    def spread(self, grad_y: Any, rows: Any, plan: DirectPlan) -> tuple[Any, Any]:
        """The backward pass of combine, one launch: the gradients of rows, and of plan.weight."""
        import torch

        shape = self.shape
        buffer = self._buffers.to[self._next_buffer(0)]
        grad_rows = torch.empty_like(rows)
        grad_weight = torch.empty_like(plan.weight)
        kernel, cut, shared = shape.dispatch("spread", _aligned(grad_y, rows, grad_rows))
        kernel(
            shape.num_sms, cut.threads,
            (self._buffers.memory, buffer, self._table(plan), grad_y, plan.expert, None, grad_y.shape[0], rows,
             grad_rows, None, grad_weight, cut.pushers),
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

    def _table(self, plan: DirectPlan) -> Table:
        tensors = plan.place, plan.weight, plan.slot, plan.offset, plan.rows_per_expert, plan.num_tokens
        tiles = self._buffers.tiles[plan.buffer]
        return Table(*(tensor.data_ptr() for tensor in tensors), tiles.data_ptr(), self.max_rows)

    def _next_buffer(self, kind: int) -> int:
        """Of dispatch (0) or combine (1): in turn, the same on all ranks."""
        for _ in self._held:
            index = self._calls[kind] % len(self._held)
            self._calls[kind] += 1
            if kind == 1 or self._held[index] is None:
                return index
        raise RuntimeError(
            f"dispatch: all {len(self._held)} buffers hold compact rows of plans without a combine or free_rows: "
            f"give num_buffers={len(self._held) + 1} or more{self.comm.where()}"
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
        if (compact or self.fp8 is not None) and _wants_gradients(x, weight):
            raise RuntimeError(
                f"{call}: x or routing.weight asks for a gradient, which compact and fp8 rows do not have{where}"
            )
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
        if not isinstance(plan, DirectPlan):
            raise TypeError(f"combine: plan is a {type(plan).__name__}, expected one that dispatch returned{where}")
        if plan.exchange is not self:
            raise ValueError(f"combine: plan is of another DirectExchange, expected one of this{where}")
        if not is_torch(rows) or not rows.is_cuda or rows.dtype != self.dtype or rows.ndim != 2:
            raise TypeError(f"combine: rows is not a CUDA tensor of {self.dtype} with two axes{where}")
        self._check_device("combine", "rows", rows)
        slots = self.shape.ranks * self.shape.max_tokens
        fits = rows.shape[0] == slots if plan.compact else rows.shape[0] <= self.max_rows
        if rows.shape[1] != self.shape.hidden or not fits or (rows.numel() and rows.stride(1) != 1):
            size = slots if plan.compact else f"up to {self.max_rows}"
            raise ValueError(f"combine: rows is {list(rows.shape)}, expected [{size}, {self.shape.hidden}]{where}")


def _current_gpu() -> tuple[int, int, str]:
    """Its number here, its multiprocessors, and its name everywhere."""
    import torch

    properties = torch.cuda.get_device_properties("cuda")
    return torch.cuda.current_device(), properties.multi_processor_count, str(properties.uuid)


def _wants_gradients(*tensors: Any) -> bool:
    import torch

    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _aligned(*tensors: Any) -> bool:
    """Whether every row of every tensor starts at a multiple of 16 bytes."""
    return all(
        tensor.data_ptr() % 16 == 0 and tensor.stride(0) * tensor.element_size() % 16 == 0
        for tensor in tensors
        if tensor is not None
    )


def _tensors(value: Any) -> list[Any]:
    """The CUDA tensors in a result or in arguments."""
    if is_torch(value):
        return [value] if value.is_cuda else []
    if isinstance(value, (tuple, list)):
        return [tensor for item in value for tensor in _tensors(item)]
    if isinstance(value, (DirectPlan, Routing)):
        return _tensors(list(vars(value).values()))
    return []
