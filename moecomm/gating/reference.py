"""The definition of route, permute and unpermute in plain numpy: slow, obvious, and what all others are compared with.

Decisions (which expert, which slot) rest on float32 keys with the very bits of csrc/gating/score.h. Values (weights,
losses) and gradients have the precision of the logits given, float64 too.
"""

# ruff: noqa: N803, N806 - capitals are dimensions

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from moecomm.gating.routing import Generator, Noise, Routing

FLOOR = {"softmax": 2.0**-23, "sigmoid": 1e-20}
"""The least denominator of normalize="selected"."""


def route(
    logits: NDArray,
    top_k: int,
    *,
    expert: NDArray | None = None,
    score: str = "softmax",
    bias: NDArray | None = None,
    num_groups: int = 1,
    top_groups: int = 1,
    best_in_group: int = 2,
    normalize: str = "none",
    scale: float = 1.0,
    capacity: int | None = None,
    drop: str = "position",
    mask: NDArray | None = None,
    noise: Noise | None = None,
    generator: Generator | None = None,
    align: int = 1,
) -> Routing:
    """See `moecomm.route`."""
    T, E = logits.shape
    mask = np.ones(T, bool) if mask is None else mask
    clean = logits.astype(np.float32)
    keys = clean
    if noise is not None and generator is not None:
        keys = add_noise(clean, noise, generator)
    if score == "sigmoid" or bias is not None or num_groups > 1:
        keys = scores32(keys, score) + np.float32(0 if bias is None else bias)
        # Not -inf: a group with more experts to choose from must have the larger sum.
        keys = np.where(clean == -np.inf, np.finfo(np.float32).min, keys)
    chosen = np.full((T, top_k), -1, np.int32)
    for token in np.flatnonzero(mask):
        if expert is None:
            chosen[token] = best(allowed(keys[token], num_groups, top_groups, best_in_group), top_k)
        else:
            chosen[token] = expert[token]
    load = np.bincount(chosen[chosen >= 0], minlength=E).astype(np.int32)

    expert = chosen
    if capacity is not None and drop == "probability":
        priority = np.take_along_axis(scores32(clean, score), np.maximum(chosen, 0), 1)
        expert = keep_best(chosen, priority, E, capacity)
    elif capacity is not None and drop == "random" and generator is not None:
        priority = random_words(generator, 1, T * top_k).reshape(T, top_k)
        expert = keep_best(chosen, priority, E, capacity)
    # What is left over the capacity is dropped by its place in the line.
    expert, slot, count = stand_in_line(expert, E, capacity, by_choice=drop == "choice")

    rows_of_expert = -(-count // align) * align if capacity is None else np.full(E, capacity)
    offset = np.concatenate([[0], np.cumsum(rows_of_expert)]).astype(np.int32)
    row = np.where(expert >= 0, offset[expert] + slot, -1).astype(np.int32)
    source = np.full(num_rows(T, E, top_k, capacity, align), -1, np.int32)
    source[row[row >= 0]] = np.flatnonzero(row >= 0)
    weight, aux_loss, z_loss, lse = values(logits, expert, load, mask, score, normalize, scale)
    return Routing(
        expert=expert,
        weight=weight,
        slot=slot,
        row=row,
        source=source,
        count=count,
        offset=offset,
        load=load,
        aux_loss=aux_loss,
        z_loss=z_loss,
        lse=lse,
        status=np.zeros((), np.int32),
        capacity=capacity,
    )


def keep_best(chosen: NDArray, priority: NDArray, E: int, capacity: int) -> NDArray:
    """chosen [T, K], -1 for all but the `capacity` assignments of highest priority of each expert."""
    expert = chosen.copy()
    for e in range(E):
        assignments = np.flatnonzero(chosen == e)
        # Stable: of equal priorities the lower assignment stays.
        order = np.argsort(-priority.flat[assignments].astype(np.float64), kind="stable")
        expert.flat[assignments[order[capacity:]]] = -1
    return expert


def stand_in_line(chosen: NDArray, E: int, capacity: int | None, by_choice: bool) -> tuple[NDArray, NDArray, NDArray]:
    """expert [T, K], slot [T, K] and count [E]: each expert takes assignments in order until it is full."""
    T, K = chosen.shape
    expert = chosen.copy()
    slot = np.full((T, K), -1, np.int32)
    count = np.zeros(E, np.int32)
    line = list(np.ndindex(T, K))
    if by_choice:
        line.sort(key=lambda assignment: assignment[1])
    for t, k in line:
        e = expert[t, k]
        if e < 0:
            continue
        if count[e] == capacity:
            expert[t, k] = -1
        else:
            slot[t, k] = count[e]
            count[e] += 1
    return expert, slot, count


def num_rows(T: int, E: int, K: int, capacity: int | None, align: int) -> int:
    """N: the most rows that any routing of this size has."""
    if capacity is not None:
        return E * capacity
    padding = min(E, T * K) * (align - 1)
    return (T * K + padding) // align * align


def allowed(keys: NDArray, num_groups: int, top_groups: int, best_in_group: int) -> NDArray:
    """keys [E], -inf outside the top_groups groups whose best_in_group largest keys have the largest sum."""
    if num_groups == 1:
        return keys
    grouped = keys.reshape(num_groups, -1)
    with np.errstate(over="ignore"):  # a group without any expert to choose from: -inf
        group_keys = np.sort(grouped, axis=1)[:, -best_in_group:].sum(1, dtype=np.float32)
    outside = np.setdiff1d(np.arange(num_groups), best(group_keys, top_groups))
    eligible = grouped.copy()
    eligible[outside] = -np.inf
    return eligible.ravel()


def best(keys: NDArray, k: int) -> NDArray:
    """The k largest, best first, ties to the lower index."""
    return np.argsort(-keys, kind="stable")[:k]


def values(
    logits: NDArray, expert: NDArray, load: NDArray, mask: NDArray, score: str, normalize: str, scale: float
) -> tuple[Any, Any, Any, Any]:
    """weight, aux_loss, z_loss and lse of decisions already made: all of route that has a gradient."""
    E, K = logits.shape[1], expert.shape[1]
    x = logits[mask]
    largest = x.max(1, keepdims=True, initial=-np.inf)
    terms = np.exp(x - largest)
    total = terms.sum(1, keepdims=True)
    lse = np.zeros(len(logits), logits.dtype)
    lse[mask] = (largest + np.log(total))[:, 0]
    scores = np.zeros_like(logits)
    scores[mask] = terms / total if score == "softmax" else 1 / (1 + np.exp(-x))
    # A dropped assignment has weight 0, and no part in the sum of its token's weights.
    weight = np.where(expert >= 0, np.take_along_axis(scores, np.maximum(expert, 0), 1), 0)
    if normalize == "selected":
        weight = weight / np.maximum(weight.sum(1, keepdims=True), FLOOR[score])
    num_tokens = max(int(mask.sum()), 1)
    share = scores
    if score == "sigmoid":
        # Sigmoids need not sum to 1. Only their shares have a loss of 1 when balanced.
        share = scores / np.maximum(scores.sum(1, keepdims=True), 1e-20)
    mean_share = share.sum(0) / num_tokens
    aux_loss = E / K * (mean_share * (load / num_tokens)).sum()
    z_loss = (lse**2).sum() / num_tokens
    return scale * weight, aux_loss, z_loss, lse


# ---- moving rows ---------------------------------------------------------------------------------------------------


def permute(x: NDArray, routing: Routing) -> NDArray:
    """x [T, ...] -> rows [N, ...]: row n is the token of assignment source[n], or zeros."""
    rows = np.zeros((len(routing.source), *x.shape[1:]), x.dtype)
    used = np.flatnonzero(routing.source >= 0)
    rows[used] = x[routing.source[used] // routing.row.shape[1]]
    return rows


def unpermute(rows: NDArray, routing: Routing, residual: NDArray | None = None) -> NDArray:
    """rows [N, H] -> y [T, H]: residual + the weighted sum of each token's rows, in order of choice."""
    wide = np.float64 if rows.dtype == np.float64 else np.float32
    T, K = routing.row.shape
    y = np.zeros((T, rows.shape[1]), wide) if residual is None else residual.astype(wide)
    # In order of choice, as the kernels add: float sums depend on it.
    for k in range(K):
        tokens = np.flatnonzero(routing.row[:, k] >= 0)
        weight = routing.weight[tokens, k, None].astype(wide)
        y[tokens] += weight * rows[routing.row[tokens, k]].astype(wide)
    return y.astype(rows.dtype)


def to_e4m3(x: NDArray) -> tuple[NDArray, NDArray]:
    """x [N, H] -> the nearest e4m3 numbers of x / scale, as float32, and scale [N, ceil(H / 128)]."""
    N, H = x.shape
    blocks = np.zeros((N, -(-H // 128) * 128), np.float32)
    blocks[:, :H] = x
    blocks = blocks.reshape(N, -(-H // 128), 128)
    amax = np.abs(blocks).max(2)
    # 448 is the largest e4m3; below 2^-100 the scale would be subnormal.
    scale = np.where(amax > 0, np.maximum(amax, np.float32(2.0**-100)) / np.float32(448), np.float32(1))
    quotient = np.minimum(np.abs(blocks / scale[:, :, None]), 448).astype(np.float64)
    # e4m3 has 3 bits after the leading one, and none smaller than 2^-9.
    step = 2.0 ** (np.maximum(np.floor(np.log2(np.maximum(quotient, 2.0**-9))), -6) - 3)
    rounded = np.copysign(np.rint(quotient / step) * step, blocks)  # rint: ties to even
    return rounded.reshape(N, scale.shape[1] * 128)[:, :H].astype(np.float32), scale


# ---- csrc/gating/score.h, bit for bit ------------------------------------------------------------------------------


def scores32(logits: NDArray, score: str) -> NDArray:
    """[T, E] float32: the scores that keys are made of."""
    if score == "sigmoid":
        # exp of a number <= 0 cannot overflow.
        z = exp32(-np.abs(logits))
        inverse = np.float32(1) / (np.float32(1) + z)
        return np.where(logits < 0, z * inverse, inverse)
    with np.errstate(invalid="ignore"):
        terms = exp32(logits - logits.max(1, keepdims=True, initial=-np.inf))
    return terms * (np.float32(1) / folded_sum(terms))


def folded_sum(terms: NDArray) -> NDArray:
    """[T, E] -> [T, 1]: the upper half is added onto the lower half until one column is left."""
    T, E = terms.shape
    padded = np.zeros((T, 1 << (E - 1).bit_length()), np.float32)
    padded[:, :E] = terms
    while padded.shape[1] > 1:
        half = padded.shape[1] // 2
        padded = padded[:, :half] + padded[:, half:]
    return padded


def exp32(x: NDArray) -> NDArray:
    """exp(x) of float32 x <= 0; 0 below -80."""
    # Adding 1.5 * 2^23 rounds x / ln 2 to an integer n, in the low bits: exp(x) = 2^n * exp(r), r = x - n ln 2.
    shift = np.float32(12582912)
    clamped = np.where(x < -80, np.float32(-80), x)
    shifted = fma32(clamped, 1.44269504, shift)
    n = shifted - shift
    r = fma32(n, -1.42860677e-6, fma32(n, -0.693145752, clamped))
    p = fma32(r, 1.37805939e-3, 8.37312452e-3)
    for coefficient in (4.16695364e-2, 1.66664720e-1, 4.99999851e-1, 1, 1):
        p = fma32(p, r, coefficient)
    result = (p.view(np.uint32) + (shifted.view(np.uint32) << np.uint32(23))).view(np.float32)
    return np.where(x < -80, np.float32(0), result)


def log32(x: NDArray) -> NDArray:
    """log(x) of normal float32 x > 0."""
    # x = 2^n * (1 + r), with 1 + r in [sqrt(1/2), sqrt(2)).
    half = np.uint32(0x3F3504F3)
    from_half = x.view(np.uint32) - half
    n = (from_half.view(np.int32) >> 23).astype(np.float32)
    r = ((from_half & np.uint32(0x7FFFFF)) + half).view(np.float32) - np.float32(1)
    p = fma32(r, 7.0376836292e-2, -1.1514610310e-1)
    for coefficient in (
        1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1, -1.6668057665e-1, 2.0000714765e-1, -2.4999993993e-1,
        3.3333331174e-1,
    ):  # fmt: skip
        p = fma32(p, r, coefficient)
    square = r * r
    tail = fma32(n, -2.12194440e-4, fma32(square, -0.5, (p * r) * square))
    return fma32(n, 0.693359375, r + tail)


def fma32(a: Any, b: Any, c: Any) -> NDArray:
    """a * b + c of float32 numbers, rounded once: to odd in float64, which spares the second rounding."""
    a, b, c = (np.asarray(v, np.float32).astype(np.float64) for v in (a, b, c))
    product = a * b  # exact: 24 + 24 bits
    total = product + c
    # What the sum lost by rounding (Knuth's two-sum).
    with np.errstate(invalid="ignore"):
        rest = total - product
        error = (product - (total - rest)) + (c - rest)
    # Where the sum was inexact and its last bit is 0, the neighbour towards the exact sum has a last bit of 1.
    bits = np.atleast_1d(total).view(np.int64)
    step = np.where((error > 0) == (total > 0), 1, -1)
    odd = np.where((error != 0) & np.isfinite(total) & (bits % 2 == 0), bits + step, bits)
    return odd.view(np.float64).reshape(np.shape(total)).astype(np.float32)


def add_noise(logits: NDArray, noise: Noise, generator: Generator) -> NDArray:
    """The logits that select."""
    words = random_words(generator, 0, logits.size).reshape(logits.shape)
    u = ((words >> np.uint32(9)).astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-23)
    if noise.kind == "gumbel":
        return fma32(-np.float32(noise.scale), log32(-log32(u)), logits)
    return logits * fma32(noise.scale, fma32(2, u, -1), 1)


def random_words(generator: Generator, stream: int, num: int) -> NDArray:
    """The first `num` words of a stream of Philox4x32-10."""
    blocks = np.arange(-(-num // 4), dtype=np.uint64)
    low = np.uint64(0xFFFFFFFF)
    offset, seed = int(generator.offset), generator.seed
    # The counter: 4 words of 32 bits, in 64 bits each for the products below.
    c = [
        blocks,
        np.full_like(blocks, stream),
        np.full_like(blocks, offset & 0xFFFFFFFF),
        np.full_like(blocks, offset >> 32),
    ]
    k0 = seed & 0xFFFFFFFF
    k1 = seed >> 32
    for _ in range(10):
        p0 = np.uint64(0xD2511F53) * c[0]
        p1 = np.uint64(0xCD9E8D57) * c[2]
        high0 = p0 >> np.uint64(32)
        high1 = p1 >> np.uint64(32)
        c = [high1 ^ c[1] ^ np.uint64(k0), p1 & low, high0 ^ c[3] ^ np.uint64(k1), p0 & low]
        k0 = (k0 + 0x9E3779B9) & 0xFFFFFFFF
        k1 = (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack(c, 1).astype(np.uint32).ravel()[:num]
