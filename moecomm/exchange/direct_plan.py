"""What DirectExchange hands out: the plan of a dispatch, and the handle of a call on a stream of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from moecomm.arrays import is_torch
from moecomm.gating import Routing


@dataclass(frozen=True, eq=False)
class DirectPlan:
    """Made by `dispatch`, taken by `combine`. Everything is on the device; a slot is source rank * max_tokens + token.

    rows_per_expert  [local experts] int32: rows of each expert of this rank, also those that found no room
    offset           [local experts + 1] int32: where each expert's rows begin among the rows ordered by expert; the
                     last one is how many there are, never more than max_rows
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
    """[T, K] int32: a copy of this rank's own choices."""
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
        for tensor in tensors_in(self._result):
            tensor.record_stream(stream)
        return self._result


def tensors_in(value: Any) -> list[Any]:
    """The CUDA tensors in a result or in arguments."""
    if is_torch(value):
        return [value] if value.is_cuda else []
    if isinstance(value, (tuple, list)):
        return [tensor for item in value for tensor in tensors_in(item)]
    if isinstance(value, (DirectPlan, Routing)):
        return tensors_in(list(vars(value).values()))
    return []
