"""The kernels of DirectExchange on the CPU: the same sources, compiled by g++, and emulation/cuda_on_cpu.cpp for a GPU.

What DirectExchange launches is queued. Then the kernels of all ranks run at a time, their threads in random order, and
the results are compared with plain loops. Numbers are small integers: sums are exact in whatever order.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from conftest import PROGRAMS

from moecomm import CommError, Routing
from moecomm.exchange.direct import DirectExchange
from moecomm.exchange.direct.kernels import KernelShape, WorkSplit
from moecomm.exchange.direct.launch import Launcher
from moecomm.exchange.direct.memory import Buffer, Buffers, Peers, layout
from moecomm.exchange.direct.plan import DirectPlan
from moecomm.gating.kernel import Kernel, _argument, read_source

torch = pytest.importorskip("torch")
if shutil.which("g++") is None:
    pytest.skip("there is no g++", allow_module_level=True)
sys.path.insert(0, str(PROGRAMS))

import direct  # noqa: E402

FOLDER = Path(__file__).parent / "emulation"
COMPILER = ("g++", "-std=c++17", "-O1", "-fPIC", "-shared", "-fno-strict-aliasing", "-ffp-contract=off")
GAP, UNTOUCHED = 512, 0xA5
"""Bytes between the parts of symmetric memory, and what they hold."""

# ---- from CUDA to C++ ------------------------------------------------------------------------------------------------

PTX = {
    "mov.u64 %0, %globaltimer;": "%0 = virtual_time();",
    "cvt.rn.bf16.f32 %0, %1;": "%0 = bfloat16_bits(%1);",
}
NOT_RUN = ("griddepcontrol", "createpolicy", "{\\n", "cvt.f32.f16", "cvt.rn.f16", "cvt.rn.satfinite")
"""How assembly begins that belongs to other kernels, other GPUs, or float16."""


def in_cpp(ptx: str, operands: list[str]) -> str:
    """A statement that does the same."""
    access = re.fullmatch(r"(ld|st)\.(?:(?:relaxed|acquire|release)\.sys|volatile)\.global(?:\.v.)?\.u32 (.+);", ptx)
    if ptx.startswith(NOT_RUN):
        ptx = "__builtin_trap();"
    elif access:
        words = re.findall(r"(?<!\[)%\d", access[2])
        address = re.findall(r"\[(%\d)\]", access[2])[0]
        form = "{word} = load_word(where, {i});" if access[1] == "ld" else "store_word(where, {i}, {word});"
        body = "".join(form.format(i=i, word=word) for i, word in enumerate(words))
        ptx = f"auto* const where = (unsigned*)({address}); {body}"
    else:
        ptx = PTX[ptx]
    return "{ " + re.sub(r"%(\d)", lambda found: f"({operands[int(found[1])]})", ptx) + " }"


def in_cpp_all(source: str) -> str:
    """Without assembly, and with each block's shared memory asked for."""
    while found := re.search(r'asm(?: volatile)?\(\s*((?:"[^"]*"\s*)+)', source):
        end, depth, operands = found.end(), 1, [""]
        while depth:
            depth += {"(": 1, ")": -1}.get(source[end], 0)
            if depth > 1:
                operands[-1] += source[end]
            elif source[end] == ")":
                operands.append("")
            end += 1
        ptx = "".join(re.findall('"([^"]*)"', found[1]))
        source = source[: found.start()] + in_cpp(ptx, [text[1:] for text in operands]) + source[end + 1 :]
    number = iter(range(100))

    def shared(found: re.Match[str]) -> str:
        dynamic, kind, name, length = found.groups()
        if dynamic:
            return f"{kind}* const {name} = static_cast<{kind}*>(shared_memory({next(number)}, -1));"
        return f"auto& {name} = shared<{kind}{length or ''}>({next(number)});"

    return re.sub(r"(extern )?__shared__ (\w+) (\w+)(\[\w*\])?;", shared, source)


