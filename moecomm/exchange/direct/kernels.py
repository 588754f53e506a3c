"""The kernels of DirectExchange: what they are compiled for, and how their blocks share the work."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from moecomm.gating.cuda import ELEMENTS
from moecomm.gating.kernel import Kernel, Macros, power_of_two

TAGGED_BYTES = 2**19
"""A rank whose tokens take at most this sends them with a tag in every 8 bytes. Such rows cost twice the bytes and
arrive without a fence and a flag: 2 us less."""
OUTPUTS = ("compact", "expanded", "spread")
"""Kinds of direct_dispatch.cu, in the order of its macro OUTPUT; "spread" is the backward pass of combine."""
FORMS = ((True, False, False), (False, True, False), (False, False, True))
"""Forms of direct_combine.cu: compact, weighted, returns gradients of weights. The last is dispatch's backward pass."""
MAX_SLICES = 16
"""MOST_SLICES of direct.cuh."""


@dataclass(frozen=True)
class WorkSplit:
    """How the blocks of a kernel share its work."""

    threads: int
    """Of a block."""
    chunk: int
    """Tokens that a block moves at a time."""
    slices: int
    """Blocks that share a chunk."""
    unroll: int
    """Pieces of a row that a thread has in flight."""
    pushers: int
    """Blocks that push; the others build the table or receive from the start."""


@dataclass(frozen=True)
class DirectKernel:
    """A kernel with the size of its launches."""

    kernel: Kernel
    blocks: int
    split: WorkSplit
    shared_bytes: int = 0

    def __call__(self, *arguments: object) -> None:
        """Launch on torch's current stream."""
        self.kernel(self.blocks, self.split.threads, arguments, self.shared_bytes)


