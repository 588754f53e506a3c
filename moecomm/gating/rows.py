"""Rows to the places of a table and back, of any dtype and on any device: what permute, unpermute and exchanges share.

row [T, K] and source [N] are as in Routing: int32, contiguous, like the rows and on their device. Arguments are checked by
the callers. Nothing here records gradients.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moecomm.arrays import Array, as_bytes, as_dtype, as_rows, dtype_name, empty_rows, is_torch, row_bytes, sum_dtype
from moecomm.gating import host

if TYPE_CHECKING:
    from torch import Tensor

SUMMED = ("float32", "float16", "bfloat16", "float64")
"""What the kernels sum as it is. Other numbers are converted before."""


def copy_rows(x: Array, row: Array, source: Array) -> Array:
    """x [T, ...] -> [N, ...]: row n is that of the token whose assignment source[n] is."""
    x = as_rows(x, "rows")
    width = row_bytes(x)
    if len(source) == 0 or width == 0:
        return empty_rows(len(source), x)
    if is_torch(x) and x.is_cuda:
        from moecomm.gating import cuda_rows

        return cuda_rows.permute(x.detach().flatten(1), row, source).reshape(-1, *x.shape[1:])
    rows = host.permute(as_bytes(x).reshape(-1, width), _host(row), _host(source), 1)
    return _like(rows, x)


def sum_rows(rows: Array, row: Array, source: Array, weight: Array | None = None, dtype: Any = None) -> Array:
    """rows [N, ...] -> [T, ...]: for each token the sum of its rows in order of choice, times their weights.

    weight  [T, K] floats, or None: 1
    dtype   of the result; None: that of rows

    Summed in float32 (float64 for float64 rows) and rounded once.
    """
    dtype = rows.dtype if dtype is None else dtype
    if weight is None and row.shape[1] == 1 and len(source) == len(row):
        # Each token has one row: nothing is added, and the table read the other way round says where each row goes.
        return as_dtype(copy_rows(rows, source.reshape(-1, 1), row.reshape(-1)), dtype)
    rows = as_rows(rows, "rows")
    wide = sum_dtype(rows)
    if dtype_name(rows) not in SUMMED:
        rows = as_dtype(rows, wide)
    if rows.shape[0] == 0 or row_bytes(rows) == 0:
        return as_dtype(_zeros(len(row), rows), dtype)
    if weight is not None:
        weight = as_dtype(weight, wide)
        weight = weight.contiguous() if is_torch(weight) else np.ascontiguousarray(weight)
    if is_torch(rows):
        return _sum_tensors(rows.detach(), row, weight, dtype)
    flat = rows.reshape(len(rows), -1)
    narrow = dtype if _is_stored(rows.dtype, dtype) else wide
    y = host.unpermute(flat, row, weight, None, 1, narrow).reshape(-1, *rows.shape[1:])
    return as_dtype(y, dtype)


def spread_rows(grad: Tensor, rows: Tensor, row: Tensor, source: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of rows [N, ...] and of weight [T, K], for that of their weighted sum, grad [T, ...]."""
    import torch

    wide = sum_dtype(rows)
    factor = weight.to(wide).contiguous()
    if rows.numel() == 0 or rows.dtype not in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        rows = rows.to(wide)
    flat, grad = rows.detach().flatten(1).contiguous(), grad.detach().flatten(1)
    if flat.numel() == 0:
        return torch.zeros_like(rows), torch.zeros_like(weight)
    if not rows.is_cuda:
        grads = host.unpermute_backward(
            _host(grad.to(_read_as(rows, grad)).contiguous()), _host(flat), _host(row), _host(factor), _host(source), 1
        )
        return _like(grads[0], rows), torch.from_numpy(grads[1]).to(weight.dtype)
    if wide == torch.float64:
        copies = copy_rows(grad.contiguous(), row, source)
        products = (copies * flat).sum(1)
        grad_weight = factor.new_zeros(factor.numel()).index_copy_(0, source.long(), products)
        grad_rows = copies * factor.reshape(-1)[source.long()][:, None]
        return grad_rows.reshape(rows.shape), grad_weight.reshape(weight.shape).to(weight.dtype)
    from moecomm.gating import cuda_rows

    if grad.dtype != flat.dtype:
        grad, flat = grad.to(wide), flat.to(wide)
    grad_rows, grad_weight = cuda_rows.unpermute_backward(grad.contiguous(), flat, row, factor, source)
    return grad_rows.to(rows.dtype).reshape(rows.shape), grad_weight.to(weight.dtype)


def _sum_tensors(rows: Tensor, row: Tensor, weight: Tensor | None, dtype: Any) -> Tensor:
    import torch

    flat, shape = rows.flatten(1), (len(row), *rows.shape[1:])
    wide = sum_dtype(rows)
    if not rows.is_cuda:
        narrow = dtype if _is_stored(rows.dtype, dtype) else wide
        stored: Any = np.uint16 if narrow == torch.bfloat16 else str(narrow).removeprefix("torch.")
        y = host.unpermute(
            _host(flat), _host(row), None if weight is None else _host(weight), None, 1, np.dtype(stored)
        )
        tensor = torch.from_numpy(y)
        return (tensor if tensor.dtype == narrow else tensor.view(narrow)).reshape(shape).to(dtype)
    if wide == torch.float64:  # rare on a GPU: no kernel of its own
        total = flat.new_zeros(len(row), flat.shape[1])
        for choice in range(row.shape[1]):
            token = torch.nonzero(row[:, choice] >= 0).flatten()
            part = flat.index_select(0, row[token, choice].long())
            total.index_add_(0, token, part if weight is None else part * weight[token, choice, None])
        return total.reshape(shape).to(dtype)
    from moecomm.gating import cuda_rows

    if dtype != rows.dtype:  # the kernel rounds to the dtype that it reads
        flat = flat.to(wide)
    return cuda_rows.unpermute(flat, row, weight, None).reshape(shape).to(dtype)


def _is_stored(summed: Any, dtype: Any) -> bool:
    """Whether the kernel that sums numbers of the one dtype can round to the other."""
    names = [
        str(name).removeprefix("torch.")
        for name in (summed, np.dtype(dtype) if summed.__class__ is np.dtype else dtype)
    ]
    if "float64" in names:
        return names[0] == names[1]
    return names[1] in SUMMED


def _read_as(rows: Tensor, grad: Tensor) -> Any:
    """The dtype in which the kernel can read the gradient of a sum of `rows`."""
    return grad.dtype if _is_stored(rows.dtype, grad.dtype) else sum_dtype(rows)


def _host(array: Array) -> NDArray[Any]:
    """Its memory; bfloat16 as uint16."""
    if not is_torch(array):
        return array
    import torch

    array = array.detach()
    return (array.view(torch.uint16) if array.dtype == torch.bfloat16 else array).numpy()


def _like(rows: NDArray[Any], like: Array) -> Array:
    """Rows that the host made, as the kind, dtype and row shape of `like`."""
    if not is_torch(like):
        return rows.view(like.dtype).reshape(-1, *like.shape[1:])
    import torch

    return torch.from_numpy(rows).view(like.dtype).reshape(-1, *like.shape[1:])


def _zeros(num_rows: int, like: Array) -> Array:
    zeros = empty_rows(num_rows, like)
    zeros[...] = 0
    return zeros
