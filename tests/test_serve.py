"""moecomm.serve: the engine against TransformerLM, its random numbers, its queue, and what a lost rank does to it."""

from __future__ import annotations

import re
import shlex
import signal
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT

torch = pytest.importorskip("torch")

from moecomm import Comm, CommError  # noqa: E402
from moecomm.gating import Generator  # noqa: E402
from moecomm.gating.reference import random_words  # noqa: E402
from moecomm.nn import CONFIGS, Config, TransformerLM, checkpoint  # noqa: E402
from moecomm.serve import Engine, Request  # noqa: E402
from moecomm.serve.__main__ import main  # noqa: E402
from moecomm.serve.decode import logits_of  # noqa: E402
from moecomm.serve.run import TextStream  # noqa: E402
from moecomm.serve.sampling import Choices, philox, sample  # noqa: E402
from moecomm.train.__main__ import main as train  # noqa: E402
from moecomm.transports import threads  # noqa: E402

torch.set_num_threads(1)
# Larger weights than a new model has: its tokens would all be the same one.
MODEL = replace(CONFIGS["tiny"], std=0.4, context=160)
MODELS = {
    "residual": MODEL,
    "dense": replace(MODEL, experts=(), residual="none"),
    "top-1": replace(MODEL, residual="none"),
    "top-2": replace(MODEL, residual="none", top_k=2, normalize="selected"),
    "learned": replace(MODEL, residual="learned"),
    "student": replace(MODEL, num_layers=3, experts=(4,)),
    "swiglu": replace(MODEL, activation="swiglu", eval_capacity_factor=0.5),
    "odd vocabulary": replace(MODEL, vocabulary=257),
}
PROMPTS = [b"import ", b"a", b"for x in range(100):", b"\xff\x00", b"def f(self, other)"]


def tokens(config: Config, ranks: int, prompts: Sequence[Any] = PROMPTS, **options: Any) -> list[list[int]]:
    """What an engine on so many ranks says, the same on all of them."""
    asked = {"max_new": 24} | options
    sizes = {name: asked.pop(name) for name in ("max_sequences", "pages") if name in asked}

    def body(comm: Comm) -> list[list[int]]:
        engine = Engine(config, comm, **sizes).draw(1)
        said: dict[Request, list[int]] = {}
        for token in engine.generate(prompts, **asked):
            said.setdefault(token.request, []).append(token.token)
        for request, ids in said.items():
            assert request.tokens == ids and request.finished == "length"
            assert len(request.log_probabilities) == len(ids) and max(request.log_probabilities) <= 0
        assert engine.cache.num_free == engine.pages
        return [request.tokens for request in sorted(said, key=lambda request: request.number)]

    first, *others = threads.run(ranks, body)
    assert all(said == first for said in others)
    return first


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_the_whole_prefix(name: str, ranks: int) -> None:
    """Within 1e-5 of the largest logit, for 64 steps from 50 positions on: over the border of two pages."""
    config = replace(MODELS[name], eval_capacity_factor=None)
    ids = torch.randint(config.vocabulary, (2, 115), generator=torch.Generator().manual_seed(0))
    model = TransformerLM(config, seed=1).eval()
    with torch.no_grad():
        expected = model(ids).logits[:, 49:]
    error = 1e-5 * expected.abs().max().item()

    def body(comm: Comm) -> None:
        engine = Engine(MODELS[name], comm, max_sequences=2).draw(1)
        assert engine.model is not None
        # The pages of two sequences, not in order.
        tables = torch.tensor([[3, 1], [2, 5]])
        positions = torch.arange(115).expand(2, -1)
        ends = [20, *range(50, 116)]
        starts = [0, *ends[:-1]]
        with torch.no_grad():
            for start, end in zip(starts, ends, strict=True):
                part = slice(start, end)
                logits = logits_of(engine.model, engine.cache, ids[:, part], positions[:, part], tables)
                if end >= 50:
                    torch.testing.assert_close(logits, expected[:, end - 50], rtol=0, atol=error)

    threads.run(ranks, body)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("name", ["residual", "dense", "top-2"])
