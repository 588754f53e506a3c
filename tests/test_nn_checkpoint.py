"""moecomm.nn.checkpoint: any split loads what any other saved, and whatever goes wrong, the last good one stays.

A model that was loaded under another split continues with losses within 1e-5 of their value (only the order of sums
differs, see test_nn_splits), and saves the very numbers that it loaded.
"""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import stat
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import gloo_run

torch = pytest.importorskip("torch")

from indexes import first_version, write_index  # noqa: E402
from safetensors import safe_open  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from training import train  # noqa: E402

from moecomm import Comm  # noqa: E402
from moecomm.nn import (  # noqa: E402
    CONFIGS,
    Experts,
    TransformerLM,
    checkpoint,
    layer_groups,
    parameter_groups,
)
from moecomm.nn.slices import held  # noqa: E402
from moecomm.transports import threads  # noqa: E402

STEPS, MICRO_BATCHES = 3, 4
CONFIG = replace(CONFIGS["tiny"], z_loss=0.001, capacity_factor=1.25)
LEARNED = replace(CONFIG, residual="learned", activation="swiglu")
SPLITS: list[dict[str, int]] = [
    {"expert": 4},
    {"expert": 2, "tensor": 2, "expert_tensor": 2},
    {"tensor": 2, "expert": 1},
]


def build(config: object, comm: Comm | None = None, **sizes: int) -> tuple[TransformerLM, Any]:
    groups = None if comm is None else layer_groups(comm, config.experts, **sizes)
    model = TransformerLM(config, groups=groups, seed=0 if comm is None else 1)
    return model, torch.optim.AdamW(parameter_groups(model, lr=5e-3), 1e-2)


def tokens(step: int) -> torch.Tensor:
    """[MICRO_BATCHES, 2, 13], all of a step."""
    return torch.randint(256, (MICRO_BATCHES, 2, 13), generator=torch.Generator().manual_seed(step))


def contents(path: Path) -> dict[str, torch.Tensor]:
    """Every whole tensor of a checkpoint, put together from what the keys in its files say; no number comes twice."""
    index = json.loads((path / "checkpoint.json").read_text())
    shapes = {name: shape for name, shape, *_ in index["tensors"]}
    whole = {name: torch.full(shape, torch.nan) for name, shape in shapes.items()}
    for file in path.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            for key in opened.keys():  # noqa: SIM118 - it is no dict
                name, _, box = key.partition("[")
                place = tuple(slice(*map(int, part.split(":"))) for part in box[:-1].split(",")) if box else ...
                assert whole[name][place].isnan().all(), key
                whole[name][place] = opened.get_tensor(key)
    assert not any(tensor.isnan().any() for tensor in whole.values())
    return whole


