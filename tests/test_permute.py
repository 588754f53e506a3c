"""permute and unpermute equal their definition: every dtype, odd widths, empty rows, dropped tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from moecomm import Routing, route
from moecomm.gating import Generator, permute, permute_fp8, reference, unpermute

WIDTHS = (1, 3, 16, 17, 64, 127, 129, 513, 1000)
KINDS: list[dict[str, Any]] = [
    {},
    {"align": 8},
    {"capacity": 5},
    {"capacity": 0},
    {"capacity": 9, "drop": "choice", "normalize": "selected"},
    {"capacity": 3, "drop": "random", "generator": Generator(4)},
]


def routed(num_tokens: int, num_experts: int = 8, top_k: int = 3, **options: Any) -> Routing:
    rng = np.random.default_rng(num_tokens)
    mask = rng.random(num_tokens) < 0.9
    return route(rng.normal(size=(num_tokens, num_experts)).astype(np.float32), top_k, mask=mask, **options)


def rows_of(rng: np.random.Generator, num_rows: int, width: int, dtype: Any) -> NDArray:
    return (rng.normal(size=(num_rows, width)) * 10).astype(dtype)


@pytest.mark.parametrize("options", KINDS, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "float16", "float64", "int8", "int64"])
def test_permute(options: dict[str, Any], dtype: str) -> None:
    rng = np.random.default_rng(1)
    for num_tokens in (0, 1, 40):
        routing = routed(num_tokens, **options)
        for width in WIDTHS:
            x = rows_of(rng, num_tokens, width, dtype)
            rows = permute(x, routing, threads=2)
            capacity = options.get("capacity")
            assert rows.shape == ((len(routing.source), width) if capacity is None else (8, capacity, width))
            np.testing.assert_array_equal(rows.reshape(-1, width), reference.permute(x, routing))


@pytest.mark.parametrize("options", KINDS, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_unpermute(options: dict[str, Any], dtype: str) -> None:
    rng = np.random.default_rng(2)
    for num_tokens in (0, 1, 40):
        routing = routed(num_tokens, **options)
        for width in WIDTHS:
            rows = rows_of(rng, len(routing.source), width, dtype)
            for residual in (None, rows_of(rng, num_tokens, width, dtype)):
                given = rows if "capacity" not in options else rows.reshape(8, options["capacity"], width)
                y = unpermute(given, routing, residual, threads=2)
                np.testing.assert_array_equal(y, reference.unpermute(rows, routing, residual))


@pytest.mark.parametrize("top_k", [1, 2, 4, 5, 8, 32])
def test_every_number_of_choices(top_k: int) -> None:
    routing = routed(50, 32, top_k, capacity=20)
    rows = rows_of(np.random.default_rng(3), len(routing.source), 200, np.float32)
    np.testing.assert_array_equal(unpermute(rows, routing), reference.unpermute(rows, routing))


@pytest.mark.parametrize("width", [4096, 4091])
def test_more_than_a_cache(width: int) -> None:
    """Rows that are written past the caches."""
    routing = routed(2500, 4, 2, capacity=1300)
    x = np.arange(2500 * width, dtype=np.float32).reshape(2500, width)
    rows = permute(x, routing, threads=2)
    np.testing.assert_array_equal(rows.reshape(-1, width), reference.permute(x, routing))
    for dtype in (np.float32, np.float16):
        narrow = (rows / np.float32(2500 * width)).astype(dtype)
        y = unpermute(narrow, routing, threads=2)
        np.testing.assert_array_equal(y, reference.unpermute(narrow.reshape(-1, width), routing))


def test_back_and_forth() -> None:
    routing = route(np.random.default_rng(0).normal(size=(64, 8)).astype(np.float32), 2, normalize="selected")
    x = np.random.default_rng(1).normal(size=(64, 100)).astype(np.float32)
    np.testing.assert_allclose(unpermute(permute(x, routing), routing), x, rtol=1e-6)


@pytest.mark.parametrize("options", KINDS, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_fp8(options: dict[str, Any], dtype: str) -> None:
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(4)
    routing = routed(40, **options)
    for width in (*WIDTHS, 256):
        x = rows_of(rng, 40, width, dtype)
        x[3], x[4, 0], x[5] = 0, 60000, x[5] * 1e-4
        codes, scales = permute_fp8(x, routing, threads=2)
        values, wanted_scales = reference.to_e4m3(reference.permute(x, routing))
        wanted = torch.from_numpy(values).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
        np.testing.assert_array_equal(codes.reshape(-1, width), wanted)
        np.testing.assert_array_equal(scales.reshape(wanted_scales.shape), wanted_scales)


def test_bad_arguments() -> None:
    routing = routed(4)
    x = np.zeros((4, 8), np.float32)
    for call, given, error, message in (
        (permute, (x, Routing(routing.expert, routing.weight)), TypeError, "permute: routing has no table of rows"),
        (permute, (x[:3], routing), ValueError, r"permute: x has shape \(3, 8\), expected \(4, H\)"),
        (permute, (x[0], routing), ValueError, r"permute: x has shape \(8,\)"),
        (permute, ([[1.0]], routing), TypeError, "permute: x is a list, expected a ndarray"),
        (permute_fp8, (x.astype(int), routing), TypeError, "permute_fp8: x has dtype int64, expected float32"),
        (unpermute, (x, routing), ValueError, r"unpermute: rows has shape \(4, 8\), expected \(12, H\)"),
        (unpermute, (np.zeros((12, 8)), routing), TypeError, "unpermute: rows has dtype float64"),
        (unpermute, (np.zeros((12, 8), np.float32), routing, x[:, :4]), ValueError, "unpermute: residual is float32"),
        (unpermute, ([[1.0]], routed(4, capacity=5)), TypeError, "unpermute: rows is a list, expected a ndarray"),
    ):
        with pytest.raises(error, match=message):
            call(*given)  # type: ignore[operator]


@pytest.mark.parametrize("dtype", [">f4", "S3", "U2", "M8[s]", "m8[s]", "V4", "i4,f4", "O", "g"])
def test_what_is_no_plain_number_is_refused(dtype: str) -> None:
    with pytest.raises(TypeError, match=r"permute: x has dtype .*, expected native numbers"):
        permute(np.zeros((4, 6), dtype), routed(4))


@pytest.mark.parametrize("dtype", ["bool", "uint16", "uint64", "complex64", "complex128"])
def test_every_plain_number_is_moved(dtype: str) -> None:
    routing, x = routed(4), rows_of(np.random.default_rng(5), 4, 6, dtype)
    np.testing.assert_array_equal(permute(x, routing), reference.permute(x, routing))


def test_masks_are_not_lost() -> None:
    routing, x = routed(4), np.ma.masked_less(np.ones((4, 8), np.float32), 0)
    for call, given in (
        (permute, (x, routing)),
        (unpermute, (np.ma.zeros((12, 8), np.float32), routing)),
        (route, (x, 2)),
    ):
        with pytest.raises(TypeError, match="is a masked array, whose mask would be lost"):
            call(*given)  # type: ignore[operator]


@pytest.mark.parametrize("shape", [(5, 8, 6), (4, 10, 6), (1, 40, 6), (0, 5, 6)])
def test_rows_by_expert_have_the_routing_s_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"unpermute: rows has shape .*, expected \(8, 5, H\)"):
        unpermute(np.zeros(shape, np.float32), routed(4, capacity=5))


def test_no_rows_of_no_width() -> None:
    assert unpermute(np.zeros((8, 0, 0), np.float32), routed(4, capacity=0)).shape == (4, 0)


def test_a_table_that_was_tampered_with_is_refused() -> None:
    routing = routed(4)
    routing.row[0, 0] = 1000
    with pytest.raises(ValueError, match="row is out of range"):
        permute(np.zeros((4, 8), np.float32), routing)
    with pytest.raises(ValueError, match="row is out of range"):
        unpermute(np.zeros((12, 8), np.float32), routing)