def test_greedy_tokens_are_those_of_generate(name: str, ranks: int) -> None:
    model = TransformerLM(MODELS[name], seed=1).eval()
    expected = [model.generate(torch.tensor([list(prompt)]), 64)[0, len(prompt) :].tolist() for prompt in PROMPTS]
    assert tokens(MODELS[name], ranks, max_new=64) == expected
    assert len({*expected[0]}) > 5


@pytest.mark.parametrize("options", [{}, {"temperature": 1.5, "top_k": 40, "top_p": 0.9, "seed": 7}])
def test_a_request_alone_and_in_a_batch(options: dict[str, Any]) -> None:
    """On one rank and two, with few places and few pages: those that wait lose nothing."""
    together = tokens(MODEL, 1, max_new=80, **options)
    assert tokens(MODEL, 2, max_new=80, **options) == together
    assert tokens(MODEL, 1, max_new=80, max_sequences=2, **options) == together
    assert tokens(MODEL, 1, max_new=80, pages=3, **options) == together
    engine = Engine(MODEL, max_sequences=1).draw(1)
    for number, prompt in enumerate(PROMPTS):
        request = engine.add(prompt, max_new=80, sequence=number, **options)
        while request.finished is None:
            engine.step()
        assert request.tokens == together[number]


def test_philox_is_the_reference() -> None:
    seed, offset = 0x123456789ABCDEF0, 0xFEDCBA9876543210
    expected = random_words(Generator(seed, offset), 5, 8).reshape(2, 4)
    counter = [[0, 1], [5, 5], [offset & 0xFFFFFFFF] * 2, [offset >> 32] * 2]
    key = torch.tensor(seed & 0xFFFFFFFF), torch.tensor(seed >> 32)
    words = philox(tuple(torch.tensor(word) for word in counter), key)
    assert np.array_equal(torch.stack(words, 1).numpy(), expected)


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "kept"),
    [(1.0, 6, 1.0, 6), (0.5, 6, 1.0, 6), (2.0, 3, 1.0, 3), (1.0, 6, 0.75, 4), (1.0, 4, 0.8, 3), (1.0, 6, 1e-9, 1)],
)
def test_frequencies(temperature: float, top_k: int, top_p: float, kept: int) -> None:
    """Chi-square of 20000 draws. Probabilities 0.3, 0.2 twice, 0.1 three times: ties go to the lower id."""
    chances = np.array([0.1, 0.2, 0.1, 0.3, 0.2, 0.1])
    order = [3, 1, 4, 0, 2, 5][:kept]
    expected = np.zeros(6)
    expected[order] = chances[order] ** (1 / temperature)
    expected /= expected.sum()
    num = 20000
    choices = Choices(
        seed=torch.full((num,), 11),
        sequence=torch.arange(num) % 100,
        position=torch.arange(num) // 100,
        temperature=torch.full((num,), temperature, dtype=torch.float64),
        top_k=torch.full((num,), top_k),
        top_p=torch.full((num,), top_p, dtype=torch.float64),
    )
    logits = torch.tensor(np.log(chances), dtype=torch.float32).expand(num, -1)
    ids, logarithms = sample(logits, choices, greedy=False)
    counts = np.bincount(ids.numpy(), minlength=6)
    assert not counts[expected == 0].any()
    drawn = expected > 0
    statistic = np.sum((counts[drawn] - num * expected[drawn]) ** 2 / (num * expected[drawn]))
    assert statistic < 25  # five degrees of freedom: passed by chance once in 7000
    np.testing.assert_allclose(logarithms, np.log(chances)[ids.numpy()], rtol=1e-4)


def test_the_likeliest_of_equal_tokens() -> None:
    """The lowest id, in a batch that draws and in one that does not."""
    logits = torch.tensor([[0.0, 2.0, 2.0, 1.0]])
    whole, real = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.float64)
    choices = Choices(whole, whole, whole, real, whole + 4, real + 1)
    assert [sample(logits, choices, greedy)[0].item() for greedy in (True, False)] == [1, 1]


