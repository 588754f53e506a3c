"""The gate's C++ kernels over numpy arrays. Arguments are checked by the callers; bfloat16 comes as uint16."""

# ruff: noqa: N806 - capitals are dimensions

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from moecomm import _core
from moecomm.gating.routing import check_status


def route(logits: NDArray, bias: Any, mask: Any, top_k: int, choices: tuple[Any, ...]) -> tuple[Any, ...]:
    """The fields of a Routing in the order of ops.py. Raises ValueError for logits or a bias that nothing follows from.

    choices  score, num_groups, top_groups, best_in_group, floor, scale, capacity, drop, noise, its scale, seed, offset,
             align, threads, unusable. With unusable 1 it does not raise: every assignment is dropped, status says why
    """
    T, E = logits.shape
    capacity, align, unusable = choices[6], choices[12], choices[14]
    ints, floats = np.int32, np.float32
    expert, slot, row = (np.empty((T, top_k), ints) for _ in range(3))
    weight, lse = np.empty((T, top_k), floats), np.empty(T, floats)
    source = np.empty(num_rows(T, E, top_k, capacity, align), ints)
    count, offset, load = np.empty(E, ints), np.empty(E + 1, ints), np.empty(E, ints)
    aux_loss, z_loss = np.empty((), floats), np.empty((), floats)
    out = (expert, weight, slot, row, source, count, offset, load, aux_loss, z_loss, lse)
    status = _core.route(logits, bias, mask, *out, *choices[:14])
    if status and not unusable:
        check_status(status)
    if status:
        for table in (expert, slot, row, source):
            table.fill(-1)
        for numbers in (weight, count, offset, load, aux_loss, z_loss, lse):
            numbers.fill(0)
    return (*out, np.asarray(status, ints))


def num_rows(T: int, E: int, K: int, capacity: int, align: int) -> int:  # noqa: N803
    """N: the most rows that a routing of this size has. capacity -1: none."""
    return E * capacity if capacity >= 0 else (T * K + min(E, T * K) * (align - 1)) // align * align


def route_backward(
    grads: tuple[NDArray, float, float], logits: NDArray, saved: tuple[Any, ...], choices: tuple[Any, ...]
) -> NDArray:
    """grad_logits. saved: expert, lse, load, mask; choices: score, floor, scale, threads."""
    grad_logits = np.empty_like(logits)
    _core.route_backward(*grads, logits, *saved, grad_logits, *choices)
    return grad_logits


def _rows(num_rows: int, width: int, dtype: Any) -> NDArray:
    """[num_rows, width], uninitialised; where it is large, from the start of a cache line on."""
    num_bytes = num_rows * width * np.dtype(dtype).itemsize
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


def unpermute(rows: NDArray, row: NDArray, weight: Any, residual: Any, threads: int) -> NDArray:
    """rows [N, H] -> y [T, H]; weight None: 1."""
    y = _rows(len(row), rows.shape[1], rows.dtype)
    _core.unpermute(rows, row, weight, residual, y, threads)
    return y


def unpermute_backward(
    grad_y: NDArray, rows: NDArray, row: NDArray, weight: NDArray, source: NDArray, threads: int
) -> tuple[NDArray, NDArray]:
    """grad_rows [N, H], grad_weight [T, K]."""
    grad_rows, grad_weight = _rows(rows.shape[0], rows.shape[1], rows.dtype), np.empty(row.shape, np.float32)
    _core.unpermute_backward(grad_y, rows, row, weight, source, grad_rows, grad_weight, threads)
    return grad_rows, grad_weight