class Gpus:
    """Takes the launches of all ranks, and runs them."""

    runtimes: ClassVar[list[ctypes.CDLL]] = []
    """One at most: kernels find the runtime's variables by name in the process, so those of two would be mixed up."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.compiled, self.queued = folder, {}, []
        if not self.runtimes:
            library = self.build("runtime", (FOLDER / "cuda_on_cpu.cpp").read_text(), ())
            self.runtimes.append(ctypes.CDLL(library, ctypes.RTLD_GLOBAL))
        self.runtime = self.runtimes[0]
        self.runtime.run.restype = ctypes.c_char_p

    def build(self, name: str, source: str, macros: Any) -> str:
        """Compile into a library."""
        library = self.folder / f"{name}.so"
        command = (
            *COMPILER,
            f"-I{FOLDER}",
            *(f"-D{key}={value}" for key, value in macros),
            "-x",
            "c++",
            "-",
            "-o",
            library,
        )
        subprocess.run(command, input=source, text=True, check=True)
        return str(library)

    def entry(self, kernel: Kernel) -> Any:
        """The function that takes its arguments' addresses."""
        text = f'#include "cuda_on_cpu.h"\n{in_cpp_all(read_source(kernel.source))}\n'
        text += f'extern "C" void entry(void** arguments) {{ call({kernel.name}, arguments); }}'
        return ctypes.CDLL(self.build(f"kernel{abs(hash(kernel))}", text, kernel.macros)).entry

    def launch(self, kernel: Kernel, grid: int, block: int, args: Any, shared_bytes: int = 0) -> None:
        """In place of Kernel.__call__."""
        values = [_argument(arg) for arg in args]
        pointers = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
        self.queued.append((args[0].rank, kernel, pointers, grid, block, shared_bytes, (values, args)))

    def host(self, rank: int, call: Callable[[], None]) -> None:
        """Calls this between the kernels before and after it."""
        self.queued.append((rank, call, None, 0, 0, 0, None))

    def run(self, seed: int, most_rounds: int = 1_000_000) -> None:
        """All that was queued."""
        kernels = {item[1] for item in self.queued if isinstance(item[1], Kernel)} - set(self.compiled)
        with ThreadPoolExecutor(2) as pool:
            self.compiled.update(zip(kernels, pool.map(self.entry, kernels), strict=True))
        errors: list[BaseException] = []

        def guarded(call: Callable[[], None]) -> Any:
            def body(_: Any) -> None:
                try:
                    call()
                except BaseException as error:
                    errors.append(error)

            return ctypes.CFUNCTYPE(None, ctypes.c_void_p)(body)

        queued, self.queued = self.queued, []
        alive = []
        for rank, what, pointers, *sizes, _ in queued:
            entry = self.compiled[what] if isinstance(what, Kernel) else guarded(what)
            alive.append(entry)
            self.runtime.enqueue(rank, entry, pointers, *sizes)
        problem = self.runtime.run(seed, ctypes.c_longlong(most_rounds))
        if errors:
            raise errors[0]
        assert problem == b""


@pytest.fixture(scope="module")
def gpus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gpus]:
    """Instead of the driver."""
    with pytest.MonkeyPatch.context() as patch:
        made = Gpus(tmp_path_factory.mktemp("kernels"))
        patch.setattr(Kernel, "__call__", lambda kernel, *args: made.launch(kernel, *args))
        torch.use_deterministic_algorithms(True)  # new memory holds NaN, or the largest integers
        yield made
        torch.use_deterministic_algorithms(False)


# ---- exchanges -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SmallShape(KernelShape):
    """Blocks of a kernel, and how they share its work, as the test says."""

    tags: bool
    table: int
    how: WorkSplit

    tagged = property(lambda self: self.tags)
    table_blocks = property(lambda self: self.table)

    def split(self, kind: str) -> WorkSplit:
        """The same for all kernels but one, which shares a buffer with another."""
        return replace(self.how, chunk=1, slices=1) if kind == "combine" else self.how


def exchanges(
    shape: KernelShape, limit: float = 0.1, max_rows: int | None = None, num_buffers: int = 2
) -> list[DirectExchange]:
    """One for each rank, in this process, with memory that shows what was written beside its parts."""
    to, back, num_bytes = layout(shape, num_buffers)
    parts = [buffer for buffers in (to, back) for buffer in buffers]
    ends = [*(offset for part in parts for offset in part.values()), num_bytes]
    memory = [torch.full((num_bytes + GAP * len(ends),), UNTOUCHED, dtype=torch.uint8) for _ in range(shape.ranks)]
    for i, (begin, end) in enumerate(pairwise(ends)):
        for own in memory:
            own[begin + GAP * (i + 1) : end + GAP * (i + 1)] = 0
    for n, part in enumerate(parts):
        part.update({name: offset + GAP * (n * len(part) + i + 1) for i, (name, offset) in enumerate(part.items())})
    made = []
    for rank in range(shape.ranks):
        buffers, exchange = object.__new__(Buffers), object.__new__(DirectExchange)
        counters = torch.zeros((2, num_buffers, 4 + shape.num_sms), dtype=torch.int32)
        failed, report = torch.zeros(1, dtype=torch.int32), torch.zeros(3, dtype=torch.int64)
        pointers = (ctypes.c_void_p * 8)(*(own.data_ptr() for own in memory))
        vars(buffers).update(
            symmetric=SimpleNamespace(own=memory[rank]), counters=counters, failed=failed, report=report,
            tiles=torch.zeros((num_buffers, shape.table_blocks * shape.experts), dtype=torch.int32),
            peers=Peers(pointers, failed.data_ptr(), report.data_ptr(), int(limit * 1e9), rank),
            dispatch=[Buffer(counters[0, i].data_ptr(), **part) for i, part in enumerate(to)],
            combine=[Buffer(counters[1, i].data_ptr(), **part) for i, part in enumerate(back)],
        )  # fmt: skip
        comm, room = SimpleNamespace(rank=rank, where=str), max_rows or shape.slots * shape.top_k
        vars(exchange).update(
            comm=comm, shape=shape, dtype=getattr(torch, shape.dtype),
            fp8=torch.float8_e4m3fn if shape.fp8 else None, num_experts=shape.ranks * shape.experts,
            max_rows=room, num_local_experts=shape.experts, device=None, _stream=None,
            _launcher=Launcher(comm, shape, buffers, room),
        )  # fmt: skip
        made.append(exchange)
    return made


