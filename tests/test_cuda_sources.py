"""The CUDA sources compile, for all GPUs they are meant for and with all their options; this needs no GPU."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest

from moecomm.gating.cuda import Gate, plan
from moecomm.gating.kernel import Kernel, compiler_options, read_source, source_folder

nvrtc = pytest.importorskip("cuda.bindings.nvrtc")

ARCHITECTURES = (80, 90, 100)
MULTIPROCESSORS = 132

GATES = {
    "plain": (Gate("float", 128, 1), 64),
    "single block": (Gate("float", 128, 1, capacity=1, drop=2), 40),
    "cluster": (Gate("float", 256, 8), 64),
    "grid": (Gate("float", 256, 8), 32768),
    "more tokens than a byte counts": (Gate("bfloat16", 64, 2), 100_000),
    "choices in the outputs": (Gate("float16", 1024, 32), 600_000),
    "odd": (Gate("float", 1023, 3), 700),
    "one expert": (Gate("float", 1, 1), 5),
    "few experts": (Gate("float", 8, 8), 300),
    "sigmoid, bias, groups": (Gate("float", 256, 8, 1, 1, 8, 4, 1), 4096),
    "groups by their best": (Gate("float", 160, 6, num_groups=8, top_groups=3, best_in_group=1), 4096),
    "masked, aligned": (Gate("bfloat16", 60, 4, mask=1, aligned=1, normalize=1), 4096),
    "gumbel": (Gate("float", 64, 2, noise=1), 4096),
    "jitter on scores": (Gate("float", 64, 2, noise=2, bias=1), 4096),
    **{f"drop {drop}": (Gate("float", 64, 2, capacity=1, drop=drop, normalize=1), 4096) for drop in range(4)},
    "recorded": (Gate("float", 128, 8, normalize=1, recorded=1), 32768),
    "recorded, sigmoid, masked, few tokens": (Gate("bfloat16", 60, 4, 1, mask=1, recorded=1), 64),
    **{
        f"recorded, drop {drop}": (Gate("float", 64, 2, capacity=1, drop=drop, recorded=1, mask=1), 4096)
        for drop in range(4)
    },
    "recorded, rows": (Gate("float", 128, 8, recorded=1, aligned=1, row_bytes=8192), 4096),
    "rows": (Gate("float", 128, 8, row_bytes=8192), 4096),
    "rows of odd size": (Gate("float", 128, 2, capacity=1, row_bytes=2002, word=2), 4096),
}
BACKWARD = {"E": 256, "K": 8, "LANES": 16, "THREADS": 128, "EACH": 1}
BACKWARDS = [
    {"ELEMENT": element, **BACKWARD, "SCORE": score, "NORMALIZE": score, "MASK": score}
    for element, score in (("float", 0), ("bfloat16", 1), ("float16", 0))
]


def compile_for(architecture: int, kernel: Kernel) -> str:
    """What the compiler says about an error; empty if there was none. A kernel that may start early waits first."""
    _, program = nvrtc.nvrtcCreateProgram(read_source(kernel.source).encode(), kernel.source.encode(), 0, [], [])
    options = [option.encode() for option in (*compiler_options(kernel.macros), f"-arch=sm_{architecture}")]
    (error,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
    if error == nvrtc.nvrtcResult.NVRTC_SUCCESS:
        if architecture >= 90 and "wait_for_inputs();" in read_source(kernel.source):
            text = text_of(nvrtc.nvrtcGetPTXSize, nvrtc.nvrtcGetPTX, program)
            before, wait, _ = text.partition("griddepcontrol.wait")
            assert wait and not re.search(r"\b(ld|st|red|atom)\.[.\w]*global", before)
        return ""
    return text_of(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog, program)


def text_of(size_of: Any, get: Any, program: Any) -> str:
    _, size = size_of(program)
    text = b" " * size
    get(program, text)
    return text.decode()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", GATES)
@pytest.mark.slow
def test_route_compiles(name: str, architecture: int) -> None:
    gate, tokens = GATES[name]
    launch = plan(gate, tokens, MULTIPROCESSORS, architecture)
    assert compile_for(architecture, launch.kernel) == ""


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.slow
def test_route_backward_compiles(architecture: int) -> None:
    for macros in BACKWARDS:
        assert compile_for(architecture, Kernel("route_backward.cu", "route_backward", tuple(macros.items()))) == ""


MOVES = [
    ("permute", {"WORD": "uint4", "TOP_K": 1, "UNROLL": 4, "READ_ONCE": 0, "KEEP": 1}),
    ("permute", {"WORD": "unsigned short", "TOP_K": 0, "UNROLL": 1, "READ_ONCE": 1, "KEEP": 0}),
    ("permute_fp8", {"ELEMENT": "bfloat16", "ALIGNED": 1, "TOP_K": 8}),
    ("permute_fp8", {"ELEMENT": "float", "ALIGNED": 0, "TOP_K": 0}),
    ("unpermute", {"ELEMENT": "bfloat16", "WIDTH": 8, "TOP_K": 8, "UNROLL": 1, "READ_ONCE": 0}),
    ("unpermute", {"ELEMENT": "float", "WIDTH": 1, "TOP_K": 0, "UNROLL": 4, "READ_ONCE": 1}),
    ("unpermute_backward", {"ELEMENT": "float16", "WIDTH": 8, "TOP_K": 2, "THREADS": 256}),
    ("unpermute_backward", {"ELEMENT": "float", "WIDTH": 1, "TOP_K": 0, "THREADS": 32}),
]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.slow
def test_moves_of_rows_compile(architecture: int) -> None:
    for name, macros in MOVES:
        assert compile_for(architecture, Kernel(f"{name}.cu", name, tuple(macros.items()))) == ""


@pytest.mark.slow
def test_every_source_is_compiled_here() -> None:
    compiled = {f"{name}.cu" for name, _ in MOVES} | {"route.cu", "route_backward.cu"}
    sources = {path.name for path in (source_folder() / "cuda").glob("*.cu")}
    assert {name for name in sources if not name.startswith("direct_")} == compiled  # those belong to an exchange


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("gate", [gate for gate, _ in GATES.values()], ids=GATES)
def test_launches_fit(gate: Gate, architecture: int) -> None:
    """Every token has a block, all blocks of a grid are on the GPU together, and their shared memory is there."""
    for tokens in (0, 1, 5, 63, 64, 65, 129, 511, 513, 4096, 33_000, 34_000, 10**6, 10**7):
        launch = plan(gate, tokens, MULTIPROCESSORS, architecture)
        macros = dict(launch.kernel.macros)
        blocks = launch.grid
        assert blocks * launch.tokens_per_block >= tokens and 1 <= blocks <= MULTIPROCESSORS
        assert launch.threads <= 1024 and launch.threads % 32 == 0
        assert launch.shared_bytes <= 222 * 1024
        assert macros["GRID"] == (blocks > 1)
        assert bool(launch.records) == (blocks > 1 and not macros["CLUSTER"])
        assert not (macros["CLUSTER"] and architecture < 90)


def test_a_range_of_sizes_needs_few_kernels() -> None:
    gate = Gate("float", 128, 8)
    kernels = {plan(gate, tokens, MULTIPROCESSORS, 90).kernel for tokens in range(1, 40_000, 7)}
    assert len(kernels) < 40
    assert plan(gate, 64, MULTIPROCESSORS, 90) != plan(dataclasses.replace(gate, mask=1), 64, MULTIPROCESSORS, 90)


def test_included_files_are_written_out_once() -> None:
    text = read_source("route.cu")
    assert '#include "' not in text
    assert text.count("struct Words {") == 1


@pytest.mark.parametrize("row_bytes", [-1, 64])
def test_more_tokens_than_a_block_can_rank_are_refused(row_bytes: int) -> None:
    gate = Gate("bfloat16", 1024, 1, row_bytes=row_bytes)
    limit = MULTIPROCESSORS * (2**22 - 1)
    assert plan(gate, limit, MULTIPROCESSORS, 90).tokens_per_block == 2**22 - 1
    with pytest.raises(ValueError, match=rf"route: logits has {limit + 1} tokens, expected at most {limit}"):
        plan(gate, limit + 1, MULTIPROCESSORS, 90)
