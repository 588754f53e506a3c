"""CUDA kernels: compiled at run time by NVRTC through cupy, launched on torch's current stream.

A kernel is specialised for its shape and options by macros, so a new combination costs a compilation of a few seconds.
The result is kept in cupy's cache on disk and, loaded, for the life of the process. Nothing here waits for the device,
and all memory comes from torch.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

Macros = tuple[tuple[str, object], ...]


def source_folder() -> Path:
    """Where the folders cuda and gating with the sources are: in an installed package, or in a checkout."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "csrc"
    return installed if installed.is_dir() else package.parent / "csrc"


@cache
def read_source(name: str) -> str:
    """The text of csrc/cuda/<name> with the project's own #include files written out, so that a cache sees them change."""
    seen: set[Path] = set()

    def text(path: Path) -> str:
        if path in seen:
            return ""
        seen.add(path)
        return re.sub(
            r'^#include "(.+)"$', lambda found: text((path.parent / found[1]).resolve()), path.read_text(), flags=re.M
        ).replace("#pragma once\n", "")

    return text((source_folder() / "cuda" / name).resolve())


def compiler_options(macros: Macros) -> tuple[str, ...]:
    """The options of NVRTC for these macros. Sources contract a * b + c only where they say so."""
    return ("-std=c++17", "--fmad=false", "-diag-suppress=177", *(f"-D{name}={value}" for name, value in macros))


@cache
def _load(source: str, name: str, macros: Macros, device: int) -> tuple[int, Any]:
    """The driver's handle of a kernel, and the module that must live as long."""
    import cupy
    import torch
    from cupy_backends.cuda.api import driver

    if torch.cuda.is_current_stream_capturing():
        described = " ".join(f"{key}={value}" for key, value in macros)
        raise RuntimeError(
            f"{name} ({source}: {described}) is not loaded, and a kernel cannot be loaded while a CUDA graph is captured: "
            "call moecomm.gating.compile for these shapes, or run the operation once before the capture"
        )
    with cupy.cuda.Device(device):
        module = cupy.RawModule(code=read_source(source), options=compiler_options(macros), backend="nvrtc")
        function = int(module.get_function(name).kernel.ptr)
        # All the shared memory that a block may ask for (CU_FUNC_ATTRIBUTE_ and cudaDevAttr numbers).
        most = cupy.cuda.runtime.deviceGetAttribute(97, device) - driver.funcGetAttribute(1, function)
        driver.funcSetAttribute(function, 8, most)
    return function, module


class Kernel:
    """One function of csrc/cuda/<source>, compiled with these macros: `Kernel("unpermute.cu", "unpermute", (("TOP_K", 8),))`.

    Loading happens at the first call, or by `load`, once for each device.
    """

    def __init__(self, source: str, name: str, macros: Macros = ()) -> None:
        self.source, self.name, self.macros = source, name, macros

    def load(self) -> int:
        """Compile and load for the current device. Raises RuntimeError while a CUDA graph is captured."""
        import torch

        return _load(self.source, self.name, self.macros, torch.cuda.current_device())[0]

    def __call__(self, grid: int, block: int, args: Sequence[Any], shared_bytes: int = 0) -> None:
        """Launch on torch's current stream, with `shared_bytes` of dynamic shared memory.

        args  a tensor: its address; None: a null pointer; int: 64 bits, right for every integer parameter up to that;
              float: 32 bits; a ctypes object, a struct say: itself
        """
        import torch
        from cupy_backends.cuda.api import driver

        function = self.load()
        values = [_argument(arg) for arg in args]
        pointers = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
        stream = torch.cuda.current_stream().cuda_stream
        driver.launchKernel(
            function, grid, 1, 1, block, 1, 1, shared_bytes, stream, ctypes.addressof(pointers), 0
        )


def _argument(value: Any) -> Any:
    if value is None:
        return ctypes.c_void_p(0)
    if isinstance(value, int):
        return ctypes.c_longlong(value)
    if isinstance(value, float):
        return ctypes.c_float(value)
    return value if isinstance(value, (ctypes._SimpleCData, ctypes.Structure)) else ctypes.c_void_p(value.data_ptr())


# ---- the board on which the blocks of a launch tell each other what they counted ---------------------------------------

