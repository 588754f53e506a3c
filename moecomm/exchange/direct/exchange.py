"""DirectExchange: tokens to the GPUs of their experts and back over NVLink, one kernel each way."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import replace
from math import inf
from typing import TYPE_CHECKING, TypeVar

from moecomm.arrays import is_torch
from moecomm.comm import Comm, CommLike
from moecomm.exchange.contract import Exchange
from moecomm.exchange.direct.kernels import KernelShape
from moecomm.exchange.direct.launch import Launcher
from moecomm.exchange.direct.memory import Buffers
from moecomm.exchange.direct.plan import DirectPlan, StartedCall, tensors_in
from moecomm.exchange.symmetric import SymmetricMemory, ipc_memory
from moecomm.failures import Failing
from moecomm.gating import Routing
from moecomm.identity import Identity
from moecomm.together import gather, together
from moecomm.transports import as_comm

if TYPE_CHECKING:
    import torch
    from torch import Tensor

DTYPES = ("float32", "bfloat16", "float16")
RANKS = (1, 2, 4, 8)
NCCL_SMS = 32
"""Multiprocessors that a collective of NCCL takes at most."""

Result = TypeVar("Result")


class DirectExchange(Exchange[DirectPlan], Identity):
    """Dispatch and combine by kernels that write into each other's memory, for CUDA ranks of one node.

    comm         1, 2, 4 or 8 ranks that share the experts: rank r holds the experts from r * E / p on. The current
                 device of each rank is its GPU; no two ranks may have the same GPU
    max_tokens   the most tokens that a rank may bring to a call
    hidden       H
    num_experts  E, a multiple of the number of ranks
    top_k        K, 1 .. 32
    dtype        of the rows: torch.float32, bfloat16 or float16
    fp8          the type in which dispatch sends and returns rows. None: dtype; torch.float8_e4m3fn: quantised before
                 they are sent, with a scale for each 128 values. combine uses dtype in both cases
    max_rows     room for rows ordered by expert; None: for the worst case, p * max_tokens * min(K, E / p). A row that
                 finds no room is lost, its answer counts as zeros, and `check` raises
    num_buffers  plans of `dispatch_compact` that may wait for their combine at the same time
    num_sms      blocks of a kernel, one for each multiprocessor, which wait for those of other ranks. None: all
                 multiprocessors but 32, so that NCCL's kernels, which also wait for each other, find room beside them.
                 Where nothing else runs, all multiprocessors are faster for many tokens
    limit        seconds that a kernel waits for another rank
    memory       ipc_memory, or torch_memory for a torch process group

    A row is sent once to each rank that needs it, however many experts of that rank the token has. The GPU never waits
    for the host: calls can be captured in a CUDA graph, after one call of the same kind. On each rank all calls of an
    exchange must be ordered as on one stream. All ranks make the same calls in the same order.

    The constructor is collective, and all its arguments must be equal on all ranks. Raises ValueError, on all ranks,
    for bad arguments; RuntimeError where a GPU cannot reach another. If a rank has died, or does not make a call within
    the limit, the kernels of the other ranks give up: `check` and every later call raise CommError, and the results of
    the calls in between are undefined.
    Source: DeepSpeed-MoE (arXiv 2201.05596), section 5, for one node.
    """

    def __init__(
        self,
        comm: CommLike,
        max_tokens: int,
        hidden: int,
        num_experts: int,
        top_k: int,
        dtype: torch.dtype,
        *,
        fp8: torch.dtype | None = None,
        max_rows: int | None = None,
        num_buffers: int = 2,
        num_sms: int | None = None,
        limit: float = 60.0,
        memory: Callable[[Comm, int], SymmetricMemory] = ipc_memory,
    ) -> None:
        import torch

        self.comm = as_comm(comm)
        sizes = {
            "max_tokens": max_tokens,
            "hidden": hidden,
            "num_experts": num_experts,
            "top_k": top_k,
            "num_buffers": num_buffers,
            "num_sms": num_sms,
            "max_rows": max_rows,
        }

        def checked() -> tuple[KernelShape, int, int, int, str]:
            """What this rank finds out alone: the sizes, its GPU and the GPU's name."""
            gpu = torch.cuda.get_device_properties("cuda")
            shape, max_rows, num_buffers = _checked_sizes(sizes, dtype, fp8, self.comm.size, gpu.multi_processor_count)
            if not 0 < limit < inf:
                raise ValueError(f"limit is {limit}, expected seconds > 0")
            return shape, max_rows, num_buffers, torch.cuda.current_device(), str(gpu.uuid)

        shape, self.max_rows, num_buffers, self.device, gpu_name = together(self.comm, "DirectExchange", checked)
        # By name: the same GPU has different numbers in processes that see different devices.
        self._check_gpus(gather(self.comm, gpu_name))
        arguments = f"{shape} {fp8} {self.max_rows} {num_buffers} {limit} {getattr(memory, '__name__', '')}"
        self.comm.agree("DirectExchange: the arguments", arguments)
        self.shape = shape
        self.dtype = dtype
        self.fp8 = fp8
        self.num_experts = shape.ranks * shape.experts
        experts = range(self.num_experts)
        self.experts = [list(experts[start : start + shape.experts]) for start in experts[:: shape.experts]]
        self.local_experts = self.experts[self.comm.rank]
        self.num_local_experts = shape.experts
        """Experts of this rank."""
        buffers = Buffers(self.comm, shape, num_buffers, limit, memory)
        self._launcher = Launcher(self.comm, shape, buffers, self.max_rows)
        self._stream: torch.cuda.Stream | None = None
        # No rank may launch a kernel before the memory of all is there and zero.
        self.comm.barrier()

    @property
    def comms(self) -> tuple[Failing, ...]:
        """The launches of this exchange, which reach other ranks without a Comm."""
        return (self._launcher,)

    # ---- the calls -------------------------------------------------------------------------------------------------

    def dispatch(self, x: Tensor, routing: Routing) -> tuple[Tensor, DirectPlan]:
        """Send every token to its experts.

        x        [T, H]  CUDA; T may be 0 and differ between ranks, up to max_tokens
        routing  expert [T, K] and weight [T, K] on the same device; an id outside 0 .. E - 1 counts as dropped, and
                 one that is not -1 makes `check` raise
        returns  ([max_rows, H], plan)  the rows for this rank's experts in the order of RoutedExchange: by expert,
                 source rank, token. Only the first plan.offset[-1] rows are written

        Collective, and so is its backward pass. Differentiable in x and in routing.weight, unless fp8.
        """
        return self._dispatch("dispatch", x, routing, compact=False)

    def dispatch_compact(self, x: Tensor, routing: Routing) -> tuple[Tensor, DirectPlan]:
        """Send every token once to each rank that has experts for it. Arguments as of `dispatch`; less is copied.

        returns  ([p * max_tokens, H], plan)  the row of each slot; only slots with a plan.place other than -1 are
                 written. The rows may lie in the buffer in which they arrive: they must be read, by work queued in
                 order, before `combine` of this plan, or before `free_rows` if there is no combine

        Not differentiable. Raises RuntimeError if num_buffers plans already hold their rows.
        """
        return self._dispatch("dispatch_compact", x, routing, compact=True)

    def tokens(self) -> Tensor | None:
        """The place of this rank's tokens in symmetric memory, for `dispatch_compact`, as [max_tokens, H].

        If the next dispatch or backward pass is that `dispatch_compact`, write x there and pass its first T rows: they
        are not copied. None for rows that travel with tags or as float8, or are no multiple of 16 bytes. Not
        collective. Raises RuntimeError as `dispatch_compact` does.
        """
        shape = self.shape
        buffer = self._launcher.next_dispatch_buffer()
        row_bytes = shape.hidden * shape.itemsize
        if shape.tagged or shape.fp8 or row_bytes % 16:
            return None
        start = buffer.rows + self.comm.rank * shape.max_tokens * row_bytes
        return self._launcher.buffers.view(start, (shape.max_tokens, shape.hidden), self.dtype)

    def combine(self, rows: Tensor, plan: DirectPlan) -> Tensor:
        """Return for each token the weighted sum of its experts' answers.

        rows     after `dispatch`: [at least plan.offset[-1], H] answers, in the order of its rows; a missing answer
                 counts as zeros, and `check` raises.
                 after `dispatch_compact`: [p * max_tokens, H] one answer for each slot, which the caller has weighted
                 and summed, as `moecomm.unpermute` does with plan.place and plan.weight
        returns  [T, H]  a token without experts gets zeros

        Sums are float32, in the order of choices inside a rank and then in the order of ranks, so the same input gives
        the same bits; the sums of other ranks are rounded to dtype before they are sent. Collective, and so is its
        backward pass. Differentiable in rows and plan.weight after `dispatch` without fp8; the gradient of rows beyond
        plan.offset[-1] is not written. Raises RuntimeError if a gradient is wanted in any other case.
        """
        self._launcher.check_usable("combine")
        self._check_answers(rows, plan)
        if plan.compact or not _wants_gradients(rows, plan.weight):
            y, _ = self._launcher.give_back(rows, plan, weighted=not plan.compact)
            return y
        from moecomm.exchange.direct.autograd import Combine

        return Combine.apply(rows, plan.weight, plan)

    def start(self, call: Callable[..., Result], *arguments: object) -> StartedCall[Result]:
        """Begin `call(*arguments)`, dispatch or combine of this exchange, on a stream of its own; returns a handle.

        It runs after the work queued so far on the current stream, and at the same time as work queued later, if the
        exchange has fewer num_sms than the GPU. Wait for the handle before the next call of this exchange.

        Raises RuntimeError while torch records gradients: the backward passes of calls on two streams could meet.
        """
        import torch

        if torch.is_grad_enabled():
            raise RuntimeError(f"start: torch records gradients, expected torch.no_grad(){self.comm.where()}")
        if self._stream is None:
            self._stream = torch.cuda.Stream()
        # The arguments may still be computed by work queued on the caller's stream.
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            result = call(*arguments)
        # The caller may drop its tensors now: their memory is not reused before this stream has read it.
        for tensor in tensors_in(arguments):
            tensor.record_stream(self._stream)
        return StartedCall(result, self._stream.record_event())

    def free_rows(self, plan: DirectPlan) -> None:
        """Say that the rows of a plan of `dispatch_compact` have been read, instead of `combine`. Collective."""
        self._launcher.check_usable("free_rows")
        self._check_plan("free_rows", plan)
        self._launcher.free_rows(plan)

    def load(self) -> None:
        """Compile and load all kernels, for tensors whose rows lie side by side; about 2 s each the first time. A CUDA
        graph can capture loaded kernels only. Not collective."""
        for kernel in self.shape.kernels():
            kernel.load()

    def check(self) -> None:
        """Wait for the calls so far. Raises CommError if a rank did not come, ValueError if a routing named experts
        that do not exist, OverflowError if rows found no room, since the last check."""
        import torch

        torch.cuda.current_stream().synchronize()
        if self._stream is not None:
            self._stream.synchronize()
        self._launcher.check_usable("check")
        report = self._launcher.buffers.report
        _, lost, unknown = report.tolist()
        # One error at a time: a count that is not reported yet stays for the next check.
        if unknown:
            report[2] = 0
            raise ValueError(
                f"dispatch: routing.expert has {unknown} ids outside -1 .. {self.num_experts - 1}{self.comm.where()}"
            )
        if lost:
            report[1] = 0
            raise OverflowError(
                f"dispatch, combine: {lost} rows were lost, beyond max_rows = {self.max_rows} or beyond the rows that "
                f"combine was given{self.comm.where()}"
            )

    def free(self) -> None:
        """Give the memory back. Collective, after the last call. After a failure it stays until the process ends,
        because a rank that has not noticed may still write there."""
        self._launcher.check_usable("free")
        self._launcher.fail("it was freed")
        self._launcher.buffers.symmetric.free()

    @property
    def failure(self) -> str | None:
        """Why this exchange cannot be used any more, or None."""
        return self._launcher.failure

    def fail(self, why: str) -> None:
        """Refuse every later call: this rank may have launched fewer kernels than the others. Not collective."""
        self._launcher.fail(why)

    def _dispatch(self, call: str, x: Tensor, routing: Routing, compact: bool) -> tuple[Tensor, DirectPlan]:
        import torch

        self._launcher.check_usable(call)
        expert, weight = self._checked_routing(call, x, routing, compact)
        if compact or self.fp8 is not None or not torch.is_grad_enabled():
            return self._launcher.send(x.detach(), expert, weight.detach(), compact)
        from moecomm.exchange.autograd import new_thread
        from moecomm.exchange.direct.autograd import Dispatch

        # The output `weight` is the tensor through which combine's gradient reaches routing.weight.
        rows, weight, plan = Dispatch.apply(x, weight, new_thread(x), expert, self._launcher)
        return rows, replace(plan, weight=weight)

    # ---- checks ----------------------------------------------------------------------------------------------------

    def _check_gpus(self, names: list[str]) -> None:
        """names: of the GPU of each rank."""
        for rank, name in enumerate(names):
            owner = names.index(name)
            if owner < rank:
                raise ValueError(
                    f"DirectExchange: ranks {owner} and {rank} have the same GPU, expected one each: a kernel waits "
                    "for those of all ranks, which a GPU need not run at the same time" + self.comm.where()
                )

    def _checked_routing(self, call: str, x: Tensor, routing: Routing, compact: bool) -> tuple[Tensor, Tensor]:
        """Experts and weights as the kernels take them."""
        import torch

        expert, weight = routing.expert, routing.weight
        where = self.comm.where()
        for name, tensor in (("x", x), ("routing.expert", expert), ("routing.weight", weight)):
            if not is_torch(tensor) or not tensor.is_cuda:
                raise TypeError(f"{call}: {name} is a {type(tensor).__name__}, expected a CUDA tensor{where}")
            self._check_device(call, name, tensor)
        self._check_tokens(call, x)
        choices = (len(x), self.shape.top_k)
        for name, tensor in (("expert", expert), ("weight", weight)):
            if tuple(tensor.shape) != choices:
                raise ValueError(
                    f"{call}: routing.{name} has shape {list(tensor.shape)}, expected {list(choices)}{where}"
                )
        if expert.dtype.is_floating_point or expert.dtype == torch.bool:
            raise TypeError(f"{call}: routing.expert has dtype {expert.dtype}, expected integers{where}")
        self._check_gradients(call, compact, {"x": x, "routing.weight": weight})
        # An id that int32 cannot hold must not become the id of an expert: it stays just outside the range.
        if expert.dtype == torch.int64:
            expert = expert.clamp(-2, self.num_experts)
        return expert.to(torch.int32).contiguous(), weight.to(torch.float32).contiguous()

    def _check_tokens(self, call: str, x: Tensor) -> None:
        shape, where = self.shape, self.comm.where()
        if x.ndim != 2 or x.shape[1] != shape.hidden or x.dtype != self.dtype:
            raise ValueError(
                f"{call}: x is {x.dtype} {list(x.shape)}, expected {self.dtype} [T, {shape.hidden}]{where}"
            )
        if len(x) > shape.max_tokens:
            raise ValueError(f"{call}: x has {len(x)} tokens, expected at most {shape.max_tokens}{where}")

    def _check_device(self, call: str, name: str, tensor: Tensor) -> None:
        import torch

        current = torch.cuda.current_device()
        if not self.device == tensor.device.index == current:
            raise ValueError(
                f"{call}: {name} is on {tensor.device} and the current device is {current}, expected {self.device} for "
                f"both, as when this DirectExchange was made{self.comm.where()}"
            )

    def _check_answers(self, rows: Tensor, plan: DirectPlan) -> None:
        where = self.comm.where()
        self._check_plan("combine", plan)
        self._check_gradients("combine", plan.compact, {"rows": rows, "plan.weight": plan.weight})
        if not is_torch(rows) or not rows.is_cuda or rows.dtype != self.dtype or rows.ndim != 2:
            kind = f"{rows.dtype} {list(rows.shape)} on {rows.device}" if is_torch(rows) else type(rows).__name__
            raise TypeError(f"combine: rows is {kind}, expected a CUDA tensor of {self.dtype} with two axes{where}")
        self._check_device("combine", "rows", rows)
        if plan.compact:
            expected = str(self.shape.slots)
            fits = len(rows) == self.shape.slots
        else:
            expected = f"up to {self.max_rows}"
            fits = len(rows) <= self.max_rows
        if rows.shape[1] != self.shape.hidden or not fits:
            raise ValueError(f"combine: rows is {list(rows.shape)}, expected [{expected}, {self.shape.hidden}]{where}")
        # Rows may be apart, as in a slice of a larger tensor, which spares a copy; values of a row may not.
        if rows.numel() and rows.stride(1) != 1:
            raise ValueError(f"combine: rows has strides {rows.stride()}, expected values of a row side by side{where}")

    def _check_gradients(self, call: str, compact: bool, tensors: dict[str, Tensor]) -> None:
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
        if plan.launcher is not self._launcher:
            raise ValueError(f"{call}: plan is of another DirectExchange, expected one of this{self.comm.where()}")


