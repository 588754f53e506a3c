"""python -m moecomm.train: what it writes, what it refuses, and what stays when it is interrupted."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import PROGRAMS

torch = pytest.importorskip("torch")

from moecomm import Comm, Nodes  # noqa: E402
from moecomm.nn import CONFIGS, TransformerLM, checkpoint  # noqa: E402
from moecomm.train.__main__ import main, parser  # noqa: E402
from moecomm.train.loop import Trainer, TrainingPlan, balanced  # noqa: E402
from moecomm.train.run import Log, alone, build, restore, run, share_cores, warn_of_lone_ranks  # noqa: E402
from moecomm.train.text import Text, read_text  # noqa: E402
from moecomm.transports import threads  # noqa: E402

torch.set_num_threads(1)  # threads that wait for a busy core take longer than they save
TINY = ["--config", "tiny", "--batch", "8"]


@pytest.fixture
def book(tmp_path: Path) -> Path:
    path = tmp_path / "book.txt"
    path.write_text("Üben macht den Meister. " * 200)
    return path


def records(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def test_a_run(book: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main([*TINY, "--text", str(book), "--steps", "30", "--save-every", "20", "--out", str(out)]) == 0
    assert "validation loss" in capsys.readouterr().out
    found = records(out)
    steps = [record for record in found if "loss" in record]
    assert [record["step"] for record in steps] == list(range(1, 31))
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.5
    assert all(record["tokens_per_s"] > 0 for record in steps)
    at_checkpoints = [(record["step"], record.get("layer")) for record in found[1:] if "loss" not in record]
    assert at_checkpoints == [(step, layer) for step in (20, 30) for layer in (None, 0, 1)]
    for picture in ("loss.png", "routing.png"):
        assert (out / picture).read_bytes()[:4] == b"\x89PNG"
    assert [path.name for path in out.glob("step-*")] == ["step-000030"]
    model = TransformerLM(CONFIGS["tiny"], seed=1)
    checkpoint.load(out / "step-000030", model, torch.optim.AdamW(model.parameters()))
    trainer = Trainer(model, Text(read_text([book]), model.config.context), TrainingPlan())
    assert trainer.validate() < steps[0]["loss"] - 0.5
    assert main([*TINY, "--text", str(book), "--out", str(out)]) == 2  # what is there stays
    assert "has a run already" in capsys.readouterr().err
    assert len(records(out)) == len(found)


def test_interrupted(
    book: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ctrl-C: the step is finished and saved, and the log and pictures are written."""
    whole_step, before = Trainer.step, signal.getsignal(signal.SIGINT)

    def step(self: Trainer, number: int) -> float:
        if number == 4:
            signal.raise_signal(signal.SIGINT)
        return whole_step(self, number)

    monkeypatch.setattr(Trainer, "step", step)
    assert main([*TINY, "--text", str(book), "--out", str(tmp_path / "out")]) == 130
    assert capsys.readouterr().err == "interrupted after step 5: --resume goes on from there\n"
    last = checkpoint.last(tmp_path / "out")
    assert last is not None and last.name == "step-000005"
    assert records(tmp_path / "out")[-1]["step"] == 5
    assert (tmp_path / "out" / "loss.png").exists()
    assert signal.getsignal(signal.SIGINT) is before