_boards: dict[tuple[int, int, int], Any] = {}
_spare_boards: dict[int, list[Any]] = {}


def _capture_number(stream: int) -> int:
    """Which capture of a CUDA graph the stream is part of; 0: none."""
    status, number = ctypes.c_int(0), ctypes.c_uint64(0)
    ctypes.CDLL("libcuda.so.1").cuStreamGetCaptureInfo_v2(
        ctypes.c_void_p(stream), ctypes.byref(status), ctypes.byref(number), None, None, None
    )
    return number.value if status.value else 0


def _board(records: int) -> Any:
    """Zeros at first, then what the last launch left: of this stream alone, since launches on it follow each other.

    A graph may be replayed on any stream, so each capture has boards of its own. They cannot be allocated while it
    runs: spare ones are, by `compile` and by every call outside a capture. Boards live as long as the process.
    """
    import torch

    device, stream = torch.cuda.current_device(), torch.cuda.current_stream().cuda_stream
    capture = _capture_number(stream) if torch.cuda.is_current_stream_capturing() else 0
    board = _boards.get((device, stream, capture))
    spares = _spare_boards.setdefault(device, [])
    if board is not None and len(board) >= records and (capture or len(spares) == SPARE_BOARDS):
        return board
    if capture:
        if not spares or len(spares[-1]) < records:
            raise RuntimeError("route: no board is left for this CUDA graph: call it once before each capture, for warming up")
        board = spares.pop()
    else:
        if board is None or len(board) < records:
            board = torch.zeros(records, 4, dtype=torch.int32, device="cuda")
        if spares and len(spares[0]) < len(board):
            spares.clear()
        spares += [torch.zeros_like(board) for _ in range(SPARE_BOARDS - len(spares))]
        torch.cuda.current_stream().synchronize()  # a graph may be replayed on another stream
    _boards[device, stream, capture] = board
    return board


SPARE_BOARDS = 8


# ---- route ---------------------------------------------------------------------------------------------------------

ELEMENTS = {"float32": "float", "bfloat16": "bfloat16", "float16": "float16"}


class _Arguments(ctypes.Structure):
    """`Arguments` of route.cu."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in (
            "logits bias mask offset_tensor expert weight slot row source count offset load aux_loss z_loss lse status "
            "board key place x rows"
        ).split()),
        *((name, ctypes.c_uint64) for name in ("seed", "generator_offset")),
        *((name, ctypes.c_float) for name in ("floor", "scale", "noise_scale")),
        *((name, ctypes.c_int) for name in ("num_tokens", "tokens_per_block", "capacity", "align", "num_rows", "row_bytes")),
    ]  # fmt: skip


class _BackwardArguments(ctypes.Structure):
    """`Arguments` of route_backward.cu."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in (
            "grad_weight grad_aux grad_z logits expert lse load mask grad_logits"
        ).split()),
        *((name, ctypes.c_float) for name in ("floor", "scale")),
        ("num_tokens", ctypes.c_int),
    ]  # fmt: skip


@dataclass(frozen=True)
class Geometry:
    """How a launch of route is cut: see the macros of route.cu."""

    lanes: int
    threads: int
    blocks: int
    tokens_per_block: int
    cluster: int = 0
    slices: int = 1


