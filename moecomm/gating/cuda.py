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
from typing import TYPE_CHECKING, Any

from moecomm.gating.choices import DROPS, NOISES, SCORES, Choices, Fields, Gradients, Inputs, Saved, new_fields
from moecomm.gating.kernel import Kernel as Kernel
from moecomm.gating.kernel import libcuda, power_of_two

if TYPE_CHECKING:
    from torch import Tensor

# ---- the board on which the blocks of a launch tell each other what they counted -----------------------------------

_boards: dict[tuple[int, int, int], Tensor] = {}
_spare_boards: dict[int, list[Tensor]] = {}
SPARE_BOARDS = 8


def _capture_number(stream: int) -> int:
    """Which capture of a CUDA graph the stream is part of; 0: none."""
    status = ctypes.c_int(0)
    number = ctypes.c_uint64(0)
    libcuda().cuStreamGetCaptureInfo_v2(
        ctypes.c_void_p(stream), ctypes.byref(status), ctypes.byref(number), None, None, None
    )
    return number.value if status.value else 0


def _board(records: int) -> Tensor:
    """Zeros at first, then what the last launch left: of this stream alone, since launches on it follow each other.

    A graph may be replayed on any stream, so each capture has a board of its own. It cannot be allocated while the
    capture runs: spare ones are, by every call outside a capture. Boards live as long as the process.
    """
    import torch

    device = torch.cuda.current_device()
    stream = torch.cuda.current_stream().cuda_stream
    capture = _capture_number(stream) if torch.cuda.is_current_stream_capturing() else 0
    board = _boards.get((device, stream, capture))
    spares = _spare_boards.setdefault(device, [])
    is_large_enough = board is not None and len(board) >= records
    if board is not None and is_large_enough and (capture or len(spares) == SPARE_BOARDS):
        return board
    if capture:
        if not spares or len(spares[-1]) < records:
            raise RuntimeError("route: a CUDA graph needs the operation run once, uncaptured, before each capture")
        board = spares.pop()
    else:
        if board is None or not is_large_enough:
            board = torch.zeros(records, 4, dtype=torch.int32, device="cuda")
        # All spares are as large as the largest board, so that any of them suits the next capture.
        if spares and len(spares[0]) < len(board):
            spares.clear()
        spares += [torch.zeros_like(board) for _ in range(SPARE_BOARDS - len(spares))]
        # A graph may be replayed on another stream, which does not wait for the zeros.
        torch.cuda.current_stream().synchronize()
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
MOST_TOKENS_PER_BLOCK = 2**22 - 1
"""route.cu packs an assignment's place within its block in 22 bits, beside the expert; all bits set mean no choice."""


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
    recorded: int = 0
    aligned: int = 0
    row_bytes: int = -1
    """Of x, which is moved in the same launch; -1: no x."""
    word: int = 16
    """The rows of x are multiples of so many bytes."""


@dataclass(frozen=True)
class Launch:
    """A kernel of route, and the numbers that its launch needs."""

    kernel: Kernel
    grid: int
    threads: int
    shared_bytes: int
    tokens_per_block: int
    records: int
    """Words of 16 bytes on the board; 0: the blocks need none."""


@dataclass(frozen=True)
class Geometry:
    """How tokens are dealt out to blocks and lanes; see route.cu."""

    lanes: int
    """Of a team, which chooses one token's experts at a time."""
    threads: int
    blocks: int
    tokens_per_block: int
    cluster: int = 0
    """Blocks of the cluster that they are; 0: they are none, and meet on a board if there are several."""


