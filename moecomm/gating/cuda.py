"""route on CUDA: one launch from logits to everything in Routing, and one for its backward pass.

csrc/cuda/route.cu says how. Here: which kernel and how many blocks for a shape, and the memory. Nothing waits for the
device, all memory comes from torch, and launches go to torch's current stream.
"""

from __future__ import annotations

import ctypes
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, lru_cache
from math import gcd
from typing import Any

from moecomm.gating.kernel import Kernel as Kernel
from moecomm.gating.kernel import libcuda, power_of_two

# ---- the board on which the blocks of a launch tell each other what they counted -----------------------------------

_boards: dict[tuple[int, int, int], Any] = {}
_spare_boards: dict[int, list[Any]] = {}
SPARE_BOARDS = 8


def _capture_number(stream: int) -> int:
    """Which capture of a CUDA graph the stream is part of; 0: none."""
    status, number = ctypes.c_int(0), ctypes.c_uint64(0)
    libcuda().cuStreamGetCaptureInfo_v2(
        ctypes.c_void_p(stream), ctypes.byref(status), ctypes.byref(number), None, None, None
    )
    return number.value if status.value else 0


def _board(records: int) -> Any:
    """Zeros at first, then what the last launch left: of this stream alone, since launches on it follow each other.

    A graph may be replayed on any stream, so each capture has a board of its own. It cannot be allocated while the
    capture runs: spare ones are, by every call outside a capture. Boards live as long as the process.
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
            raise RuntimeError("route: a CUDA graph needs the operation run once, uncaptured, before each capture")
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


# ---- how a launch of route is cut ----------------------------------------------------------------------------------

ELEMENTS = {"float32": "float", "bfloat16": "bfloat16", "float16": "float16"}
WORDS = {16: "uint4", 8: "uint2", 4: "unsigned", 2: "unsigned short", 1: "unsigned char"}
MOST_CHOICES_BYTES = 96 * 1024
"""Shared memory that a block's counts and choices may fill; beyond, its choices wait in the outputs."""
MOST_BYTES = 220 * 1024
"""Shared memory of a block."""
ONE_LAUNCH = range(513, 16384)
"""Tokens for which route_permute is one launch. Else two are faster: a few blocks soon route few tokens, and many small
blocks move many rows best."""


@dataclass(frozen=True)
class Gate:
    """What a kernel of route is compiled for, beside the number of tokens."""

    element: str
    experts: int
    top_k: int
    score: int = 0
    bias: int = 0
    num_groups: int = 1
    top_groups: int = 1
    best_in_group: int = 2
    normalize: int = 0
    capacity: int = 0
    drop: int = 0
    mask: int = 0
    noise: int = 0
    aligned: int = 0
    row_bytes: int = -1  # of x, which is moved in the same launch; -1: no x
    word: int = 16  # bytes that its rows are multiples of


@dataclass(frozen=True)
class Plan:
    """A kernel of route and how it is launched."""

    kernel: Kernel
    grid: int
    threads: int
    shared_bytes: int
    tokens_per_block: int
    records: int  # of the board; 0: none


@dataclass(frozen=True)
class Geometry:
    """How tokens are dealt out; see route.cu. blocks 1: a single one; cluster: so many blocks, or 0."""

    lanes: int
    threads: int
    blocks: int
    tokens_per_block: int
    cluster: int = 0