def _checked_sizes(
    sizes: dict[str, int | None], dtype: torch.dtype, fp8: torch.dtype | None, ranks: int, multiprocessors: int
) -> tuple[KernelShape, int, int]:
    """The shape of the kernels, max_rows and num_buffers, from arguments of DirectExchange. Raises ValueError."""
    import torch

    if ranks not in RANKS:
        raise ValueError(f"comm has {ranks} ranks, expected one of {RANKS}")
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise ValueError(f"dtype is {dtype}, expected one of {', '.join(DTYPES)}")
    if fp8 not in (None, torch.float8_e4m3fn):
        raise ValueError(f"fp8 is {fp8}, expected None or torch.float8_e4m3fn")
    # Each bound that comes later may depend on the values before it.
    beside_nccl = max(2, multiprocessors - NCCL_SMS)
    num_sms = _integer("num_sms", sizes["num_sms"], 2, multiprocessors, beside_nccl)
    hidden = _integer("hidden", sizes["hidden"])
    # A lane of a warp takes one choice of a token.
    top_k = _integer("top_k", sizes["top_k"], 1, 32)
    # Indices of choices are int32 in the kernels.
    max_tokens = _integer("max_tokens", sizes["max_tokens"], 1, (2**31 - 1) // (ranks * top_k))
    # A block that builds the table counts the rows of each expert in shared memory.
    num_experts = _integer("num_experts", sizes["num_experts"], 1, 1024 * ranks)
    experts = num_experts // ranks
    if experts * ranks != num_experts:
        raise ValueError(f"num_experts is {num_experts}, expected a multiple of {ranks}")
    # The worst case: all ranks send all tokens here, each with as many choices as there are experts.
    worst = ranks * max_tokens * min(top_k, experts)
    max_rows = _integer("max_rows", sizes["max_rows"], default=worst)
    num_buffers = _integer("num_buffers", sizes["num_buffers"])
    shape = KernelShape(name, fp8 is not None, hidden, top_k, max_tokens, ranks, experts, num_sms)
    return shape, max_rows, num_buffers


def _integer(name: str, value: object, low: int = 1, high: float = inf, default: int | None = None) -> int:
    """The value as an int from low to high; None stands for the default."""
    try:
        number = operator.index(default if value is None else value)  # type: ignore[arg-type]
    except TypeError:
        raise ValueError(f"{name} is {value!r}, expected an integer") from None
    if not low <= number <= high:
        bounds = f">= {low}" if high == inf else f"{low} .. {high}"
        raise ValueError(f"{name} is {number}, expected {bounds}")
    return number


def _wants_gradients(*tensors: Tensor) -> bool:
    import torch

    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