def test_requests_come_and_go() -> None:
    engine = Engine(MODEL, max_sequences=2).draw(1)
    first, second, third = (engine.add(prompt, max_new=9) for prompt in PROMPTS[:3])
    assert [token.request for token in engine.step()] == [first, second]
    engine.cancel(first)
    assert (first.finished, len(first.tokens)) == ("cancelled", 1)
    assert [token.request for token in engine.step()] == [second, third]
    engine.cancel(first)
    ending = engine.generate([PROMPTS[0]], max_new=150)
    pair = [next(ending).token, next(ending).token]
    ending.close()
    while engine.running:
        engine.step()
    assert (second.finished, third.finished) == ("length", "length") and engine.step() == []
    stopped = list(engine.generate([PROMPTS[0]], max_new=150, stop=[pair]))
    assert [token.finished for token in stopped] == [None, "stop"]
    longest = engine.add(PROMPTS[0], max_new=1000)
    while engine.running or engine.waiting:
        engine.step()
    assert longest.finished == "length" and longest.length == MODEL.context


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": b""}, r"prompts\[0\] is empty"),
        ({"prompt": [1] * 160}, "has 160 tokens, expected less than max_length 160"),
        ({"prompt": [1, 256]}, "the token 256, expected 0 .. 255"),
        ({"prompt": [-1]}, "the token -1"),
        ({"prompt": None}, "expected token ids, bytes or a text"),
        ({"top_p": 0.0}, "top_p is 0.0, expected 0 < top_p <= 1"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"top_p": float("nan")}, "top_p is nan"),
        ({"top_k": 0}, "top_k is 0, expected 1 or more"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"max_new": 0}, "max_new is 0"),
        ({"max_new": 2.5}, "max_new is 2.5, expected a whole number"),
        ({"seed": -1}, "seed is -1"),
        ({"sequence": -1}, "sequence is -1"),
        ({"stop": "ab"}, "expected a sequence of endings"),
        ({"stop": [b""]}, r"stop\[0\] is empty"),
    ],
)
def test_bad_requests(options: dict[str, Any], message: str) -> None:
    """On all ranks, and the engine goes on."""

    def body(comm: Comm) -> list[int]:
        engine = Engine(MODEL, comm).draw(1)
        with pytest.raises((ValueError, TypeError), match="Engine.add: .*" + message):
            engine.add(**{"prompt": b"a", **options})
        # One rank alone: the others hear of it.
        with pytest.raises((ValueError, TypeError), match=message):
            engine.add(**{"prompt": b"a", **(options if comm.rank == 0 else {})})
        return [token.token for token in engine.generate([b"a"], max_new=3)]

    assert len({tuple(said) for said in threads.run(2, body)}) == 1


def test_bad_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    for options, message in {
        ("max_sequences", 0): "max_sequences is 0",
        ("max_length", 161): "expected 2 .. 160",
        ("pages", 2): "pages is 2, expected 3 or more",
    }.items():
        with pytest.raises(ValueError, match=message):
            Engine(MODEL, **dict([options]))
    with pytest.raises(ValueError, match="no weights: load or draw"):
        Engine(MODEL).add(b"a")
    monkeypatch.setattr("moecomm.serve.engine.available", lambda device: 2**30)
    with pytest.raises(ValueError, match=r"weights 195\.\d\d, cache .* and 1.00 GiB are free"):
        Engine(CONFIGS["1.3b-moe-128"])


def test_ranks_that_differ() -> None:
    def body(comm: Comm) -> None:
        engine = Engine(MODEL, comm).draw(1)
        with pytest.raises(ValueError, match="ranks differ"):
            engine.add(b"a" if comm.rank else b"b")
        with pytest.raises(ValueError, match="ranks differ"):
            engine.add(b"a", sequence=comm.rank)
        with pytest.raises(ValueError, match="ranks differ"):
            engine.add(b"a") if comm.rank else engine.step()
        engine.add(b"a", max_new=5)
        engine.step()
        if comm.rank:
            engine._digest.update(b"another token")
        with pytest.raises(ValueError, match=r"ranks differ.*Engine\.step"):
            engine.step()

    threads.run(2, body)


def test_a_lost_rank() -> None:
    """The others raise CommError, and what was said stays with the requests, which have failed."""

    def body(comm: Comm) -> None:
        engine = Engine(MODEL, comm, max_sequences=1).draw(1)
        requests = [engine.add(b"a", max_new=9), engine.add(b"b", max_new=9)]
        engine.step()
        if comm.rank == 1:
            return
        with pytest.raises(CommError):
            engine.step()
        assert [(request.finished, len(request.tokens)) for request in requests] == [("failed", 1), ("failed", 0)]
        with pytest.raises(CommError):
            engine.add(b"c")

    threads.run(2, body, limit=1.0)


