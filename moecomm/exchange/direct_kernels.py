"""What DirectExchange keeps in symmetric memory, and its kernels' arguments. The other half is csrc/cuda/direct.cuh."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from moecomm.exchange.symmetric import SymmetricMemory
from moecomm.gating.cuda import ELEMENTS
from moecomm.gating.kernel import Kernel, Macros

THREADS = 512
WARPS = THREADS // 32
TAGGED_BYTES = 2**19
"""A rank whose tokens take at most this sends them with a tag in every 8 bytes. Such rows cost twice the bytes and
are there without a fence and a flag: 2 us less."""

COUNTERS = 8
"""32-bit words for Counters."""


class Memory(ctypes.Structure):
    """Where everything is, on every rank."""

    _fields_ = (
        ("of", ctypes.c_void_p * 8),
        ("failed", ctypes.c_void_p),
        ("report", ctypes.c_void_p),
        ("limit", ctypes.c_longlong),
        ("rank", ctypes.c_int),
    )


class Buffer(ctypes.Structure):
    """A buffer's counters, and the offsets of its parts from the start of the symmetric memory."""

    _fields_ = (
        ("counters", ctypes.c_void_p),
        ("rows", ctypes.c_longlong),
        ("scales", ctypes.c_longlong),
        ("choices", ctypes.c_longlong),
        ("tokens", ctypes.c_longlong),
        ("arrived", ctypes.c_longlong),
        ("credit", ctypes.c_longlong),
    )


