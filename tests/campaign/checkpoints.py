"""A checkpoint is damaged: bytes flipped, zeroed, cut off, doubled or exchanged anywhere, entries of its index changed.

Loading gives the state that was saved, or raises on every rank and leaves model and optimizer as they were. The ranges
of bytes follow each other from seed to seed, so that a long campaign covers all of every file.
"""

from __future__ import annotations

import json
import shutil
import threading
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from case import Board, Case, Ended, Report, Verdict
from launch import launch

from moecomm import Comm

TRANSPORTS = ("threads",)
CHUNK = 48
"""Bytes damaged at a time."""
VALUES = {"step": 7, "rate": 0.125, "name": "warm"}
_random_lock = threading.Lock()  # ranks are threads, and share torch's generator


class Plan:
    """What all ranks know of a case."""

    def __init__(self, case: Case) -> None:
        self.size = 1 + case.seed % 2
        self.file = case.seed // 2 % (self.size + 1)
        """0: the index; the others are those of the ranks."""
        self.damage = list(DAMAGES)[case.seed // 6 % len(DAMAGES)]
        self.chunk = case.seed // 6 // len(DAMAGES)
        self.random = case.random(0)

    def __str__(self) -> str:
        return f"{self.size} ranks, {self.damage} in {'the index' if self.file == 0 else f'file {self.file}'}"


# ---- damages: bytes -> bytes, of the range [start, end) --------------------------------------------------------------

Damage = Callable[[bytearray, int, int, np.random.Generator], bytes]


def flip(data: bytearray, start: int, end: int, random: np.random.Generator) -> bytes:
    data[int(random.integers(start, end))] ^= 1 << int(random.integers(8))
    return data


def zero(data: bytearray, start: int, end: int, random: np.random.Generator) -> bytes:
    data[start:end] = bytes(end - start)
    return data


def zero_tail(data: bytearray, start: int, end: int, random: np.random.Generator) -> bytes:
    data[start:] = bytes(len(data) - start)
    return data


def truncate(data: bytearray, start: int, end: int, random: np.random.Generator) -> bytes:
    return data[:start]


def leave_out(data: bytearray, start: int, end: int, random: np.random.Generator) -> bytes:
    return data[:start] + data[end:]


def double(data: bytearray, start: int, end: int, random: np.random.Generator) -> bytes:
    return data[:end] + data[start:]


def exchange(data: bytearray, start: int, end: int, random: np.random.Generator) -> bytes:
    """Two ranges of equal length."""
    other = int(random.integers(0, max(1, len(data) - (end - start))))
    first, second = bytes(data[start:end]), bytes(data[other : other + end - start])
    data[start : start + len(second)] = second
    data[other : other + len(first)] = first
    return data


def noise(data: bytearray, start: int, end: int, random: np.random.Generator) -> bytes:
    data[start:end] = random.bytes(end - start)
    return data


def append(data: bytearray, start: int, end: int, random: np.random.Generator) -> bytes:
    return data + data[start:end]


def change_entry(data: bytearray, start: int, end: int, random: np.random.Generator) -> bytes:
    """One value anywhere in the index is another one, or gone; the text stays JSON."""
    try:
        index = json.loads(data)
    except ValueError:
        return flip(data, start, end, random)  # the file of a rank
    places = list(_places(index))
    owner, key = places[int(random.integers(len(places)))]
    if random.random() < 0.3:
        del owner[key]
    elif isinstance(owner[key], bool) or owner[key] is None or isinstance(owner[key], list | dict):
        owner[key] = [1, None, "", [], {}][int(random.integers(5))]
    elif isinstance(owner[key], int | float):
        owner[key] += int(random.integers(-2, 3)) or 7
    else:
        owner[key] = owner[key][:-1] + "z"
    return json.dumps(index).encode()


def _places(value: Any) -> Any:
    """Each (owner, key) in nested dicts and lists."""
    keys = value.keys() if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in list(keys):
        yield value, key
        yield from _places(value[key])


DAMAGES: dict[str, Damage] = {
    "a flipped bit": flip,
    "zeros": zero,
    "a zeroed tail": zero_tail,
    "a cut": truncate,
    "a gap": leave_out,
    "bytes twice": double,
    "exchanged bytes": exchange,
    "noise": noise,
    "bytes more": append,
    "another entry": change_entry,
}


def damage(folder: Path, plan: Plan) -> bool:
    """Whether there was something to damage."""
    files = [folder / "checkpoint.json", *sorted(folder.glob("rank-*.safetensors"))]
    if plan.file >= len(files):
        return False
    data = bytearray(files[plan.file].read_bytes())
    num_chunks = -(-len(data) // CHUNK)
    start = plan.chunk % num_chunks * CHUNK
    before = bytes(data)
    changed = bytes(DAMAGES[plan.damage](data, start, min(start + CHUNK, len(data)), plan.random))
    files[plan.file].write_bytes(changed)
    return changed != before


# ---- on each rank ----------------------------------------------------------------------------------------------------


def make(seed: int) -> tuple[Any, Any]:
    """A small model and an optimizer that has made a step."""
    import torch

    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.BatchNorm1d(7), torch.nn.Linear(7, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01 * (seed + 1))
    model(torch.randn(4, 5)).sum().backward()
    optimizer.step()
    return model, optimizer


def state_of(model: Any, optimizer: Any) -> dict[str, Any]:
    """All that loading may change, copied."""
    import copy

    return copy.deepcopy({"model": model.state_dict(), "optimizer": optimizer.state_dict()})


def is_same(first: Any, second: Any) -> bool:
    """Nested states, bit for bit."""
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(is_same(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(is_same, first, second))
    if hasattr(first, "dtype"):
        import torch

        return first.dtype == second.dtype and torch.equal(first, second)
    return type(first) is type(second) and first == second


def play(case: Case, comm: Comm, report: Report, board: Board) -> None:
    from moecomm.nn import checkpoint

    plan = Plan(case)
    folder = Path(report.file.name).parent / "saved"
    import torch

    torch.set_num_threads(1)
    with _random_lock:
        model, optimizer = make(0)
    saved = state_of(model, optimizer)
    path = checkpoint.save(folder, 1, model, optimizer, comm=comm, values=VALUES)
    comm.barrier()
    if comm.rank == 0:
        report("damaged", is_changed=damage(path, plan))
    comm.barrier()
    with _random_lock:
        model, optimizer = make(1)
    before = state_of(model, optimizer)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            values = checkpoint.load(path, model, optimizer, comm=comm)
    except BaseException as error:
        is_unchanged = is_same(before, state_of(model, optimizer))
        report("raised", kind=type(error).__name__, text=str(error), is_unchanged=is_unchanged)
    else:
        report("loaded", is_right=is_same(saved, state_of(model, optimizer)) and is_same(values, VALUES))
    comm.barrier()
    if comm.rank == 0:
        shutil.rmtree(folder)


# ---- from outside ----------------------------------------------------------------------------------------------------


@cache
def import_all() -> None:
    """Before the ranks are forked, as it takes longer than a case. Nothing of torch is used here: it starts threads."""
    import torch._dynamo  # noqa: F401 - an optimizer imports it

    import moecomm.nn  # noqa: F401


def run(case: Case) -> tuple[Verdict, Ended]:
    import_all()
    plan = Plan(case)
    ended = launch(case, plan.size)
    ended.text = str(plan)
    damaged = ended.fact(0, "damaged")
    return Verdict(_problem(ended), is_void=damaged is not None and not damaged["is_changed"]), ended


def _problem(ended: Ended) -> str:
    if ended.is_hung:
        return "hangs"
    outcomes = []
    for rank in range(len(ended.events)):
        error, raised, loaded = (ended.fact(rank, name) for name in ("error", "raised", "loaded"))
        if error or not (raised or loaded):
            return f"rank {rank} ends with {error['text'] if error else f'status {ended.status}'}"
        if loaded and not loaded["is_right"]:
            return f"rank {rank} loads something else than what was saved, silently"
        if raised and not raised["is_unchanged"]:
            return f"rank {rank} has changed its model or optimizer before it raised {raised['kind']}: {raised['text']}"
        if raised and raised["kind"] not in ("ValueError", "OSError", "FileNotFoundError"):
            return f"rank {rank} raises {raised['kind']}, expected ValueError or OSError: {raised['text']}"
        outcomes.append(bool(raised))
    return "" if len(set(outcomes)) == 1 else f"some ranks raise and others load: {outcomes}"
