"""The gate's C++ kernels over numpy arrays. The callers have checked all arguments; bfloat16 comes as uint16."""

# ruff: noqa: N806 - capitals are dimensions

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from moecomm import _core
from moecomm.gating.choices import Choices, Fields, Gradients, Inputs, Saved, new_fields
from moecomm.gating.routing import MISRECORDED, check_status

PLACES = ("expert", "slot", "row", "source")
"""The fields in which -1 means that an assignment was dropped or a row is empty."""


def route(inputs: Inputs, choices: Choices) -> Fields:
    """Raises ValueError for logits, a bias or recorded experts that nothing follows from, unless choices.unusable is
    "note".

    Then every assignment is dropped, and status says why.
    """
    T, E = inputs.logits.shape
    problem = "" if inputs.recorded is None else recorded_problem(inputs.recorded, E)
    if problem and choices.unusable == "raise":
        raise ValueError(f"route: {problem}")
    fields = new_fields(_ints, _floats, T, E, choices)
    # The kernel on the CPU trusts recorded ids.
    status = MISRECORDED if problem else _core.route(inputs, choices, fields)
    if status and choices.unusable == "raise":
        check_status(status)
    if status:
        # The kernel stopped half-way: what it wrote until then is no routing.
        for name, array in fields._asdict().items():
            array.fill(-1 if name in PLACES else 0)
    fields.status.fill(status)
    return fields


def recorded_problem(recorded: NDArray, num_experts: int) -> str:
    """What is wrong with recorded [T, K], "" if each token has different experts or -1."""
    ids = np.sort(recorded, axis=1)
    is_outside = (ids < -1) | (ids >= num_experts)
    is_repeated = (ids[:, 1:] == ids[:, :-1]) & (ids[:, 1:] >= 0)
    for wrong, problem in (
        (is_outside, f"an id outside -1 .. {num_experts - 1}"),
        (is_repeated, "an expert twice"),
    ):
        tokens = np.flatnonzero(wrong.any(axis=1))
        if len(tokens):
            return f"expert[{tokens[0]}] has {problem}"
    return ""


def route_backward(grads: Gradients, saved: Saved, choices: Choices) -> NDArray:
    """grad_logits, like saved.logits. The gradients of the two losses are plain numbers here."""
    grad_logits = np.empty_like(saved.logits)
    _core.route_backward(grads, saved, choices, grad_logits)
    return grad_logits


def _ints(*shape: int) -> NDArray:
    return np.empty(shape, np.int32)


def _floats(*shape: int) -> NDArray:
    return np.empty(shape, np.float32)


def _rows(num_rows: int, width: int, dtype: Any) -> NDArray:
    """[num_rows, width], uninitialised; where it is large, from the start of a cache line on."""
    num_bytes = num_rows * width * np.dtype(dtype).itemsize
    # Large results may be written past the caches, in lines of 64 bytes; numpy's memory starts at multiples of 16.
    if num_bytes < 1 << 22:
        return np.empty((num_rows, width), dtype)
    memory = np.empty(num_bytes + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + num_bytes].view(dtype).reshape(num_rows, width)


def permute(x: NDArray, row: NDArray, source: NDArray, threads: int) -> NDArray:
    """x [T, H] -> rows [N, H]."""
    rows = _rows(len(source), x.shape[1], x.dtype)
    _core.permute(x, row, source, rows, threads)
    return rows


def permute_fp8(x: NDArray, row: NDArray, source: NDArray, threads: int) -> tuple[NDArray, NDArray]:
    """x [T, H] -> rows [N, H] uint8, the bits of e4m3, and scales [N, ceil(H / 128)]."""
    rows = _rows(len(source), x.shape[1], np.uint8)
    scales = np.empty((len(source), -(-x.shape[1] // 128)), np.float32)
    _core.permute_fp8(x, row, source, rows, scales, threads)
    return rows, scales


def unpermute(rows: NDArray, row: NDArray, weight: Any, residual: Any, threads: int, dtype: Any = None) -> NDArray:
    """rows [N, H] -> y [T, H] of that dtype, None: as rows; weight None: 1. float64 stays float64, weights too."""
    y = _rows(len(row), rows.shape[1], rows.dtype if dtype is None else dtype)
    _core.unpermute(rows, row, weight, residual, y, threads)
    return y


def unpermute_backward(
    grad_y: NDArray, rows: NDArray, row: NDArray, weight: NDArray, source: NDArray, threads: int
) -> tuple[NDArray, NDArray]:
    """grad_rows [N, H], grad_weight [T, K]."""
    grad_rows, grad_weight = _rows(rows.shape[0], rows.shape[1], rows.dtype), np.empty(row.shape, weight.dtype)
    _core.unpermute_backward(grad_y, rows, row, weight, source, grad_rows, grad_weight, threads)
    return grad_rows, grad_weight


# ---- dtypes of sums -------------------------------------------------------------------------------------------------

SUMMED = ("float32", "float16", "bfloat16", "float64")
"""What the kernels on the host sum as it is. Other numbers are converted before."""


def is_stored(summed: str, result: str) -> bool:
    """Whether the kernel on the host that sums numbers of the one dtype can round to the other."""
    if "float64" in (summed, result):
        return summed == result
    return result in SUMMED
