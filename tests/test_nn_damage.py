"""Damaged checkpoints: a load gives the state that was saved, or raises and leaves model and optimizer as they were.

Which damages is drawn anew in every run: the seed that a failing test prints makes them again.
"""

from __future__ import annotations

import copy
import json
import os
import random
import secrets
import shutil
import stat
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from indexes import first_version, write_index  # noqa: E402

from moecomm import Comm  # noqa: E402
from moecomm.nn import ColumnLinear, Experts, checkpoint  # noqa: E402
from moecomm.transports import threads  # noqa: E402

RANKS = 2
LIMIT = 20.0
"""Seconds after which a rank that waits for another raises: then a load did not raise on all of them."""


class Model(torch.nn.Module):
    """Experts over the ranks, a dense weight in slices, one that is whole, one without numbers, and a buffer."""

    def __init__(self, comm: Comm | None, seed: int) -> None:
        super().__init__()
        self.rank, self.size = (comm.rank, comm.size) if comm else (0, 1)
        self.experts = Experts(3, 4, range(4 * self.rank // self.size, 4 * (self.rank + 1) // self.size))
        self.up = ColumnLinear(3, 8, tensor=comm, blocks=2)
        self.norm = torch.nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))
        self.nothing = torch.nn.Parameter(torch.zeros(0, 3))
        self.register_buffer("seen", torch.tensor(seed))
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                parameter.copy_(self.numbers(name, parameter, seed))

    def numbers(self, name: str, parameter: torch.Tensor, seed: int) -> torch.Tensor:
        """This rank's part of numbers that are drawn for the whole parameter."""
        kind, (first, *others) = name.partition(".")[0], parameter.shape
        whole = (4 if kind == "experts" else first * self.size if kind == "up" else first, *others)
        numbers = torch.randn(whole, generator=torch.Generator().manual_seed(seed + len(name)))
        if kind == "experts":
            return numbers[self.experts.experts[0] : self.experts.experts[-1] + 1]
        if kind == "up":
            return numbers.unflatten(0, (2, self.size, -1))[:, self.rank].flatten(0, 1)
        return numbers


State = tuple[list[torch.Tensor], dict[str, Any]]


def made(comm: Comm | None, seed: int) -> tuple[Model, Any]:
    """A model and an optimizer that has made a step."""
    model = Model(comm, seed)
    optimizer = torch.optim.AdamW(model.parameters(), torch.tensor(0.1 * seed), betas=(0.5, 0.1 + 0.1 * seed))
    for name, parameter in model.named_parameters():
        parameter.grad = model.numbers(name, parameter, 7).to(parameter.dtype)
    optimizer.step()
    return model, optimizer


def state(model: Model, optimizer: Any) -> State:
    return [values.clone() for values in model.state_dict().values()], copy.deepcopy(optimizer.state_dict())


def same(a: Any, b: Any) -> bool:
    """Bit for bit, in type and order too."""
    if isinstance(a, torch.Tensor):
        return type(a) is type(b) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of two ranks."""
    folder = tmp_path_factory.mktemp("whole")

    def body(comm: Comm) -> None:
        checkpoint.save(folder, 1, *made(comm, 1), comm=comm, values={"seen": 20, "rate": torch.tensor([0.5, 2])})

    threads.run(RANKS, body)
    return folder / "step-000001"


@pytest.fixture
def damaged(whole: Path, tmp_path: Path) -> Path:
    """A copy, to be damaged."""
    return Path(shutil.copytree(whole, tmp_path / "damaged"))


def outcomes(path: Path, num_ranks: int = 1) -> list[str]:
    """What each rank met in loading: an error's class, or "loaded". Fails if its state is neither old nor right."""

    def body(comm: Comm | None) -> str:
        model, optimizer = made(comm, 2)
        before = state(model, optimizer)
        try:
            values = checkpoint.load(path, model, optimizer, comm=comm)
        except (ValueError, OSError) as error:
            assert same(state(model, optimizer), before), f"changed by a load that raised {error}"
            return type(error).__name__
        assert same(values, {"seen": 20, "rate": torch.tensor([0.5, 2])})
        assert same(state(model, optimizer), state(*made(comm, 1)))
        return "loaded"

    return [body(None)] if num_ranks == 1 else threads.run(num_ranks, body, limit=LIMIT)


