"""How the GPU programs measure errors, and those that a CPU can run too: tests/programs."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from conftest import PROGRAMS

torch = pytest.importorskip("torch")
sys.path.insert(0, str(PROGRAMS))

import rounding  # noqa: E402

from moecomm.gating import reference  # noqa: E402


def in_some_order(terms: Any, how: str) -> Any:
    """The float32 sum over the last axis: one by one, by halves, or one by one within 32 lanes and then by halves."""
    if how == "in a row":
        return np.cumsum(terms, axis=-1, dtype=np.float32)[..., -1]
    parts = np.cumsum(terms.reshape(*terms.shape[:-1], -1, 32), axis=-2, dtype=np.float32)[..., -1, :]
    parts = terms if how == "by halves" else parts
    while parts.shape[-1] > 1:
        half = parts.shape[-1] // 2
        parts = parts[..., :half] + parts[..., half:]
    return parts[..., 0]


@pytest.mark.parametrize("how", ["in a row", "by halves", "in 32 lanes"])
@pytest.mark.parametrize("cancels", [True, False])
def test_sums_are_near_and_wrong_ones_are_far(how: str, cancels: bool) -> None:
    rng = np.random.default_rng(0)
    terms = rng.normal(size=(1000, 4096)).astype(np.float32)
    if cancels:  # the exact sum is 0
        terms = np.concatenate([terms, -rng.permuted(terms, axis=1)], axis=1)
    wanted, size = terms.sum(1, dtype=np.float64), np.abs(terms).sum(1, dtype=np.float64)
    passed = terms.shape[1] if how == "in a row" else rounding.additions(terms.shape[1])
    got = torch.from_numpy(in_some_order(terms, how))
    assert rounding.distance(got, wanted, size, passed) <= 1
    if how != "in a row":  # where so many roundings would explain it
        got[0] -= terms[0, np.abs(terms[0]).argmax()]  # one term of one sum is missing
        assert rounding.distance(got, wanted, size, passed) > 1


@pytest.mark.parametrize("dtype", rounding.ROUNDING, ids=str)
def test_the_last_rounding_counts_and_no_more(dtype: Any) -> None:
    exact = torch.randn(100_000, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    exact[:1000] *= torch.finfo(dtype).tiny  # subnormal
    got = exact.to(dtype)
    assert 0.9 < rounding.distance(got, exact, 0, 0) <= 1
    got[5000] *= 1 + 4 * torch.finfo(dtype).eps
    assert rounding.distance(got, exact, 0, 0) > 1


def test_nan_and_another_shape_are_infinitely_far() -> None:
    nan = torch.tensor([1.0, torch.nan])
    assert rounding.distance(nan, np.ones(2), 1, 1) == rounding.distance(nan, np.ones(3), 1, 1) == float("inf")


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("normalize", ["none", "selected"])
def test_the_gradient_of_route_is_its_values_slope(score: str, normalize: str) -> None:
    rng = np.random.default_rng(3)
    logits, mask = rng.normal(size=(9, 6)) * 2, np.arange(9) != 4
    logits[:, 5] = -np.inf
    given = reference.route(logits, 2, score=score, capacity=2, mask=mask)
    grads: Any = (rng.normal(size=(9, 2)), 0.7, 0.3)
    kinds = {"expert": given.expert, "load": given.load, "mask": mask}
    kinds |= {"score": score, "normalize": normalize, "scale": 1.5}

    def value(x: Any) -> float:
        return sum(float((grad * part).sum()) for grad, part in zip(grads, reference.values(x, **kinds), strict=False))

    got, step = rounding.route_gradient(grads, logits, **kinds), 1e-6
    for at in np.ndindex(9, 5):
        shift = np.zeros_like(logits)
        shift[at] = step
        assert got[at] == pytest.approx((value(logits + shift) - value(logits - shift)) / (2 * step), abs=1e-8)
    assert (got[:, 5] == 0).all() and (got[4] == 0).all()
    assert (rounding.route_gradient(grads, logits, **kinds, sizes=True) >= np.abs(got)).all()


@pytest.mark.parametrize("checks", [["route", "route_gradient", "bad_logits", "small"], ["rows", "--case", "30"]])
@pytest.mark.slow
def test_the_gates_program_on_a_cpu(checks: list[str]) -> None:
    program = [sys.executable, str(PROGRAMS / "gating_cuda.py"), *checks, "--device", "cpu", "--seed", "0"]
    job = subprocess.run(program, capture_output=True, text=True)
    assert job.returncode == 0, job.stdout + job.stderr