@pytest.mark.parametrize("config", [CONFIG, LEARNED], ids=["gelu", "swiglu"])
@pytest.mark.slow
def test_every_split_continues_what_one_began(config: object, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    model, optimizer = build(config)
    train(model, optimizer, tokens, range(STEPS))
    checkpoint.save(tmp_path, 1, model, optimizer, values={"seen": 5})
    wanted = train(model, optimizer, tokens, range(STEPS, 2 * STEPS))
    saved = contents(tmp_path / "step-000001")
    assert saved["blocks.3.ffn.moe.experts.7.up"].shape == (16, 64)
    assert {"embedding", "blocks.1.ffn.moe.bias", "optimizer/exp_avg/blocks.1.ffn.moe.experts.0.down"} < saved.keys()

    def body(comm: Comm) -> None:
        for number, sizes in enumerate(SPLITS):
            model, optimizer = build(config, comm, **sizes)
            last = checkpoint.last(tmp_path)  # of the split before
            assert last is not None
            assert checkpoint.load(last, model, optimizer, comm=comm) == {"seen": 5}
            checkpoint.save(tmp_path, number + 2, model, optimizer, comm=comm, values={"seen": 5})
            assert train(model, optimizer, tokens, range(STEPS, 2 * STEPS)) == pytest.approx(wanted, rel=1e-5), sizes

    gloo_run(4, body)
    for number in range(2, len(SPLITS) + 2):
        again = contents(tmp_path / f"step-{number:06d}")
        assert again.keys() == saved.keys()
        assert all(torch.equal(again[name], tensor) for name, tensor in saved.items())
    sizes = [file.stat().st_size for file in (tmp_path / "step-000002").glob("*.safetensors")]
    assert len(sizes) == 4 and max(sizes) < 1.5 * min(sizes)  # the ranks share the writing
    model, optimizer = build(config)
    checkpoint.load(tmp_path / "step-000004", model, optimizer)
    assert train(model, optimizer, tokens, range(STEPS, 2 * STEPS)) == pytest.approx(wanted, rel=1e-5)


def test_saved_at_four_loaded_at_one_and_two(tmp_path: Path) -> None:
    torch.set_num_threads(1)

    def saved(comm: Comm) -> None:
        model, optimizer = build(CONFIG, comm, expert=4)
        train(model, optimizer, tokens, range(STEPS))
        checkpoint.save(tmp_path, 1, model, optimizer, comm=comm)
        losses = train(model, optimizer, tokens, range(STEPS, 2 * STEPS))
        if comm.rank == 0:
            (tmp_path / "losses").write_text(json.dumps(losses))

    gloo_run(4, saved)
    wanted = json.loads((tmp_path / "losses").read_text())

    def loaded(comm: Comm | None, **sizes: int) -> None:
        model, optimizer = build(CONFIG, comm, **sizes)
        checkpoint.load(tmp_path / "step-000001", model, optimizer, comm=comm)
        assert train(model, optimizer, tokens, range(STEPS, 2 * STEPS)) == pytest.approx(wanted, rel=1e-5)

    loaded(None)
    gloo_run(2, lambda comm: loaded(comm, expert=2))


def test_pipeline_stages_save_one_model(tmp_path: Path) -> None:
    whole = TransformerLM(CONFIG, seed=1)

    def body(comm: Comm) -> None:
        stage = TransformerLM(CONFIG, stage=(comm.rank, 2), seed=1)
        checkpoint.save(tmp_path, 1, stage, comm=comm)

    threads.run(2, body)
    model = TransformerLM(CONFIG)
    checkpoint.load(tmp_path / "step-000001", model)
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), model.state_dict().values(), strict=True))


