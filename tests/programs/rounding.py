"""How far a kernel's sums may be from the exact ones: what the rounding of their terms explains, and no more.

Each operation of float32 changes its result by a factor of 1 + d, |d| <= u = 2^-24. A sum whose terms pass n roundings
on their way into it is therefore off by at most n * u / (1 - n * u) times the sum of the terms' magnitudes, in whatever
order they are added (Higham, Accuracy and Stability of Numerical Algorithms, 2002, sections 3.1 and 4.2). Where terms
cancel, the result is small and this bound is not: an error that is measured against the result depends on luck.
"""

# ruff: noqa: N806 - capitals are dimensions

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from moecomm.gating.reference import FLOOR

UNIT = 2.0**-24
ROUNDING = {torch.float32: 1, torch.float16: 2**13, torch.bfloat16: 2**16}
"""One rounding to this type, in roundings to float32."""
SMALLEST = {torch.float32: 2.0**-126, torch.float16: 2.0**-25, torch.bfloat16: 2.0**-126}
"""What is lost of a number too small for the type: all of it in float32, half a step of float16's subnormals."""


def additions(n: int) -> int:
    """The most in a row that one of n terms passes in a kernel: a warp or more shares a long sum, each lane adds its
    part, and 32 more lead from there over lanes (5), warps (at most 16) and blocks (at most 132 / 32 and 5)."""
    return min(n, n // 32 + 32)


@torch.no_grad()
def distance(got: Any, wanted: Any, size: Any, roundings: Any, narrowed: int = 1) -> float:
    """The largest |got - wanted| / what rounding explains: at most 1 is right. A wrong shape, NaN: infinitely far.

    got        a kernel's sums; the last rounding, to their own type, is counted here
    wanted     the same in float64
    size       the sum of the magnitudes of the terms, float64
    roundings  that a term passes before, in those of float32; one for all sums or for each
    narrowed   numbers that are rounded to got's type for one sum: each may lose what is too small for it
    """
    here = {"device": got.device, "dtype": torch.float64}
    exact, size, roundings = (torch.as_tensor(value, **here) for value in (wanted, size, roundings))
    if got.shape != exact.shape:
        return float("inf")
    explained = size * roundings * UNIT / (1 - roundings * UNIT)
    explained = explained + ROUNDING[got.dtype] * UNIT * (exact.abs() + explained) + narrowed * SMALLEST[got.dtype]
    largest = float(((got.double() - exact).abs() / explained).max()) if got.numel() else 0.0
    return largest if largest == largest else float("inf")


# ---- the gate ------------------------------------------------------------------------------------------------------


class Scores(NamedTuple):
    """Of each token in float64, and how many roundings those of the kernels are off."""

    softmax: NDArray
    score: NDArray
    lse: NDArray
    of_softmax: NDArray
    of_score: NDArray
    of_lse: NDArray
    """Of 1, not of lse: that is a sum, which may cancel."""


def scores(logits: NDArray, kind: str) -> Scores:
    """Of logits [T, E].

    The CUDA Math API and PTX bound the functions: ex2.approx 2^-22, 4 roundings; __logf 2^-21.41 near 1 and 3 ulp
    beyond, 6.1 roundings of 1 + log; __expf(x) 2 + 1.173 |x| ulp, 4 + 2.4 |x| roundings; __fdividef 2 ulp, 4 roundings.
    exp(x) by exp2(x * log2(e)) turns the roundings of x, of its product and of the constant, 2.3 in all, into 2.3 |x|.
    """
    possible = logits > -np.inf
    largest = logits.max(1, keepdims=True, initial=-np.inf)
    behind = np.where(possible, largest - logits, 0)
    terms = np.exp(logits - largest)
    total = terms.sum(1, keepdims=True)
    softmax, log_total = terms / total, np.log(total)
    lse = largest + log_total
    of_total = (softmax * (4 + 2.3 * behind)).sum(1, keepdims=True) + np.log2(logits.shape[1]) + 1  # added pairwise
    of_lse = of_total + 6.1 * (1 + log_total) + np.abs(lse)
    # In route's backward exp(x - lse). Forward, exp(x - largest) / total takes fewer: 4 for __fdividef, 3 beside.
    of_softmax = 4 + 2.3 * (behind + log_total) + of_lse
    score, of_score = softmax, of_softmax
    if kind == "sigmoid":
        score = 1 / (1 + np.exp(-logits))
        of_score = 6 + 2.4 * np.where(possible, np.abs(logits), 0)
    return Scores(softmax, score, lse[:, 0], of_softmax, of_score, of_lse[:, 0])


class Rounded(NamedTuple):
    """Magnitudes of terms times the roundings of each, added up: for `distance` with one rounding."""

    weight: NDArray
    lse: NDArray
    aux_loss: float
    z_loss: float


def route_sizes(
    logits: NDArray, expert: NDArray, load: NDArray, mask: NDArray, score: str, normalize: str, scale: float
) -> Rounded:
    """Of what reference.values returns for the same arguments."""
    (T, E), K, num_tokens = logits.shape, expert.shape[1], max(int(mask.sum()), 1)
    of = scores(np.where(mask[:, None], logits, 0), score)
    kept = np.where(expert >= 0, np.take_along_axis(of.score, np.maximum(expert, 0), 1), 0)
    of_weight = np.take_along_axis(of.of_score, np.maximum(expert, 0), 1) + 1
    if normalize == "selected":  # the quotient by a sum of K scores
        of_weight = of_weight + of_weight.max(1, keepdims=True) + K + 1
        kept = kept / np.maximum(kept.sum(1, keepdims=True), FLOOR[score])
    share, of_share = of.score, of.of_score
    if score == "sigmoid":  # divided by the sum over the experts
        share = share / share.sum(1, keepdims=True)
        of_share = of_share + of_share.max(1, keepdims=True) + additions(E) + 1
    # An expert's mean, times its load, over the experts, times constants; blocks add theirs in steps of 2^-40.
    each = share * (of_share + additions(T) + additions(E) + 8) * mask[:, None]
    aux_loss = E / K * ((each.sum(0) / num_tokens) * (load / num_tokens)).sum() + 132 * 2.0**-41 / UNIT
    square = 2 * np.abs(of.lse) * of.of_lse + of.of_lse**2 * UNIT + of.lse**2 * (additions(T) + 4)
    return Rounded(scale * kept * of_weight, of.of_lse * mask, aux_loss, (square * mask).sum() / num_tokens)


def route_gradient(
    grads: tuple[Any, float, float], logits: NDArray, expert: NDArray, load: NDArray, mask: NDArray, score: str,
    normalize: str, scale: float, sizes: bool = False,
) -> NDArray:  # fmt: skip
    """[T, E] float64: the gradient in the logits of the sum of grads (weight, aux_loss, z_loss) times reference.values.

    With `sizes` it is the sum of the magnitudes of the gradient's terms: the same formula, in which all are added.
    """
    minus, absolute = (np.add, np.abs) if sizes else (np.subtract, np.asarray)
    grad_weight, grad_aux, grad_z = map(absolute, grads)
    (T, E), K, num_tokens = logits.shape, expert.shape[1], max(int(mask.sum()), 1)
    of = scores(np.where(mask[:, None], logits, 0), score)
    slope = grad_aux * E / K * load / num_tokens**2  # of an expert's share of any token
    token, choice = np.nonzero(expert >= 0)
    chosen = token, expert[token, choice]
    pull, marks = np.zeros((2, T, E))  # on scores
    pull[chosen], marks[chosen] = scale * grad_weight[token, choice], 1
    if normalize == "selected":
        kept = (marks * of.score).sum(1, keepdims=True)
        through_sum = (pull * of.score).sum(1, keepdims=True) / np.maximum(kept, FLOOR[score]) ** 2
        pull = minus(pull / np.maximum(kept, FLOOR[score]), np.where(kept > FLOOR[score], through_sum, 0) * marks)
    of_z = grad_z * 2 / num_tokens * (np.abs(of.lse) + 1 if sizes else of.lse)[:, None]  # lse is off by so much of 1
    if score == "softmax":
        pull = pull + slope
        grad = of.softmax * (minus(pull, (pull * of.softmax).sum(1, keepdims=True)) + of_z)
    else:
        total = of.score.sum(1, keepdims=True)
        of_share = minus(slope, (slope * of.score).sum(1, keepdims=True) / total) / total
        grad = of.score * (1 - of.score) * (pull + of_share) + of_z * of.softmax
    return grad * mask[:, None]


def route_gradient_roundings(logits: NDArray, mask: NDArray, score: str, normalize: str) -> NDArray:
    """[T, 1] that a term of the gradient passes at most."""
    of = scores(np.where(mask[:, None], logits, 0), score)
    each = np.maximum(of.of_score, of.of_softmax).max(1, keepdims=True, initial=0)
    added = additions(logits.shape[1])
    roundings = 2 * each + added + 16  # score * (pull - sum of score * pull), and the constants in pull
    if normalize == "selected" or score == "sigmoid":  # pull: sum(pull * score) / sum(score)^2
        roundings = roundings + 3 * (each + added + 1)
    return roundings