def draws(number: int) -> list[random.Random]:
    """Sources of random numbers, whose seed a failing test prints."""
    seed = secrets.randbits(32)
    print(f"seed {seed}")
    return [random.Random(seed + each) for each in range(number)]


def flip(content: bytearray, draw: random.Random) -> None:
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)


def other_byte(content: bytearray, draw: random.Random) -> None:
    content[draw.randrange(len(content))] ^= draw.randrange(1, 256)


def zeroed_tail(content: bytearray, draw: random.Random) -> None:
    start = draw.randrange(len(content))
    content[start:] = bytes(len(content) - start)


def zeroed_range(content: bytearray, draw: random.Random) -> None:
    start, end = sorted(draw.sample(range(len(content) + 1), 2))
    content[start:end] = bytes(end - start)


def cut(content: bytearray, draw: random.Random) -> None:
    del content[draw.randrange(len(content)) :]


def longer(content: bytearray, draw: random.Random) -> None:
    place = draw.randrange(len(content) + 1)
    content[place:place] = draw.randbytes(draw.randrange(1, 20))


def swapped(content: bytearray, draw: random.Random) -> None:
    """Two ranges of equal length."""
    length = draw.randrange(1, 100)
    a, b = (draw.randrange(len(content) - length) for _ in range(2))
    content[a : a + length], content[b : b + length] = content[b : b + length], content[a : a + length]


DAMAGES: list[Callable[[bytearray, random.Random], None]] = [
    flip,
    other_byte,
    zeroed_tail,
    zeroed_range,
    cut,
    longer,
    swapped,
]


def test_undamaged(whole: Path) -> None:
    """Under another split, too."""
    assert outcomes(whole) == ["loaded"]
    assert outcomes(whole, RANKS) == ["loaded"] * RANKS


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.slow
def test_damaged_bytes(damage: Callable[[bytearray, random.Random], None], damaged: Path) -> None:
    """Anywhere in any file; ranks that have read other files raise with those that have met the damage."""
    files = {path: path.read_bytes() for path in sorted(damaged.iterdir())}
    for number, draw in enumerate(draws(60)):
        path = draw.choice([*files])
        content = bytearray(files[path])
        damage(content, draw)
        path.write_bytes(content)
        met = outcomes(damaged, RANKS if number % 6 == 0 else 1)
        assert len({*met}) == 1
        assert met[0] != "loaded" or path.suffix == ".safetensors" or bytes(content) == files[path]
        path.write_bytes(files[path])


@pytest.mark.slow
def test_bytes_of_all_numbers(damaged: Path) -> None:
    """One flipped bit in any tensor is noticed, of the model's and of the optimizer's; each third byte is tried."""
    file = damaged / "rank-00001.safetensors"
    content = file.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    for place in range(start, len(content), 3):
        file.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(ValueError, match=r"rank-00001.safetensors is damaged: .* has another checksum than"):
            checkpoint.load(damaged, *made(None, 2))


