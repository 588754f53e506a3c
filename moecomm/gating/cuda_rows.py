"""The kernels that move rows on CUDA: permute, unpermute and their backward passes, one launch each.

Arguments are contiguous CUDA tensors that the callers have checked. row [T, K] and source [N] are those of a Routing.
"""

from __future__ import annotations

from math import gcd
from typing import Any

from moecomm.gating.cuda import ELEMENTS, WORDS, Kernel
from moecomm.gating.kernel import power_of_two

ROWS_PER_FILL_BLOCK = 256
"""ROWS_PER_BLOCK of rows.cuh."""

KEPT_BYTES = range(16 * 2**20, 96 * 2**20)
"""Rows of this size are stored so that they stay in the second cache (50 MiB on an H200) for the kernel that reads them
next. Smaller ones stay there anyway, larger ones cannot."""


def permute(x: Any, row: Any, source: Any) -> Any:
    """rows [N, H]: x [T, H] in the order of the routing, zeros where source is -1."""
    rows = x.new_empty((source.shape[0], x.shape[1]))
    if rows.numel() == 0:
        return rows
    row_bytes = x.shape[1] * x.element_size()
    width = gcd(16, row_bytes, x.data_ptr(), rows.data_ptr())
    top_k = _special(row)
    threads, unroll = (64, 4) if top_k in (1, 2) else (256, 1)
    keep = int(rows.nbytes in KEPT_BYTES)
    once = int(top_k != 1)  # in order of the rows that are written, a line of x is better left to the cache
    macros = ("WORD", WORDS[width]), ("TOP_K", top_k), ("UNROLL", unroll), ("READ_ONCE", once), ("KEEP", keep)
    words = row_bytes // width
    stride, slices, blocks = _cut(rows.shape[0] if top_k == 1 else row.shape[0], words, threads, unroll)
    numbers = (row.shape[0], words, row.shape[1], rows.shape[0], stride, slices, blocks)
    kernel = Kernel("permute.cu", "permute", macros)
    _launch(kernel, blocks + (_fill_blocks(rows) if top_k != 1 else 0), threads, (x, row, source, rows, *numbers))
    return rows


def permute_fp8(x: Any, row: Any, source: Any) -> tuple[Any, Any]:
    """rows [N, H] float8_e4m3fn and scales [N, ceil(H / 128)]; where source is -1, zeros and scale 1."""
    import torch

    (tokens, top_k), hidden = row.shape, x.shape[1]
    groups = -(-hidden // 128)
    rows = x.new_empty((source.shape[0], hidden), dtype=torch.float8_e4m3fn)
    scales = x.new_empty((source.shape[0], groups), dtype=torch.float32)
    if rows.numel() == 0:
        return rows, scales
    aligned = gcd(16, hidden * x.element_size(), x.data_ptr()) == 16
    macros = *_element(x), ("ALIGNED", int(aligned)), ("TOP_K", _special(row))
    values_per_thread = 16 // x.element_size() if aligned else 4
    blocks = -(-tokens * groups * (128 // values_per_thread) // 256)
    numbers = (tokens, hidden, top_k, rows.shape[0], blocks)
    kernel = Kernel("permute_fp8.cu", "permute_fp8", macros)
    _launch(kernel, blocks + _fill_blocks(rows), 256, (x, row, source, rows, scales, *numbers))
    return rows, scales


def permute_backward(grad_rows: Any, row: Any) -> Any:
    """grad_x [T, H]: the sum over each token's rows."""
    return unpermute(grad_rows, row, None, None)


def unpermute(rows: Any, row: Any, weight: Any, residual: Any) -> Any:
    """y [T, H] = residual + sum over k of weight[t, k] * rows[row[t, k]]; weight and residual may be None."""
    y = rows.new_empty((row.shape[0], rows.shape[1]))
    if y.numel() == 0:
        return y
    width = _width(rows, y, residual)
    top_k = _special(row, weight)
    threads, unroll = {1: (64, 4), 2: (64, 4), 4: (128, 2)}.get(top_k, (256, 1))
    once = int(row.shape[1] < 4 or rows.nbytes < 2**30)  # else: 540 us in place of 559 (H200, 32768 tokens, k = 8)
    macros = *_element(rows), ("WIDTH", width), ("TOP_K", top_k), ("UNROLL", unroll), ("READ_ONCE", once)
    pieces = rows.shape[1] // width
    stride, slices, blocks = _cut(row.shape[0], pieces, threads, unroll)
    tensors = rows, row, weight, residual, y
    numbers = (row.shape[0], pieces, row.shape[1], stride, slices)
    _launch(Kernel("unpermute.cu", "unpermute", macros), blocks, threads, (*tensors, *numbers))
    return y


def unpermute_backward(grad_y: Any, rows: Any, row: Any, weight: Any, source: Any) -> tuple[Any, Any]:
    """grad_rows [N, H], zeros where source is -1, and grad_weight [T, K] float32, 0 where row is -1."""
    import torch

    grad_rows = torch.empty_like(rows)
    grad_weight = torch.zeros_like(weight) if rows.numel() == 0 else torch.empty_like(weight)
    if rows.numel() == 0:
        return grad_rows, grad_weight
    width = _width(grad_y, rows, grad_rows)
    pieces = rows.shape[1] // width
    threads = min(256, max(32, power_of_two(pieces)))
    macros = *_element(rows), ("WIDTH", width), ("TOP_K", _special(row, weight)), ("THREADS", threads)
    kernel = Kernel("unpermute_backward.cu", "unpermute_backward", macros)
    tokens, top_k = row.shape
    tensors = grad_y, rows, row, weight, source, grad_rows, grad_weight
    _launch(kernel, tokens + _fill_blocks(rows), threads, (*tensors, tokens, pieces, top_k, rows.shape[0]))
    return grad_rows, grad_weight


def _launch(kernel: Kernel, grid: int, threads: int, arguments: tuple[Any, ...]) -> None:
    import torch

    if grid >= 2**31:
        raise ValueError(f"{kernel.name}: {grid} blocks are needed, expected fewer than 2**31: split the tokens")
    with torch.cuda.device_of(arguments[0]):
        kernel(grid, threads, arguments)


def _special(row: Any, weight: Any = None) -> int:
    """k if there is a kernel for it alone, else 0. That kernel reads a token's numbers in words of up to 16 bytes."""
    aligned = row.data_ptr() % 16 == 0 and (weight is None or weight.data_ptr() % 16 == 0)
    return row.shape[1] if row.shape[1] in (1, 2, 4, 8) and aligned else 0


def _element(x: Any) -> tuple[tuple[str, str]]:
    return (("ELEMENT", ELEMENTS[str(x.dtype).removeprefix("torch.")]),)


def _width(*tensors: Any) -> int:
    """16 bytes' worth of elements if every row of every tensor starts at a multiple of 16 bytes, else 1."""
    row_bytes = tensors[0].shape[1] * tensors[0].element_size()
    aligned = gcd(16, row_bytes, *(tensor.data_ptr() for tensor in tensors if tensor is not None)) == 16
    return 16 // tensors[0].element_size() if aligned else 1


def _cut(tokens: int, pieces: int, threads: int, unroll: int) -> tuple[int, int, int]:
    """stride and slices of `Place` in rows.cuh, and how many blocks that takes."""
    stride = min(threads, power_of_two(-(-pieces // unroll)))
    slices = -(-pieces // (stride * unroll))
    return stride, slices, -(-tokens // (threads // stride)) * slices


def _fill_blocks(rows: Any) -> int:
    return -(-rows.shape[0] // ROWS_PER_FILL_BLOCK)
