"""Rows that travel as 8-bit floats (e4m3), with a scale for every 128 numbers of a row, as `permute_fp8` makes them."""

from __future__ import annotations

from typing import Any

from moecomm.arrays import Array, dtype_name, is_torch
from moecomm.exchange.path import Path
from moecomm.exchange.table import RowTable
from moecomm.gating.rows import copy_rows_fp8

DTYPE = "float8_e4m3fn"
SOURCES = ("float32", "float16", "bfloat16")


def checked_dtype(exchange: str, fp8: Any) -> str | None:
    """The name of the dtype. fp8: None, the name, or torch.float8_e4m3fn."""
    name = None if fp8 is None else str(fp8).removeprefix("torch.")
    if name not in (None, DTYPE):
        raise ValueError(f"{exchange}: fp8 is {fp8}, expected None or {DTYPE}")
    return name


def check_tokens(x: Array, weight: Array) -> None:
    """What rows of 8 bits cannot be made of."""
    if dtype_name(x) not in SOURCES:
        raise TypeError(f"x has dtype {dtype_name(x)}, expected {', '.join(SOURCES)}, which fp8 rows are made of")
    if x.ndim != 2:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected (T, H): fp8 rows have one axis")
    check_gradients(x=x, **{"routing.weight": weight})


def check_gradients(**arrays: Array) -> None:
    """ValueError where one asks for a gradient."""
    asking = [name for name, array in arrays.items() if is_torch(array) and array.requires_grad]
    if not asking:
        return
    import torch

    if torch.is_grad_enabled():
        raise ValueError(f"{' and '.join(asking)} asks for a gradient, which fp8 rows do not have")


def send(x: Array, path: Path) -> tuple[Array, Array]:
    """x [T, H] along the path -> rows [N, H] float8_e4m3fn (numpy: their bits, uint8) and scales [N, ceil(H / 128)].

    Quantised once, where they leave. Empty rows are zeros; their scales mean nothing. Collective.
    """
    table, onward = path.steps[0], path.part(1, None)
    assert isinstance(table, RowTable)
    # Travels as bytes: not every library knows the dtype.
    bits, scales = copy_rows_fp8(x, table.row, table.source)
    rows = onward.send(bits)
    return _as_float8(rows), onward.send(scales)


def _as_float8(bits: Array) -> Array:
    """numpy has no such dtype."""
    if not is_torch(bits):
        return bits
    import torch

    return bits.view(torch.float8_e4m3fn)