def untouched(exchange: DirectExchange, num_buffers: int = 2) -> bool:
    """Whether nothing was written between the parts."""
    to, back, num_bytes = layout(exchange.shape, num_buffers)
    ends = [*(offset for part in (*to, *back) for offset in part.values()), num_bytes]
    own = exchange._launcher.buffers.symmetric.own
    return all((own[end + GAP * i : end + GAP * (i + 1)] == UNTOUCHED).all() for i, end in enumerate(ends))


# ---- what is wanted --------------------------------------------------------------------------------------------------


def inputs(shape: KernelShape, seed: int) -> list[tuple[Any, Any, Any, Any]]:
    """x, expert, weight and the gradient of y of each rank: ragged, empty, skewed, dropped, ids of no expert."""
    generator = torch.Generator().manual_seed(seed)
    E, k, world = shape.ranks * shape.experts, shape.top_k, []  # noqa: N806

    def integers(low: int, high: int, *size: int) -> Any:
        return torch.randint(low, high, size, generator=generator)

    for rank in range(shape.ranks):
        some = int(integers(0, shape.max_tokens + 1, 1))
        T = [some, shape.max_tokens, some if rank % 2 else 0, some][seed % 4]  # noqa: N806
        expert = integers(0, E, T, k) if seed % 4 != 1 else integers(0, E, T, k) // 2
        luck = integers(0, 20, T, k)
        expert[luck < 3], expert[luck == 3], expert[luck == 4] = -1, E + seed, -2 - seed
        if shape.fp8:
            x = torch.randn((T, shape.hidden), generator=generator) * 2.0 ** integers(-110, 100, T, 1)
            x[luck[:, 0] == 5] = 0
        else:
            x = integers(-8, 9, T, shape.hidden)
        floats = x.to(getattr(torch, shape.dtype)), integers(-4, 5, T, shape.hidden).to(getattr(torch, shape.dtype))
        world.append((floats[0], expert.int(), integers(0, 9, T, k) / 8, floats[1]))
    return world


class Wanted:
    """The table of each rank, by plain loops."""

    def __init__(self, shape: KernelShape, world: Any, max_rows: int) -> None:
        self.shape, self.world, self.max_rows = shape, world, max_rows
        size = shape.ranks * shape.max_tokens, shape.top_k
        self.place = [torch.full(size, -1, dtype=torch.int32) for _ in world]
        self.order: list[list[tuple[int, int, int]]] = []  # source, token and choice of each row
        self.counts = []
        for rank in range(shape.ranks):
            which: list[list[tuple[int, int, int]]] = [[] for _ in range(shape.experts)]
            for source, (_, expert, _, _) in enumerate(world):
                for token, choices in enumerate(expert.tolist()):
                    for choice, e in enumerate(choices):
                        if rank * shape.experts <= e < (rank + 1) * shape.experts:
                            which[e - rank * shape.experts].append((source, token, choice))
            order = [row for rows in which for row in rows]
            for row, (source, token, choice) in enumerate(order):
                self.place[rank][source * shape.max_tokens + token, choice] = row if row < max_rows else -2
            self.order.append(order[:max_rows])
            self.counts.append([len(rows) for rows in which])
        known = range(-1, shape.ranks * shape.experts)
        self.unknown = [sum(e not in known for e in expert.flatten().tolist()) for _, expert, _, _ in world]
        self.lost = [sum(counts) - len(order) for counts, order in zip(self.counts, self.order, strict=True)]

    def sums(self, rank: int, term: Callable[[int, int, int, int], Any], keep_own: bool) -> Any:
        """Of term(rank, token, choice, row) over a token's rows; the part of a rank is rounded, the own maybe not."""
        shape, (x, _, _, _) = self.shape, self.world[rank]
        total = torch.zeros(x.shape)
        for token in range(len(x)):
            for other in range(shape.ranks):
                part = torch.zeros(shape.hidden)
                for choice, row in enumerate(self.place[other][rank * shape.max_tokens + token].tolist()):
                    if row >= 0:
                        part += term(other, token, choice, row)
                total[token] += part if keep_own and other == rank else part.to(x.dtype).float()
        return total.to(x.dtype)