def geometry(gate: Gate, tokens: int, multiprocessors: int, clusters: bool) -> Geometry:
    """What was fast on an H200. One warp more than the tokens need finds where experts begin, beside the others."""
    few, copies = gate.top_k <= 2, gate.row_bytes >= 0
    lanes = min(32, power_of_two(-(-gate.experts // (16 if few else 4))))
    if gate.num_groups > 1 or (not few and gate.experts >= 64):
        lanes = 32
    if clusters and not copies and tokens <= (512 if few else 256):
        tokens_per_block = max(-(-tokens // 8), 1)
        lanes = min(32, 2 * lanes) if gate.top_k == 1 else lanes
        threads = min(max(power_of_two(tokens_per_block * lanes), 64), 512)
        return Geometry(lanes, threads + 32, 8, tokens_per_block, 8)
    if tokens <= 64 and few and not copies:
        return Geometry(lanes, min(max(power_of_two(tokens * lanes), 64), 512) + 32, 1, max(tokens, 1))
    tokens_per_block = max(-(-tokens // multiprocessors), 1 if copies else 8)
    threads = min(max(power_of_two(tokens_per_block * lanes), 256), 512)
    if tokens_per_block * lanes < 4 * threads:
        threads += 32
    return Geometry(lanes, threads, max(-(-tokens // tokens_per_block), 1), tokens_per_block)


@lru_cache(4096)
def plan(gate: Gate, tokens: int, multiprocessors: int, capability: int) -> Plan:
    """The launch for so many tokens. capability: 90 for compute capability 9.0."""
    ranked = gate.capacity and gate.drop >= 2
    cut = geometry(gate, tokens, multiprocessors, capability >= 90 and not ranked and gate.drop != 1)
    experts, top_k, per_block, warps = gate.experts, gate.top_k, cut.tokens_per_block, cut.threads // 32
    boarded = cut.blocks > 1 and not cut.cluster
    words = min(-(-per_block // 32), max(1, min(8, 8192 // experts)))
    count_bits = 8 if per_block < 256 else 16 if per_block < 65536 else 32
    vectors = -(-experts * count_bits // 192) * 2
    part = 2 * warps * vectors * (3 if count_bits == 32 else 6) if boarded else 0  # PART of route_exchange.cuh
    numbers = (2 * words + (4 if cut.blocks > 1 else 2)) * experts + 1 + (part if part <= 16384 else 0)
    numbers += warps * (experts + gate.num_groups) if gate.num_groups > 1 else 0
    choices_bytes = 8 * per_block * top_k
    spill = 4 * numbers + choices_bytes > MOST_CHOICES_BYTES
    shared_bytes = 4 * numbers + (0 if spill else choices_bytes)
    macros: dict[str, object] = {
        "ELEMENT": gate.element, "E": experts, "K": top_k, "LANES": cut.lanes, "THREADS": cut.threads, "BLOCKS": 1,
        "GRID": int(cut.blocks > 1), "CLUSTER": cut.cluster, "MASK": gate.mask,
        "NORMALIZE": gate.normalize, "SCORE": gate.score, "BIAS": gate.bias, "GROUPS": gate.num_groups,
        "TOP_GROUPS": gate.top_groups, "BEST_IN_GROUP": gate.best_in_group, "NOISE": gate.noise,
        "ALIGNED": gate.aligned, "CAPACITY": gate.capacity,
        "EXACT": int(bool(gate.score or gate.bias or gate.num_groups > 1 or (gate.capacity and gate.drop == 2))),
        "DROP": gate.drop, "WORDS32": words, "CHUNKED": int(per_block > 32 * words), "SPILL": int(spill),
        "COUNT_BITS": count_bits, "ROWS": int(gate.row_bytes >= 0),
    }  # fmt: skip
    if gate.row_bytes >= 0:
        slots = min(24, (MOST_BYTES - shared_bytes) // max(gate.row_bytes, 1), per_block)
        slots = slots // 8 * 8 if slots > 8 else slots  # 8 warps move rows
        bulk = capability >= 90 and gate.word == 16 and slots > 0
        macros |= {"BULK": int(bulk), "SLOTS": slots if bulk else 0, "WORD": WORDS[gate.word]}
        shared_bytes += slots * gate.row_bytes if bulk else 0
    records = 2 + cut.blocks * (2 + (top_k if gate.drop == 1 else 1) * vectors) if boarded else 0
    kernel = Kernel("route.cu", "route", tuple(macros.items()))
    return Plan(kernel, cut.blocks, cut.threads, shared_bytes, per_block, records)


# ---- route ---------------------------------------------------------------------------------------------------------


def _struct(name: str, **fields: Any) -> type[ctypes.Structure]:
    """A C struct: for each type of ctypes the names of its fields, in order."""
    names = [(field, getattr(ctypes, kind)) for kind, text in fields.items() for field in text.split()]
    return type(name, (ctypes.Structure,), {"_fields_": names})


_Arguments = _struct(  # of route.cu
    "Arguments",
    c_void_p="logits bias mask offset_tensor expert weight slot row source count offset load aux_loss z_loss lse "
    "status board key place x rows",
    c_uint64="seed generator_offset",
    c_float="floor scale noise_scale",
    c_int="num_tokens tokens_per_block capacity align num_rows row_bytes",
)
_BackwardArguments = _struct(  # of route_backward.cu
    "BackwardArguments",
    c_void_p="grad_weight grad_aux grad_z logits expert lse load mask grad_logits",
    c_float="floor scale",
    c_int="num_tokens",
)


def compile(gate: Gate, tokens: range) -> None:
    """Load every kernel that `route` needs for these numbers of tokens on the current device, several at a time.

    A CUDA graph can then be captured after one uncaptured call. Needs a GPU.
    """
    import torch

    device = torch.cuda.current_device()
    kernels = {plan(gate, n, *_device(device)).kernel for n in tokens}

    def load(kernel: Kernel) -> None:
        torch.cuda.set_device(device)
        kernel.load()

    with ThreadPoolExecutor() as pool:
        list(pool.map(load, kernels))


def route(logits: Any, *choices: Any) -> tuple[Any, ...]:
    """expert, weight, slot, row, source, count, offset, load, aux_loss, z_loss, lse, status: see Routing.

    The choices are those of `_route`, as `host.route` takes them; the caller has checked them all.
    """
    return _route(None, logits, *choices)


def route_permute(x: Any, logits: Any, *choices: Any) -> tuple[Any, ...]:
    """What `route` returns, and the rows [N, H] of x [T, H] in one launch; empty rows are 0."""
    return _route(x, logits, *choices)


def _route(x: Any, logits: Any, bias: Any, mask: Any, offset_tensor: Any, top_k: int, score: int, num_groups: int,
           top_groups: int, best_in_group: int, floor: float, scale: float, capacity: int, drop: int, noise: int,
           noise_scale: float, seed: int, offset: int, align: int) -> tuple[Any, ...]:  # fmt: skip
    import torch

    (tokens, experts), choices, limited = logits.shape, logits.shape[0] * top_k, capacity >= 0
    if not (1 <= experts <= 1024 and 1 <= top_k <= min(32, experts) and choices < 2**31):
        raise ValueError(
            f"route: {tokens} tokens, {experts} experts, top_k {top_k}; E up to 1024, top_k up to 32 can be routed"
        )
    num_rows = experts * capacity if limited else (choices + min(experts, choices) * (align - 1)) // align * align
    logits, x = _aligned(logits), None if x is None else _aligned(x)
    row_bytes = -1 if x is None else x.shape[1] * x.element_size()
    gate = Gate(
        ELEMENTS[str(logits.dtype)[6:]], experts, top_k, score, int(bias is not None), num_groups, top_groups,
        best_in_group if num_groups > 1 else 2, int(floor > 0), int(limited), drop if limited or drop == 1 else 0,
        int(mask is not None), noise, int(align > 1), row_bytes, gcd(16, row_bytes),
    )  # fmt: skip
    launch = plan(gate, tokens, *_device(logits.device.index))

    def ints(*shape: int) -> Any:
        return torch.empty(shape, dtype=torch.int32, device=logits.device)

    def floats(*shape: int) -> Any:
        return torch.empty(shape, dtype=torch.float32, device=logits.device)

    outputs = (
        ints(tokens, top_k), floats(tokens, top_k), ints(tokens, top_k), ints(tokens, top_k), ints(num_rows),
        ints(experts), ints(experts + 1), ints(experts), floats(), floats(), floats(tokens), ints(),
    )  # fmt: skip
    rows = () if x is None else (x.new_empty(num_rows, x.shape[1]),)
    with torch.cuda.device(logits.device):
        ranked = (ints(choices), ints(choices)) if gate.capacity and gate.drop >= 2 else (None, None)
        board = _board(launch.records) if launch.records else None
        pointers = map(_address, (logits, bias, mask, offset_tensor, *outputs, board, *ranked, x, *(rows or (None,))))
        numbers = (seed, offset, floor, scale, noise_scale, tokens, launch.tokens_per_block, capacity, align, num_rows)
        args = _Arguments(*pointers, *numbers, max(row_bytes, 0))
        launch.kernel(launch.grid, launch.threads, [args], launch.shared_bytes)
    return outputs + rows


def route_backward(grad_weight: Any, grad_aux: Any, grad_z: Any, logits: Any, expert: Any, lse: Any, load: Any,
                   mask: Any, score: int, floor: float, scale: float) -> Any:  # fmt: skip
    """The gradient in the logits [T, E] of route's weights and losses, in one launch."""
    import torch

    (tokens, experts), top_k, threads = logits.shape, expert.shape[1], 128
    logits = _aligned(logits)
    grad_logits = torch.empty_like(logits)
    if tokens == 0:
        return grad_logits
    lanes = min(32, power_of_two(-(-experts // 8)))
    macros = {
        "ELEMENT": ELEMENTS[str(logits.dtype)[6:]], "E": experts, "K": top_k, "LANES": lanes, "THREADS": threads,
        "EACH": 1, "SCORE": score, "NORMALIZE": int(floor > 0), "MASK": int(mask is not None),
    }  # fmt: skip
    tensors = grad_weight.contiguous(), grad_aux, grad_z, logits, expert, lse, load, mask, grad_logits
    with torch.cuda.device(logits.device):
        kernel = Kernel("route_backward.cu", "route_backward", tuple(macros.items()))
        kernel(
            -(-tokens * lanes // threads), threads, [_BackwardArguments(*map(_address, tensors), floor, scale, tokens)]
        )
    return grad_logits


def _address(tensor: Any) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _aligned(tensor: Any) -> Any:
    """The tensor, contiguous and at a multiple of 16 bytes, as the kernels' wide loads need it."""
    import torch

    aligned = tensor.is_contiguous() and tensor.data_ptr() % 16 == 0
    return tensor if aligned else tensor.clone(memory_format=torch.contiguous_format)


@cache
def _device(number: int) -> tuple[int, int]:
    """Multiprocessors, and the compute capability times 10."""
    import torch

    device = torch.cuda.get_device_properties(number)
    return device.multi_processor_count, device.major * 10 + device.minor
