"""The kernels that move rows on CUDA: permute, unpermute and their backward passes, one launch each.

Arguments are contiguous CUDA tensors that the callers have checked. row [T, K] and source [N] are those of a Routing.
"""

from __future__ import annotations

from math import gcd
from typing import TYPE_CHECKING, NamedTuple

from moecomm.gating.cuda import WORDS, Kernel, element
from moecomm.gating.kernel import power_of_two

if TYPE_CHECKING:
    from torch import Tensor

ROWS_PER_FILL_BLOCK = 256
"""ROWS_PER_BLOCK of rows.cuh."""

KEPT_BYTES = range(16 * 2**20, 96 * 2**20)
"""Rows of this size are stored so that they stay in the second cache (50 MiB on an H200) for the kernel that reads them
next. Smaller ones stay there anyway, larger ones cannot."""

BLOCKS_BY_TOP_K = {1: (64, 4), 2: (64, 4), 4: (128, 2)}
"""For unpermute: threads of a block, and pieces of a thread. A thread has as many loads under way as fit its registers,
K times the pieces; other K: (256, 1). Measured on an H200."""


def permute(x: Tensor, row: Tensor, source: Tensor) -> Tensor:
    """rows [N, H]: x [T, H] in the order of the routing, zeros where source is -1."""
    rows = x.new_empty((source.shape[0], x.shape[1]))
    if rows.numel() == 0:
        return rows
    tokens = row.shape[0]
    num_rows = rows.shape[0]
    row_bytes = x.shape[1] * x.element_size()
    # The widest word of which rows are multiples, and at whose multiples both tensors start.
    width = gcd(16, row_bytes, x.data_ptr(), rows.data_ptr())
    words = row_bytes // width
    top_k = _special(row)
    threads, unroll = (64, 4) if top_k in (1, 2) else (256, 1)
    # With one copy a thread starts from the row that it writes. Rows are then written in order, and a line of x that
    # they read out of order is better left to the cache.
    by_row = top_k == 1
    cut = _cut(num_rows if by_row else tokens, words, threads, unroll)
    macros = (
        ("WORD", WORDS[width]),
        ("TOP_K", top_k),
        ("UNROLL", unroll),
        ("READ_ONCE", int(not by_row)),
        ("KEEP", int(rows.nbytes in KEPT_BYTES)),
    )
    kernel = Kernel("permute.cu", "permute", macros)
    grid = cut.blocks if by_row else cut.blocks + _fill_blocks(rows)
    numbers = (tokens, words, row.shape[1], num_rows, cut.stride, cut.slices, cut.blocks)
    _launch(kernel, grid, threads, (x, row, source, rows, *numbers))
    return rows