def _power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def geometry(tokens: int, experts: int, top_k: int, num_groups: int, copies: bool, clusters: bool, multiprocessors: int) -> Geometry:
    """As measured on an H200. One warp more than tokens need finds where experts begin, while the others are busy."""
    lanes = min(32, _power_of_two(-(-experts // (16 if top_k <= 2 else 4))))
    if num_groups > 1 or (top_k > 2 and experts >= 64):
        lanes = 32
    if clusters and tokens <= 512 and (copies or tokens > 64 or top_k > 1 or experts > 128):
        tokens_per_block = max(-(-tokens // 8), 1)
        if top_k == 1:
            lanes = min(32, 2 * lanes)
        threads = min(max(_power_of_two(tokens_per_block * lanes), 64), 512)
        return Geometry(lanes, threads + 32, 8, tokens_per_block, 8, 16 if copies and top_k > 2 else 8 if copies else 1)
    if tokens <= 64 and top_k <= 2 and not copies:
        return Geometry(lanes, min(max(_power_of_two(tokens * lanes), 64), 512) + 32, 1, max(tokens, 1))
    tokens_per_block = max(-(-tokens // multiprocessors), 1 if copies else 4)
    threads = min(max(_power_of_two(tokens_per_block * lanes), 256), 512)
    if tokens_per_block * lanes < 4 * threads:
        threads += 32
    return Geometry(lanes, threads, max(-(-tokens // tokens_per_block), 1), tokens_per_block)


def route(logits: Any, bias: Any, mask: Any, offset_tensor: Any, top_k: int, score: int, num_groups: int, top_groups: int,
          floor: float, scale: float, capacity: int, drop: int, noise_kind: int, noise_scale: float, seed: int, offset: int,
          align: int) -> tuple[Any, ...]:  # fmt: skip
    """expert, weight, slot, row, source, count, offset, load, aux_loss, z_loss, lse, status: see Routing."""
    return _route(None, logits, bias, mask, offset_tensor, top_k, score, num_groups, top_groups, floor, scale, capacity, drop,
                  noise_kind, noise_scale, seed, offset, align)  # fmt: skip


def route_permute(x: Any, *of_route: Any) -> tuple[Any, ...]:
    """What `route` returns, and the rows [N, H] of x [T, H]; empty rows are 0."""
    return _route(x, *of_route)


def _route(x: Any, logits: Any, bias: Any, mask: Any, offset_tensor: Any, top_k: int, score: int, num_groups: int,
           top_groups: int, floor: float, scale: float, capacity: int, drop: int, noise_kind: int, noise_scale: float, seed: int,
           offset: int, align: int) -> tuple[Any, ...]:  # fmt: skip
    import torch

    tokens, experts = logits.shape
    choices = tokens * top_k
    if not (1 <= experts <= 1024 and 1 <= top_k <= min(32, experts) and choices < 2**31):
        raise ValueError(f"route: E up to 1024, top_k up to 32 and T * top_k below 2**31 on CUDA, got {tokens=} {experts=} {top_k=}")
    limited = capacity >= 0
    num_rows = experts * capacity if limited else (choices + min(experts, choices) * (align - 1)) // align * align
    logits = _aligned(logits)
    drop = drop if limited or drop == 1 else 0
    ranked = limited and drop >= 2
    multiprocessors = _multiprocessors(logits.device.index)
    clusters = torch.cuda.get_device_capability(logits.device)[0] >= 9 and not ranked and drop != 1
    plan = geometry(tokens, experts, top_k, num_groups, x is not None, clusters, multiprocessors)
    row_bytes = 0 if x is None else x.shape[1] * x.element_size()
    if row_bytes % (16 * plan.slices):
        plan = replace(plan, slices=1)
    per_block = plan.tokens_per_block
    words = min(-(-per_block // 32), max(1, min(8, 8192 // experts)))
    warps, count_bits = plan.threads // 32, 8 if per_block < 256 else 16 if per_block < 65536 else 32
    vectors = -(-experts * count_bits // 128)
    boarded = plan.blocks > 1 and not plan.cluster
    part = 2 * warps * vectors * (4 if count_bits == 32 else 8) if boarded else 0
    fixed = 4 * (2 * words * experts + (4 if plan.blocks > 1 else 2) * experts + 1 + (part if part <= 16384 else 0)
                 + (warps * (experts + num_groups) if num_groups > 1 else 0))  # fmt: skip
    spill = fixed + 8 * per_block * top_k > MOST_SHARED
    shared_bytes = fixed + (0 if spill else 8 * per_block * top_k)
    macros = {
        "ELEMENT": ELEMENTS[str(logits.dtype)[6:]], "E": experts, "K": top_k, "LANES": plan.lanes, "THREADS": plan.threads,
        "BLOCKS": -(-plan.blocks // multiprocessors), "GRID": int(plan.blocks > 1), "CLUSTER": plan.cluster, "SLICES": plan.slices, "MASK": int(mask is not None), "NORMALIZE": int(floor > 0), "SCORE": score,
        "BIAS": int(bias is not None), "GROUPS": num_groups, "TOP_GROUPS": top_groups, "NOISE": noise_kind,
        "EXACT": int(bool(score or bias is not None or num_groups > 1 or (limited and drop == 2))),
        "ALIGNED": int(align > 1), "CAPACITY": int(limited), "DROP": drop, "WORDS32": words, "CHUNKED": int(per_block > 32 * words), "SPILL": int(spill),
        "COUNT_BITS": count_bits, "ROWS": int(x is not None),
    }  # fmt: skip
    if x is not None:
        x = x.contiguous()
        rows = x.new_empty(num_rows, x.shape[1])
        word = next(n for n in (16, 8, 4, 2, 1) if row_bytes % n == 0 and x.data_ptr() % n == 0)
        part_bytes = row_bytes // plan.slices
        slots = min(24, (MOST_ROWS - shared_bytes) // max(part_bytes, 1), per_block)
        bulk = word == 16 and slots > 0 and torch.cuda.get_device_capability(x.device)[0] >= 9
        slots = slots // 8 * 8 if slots > 8 else slots
        macros |= {"BULK": int(bulk), "SLOTS": slots if bulk else 0, "WORD": WORDS[word]}
        shared_bytes += slots * part_bytes if bulk else 0
    records = 1 + plan.blocks * (1 + (top_k if drop == 1 else 1) * vectors)

    def ints(*shape: int) -> Any:
        return torch.empty(shape, dtype=torch.int32, device=logits.device)

    def floats(*shape: int) -> Any:
        return torch.empty(shape, dtype=torch.float32, device=logits.device)

    outputs = (
        ints(tokens, top_k), floats(tokens, top_k), ints(tokens, top_k), ints(tokens, top_k), ints(num_rows), ints(experts),
        ints(experts + 1), ints(experts), floats(), floats(), floats(tokens), ints(),
    )  # fmt: skip
    held = (_board(records) if boarded else None, *((ints(choices), ints(choices)) if ranked else (None, None)))
    pointers = (logits, bias, mask, offset_tensor, *outputs, *held, x, rows if x is not None else None)
    args = _Arguments(*(None if tensor is None else tensor.data_ptr() for tensor in pointers), seed, offset, floor, scale,
                      noise_scale, tokens, per_block, capacity, align, num_rows, row_bytes)  # fmt: skip
    Kernel("route.cu", "route", tuple(macros.items()))(plan.blocks * plan.slices, plan.threads, [args], shared_bytes)
    return outputs if x is None else (*outputs, rows)


def route_backward(grad_weight: Any, grad_aux: Any, grad_z: Any, logits: Any, expert: Any, lse: Any, load: Any, mask: Any,
                   score: int, floor: float, scale: float) -> Any:  # fmt: skip
    """The gradient in the logits [T, E] of route's weights and losses."""
    import torch

    (tokens, experts), top_k = logits.shape, expert.shape[1]
    logits = _aligned(logits)
    grad_logits = torch.empty_like(logits)
    if not tokens:
        return grad_logits
    lanes = min(32, _power_of_two(-(-experts // 8)))
    threads, each = 128, 1
    macros = {
        "ELEMENT": ELEMENTS[str(logits.dtype)[6:]], "E": experts, "K": top_k, "LANES": lanes, "THREADS": threads, "EACH": each,
        "SCORE": score, "NORMALIZE": int(floor > 0), "MASK": int(mask is not None),
    }  # fmt: skip
    pointers = (grad_weight.contiguous(), grad_aux, grad_z, logits, expert, lse, load, mask, grad_logits)
    args = _BackwardArguments(*(None if tensor is None else tensor.data_ptr() for tensor in pointers), floor, scale, tokens)
    Kernel("route_backward.cu", "route_backward", tuple(macros.items()))(
        -(-tokens * lanes // (threads * each)), threads, [args]
    )
    return grad_logits


def _aligned(tensor: Any) -> Any:
    """The tensor, contiguous and at a multiple of 16 bytes, as the kernels' wide loads need it."""
    import torch

    aligned = tensor.is_contiguous() and tensor.data_ptr() % 16 == 0
    return tensor if aligned else tensor.clone(memory_format=torch.contiguous_format)


MOST_SHARED = 96 * 1024
MOST_ROWS = 220 * 1024
WORDS = {16: "uint4", 8: "uint2", 4: "unsigned", 2: "unsigned short", 1: "unsigned char"}


@cache
def _multiprocessors(device: int) -> int:
    import torch

    return torch.cuda.get_device_properties(device).multi_processor_count
