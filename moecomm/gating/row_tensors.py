"""The torch side of rows.py: tensors on the CPU through memory that they share with numpy, others by CUDA kernels.

row and source are numpy arrays where the rows are on the CPU, and CUDA tensors otherwise.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moecomm.arrays import Array, dtype_name, sum_dtype
from moecomm.gating import host, ops


def copy_rows(x: Tensor, row: Array, source: Array) -> Tensor:
    """x [T, ...] -> [N, H]."""
    if len(source) == 0 or x.numel() == 0:
        return x.new_zeros((len(source), *x.shape[1:]))
    flat = x.detach().resolve_conj().resolve_neg().contiguous().flatten(1)
    if x.is_cuda:
        return ops.permute.kernel(flat, row, source, 1)
    rows = host.permute(flat.view(torch.uint8).numpy(), row, source, 1)
    return torch.from_numpy(rows).view(x.dtype)


def copy_rows_fp8(x: Tensor, row: Array, source: Array) -> tuple[Tensor, Tensor]:
    """x [T, H] -> bits [N, H] and scales [N, ceil(H / 128)]."""
    if x.numel() == 0:
        num_rows, hidden = len(source), x.shape[1]
        return x.new_zeros((num_rows, hidden), dtype=torch.uint8), x.new_ones((num_rows, -(-hidden // 128))).float()
    flat = x.detach().contiguous()
    if x.is_cuda:
        rows, scales = ops.permute_fp8.kernel(flat, row, source, 1)
        return rows.view(torch.uint8), scales
    bits, scales = host.permute_fp8(_memory(flat), row, source, 1)
    return torch.from_numpy(bits), torch.from_numpy(scales)


def sum_rows(rows: Tensor, row: Array, weight: Tensor | None, dtype: torch.dtype) -> Tensor:
    """rows [N, H] -> [T, H] of that dtype. weight is of the dtype in which rows are summed."""
    if not rows.is_cuda:
        return _sum_on_cpu(rows, row, weight, dtype)
    return _sum_on_cuda(rows.contiguous(), row, weight, dtype)


def _sum_on_cpu(rows: Tensor, row: NDArray[Any], weight: Tensor | None, dtype: torch.dtype) -> Tensor:
    if dtype_name(rows) not in host.SUMMED:
        rows = rows.to(sum_dtype(rows))
    rounded = dtype if host.is_stored(dtype_name(rows), str(dtype).removeprefix("torch.")) else sum_dtype(rows)
    stored = np.dtype("uint16" if rounded is torch.bfloat16 else str(rounded).removeprefix("torch."))
    factor = None if weight is None else _memory(weight)
    y = host.unpermute(_memory(rows), row, factor, None, 1, stored)
    return torch.from_numpy(y).view(rounded).to(dtype)


def _sum_on_cuda(rows: Tensor, row: Tensor, weight: Tensor | None, dtype: torch.dtype) -> Tensor:
    wide = sum_dtype(rows)
    if rows.numel() == 0:
        return rows.new_zeros((len(row), rows.shape[1]), dtype=dtype)
    if wide == torch.float64:
        # The kernels have no float64. Each choice meets a token once: nothing is added in an unknown order.
        total = rows.new_zeros((len(row), rows.shape[1]))
        for choice in range(row.shape[1]):
            token = torch.nonzero(row[:, choice] >= 0).flatten()
            part = rows.index_select(0, row[token, choice].long())
            total.index_add_(0, token, part if weight is None else part * weight[token, choice, None])
        return total.to(dtype)
    if dtype != rows.dtype or dtype_name(rows) not in host.SUMMED:
        # The kernel rounds to the dtype that it reads.
        rows = rows.to(wide)
    if weight is None:
        return ops.permute_backward.kernel(rows, row, 1).to(dtype)
    return ops.unpermute.kernel(rows, row, weight.contiguous(), row, None, 1).to(dtype)


def spread_rows(grad: Tensor, rows: Tensor, row: Array, source: Array, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of rows [N, ...] and of weight [T, K], for that of their weighted sum, grad [T, ...]."""
    shape, dtype, wide = rows.shape, rows.dtype, sum_dtype(rows)
    if rows.numel() == 0:
        return torch.zeros_like(rows), torch.zeros_like(weight)
    if dtype_name(rows) not in host.SUMMED:
        rows = rows.to(wide)
    rows, grad = rows.detach().flatten(1).contiguous(), grad.detach().flatten(1).contiguous()
    factor = weight.detach().to(wide).contiguous()
    spread = _spread_on_cuda if rows.is_cuda else _spread_on_cpu
    grad_rows, grad_weight = spread(grad, rows, row, source, factor)
    return grad_rows.to(dtype).reshape(shape), grad_weight.to(weight.dtype)


def _spread_on_cpu(
    grad: Tensor, rows: Tensor, row: NDArray[Any], source: NDArray[Any], factor: Tensor
) -> tuple[Tensor, Tensor]:
    if not host.is_stored(dtype_name(rows), dtype_name(grad)):
        grad = grad.to(sum_dtype(rows))
    arrays = _memory(grad), _memory(rows), row, _memory(factor), source
    grad_rows, grad_weight = host.unpermute_backward(*arrays, 1)
    return torch.from_numpy(grad_rows).view(rows.dtype), torch.from_numpy(grad_weight)


def _spread_on_cuda(grad: Tensor, rows: Tensor, row: Tensor, source: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    if rows.dtype == torch.float64:
        copies = copy_rows(grad.double(), row, source)
        products = (copies * rows).sum(1)
        grad_weight = torch.zeros_like(factor).reshape(-1).index_copy_(0, source.long(), products)
        return copies * factor.reshape(-1)[source.long(), None], grad_weight.reshape(factor.shape)
    if grad.dtype != rows.dtype:
        grad, rows = grad.float(), rows.float()
    return ops.unpermute_backward.kernel(grad, rows, row, factor, source, 1)


def _memory(tensor: Tensor) -> NDArray[Any]:
    """Of a tensor on the CPU; bfloat16 as uint16."""
    tensor = tensor.detach().contiguous()
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