@dataclass(frozen=True)
class KernelShape:
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

    @property
    def itemsize(self) -> int:
        """Bytes of a value of the caller's rows."""
        return 4 if self.dtype == "float32" else 2

    @property
    def slots(self) -> int:
        """One for each token that any rank may bring."""
        return self.ranks * self.max_tokens

    def pieces(self, fp8: bool) -> int:
        """16-byte pieces of a row that travels."""
        return -(-self.hidden * (1 if fp8 else self.itemsize) // 16)

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
        """As many as give each of their 16 warps about eight steps; a step takes the tokens that have 32 choices."""
        steps = -(-self.slots // (32 // self.top_k))
        return max(1, min(steps // (16 * 8), self.num_sms // 8))

    def split(self, kind: str) -> WorkSplit:
        """How a kernel shares its work: one of OUTPUTS (dispatch), "combine" or "combine expanded"."""
        fp8 = self._travels_as_fp8(kind)
        pieces = self.pieces(fp8)
        # Table blocks never push.
        blocks = self.num_sms - self.table_blocks
        # Compact rows need no copy where they arrive: all blocks push. The other kinds also receive.
        share = {"compact": 1.0, "expanded": 0.4 if fp8 else 0.25}.get(kind, 0.5)
        pushers = max(1, min(int(self.num_sms * share), blocks))
        chunk = self._chunk(kind, blocks if kind in OUTPUTS[:2] else pushers)
        items = -(-self.max_tokens // chunk)
        few = items <= blocks
        light = few if fp8 else chunk <= 4 and not few
        # Blocks of 512 threads have twice the registers a thread, for several pieces in flight.
        threads = 512 if self.tagged or kind == "combine" or (kind == "compact" and light) else 1024
        # With fewer items than blocks the blocks that would be idle take slices of rows.
        slices = max(1, min(-(-pieces * chunk // threads), blocks // items, MAX_SLICES))
        # combine holds a piece from each rank at a time.
        most = {"compact": 4, "expanded": 4, "combine": max(1, 8 // self.ranks)}.get(kind, 1)
        unroll = max(1, min(2 if fp8 else most, -(-pieces * chunk // (threads * slices))))
        return WorkSplit(threads, chunk, slices, unroll, blocks if few else pushers)

    def _chunk(self, kind: str, sharing: int) -> int:
        """Tokens that a block moves at a time; `sharing` blocks share them."""
        # A tag in every 8 bytes says what has arrived: nothing is gained by announcing several tokens at once.
        if self.tagged:
            return 1
        # Few tokens: one chunk for each block. Many: 16 chunks or more for each block, to share evenly, but large
        # chunks: a block that pushes stops for 2 us after each, until it can announce that its rows have arrived.
        fewest = 8 if kind == "expanded" and self.fp8 else 4
        chunk = min(fewest, power_of_two(-(-self.max_tokens // (self.num_sms - self.table_blocks))))
        largest = 16 if kind.startswith("combine") else 32
        while chunk < largest and 2 * chunk * 16 * sharing <= self.max_tokens:
            chunk *= 2
        return chunk

    def _travels_as_fp8(self, kind: str) -> bool:
        """Gradients and answers travel as dtype always."""
        return self.fp8 and kind in ("compact", "expanded")

    def macros(self, kind: str, aligned: bool) -> Macros:
        """Those of direct.cuh."""
        split = self.split(kind)
        return (
            ("ELEMENT", ELEMENTS[self.dtype]),
            ("FP8", int(self._travels_as_fp8(kind))),
            ("HIDDEN", self.hidden),
            ("TOP_K", self.top_k),
            ("MAX_TOKENS", self.max_tokens),
            ("RANKS", self.ranks),
            ("EXPERTS", self.experts),
            ("ALIGNED", int(aligned)),
            ("TAGGED", int(self.tagged)),
            ("BLOCKS", self.num_sms),
            ("THREADS", split.threads),
            ("CHUNK", split.chunk),
            ("SLICES", split.slices),
            ("UNROLL", split.unroll),
        )

    @cache  # noqa: B019 - a shape lives as long as its kernels, which are kept for the life of the process
    def dispatch(self, kind: str, aligned: bool) -> DirectKernel:
        """One of OUTPUTS. aligned: every row of the caller's tensors starts at a multiple of 16 bytes."""
        split = self.split(kind)
        # All sizes are compiled in: loops have known lengths, and divisions become shifts and multiplications.
        macros = (
            *self.macros(kind, aligned),
            ("OUTPUT", OUTPUTS.index(kind)),
            ("TABLE_BLOCKS", self.table_blocks),
        )
        # The table's counts: of each warp and expert, and the offsets. "spread" finds the table of the forward pass.
        counts = 0 if kind == "spread" else split.threads // 32 * self.experts + self.experts + 1
        return DirectKernel(Kernel("direct_dispatch.cu", "direct_dispatch", macros), self.num_sms, split, 4 * counts)

    @cache  # noqa: B019 - a shape lives as long as its kernels, which are kept for the life of the process
    def combine(self, compact: bool, weighted: bool, returns_weights: bool, aligned: bool) -> DirectKernel:
        """One of FORMS, aligned or not."""
        kind = "combine" if compact else "combine expanded"
        macros = (
            *self.macros(kind, aligned),
            ("INPUT", int(not compact)),
            ("WEIGH", int(weighted)),
            ("RETURN", int(returns_weights)),
        )
        return DirectKernel(Kernel("direct_combine.cu", "direct_combine", macros), self.num_sms, self.split(kind))

    @cache  # noqa: B019 - a shape lives as long as its kernels, which are kept for the life of the process
    def free(self) -> Kernel:
        """The kernel that gives credit for compact rows without a combine."""
        return Kernel("direct_free.cu", "direct_free", self.macros("compact", True))

    def kernels(self) -> list[Kernel]:
        """All, for rows that lie side by side from a multiple of 16 bytes on."""
        aligned = self.hidden * self.itemsize % 16 == 0
        # With float8 both the rows that come, of one byte a value, and those that leave count.
        both_aligned = aligned and (not self.fp8 or self.hidden % 16 == 0)
        # Compact rows without tags stay in symmetric memory: only the caller's own rows count.
        compact_aligned = both_aligned if self.tagged else aligned
        dispatches = [self.dispatch("compact", compact_aligned), self.dispatch("expanded", both_aligned)]
        combines = [self.combine(*form, aligned) for form in FORMS]
        if self.fp8:  # has no backward passes
            combines.pop()
        else:
            dispatches.append(self.dispatch("spread", both_aligned))
        return [*(sized.kernel for sized in (*dispatches, *combines)), self.free()]
