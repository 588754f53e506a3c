"""What DirectExchange returns: the plan of a dispatch, and the handle of a call on a stream of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from moecomm.arrays import is_torch
from moecomm.gating import Routing

if TYPE_CHECKING:
    from torch import Tensor
    from torch.cuda import Event

    from moecomm.exchange.direct.launch import Launcher

Result = TypeVar("Result")


@dataclass(frozen=True, eq=False)
class DirectPlan:
    """Made by `dispatch`, taken by `combine`. All tensors are on the GPU; a slot is source rank * max_tokens + token.

    rows_per_expert  [local experts] int32: rows of each expert of this rank, including rows that found no room
    offset           [local experts + 1] int32: where the rows of each expert begin among the rows ordered by expert;
                     the last value is the number of rows, never more than max_rows
    slot             [max_rows] int32: the slot of each of those rows: the index by which a grouped GEMM gathers compact
                     rows
    place            [slots, K] int32: the inverse of slot: the row of each choice; -1: not an expert of this rank,
                     -2: no room. With weight it is what `moecomm.unpermute` takes to sum the answers of compact rows
    weight           [slots, K] float32: of the choices; differentiable, as routing.weight is
    num_tokens       [ranks] int32: tokens of each rank
    scales           [rows, ceil(H / 128)] float32, if the rows are float8
    """

    rows_per_expert: Tensor
    offset: Tensor
    slot: Tensor
    place: Tensor
    weight: Tensor
    num_tokens: Tensor
    scales: Tensor | None
    expert: Tensor
    """[T, K] int32: a copy of this rank's own choices."""
    launcher: Launcher
    """Of the exchange that made the plan; no other exchange takes it."""
    buffer: int
    """Number of the buffer that dispatch used."""
    compact: bool


class StartedCall(Generic[Result]):
    """A dispatch or combine on a stream of its own; work queued after `start` on other streams runs beside it."""

    def __init__(self, result: Result, end: Event) -> None:
        self._result = result
        self._end = end

    def wait(self) -> Result:
        """Return the result of the call, for work queued on the current stream from now on. The host does not wait."""
        import torch

        stream = torch.cuda.current_stream()
        stream.wait_event(self._end)
        # The tensors were allocated on the exchange's stream: without this the allocator would reuse their memory
        # while work of the current stream still reads it.
        for tensor in tensors_in(self._result):
            tensor.record_stream(stream)
        return self._result


def tensors_in(value: Any) -> list[Tensor]:
    """The CUDA tensors in a result or in arguments."""
    # The launcher, also a field of a plan, outlives its calls: it is not searched for tensors.
    if isinstance(value, DirectPlan | Routing):
        return tensors_in(list(vars(value).values()))
    if isinstance(value, tuple | list):
        return [tensor for item in value for tensor in tensors_in(item)]
    return [value] if is_torch(value) and value.is_cuda else []
