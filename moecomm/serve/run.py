"""What the command does: stream a text, or time the steps of random weights."""

from __future__ import annotations

import codecs
import statistics
import sys
import time
from argparse import Namespace

import torch

from moecomm.comm import Comm
from moecomm.nn import config_named
from moecomm.serve.engine import Engine, found_checkpoint, saved_config
from moecomm.together import together
from moecomm.train.progress import Progress, progress_of
from moecomm.train.run import mean_of_ranks, stop_signals

LARGE = 2**28
"""Bytes from which a load shows how far it is."""


class TextStream:
    """Bytes to text as they come: an incomplete character is held back until its other bytes are there."""

    def __init__(self) -> None:
        # What is no UTF-8 at all becomes U+FFFD: a model may say any byte.
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token: int, last: bool) -> str:
        """The characters that are complete with this byte."""
        return self._decoder.decode(bytes([token]), last)


class LoadBar:
    """How far a load is, on rank 0 and for large ones alone."""

    def __init__(self, shown: bool) -> None:
        self.shown = shown
        self._bar: Progress | None = None
        self._done = 0

    def __call__(self, done: int, total: int) -> None:
        """So many bytes of all are read."""
        if self.shown and total >= LARGE:
            self._bar = self._bar or progress_of(total >> 20, "MiB")
            self._bar.update((done >> 20) - (self._done >> 20))
            self._done = done
            if done == total:
                self._bar.close()


def run(options: Namespace, comm: Comm | None, device: torch.device) -> bool:
    """Do what the options say; rank 0 prints. Returns whether a signal ended it. Collective."""
    return (measure if options.random else stream)(options, comm, device)


def stream(options: Namespace, comm: Comm | None, device: torch.device) -> bool:
    """Print the prompt and its continuation. As `run`."""
    path = together(comm, "checkpoint", lambda: found_checkpoint(options.checkpoint))
    config = together(comm, "checkpoint", lambda: saved_config(path))
    if config is None:
        raise ValueError(f"{path} does not say its config, as checkpoints of moecomm.train do")
    if config.vocabulary != 256:
        raise ValueError(f"{path} is of a model with {config.vocabulary} tokens, expected 256: one for each byte")
    prints = comm is None or comm.rank == 0
    engine = Engine(config, comm, max_sequences=1, device=device)
    engine.load(path, LoadBar(prints))
    # An argument that is no UTF-8 comes with surrogates.
    prompt = options.prompt.encode(errors="surrogateescape")
    tokens = engine.generate(
        [prompt],
        max_new=options.max_new,
        temperature=options.temperature,
        seed=options.seed,
        top_k=options.top_k,
        top_p=options.top_p,
        stop=[text.encode(errors="surrogateescape") for text in options.stop],
    )
    text = TextStream()

    def show(characters: str) -> None:
        if prints:
            print(characters, end="", flush=True)

    show(prompt.decode(errors="replace"))
    with stop_signals() as signals:
        for token in tokens:
            show(text.add(token.token, token.finished is not None))
            if _interrupted(comm, signals):
                break
    show("\n")
    return _ended(comm, signals, prints)


def measure(options: Namespace, comm: Comm | None, device: torch.device) -> bool:
    """Print how long a step of --sequences takes, all at --context positions in the last one. As `run`."""
    config = config_named(options.config)
    length = options.context - options.steps
    if length < 1:
        raise ValueError(f"context is {options.context}, expected more than the {options.steps} steps")
    if options.context >= config.context:
        limit = config.context - 1
        raise ValueError(f"context is {options.context}, expected {limit} or less: {options.config} has no more")
    prints = comm is None or comm.rank == 0
    engine = Engine(config, comm, max_sequences=options.sequences, max_length=options.context + 1, device=device)
    engine.draw(options.seed)
    generator = torch.Generator().manual_seed(options.seed)
    for ids in torch.randint(config.vocabulary, (options.sequences, length), generator=generator).tolist():
        engine.add(ids, max_new=options.steps + 1)
    times = []
    with stop_signals() as signals:
        # The first step reads the prompts.
        engine.step()
        for _ in range(options.steps):
            start = time.perf_counter()
            engine.step()
            times.append(time.perf_counter() - start)
            if _interrupted(comm, signals):
                break
    if prints and not signals:
        median = statistics.median(times)
        dtype = str(engine.like["dtype"]).removeprefix("torch.")
        print(
            f"{options.config}, random weights, {options.sequences} sequences, up to {options.context} positions, "
            f"{engine.ranks} rank(s), {device.type}, {dtype}\n"
            f"{1000 * median:.3f} ms a step, median of {len(times)}\n"
            f"{options.sequences / median:.1f} tokens a second\n"
            f"floor: not known for this machine, whose memory was not measured"
        )
    return _ended(comm, signals, prints)


def _interrupted(comm: Comm | None, signals: list[int]) -> bool:
    """Whether a signal has come to any rank. Collective."""
    (share,) = mean_of_ranks(comm, float(bool(signals)))
    if share > 0 and not signals:
        # Of another rank; all of them end alike.
        signals.append(0)
    return share > 0


def _ended(comm: Comm | None, signals: list[int], prints: bool) -> bool:
    """Say that a signal has ended it, if one has. Collective: a signal may come to one rank behind the last token."""
    interrupted = _interrupted(comm, signals)
    if interrupted and prints:
        print("interrupted", file=sys.stderr)
    return interrupted