class Signs(torch.optim.Optimizer):
    """One that keeps its count as a Python number, as some do."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.1, "shape": (1, 2)})

    def step(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                state["count"] = state.get("count", 0) + 1
                state["sum"] = state.get("sum", 0) + parameter.grad
                parameter.data -= group["lr"] / state["count"] * state["sum"].sign()


class Bank(torch.nn.Module):
    """Experts and a dense weight, with gradients that do not depend on the split."""

    def __init__(self, experts: range) -> None:
        super().__init__()
        self.experts = Experts(4, 8, experts)
        self.dense = torch.nn.Parameter(torch.ones(3))

    def step(self, optimizer: Any, number: int) -> None:
        for name, parameter in self.named_parameters():
            every = torch.randn((4, *parameter.shape[1:]), generator=torch.Generator().manual_seed(number))
            parameter.grad = torch.ones(3) if name == "dense" else every[list(self.experts.experts)]
        optimizer.step()


OPTIMIZERS: list[Callable[[Any], Any]] = [
    lambda p: torch.optim.SGD(p, 0.1),
    lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True),
    lambda p: torch.optim.AdamW(p, 0.1, amsgrad=True),
    lambda p: torch.optim.Adam(p, 0.1, fused=True),
    lambda p: torch.optim.Adamax(p, 0.1),
    lambda p: torch.optim.Adadelta(p),
    lambda p: torch.optim.Adagrad(p, 0.1),
    lambda p: torch.optim.ASGD(p, 0.1),
    lambda p: torch.optim.NAdam(p, 0.1),
    lambda p: torch.optim.RAdam(p, 0.1),
    lambda p: torch.optim.RMSprop(p, 0.1, momentum=0.5, centered=True),
    lambda p: torch.optim.Rprop(p, 0.1),
    Signs,
]


@pytest.mark.parametrize("make", OPTIMIZERS)
def test_any_optimizer(make: Callable[[Any], Any], tmp_path: Path) -> None:
    """Two ranks save, one loads and goes on; it has then what one rank alone would have, bit for bit."""

    def body(comm: Comm) -> None:
        bank = Bank(range(2 * comm.rank, 2 * comm.rank + 2))
        optimizer = make(bank.parameters())
        for number in range(3):
            bank.step(optimizer, number)
        optimizer.param_groups[0]["lr"] = 0.05
        checkpoint.save(tmp_path, 1, bank, optimizer, comm=comm)

    threads.run(2, body)
    alone, loaded = Bank(range(4)), Bank(range(4))
    one, other = make(alone.parameters()), make(loaded.parameters())
    for number in range(3):
        alone.step(one, number)
    one.param_groups[0]["lr"] = 0.05
    checkpoint.load(tmp_path / "step-000001", loaded, other)
    assert other.param_groups[0] | {"params": 0} == one.param_groups[0] | {"params": 0}
    for number in range(3, 5):
        alone.step(one, number)
        loaded.step(other, number)
    for a, b in zip(alone.parameters(), loaded.parameters(), strict=True):
        assert torch.equal(a, b)
        for (key, mine), (_, theirs) in zip(one.state[a].items(), other.state[b].items(), strict=True):
            assert type(mine) is type(theirs), key
            assert torch.equal(mine, theirs) if isinstance(mine, torch.Tensor) else mine == theirs, key


def test_what_is_not_saved(tmp_path: Path) -> None:
    bank = Bank(range(2))
    bank.step(torch.optim.SGD(bank.parameters(), 0.1), 0)
    factored = torch.optim.Adafactor(bank.parameters())
    factored.step()
    with pytest.raises(ValueError, match=r"optimizer state row_var of experts.up is \(2, 4, 1\), expected a number or"):
        checkpoint.save(tmp_path, 1, bank, factored)
    with pytest.raises(ValueError, match="a parameter that the model does not have"):
        checkpoint.save(tmp_path, 1, bank, torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))]))

    def body(comm: Comm) -> None:
        with pytest.raises(ValueError, match=r"weight is \[\[2, 1\], 'torch.float32'\], but .*3, 1.* on rank 1"):
            checkpoint.save(tmp_path, 1, torch.nn.Linear(1, 2 + comm.rank), comm=comm)

    threads.run(2, body)
    assert checkpoint.last(tmp_path) is None


# ---- what goes wrong -------------------------------------------------------------------------------------------------


class Stamped(torch.nn.Module):
    """A model all of whose numbers say the step that it was saved at."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.weights = torch.nn.ParameterList(torch.full((50, 100), float(step)) for _ in range(8))


def save_for_ever(folder: Path) -> None:
    torch.set_num_threads(1)

    def body(comm: Comm) -> None:
        step = 1 + max((int(path.name[5:]) for path in folder.glob("step-*")), default=0)
        comm.barrier()
        while True:
            checkpoint.save(folder, step, Stamped(step), comm=comm, values={"step": step}, keep=2)
            step += 1

    threads.run(2, body)


def test_killed_at_ten_moments(tmp_path: Path) -> None:
    last: Path | None = checkpoint.save(tmp_path, 1, Stamped(1), values={"step": 1})
    moments = random.Random(8)
    for _ in range(10):
        process = os.fork()
        if process == 0:
            with suppress(BaseException):
                save_for_ever(tmp_path)
            os._exit(1)
        while checkpoint.last(tmp_path) == last:  # until it has saved one
            assert os.waitpid(process, os.WNOHANG) == (0, 0)
            time.sleep(0.005)
        time.sleep(moments.random() * 0.05)
        os.kill(process, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(process, 0)[1])
        last = checkpoint.last(tmp_path)
        assert last is not None
        model = Stamped(0)
        step = checkpoint.load(last, model)["step"]
        assert last.name == f"step-{step:06d}"
        assert all((weight == step).all() for weight in model.weights)


