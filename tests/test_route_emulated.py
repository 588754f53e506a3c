"""The gate's CUDA kernels on the CPU: the same sources, compiled by g++, as test_direct_emulated.py does it.

Their results are held against those of the kernels for CPUs. Clusters of blocks and the order of memory are left out.
"""

from __future__ import annotations

import ctypes
import re
import zlib
from collections import defaultdict
from collections.abc import Iterator
from contextlib import nullcontext
from itertools import count
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import test_direct_emulated as emulated  # noqa: E402

from moecomm import Routing, route  # noqa: E402
from moecomm.gating import Generator, Noise, cuda  # noqa: E402
from moecomm.gating.choices import Gradients, Saved  # noqa: E402
from moecomm.gating.kernel import Kernel, _argument, read_source  # noqa: E402
from moecomm.gating.route import request  # noqa: E402

INTEGERS = ("expert", "slot", "row", "source", "count", "offset", "load", "status")
FLOATS = ("weight", "aux_loss", "z_loss", "lse")
MULTIPROCESSORS = 4
PTX = {
    "ex2.approx.ftz.f32 %0, %1;": "%0 = exp2f(%1);",
    "fence.acq_rel.gpu;": "let_others_run();",
    "red.relaxed.gpu.global.add.u32 [%0], 1;": "++*(unsigned*)(%0);",
    "ld.relaxed.gpu.global.u32 %0, [%1];": "let_others_run(); %0 = *(const unsigned*)(%1);",
    "{ .reg .b128 word; ld.relaxed.gpu.global.b128 word, [%2]; mov.b128 {%0, %1}, word; }": (
        "let_others_run(); auto* const half = (const unsigned long long*)(%2); %0 = half[0]; %1 = half[1];"
    ),
    "{ .reg .b128 word; mov.b128 word, {%1, %2}; st.relaxed.gpu.global.b128 [%0], word; }": (
        "auto* const half = (unsigned long long*)(%0); half[0] = %1; half[1] = %2;"
    ),
}


def with_shared_memory(source: str) -> str:
    """Each declaration of shared memory as a request for it."""
    number = count(100)

    def requests(found: re.Match[str]) -> str:
        dynamic, kind, names = found.groups()
        statements = []
        for declared in re.split(r",(?![^\[]*\])", names):
            name, length = re.fullmatch(r"\s*(\w+)\s*((?:\[.*\])?)", declared).groups()  # type: ignore[union-attr]
            if dynamic:
                statements.append(f"auto* const {name} = static_cast<{kind}*>(shared_memory({next(number)}, -1));")
            else:
                statements.append(f"auto& {name} = ::shared<{kind}{length}>({next(number)});")
        return " ".join(statements)

    kind = r"((?:unsigned |long )*\w+)"
    return re.sub(rf"(extern )?__shared__ (?:(?:__align__|alignas)\(\d+\) )?{kind} ([^;]+);", requests, source)


class Gpu(emulated.Gpus):
    """Runs each kernel when it is launched."""

    def entry(self, kernel: Kernel) -> Any:
        source = emulated.in_cpp_all(with_shared_memory(read_source(kernel.source)))
        text = f'#include "cuda_on_cpu.h"\n{source}\n'
        text += f'extern "C" void entry(void** arguments) {{ call({kernel.name}, arguments); }}'
        name = f"{kernel.name}{zlib.crc32(repr(kernel).encode())}"
        return ctypes.CDLL(self.build(name, text, kernel.macros)).entry

    def launch(self, kernel: Kernel, grid: int, block: int, args: Any, shared_bytes: int = 0) -> None:
        values = [_argument(arg) for arg in args]
        pointers = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
        self.queued.append((0, kernel, pointers, grid, block, shared_bytes, (values, args)))
        self.run(seed=grid)