def test_interrupted_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("moecomm.train.run.run", interrupted)
    assert main([*TINY, "--out", str(tmp_path / "out")]) == 130
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize("steps", ["2", "1"])
def test_resumed_with_no_more_steps(steps: str, book: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    options = [*TINY, "--text", str(book), "--out", str(out)]
    assert main([*options, "--steps", "2"]) == 0
    before = {path: path.read_bytes() for path in out.glob("*.*")}
    capsys.readouterr()
    assert main([*options, "--steps", steps, "--resume"]) == 0
    assert capsys.readouterr().out == f"nothing to do: the run in {out} has made 2 steps, and --steps is {steps}\n"
    assert {path: path.read_bytes() for path in out.glob("*.*")} == before


@pytest.mark.parametrize("variable", ["PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS"])
def test_ranks_that_know_nothing_of_each_other_are_told(variable: str) -> None:
    with pytest.warns(RuntimeWarning, match=r"started 2 processes, and each runs alone.*torchrun --nproc-per-node 2"):
        warn_of_lone_ranks({variable: "2"})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_lone_ranks({variable: "1", "WORLD_SIZE": "2"})


@pytest.mark.parametrize(("cores", "before", "after"), [(9, 4, 3), (9, 2, 2), (1, 4, 1)])
def test_ranks_of_a_host_share_its_cores(
    cores: int, before: int, after: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Never more threads than there were, and at least one."""

    def body(comm: Comm) -> int:
        if comm.rank > 0:
            # Ranks are threads here, and torch's number is that of the process or of the thread that has set it.
            Nodes.discover(comm)
            return after
        torch.set_num_threads(before)
        share_cores(comm, cores)
        return torch.get_num_threads()

    assert threads.run(3, body) == [after] * 3
    torch.set_num_threads(1)
    said = capsys.readouterr().err
    assert said.count(f"uses {after} thread(s) a rank, not {before}") == (after < before)


def test_begun_again_after_no_checkpoint(book: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What ended before its first checkpoint has nothing to lose."""

    def full(*_: Any, **__: Any) -> None:
        raise OSError("the disk is full")

    out = tmp_path / "out"
    options = [*TINY, "--text", str(book), "--out", str(out), "--steps", "2"]
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", full)
        assert main(options) == 2
    assert (out / "log.jsonl").exists()
    assert main(options) == 0
    assert [record["step"] for record in records(out) if "loss" in record] == [1, 2]
    (out / "log.jsonl").unlink()
    assert main(options) == 2  # there is a checkpoint, whatever the log
    assert [path.name for path in out.glob("step-*")] == ["step-000002"]


def test_resumed_with_half_a_line(book: Path, tmp_path: Path) -> None:
    """A full disk has cut the log off: what is whole in it is kept."""
    out = tmp_path / "out"
    options = [*TINY, "--text", str(book), "--out", str(out)]
    assert main([*options, "--steps", "2"]) == 0
    whole = records(out)
    (out / "log.jsonl").write_text((out / "log.jsonl").read_text() + '{"step": 3, "lo')
    assert main([*options, "--steps", "3", "--resume"]) == 0
    assert records(out)[: len(whole)] == whole
    assert [record["step"] for record in records(out) if "loss" in record] == [1, 2, 3]


def test_resumed_with_other_settings(book: Path, tmp_path: Path) -> None:
    """All ranks say so, and what the log says stays."""
    options = [*TINY, "--text", str(book), "--out", str(tmp_path / "out"), "--steps", "1"]
    assert main(options) == 0
    before = records(tmp_path / "out")

    def body(comm: Comm) -> None:
        other = parser().parse_args([*options, "--resume", "--steps", "2", "--batch", "16", "--balance", "z"])
        message = (
            r"^resume: config aux_loss is 0.0, expected 0.01, config z_loss is 0.001, expected 0.0, plan batch is 16, "
            r"expected 8, plan balance is 'z', expected 'aux', as the run in .*out began  \(rank 0 of 2\)$"
        )
        with pytest.raises(ValueError, match=message):
            run(other, comm, torch.device("cpu"))

    threads.run(2, body)
    assert records(tmp_path / "out") == before


def test_resumed_with_another_text(book: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    options = [*TINY, "--text", str(book), "--out", str(out)]
    assert main([*options, "--steps", "1"]) == 0
    whole, log = book.read_text(), records(out)
    for text, message in (
        (whole + "!", r"resume: text bytes is 5001, expected 5000, text digest is '\w+', expected '\w+', as the run"),
        ("Ü" + whole[:0:-1], r"resume: text digest is '\w+', expected '\w+', as the run in"),
    ):
        book.write_text(text)
        assert main([*options, "--steps", "2", "--resume"]) == 2
        assert re.search(message, capsys.readouterr().err)
        assert records(out) == log
    settings = {key: log[0][key] for key in ("config", "plan")}  # as the first logs began: nothing of the text,
    assert settings["config"].pop("normalize") == "none"  # nor of choices that came later
    (out / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in (settings, *log[1:])))
    without_settings(checkpoint.last(out))
    assert main([*options, "--steps", "2", "--resume"]) == 0
    assert [record["step"] for record in records(out) if "loss" in record] == [1, 2]


def without_settings(path: Path) -> None:
    """A checkpoint as the first runs saved it."""
    model = TransformerLM(CONFIGS["tiny"])
    optimizer = torch.optim.AdamW(model.parameters())
    checkpoint.load(path, model, optimizer)
    shutil.rmtree(path)
    checkpoint.save(path.parent, 1, model, optimizer)


def test_resumed_with_another_seed(book: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The checkpoint says so, too, should the log be that of another run."""
    options = [*TINY, "--text", str(book), "--steps", "1", "--out"]
    for seed in ("3", "4"):
        assert main([*options, str(tmp_path / seed), "--seed", seed]) == 0
    assert main([*options, str(tmp_path / "3"), "--seed", "4", "--resume"]) == 2
    assert "resume: plan seed is 4, expected 3, as the run in" in capsys.readouterr().err
    shutil.copy(tmp_path / "4" / "log.jsonl", tmp_path / "3" / "log.jsonl")
    assert main([*options, str(tmp_path / "3"), "--seed", "4", "--resume"]) == 2
    assert "resume: plan seed is 4, expected 3, as the run of its checkpoint in" in capsys.readouterr().err


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.slow
def test_two_runs_in_one_folder(resume: bool, book: Path, tmp_path: Path) -> None:
    """All ranks of the second say who has it, and write nothing. A killed holder is none."""
    out = tmp_path / "out"
    options = [*TINY, "--text", str(book), "--out", str(out), "--steps", "2"]
    if resume:
        assert main([*options[:-1], "1"]) == 0
        options.append("--resume")
    program = "import sys, time; from moecomm.train.run import alone; from pathlib import Path\n"
    program += f"with alone(Path(sys.argv[1]), {resume}): print('held', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", program, str(out)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        before = {path: path.read_bytes() for path in out.iterdir() if path.is_file()}
        host = re.escape(socket.gethostname())

        def body(comm: Comm) -> None:
            message = (
                rf"another run is using {out}: process {holder.pid} on host {host} since 20\d\d-\S+ \S+  \(rank 0 "
            )
            with pytest.raises(ValueError, match=message):
                run(parser().parse_args(options), comm, torch.device("cpu"))

        threads.run(2, body)
        assert {path: path.read_bytes() for path in out.iterdir() if path.is_file()} == before
        holder.kill()
    assert main(options) == 0
    assert [record["step"] for record in records(out) if "loss" in record] == [1, 2]


def test_a_run_holds_its_folder_to_its_end(book: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through its steps, checkpoints and pictures, and no longer."""
    out = tmp_path / "out"
    options = [*TINY, "--text", str(book), "--out", str(out), "--steps", "2", "--save-every", "1"]
    refused = []

    def asks(of: Any, name: str) -> None:
        whole = getattr(of, name)

        def call(*arguments: Any, **options_of_call: Any) -> Any:
            with pytest.raises(ValueError, match="another run is using"), alone(out, resume=False):
                pass
            refused.append(name)
            return whole(*arguments, **options_of_call)

        monkeypatch.setattr(of, name, call)

    asks(Trainer, "step")
    asks(checkpoint, "save")
    asks(Log, "end")
    assert main(options) == 0
    assert refused == ["step", "save", "step", "save", "end"]
    with alone(out, resume=True):
        pass


NO_FILES: dict[str, Callable[[Path], object]] = {
    "a FIFO": os.mkfifo,
    "a directory": Path.mkdir,
    "a device": lambda path: path.symlink_to("/dev/zero"),
}


@pytest.mark.parametrize("kind", NO_FILES)
def test_no_file_in_place_of_one(kind: str, book: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The text, a run's lock and the log that is to be resumed: an error at once; pictures and logs are replaced."""
    out, odd = tmp_path / "out", tmp_path / "odd"
    NO_FILES[kind](odd)
    options = [*TINY, "--steps", "1", "--out", str(out)]
    assert main([*options, "--text", str(odd)]) == 2
    assert f"text: {odd}: is {kind}, expected a regular file" in capsys.readouterr().err
    out.mkdir()
    options += ["--text", str(book)]
    NO_FILES[kind](out / "run.lock")
    assert main(options) == 2
    assert "expected a regular file: " in capsys.readouterr().err
    (out / "run.lock").rmdir() if kind == "a directory" else (out / "run.lock").unlink()
    if kind != "a directory":
        for name in ("log.jsonl", "unfinished-log.jsonl", "unfinished-loss.png", "routing.png"):
            NO_FILES[kind](out / name)
    assert main(options) == 0
    (out / "log.jsonl").unlink()
    NO_FILES[kind](out / "log.jsonl")
    assert main([*options, "--resume"]) == 2
    error = capsys.readouterr().err
    assert f"is {kind}, expected a regular file" in error and "does not say which settings the run began with" in error


def test_texts_that_differ(book: Path, tmp_path: Path) -> None:
    """A file that is another one on another host."""

    def body(comm: Comm) -> None:
        mine = tmp_path / str(comm.rank)
        mine.write_text(book.read_text() + str(comm.rank))
        options = parser().parse_args([*TINY, "--text", str(mine), "--out", str(tmp_path / "out")])
        with pytest.raises(ValueError, match="train: text of rank 1 is not that of rank 0"):
            build(options, comm, torch.device("cpu"))
        if comm.rank:
            mine.unlink()
        with pytest.raises(ValueError, match=r"1: No such file or directory  \(rank 1 of 2\)"):
            build(options, comm, torch.device("cpu"))

    threads.run(2, body)


def test_resumed_without_a_log(book: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    options = [*TINY, "--text", str(book), "--out", str(out)]
    assert main([*options, "--steps", "1"]) == 0
    (out / "log.jsonl").write_text("")
    assert main([*options, "--steps", "2", "--resume"]) == 2
    (out / "log.jsonl").unlink()
    assert main([*options, "--steps", "2", "--resume"]) == 2
    message = f"error: resume: {out / 'log.jsonl'} does not say which settings the run began with"
    assert [line[: len(message)] for line in capsys.readouterr().err.splitlines() if "error" in line] == [message] * 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--config", "huge"], "config is 'huge', expected one of 350m-moe-128, "),
        (["--text", "no such file"], "no such file: No such file"),
        (["--text", "empty"], "empty is empty"),
        (["--text", "binary"], "binary is not UTF-8: byte 3 is 0xff"),
        (["--text", "short"], "got 300 bytes, expected 680 or more"),
        (["--batch", "6"], "batch is 6, which micro-batches of 4"),
        (["--expert", "2"], "need torchrun"),
    ],
)
def test_bad_input(
    options: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").touch()
    Path("binary").write_bytes(b"abc\xff")
    Path("short").write_text("a" * 300)
    assert main([*TINY, "--out", "out", *options]) == 2
    assert message in capsys.readouterr().err
    assert not Path("out").exists()


@pytest.mark.parametrize(("option", "got", "least"), [("--seed", "-1", 0), ("--seed", "1.5", 0), ("--steps", "0", 1)])
def test_no_such_number(option: str, got: str, least: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([*TINY, "--out", str(tmp_path / "out"), option, got])
    assert f"argument {option}: '{got}' is no whole number >= {least}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def torchrun(num_ranks: int, *command: str) -> subprocess.CompletedProcess[str]:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)]
    return subprocess.run([*launch, *command], capture_output=True, text=True, timeout=120)


@pytest.mark.slow
def test_a_lost_rank(book: Path, tmp_path: Path) -> None:
    options = [*TINY, "--text", str(book), "--save-every", "2", "--out", str(tmp_path / "out")]
    job = torchrun(2, str(PROGRAMS / "train_and_lose_a_rank.py"), *options)
    assert job.returncode != 0
    last = checkpoint.last(tmp_path / "out")
    assert last is not None and last.name == "step-000002"
    assert len(list(last.glob("rank-*"))) == 2
    assert "error: a rank was lost" in job.stderr
    assert f"the last checkpoint is {last}" in job.stderr


def test_ranks_that_do_not_fit(book: Path, tmp_path: Path) -> None:
    """All of them say so, none waits."""
    options = [*TINY, "--text", str(book), "--out", str(tmp_path)]
    model = TransformerLM(CONFIGS["tiny"])
    (tmp_path / "0").mkdir()
    checkpoint.save(tmp_path / "0", 1, model)

    def body(comm: Comm) -> None:
        with pytest.raises(ValueError, match="tensor=3 does not divide"):
            build(parser().parse_args([*options, "--tensor", "3"]), comm, torch.device("cpu"))
        with pytest.raises(ValueError, match=f"{comm.rank} has no checkpoint"):
            restore(tmp_path / str(comm.rank), model, comm)
        comm.barrier()
        if comm.rank == 1:
            checkpoint.save(tmp_path / "1", 2, model)
        with pytest.raises(ValueError, match="path of rank 1 is not that of rank 0; this rank's is step-00000"):
            restore(tmp_path / str(comm.rank), TransformerLM(CONFIGS["tiny"]), comm)

    threads.run(2, body)


def test_text() -> None:
    source = read_text([])
    assert len(source) > 3_000_000
    text = Text(source, 16, seed=1)
    assert text.batch(3, 5).shape == (5, 17)
    assert torch.equal(text.batch(3, 5), text.batch(3, 5))
    assert not torch.equal(text.batch(3, 5), text.batch(4, 5))
    assert torch.equal(text.validation(4), Text(source, 16, seed=2).validation(4))
    ends = Text(torch.arange(200, dtype=torch.uint8), 9)
    assert ends.batch(0, 500).max() == 189
    assert ends.validation(500).min() == 190


@pytest.mark.parametrize("balance", ["aux", "z", "bias", "loss-bias", "none"])
def test_every_way_of_balancing(balance: Any) -> None:
    config = balanced(CONFIGS["tiny"], balance)
    model = TransformerLM(config)
    text = Text(torch.arange(4000, dtype=torch.int64).to(torch.uint8), config.context)
    trainer = Trainer(model, text, TrainingPlan(batch=4, micro_batch=2, balance=balance))
    losses = [trainer.step(step) for step in range(4)]
    assert losses[-1] < losses[0]
    moved = [bool(layer.bias.any()) for layer in model.moe_layers()]
    assert moved == [balance in ("bias", "loss-bias")] * 2
    assert (config.aux_loss > 0, config.z_loss > 0) == (balance == "aux", balance == "z")
