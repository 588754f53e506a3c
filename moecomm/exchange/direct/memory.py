"""The symmetric memory of DirectExchange, cut into buffers, and the structs by which kernels find it.

The other half is csrc/cuda/direct.cuh, which draws a buffer and defines the same structs.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import TYPE_CHECKING

from moecomm.comm import Comm
from moecomm.exchange.direct.kernels import MAX_SLICES, KernelShape
from moecomm.exchange.symmetric import SymmetricMemory
from moecomm.together import together

if TYPE_CHECKING:
    import torch
    from torch import Tensor

ALIGNMENT = 256
"""Bytes: where each array of a buffer may begin. More than a cache line, so that no two arrays share one."""
Layout = dict[str, int]
"""Where each array of a buffer begins, from the start of the symmetric memory."""


class Peers(ctypes.Structure):
    """The symmetric memory of all ranks, and what a kernel that waits for them needs."""

    _fields_ = (
        ("memory", ctypes.c_void_p * 8),
        ("failed", ctypes.c_void_p),
        ("report", ctypes.c_void_p),
        ("limit", ctypes.c_longlong),
        ("rank", ctypes.c_int),
    )


class Buffer(ctypes.Structure):
    """A buffer's counters, and the offsets of its arrays from the start of the symmetric memory."""

    _fields_ = (
        ("counters", ctypes.c_void_p),
        *((name, ctypes.c_longlong) for name in ("rows", "scales", "choices", "tokens", "arrived", "credit")),
    )


class PlanTable(ctypes.Structure):
    """Addresses of a plan's tensors."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("place", "weight", "slot", "offset", "count", "num_tokens")),
        *((name, ctypes.c_void_p) for name in ("expert", "tiles")),
        ("max_rows", ctypes.c_longlong),
    )


def layout(shape: KernelShape, num_buffers: int) -> tuple[list[Layout], list[Layout], int]:
    """Cut symmetric memory into buffers: num_buffers for dispatch, as many for combine, and the bytes of all."""
    end = 0
    # A tag beside every 4 bytes doubles what is tagged.
    factor = 2 if shape.tagged else 1
    row_scales = shape.slots * shape.scales * 4 * factor if shape.fp8 else 0
    choices = shape.slots * shape.top_k * 16

    def buffer(fp8: bool, scales: int, choices: int) -> Layout:
        nonlocal end
        sizes = {
            "rows": shape.slots * shape.pieces(fp8) * 16 * factor,
            "scales": scales,
            "choices": choices,
            "tokens": shape.ranks * 8,
            "arrived": shape.slots * MAX_SLICES * 4,
            "credit": shape.ranks * shape.num_sms * 4,
        }
        offsets = {}
        for name, size in sizes.items():
            offsets[name] = end
            end = -(-(end + size) // ALIGNMENT) * ALIGNMENT
        return offsets

    dispatch = [buffer(shape.fp8, row_scales, choices) for _ in range(num_buffers)]
    # Backward passes use the buffers of the other call: gradients of answers travel as tokens do, those of tokens as
    # answers do, with the gradients of weights in the place of scales.
    weights = shape.max_tokens * shape.top_k * 8
    combine = [buffer(False, weights, 0) for _ in range(num_buffers)]
    return dispatch, combine, end


class Buffers:
    """The buffers of one rank, and what all its kernels need to know."""

    def __init__(
        self,
        comm: Comm,
        shape: KernelShape,
        num_buffers: int,
        limit: float,
        memory: Callable[[Comm, int], SymmetricMemory],
    ) -> None:
        """limit: seconds that a kernel waits for another rank. Collective."""
        import torch

        def local() -> tuple[Tensor, ...]:
            """What no other rank reads or writes."""
            counters = (2, num_buffers, 4 + shape.num_sms)  # struct Counters, for dispatch and for combine
            tiles = (num_buffers, shape.table_blocks * shape.experts)
            return (
                torch.zeros(counters, dtype=torch.int32, device="cuda"),
                torch.zeros(1, dtype=torch.int32, device="cuda"),
                torch.empty(tiles, dtype=torch.int32, device="cuda"),
                # Pinned: kernels write it and the host reads it without waiting for them.
                torch.zeros(3, dtype=torch.int64).pin_memory(),
            )

        # A rank that has no memory left must tell the others before they wait for its symmetric memory.
        self.counters, self.failed, self.tiles, self.report = together(comm, "DirectExchange", local)
        dispatch, combine, num_bytes = layout(shape, num_buffers)
        self.symmetric = memory(comm, num_bytes)
        self.peers = Peers(
            (ctypes.c_void_p * 8)(*self.symmetric.pointers),
            self.failed.data_ptr(),
            self.report.data_ptr(),
            int(limit * 1e9),  # nanoseconds, as the clock of the GPU counts
            comm.rank,
        )
        self.dispatch = self._structs(dispatch, self.counters[0])
        self.combine = self._structs(combine, self.counters[1])
        # The zeros must lie there before a peer's first kernel, which may come from any stream, looks.
        torch.cuda.synchronize()

    @staticmethod
    def _structs(layouts: list[Layout], counters: Tensor) -> list[Buffer]:
        return [Buffer(counters[i].data_ptr(), **offsets) for i, offsets in enumerate(layouts)]

    def view(self, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A stretch of this rank's symmetric memory as a tensor."""
        size = dtype.itemsize
        for length in shape:
            size *= length
        return self.symmetric.own[offset : offset + size].view(dtype).view(shape)
