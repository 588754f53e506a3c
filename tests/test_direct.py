"""What of DirectExchange needs no GPU: its kernels compile, its buffers do not overlap, its launches fit.

tests/programs/direct.py checks what it does, on a machine with GPUs.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from moecomm.exchange.direct.kernels import KernelShape
from moecomm.exchange.direct.memory import layout

SHAPES = {
    "many rows": KernelShape("bfloat16", False, 7168, 8, 4096, 2, 128, 132),
    "float8": KernelShape("bfloat16", True, 7168, 8, 4096, 8, 32, 24),
    "tags, rows of any size": KernelShape("float32", False, 33, 3, 17, 4, 5, 132),
    "one rank": KernelShape("float16", False, 1030, 1, 300, 1, 1, 2),
    "float8, tags": KernelShape("bfloat16", True, 200, 32, 20, 2, 1024, 132),
}
LARGE = KernelShape("float32", False, 16384, 32, 32768, 8, 1024, 132)


@pytest.mark.parametrize(
    ("architecture", "name"),
    [*((90, name) for name in SHAPES), (80, "float8, tags"), (80, "one rank"), (100, "many rows")],
)
@pytest.mark.slow
def test_kernels_compile(architecture: int, name: str) -> None:
    pytest.importorskip("cuda.bindings.nvrtc")
    from test_cuda_sources import compile_for

    for kernel in SHAPES[name].kernels():
        assert compile_for(architecture, kernel) == ""


def test_loaded_kernels_are_those_that_rows_need() -> None:
    """Rows side by side: all of them start at multiples of 16 bytes, or not all do."""

    def aligned(shape: KernelShape) -> list[object]:
        return [dict(kernel.macros)["ALIGNED"] for kernel in shape.kernels()]

    assert aligned(SHAPES["many rows"]) == [1] * 7
    assert aligned(SHAPES["tags, rows of any size"]) == [0] * 6 + [1]
    assert aligned(SHAPES["float8, tags"]) == [0, 0, 1, 1, 1]  # rows of 200 bytes come, rows of 400 are given
    assert aligned(replace(SHAPES["float8"], hidden=200)) == [1, 0, 1, 1, 1]  # compact ones lie where they came


def test_rows_that_end_within_16_bytes_are_not_aligned() -> None:
    torch = pytest.importorskip("torch")
    from moecomm.exchange.direct.launch import _aligned

    def rows(num: int, width: int, stride: int) -> object:
        return torch.zeros(4096, dtype=torch.bfloat16).as_strided((num, width), (stride, 1))

    assert _aligned(rows(3, 64, 64), rows(3, 60, 64), rows(0, 64, 64)) and _aligned(rows(1, 64, 65))
    assert not any(map(_aligned, (rows(1, 60, 60), rows(1, 60, 64), rows(3, 64, 65), rows(3, 64, 64)[:, 1:])))


@pytest.mark.parametrize("shape", [*SHAPES.values(), LARGE], ids=[*SHAPES, "large"])
def test_parts_of_the_buffers_do_not_overlap(shape: KernelShape) -> None:
    dispatch, combine, num_bytes = layout(shape, 3)
    assert len(dispatch) == len(combine) == 3
    offsets = [offset for buffer in (*dispatch, *combine) for offset in buffer.values()]
    assert offsets == sorted(offsets) and all(offset % 256 == 0 for offset in offsets)
    slots = shape.ranks * shape.max_tokens
    for buffers, kinds in ((dispatch, ("compact", "expanded", "spread")), (combine, ("combine", "combine expanded"))):
        for buffer in buffers:
            ends = [*offsets, num_bytes]
            room = {name: ends[ends.index(offset) + 1 :] for name, offset in buffer.items()}
            size = {
                name: min((end for end in room[name] if end > offset), default=0) - offset
                for name, offset in buffer.items()
            }
            assert size["arrived"] >= 4 * slots * max(shape.split(kind).slices for kind in kinds)
            assert size["credit"] >= 4 * shape.ranks * shape.num_sms
            assert size["rows"] >= slots * shape.pieces(shape.fp8 and buffers is dispatch) * 16 * (1 + shape.tagged)


@pytest.mark.parametrize("shape", [*SHAPES.values(), LARGE], ids=[*SHAPES, "large"])
def test_launches_fit(shape: KernelShape) -> None:
    for num_sms in (2, 3, 8, 132):
        some = replace(shape, num_sms=num_sms)
        assert 1 <= some.table_blocks < num_sms
        for kind in ("compact", "expanded", "spread"):
            kernel = some.dispatch(kind, True)
            split = kernel.split
            assert kernel.blocks == num_sms and 32 <= split.threads <= 1024 and kernel.shared_bytes <= 222 * 1024
            assert split.threads % (32 * split.chunk) == 0 and 1 <= split.pushers <= num_sms - some.table_blocks
        for kind in ("combine", "combine expanded"):
            split = some.split(kind)
            assert split.threads % (32 * split.chunk) == 0 and 1 <= split.pushers <= num_sms


def test_small_calls_have_tags() -> None:
    shape = SHAPES["many rows"]
    assert not shape.tagged and replace(shape, max_tokens=8).tagged