def same(got: Any, want: Any) -> None:
    """The same numbers and type."""
    assert got.dtype == want.dtype and got.shape == want.shape, (got.dtype, got.shape, want.dtype, want.shape)
    wrong = (got != want).nonzero().tolist()
    assert not wrong, f"{len(wrong)} numbers of {list(want.shape)} differ, first at {wrong[0]}"


def quantised(x: Any) -> tuple[Any, Any]:
    """e4m3 and scales of rows."""
    padded = torch.nn.functional.pad(x.float(), (0, -x.shape[1] % 128)).unflatten(1, (-1, 128))
    amax = padded.abs().amax(2) if len(x) else padded.sum(2)
    scale = torch.where(amax > 0, amax.clamp(min=2.0**-100) / 448, 1.0)
    return (padded / scale[..., None]).flatten(1)[:, : x.shape[1]].to(torch.float8_e4m3fn), scale


# ---- the calls, and what they gave -----------------------------------------------------------------------------------


def factor(row: Any) -> Any:
    """What an expert multiplies a row by."""
    return row % 3 + 1


def queue(gpus: Gpus, exchange: DirectExchange, x: Any, expert: Any, weight: Any, grad_y: Any) -> SimpleNamespace:
    """All calls of one rank."""
    got, rank, fp8 = SimpleNamespace(), exchange.comm.rank, exchange.fp8 is not None
    got.rows, got.plan = plan = exchange._launcher.send(x, expert, weight, False)
    plan = got.plan
    if not fp8:
        answers, factors = torch.zeros_like(got.rows), factor(torch.arange(len(got.rows)))[:, None]
        gpus.host(rank, lambda: answers.copy_(got.rows * factors))
        got.y, _ = exchange._launcher.give_back(answers, plan, weighted=True)
        got.grad_rows, got.grad_weight = exchange._launcher.spread(grad_y, answers, plan)
        got.grad_x, got.returned = exchange._launcher.give_back(got.grad_rows, plan, False, got.grad_weight)
    held, compact = exchange._launcher.send(x, expert, weight, True)
    got.compact = compact
    gpus.host(rank, lambda: vars(got).update(held=held.clone(), scales=None if not fp8 else compact.scales.clone()))
    if fp8:
        exchange.free_rows(compact)
        return got
    sums = torch.zeros((len(held), x.shape[1]), dtype=x.dtype)

    def weigh() -> None:
        factors = torch.where(compact.place >= 0, compact.weight * factor(compact.place), 0).sum(1, keepdim=True)
        slots = (compact.place >= 0).any(1)  # the others hold anything
        sums[slots] = (held[slots] * factors[slots]).to(x.dtype)

    gpus.host(rank, weigh)
    got.y_compact, _ = exchange._launcher.give_back(sums, compact, weighted=False)
    into = exchange.tokens()
    if into is not None:  # what is not copied
        gpus.host(rank, lambda: into[: len(x)].copy_(x))
    own = x if into is None else into[: len(x)]
    held_again, got.compact_again = exchange._launcher.send(own, expert, weight, True)
    got.y_once, _ = exchange._launcher.give_back(held_again, got.compact_again, weighted=False)
    return got


