"""permute and unpermute: rows to the places that a Routing gives them, and back. Inside a rank, never communication."""

from __future__ import annotations

from typing import Any

import numpy as np

from moecomm.arrays import Array, dtype_name
from moecomm.gating import host
from moecomm.gating.route import DTYPES, contiguous, request, route
from moecomm.gating.routing import Routing


def permute(x: Array, routing: Routing, *, threads: int = 1) -> Array:
    """Copy each token's row to the places of its assignments.

    x        [T, H], numpy or torch as the routing; any H; any dtype, but of numpy's only native numbers and bools
             (no long double)
    routing  from `route`
    threads  on the CPU
    returns  [N, H], expert by expert: routing.offset[e] is the first row of expert e. With a capacity C: [E, C, H].
             Empty rows are zeros

    Differentiable in x if that is float32, float16 or bfloat16. Not collective. Raises ValueError or TypeError if x
    does not fit the routing.
    """
    x = _matrix("permute: x", x, routing.row, len(_tables("permute", routing).row))
    if isinstance(x, np.ndarray):
        rows = host.permute(x, routing.row, routing.source, threads)
    else:
        from moecomm.gating import ops

        rows = ops.call(ops.permute, x, routing.row, routing.source, threads)
    return _by_expert(rows, routing)


def route_permute(logits: Array, x: Array, top_k: int, **choices: Any) -> tuple[Routing, Array]:
    """`route`, then `permute`: on a GPU in one launch where that is faster than two.

    logits, top_k, choices  as for route
    x                       [T, H], as for permute
    returns                 the routing, and the rows [N, H] or [E, C, H]

    Differentiable in logits and x. Not collective. Raises what the two raise.
    """
    if isinstance(logits, np.ndarray):
        routing = route(logits, top_k, **choices)
        return routing, permute(x, routing, threads=choices.get("threads", 1))
    from moecomm.gating import ops

    inputs, checked = request(logits, top_k, **{**(route.__kwdefaults__ or {}), **choices})
    x = _matrix("route_permute: x", x, logits, len(logits))
    *fields, rows = ops.call(ops.route_permute, x, inputs, checked)
    routing = Routing(*(*fields, checked.capacity))
    return routing, _by_expert(rows, routing)


def permute_fp8(x: Array, routing: Routing, *, threads: int = 1) -> tuple[Array, Array]:
    """`permute` to 8-bit floats (e4m3), with a scale for every 128 numbers of a row.

    x        [T, H] float32, float16 or bfloat16
    returns  rows [N, H] float8_e4m3fn (numpy: their bits, uint8) and scales [N, ceil(H / 128)] float32, or both with
             [E, C] in place of [N]. x is about row * scale; scale is the largest magnitude of its 128 numbers / 448

    Not differentiable. Raises ValueError or TypeError if x does not fit the routing.
    """
    x = _matrix("permute_fp8: x", x, routing.row, len(_tables("permute_fp8", routing).row), DTYPES)
    if isinstance(x, np.ndarray):
        rows, scales = host.permute_fp8(x, routing.row, routing.source, threads)
    else:
        from moecomm.gating import ops

        rows, scales = ops.permute_fp8(x, routing.row, routing.source, threads)
    return _by_expert(rows, routing), _by_expert(scales, routing)


def unpermute(rows: Array, routing: Routing, residual: Array | None = None, *, threads: int = 1) -> Array:
    """Bring rows back to their tokens: for each token the weighted sum of its rows.

    rows      [N, H] or [E, C, H], as `permute` returned them; float32, float16 or bfloat16
    routing   the one given to permute
    residual  [T, H] like rows: added
    threads   on the CPU
    returns   [T, H]: residual + the sum over k of weight[t, k] * rows[row[t, k]], in float32, in order of k, rounded
              once; a token without experts gets its residual, or zeros

    Differentiable in rows, routing.weight and residual. Not collective. Raises ValueError or TypeError if rows or
    residual do not fit the routing.
    """
    routing = _tables("unpermute", routing)
    if routing.capacity is not None and getattr(rows, "ndim", 2) == 3:
        by_expert = (len(routing.count), routing.capacity)
        if tuple(rows.shape[:2]) != by_expert:
            raise ValueError(
                f"unpermute: rows has shape {tuple(rows.shape)}, expected ({by_expert[0]}, {by_expert[1]}, H)"
            )
        rows = rows.reshape(len(routing.source), rows.shape[2])
    rows = _matrix("unpermute: rows", rows, routing.row, len(routing.source), DTYPES)
    if residual is not None:
        residual = _matrix("unpermute: residual", residual, routing.row, len(routing.row), DTYPES)
        if residual.dtype != rows.dtype or residual.shape[1] != rows.shape[1]:
            got, wanted = (f"{dtype_name(a)} [..., {a.shape[1]}]" for a in (residual, rows))
            raise ValueError(f"unpermute: residual is {got}, expected {wanted} as rows are")
    if isinstance(rows, np.ndarray):
        return host.unpermute(rows, routing.row, routing.weight, residual, threads)
    from moecomm.gating import ops

    return ops.call(ops.unpermute, rows, routing.row, routing.weight, routing.source, residual, threads)


def _tables(call: str, routing: Routing) -> Routing:
    if not isinstance(routing, Routing) or routing.row is None or routing.source is None:
        raise TypeError(f"{call}: routing has no table of rows, expected what moecomm.route returns")
    return routing


def _matrix(name: str, array: Any, beside: Array, num_rows: int, dtypes: tuple[str, ...] | None = None) -> Array:
    """array, contiguous, if it is [num_rows, H], of the kind of `beside` and on its device."""
    if isinstance(array, np.ndarray) != isinstance(beside, np.ndarray) or not hasattr(array, "dtype"):
        raise TypeError(
            f"{name} is a {type(array).__name__}, expected a {type(beside).__name__} as the routing's tables"
        )
    if array.ndim != 2 or array.shape[0] != num_rows:
        raise ValueError(f"{name} has shape {tuple(array.shape)}, expected ({num_rows}, H)")
    if dtypes and dtype_name(array) not in dtypes:
        raise TypeError(f"{name} has dtype {dtype_name(array)}, expected {', '.join(dtypes)}")
    if not isinstance(array, np.ndarray) and array.device != beside.device:
        raise ValueError(f"{name} is on {array.device}, expected {beside.device} as the routing is")
    return contiguous(name, array)


def _by_expert(rows: Array, routing: Routing) -> Array:
    return rows if routing.capacity is None else rows.reshape(len(routing.count), routing.capacity, rows.shape[1])
