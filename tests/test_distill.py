"""Mixture-of-Students: the loss against its definition, the stop, the teacher, and the command line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT, gloo_run

torch = pytest.importorskip("torch")
from safetensors.torch import load_file  # noqa: E402

from moecomm import Comm  # noqa: E402
from moecomm.distill import (  # noqa: E402
    CachedTeacher,
    Distiller,
    ModelTeacher,
    Schedule,
    distillation_loss,
    divergence,
    kept_layers,
    start_from,
    student_config,
)
from moecomm.distill.__main__ import main  # noqa: E402
from moecomm.nn import CONFIGS, TransformerLM, layer_groups  # noqa: E402
from moecomm.train.__main__ import main as train  # noqa: E402
from moecomm.train.loop import Trainer, TrainingPlan  # noqa: E402
from moecomm.train.run import alone, mean_of_ranks  # noqa: E402
from moecomm.train.text import Text  # noqa: E402
from moecomm.transports import threads  # noqa: E402

TINY = CONFIGS["tiny"]
torch.set_num_threads(1)


def definition(student: Any, teacher: Any, temperature: float) -> Any:
    """[N, V] logits -> [N]: the sum over the vocabulary of p log(p / q), in float64."""
    p, q = (np.exp(x.double().numpy() / temperature) for x in (teacher, student))
    p, q = p / p.sum(-1, keepdims=True), q / q.sum(-1, keepdims=True)
    return torch.from_numpy((p * np.log(p / q)).sum(-1))


def logits(seed: int, *shape: int, dtype: Any = torch.float64) -> Any:
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("temperature", [1.0, 0.5, 4.0])
def test_divergence_is_its_definition(temperature: float) -> None:
    student, teacher = logits(0, 6, 11), logits(1, 6, 11)
    wanted = definition(student, teacher, temperature)
    torch.testing.assert_close(divergence(student, teacher, temperature), wanted)
    single = divergence(student.bfloat16(), teacher.bfloat16(), temperature)
    assert single.dtype == torch.float32
    torch.testing.assert_close(
        single.double(), definition(student.bfloat16(), teacher.bfloat16(), temperature), rtol=1e-5, atol=1e-6
    )
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: divergence(x, teacher, temperature), student)


def test_divergence_of_hard_logits() -> None:
    far = torch.tensor([[1e4, -1e4, 0.0]])
    assert divergence(far, far).item() == 0
    assert divergence(far.flip(1) * 1e-4, far).isfinite().all()
    impossible = torch.tensor([[0.0, 0.0, -torch.inf]])
    student = impossible.clone().requires_grad_()
    assert divergence(student, impossible).item() == 0
    divergence(student, torch.tensor([[1.0, 0.0, -torch.inf]])).backward()
    assert student.grad is not None and student.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("ranks", "vocabulary"), [(1, 5), (2, 8), (2, 7), (4, 10)])
def test_slices_of_the_vocabulary(ranks: int, vocabulary: int, dtype: Any) -> None:
    """Each rank has some columns; values and gradients are those of all columns at once."""
    student, teacher = logits(2, 3, 4, vocabulary, dtype=dtype), logits(3, 3, 4, vocabulary, dtype=dtype)
    weight = logits(4, 3, 4, dtype=dtype)
    whole = student.clone().requires_grad_()
    wanted = divergence(whole, teacher, 2.0)
    (wanted * weight).sum().backward()

    def body(comm: Comm) -> tuple[Any, Any]:
        mine = student.tensor_split(ranks, -1)[comm.rank].clone().requires_grad_()
        got = divergence(mine, teacher.tensor_split(ranks, -1)[comm.rank], 2.0, comm)
        (got * weight).sum().backward()
        return got.detach(), mine.grad

    answers = threads.run(ranks, body)
    for got, _ in answers:
        torch.testing.assert_close(got, wanted.detach())
        assert torch.equal(got, answers[0][0])
    torch.testing.assert_close(torch.cat([grad for _, grad in answers], -1), whole.grad)


def test_loss_counts_the_tokens_of_the_mask() -> None:
    student, teacher, losses = logits(5, 2, 3, 7), logits(6, 2, 3, 7), logits(7, 2, 3)
    mask = torch.tensor([[True, False, True], [False, False, True]])
    kl = definition(student.flatten(0, 1), teacher.flatten(0, 1), 3.0).view(2, 3)
    each = losses + 0.25 * 9 * kl
    options: Any = {"alpha": 0.25, "temperature": 3.0}
    torch.testing.assert_close(distillation_loss(losses, student, teacher, **options), each.mean())
    student[~mask], losses[0, 1] = torch.nan, torch.nan  # what is masked may be anything
    got = distillation_loss(losses, student, teacher, **options, mask=mask)
    torch.testing.assert_close(got, each[mask].mean())
    assert distillation_loss(losses, student, teacher, **options, mask=mask & False).item() == 0


@pytest.mark.parametrize("ranks", [1, 2])
def test_masked_tokens_have_no_gradient(ranks: int) -> None:
    """Whatever they are, with a vocabulary that is whole or in slices; the others have theirs."""
    student, teacher, losses = logits(5, 4, 6), logits(6, 4, 6), logits(7, 4)
    mask = torch.tensor([True, False, False, True])
    options: Any = {"alpha": 0.25, "temperature": 3.0}
    kept = student[mask].requires_grad_()
    distillation_loss(losses[mask], kept, teacher[mask], **options).backward()
    teacher[1], teacher[2, :5], student[2, 3] = torch.nan, -torch.inf, torch.inf

    def body(comm: Comm) -> Any:
        mine = student.tensor_split(ranks, -1)[comm.rank].clone().requires_grad_()
        theirs = teacher.tensor_split(ranks, -1)[comm.rank]
        distillation_loss(losses, mine, theirs, **options, mask=mask, tensor=comm).backward()
        return mine.grad

    grad = torch.cat(threads.run(ranks, body), -1)
    torch.testing.assert_close(grad[mask], kept.grad)
    assert not grad[~mask].any()


@pytest.mark.parametrize(
    ("losses", "mask", "message"),
    [
        ((2, 3), (3,), r"mask is \(3,\), expected \(2, 3\)"),
        ((), None, r"losses is \(\), expected \(2, 3\)"),
        ((2, 1), None, r"losses is \(2, 1\), expected \(2, 3\)"),
    ],
)
def test_shapes_that_do_not_fit(losses: tuple[int, ...], mask: Any, message: str) -> None:
    counted = None if mask is None else torch.ones(mask, dtype=torch.bool)
    with pytest.raises(ValueError, match=f"distillation_loss: {message}"):
        distillation_loss(torch.zeros(losses), torch.zeros(2, 3, 7), torch.zeros(2, 3, 7), alpha=1.0, mask=counted)


def test_schedules() -> None:
    assert [Schedule("none").at(step) for step in (0, 9)] == [0, 0]
    assert [Schedule("full", 2.0).at(step) for step in (0, 10**9)] == [2, 2]
    assert [Schedule("staged", 0.5, 3).at(step) for step in range(5)] == [0.5, 0.5, 0.5, 0, 0]
    assert [Schedule("linear", 1.0, 4).at(step) for step in range(6)] == [1, 0.75, 0.5, 0.25, 0, 0]
    for kind, stop in (("staged", None), ("linear", None), ("full", 3), ("none", 3), ("staged", 0)):
        with pytest.raises(ValueError, match="Schedule: stop is"):
            Schedule(kind, 1.0, stop)  # type: ignore[arg-type]
    for alpha in (-1, np.nan, np.inf):
        with pytest.raises(ValueError, match=f"alpha is {alpha}, expected >= 0 and finite"):
            Schedule("full", alpha)
    with pytest.raises(ValueError, match="kind is 'lineer', expected one of none, full, staged, linear"):
        Schedule("lineer")  # type: ignore[arg-type]
    for temperature in (0.0, np.nan, np.inf):
        with pytest.raises(ValueError, match=f"divergence: temperature is {temperature}, expected > 0 and finite"):
            divergence(logits(0, 2, 3), logits(1, 2, 3), temperature)


def test_students_of_the_paper() -> None:
    for size, experts in (("350m", "32-64"), ("1.3b", "64-128")):
        assert student_config(CONFIGS[f"{size}-pr-moe-{experts}"], 21) == CONFIGS[f"{size}-pr-moe-mos-21"]
    assert kept_layers(24, 24) == tuple(range(24))
    assert kept_layers(8, 6) == (0, 1, 4, 5, 6, 7)
    for num in range(2, 25):
        kept = kept_layers(24, num)
        assert len(set(kept)) == len(kept) == num
        assert all(layer % 2 == i % 2 for i, layer in enumerate(kept))
    for wrong in (1, 25):
        with pytest.raises(ValueError, match=f"num_layers is {wrong}, expected 2 .. 24"):
            kept_layers(24, wrong)


def test_start_from_the_teacher() -> None:
    config = replace(TINY, num_layers=6, experts=(4, 4, 8))
    teacher = TransformerLM(config, seed=1)
    student = TransformerLM(student_config(config, 6))
    start_from(student, teacher)
    tokens = torch.arange(12).view(2, 6)
    assert torch.equal(student(tokens).logits, teacher(tokens).logits)
    shorter = TransformerLM(student_config(config, 4))
    assert shorter.config.experts == (4, 8)
    start_from(shorter, teacher)
    ours, theirs = shorter.state_dict(), teacher.state_dict()
    for name, value in ours.items():
        source = name
        for layer, kept in enumerate(kept_layers(6, 4)):
            if name.startswith(f"blocks.{layer}."):
                source = name.replace(f"blocks.{layer}.", f"blocks.{kept}.", 1)
        assert torch.equal(value, theirs[source]), name
    with pytest.raises(
        ValueError, match=r"start_from: embedding is \(256, 64\), but the teacher's embedding is \(256, 16\)"
    ):
        start_from(TransformerLM(CONFIGS["small"]), TransformerLM(TINY))


class Counted(ModelTeacher):
    calls = 0

    def __call__(self, tokens: Any) -> Any:
        self.calls += 1
        return super().__call__(tokens)


def text(config: Any = TINY) -> Text:
    return Text(torch.arange(4000).remainder(251).to(torch.uint8), config.context)


def test_the_teacher_is_not_asked_after_the_stop() -> None:
    teacher = Counted(TransformerLM(TINY, seed=9))
    plan = TrainingPlan(batch=4, micro_batch=2)
    made: dict[str, list[float]] = {}
    for kind, stop in (("none", None), ("staged", 3), ("full", None)):
        trainer = Distiller(TransformerLM(TINY), text(), plan, teacher, Schedule(kind, 1.0, stop))  # type: ignore[arg-type]
        teacher.calls = 0
        made[kind] = [trainer.step(step) for step in range(6)]
        assert teacher.calls == 2 * {"none": 0, "staged": 3, "full": 6}[kind]
    alone = Trainer(TransformerLM(TINY), text(), plan)
    assert made["none"] == [alone.step(step) for step in range(6)]
    assert made["staged"][:4] == made["full"][:4]  # the fifth is the first after a step alone
    assert made["staged"][4] != made["full"][4]
    assert not any(p.requires_grad or p.grad is not None for p in teacher.model.parameters())


def test_one_step_descends_the_definition() -> None:
    """The gradients of a Distiller's objective are those of the loss written out with torch's own functions."""
    teacher = TransformerLM(TINY, seed=9)
    trainer = Distiller(TransformerLM(TINY), text(), TrainingPlan(), ModelTeacher(teacher), Schedule("full", 0.7), 2.0)
    tokens = text().batch(0, 2)
    losses, output = trainer._losses(tokens)
    got = torch.autograd.grad(trainer.objective(0, tokens, losses, output), list(trainer.model.parameters()))
    output = trainer.model(tokens[:, :-1])
    p = (teacher(tokens[:, :-1]).logits / 2).log_softmax(-1)
    kl = (
        torch.nn.functional.kl_div((output.logits / 2).log_softmax(-1), p, reduction="sum", log_target=True)
        / tokens[:, 1:].numel()
    )
    ce = torch.nn.functional.cross_entropy(output.logits.flatten(0, 1), tokens[:, 1:].flatten())
    wanted = torch.autograd.grad(ce + 0.7 * 4 * kl + output.loss, list(trainer.model.parameters()))
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_losses_of_a_split_student_are_those_of_one_rank() -> None:
    """Teacher and student both over expert 2 x tensor 2 of four ranks."""
    config = student_config(TINY, 3)

    def losses(comm: Comm | None) -> list[float]:
        def model(of: Any, seed: int) -> Any:
            groups = None if comm is None else layer_groups(comm, of.experts, expert=2, tensor=2)
            return TransformerLM(of, groups=groups, seed=seed)

        teacher = ModelTeacher(model(TINY, 9))
        trainer = Distiller(model(config, 0), text(), TrainingPlan(4, 2), teacher, Schedule("staged", 1.0, 4))
        return [mean_of_ranks(comm, trainer.step(step))[0] for step in range(6)]

    wanted = losses(None)

    def body(comm: Comm) -> None:
        assert losses(comm) == pytest.approx(wanted, rel=1e-5)

    gloo_run(4, body)


def test_cached_answers(tmp_path: Path) -> None:
    teacher = Counted(TransformerLM(TINY, seed=9))
    tokens = text().batch(0, 3)[:, :-1]
    wanted = teacher(tokens)
    for top in (TINY.vocabulary, 5):
        teacher.calls = 0
        for _ in range(2):
            got = CachedTeacher(teacher, tmp_path, top)(tokens)
        assert teacher.calls == 1
        if top == TINY.vocabulary:
            assert torch.equal(got, wanted)
        places = wanted.topk(top).indices
        torch.testing.assert_close(got.softmax(-1).gather(-1, places), wanted.softmax(-1).gather(-1, places))
        torch.testing.assert_close(got.logsumexp(-1), wanted.logsumexp(-1))
    other = CachedTeacher(teacher, tmp_path, 5)(tokens.reshape(-1, 1))  # the same bytes, another batch
    assert other.shape == (tokens.numel(), 1, TINY.vocabulary)
    with pytest.raises(ValueError, match=r"top is 257, expected 1 \.\. 256"):
        CachedTeacher(teacher, tmp_path, 257)


def test_cached_answers_that_are_damaged(tmp_path: Path) -> None:
    """On one of two ranks: all ask the teacher again, and what was damaged is right again."""
    tokens = text().batch(0, 3)[:, :-1]
    model = TransformerLM(TINY, seed=9)
    wanted = ModelTeacher(model)(tokens)

    def body(comm: Comm) -> None:
        teacher = Counted(model)
        folder = tmp_path / str(comm.rank)
        cached = CachedTeacher(teacher, folder, TINY.vocabulary, comm)
        cached(tokens)
        (file,) = folder.iterdir()
        content = file.read_bytes()
        half = len(content) // 2
        damaged = (content[:half] + b"\xff" + content[half + 1 :], content[:half], b"", None)
        for number, other in enumerate(damaged, 2):
            if comm.rank == 1:
                file.unlink()
                os.mkfifo(file) if other is None else file.write_bytes(other)
            assert torch.equal(cached(tokens), wanted)
            assert teacher.calls == number
        assert torch.equal(cached(tokens), wanted)
        assert teacher.calls == number

    with pytest.warns(UserWarning, match="is damaged, the teacher is asked again"):
        threads.run(2, body)


def test_two_runs_in_one_folder(taught: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run of moecomm.train and one of moecomm.distill."""
    with alone(tmp_path, resume=False):
        assert main(options(taught, tmp_path)) == 2
    assert f"another run is using {tmp_path}: process {os.getpid()} on host" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"run.lock"}


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a book and a trained teacher."""
    folder = tmp_path_factory.mktemp("taught")
    (folder / "book.txt").write_text("Üben macht den Meister. " * 200)
    options = ["--text", str(folder / "book.txt"), "--config", "tiny", "--batch", "8", "--steps", "10"]
    assert train([*options, "--out", str(folder / "teacher")]) == 0
    return folder


def options(taught: Path, out: Path) -> list[str]:
    text = ["--text", str(taught / "book.txt"), "--batch", "8", "--steps", "10"]
    return [*text, "--teacher", str(taught / "teacher"), "--out", str(out)]


def records(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("interrupted", [3, 5, 7])
def test_resumed_across_the_stop(
    interrupted: int, taught: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit as if it had not been interrupted before the stop at 5, at it, or after it."""
    staged = ["--schedule", "staged", "--stop", "5", "--layers", "3"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main([*options(taught, whole), *staged]) == 0

    with monkeypatch.context() as patched:
        whole_step = Trainer.step

        def step(self: Trainer, number: int) -> float:
            if number == interrupted - 1:
                signal.raise_signal(signal.SIGTERM)
            return whole_step(self, number)

        patched.setattr(Trainer, "step", step)
        assert main([*options(taught, parts), *staged]) == 130
    assert records(parts)[-1]["step"] == interrupted
    assert main([*options(taught, parts), *staged, "--resume"]) == 0
    losses = [[(r["step"], r["loss"]) for r in records(out) if "loss" in r] for out in (whole, parts)]
    assert losses[0] == losses[1] and len(losses[0]) == 10
    saved = [load_file(out / "step-000010" / "rank-00000.safetensors") for out in (whole, parts)]
    assert [*saved[0]] == [*saved[1]]
    assert all(torch.equal(value, saved[1][name]) for name, value in saved[0].items())


def test_resumed_with_other_settings(taught: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    staged = ["--schedule", "staged", "--stop", "5"]
    assert main([*options(taught, tmp_path), *staged]) == 0
    before = records(tmp_path)
    for other, message in (
        ([], "distillation kind is 'full', expected 'staged', distillation stop is None, expected 5, as the run"),
        ([*staged, "--temperature", "2", "--steps", "11"], "resume: distillation temperature is 2.0, expected 1.0"),
        ([*staged, "--alpha", "0.5"], "resume: distillation alpha is 0.5, expected 1.0"),
    ):
        assert main([*options(taught, tmp_path), *other, "--resume"]) == 2
        assert message in capsys.readouterr().err
        assert records(tmp_path) == before
    alone = ["--text", str(taught / "book.txt"), "--config", "tiny", "--batch", "8", "--out", str(taught / "teacher")]
    assert train([*alone, "--learning-rate", "1", "--resume"]) == 2
    assert "resume: plan learning_rate is 1.0, expected 0.003" in capsys.readouterr().err


def test_a_run(taught: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main([*options(taught, out), "--start", "teacher", "--layers", "2", "--cache", str(tmp_path / "cache")]) == 0
    found = records(out)
    assert found[0]["config"]["num_layers"] == 2
    assert found[0]["distillation"] == {"kind": "full", "alpha": 1.0, "stop": None, "temperature": 1.0}
    assert [r["step"] for r in found if "loss" in r] == list(range(1, 11))
    written = {"lock", "run.lock", "log.jsonl", "loss.png", "routing.png", "step-000010"}
    assert {path.name for path in out.iterdir()} == written
    assert len(list((tmp_path / "cache").glob("*/*.npz"))) == 20  # a file for each micro-batch
    student = ["--teacher", str(out), "--layers", "2", "--schedule", "linear", "--stop", "10", "--cache-top", "9"]
    student += ["--cache", str(tmp_path / "cache")]
    assert main([*options(taught, tmp_path / "of student"), *student]) == 0  # a student may teach
    assert len(list((tmp_path / "cache").iterdir())) == 2  # answers of the one are not taken for the other's


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--schedule", "staged", "--stop", "11"], "stop is step 11, expected <= 10, the steps of the run"),
        (["--schedule", "staged"], "stop is None, expected a step with 'staged'"),
        (["--stop", "5"], "stop is 5, expected none with 'full'"),
        (["--config", "350m-pr-moe-mos-21"], "teacher: its vocabulary is 256, expected 51200, the student's"),
        (["--config", "small"], "teacher: it reads 32 tokens, expected >= 128, as the student"),
        (["--layers", "9"], "num_layers is 9, expected 2 .. 4, those of the teacher"),
        (["--teacher", "nothing"], "teacher: nothing/log.jsonl: No such file or directory: no run of moecomm.train"),
        (["--teacher", "."], "teacher: log.jsonl does not begin with the config of a model"),
        (["--teacher", "unsaved"], "teacher: unsaved has no checkpoint"),
        (["--cache", "cache", "--cache-top", "999"], "top is 999, expected 1 .. 256, the vocabulary"),
        (["--cache-top", "5"], "cache-top is 5, expected none without a cache"),
        (["--config", "tiny", "--layers", "3"], "layers is 3, expected none with config 'tiny'"),
        (["--temperature", "0"], "temperature is 0.0, expected > 0"),
        (["--temperature", "inf"], "temperature is inf, expected > 0 and finite"),
        (["--alpha", "nan"], "alpha is nan, expected >= 0 and finite"),
        (["--resume"], "out has no checkpoint"),
    ],
)
def test_bad_input(
    wrong: list[str],
    message: str,
    taught: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("log.jsonl").touch()
    Path("unsaved").mkdir()
    Path("unsaved", "log.jsonl").write_text((taught / "teacher" / "log.jsonl").read_text())
    assert main([*options(taught, Path("out")), *wrong]) == 2
    assert message in capsys.readouterr().err
    assert not Path("out").exists()


def test_a_teacher_of_the_claims_is_there_when_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    import claims

    sizes = {"hidden": 16, "context": 32, "steps": 1, "batch": 2, "learning_rate": 1e-3, "workers": 2, "text": []}
    run = claims.Run(claims.TEACHER, 0, "cpu", np.inf, tmp_path, Namespace(**sizes))
    save, seen = torch.save, []

    def watched(value: Any, path: Path) -> None:
        save(value, path)
        seen.append(claims.weights_of(run).exists())

    monkeypatch.setattr(torch, "save", watched)
    assert claims.train(run)
    assert seen == [False]
    assert torch.load(claims.weights_of(run))


@pytest.mark.slow
def test_the_claims_run_and_staged_distillation_stops_where_told(tmp_path: Path) -> None:
    """Every row of the benchmark in small; called again, it makes what is missing alone."""
    out = tmp_path / "claims.jsonl"
    command = [sys.executable, str(ROOT / "bench" / "claims.py"), "--hidden", "16", "--context", "32"]
    command += ["--steps", "10", "--batch", "2"]
    first = ["--rows", "student", "student, staged", "dense"]
    for more in (first, []):
        job = subprocess.run([*command, "--seeds", "1", "--out", str(out), *more], capture_output=True, text=True)
        assert job.returncode == 0, job.stderr
        assert "0 runs left" in job.stdout
    found = {record["row"]: record for record in map(json.loads, out.read_text().splitlines())}
    assert len(found) == len(out.read_text().splitlines()) == 11
    calls = {row: record["teacher_calls"] for row, record in found.items() if record["teacher_calls"]}
    assert calls == {"student, staged": 7, "student, full": 10, "student, linear": 10}
    assert found["student, staged"]["schedule"]["stop"] == 7
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    for record in lines:
        if record["row"] in ("top-2", "dense"):
            del record["config"]["normalize"]  # as in older records: "none", which top-2 was and dense is
    out.write_text("".join(json.dumps(record) + "\n" for record in lines))
    job = subprocess.run([*command, "--seeds", "1", "--out", str(out)], capture_output=True, text=True)
    assert job.stdout.splitlines()[-1] == "0 runs left" and job.stdout.count("seed 0") == 1, job.stderr
    replaced = [json.loads(line) for line in out.read_text().splitlines()]
    assert replaced[:-1] == [record for record in lines if record["row"] != "top-2"]
    assert (replaced[-1]["row"], replaced[-1]["config"]["normalize"]) == ("top-2", "selected")
    stopped = subprocess.run([*command, "--seeds", "3", "--seconds", "0", "--out", str(out)], capture_output=True)
    assert stopped.returncode == 3
    assert len(out.read_text().splitlines()) == 11