def test_interrupted_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = checkpoint.save(tmp_path, 1, Stamped(1))

    def rename(self: Path, target: Path) -> Path:
        assert not (tmp_path / "step-000002").exists()
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(tmp_path, 2, Stamped(2))
    assert checkpoint.last(tmp_path) == good


def damage(path: Path, how: str) -> None:
    index = path / "checkpoint.json"
    content = json.loads(index.read_text())
    files = sorted(path.glob("*.safetensors"))
    if how == "truncated":
        os.truncate(files[1], files[1].stat().st_size - 10)
    elif how == "empty":
        files[1].write_bytes(b"")
    elif how == "a file is gone":
        files[1].unlink()
    elif how == "another's file":
        files[1].write_bytes(files[0].read_bytes())
    elif how == "another save's file":
        files[1].write_bytes((path.parent / "again" / path.name / files[1].name).read_bytes())
    elif how == "another's name":
        change(files[1], lambda tensors: {"weight" if key == "norm.weight" else key: tensors[key] for key in tensors})
    elif how == "another's shape":
        change(files[1], lambda tensors: tensors | {"norm.bias": tensors["norm.bias"][:-1].clone()})
    elif how == "no index":
        index.unlink()
    elif how == "half an index":
        index.write_text(index.read_text()[:200])
    elif how == "foreign":
        index.write_text('{"metadata": {}, "weight_map": {}}')
    elif how == "newer":
        index.write_text(json.dumps({**content, "version": 3}))
    elif how == "other checksums":
        index.write_text(json.dumps({**content, "hash": "md5"}))
    elif how == "another index":
        index.write_text(index.read_text().replace('"lr": 0.005', '"lr": 0.006'))
    elif how == "a part is gone":
        lines = [line for line in content["tensors"] if not (line[0] == "blocks.0.ffn.up.weight" and line[4][0] > 0)]
        write_index(path, {**content, "tensors": lines})