class Table(ctypes.Structure):
    """Addresses of a plan's tensors."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("place", "weight", "slot", "offset", "count", "num_tokens", "tiles")),
        ("max_rows", ctypes.c_longlong),
    )


@dataclass(frozen=True)
class Shape:
    """What the kernels of an exchange are compiled for."""

    dtype: str
    fp8: bool
    hidden: int
    top_k: int
    max_tokens: int
    ranks: int
    experts: int
    """Of a rank."""
    num_sms: int

    def pieces(self, fp8: bool) -> int:
        """16-byte pieces of a row that travels."""
        return -(-self.hidden * (1 if fp8 else _itemsize(self.dtype)) // 16)

    @property
    def scales(self) -> int:
        """Of a row."""
        return -(-self.hidden // 128)

    @property
    def tagged(self) -> bool:
        """Whether rows travel with tags."""
        return self.max_tokens * self.pieces(self.fp8) * 16 <= TAGGED_BYTES

    @property
    def table_blocks(self) -> int:
        """So many that a warp makes about eight steps, each with as many tokens as have 32 choices."""
        steps = -(-self.ranks * self.max_tokens // (32 // self.top_k))
        return max(1, min(steps // (WARPS * 8), self.num_sms // 4))

    def cut(self, fp8: bool) -> tuple[int, int]:
        """CHUNK and SLICES: about two pieces of work for each block where there are few tokens."""
        chunk = 1 if self.tagged else max(1, min(16, 1 << max(self.max_tokens // 128, 1).bit_length() - 1))
        lanes = THREADS // chunk
        slices = max(1, min(-(-self.pieces(fp8) // lanes), 2 * self.num_sms // -(-self.max_tokens // chunk)))
        return chunk, slices

    def macros(self, fp8: bool, aligned: bool, most: int) -> Macros:
        """Those of direct.cuh. most: pieces that a thread may have under way"""
        chunk, slices = self.cut(fp8)
        unroll = max(1, min(most, -(-self.pieces(fp8) // (THREADS // chunk * slices))))
        return (
            ("ELEMENT", ELEMENTS[self.dtype]), ("FP8", int(fp8)), ("HIDDEN", self.hidden), ("TOP_K", self.top_k),
            ("MAX_TOKENS", self.max_tokens), ("RANKS", self.ranks), ("EXPERTS", self.experts),
            ("ALIGNED", int(aligned)), ("TAGGED", int(self.tagged)), ("CHUNK", chunk), ("SLICES", slices),
            ("UNROLL", unroll),
        )  # fmt: skip

    def dispatch(self, output: int, aligned: bool) -> tuple[Kernel, int, int]:
        """The kernel, its pushing blocks, and its dynamic shared memory."""
        fp8 = self.fp8 and output != 2
        table = 0 if output == 2 else self.table_blocks
        most = 2 if fp8 else 4
        macros = (*self.macros(fp8, aligned, most), ("OUTPUT", output), ("TABLE_BLOCKS", table))
        pushers = self.num_sms - table
        if output != 0 and not self.tagged:
            pushers = min(pushers, max(8, self.num_sms // 5))  # the others copy meanwhile
        shared = 0 if output == 2 else 4 * (WARPS * self.experts + self.experts + 1)
        return Kernel("direct_dispatch.cu", "direct_dispatch", macros), pushers, shared

    def combine(self, compact: bool, weigh: bool, give_back: bool, aligned: bool) -> tuple[Kernel, int]:
        """The kernel, and its pushing blocks."""
        most = max(1, 8 // self.ranks) if compact else 1
        choices = (("INPUT", int(not compact)), ("WEIGH", int(weigh)), ("RETURN", int(give_back)))
        kernel = Kernel("direct_combine.cu", "direct_combine", (*self.macros(False, aligned, most), *choices))
        return kernel, self.num_sms if self.tagged else min(self.num_sms, max(8, self.num_sms // 4))

    def kernels(self) -> list[Kernel]:
        """All, for aligned rows."""
        outputs = (0, 1) if self.fp8 else (0, 1, 2)
        forms = ((True, False, False), (False, True, False), (False, False, True))
        return [
            *(self.dispatch(output, True)[0] for output in outputs),
            *(self.combine(*form, True)[0] for form in forms[: len(outputs)]),
            self.free(),
        ]

    def free(self) -> Kernel:
        """The kernel that frees compact rows."""
        return Kernel("direct_free.cu", "direct_free", self.macros(False, True, 1))


@dataclass(frozen=True, eq=False)
class Slots:
    """Symmetric memory cut into buffers: num_buffers for dispatch, as many for combine."""

    shape: Shape
    num_buffers: int

    @cached_property
    def layout(self) -> tuple[list[dict[str, int]], list[dict[str, int]], int]:
        """Offsets of the parts of each buffer of dispatch and of combine, and the bytes in all."""
        shape, end = self.shape, 0
        factor = 2 if shape.tagged else 1
        slots = shape.ranks * shape.max_tokens

        def buffer(fp8: bool, scales: int, choices: int) -> dict[str, int]:
            nonlocal end
            offsets = {}
            for name, size in (
                ("rows", slots * shape.pieces(fp8) * 16 * factor),
                ("scales", scales),
                ("choices", choices),
                ("tokens", shape.ranks * 8),
                ("arrived", slots * shape.cut(fp8)[1] * 4),
                ("credit", shape.ranks * 4),
            ):
                offsets[name] = end
                end = -(-(end + size) // 256) * 256
            return offsets

        scales = slots * shape.scales * 4 * factor if shape.fp8 else 0
        choices = slots * shape.top_k
        to = [buffer(shape.fp8, scales, choices * 16) for _ in range(self.num_buffers)]
        # Gradients go through buffers of the other kind too: rows of answers there, of tokens here.
        back = [buffer(False, shape.max_tokens * shape.top_k * 8, 0) for _ in range(self.num_buffers)]
        return to, back, end


class Buffers:
    """The buffers of one rank, and what all its kernels need to know."""

    def __init__(
        self,
        slots: Slots,
        rank: int,
        limit: float,
        allocate: Callable[[int], SymmetricMemory],
    ) -> None:
        import torch

        to, back, num_bytes = slots.layout
        self.symmetric = allocate(num_bytes)
        self.counters = torch.zeros((2, slots.num_buffers, COUNTERS), dtype=torch.int32, device="cuda")
        self.failed = torch.zeros(1, dtype=torch.int32, device="cuda")
        tiles = slots.shape.table_blocks * slots.shape.experts
        self.tiles = torch.empty((slots.num_buffers, tiles), dtype=torch.int32, device="cuda")
        self.report = torch.zeros(3, dtype=torch.int64).pin_memory()
        self.memory = Memory(
            (ctypes.c_void_p * 8)(*self.symmetric.pointers),
            self.failed.data_ptr(),
            self.report.data_ptr(),
            int(limit * 1e9),
            rank,
        )
        self.to = [Buffer(self.counters[0, i].data_ptr(), **part) for i, part in enumerate(to)]
        self.back = [Buffer(self.counters[1, i].data_ptr(), **part) for i, part in enumerate(back)]
        torch.cuda.synchronize()

    def part(self, offset: int, shape: tuple[int, ...], dtype: Any) -> Any:
        """A piece of this rank's symmetric memory as a tensor."""
        import torch

        size = torch.empty((), dtype=dtype).element_size()
        for length in shape:
            size *= length
        return self.symmetric.own[offset : offset + size].view(dtype).view(shape)


def _itemsize(dtype: str) -> int:
    return 4 if dtype == "float32" else 2