def check(got: SimpleNamespace, wanted: Wanted, rank: int) -> None:
    """All that the calls of `queue` gave."""
    shape, world, order, place = wanted.shape, wanted.world, wanted.order[rank], wanted.place[rank]
    x, expert, _, _ = world[rank]
    none = torch.zeros((0, shape.hidden), dtype=x.dtype)
    rows = torch.stack([world[s][0][t] for s, t, _ in order]) if order else none
    for plan in (got.plan, got.compact):
        same(plan.rows_per_expert, torch.tensor(wanted.counts[rank]).int())
        same(plan.offset[1:], torch.tensor(wanted.counts[rank]).cumsum(0).clamp(max=wanted.max_rows).int())
        assert plan.offset[0] == 0
        same(plan.expert, expert)
        same(plan.place, place)
        same(plan.slot[: len(order)], torch.tensor([s * shape.max_tokens + t for s, t, _ in order]).int())
        same(plan.num_tokens, torch.tensor([len(theirs[0]) for theirs in world]).int())
        for source, (_, _, weight, _) in enumerate(world):
            same(plan.weight[source * shape.max_tokens :][: len(weight)], weight)
    slots = (place != -1).any(1).nonzero().flatten()
    sent = [world[slot // shape.max_tokens][0][slot % shape.max_tokens] for slot in slots.tolist()]
    once = torch.stack(sent) if sent else none
    if shape.fp8:
        for values, scales, want in ((got.rows, got.plan.scales, rows), (got.held[slots], got.scales[slots], once)):
            want_values, want_scales = quantised(want)
            same(values.view(torch.uint8)[: len(want)], want_values.view(torch.uint8))
            same(scales[: len(want)], want_scales)
        return
    same(got.rows[: len(order)], rows)
    same(got.held[slots], once)
    weights = [theirs[2] for theirs in world]
    answer = lambda other, token, choice, row: weights[rank][token, choice] * x[token].float() * factor(row)  # noqa: E731
    same(got.y, wanted.sums(rank, answer, True))
    same(got.y_compact, wanted.sums(rank, answer, False))
    reached = torch.stack([(p[rank * shape.max_tokens :][: len(x)] != -1).any(1) for p in wanted.place]).sum(0)
    same(got.y_once, x * reached[:, None].to(x.dtype))
    for row, (source, token, choice) in enumerate(order):
        gradient, slot = world[source][3][token], source * shape.max_tokens + token
        same(got.grad_rows[row], weights[source][token, choice].to(x.dtype) * gradient)
        assert got.grad_weight[slot, choice] == (gradient * rows[row]).float().sum() * factor(row)
    back = lambda other, token, choice, row: weights[rank][token, choice] * world[rank][3][token].float()  # noqa: E731
    same(got.grad_x, wanted.sums(rank, back, True))
    returned = torch.zeros(expert.shape)
    for other in wanted.order:
        for row, (source, token, choice) in enumerate(other):
            if source == rank:
                returned[token, choice] = (world[rank][3][token] * x[token]).float().sum() * factor(row)
    same(got.returned, returned)


# fmt: off
CASES = {
    # fp8, hidden, top_k, max_tokens, ranks, experts, blocks, tags, table blocks; a WorkSplit
    "1 rank, tags": SmallShape("float32", False, 33, 3, 5, 1, 4, 3, True, 1, WorkSplit(32, 1, 1, 2, 2)),
    "1 rank, flags": SmallShape("bfloat16", False, 64, 1, 17, 1, 3, 2, False, 1, WorkSplit(64, 2, 1, 1, 1)),
    "2 ranks, tags, slices": SmallShape("bfloat16", False, 808, 8, 3, 2, 3, 4, True, 2, WorkSplit(64, 1, 2, 1, 2)),
    "2 ranks, tickets": SmallShape("bfloat16", False, 77, 3, 35, 2, 2, 4, False, 2, WorkSplit(64, 2, 1, 2, 2)),
    "2 ranks, slices": SmallShape("float32", False, 300, 1, 7, 2, 1, 3, False, 1, WorkSplit(64, 2, 2, 1, 2)),
    "2 ranks, float8": SmallShape("bfloat16", True, 840, 8, 11, 2, 5, 3, False, 1, WorkSplit(64, 2, 1, 2, 2)),
    "2 ranks, fp8, far slices": SmallShape("bfloat16", True, 1100, 1, 3, 2, 2, 4, False, 1, WorkSplit(32, 1, 2, 1, 3)),
    "4 ranks, tags": SmallShape("float32", False, 36, 3, 6, 4, 2, 3, True, 1, WorkSplit(64, 1, 1, 1, 2)),
    "4 ranks, chunks of 4": SmallShape("float32", False, 132, 3, 30, 4, 3, 3, False, 1, WorkSplit(128, 4, 1, 2, 2)),
    "4 ranks, slices": SmallShape("bfloat16", False, 520, 8, 9, 4, 2, 4, False, 2, WorkSplit(64, 2, 2, 2, 2)),
    "4 ranks, float8, tags": SmallShape("float32", True, 200, 3, 5, 4, 2, 3, True, 1, WorkSplit(32, 1, 1, 2, 2)),
    "8 ranks, tags": SmallShape("float32", False, 5, 8, 3, 8, 1, 2, True, 1, WorkSplit(32, 1, 1, 1, 1)),
    "8 ranks, flags": SmallShape("bfloat16", False, 20, 3, 8, 8, 2, 3, False, 1, WorkSplit(32, 1, 1, 1, 1)),
}
# fmt: on


FULL = [("4 ranks, chunks of 4", 7), ("2 ranks, tags, slices", 3), ("4 ranks, float8, tags", 2), ("1 rank, flags", 1)]


@pytest.mark.parametrize(("name", "max_rows"), [*((name, None) for name in CASES), *FULL])
def test_all_calls(gpus: Gpus, name: str, max_rows: int | None) -> None:
    """One after the other in each rank's stream, ranks ahead of each other: every buffer is used several times."""
    shape, seeds, num_buffers = CASES[name], range(4), 1 if max_rows is None else 2
    made = exchanges(shape, max_rows=max_rows, num_buffers=num_buffers)
    worlds = [inputs(shape, seed) for seed in seeds]
    got = [[queue(gpus, exchange, *world[exchange.comm.rank]) for world in worlds] for exchange in made]
    gpus.run(len(name))
    for exchange, results in zip(made, got, strict=True):
        rank, dispatches = exchange.comm.rank, 2 if shape.fp8 else 3
        all_wanted = [Wanted(shape, world, exchange.max_rows) for world in worlds]
        lost = dispatches * sum(wanted.lost[rank] for wanted in all_wanted)
        unknown = dispatches * sum(wanted.unknown[rank] for wanted in all_wanted)
        assert exchange._launcher.buffers.report.tolist() == [0, lost, unknown]
        for wanted, result in zip(all_wanted, results, strict=True):
            check(result, wanted, rank)
        assert untouched(exchange, num_buffers)


@pytest.mark.parametrize("name", ["1 rank, flags", "2 ranks, tickets", "4 ranks, tags"])
def test_gradients_by_autograd(gpus: Gpus, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """dispatch and combine, and backward passes through them, launch what `queue` launches step by step."""
    shape = CASES[name]
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)
    made, kept = exchanges(shape), []
    for seed in range(3):
        world = inputs(shape, seed)
        for exchange, (x, expert, weight, grad_y) in zip(made, world, strict=True):
            x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
            rows, plan = exchange.dispatch(x, Routing(expert, weight))
            assert rows.requires_grad and plan.weight.requires_grad
            y = exchange.combine(rows, plan)
            grads = torch.autograd.grad(y, (x, weight), grad_y)
            kept.append((world, exchange.comm.rank, rows, plan, y, grads))
    gpus.run(len(name))
    for world, rank, rows, _, y, (grad_x, grad_weight) in kept:
        wanted = Wanted(shape, world, len(rows))
        x, expert, weight, grad_y = world[rank]
        weights = [theirs[2] for theirs in world]
        same(y, wanted.sums(rank, lambda other, t, j, row: weights[rank][t, j] * x[t].float(), True))  # noqa: B023
        back = lambda other, t, j, row: (weights[rank][t, j].to(x.dtype) * grad_y[t]).float()  # noqa: B023, E731
        same(grad_x, wanted.sums(rank, back, True))
        known = (expert >= 0) & (expert < exchange.num_experts)
        same(grad_weight, (grad_y * x).float().sum(1, keepdim=True) * known)


@pytest.mark.parametrize("name", ["1 rank, tags", "2 ranks, slices", "4 ranks, slices", "8 ranks, flags"])
def test_sums_of_any_numbers(gpus: Gpus, name: str) -> None:
    """Answers and gradients are as near as tests/programs/direct.py asks of a GPU."""
    shape = CASES[name]
    made, kept = exchanges(shape), []
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        for exchange, (x, expert, weight, _) in zip(made, inputs(shape, seed), strict=True):
            x, grad_y = torch.randn((2, *x.shape), generator=generator).to(x.dtype)
            rows, plan = exchange._launcher.send(x, expert, weight, False)
            answers = torch.zeros_like(rows)
            gpus.host(exchange.comm.rank, lambda rows=rows, answers=answers: answers.copy_(direct.answer(rows)))
            y, _ = exchange._launcher.give_back(answers, plan, weighted=True)
            grad_answers, grad_weight = exchange._launcher.spread(grad_y, answers, plan)
            grad_rows = torch.zeros_like(rows)

            def back(rows: Any = rows, grad_answers: Any = grad_answers, grad_rows: Any = grad_rows) -> None:
                grad_rows.copy_(grad_answers * (rows.abs() <= 1))

            gpus.host(exchange.comm.rank, back)
            grads = exchange._launcher.give_back(grad_rows, plan, False, grad_weight)
            known = (expert >= 0) & (expert < exchange.num_experts)
            kept.append((y, grads, x, Routing(torch.where(known, expert, -1), weight), grad_y, (rows, answers, plan)))
    gpus.run(0)
    for y, grads, x, routing, grad_y, _ in kept:
        direct.near_answer("combine", y, x, routing, shape.ranks)
        direct.near_gradients(grads, x, routing, grad_y, shape.ranks)


@pytest.mark.parametrize("name", ["2 ranks, tags, slices", "4 ranks, chunks of 4", "4 ranks, slices", "8 ranks, tags"])
def test_a_rank_that_does_not_come(gpus: Gpus, name: str) -> None:
    """The others give up and say so; whatever they had queued ends, and reads and writes where it may."""
    shape = CASES[name]
    made = exchanges(shape)
    world = inputs(shape, 1)
    results = [queue(gpus, exchange, *world[exchange.comm.rank]) for _ in range(2) for exchange in made[1:]]
    gpus.run(0)
    assert len(results) == 2 * (shape.ranks - 1)
    for exchange in made[1:]:
        assert int(exchange._launcher.buffers.report[0]) >> 32 == 1
        with pytest.raises(CommError, match=r"waited 0\.1 s for rank 0 to s"):
            exchange._launcher.check_usable("dispatch")
        assert untouched(exchange)
    for result in results:
        check_range(result.plan, shape)
        check_range(result.compact, shape)


@pytest.mark.parametrize("compact", [True, False])
def test_a_rank_that_dies_after_its_first_words(gpus: Gpus, compact: bool) -> None:
    """It said how many tokens it has, but never where they go: some blocks make their part of the table, others not."""
    shape = SmallShape("float32", False, 20, 1, 256, 2, 4, 5, False, 3, WorkSplit(32, 1, 1, 1, 1))
    for seed in range(3):
        _, exchange = exchanges(shape)
        tokens = exchange._launcher.buffers.view(exchange._launcher.buffers.dispatch[0].tokens, (2,), torch.int32)
        tokens[0], tokens[1] = 256, 1  # of rank 0, with the tag of the first use
        given = torch.ones(256, 20), torch.full((256, 1), 5, dtype=torch.int32), torch.ones(256, 1)
        rows, plan = exchange._launcher.send(*given, compact)
        gpus.run(seed)
        check_range(plan, shape)
        assert len(rows) == 2 * 256
        with pytest.raises(CommError, match=r"for rank 0 to say where its tokens go"):
            exchange._launcher.check_usable("dispatch")


def check_range(plan: Any, shape: KernelShape) -> None:
    """What a caller would read or write by this plan is there."""
    num_rows, slots = len(plan.slot), shape.ranks * shape.max_tokens
    assert plan.offset[0] == 0 and (plan.offset.diff() >= 0).all() and plan.offset[-1] <= num_rows
    assert ((plan.slot[: plan.offset[-1]] >= 0) & (plan.slot[: plan.offset[-1]] < slots)).all()
    assert ((plan.place >= -2) & (plan.place < num_rows)).all()


def test_choices_may_change_after_dispatch(gpus: Gpus) -> None:
    """As they do where the next micro-batch is routed into the same tensor before this one is combined."""
    shape = CASES["2 ranks, tickets"]
    made, kept = exchanges(shape), []
    for exchange in made:
        x, weight = torch.ones((4, 77), dtype=torch.bfloat16), torch.ones(4, 3)
        expert = torch.full((4, 3), 3, dtype=torch.int32)
        rows, plan = exchange._launcher.send(x, expert, weight, False)
        gpus.host(exchange.comm.rank, lambda expert=expert: expert.fill_(-1))
        y, _ = exchange._launcher.give_back(rows, plan, weighted=True)
        kept.append((y, x, weight, rows, plan))  # all that the kernels will use
    gpus.run(0)
    for y, x, *_ in kept:
        same(y, 3 * x)


@pytest.mark.parametrize("name", ["1 rank, flags", "2 ranks, tickets", "4 ranks, tags"])
def test_fewer_answers_than_rows(gpus: Gpus, name: str) -> None:
    """Those that are missing count as zeros and are reported, and nothing is read or written behind the others."""
    shape = CASES[name]
    made, world, kept = exchanges(shape), inputs(shape, 1), []
    given = 3
    for exchange, (x, expert, weight, grad_y) in zip(made, world, strict=True):
        rows, plan = exchange._launcher.send(x, expert, weight, False)
        backing = torch.full_like(rows, 5)  # the answers, all ones, and what lies behind them
        backing[:given] = 1
        y, _ = exchange._launcher.give_back(backing[:given], plan, weighted=True)
        grad_rows, grad_weight = exchange._launcher.spread(grad_y, backing[:given], plan)
        kept.append((plan, y, grad_rows, grad_weight, (rows, backing)))
    gpus.run(0)
    wanted = Wanted(shape, world, given)
    for exchange, (x, *_), (plan, y, grad_rows, grad_weight, _) in zip(made, world, kept, strict=True):
        rank, weight = exchange.comm.rank, world[exchange.comm.rank][2]
        ones = lambda other, token, choice, row, weight=weight: weight[token, choice] * torch.ones(shape.hidden)  # noqa: E731
        same(y, wanted.sums(rank, ones, True))
        assert exchange._launcher.buffers.report.tolist()[:2] == [0, wanted.lost[rank]] and len(x) == len(y)
        assert grad_rows.shape[0] == given and untouched(exchange)
        assert (grad_weight[plan.place >= given] == 0).all()


def test_combine_refuses_what_has_no_gradients() -> None:
    (exchange,), (other,) = (exchanges(CASES["1 rank, flags"]) for _ in range(2))
    (float8, _), rows = exchanges(CASES["2 ranks, float8"]), torch.zeros((3, 64)).requires_grad_()
    plan = DirectPlan(*[None] * 4, torch.zeros(3), *[None] * 3, exchange._launcher, 0, True)
    for refuses, its in ((exchange, plan), (float8, replace(plan, launcher=float8._launcher, compact=False))):
        with pytest.raises(RuntimeError, match=r"combine: rows or plan.* for a gradient"):
            refuses.combine(rows, its)
    for call in (lambda: other.combine(rows, plan), lambda: other.free_rows(plan)):
        with pytest.raises(ValueError, match="plan is of another DirectExchange"):
            call()
    with pytest.raises(TypeError, match="plan is a NoneType"):
        exchange.combine(rows, None)


def test_a_late_rank_keeps_its_rows(gpus: Gpus) -> None:
    """Who gives up because a peer has not read its rows yet does not write over them."""
    shape = CASES["4 ranks, chunks of 4"]
    made, worlds = exchanges(shape, num_buffers=1), [inputs(shape, 1), inputs(shape, 5)]
    plans = []
    for exchange in made:
        for world in worlds[: 1 if exchange is made[0] else 2]:
            rows, plan = exchange._launcher.send(*world[exchange.comm.rank][:3], True)
            plans.append(plan)
            if exchange is made[0]:
                late = rows
            elif world is worlds[0]:
                exchange.free_rows(plan)
    gpus.run(0)
    reached = (Wanted(shape, worlds[0], len(late) * shape.top_k).place[0] != -1).any(1)
    assert reached.any()
    same(late[reached], torch.cat([x for x, _, _, _ in worlds[0]])[reached])  # each rank has max_tokens
    for exchange in made[1:]:
        with pytest.raises(CommError, match=r"for rank 0 to have read .* \(use 2"):
            exchange._launcher.check_usable("dispatch")


def test_a_plan_frees_its_rows_once(gpus: Gpus) -> None:
    """A second combine of it leaves those alone that lie in the same buffer since."""
    shape = CASES["1 rank, flags"]
    (exchange,), (some,) = exchanges(shape, num_buffers=1), inputs(shape, 1)
    rows, first = exchange._launcher.send(*some[:3], True)
    answers = torch.zeros_like(rows)
    exchange._launcher.give_back(answers, first, weighted=False)
    _, second = exchange._launcher.send(*some[:3], True)
    exchange._launcher.give_back(answers, first, weighted=False)
    with pytest.raises(RuntimeError, match="all 1 buffers hold"):
        exchange.tokens()
    exchange.free_rows(second)
    exchange.tokens()
    gpus.run(0)


def test_a_buffer_that_is_used_up(gpus: Gpus) -> None:
    """Its tags would begin again: an error, not wrong rows."""
    shape = CASES["2 ranks, tickets"]
    for call in ("send", "give_back"):
        made, world, kept = exchanges(shape), inputs(shape, 1), []
        for exchange, (x, expert, weight, _) in zip(made, world, strict=True):
            rows, plan = exchange._launcher.send(x, expert, weight, False)
            used = exchange._launcher.buffers.counters[["send", "give_back"].index(call), :, 4:]
            gpus.host(exchange.comm.rank, lambda used=used: used.fill_(-1))
            kept.append((rows, plan, used))
            if call == "send":
                kept.append(exchange._launcher.send(x, expert, weight, False))
            else:
                kept.append(exchange._launcher.give_back(rows, plan, weighted=False))
        gpus.run(0)
        for exchange in made:
            with pytest.raises(CommError, match="used 2"):
                exchange._launcher.check_usable("check")
