"""Rows to the places of a table and back, of any dtype and on any device: the kernels of permute for exchanges.

row [T, K] and source [N] are as in Routing, int32 and contiguous: numpy arrays where the rows are on the host, and
tensors on their device otherwise. The callers check the arguments. Nothing is recorded for a gradient.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moecomm.arrays import Array, as_dtype, is_torch, sum_dtype
from moecomm.gating import host

# ---- copies --------------------------------------------------------------------------------------------------------


def copy_rows(x: Array, row: Array, source: Array) -> Array:
    """x [T, ...] -> [N, ...]: row n is that of the token whose assignment source[n] is, or zeros where that is -1."""
    shape = (len(source), *x.shape[1:])
    if not is_torch(x):
        if 0 in shape:
            return np.empty(shape, x.dtype)
        bytes_of_rows = np.ascontiguousarray(x).reshape(len(x), math.prod(shape[1:])).view(np.uint8)
        return host.permute(bytes_of_rows, row, source, 1).view(x.dtype).reshape(shape)
    from moecomm.gating import row_tensors

    return row_tensors.copy_rows(x, row, source).reshape(shape)


def copy_rows_fp8(x: Array, row: Array, source: Array) -> tuple[Array, Array]:
    """`copy_rows` of x [T, H] as 8-bit floats: the bits [N, H] uint8, and scales [N, ceil(H / 128)] float32.

    x  float32, float16 or bfloat16
    """
    if is_torch(x):
        from moecomm.gating import row_tensors

        return row_tensors.copy_rows_fp8(x, row, source)
    return host.permute_fp8(np.ascontiguousarray(x), row, source, 1)


# ---- sums ----------------------------------------------------------------------------------------------------------


def sum_rows(rows: Array, row: Array, source: Array, weight: Array | None = None, dtype: Any = None) -> Array:
    """rows [N, ...] -> [T, ...]: for each token the sum of its rows in order of choice, times their weights.

    weight  [T, K] floats, or None: 1
    dtype   of the result; None: that of rows

    Summed in float32 (float64 for float64 rows) and rounded once.
    """
    dtype = rows.dtype if dtype is None else dtype
    if weight is None and row.shape[1] == 1 and len(rows) == len(source) == len(row):
        # Each token has one row: nothing is added, and the table read the other way round says where each row goes.
        return as_dtype(copy_rows(rows, source.reshape(-1, 1), row.reshape(-1)), dtype)
    wide = sum_dtype(rows)
    shape = (len(row), *rows.shape[1:])
    rows = rows.reshape(len(rows), math.prod(shape[1:]))
    weight = None if weight is None else as_dtype(weight, wide)
    if not is_torch(rows):
        return _sum_arrays(rows, row, weight, np.dtype(dtype)).reshape(shape)
    from moecomm.gating import row_tensors

    return row_tensors.sum_rows(rows.detach(), row, weight, dtype).reshape(shape)


def _sum_arrays(rows: NDArray[Any], row: NDArray[Any], weight: NDArray[Any] | None, dtype: np.dtype) -> NDArray[Any]:
    wide = np.dtype(sum_dtype(rows))
    rows = np.ascontiguousarray(rows, rows.dtype if rows.dtype.name in host.SUMMED else wide)
    rounded = dtype if host.is_stored(rows.dtype.name, dtype.name) else wide
    weight = None if weight is None else np.ascontiguousarray(weight)
    return host.unpermute(rows, row, weight, None, 1, rounded).astype(dtype, copy=False)
