"""route equals its definition, for every option with every other, on inputs made to break it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from conftest import ROOT
from numpy.typing import NDArray

from moecomm import Routing, expert_capacity, route
from moecomm.gating import Generator, Noise, reference

EXACT = ("expert", "slot", "row", "source", "count", "offset", "load")
ROUNDED = ("weight", "aux_loss", "z_loss", "lse")


def same(got: Routing, wanted: Routing, **tolerance: float) -> None:
    for name in EXACT:
        np.testing.assert_array_equal(getattr(got, name), getattr(wanted, name), name)
    for name in ROUNDED:
        value = np.asarray(getattr(got, name), np.float32)
        np.testing.assert_allclose(
            value, getattr(wanted, name), **({"rtol": 3e-6, "atol": 1e-6} | tolerance), err_msg=name
        )


def check(logits: NDArray, top_k: int, **options: Any) -> Routing:
    got = route(logits, top_k, **options)
    threads = options.pop("threads", 1)
    wide = logits.astype(np.float64)
    same(got, reference.route(wide, top_k, **options))
    again = route(logits, top_k, threads=threads % 3 + 1, **options)
    for name in EXACT + ROUNDED:
        np.testing.assert_array_equal(getattr(got, name), getattr(again, name), name)
    return got


def draw(rng: np.random.Generator, num_tokens: int, num_experts: int, levels: int | None = None) -> NDArray:
    """Logits; of few levels, and so full of ties, where levels is given."""
    logits = rng.normal(size=(num_tokens, num_experts)) * 2
    return (np.round(logits * levels / 4) if levels else logits).astype(np.float32)


def options(rng: np.random.Generator, logits: NDArray, top_k: int) -> dict[str, Any]:
    """Any of route's options, drawn together."""
    num_tokens, num_experts = logits.shape

    def one_of(*values: Any) -> Any:
        return values[rng.integers(len(values))]

    chosen: dict[str, Any] = {
        "score": one_of("softmax", "sigmoid"),
        "normalize": one_of("none", "selected"),
        "scale": one_of(1.0, 2.5),
        "drop": one_of("position", "choice", "probability", "random"),
        "bias": one_of(None, rng.normal(size=num_experts).astype(np.float32) * 0.1),
        "mask": one_of(None, rng.random(num_tokens) < 0.7),
        "noise": one_of(None, None, Noise("gumbel", 0.7), Noise("jitter", 0.3)),
        "generator": Generator(int(rng.integers(2**62)), int(rng.integers(2**62))),
        "capacity": one_of(None, 0, 1, num_tokens * top_k // num_experts + 1, num_tokens),
    }
    if chosen["capacity"] is None:
        chosen["align"] = one_of(1, 8, 16, 100)
    groups = [n for n in (2, 3, 4) if num_experts % n == 0 and num_experts // n * (n - 1) >= top_k]
    if groups and rng.random() < 0.4:
        chosen["num_groups"] = one_of(*groups)
        chosen["top_groups"] = chosen["num_groups"] - 1
        chosen["best_in_group"] = one_of(1, 2)
    return chosen


SHAPES = [
    (1, 1, 1), (0, 4, 2), (3, 5, 5), (16, 2, 1), (17, 8, 2), (33, 31, 8), (64, 12, 3), (31, 33, 5), (47, 64, 8),
    (20, 6, 6), (12, 1024, 32), (9, 1023, 1), (700, 8, 2), (515, 16, 4),
]  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("levels", [None, 3, 1])
def test_every_option_with_every_other(shape: tuple[int, int, int], levels: int | None) -> None:
    rng = np.random.default_rng(sum(shape) + (levels or 0))
    num_tokens, num_experts, top_k = shape
    for _ in range(40 if num_tokens < 100 else 8):
        logits = draw(rng, num_tokens, num_experts, levels)
        check(logits, top_k, **options(rng, logits, top_k))


@pytest.mark.parametrize("top_k", range(1, 33))
def test_every_k(top_k: int) -> None:
    rng = np.random.default_rng(top_k)
    for drop in ("position", "choice", "probability", "random"):
        logits = draw(rng, 40, 40, 2)
        check(logits, top_k, drop=drop, capacity=top_k // 2 + 1, generator=Generator(1), normalize="selected")


def test_by_hand() -> None:
    """Three tokens, three experts, two choices, one place each. Token 1 has a tie, which goes to the lower expert."""
    logits = np.log(np.array([[1, 2, 5], [3, 3, 2], [6, 1, 1]], np.float32))
    got = route(logits, 2, capacity=1)
    assert got.expert.tolist() == [[2, 1], [0, -1], [-1, -1]]
    np.testing.assert_allclose(got.weight, np.array([[5, 2], [3, 0], [0, 0]]) / 8, rtol=1e-6)
    assert got.slot.tolist() == [[0, 0], [0, -1], [-1, -1]]
    assert got.row.tolist() == [[2, 1], [0, -1], [-1, -1]]
    assert (got.source.tolist(), got.offset.tolist()) == ([2, 1, 0], [0, 1, 2, 3])
    assert (got.count.tolist(), got.load.tolist()) == ([1, 1, 1], [2, 3, 1])
    by_choice = route(logits, 2, capacity=1, drop="choice")
    assert by_choice.expert.tolist() == [[2, 1], [0, -1], [-1, -1]]
    by_probability = route(logits, 2, capacity=1, drop="probability", normalize="selected")
    assert by_probability.expert.tolist() == [[2, -1], [-1, 1], [0, -1]]
    assert by_probability.weight.tolist() == [[1, 0], [0, 1], [1, 0]]


def test_groups_by_their_best_expert_or_their_best_two() -> None:
    """Group 0 has the best expert, group 1 the best two. A group of one expert has no second one."""
    scores = np.array([[40, 2, 30, 28]], np.float32)
    by_two = route(np.log(scores), 1, num_groups=2)
    by_one = route(np.log(scores), 1, num_groups=2, best_in_group=1)
    assert (by_two.expert.item(), by_one.expert.item()) == (2, 0)
    for best_in_group in (1, 2):
        alone = route(np.log(scores), 3, num_groups=4, top_groups=3, best_in_group=best_in_group)
        assert alone.expert.tolist() == [[0, 2, 3]]


@pytest.mark.parametrize(("num_groups", "top_groups", "top_k"), [(8, 3, 6), (4, 1, 8), (16, 16, 3)])
def test_groups_of_deepseek_v2(num_groups: int, top_groups: int, top_k: int) -> None:
    """Its group_limited_greedy: of each group the largest score, then the best experts of the best groups."""
    logits = np.random.default_rng(num_groups).normal(size=(200, 160)).astype(np.float32)
    groups = {"num_groups": num_groups, "top_groups": top_groups, "best_in_group": 1}
    got = route(logits, top_k, **groups)  # type: ignore[arg-type]
    scores = np.exp(logits.astype(np.float64))
    scores /= scores.sum(1, keepdims=True)
    of_groups = scores.reshape(200, num_groups, -1).max(2)
    least = np.sort(of_groups, axis=1)[:, -top_groups]
    inside = np.where(np.repeat(of_groups >= least[:, None], 160 // num_groups, axis=1), scores, 0)
    wanted = np.argsort(-inside, axis=1)[:, :top_k]
    np.testing.assert_array_equal(got.expert, wanted)
    np.testing.assert_allclose(got.weight, np.take_along_axis(scores, wanted, 1), rtol=1e-5)


def test_padding_counts_nowhere() -> None:
    rng = np.random.default_rng(0)
    logits, mask = draw(rng, 50, 8), rng.random(50) < 0.5
    poisoned = np.where(mask[:, None], logits, np.float32(np.nan))
    got, compact = route(poisoned, 2, mask=mask), route(logits[mask], 2)
    assert (got.expert[~mask] == -1).all()
    assert (got.weight[~mask] == 0).all()
    np.testing.assert_array_equal(got.expert[mask], compact.expert)
    np.testing.assert_array_equal(got.slot[mask], compact.slot)
    np.testing.assert_allclose(got.aux_loss, compact.aux_loss, rtol=1e-6)
    np.testing.assert_allclose(got.z_loss, compact.z_loss, rtol=1e-6)
    nobody = route(poisoned, 2, mask=np.zeros(50, bool))
    assert (nobody.aux_loss, nobody.z_loss, nobody.count.sum()) == (0, 0, 0)


@pytest.mark.parametrize("top_k", [1, 2, 3, 8])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_aux_loss_is_one_when_balanced(top_k: int, score: Any) -> None:
    logits = np.stack([np.roll(np.arange(8, dtype=np.float32), shift) for shift in range(8)])
    assert route(logits, top_k, score=score).aux_loss == pytest.approx(1)


def test_extreme_logits() -> None:
    rng = np.random.default_rng(5)
    logits = rng.choice(np.array([0.0, -0.0, 1e-45, 3e38, -3e38, -np.inf, 1, 100, -100], np.float32), size=(300, 24))
    logits[:, 0] = 0
    for score in ("softmax", "sigmoid"):
        for bias in (None, np.zeros(24, np.float32)):
            got = check_quietly(logits, 6, score=score, bias=bias)
            assert np.isfinite(got.weight).all()


@pytest.mark.parametrize("kind", ["gumbel", "jitter"])
def test_noise_leaves_impossible_experts_impossible(kind: Any) -> None:
    logits = draw(np.random.default_rng(3), 64, 8)
    logits[:, 2:5] = -np.inf
    got = check_quietly(logits, 3, noise=Noise(kind), generator=Generator(1))
    assert got.load[2:5].sum() == 0


@pytest.mark.parametrize("noise", [None, Noise("gumbel"), Noise("jitter")])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("num_groups", [1, 2, 8])
def test_scores_and_bias_leave_impossible_experts_impossible(score: Any, num_groups: int, noise: Noise | None) -> None:
    rng = np.random.default_rng(4)
    chosen = {"score": score, "noise": noise, "generator": Generator(1)}
    chosen |= {"num_groups": num_groups, "top_groups": (num_groups + 1) // 2}
    logits = draw(rng, 100, 16) - 100 * rng.integers(2, size=(100, 16)).astype(np.float32)  # many scores are 0
    possible = rng.permuted(np.arange(16) < rng.integers(1, 16, size=(100, 1)), axis=1)
    logits[~possible] = -np.inf
    for bias in (None, np.where(np.arange(16) % 3 == 0, 5, -5).astype(np.float32)):
        first = check_quietly(logits, 1, bias=bias, **chosen).expert[:, 0]
        assert possible[np.arange(100), first].all()
        check_quietly(logits, 8, bias=bias, **chosen)


def test_an_impossible_expert_fills_up_with_weight_zero() -> None:
    logits = np.array([[-np.inf, -np.inf, 3, -np.inf]], np.float32)
    for score in ("softmax", "sigmoid"):
        got = route(logits, 3, score=score, bias=np.array([0, 9, 0, 9], np.float32), capacity=1)
        assert got.expert.tolist() == [[2, 0, 1]]
        assert (got.weight[0, 1:] == 0).all()
        assert got.count.tolist() == got.load.tolist() == [1, 1, 1, 0]


def check_quietly(logits: NDArray, top_k: int, **chosen: Any) -> Routing:
    """`check`, where the definition overflows on its way; z_loss may be beyond float32."""
    with np.errstate(all="ignore"):
        got, wanted = route(logits, top_k, **chosen), reference.route(logits.astype(np.float64), top_k, **chosen)
    for name in (*EXACT, "weight"):
        np.testing.assert_allclose(getattr(got, name), getattr(wanted, name), rtol=3e-6, atol=1e-6, err_msg=name)
    return got


def test_zeros_of_either_sign_are_a_tie() -> None:
    logits = np.array([[-0.0, 0.0], [0.0, -0.0]], np.float32)
    assert route(logits, 2).expert.tolist() == [[0, 1], [0, 1]]


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("place", [(0, 0), (16, 3), (299, 7)])
def test_unusable_logits_raise(value: float, place: tuple[int, int]) -> None:
    logits = np.zeros((300, 8), np.float32)
    logits[place] = value
    with pytest.raises(ValueError, match="NaN or \\+inf"):
        route(logits, 2)


def test_unusable_logits_can_be_noted() -> None:
    logits = np.zeros((30, 8), np.float32)
    logits[7, 3] = np.nan
    got = route(logits, 2, capacity=5, unusable="note")
    assert (got.expert == -1).all() and (got.weight == 0).all() and (got.source == -1).all()
    assert (got.status, got.count.sum(), got.load.sum()) == (1, 0, 0)
    with pytest.raises(ValueError, match="route: logits has a NaN"):
        got.check()
    assert route(logits, 2, mask=np.arange(30) != 7, unusable="note").check().load.sum() == 58


def test_more_that_nothing_follows_from() -> None:
    logits = np.zeros((20, 8), np.float32)
    with pytest.raises(ValueError, match="bias has a number that is not finite"):
        route(logits, 2, bias=np.full(8, np.nan, np.float32))
    logits[3] = -np.inf
    with pytest.raises(ValueError, match="a row of -inf alone"):
        route(logits, 2)


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"logits": [[1.0]]}, TypeError, "logits is a list"),
    ({"logits": np.zeros((3, 8))}, TypeError, "logits has dtype float64, expected float32, float16, bfloat16"),
    ({"logits": np.zeros(8, np.float32)}, ValueError, r"logits has shape \(8,\), expected \[T, E\]"),
    ({"logits": np.zeros((2, 1025), np.float32)}, ValueError, "E <= 1024"),
    ({"top_k": 9}, ValueError, "top_k is 9, expected 1 .. 8"),
    ({"top_k": 0}, ValueError, "top_k is 0"),
    ({"top_k": 1.0}, TypeError, "top_k is 1.0, expected an int"),
    ({"score": "relu"}, ValueError, "score is 'relu', expected 'softmax' or 'sigmoid'"),
    ({"normalize": "all"}, ValueError, "normalize is 'all'"),
    ({"drop": "last"}, ValueError, "drop is 'last'"),
    ({"num_groups": 3}, ValueError, "8 experts in 3 groups"),
    ({"num_groups": 8, "top_groups": 1}, ValueError, "2 chosen within 1 of them"),
    ({"top_groups": 2}, ValueError, "top_groups is 2, expected 1 .. 1"),
    ({"best_in_group": 3}, ValueError, "best_in_group is 3, expected 1 .. 2"),
    ({"unusable": "drop"}, ValueError, "unusable is 'drop', expected 'raise' or 'note'"),
    ({"scale": 0.0}, ValueError, "scale is 0.0"),
    ({"scale": "a"}, TypeError, "scale is 'a', expected a number"),
    ({"scale": 1e300}, ValueError, "scale is 1e\\+300, expected a number > 0 that float32 can hold"),
    ({"scale": 1e-50}, ValueError, "scale is 1e-50"),
    ({"scale": float("nan")}, ValueError, "scale is nan"),
    ({"capacity": -1}, ValueError, "capacity is -1"),
    ({"capacity": 4, "align": 8}, ValueError, "align is 8, expected 1 .. 1"),
    ({"capacity": 2**30}, ValueError, "too many"),
    ({"bias": np.zeros(7, np.float32)}, ValueError, r"bias is float32 \(7,\), expected float32 \(8,\)"),
    ({"bias": np.zeros(8)}, ValueError, "bias is float64"),
    ({"mask": np.zeros(3, np.int32)}, ValueError, r"mask is int32 \(3,\), expected bool \(3,\)"),
    ({"mask": [True] * 3}, TypeError, "mask is a list"),
    ({"noise": Noise("gumbel")}, TypeError, "generator is None"),
    ({"drop": "random"}, TypeError, "generator is None"),
    ({"noise": Noise("white"), "generator": Generator(1)}, ValueError, "expected Noise"),  # type: ignore[arg-type]
    ({"noise": "gumbel"}, TypeError, "noise is 'gumbel', expected a Noise or None"),
    ({"noise": Noise("gumbel", 1e300), "generator": Generator(1)}, ValueError, "expected Noise.*'gumbel', 0 .. 1e"),
    ({"noise": Noise("gumbel", "a"), "generator": Generator(1)}, TypeError, "noise.scale is 'a', expected a number"),  # type: ignore[arg-type]
    ({"noise": Noise("jitter", 1.5), "generator": Generator(1)}, ValueError, r"expected Noise.*'jitter', 0 .. 1\)"),
    ({"drop": "random", "generator": Generator(-1)}, ValueError, "generator.seed is -1"),
    ({"threads": 0}, ValueError, "threads is 0"),
]


@pytest.mark.parametrize(("given", "error", "message"), BAD, ids=[str(given)[:40] for given, _, _ in BAD])
def test_bad_arguments(given: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"route: .*{message}"):
        route(**{"logits": np.zeros((3, 8), np.float32), "top_k": 2} | given)


def test_float16_and_strides() -> None:
    logits = draw(np.random.default_rng(1), 80, 16)
    same(route(logits.astype(np.float16), 3), reference.route(logits.astype(np.float16).astype(np.float64), 3))
    same(route(logits[::2, ::-1], 3), reference.route(logits[::2, ::-1].astype(np.float64), 3))


@pytest.mark.parametrize("drop", ["position", "choice", "probability", "random"])
def test_threads_change_nothing(drop: Any) -> None:
    """Enough tokens for several threads to start."""
    logits = draw(np.random.default_rng(8), 40001, 32)
    one, *others = (
        route(logits, 4, drop=drop, capacity=4000, generator=Generator(2), threads=threads) for threads in (1, 2, 3, 16)
    )
    for other in others:
        for name in EXACT + ROUNDED:
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name), name)


def test_noise_draws_in_proportion() -> None:
    """With Gumbel noise of scale 1 a choice is a draw from the softmax; another offset is another draw."""
    logits = np.tile(np.log(np.array([1, 2, 3, 4], np.float32)), (20000, 1))
    shares = [route(logits, 1, noise=Noise("gumbel"), generator=Generator(7, n)).load / 20000 for n in (0, 1)]
    np.testing.assert_allclose(shares, np.tile([0.1, 0.2, 0.3, 0.4], (2, 1)), atol=0.015)
    assert (shares[0] != shares[1]).any()


def test_random_drop_is_fair() -> None:
    logits = np.zeros((4000, 1), np.float32)
    kept = route(logits, 1, capacity=1000, drop="random", generator=Generator(3)).expert[:, 0] == 0
    assert kept.sum() == 1000
    np.testing.assert_allclose(kept.reshape(4, 1000).sum(1), 250, atol=60)


def test_expert_capacity_is_deepspeeds() -> None:
    assert [expert_capacity(16, 4, k) for k in (1, 2, 3)] == [4, 8, 12]
    assert expert_capacity(16, 4, 1, factor=1.25) == 5
    assert expert_capacity(17, 4, 1) == 5
    assert expert_capacity(3, 64, 2, least=8) == 8
    assert expert_capacity(0, 4, 2) == 4
    with pytest.raises(ValueError, match="expert_capacity: got num_tokens 4, num_experts 0"):
        expert_capacity(4, 0, 1)


MEMORY = """
import resource
import numpy as np
from moecomm import route

logits = np.zeros((1 << 20, 8), np.float32)
logits[0] = 1
route(logits[:1000], 1)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
got = route(logits, 1, capacity=4)
result = sum(np.asarray(value).nbytes for value in vars(got).values() if value is not None)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 - result)
"""


def test_memory_is_linear_in_tokens() -> None:
    """Beside its result, route needs 8 numbers per 256 tokens and expert: no [T, E] or [T, E, C] anywhere."""
    job = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    assert int(job.stdout) < 2 << 20


# ---- the arithmetic ------------------------------------------------------------------------------------------------

PROGRAM = """
#include <cstdio>
#include "score.h"
using namespace moecomm;
int main() {
    float x;
    while (std::fread(&x, 4, 1, stdin) == 1) {
        const float out[4] = {exp_nonpositive(-x), log_positive(x), sigmoid(x > 40 ? -x : x),
                              noisy(x, kGumbel, 0.5f, random_word({3, 1ull << 40}, kNoise, bits_of(x)))};
        std::fwrite(out, 4, 4, stdout);
        const unsigned char code = e4m3(x);
        std::fwrite(&code, 1, 1, stdout);
    }
}
"""


@pytest.fixture(scope="module")
def host_program(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("score")
    (folder / "main.cpp").write_text(PROGRAM)
    command = [
        "c++",
        "-std=c++17",
        "-O2",
        "-ffp-contract=off",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-I",
        str(ROOT / "csrc/gating"),
    ]
    subprocess.run([*command, str(folder / "main.cpp"), "-o", str(folder / "main")], check=True)
    yield str(folder / "main")


def test_the_shared_header_has_the_reference_s_bits(host_program: str) -> None:
    rng = np.random.default_rng(2)
    x = np.concatenate([np.exp(rng.uniform(-20, 6, 20000)), [1, 79.99, 80, 80.01, 448, 464, 1e30]]).astype(np.float32)
    out = subprocess.run([host_program], input=x.tobytes(), capture_output=True, check=True).stdout
    got = np.frombuffer(out, np.dtype([("floats", np.float32, 4), ("code", np.uint8)]))
    words = np.array([reference.random_words(Generator(3, 1 << 40), 0, 4)[i] for i in range(4)])
    assert len(set(words.tolist())) == 4
    np.testing.assert_array_equal(got["floats"][:, 0], reference.exp32(-x))
    np.testing.assert_array_equal(got["floats"][:, 1], reference.log32(x))
    signed = np.where(x > 40, -x, x)[None]
    np.testing.assert_array_equal(got["floats"][:, 2], reference.scores32(signed, "sigmoid")[0])
    torch = pytest.importorskip("torch")
    codes = torch.from_numpy(np.minimum(x, 448)).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    np.testing.assert_array_equal(got["code"], codes)


def test_philox_is_philox() -> None:
    """The first known answer of Random123's own test."""
    words = reference.random_words(Generator(0, 0), 0, 4)
    assert [f"{word:08x}" for word in words] == ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"]


def test_exp_and_log_are_close() -> None:
    x = np.linspace(-80, 0, 200001).astype(np.float32)
    np.testing.assert_allclose(reference.exp32(x), np.exp(x.astype(np.float64)), rtol=1.2e-7)
    u = ((np.arange(1 << 16) * 128 + 0.5) * 2.0**-23).astype(np.float32)
    np.testing.assert_allclose(reference.log32(u), np.log(u.astype(np.float64)), rtol=1.2e-7)


def test_repr_of_a_routing_says_its_sizes() -> None:
    routing = route(np.zeros((3, 4), np.float32), 2, capacity=5)
    assert repr(routing) == "Routing(expert [3, 2], capacity 5, weight float32)"
    short = Routing(np.zeros((0, 1), np.int64), np.zeros((0, 1)))
    assert repr(short) == "Routing(expert [0, 1], capacity None, weight float64)"