def geometry(gate: Gate, tokens: int, multiprocessors: int, clusters: bool) -> Geometry:
    """What was fast on an H200. One warp more than the tokens need finds where experts begin, beside the others."""
    has_few_choices = gate.top_k <= 2
    copies_rows = gate.row_bytes >= 0
    # A lane with many experts of its own waits less for other lanes; long lists suit few choices, which read them once.
    lanes = min(32, power_of_two(-(-gate.experts // (16 if has_few_choices else 4))))
    if gate.num_groups > 1 or (not has_few_choices and gate.experts >= 64):
        lanes = 32
    # Few tokens: a cluster hands counts over in shared memory, which is faster than a board in device memory.
    if clusters and not copies_rows and tokens <= (512 if has_few_choices else 256):
        tokens_per_block = max(-(-tokens // 8), 1)
        lanes = min(32, 2 * lanes) if gate.top_k == 1 else lanes
        threads = min(max(power_of_two(tokens_per_block * lanes), 64), 512)
        return Geometry(lanes, threads + 32, 8, tokens_per_block, 8)
    # Fewer still: a single block has nobody to wait for.
    if tokens <= 64 and has_few_choices and not copies_rows:
        threads = min(max(power_of_two(tokens * lanes), 64), 512)
        return Geometry(lanes, threads + 32, 1, max(tokens, 1))
    # All blocks must run at once, since they wait for each other: at most one for each multiprocessor.
    tokens_per_block = max(-(-tokens // multiprocessors), 1 if copies_rows else 8)
    threads = min(max(power_of_two(tokens_per_block * lanes), 256), 512)
    if tokens_per_block * lanes < 4 * threads:
        threads += 32
    if tokens_per_block > MOST_TOKENS_PER_BLOCK:
        raise ValueError(
            f"route: logits has {tokens} tokens, expected at most {MOST_TOKENS_PER_BLOCK * multiprocessors}: "
            f"{MOST_TOKENS_PER_BLOCK} for each of the GPU's {multiprocessors} multiprocessors"
        )
    blocks = max(-(-tokens // tokens_per_block), 1)
    return Geometry(lanes, threads, blocks, tokens_per_block)


@dataclass(frozen=True)
class Counting:
    """How a block counts its tokens for each expert, and how wide its counts are on the board."""

    words: int
    """32 tokens each: a block counts so many of them at once."""
    count_bits: int
    """8, 16 or 32: wide enough for the tokens of a block."""
    vectors: int
    """VECTORS of route_exchange.cuh: 16-byte words on the board for a block's counts."""
    shared_numbers: int
    """Numbers of 4 bytes in shared memory, without the choices of the block's tokens."""


def counting(gate: Gate, cut: Geometry) -> Counting:
    """The layout that route.cu makes of its shared memory."""
    experts = gate.experts
    warps = cut.threads // 32
    words = min(-(-cut.tokens_per_block // 32), max(1, min(8, 8192 // experts)))
    count_bits = 8 if cut.tokens_per_block < 256 else 16 if cut.tokens_per_block < 65536 else 32
    # 12 of a word's 16 bytes are counts. The number of words is even: memory is written 32 bytes at a time.
    vectors = -(-experts * count_bits // 192) * 2
    # bits, preceding: [words, E] each; counted, begin, and in a grid total and before: [E] each.
    numbers = (2 * words + (4 if cut.blocks > 1 else 2)) * experts + 1
    if cut.blocks > 1 and not cut.cluster:
        # PART of route_exchange.cuh: the sums of each warp, unless they are too large.
        sums = 2 * warps * vectors * (3 if count_bits == 32 else 6)
        numbers += sums if sums <= 16384 else 0
    if gate.num_groups > 1:
        # Each warp's keys, and the scores of its groups.
        numbers += warps * (experts + gate.num_groups)
    return Counting(words, count_bits, vectors, numbers)


@lru_cache(4096)
def plan(gate: Gate, tokens: int, multiprocessors: int, capability: int) -> Launch:
    """The launch for so many tokens. capability: 90 for compute capability 9.0."""
    is_ranked = gate.capacity and gate.drop >= 2
    # Blocks that rank keys, or count once for each choice, meet more often than the code for clusters provides for.
    clusters = capability >= 90 and not is_ranked and gate.drop != 1
    cut = geometry(gate, tokens, multiprocessors, clusters)
    counts = counting(gate, cut)
    choices_bytes = 8 * cut.tokens_per_block * gate.top_k
    spill = 4 * counts.shared_numbers + choices_bytes > MOST_CHOICES_BYTES
    shared_bytes = 4 * counts.shared_numbers + (0 if spill else choices_bytes)
    macros = _macros(gate, cut, counts) | {"SPILL": int(spill)}
    if gate.row_bytes >= 0:
        slots = _slots(gate, cut, MOST_BYTES - shared_bytes) if capability >= 90 else 0
        macros |= {"BULK": int(slots > 0), "SLOTS": slots, "WORD": WORDS[gate.word]}
        shared_bytes += slots * gate.row_bytes
    records = 0
    if cut.blocks > 1 and not cut.cluster:
        # Board of route_exchange.cuh: the header, two words of losses for each block, and its counts in each pass.
        passes = gate.top_k if gate.drop == 1 else 1
        records = 2 + cut.blocks * (2 + passes * counts.vectors)
    kernel = Kernel("route.cu", "route", tuple(macros.items()))
    return Launch(kernel, cut.blocks, cut.threads, shared_bytes, cut.tokens_per_block, records)


def _macros(gate: Gate, cut: Geometry, counts: Counting) -> dict[str, object]:
    """What route.cu and the files that it includes are compiled with, but for SPILL and the macros of rows."""
    by_probability = gate.capacity and gate.drop == 2
    return {
        "ELEMENT": gate.element,
        "E": gate.experts,
        "K": gate.top_k,
        "LANES": cut.lanes,
        "THREADS": cut.threads,
        "BLOCKS": 1,
        "GRID": int(cut.blocks > 1),
        "CLUSTER": cut.cluster,
        "MASK": gate.mask,
        "NORMALIZE": gate.normalize,
        "SCORE": gate.score,
        "BIAS": gate.bias,
        "GROUPS": gate.num_groups,
        "TOP_GROUPS": gate.top_groups,
        "BEST_IN_GROUP": gate.best_in_group,
        "NOISE": gate.noise,
        "RECORDED": gate.recorded,
        "ALIGNED": gate.aligned,
        "CAPACITY": gate.capacity,
        # Where scores decide, and not logits alone, they must have the bits of the definition.
        "EXACT": int(bool(gate.score or gate.bias or gate.num_groups > 1 or by_probability)),
        "DROP": gate.drop,
        "WORDS32": counts.words,
        "CHUNKED": int(cut.tokens_per_block > 32 * counts.words),
        "COUNT_BITS": counts.count_bits,
        "ROWS": int(gate.row_bytes >= 0),
    }


def _slots(gate: Gate, cut: Geometry, free_bytes: int) -> int:
    """Rows of x that a block holds at once for the copy engine; 0: the engine cannot move them."""
    if gate.word != 16:
        return 0
    slots = min(24, free_bytes // max(gate.row_bytes, 1), cut.tokens_per_block)
    # 8 warps move rows, each as many at a time.
    return slots // 8 * 8 if slots > 8 else slots


# ---- the argument structs ------------------------------------------------------------------------------------------


def _struct(name: str, **fields: str) -> type[ctypes.Structure]:
    """A C struct: for each type of ctypes the names of its fields, in order."""
    names = []
    for kind, text in fields.items():
        names += [(field, getattr(ctypes, kind)) for field in text.split()]
    return type(name, (ctypes.Structure,), {"_fields_": names})


# The fields of the records in choices.py have the same names here: a record becomes pointers by name.
_Arguments = _struct(  # of route.cu
    "Arguments",
    c_void_p="logits bias mask step recorded live "
    "expert weight slot row source count offset load aux_loss z_loss lse status board key place x rows",
    c_uint64="seed generator_offset",
    c_float="floor scale noise_scale",
    c_int="num_tokens tokens_per_block capacity align num_rows row_bytes",
)
_BackwardArguments = _struct(  # of route_backward.cu
    "BackwardArguments",
    c_void_p="grad_weight grad_aux_loss grad_z_loss logits expert lse load mask live grad_logits",
    c_float="floor scale",
    c_int="num_tokens",
)

# ---- route ---------------------------------------------------------------------------------------------------------


def compile(gate: Gate, tokens: range) -> None:
    """Load every kernel that `route` needs for these numbers of tokens on the current device, several at a time.

    A CUDA graph can then be captured after one uncaptured call. Needs a GPU.
    """
    import torch

    device = torch.cuda.current_device()
    kernels = {plan(gate, n, *_device(device)).kernel for n in tokens}

    def load(kernel: Kernel) -> None:
        # The current device is a thread's own, and a new thread starts with device 0.
        torch.cuda.set_device(device)
        kernel.load()

    # NVRTC lets go of the GIL: threads are enough. list() raises what a thread has raised.
    with ThreadPoolExecutor() as pool:
        list(pool.map(load, kernels))


def route(inputs: Inputs, choices: Choices) -> Fields:
    """The fields of a Routing. The caller has checked the arguments."""
    fields, _ = _route(inputs, choices, None)
    return fields


def route_permute(x: Tensor, inputs: Inputs, choices: Choices) -> tuple[Tensor, ...]:
    """What `route` returns, and the rows [N, H] of x [T, H] in one launch; empty rows are 0."""
    fields, rows = _route(inputs, choices, x)
    return *fields, rows


def _route(inputs: Inputs, choices: Choices, x: Tensor | None) -> tuple[Fields, Any]:
    import torch

    # The kernels read logits and rows of x in words of 16 bytes.
    inputs = inputs._replace(logits=_aligned(inputs.logits))
    x = None if x is None else _aligned(x)
    logits = inputs.logits
    tokens, experts = logits.shape
    gate = _gate(inputs, choices, x)
    launch = plan(gate, tokens, *_device(logits.device.index))

    def ints(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device=logits.device)

    def floats(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=logits.device)

    fields = new_fields(ints, floats, tokens, experts, choices)
    num_rows = fields.source.shape[0]
    rows = None if x is None else x.new_empty(num_rows, x.shape[1])
    # Where the largest keys stay, blocks hand the keys and the places of all assignments to each other.
    assignments = tokens * choices.top_k
    is_ranked = gate.capacity and gate.drop >= 2
    key = ints(assignments) if is_ranked else None
    place = ints(assignments) if is_ranked else None
    with torch.cuda.device(logits.device):
        board = _board(launch.records) if launch.records else None
        arguments = _Arguments(
            **_addresses(inputs._asdict()),
            **_addresses(fields._asdict()),
            **_addresses({"board": board, "key": key, "place": place, "x": x, "rows": rows}),
            seed=choices.seed,
            generator_offset=choices.offset,
            floor=choices.floor,
            scale=choices.scale,
            noise_scale=choices.noise_scale,
            num_tokens=tokens,
            tokens_per_block=launch.tokens_per_block,
            capacity=-1 if choices.capacity is None else choices.capacity,
            align=choices.align,
            num_rows=num_rows,
            row_bytes=max(gate.row_bytes, 0),
        )
        launch.kernel(launch.grid, launch.threads, [arguments], launch.shared_bytes)
    return fields, rows


def _gate(inputs: Inputs, choices: Choices, x: Tensor | None) -> Gate:
    """What the kernel for this call must be compiled for. Choices that change nothing do not cost another kernel."""
    has_capacity = choices.capacity is not None
    # Without a capacity nothing is dropped, but choice-major order is an order of slots too.
    order = choices.drop if has_capacity or choices.drop == "choice" else "position"
    row_bytes = -1 if x is None else x.shape[1] * x.element_size()
    return Gate(
        element=element(inputs.logits),
        experts=inputs.logits.shape[1],
        top_k=choices.top_k,
        score=SCORES.index(choices.score),
        bias=int(inputs.bias is not None),
        num_groups=choices.num_groups,
        top_groups=choices.top_groups,
        best_in_group=choices.best_in_group if choices.num_groups > 1 else 2,
        normalize=int(choices.normalize == "selected"),
        capacity=int(has_capacity),
        drop=DROPS.index(order),
        mask=int(inputs.mask is not None),
        noise=NOISES.index(choices.noise),
        recorded=int(inputs.recorded is not None),
        aligned=int(choices.align > 1),
        row_bytes=row_bytes,
        word=gcd(16, row_bytes),
    )


def route_backward(grads: Gradients, saved: Saved, choices: Choices) -> Tensor:
    """The gradient in the logits [T, E] of route's weights and losses, in one launch. grad_weight is contiguous."""
    import torch

    saved = saved._replace(logits=_aligned(saved.logits))
    tokens, experts = saved.logits.shape
    grad_logits = torch.empty_like(saved.logits)
    if tokens == 0:
        return grad_logits
    threads = 128
    lanes = min(32, power_of_two(-(-experts // 8)))
    macros = {
        "ELEMENT": element(saved.logits),
        "E": experts,
        "K": choices.top_k,
        "LANES": lanes,
        "THREADS": threads,
        "EACH": 1,
        "SCORE": SCORES.index(choices.score),
        "NORMALIZE": int(choices.normalize == "selected"),
        "MASK": int(saved.mask is not None),
    }
    arguments = _BackwardArguments(
        **_addresses(grads._asdict()),
        **_addresses(saved._asdict()),
        **_addresses({"grad_logits": grad_logits}),
        floor=choices.floor,
        scale=choices.scale,
        num_tokens=tokens,
    )
    kernel = Kernel("route_backward.cu", "route_backward", tuple(macros.items()))
    with torch.cuda.device(saved.logits.device):
        kernel(-(-tokens * lanes // threads), threads, [arguments])
    return grad_logits


def element(tensor: Tensor) -> str:
    """The macro ELEMENT for the tensor's dtype."""
    return ELEMENTS[str(tensor.dtype).removeprefix("torch.")]


def _addresses(tensors: dict[str, Any]) -> dict[str, int | None]:
    """Pointers for a struct's fields of these names. The caller must keep the tensors until the kernel is queued."""
    return {name: None if tensor is None else tensor.data_ptr() for name, tensor in tensors.items()}


def _aligned(tensor: Tensor) -> Tensor:
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
