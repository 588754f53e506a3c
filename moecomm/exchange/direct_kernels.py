"""What DirectExchange keeps in symmetric memory, and its kernels' arguments. The other half is csrc/cuda/direct.cuh."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

from moecomm.comm import Comm
from moecomm.exchange.symmetric import SymmetricMemory
from moecomm.gating.cuda import ELEMENTS
from moecomm.gating.kernel import Kernel, Macros, power_of_two
from moecomm.together import together

TAGGED_BYTES = 2**19
"""A rank whose tokens take at most this sends them with a tag in every 8 bytes. Such rows cost twice the bytes and
are there without a fence and a flag: 2 us less."""


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
        *((name, ctypes.c_void_p) for name in ("place", "weight", "slot", "offset", "count", "num_tokens")),
        ("expert", ctypes.c_void_p),
        ("tiles", ctypes.c_void_p),
        ("max_rows", ctypes.c_longlong),
    )


@dataclass(frozen=True)
class Cut:
    """How the blocks of a kernel share its work."""

    threads: int
    """Of a block."""
    chunk: int
    """Tokens that a block moves at a time."""
    slices: int
    """Blocks that share a chunk."""
    unroll: int
    """Pieces of a row that a thread has under way."""
    pushers: int
    """Blocks that push; the others sort or receive from the start."""


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
        """So many that a warp of 16 makes about eight steps, each with as many tokens as have 32 choices."""
        steps = -(-self.ranks * self.max_tokens // (32 // self.top_k))
        return max(1, min(steps // (16 * 8), self.num_sms // 8))

    def cut(self, kind: str) -> Cut:
        """How a kernel shares its work: "compact", "expanded", "spread" (dispatch), "combine", "combine expanded"."""
        fp8 = self.fp8 and kind in ("compact", "expanded")
        pieces, blocks = self.pieces(fp8), self.num_sms - self.table_blocks
        share = {"compact": 1.0, "expanded": 0.4 if fp8 else 0.25}.get(kind, 0.5)
        pushers = max(1, min(int(self.num_sms * share), blocks))
        # Few tokens: one chunk for each block. Many: 16 chunks or more for each block, to share evenly, but large ones:
        # a block that pushes stops for 2 us after each, until it can say that its rows are there.
        chunk = min(8 if kind == "expanded" and fp8 else 4, power_of_two(-(-self.max_tokens // blocks)))
        largest = 16 if kind.startswith("combine") else 32
        sharing = blocks if kind in ("compact", "expanded") else pushers
        while chunk < largest and 2 * chunk * 16 * sharing <= self.max_tokens:
            chunk *= 2
        if self.tagged:
            chunk = 1
        items = -(-self.max_tokens // chunk)
        few = items <= blocks
        light = few if fp8 else chunk <= 4 and not few
        threads = 512 if self.tagged or kind == "combine" or (kind == "compact" and light) else 1024
        slices = max(1, min(-(-pieces * chunk // threads), blocks // items, 16))
        most = {"compact": 4, "expanded": 4, "combine": max(1, 8 // self.ranks)}.get(kind, 1)
        unroll = max(1, min(2 if fp8 else most, -(-pieces * chunk // (threads * slices))))
        pushers = blocks if few else pushers
        return Cut(threads, chunk, slices, unroll, pushers)

    def macros(self, kind: str, aligned: bool) -> Macros:
        """Those of direct.cuh."""
        cut, fp8 = self.cut(kind), self.fp8 and kind in ("compact", "expanded")
        return (
            ("ELEMENT", ELEMENTS[self.dtype]), ("FP8", int(fp8)), ("HIDDEN", self.hidden), ("TOP_K", self.top_k),
            ("MAX_TOKENS", self.max_tokens), ("RANKS", self.ranks), ("EXPERTS", self.experts),
            ("ALIGNED", int(aligned)), ("TAGGED", int(self.tagged)), ("BLOCKS", self.num_sms),
            ("THREADS", cut.threads), ("CHUNK", cut.chunk), ("SLICES", cut.slices), ("UNROLL", cut.unroll),
        )  # fmt: skip

    @cache  # noqa: B019 - a shape lives as long as its kernels, which are kept for the life of the process
    def dispatch(self, kind: str, aligned: bool) -> tuple[Kernel, Cut, int]:
        """The kernel, and its dynamic shared memory."""
        output = ("compact", "expanded", "spread").index(kind)
        macros = (*self.macros(kind, aligned), ("OUTPUT", output), ("TABLE_BLOCKS", self.table_blocks))
        cut = self.cut(kind)
        shared = 0 if kind == "spread" else 4 * (cut.threads // 32 * self.experts + self.experts + 1)
        return Kernel("direct_dispatch.cu", "direct_dispatch", macros), cut, shared

    @cache  # noqa: B019 - a shape lives as long as its kernels, which are kept for the life of the process
    def combine(self, compact: bool, weigh: bool, give_back: bool, aligned: bool) -> tuple[Kernel, Cut]:
        """The kernel."""
        kind = "combine" if compact else "combine expanded"
        choices = (("INPUT", int(not compact)), ("WEIGH", int(weigh)), ("RETURN", int(give_back)))
        return Kernel("direct_combine.cu", "direct_combine", (*self.macros(kind, aligned), *choices)), self.cut(kind)

    @cache  # noqa: B019 - a shape lives as long as its kernels, which are kept for the life of the process
    def free(self) -> Kernel:
        """The kernel that frees compact rows."""
        return Kernel("direct_free.cu", "direct_free", self.macros("compact", True))

    def kernels(self) -> list[Kernel]:
        """All, for rows that lie side by side from a multiple of 16 bytes on."""
        outputs = ("compact", "expanded", "spread")[: 2 if self.fp8 else 3]
        forms = ((True, False, False), (False, True, False), (False, False, True))
        aligned = self.hidden * _itemsize(self.dtype) % 16 == 0
        in_place = not self.tagged  # compact rows are not the caller's then
        of_wire = dict.fromkeys(outputs, aligned and (not self.fp8 or self.hidden % 16 == 0))
        of_wire["compact"] = aligned if in_place else of_wire["compact"]
        return [
            *(self.dispatch(output, of_wire[output])[0] for output in outputs),
            *(self.combine(*form, aligned)[0] for form in forms[: len(outputs)]),
            self.free(),
        ]

    def layout(self, num_buffers: int) -> tuple[list[dict[str, int]], list[dict[str, int]], int]:
        """Symmetric memory cut into buffers, num_buffers for dispatch and as many for combine: offsets of the parts of
        each, and the bytes in all."""
        end = 0
        factor = 2 if self.tagged else 1
        slots = self.ranks * self.max_tokens

        def buffer(fp8: bool, scales: int, choices: int) -> dict[str, int]:
            nonlocal end
            offsets = {}
            for name, size in (
                ("rows", slots * self.pieces(fp8) * 16 * factor),
                ("scales", scales),
                ("choices", choices),
                ("tokens", self.ranks * 8),
                ("arrived", slots * 16 * 4),
                ("credit", self.ranks * self.num_sms * 4),
            ):
                offsets[name] = end
                end = -(-(end + size) // 256) * 256
            return offsets

        scales = slots * self.scales * 4 * factor if self.fp8 else 0
        choices = slots * self.top_k
        to = [buffer(self.fp8, scales, choices * 16) for _ in range(num_buffers)]
        # Gradients go through buffers of the other kind too: rows of answers there, of tokens here.
        back = [buffer(False, self.max_tokens * self.top_k * 8, 0) for _ in range(num_buffers)]
        return to, back, end


class Buffers:
    """The buffers of one rank, and what all its kernels need to know."""

    def __init__(
        self,
        comm: Comm,
        shape: Shape,
        num_buffers: int,
        limit: float,
        memory: Callable[[Comm, int], SymmetricMemory],
    ) -> None:
        import torch

        def own() -> tuple[Any, Any, Any, Any]:
            counters = (2, num_buffers, 4 + shape.num_sms)  # struct Counters
            tiles = (num_buffers, shape.table_blocks * shape.experts)
            return (
                torch.zeros(counters, dtype=torch.int32, device="cuda"),
                torch.zeros(1, dtype=torch.int32, device="cuda"),
                torch.empty(tiles, dtype=torch.int32, device="cuda"),
                torch.zeros(3, dtype=torch.int64).pin_memory(),
            )

        self.counters, self.failed, self.tiles, self.report = together(comm, "DirectExchange", own)
        to, back, num_bytes = shape.layout(num_buffers)
        self.symmetric = memory(comm, num_bytes)
        self.memory = Memory(
            (ctypes.c_void_p * 8)(*self.symmetric.pointers),
            self.failed.data_ptr(),
            self.report.data_ptr(),
            int(limit * 1e9),
            comm.rank,
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