def permute_fp8(x: Tensor, row: Tensor, source: Tensor) -> tuple[Tensor, Tensor]:
    """rows [N, H] float8_e4m3fn and scales [N, ceil(H / 128)]; where source is -1, zeros and scale 1."""
    import torch

    tokens, top_k = row.shape
    hidden = x.shape[1]
    groups = -(-hidden // 128)
    rows = x.new_empty((source.shape[0], hidden), dtype=torch.float8_e4m3fn)
    scales = x.new_empty((source.shape[0], groups), dtype=torch.float32)
    if rows.numel() == 0:
        return rows, scales
    is_aligned = gcd(16, hidden * x.element_size(), x.data_ptr()) == 16
    # Neighbouring threads share a group of 128 values: 16 bytes of x each, or 4 values where those may lie anywhere.
    values_per_thread = 16 // x.element_size() if is_aligned else 4
    threads = 256
    blocks = -(-tokens * groups * (128 // values_per_thread) // threads)
    macros = (
        ("ELEMENT", element(x)),
        ("ALIGNED", int(is_aligned)),
        ("TOP_K", _special(row)),
    )
    kernel = Kernel("permute_fp8.cu", "permute_fp8", macros)
    numbers = (tokens, hidden, top_k, rows.shape[0], blocks)
    _launch(kernel, blocks + _fill_blocks(rows), threads, (x, row, source, rows, scales, *numbers))
    return rows, scales


def permute_backward(grad_rows: Tensor, row: Tensor) -> Tensor:
    """grad_x [T, H]: the sum over each token's rows."""
    return unpermute(grad_rows, row, None, None)


def unpermute(rows: Tensor, row: Tensor, weight: Tensor | None, residual: Tensor | None) -> Tensor:
    """y [T, H] = residual + sum over k of weight[t, k] * rows[row[t, k]]; weight and residual may be None."""
    y = rows.new_empty((row.shape[0], rows.shape[1]))
    if y.numel() == 0:
        return y
    tokens = row.shape[0]
    width = _width(rows, y, residual)
    pieces = rows.shape[1] // width
    top_k = _special(row, weight)
    threads, unroll = BLOCKS_BY_TOP_K.get(top_k, (256, 1))
    # Rows that have been read make room in the second cache, where that is faster. With 4 choices or more and 1 GiB it
    # is not: 559 us, and 540 without (H200, 32768 tokens, k = 8).
    read_once = row.shape[1] < 4 or rows.nbytes < 2**30
    macros = (
        ("ELEMENT", element(rows)),
        ("WIDTH", width),
        ("TOP_K", top_k),
        ("UNROLL", unroll),
        ("READ_ONCE", int(read_once)),
    )
    kernel = Kernel("unpermute.cu", "unpermute", macros)
    cut = _cut(tokens, pieces, threads, unroll)
    numbers = (tokens, pieces, row.shape[1], cut.stride, cut.slices)
    _launch(kernel, cut.blocks, threads, (rows, row, weight, residual, y, *numbers))
    return y


def unpermute_backward(
    grad_y: Tensor, rows: Tensor, row: Tensor, weight: Tensor, source: Tensor
) -> tuple[Tensor, Tensor]:
    """grad_rows [N, H], zeros where source is -1, and grad_weight [T, K] float32, 0 where row is -1."""
    import torch

    grad_rows = torch.empty_like(rows)
    if rows.numel() == 0:
        return grad_rows, torch.zeros_like(weight)
    grad_weight = torch.empty_like(weight)
    tokens, top_k = row.shape
    width = _width(grad_y, rows, grad_rows)
    pieces = rows.shape[1] // width
    # A block works on one token: more threads than its row has pieces would be idle.
    threads = min(256, max(32, power_of_two(pieces)))
    macros = (
        ("ELEMENT", element(rows)),
        ("WIDTH", width),
        ("TOP_K", _special(row, weight)),
        ("THREADS", threads),
    )
    kernel = Kernel("unpermute_backward.cu", "unpermute_backward", macros)
    tensors = (grad_y, rows, row, weight, source, grad_rows, grad_weight)
    _launch(kernel, tokens + _fill_blocks(rows), threads, (*tensors, tokens, pieces, top_k, rows.shape[0]))
    return grad_rows, grad_weight


def _launch(kernel: Kernel, grid: int, threads: int, arguments: tuple[Tensor | int | None, ...]) -> None:
    import torch

    if grid >= 2**31:
        raise ValueError(f"{kernel.name}: {grid} blocks are needed, expected fewer than 2**31: split the tokens")
    with torch.cuda.device_of(arguments[0]):
        kernel(grid, threads, arguments)


def _special(row: Tensor, weight: Tensor | None = None) -> int:
    """k if there is a kernel for it alone, else 0. That kernel reads a token's numbers in words of up to 16 bytes."""
    is_aligned = row.data_ptr() % 16 == 0 and (weight is None or weight.data_ptr() % 16 == 0)
    return row.shape[1] if row.shape[1] in (1, 2, 4, 8) and is_aligned else 0


def _width(*tensors: Tensor | None) -> int:
    """16 bytes' worth of elements if every row of every tensor starts at a multiple of 16 bytes, else 1."""
    present = [tensor for tensor in tensors if tensor is not None]
    element_bytes = present[0].element_size()
    row_bytes = present[0].shape[1] * element_bytes
    is_aligned = gcd(16, row_bytes, *(tensor.data_ptr() for tensor in present)) == 16
    return 16 // element_bytes if is_aligned else 1


class Cut(NamedTuple):
    """How the rows of tokens are dealt out to threads: `Place` in rows.cuh."""

    stride: int
    """Threads that work on one row together; a power of two."""
    slices: int
    """Blocks that share a row."""
    blocks: int


def _cut(tokens: int, pieces: int, threads: int, unroll: int) -> Cut:
    # Short rows leave threads over, which take other tokens of the same block.
    stride = min(threads, power_of_two(-(-pieces // unroll)))
    slices = -(-pieces // (stride * unroll))
    tokens_per_block = threads // stride
    return Cut(stride, slices, -(-tokens // tokens_per_block) * slices)


def _fill_blocks(rows: Tensor) -> int:
    """Blocks that look for empty rows."""
    return -(-rows.shape[0] // ROWS_PER_FILL_BLOCK)