def change(file: Path, to: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    """Other tensors in a file, whose metadata stays."""
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    save_file(to(load_file(file)), file, metadata)


DAMAGES = {
    "truncated": r"rank-00001.safetensors is damaged: its numbers do not end where the file ends",
    "empty": r"rank-00001.safetensors is damaged: it ends within its header",
    "a file is gone": r"rank-00001.safetensors is damaged: No such file",
    "another's file": r"rank-00001.safetensors is not the file",
    "another save's file": r"rank-00001.safetensors is not the file",
    "another's name": r"rank-00001.safetensors is not the file",
    "another's shape": r"rank-00001.safetensors is not the file",
    "no index": r"is no checkpoint of moecomm: it has no usable checkpoint.json",
    "half an index": r"is no checkpoint of moecomm",
    "foreign": r"is no checkpoint of moecomm",
    "newer": r"was written by a newer moecomm: version 3, this one reads up to 2",
    "other checksums": r"its checksums are md5, this version knows xxh3_128",
    "another index": r"checkpoint.json is damaged: its checksum is not that of what it says",
    "a part is gone": r"checkpoint.json is damaged: the parts of blocks.0.ffn.up.weight are not each of its numbers",
}


@pytest.fixture
def good(tmp_path: Path) -> Path:
    """A checkpoint of two tensor ranks. The same was saved in another folder, too."""

    def body(comm: Comm) -> None:
        model, optimizer = build(CONFIG, comm, tensor=2)
        checkpoint.save(tmp_path, 1, model, optimizer, comm=comm)
        checkpoint.save(tmp_path / "again", 1, model, optimizer, comm=comm)

    threads.run(2, body)
    return tmp_path / "step-000001"


@pytest.mark.parametrize("how", DAMAGES)
def test_damaged(how: str, good: Path) -> None:
    """All ranks raise, and the model is what it was."""
    damage(good, how)

    def body(comm: Comm) -> None:
        model, optimizer = build(CONFIG, comm, tensor=2)
        before = [values.clone() for values in model.state_dict().values()]
        with pytest.raises(ValueError, match=DAMAGES[how]):
            checkpoint.load(good, model, optimizer, comm=comm)
        assert all(torch.equal(a, b) for a, b in zip(before, model.state_dict().values(), strict=True))

    threads.run(2, body)


def test_without_checksums(good: Path) -> None:
    """As the first ones were written, which had no ids either."""

    def loaded(index: dict[str, Any]) -> dict[str, torch.Tensor]:
        (good / "checkpoint.json").write_text(json.dumps(index))
        model, optimizer = build(CONFIG)
        with pytest.warns(UserWarning, match="step-000001 has no checksums"):
            checkpoint.load(good, model, optimizer)
        return model.state_dict()

    model, optimizer = build(CONFIG)
    checkpoint.load(good, model, optimizer)
    index = first_version(good)
    of_each = [loaded(index)]
    for file in good.glob("*.safetensors"):
        save_file(load_file(file), file)
    of_each.append(loaded({key: index[key] for key in index if key != "id"}))
    for state in of_each:
        assert all(torch.equal(a, b) for a, b in zip(state.values(), model.state_dict().values(), strict=True))


def test_of_another_model(good: Path) -> None:
    model, optimizer = build(CONFIG)
    with pytest.raises(OSError, match=r"there is no checkpoint .*step-000002"):
        checkpoint.load(good.parent / "step-000002", model)
    with pytest.raises(ValueError, match=r"step-000001 has no blocks.4.norms.0.weight"):
        checkpoint.load(good, TransformerLM(replace(CONFIG, num_layers=6, experts=(4, 8, 8))))
    with pytest.raises(ValueError, match=r"has blocks.3.ffn.moe.experts.4.down \(16 such\), which the model has on no"):
        checkpoint.load(good, without_four_experts())
    with pytest.raises(ValueError, match=r"embedding in .* has shape \(256, 16\), expected \(300, 16\)"):
        checkpoint.load(good, TransformerLM(replace(CONFIG, vocabulary=300)))
    with pytest.raises(ValueError, match="has 2 parameter groups, the optimizer 1"):
        checkpoint.load(good, model, torch.optim.SGD(model.parameters()))
    checkpoint.save(good.parent, 2, model)
    with pytest.raises(ValueError, match="step-000002 has no optimizer"):
        checkpoint.load(good.parent / "step-000002", model, optimizer)


def without_four_experts() -> TransformerLM:
    """Without four of its experts, but with the gate for all of them."""
    model = TransformerLM(CONFIG)
    bank = model.blocks["3"].ffn.moe.experts
    bank.experts = bank.experts[:4]
    for parameter in bank.parameters():
        parameter.data = parameter.data[:4]
    return model


def test_the_disk_is_full(tmp_path: Path) -> None:
    """On one of two ranks; both say so, what was half written is gone, and the one before is loaded."""
    good = checkpoint.save(tmp_path, 1, Stamped(1), values={"step": 1})

    def body(comm: Comm) -> None:
        if comm.rank == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
        with pytest.raises(OSError, match=r"checkpoint: .*rank-00001.safetensors: .*File too large .*\(rank 1 of 2\)"):
            checkpoint.save(tmp_path, 2, Stamped(2), comm=comm)
        assert checkpoint.last(tmp_path) == good
        assert comm.rank == 1 or not (tmp_path / "unfinished").exists()
        assert checkpoint.load(good, Stamped(0), comm=comm) == {"step": 1}

    gloo_run(2, body)


def test_two_jobs_in_one_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.save(tmp_path, 1, Stamped(1))
    whole_write = checkpoint.write

    def write(*arguments: Any) -> Any:
        if not refused:
            refused.append(True)
            holder = rf"another job is writing a checkpoint to .*: process {os.getpid()} on host .* since 20"
            with pytest.raises(ValueError, match=holder):
                checkpoint.save(tmp_path, 3, Stamped(3))
        return whole_write(*arguments)

    refused: list[bool] = []
    monkeypatch.setattr(checkpoint, "write", write)
    checkpoint.save(tmp_path, 2, Stamped(2), values={"step": 2})
    assert refused
    with pytest.raises(ValueError, match="step-000002 is there already"):
        checkpoint.save(tmp_path, 2, Stamped(3))
    model = Stamped(0)
    assert checkpoint.load(tmp_path / "step-000002", model) == {"step": 2}
    assert (model.weights[0] == 2).all()


def test_how_many_stay(tmp_path: Path) -> None:
    for step in (5, 9, 10, 1_000_000):
        checkpoint.save(tmp_path, step, Stamped(step), keep=2)
    assert sorted(path.name for path in tmp_path.glob("step-*")) == ["step-000010", "step-1000000"]
    assert checkpoint.last(tmp_path) == tmp_path / "step-1000000"
    assert checkpoint.last(tmp_path / "nothing") is None
    with pytest.raises(OSError, match="there is none yet"):
        checkpoint.load(checkpoint.last(tmp_path / "nothing"), Stamped(0))
    (tmp_path / "step-000010").rename(tmp_path / "step-10-best")
    checkpoint.save(tmp_path, 1_000_001, Stamped(1), keep=1)
    assert sorted(path.name for path in tmp_path.glob("step-*")) == ["step-10-best", "step-1000001"]
    assert checkpoint.last(tmp_path) == tmp_path / "step-1000001"
    for step, keep in ((-1, None), (7, 0)):
        with pytest.raises(ValueError, match=f"step {step} and keep {keep}"):
            checkpoint.save(tmp_path, step, Stamped(0), keep=keep)


@pytest.mark.parametrize("keep", [3, 4, 10])
def test_none_goes_before_there_are_enough(keep: int, tmp_path: Path) -> None:
    for step in range(1, 9):
        checkpoint.save(tmp_path, step, Stamped(step), keep=keep)
        wanted = {f"step-{kept:06d}" for kept in range(max(1, step + 1 - keep), step + 1)}
        assert {path.name for path in tmp_path.glob("step-*")} == wanted


def test_an_old_step_that_was_moved_to_another_disk(tmp_path: Path) -> None:
    """A link to a checkpoint is loaded and counted as one; keep removes the link and not what it points to."""
    run, archive = tmp_path / "run", tmp_path / "archive"
    checkpoint.save(run, 1, Stamped(1))
    (run / "step-000001").rename(archive)
    (run / "step-000001").symlink_to(archive)
    model = Stamped(0)
    checkpoint.load(checkpoint.last(run), model)
    assert (model.weights[0] == 1).all()
    for step in (2, 3):
        checkpoint.save(run, step, Stamped(step), keep=1)
        assert checkpoint.last(run) == run / f"step-{step:06d}"
    assert sorted(path.name for path in run.iterdir()) == ["lock", "step-000003"]
    checkpoint.load(archive, Stamped(0))


def test_strays_that_are_named_like_a_step(tmp_path: Path) -> None:
    """A file and a link to nothing are no checkpoints: they are not counted, not loaded and stay as they are."""
    (tmp_path / "step-000001").write_text("a note")
    (tmp_path / "step-000009").symlink_to("nothing")
    for step in (2, 3, 4):
        checkpoint.save(tmp_path, step, Stamped(step), keep=2)
    assert checkpoint.last(tmp_path) == tmp_path / "step-000004"
    kept = ["lock", "step-000001", "step-000003", "step-000004", "step-000009"]
    assert sorted(path.name for path in tmp_path.iterdir()) == kept
    for step in (1, 9):
        with pytest.raises(ValueError, match=f"step-00000{step} is there already"):
            checkpoint.save(tmp_path, step, Stamped(step))
    assert (tmp_path / "step-000001").read_text() == "a note"


def test_an_old_step_that_cannot_be_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The save is complete and says so, and later ones are not in its way."""

    def refused(path: Path, ignore_errors: bool = False) -> None:
        if not ignore_errors:
            raise PermissionError(f"{path} is another's")

    checkpoint.save(tmp_path, 1, Stamped(1))
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.shutil, "rmtree", refused)
        with pytest.warns(
            UserWarning, match=r"step-000001-not-removed is an old checkpoint that cannot be removed: .*"
        ):
            checkpoint.save(tmp_path, 2, Stamped(2), keep=1)
    checkpoint.save(tmp_path, 3, Stamped(3), keep=1)
    assert sorted(path.name for path in tmp_path.glob("step-*")) == ["step-000001-not-removed", "step-000003"]


def test_what_has_the_name_of_the_unfinished(tmp_path: Path) -> None:
    """A folder or a link that a job has left goes; a file, which none leaves, is to be removed by its owner."""
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "note").touch()
    unfinished = tmp_path / "unfinished"
    for target in ("notes", "nothing"):
        unfinished.symlink_to(target)
        checkpoint.save(tmp_path, len(target), Stamped(1))
        assert not os.path.lexists(unfinished)
    assert (tmp_path / "notes" / "note").exists()
    unfinished.write_text("a note")
    with pytest.raises(ValueError, match="unfinished is a file, expected nothing: remove it"):
        checkpoint.save(tmp_path, 1, Stamped(1))
    assert unfinished.read_text() == "a note"


@pytest.mark.parametrize("kind", ["a symbolic link", "a FIFO", "a directory", "a socket"])
def test_no_file_in_place_of_the_lock(kind: str, tmp_path: Path) -> None:
    """All ranks say so; what a link points to is not touched."""
    (tmp_path / "thesis").write_text("years of work")
    lock = tmp_path / "lock"
    if kind == "a FIFO":
        os.mkfifo(lock)
    elif kind == "a directory":
        lock.mkdir()
    elif kind == "a socket":
        os.mknod(lock, stat.S_IFSOCK | 0o600)
    else:
        lock.symlink_to("thesis")

    def body(comm: Comm) -> None:
        with pytest.raises(OSError, match=rf"is {kind}, expected a regular file: .*lock'  \(rank 0 of 2\)"):
            checkpoint.save(tmp_path, 1, Stamped(1), comm=comm)

    threads.run(2, body)
    assert (tmp_path / "thesis").read_text() == "years of work"
    assert checkpoint.last(tmp_path) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_settings_and_values_that_are_tensors(dtype: torch.dtype, tmp_path: Path) -> None:
    """They come back as tensors of their dtype, inside tuples too; a number where the optimizer now has a tensor."""
    rate, beta = torch.tensor(3, dtype=dtype), torch.tensor([0.1, 0.7])
    model = Stamped(1)
    settings = {"lr": rate, "pair": (beta, 0.25), "number": 0.1}
    optimizer = torch.optim.SGD([{"params": list(model.parameters()), **settings}])
    values = {"base": [rate], "nested": {"beta": beta}, "count": np.int64(3), "share": np.float32(0.5)}
    checkpoint.save(tmp_path, 1, model, optimizer, values=values)
    other = torch.optim.SGD(model.parameters(), 0.1)
    other.param_groups[0].update(pair=(torch.tensor([0.0], dtype=torch.float64), 0), number=torch.tensor(0.5))
    found = checkpoint.load(tmp_path / "step-000001", model, other)
    assert found["count"] == 3 and type(found["count"]) is int and found["share"] == 0.5
    assert found["base"][0].dtype == dtype and torch.equal(found["base"][0], rate)
    assert torch.equal(found["nested"]["beta"], beta)
    group = other.param_groups[0]
    assert group["lr"].dtype == dtype and torch.equal(group["lr"], rate)
    assert group["pair"][0].dtype == torch.float64 and torch.equal(group["pair"][0], beta.double())
    assert group["pair"][1] == 0.25
    assert torch.equal(group["number"], torch.tensor(0.1))
    with pytest.raises(ValueError, match="a set is nothing that JSON can say"):
        checkpoint.save(tmp_path, 2, model, values={"seen": {1}})
    assert checkpoint.last(tmp_path) == tmp_path / "step-000001"


def test_every_dtype(tmp_path: Path) -> None:
    """Bit for bit, as safetensors reads them, and as a load into a model of the same dtypes has them."""
    bits = torch.randint(256, (3, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    names = "float64 float32 float16 bfloat16 float8_e4m3fn float8_e5m2 complex64 int64 int32 int16 int8 uint64 uint32 "
    names += "uint16 uint8"

    def model(values: torch.Tensor) -> torch.nn.Module:
        holder = torch.nn.Module()
        for name in names.split():
            holder.register_buffer(f"of_{name}", values.view(getattr(torch, name)))
        holder.register_buffer("of_bool", values > 99)
        holder.register_buffer("columns", values.T)  # not contiguous
        holder.register_buffer("one", values[0, 0])
        holder.register_buffer("none", values[:0])
        return holder

    checkpoint.save(tmp_path, 1, model(bits))
    loaded = model(torch.zeros_like(bits))
    checkpoint.load(tmp_path / "step-000001", loaded)
    read = load_file(tmp_path / "step-000001" / "rank-00000.safetensors")
    for name, wanted in model(bits).state_dict().items():
        for got in (read[name], loaded.state_dict()[name]):
            assert got.dtype == wanted.dtype and got.shape == wanted.shape
            assert torch.equal(got.contiguous().reshape(-1).view(torch.uint8), wanted.reshape(-1).view(torch.uint8))
    with pytest.raises(ValueError, match=r"weight is torch.complex128, expected one of torch.float64, "):
        checkpoint.save(tmp_path, 2, torch.nn.Linear(1, 1, dtype=torch.complex128))


def test_none_on_one_rank(tmp_path: Path) -> None:
    """A folder that is not shared: all ranks say so, none waits."""

    def body(comm: Comm) -> None:
        path = checkpoint.save(tmp_path / str(comm.rank), 1, Stamped(0))
        with pytest.raises(OSError, match=r"there is none yet  \(rank 1 of 2\)"):
            checkpoint.load(None if comm.rank else path, Stamped(0), comm=comm)

    threads.run(2, body)


def test_ranks_that_do_not_agree(good: Path) -> None:
    """On the step, or on which of two checkpoints of one name: all say so, and neither is loaded or written."""
    other = checkpoint.save(good.parent, 2, Stamped(2))
    first, again = (checkpoint.save(good.parent / run, 3, Stamped(3)) for run in ("a", "b"))

    def body(comm: Comm) -> None:
        model = Stamped(0)
        for paths in ((good, other), (first, again)):
            with pytest.raises(ValueError, match=rf"path of rank 1 is not that of rank 0.*{paths[comm.rank].name}"):
                checkpoint.load(paths[comm.rank], model, comm=comm)
        assert not any(weight.any() for weight in model.weights)
        for step, keep in ((4 + comm.rank, None), (4 - 9 * comm.rank, None), (4, comm.rank)):
            with pytest.raises(ValueError, match=rf"step and keep of rank 1 .* this rank's is {step} and {keep}  "):
                checkpoint.save(good.parent, step, model, comm=comm, keep=keep)

    threads.run(2, body)
    assert checkpoint.last(good.parent) == other


def test_a_tied_weight_is_held_once() -> None:
    model = torch.nn.ModuleDict({"input": torch.nn.Embedding(5, 3), "output": torch.nn.Linear(3, 5, bias=False)})
    model["output"].weight = model["input"].weight
    assert Counter(one.name for one in held(model)) == {"input.weight": 1}