@pytest.fixture(scope="module", autouse=True)
def _gpu(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Of few multiprocessors, so that a few hundred tokens are many for it, and without clusters."""
    gpu = Gpu(tmp_path_factory.mktemp("kernels"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Kernel, "__call__", lambda kernel, *args: gpu.launch(kernel, *args))
        patch.setattr(cuda, "_device", lambda number: (MULTIPROCESSORS, 80))
        patch.setattr(cuda, "_board", lambda records: torch.zeros(records, 4, dtype=torch.int32))
        patch.setattr(torch.cuda, "device", lambda device: nullcontext())
        # What is not known belongs to clusters.
        patch.setattr(emulated, "PTX", defaultdict(lambda: "__builtin_trap();", emulated.PTX | PTX))
        torch.use_deterministic_algorithms(True)  # new memory holds NaN, or the largest integers
        yield
        torch.use_deterministic_algorithms(False)


def on_gpu(logits: Any, top_k: int, **given: Any) -> Routing:
    """What route does with CUDA tensors."""
    every = {"expert": None, "bias": None, "mask": None, "noise": None, "generator": None, **given}
    fields = cuda.route(*request(logits, top_k, **every))
    return Routing(*fields, given.get("capacity"))


def check(logits: Any, top_k: int, **given: Any) -> tuple[Routing, Routing]:
    got, wanted = on_gpu(logits, top_k, **given), route(logits, top_k, **given)
    for name in INTEGERS:
        assert torch.equal(getattr(got, name), getattr(wanted, name)), name
    for name in FLOATS:
        pair = getattr(got, name), getattr(wanted, name)
        torch.testing.assert_close(*pair, rtol=1e-5, atol=1e-6, msg=f"{name}: {{}}".format)
    return got, wanted


def random_logits(num_tokens: int, num_experts: int) -> Any:
    generator = torch.Generator().manual_seed(num_tokens)
    return torch.randn(num_tokens, num_experts, generator=generator) * 2


def record(num_tokens: int, num_experts: int, top_k: int, dropped: float) -> Any:
    generator = torch.Generator().manual_seed(num_tokens)
    expert = torch.rand(num_tokens, num_experts, generator=generator).argsort(1)[:, :top_k]
    return torch.where(torch.rand(expert.shape, generator=generator) < dropped, -1, expert)


SHAPES = [(40, 8, 2), (100, 24, 3), (70, 64, 8)]
CHOSEN: dict[str, dict[str, Any]] = {
    "plain": {},
    "masked, aligned": {"mask": True, "align": 8, "normalize": "selected"},
    "sigmoid, bias, groups": {"score": "sigmoid", "bias": True, "num_groups": 4, "top_groups": 3},
    "noise": {"noise": Noise("gumbel"), "generator": Generator(3)},
    **{
        f"drop by {drop}": {"capacity": 9, "drop": drop, "normalize": "selected", "generator": Generator(1)}
        for drop in ("position", "choice", "probability", "random")
    },
}
RECORDED = {name: given for name, given in CHOSEN.items() if "bias" not in given and "noise" not in given}
RECORDED["sigmoid"] = {"score": "sigmoid", "normalize": "selected", "mask": True}


def arguments(given: dict[str, Any], num_tokens: int, num_experts: int) -> dict[str, Any]:
    """With tensors in place of True."""
    made = dict(given)
    if "mask" in given:
        made["mask"] = torch.arange(num_tokens) % 5 > 0
    if "bias" in given:
        made["bias"] = torch.linspace(-0.1, 0.1, num_experts)
    return made


@pytest.mark.parametrize("shape", SHAPES[:2], ids=str)
@pytest.mark.parametrize("name", CHOSEN)
@pytest.mark.slow
def test_route(shape: tuple[int, int, int], name: str) -> None:
    num_tokens, num_experts, top_k = shape
    check(random_logits(num_tokens, num_experts), top_k, **arguments(CHOSEN[name], num_tokens, num_experts))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", RECORDED)
@pytest.mark.slow
def test_recorded_experts(shape: tuple[int, int, int], name: str) -> None:
    num_tokens, num_experts, top_k = shape
    given = arguments(RECORDED[name], num_tokens, num_experts)
    for dropped in (0, 0.3, 1):
        expert = record(num_tokens, num_experts, top_k, dropped)
        check(random_logits(num_tokens, num_experts), top_k, expert=expert, **given)


@pytest.mark.parametrize("wrong", [[8, 1], [-2, 1], [2**32, 1], [5, 5], [7, -1]])
@pytest.mark.slow
def test_wrong_records_are_noted(wrong: list[int]) -> None:
    """And dropped, the later one of two equal ones; the last of these is right."""
    logits = random_logits(40, 8)
    expert = record(40, 8, 2, 0)
    expert[33] = torch.tensor(wrong)
    got = on_gpu(logits, 2, expert=expert)
    is_right = wrong == [7, -1]
    assert int(got.status) == (0 if is_right else 4)
    expert[33] = torch.tensor({5: [5, -1], 7: [7, -1]}.get(wrong[0], [-1, 1]))
    wanted = route(logits, 2, expert=expert)
    for name in INTEGERS[:-1]:
        assert torch.equal(getattr(got, name), getattr(wanted, name)), name
    if not is_right:
        with pytest.raises(ValueError, match="expert has ids of no expert, or of one expert twice in a token"):
            got.check()


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("normalize", ["none", "selected"])
@pytest.mark.slow
def test_gradient(score: str, normalize: str, recorded: bool) -> None:
    num_tokens, num_experts, top_k = 50, 24, 3
    logits = random_logits(num_tokens, num_experts)
    for mask in (None, torch.arange(num_tokens) % 4 > 0):
        given: dict[str, Any] = {"score": score, "normalize": normalize, "mask": mask}
        if recorded:
            given["expert"] = record(num_tokens, num_experts, top_k, 0.3)
        every = {"expert": None, "bias": None, "noise": None, "generator": None, **given}
        inputs, choices = request(logits, top_k, **every)
        leaf = logits.clone().requires_grad_()
        routing = route(leaf, top_k, **given)
        pull = torch.randn(num_tokens, top_k, generator=torch.Generator().manual_seed(1))
        ((routing.weight * pull).sum() + 2 * routing.aux_loss + 0.1 * routing.z_loss).backward()
        saved = Saved(logits, routing.expert, routing.lse, routing.load, mask, inputs.live)
        grads = Gradients(pull, torch.tensor(2.0), torch.tensor(0.1))
        got = cuda.route_backward(grads, saved, choices)
        torch.testing.assert_close(got, leaf.grad, rtol=1e-4, atol=1e-6)