def changed_lines(lines: list[list[Any]], draw: random.Random) -> None:
    """One change to the list of tensors, such that it is not what it was."""
    line = draw.choice(lines)
    how = draw.choice(("twice", "gone", "half twice", "start", "size", "shape", "entry gone", "kind", "other"))
    if how == "twice":
        lines.append(line)
    elif how == "gone":
        lines.remove(line)
    elif how == "half twice":
        (first, second), *_ = [[a, b] for a in lines for b in lines if a[0] == b[0] and a[4] < b[4]]
        lines[lines.index(second)] = first
    elif how in ("start", "size", "shape"):
        line = draw.choice([line for line in lines if line[1]])
        numbers = line[{"start": 4, "size": 5, "shape": 1}[how]]
        place = draw.randrange(len(numbers))
        numbers[place] = draw.choice([numbers[place] + 1, numbers[place] - 1, 10**30, -1, None, 0.5, True, "1"])
    elif how == "entry gone":
        del line[draw.randrange(len(line))]
    elif how == "kind":
        line[draw.randrange(len(line))] = draw.choice([None, {}, [], "", 3, ["x"], "../step", "\0", "optimizer/"])
    elif how == "other":
        others = [other for other in lines if other[0] != line[0]]
        place = draw.choice([0, 3])
        line[place] = draw.choice([other[place] for other in others if other[place] != line[place]])


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.slow
def test_index_that_contradicts_itself(version: int, damaged: Path) -> None:
    """With a checksum that fits, or without one, as the first version had none."""
    content = json.loads((damaged / "checkpoint.json").read_text())

    def write(index: dict[str, Any]) -> None:
        if version == 1:
            (damaged / "checkpoint.json").write_text(json.dumps(index))
        else:
            write_index(damaged, index)

    index = first_version(damaged) if version == 1 else content
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        write(index)
        assert outcomes(damaged) == ["loaded"]
        for key in index.keys() - {"checksum"}:
            write({other: index[other] for other in index if other != key})
            assert outcomes(damaged, RANKS) == ["ValueError"] * RANKS, key
            for value in (None, 3, "x", [3], {"a": 1}, [[]], [{}]):
                if (key, value) in (("values", {"a": 1}), ("groups", [{}])):
                    continue  # nothing is wrong with that: a later optimizer has settings that an earlier one had not
                write({**index, key: value})
                assert outcomes(damaged) == ["ValueError"], (key, value)
        for draw in draws(150):
            lines = copy.deepcopy(index["tensors"])
            changed_lines(lines, draw)
            if lines != index["tensors"]:
                write({**index, "tensors": lines})
                assert outcomes(damaged) == ["ValueError"]


KINDS: dict[str, Callable[[Path], object]] = {
    "a FIFO": os.mkfifo,
    "a directory": Path.mkdir,
    "a socket": lambda path: os.mknod(path, stat.S_IFSOCK | 0o600),
    "a device": lambda path: path.symlink_to("/dev/zero"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["checkpoint.json", "rank-00001.safetensors"])
def test_no_regular_file(name: str, kind: str, damaged: Path) -> None:
    """All ranks say so at once; none waits for a writer or reads without an end."""
    (damaged / name).unlink()
    KINDS[kind](damaged / name)
    assert outcomes(damaged, RANKS) == ["OSError"] * RANKS
    with pytest.raises(OSError, match=f"is {kind}, expected a regular file.*{name}"):
        checkpoint.load(damaged, *made(None, 2))


def test_an_optimizer_that_refuses_on_one_rank(whole: Path) -> None:
    """As one does whose states do not fit into a device's memory: it and its model are unchanged on all ranks."""

    def body(comm: Comm) -> None:
        model, optimizer = made(comm, 2)
        before = state(model, optimizer)

        def refuse(*_: Any) -> None:
            raise torch.OutOfMemoryError("no memory is left")

        if comm.rank == 1:
            optimizer.register_load_state_dict_post_hook(refuse)
        with pytest.raises(RuntimeError, match=r"checkpoint: no memory is left  \(rank 1 of 2\)"):
            checkpoint.load(whole, model, optimizer, comm=comm)
        assert same(state(model, optimizer), before)

    threads.run(RANKS, body, limit=LIMIT)


def test_a_parameter_without_memory(whole: Path) -> None:
    model, _ = made(None, 2)
    model.norm = torch.nn.Parameter(model.norm.to("meta"))
    with pytest.raises(ValueError, match="norm is on the meta device"):
        checkpoint.load(whole, model)
