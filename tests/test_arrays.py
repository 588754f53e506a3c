import numpy as np
import pytest

from moecomm import _core
from moecomm.arrays import copy_blocks, overlap


def blocks_by_hand(src: np.ndarray, order: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    starts = np.cumsum(sizes) - sizes
    return np.concatenate([src[starts[i] : starts[i] + sizes[i]] for i in order]) if len(order) else src[:0]


@pytest.mark.parametrize("dtype", ["uint8", "float32", "complex128"])
@pytest.mark.parametrize("num_blocks", [0, 1, 2, 17])
@pytest.mark.parametrize("shape", [(), (3,), (0,), (2, 5)])
def test_copy_blocks(dtype: str, num_blocks: int, shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(num_blocks)
    order = rng.permutation(num_blocks)
    for sizes in (np.ones(num_blocks, np.int64), rng.integers(0, 4, num_blocks), np.zeros(num_blocks, np.int64)):
        src = (rng.random((int(sizes.sum()), *shape)) * 200).astype(dtype)
        dst = np.full_like(src, 7)
        copy_blocks(dst, src, order, sizes)
        assert (dst == blocks_by_hand(src, order, sizes)).all()
    src = (rng.random((num_blocks, *shape)) * 200).astype(dtype)
    dst = np.full_like(src, 7)
    copy_blocks(dst, src, order)
    assert (dst == src[order]).all()


@pytest.mark.parametrize(
    ("order", "rows", "match"),
    [
        ([0, 2], None, "out of range"),
        ([-1, 0], None, "out of range"),
        ([0], None, "do not fill"),
        ([0, 1], [1, 2], "do not fill src"),
        ([0, 1], [-1, 3], "negative"),
        ([0, 1], [2], "differ in length"),
        ([0, 0], [2, 0], "do not fill dst"),
        ([0, 0, 0, 1, 2, 3], [1, 1, 0, 0, 0, 0], "do not fill dst"),
        ([0, 1, 2], [2**62, 2**62, 2**62 + 2**61], "do not fill src"),  # the sum of their bytes is 0 in 64 bits
        ([0, 1], [2**62 + 1, 2**62 + 1], "do not fill src"),  # and 8
    ],
)
def test_the_kernel_refuses_what_does_not_fit(order: list[int], rows: list[int] | None, match: str) -> None:
    src, dst = np.arange(8, dtype=np.uint8), np.zeros(8, np.uint8)
    sizes = None if rows is None else np.array(rows, np.int64)
    with pytest.raises(ValueError, match=match):
        _core.copy_blocks(dst, src, np.array(order, np.int64), sizes, 4)
    assert not dst.any()


def test_the_kernel_copies_no_array_behind_the_callers_back() -> None:
    src, order = np.arange(8, dtype=np.uint8), np.array([1, 0])
    for bad in (np.zeros(8, np.int8), np.zeros(16, np.uint8)[::2], np.zeros((2, 4), np.uint8)):
        with pytest.raises(TypeError):
            _core.copy_blocks(bad, src, order, None, 4)
    with pytest.raises(TypeError):
        _core.copy_blocks(np.zeros(8, np.uint8), src, order.astype(np.int32), None, 4)


def test_overlap() -> None:
    memory = np.zeros(10)
    assert overlap(memory[:6], memory[5:])
    assert not overlap(memory[:5], memory[5:])