def test_a_step_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(MODEL).draw(1)
    request = engine.add(b"a")
    engine.step()

    def full(*_: Any) -> None:
        raise MemoryError("full")

    monkeypatch.setattr(engine.batch, "step", full)
    with pytest.raises(MemoryError):
        engine.step()
    assert (request.finished, len(request.tokens)) == ("failed", 1)
    with pytest.raises(ValueError, match="the engine has failed: MemoryError: full"):
        engine.step()


def test_text_waits_for_whole_characters() -> None:
    stream = TextStream()
    assert [stream.add(byte, False) for byte in "aü€".encode()] == ["a", "", "ü", "", "", "€"]
    assert [stream.add(0xC3, False), stream.add(0x28, True)] == ["", "\ufffd("]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("serve")
    options = ["--config", "tiny", "--batch", "8", "--steps", "20", "--out", str(folder / "run")]
    assert train(options) == 0
    return folder


def test_the_command_of_the_readme(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(trained)
    (line,) = re.findall(r"^python -m moecomm\.serve (--checkpoint.*?) +#", (ROOT / "README.md").read_text(), re.M)
    assert main([*shlex.split(line), "--max-new", "12"]) == 0
    model = TransformerLM(CONFIGS["tiny"]).eval()
    path = checkpoint.last(trained / "run")
    checkpoint.load(path, model)
    prompt = b"import "
    ids = model.generate(torch.tensor([list(prompt)]), 12)[0].tolist()
    assert capsys.readouterr().out == bytes(ids).decode(errors="replace") + "\n"


def test_checkpoints_and_ranks(trained: Path) -> None:
    def body(comm: Comm) -> list[int]:
        read: list[tuple[int, int]] = []
        engine = Engine(CONFIGS["tiny"], comm).load(trained / "run", lambda *done: read.append(done))
        assert read[-1][0] == read[-1][1] > 0
        with pytest.raises(ValueError, match="heads 2, expected 4"):
            Engine(replace(CONFIGS["tiny"], heads=4), comm).load(trained / "run")
        with pytest.raises((ValueError, OSError), match="no checkpoint"):
            engine.load(trained)
        with pytest.raises((ValueError, OSError), match="no checkpoint"):
            engine.load(trained / "nothing")
        return [token.token for token in engine.generate([b"import "], max_new=20)]

    assert threads.run(2, body) == 2 * threads.run(1, body)


def test_bad_commands(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(trained / "run")
    for arguments, message in {
        (): "give --checkpoint and --prompt, or --random",
        ("--checkpoint", run, "--prompt", ""): "is empty",
        ("--checkpoint", run, "--prompt", "a", "--top-p", "2"): "top_p is 2.0",
        ("--checkpoint", "nothing", "--prompt", "a"): "there is no checkpoint nothing",
        ("--random", "--config", "unknown"): "config is 'unknown'",
        ("--random", "--config", "tiny", "--context", "99"): "context is 99, expected 31 or less",
    }.items():
        assert main(arguments) == 2
        said = capsys.readouterr()
        assert said.err.startswith("error: ") and said.err.count("\n") == 1 and message in said.err


def test_steps_of_random_weights(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = "--random --config tiny --sequences 3 --context 30 --steps 4"
    assert main(arguments.split()) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "tiny, random weights, 3 sequences, up to 30 positions, 1 rank(s), cpu, float32"
    assert re.fullmatch(r"[\d.]+ ms a step, median of 4", lines[1])
    assert re.fullmatch(r"[\d.]+ tokens a second", lines[2])
    assert lines[3].startswith("floor: not known")


def test_interrupted(trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    step, before = Engine.step, signal.getsignal(signal.SIGINT)

    def interrupted(self: Engine) -> Any:
        signal.raise_signal(signal.SIGINT)
        return step(self)

    monkeypatch.setattr(Engine, "step", interrupted)
    assert main(["--checkpoint", str(trained / "run"), "--prompt", "a"]) == 130
    assert capsys.readouterr().err == "interrupted\n"
    assert signal.getsignal(signal.SIGINT) is before
