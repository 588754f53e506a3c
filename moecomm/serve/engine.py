"""Engine: many sequences continued at once by a model that the ranks of a Comm share."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from moecomm.comm import Comm, CommLike
from moecomm.errors import CommError
from moecomm.failures import collective, refused
from moecomm.nn import Config, TransformerLM, checkpoint, layer_groups, memory_estimate
from moecomm.serve.cache import PagedCache, cache_bytes, pages_for
from moecomm.serve.decode import Batch, bucket, logits_of
from moecomm.serve.memory import available
from moecomm.serve.requests import Prompt, Request, Token, checked_options
from moecomm.serve.sampling import Choices, sample
from moecomm.together import together
from moecomm.topology import Topology
from moecomm.transports import as_comm

T = TypeVar("T")
CHUNK = 2048
"""Positions of a prompt that go through the model at once."""


class Engine:
    """Continues prompts. All ranks of comm share one model: heads, inner widths, experts' widths and the vocabulary.

    config         of the model. Its capacities do not count: nothing is dropped
    comm           the ranks; None: this one alone. Replicas are engines over Comms that were split
    max_sequences  under way at once; more requests wait in their order
    max_length     tokens of a sequence, its prompt included; None: config.context
    pages          of 64 positions each, for all sequences; None: as many as max_sequences of max_length need. With
                   fewer, the youngest sequence waits when there is none left, and loses nothing
    like           device, dtype

    Every rank makes the same calls with the same arguments: they are compared, and so are the tokens of all ranks, at
    each call. Raises ValueError on all ranks for sizes that do not fit, calls that differ, and if the device has less
    memory than weights and cache need. A rank that is lost is a CommError on the others within the Comm's limit; all
    requests that were not finished are then "failed", with the tokens that they had.
    """

    def __init__(
        self,
        config: Config,
        comm: CommLike | None = None,
        *,
        max_sequences: int = 64,
        max_length: int | None = None,
        pages: int | None = None,
        **like: Any,
    ) -> None:
        self.comm: Comm | None = None if comm is None else as_comm(comm)
        self.config = replace(config, capacity_factor=None, eval_capacity_factor=None)
        self.max_length = config.context if max_length is None else max_length
        self.max_sequences = max_sequences
        self.like = {"device": torch.device("cpu"), "dtype": torch.get_default_dtype(), **like}
        per_sequence = pages_for(self.max_length)
        self.pages = max_sequences * per_sequence if pages is None else pages
        self._call("Engine", lambda: self._check_sizes(per_sequence), self._sizes)
        self.ranks = 1 if self.comm is None else self.comm.size
        sliced = Topology(self.ranks, tensor=self.ranks, expert_tensor=self.ranks)
        self.weight_bytes = memory_estimate(
            self.config, sliced, sequences=1, length=1, dtype=self.like["dtype"]
        ).weights
        self.cache_bytes = cache_bytes(config, self.pages, self.ranks, self.like["dtype"])
        self._check_memory("Engine", self.weight_bytes + self.cache_bytes)
        self.model: TransformerLM | None = None
        self.failure: str | None = None
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self._count = 0
        self._digest = hashlib.blake2b(digest_size=8)

    def _check_sizes(self, per_sequence: int) -> None:
        if self.max_sequences < 1:
            raise ValueError(f"max_sequences is {self.max_sequences}, expected 1 or more")
        if not 2 <= self.max_length <= self.config.context:
            raise ValueError(
                f"max_length is {self.max_length}, expected 2 .. {self.config.context}, the model's context"
            )
        if self.pages < per_sequence:
            raise ValueError(f"pages is {self.pages}, expected {per_sequence} or more: a sequence may need them")

    def _sizes(self, _: None) -> str:
        return f"{self.config}, {self.max_sequences}, {self.max_length}, {self.pages}, {self.like['dtype']}"

    # ---- weights ---------------------------------------------------------------------------------------------------

    def draw(self, seed: int = 0) -> Engine:
        """Random weights, those of TransformerLM(config, seed=seed). Collective. Returns the engine."""
        self._call("Engine.draw", lambda: seed, str)
        self._make(seed)
        return self

    def load(self, path: str | Path, progress: Callable[[int, int], object] | None = None) -> Engine:
        """The weights of a checkpoint, whatever the split it was saved under. Collective. Returns the engine.

        path      of a checkpoint, or of a folder of such, whose last one is taken
        progress  progress(done, total): bytes of this rank that are read

        Raises ValueError or OSError on all ranks if there is none, it is damaged or of another config.
        """
        folder = Path(path)
        found = together(self.comm, "Engine.load", lambda: checked_checkpoint(folder, self.config))
        # The numbers are read into memory of the host before any weight is changed.
        self._check_memory("Engine.load", 2 * self.weight_bytes + self.cache_bytes)
        model = self._make(0)
        try:
            checkpoint.load(found, model, comm=self.comm, progress=progress)
        except BaseException:
            self.model = None
            raise
        return self

    def _make(self, seed: int) -> TransformerLM:
        if self.running or self.waiting:
            raise ValueError(
                f"Engine: {len(self.running) + len(self.waiting)} requests are under way with other weights"
            )
        groups = None
        if self.comm is not None and self.ranks > 1:
            experts = self.config.experts or (0,)
            groups = layer_groups(self.comm, experts, tensor=self.ranks, expert_tensor=self.ranks)
        model = TransformerLM(self.config, groups=groups, seed=seed, **self.like).eval()
        self.model = model.requires_grad_(False)
        device = self.like["device"]
        self.cache = PagedCache(self.config, self.pages, self.ranks, **self.like)
        self.batch = Batch(self.max_sequences, self.max_length, device)
        return model

    def _check_memory(self, call: str, needed: int) -> None:
        """Collective. Raises ValueError if any rank has less."""

        def check() -> None:
            free = available(self.like["device"])
            if free is not None and needed > free:
                raise ValueError(
                    f"a rank needs {needed / 2**30:.2f} GiB (weights {self.weight_bytes / 2**30:.2f}, cache "
                    f"{self.cache_bytes / 2**30:.2f}), and {free / 2**30:.2f} GiB are free"
                )

        together(self.comm, call, check)

    # ---- requests --------------------------------------------------------------------------------------------------

    def add(
        self,
        prompt: Prompt,
        *,
        max_new: int = 128,
        temperature: float = 0.0,
        seed: int = 0,
        sequence: int = 0,
        top_k: int | None = None,
        top_p: float = 1.0,
        stop: Sequence[Any] = (),
    ) -> Request:
        """Ask for a continuation of at most max_new tokens; `step` makes it. Collective.

        prompt       token ids; a text or bytes if the model reads bytes
        temperature  0: the likeliest token, ties to the lower id. Otherwise one drawn from the softmax of logits /
                     temperature: exactly, by a random number of (seed, sequence, position) alone
        top_k        draw from the k likeliest alone; None: from all
        top_p        draw from the smallest set of likeliest tokens that has this much of what top_k leaves
        stop         endings, each a token id, ids or a text: the request ends with one, which stays in its tokens

        Raises ValueError or TypeError on all ranks for what cannot be; nothing is added then.
        """
        options = {"max_new": max_new, "temperature": temperature, "seed": seed, "top_k": top_k, "top_p": top_p}
        return self._add("Engine.add", [prompt], sequence, stop=stop, **options)[0]

    def generate(
        self,
        prompts: Iterable[Prompt],
        *,
        max_new: int = 128,
        temperature: float = 0.0,
        seed: int = 0,
        top_k: int | None = None,
        top_p: float = 1.0,
        stop: Sequence[Any] = (),
    ) -> Iterator[Token]:
        """Add all prompts, and iterate over their tokens as they come. Collective, and so is each turn.

        Options as for `add`; prompt i has sequence i. A loop that is left early cancels what is not finished: all ranks
        leave it at the same token.
        """
        options = {"max_new": max_new, "temperature": temperature, "seed": seed, "top_k": top_k, "top_p": top_p}
        # Here and not in the iterator: bad arguments raise in this call.
        return self._tokens_of(self._add("Engine.generate", list(prompts), 0, stop=stop, **options))

    def _tokens_of(self, requests: list[Request]) -> Iterator[Token]:
        try:
            while any(request.finished is None for request in requests):
                yield from [token for token in self.step() if token.request in requests]
        finally:
            for request in requests:
                self._end(request)

    def cancel(self, request: Request) -> None:
        """End a request that is not finished; its tokens stay. Collective."""
        self._call("Engine.cancel", lambda: request.number, str)
        self._end(request)

    def _add(self, call: str, prompts: list[Prompt], sequence: int, **options: Any) -> list[Request]:
        def check() -> list[dict[str, Any]]:
            if self.model is None:
                raise ValueError("the engine has no weights: load or draw them first")
            if type(sequence) is not int or sequence < 0:
                raise ValueError(f"sequence is {sequence!r}, expected a whole number >= 0")
            return checked_options(self.config, self.max_length, prompts, **options)

        requests = []
        for number, fields in enumerate(self._call(call, check, lambda checked: repr((sequence, checked)))):
            requests.append(Request(self._count, sequence=sequence + number, **fields))
            self._count += 1
        self.waiting.extend(requests)
        return requests

    def _end(self, request: Request) -> None:
        if request.finished is not None:
            return
        request.finished = "cancelled"
        self._leave(request)
        if request in self.waiting:
            self.waiting.remove(request)

    def _leave(self, request: Request) -> None:
        """Take a request out of the running ones, and its pages."""
        self.cache.release(request.table)
        if request in self.running:
            self.running.remove(request)

    # ---- steps -----------------------------------------------------------------------------------------------------

    def step(self) -> list[Token]:
        """One token more for each sequence under way, and the first ones of those that come in. Collective.

        [] if there is nothing to do. Sequences under way are continued in one batch; then come as many of those that
        wait, in their order, as there are places and pages for.
        """
        self._call("Engine.step", lambda: None, lambda _: self._digest.hexdigest())
        with self._failing():
            tokens = self._continue() + self._begin()
        for token in tokens:
            self._digest.update(f"{token.request.number} {token.token},".encode())
        return tokens

    @torch.no_grad()
    def _continue(self) -> list[Token]:
        for request in list(self.running):
            # The youngest waits, as often as it takes; the oldest alone has all pages that it may need.
            while request in self.running and not self.cache.grow(request.table, request.length):
                youngest = self.running[-1]
                self._leave(youngest)
                self.waiting.appendleft(youngest)
        if not self.running:
            return []
        requests = list(self.running)
        rows = bucket(len(requests))
        columns = bucket(max(len(request.table) for request in requests))
        self._fill(requests, rows)
        greedy = all(request.temperature == 0 for request in requests)
        assert self.model is not None
        results = self.batch.step(self.model, self.cache, rows, columns, greedy)
        return [self._told(request, *pair) for request, pair in zip(requests, results.T.tolist(), strict=False)]

    def _fill(self, requests: list[Request], rows: int) -> None:
        """Write the inputs of a step. Rows without a sequence are at position 0 of page 0, which nothing reads."""
        batch = self.batch
        lengths = [request.length - 1 for request in requests]
        latest = [request.tokens[-1] for request in requests]
        padding = [0] * (rows - len(requests))
        width = batch.tables.shape[1]
        tables = [request.table + [0] * (width - len(request.table)) for request in requests]
        tables += [[0] * width] * len(padding)
        batch.tokens[:rows] = torch.tensor(latest + padding)
        batch.lengths[:rows] = torch.tensor(lengths + padding)
        batch.tables[:rows] = torch.tensor(tables)
        for values, inputs in zip(batch.choices, _choices(requests, torch.device("cpu")), strict=True):
            values[: len(requests)] = inputs

    def _begin(self) -> list[Token]:
        tokens = []
        while self.waiting and len(self.running) < self.max_sequences:
            request = self.waiting[0]
            if not self.cache.grow(request.table, request.length):
                break
            self.waiting.popleft()
            self.running.append(request)
            tokens.append(self._prefill(request))
        return tokens

    @torch.no_grad()
    def _prefill(self, request: Request) -> Token:
        """Compute all of a sequence, in chunks, and its next token. Collective."""
        device = self.like["device"]
        ids = torch.tensor([[*request.prompt, *request.tokens]], device=device)
        positions = torch.arange(request.length, device=device)[None]
        table = torch.tensor([request.table], device=device)
        assert self.model is not None
        for start in range(0, request.length, CHUNK):
            end = min(start + CHUNK, request.length)
            pages = table[:, : pages_for(end)]
            logits = logits_of(self.model, self.cache, ids[:, start:end], positions[:, start:end], pages)
        token, logarithm = sample(logits, _choices([request], device), request.temperature == 0)
        return self._told(request, token.item(), logarithm.item())

    def _told(self, request: Request, token: float, log_probability: float) -> Token:
        result = request.append(int(token), log_probability, self.max_length)
        if result.finished is not None:
            self._leave(request)
        return result

    # ---- agreement -------------------------------------------------------------------------------------------------

    def _call(self, call: str, check: Callable[[], T], text: Callable[[T], str]) -> T:
        """check(), on all ranks or on none, and compare the text of its result. Collective."""
        if self.comm is not None:
            self.comm.check_usable(call)
        problem: Exception | None = None
        told = ""
        try:
            if getattr(self, "failure", None) is not None:
                raise ValueError(f"the engine has failed: {self.failure}")
            result = check()
            told = hashlib.blake2b(text(result).encode(), digest_size=8).hexdigest()
        except (TypeError, ValueError) as error:
            problem = type(error)(f"{call}: {error}")
        if self.comm is not None:
            with self._failing(), collective(call, self.comm):
                self.comm.compare_texts(f"!{problem}" if problem else f"{call} with {told}")
        if problem is not None:
            raise refused(problem)
        return result

    @contextmanager
    def _failing(self) -> Iterator[None]:
        """Around what leaves the engine unusable when it fails: all requests end then, with what they have."""
        try:
            yield
        except BaseException as error:
            if not getattr(error, "nothing_was_sent", False) or isinstance(error, CommError):
                self._fail(f"{type(error).__name__}: {error}")
            raise

    def _fail(self, why: str) -> None:
        self.failure = why
        for request in [*getattr(self, "running", ()), *getattr(self, "waiting", ())]:
            request.finished = "failed"
        self.running = []
        self.waiting = deque()
        if self.comm is not None:
            self.comm.fail(f"Engine: {why}")


def _choices(requests: list[Request], device: torch.device) -> Choices:
    """How each of some requests chooses its next token."""
    return Choices(
        torch.tensor([request.seed for request in requests], device=device),
        torch.tensor([request.sequence for request in requests], device=device),
        torch.tensor([request.length for request in requests], device=device),
        torch.tensor([request.temperature for request in requests], dtype=torch.float64, device=device),
        torch.tensor([request.top_k for request in requests], device=device),
        torch.tensor([request.top_p for request in requests], dtype=torch.float64, device=device),
    )


def checked_checkpoint(folder: Path, config: Config) -> Path:
    """The checkpoint in a folder, or the folder itself if it is one. Raises ValueError for one of another config.

    Weights of the same shapes may be those of another model: the heads and top_k are in no shape. A checkpoint that
    does not say its config, as one that `checkpoint.save` wrote without, is taken.
    """
    path = found_checkpoint(folder)
    saved = saved_config(path)
    if saved is not None:
        for name, value in asdict(config).items():
            if name in MODEL and getattr(saved, name) != value:
                raise ValueError(f"{path} is of a model with {name} {getattr(saved, name)!r}, expected {value!r}")
    return path


MODEL = (
    "num_layers",
    "hidden",
    "heads",
    "experts",
    "top_k",
    "residual",
    "vocabulary",
    "context",
    "activation",
    "normalize",
)
"""The fields of a Config that say what the model computes; the others are for training."""


def found_checkpoint(folder: Path) -> Path:
    """The folder if it is a checkpoint, otherwise the last one in it. Raises ValueError if there is none."""
    if folder.is_dir() and not (folder / "checkpoint.json").exists():
        path = checkpoint.last(folder)
        if path is None:
            raise ValueError(f"{folder} has no checkpoint")
        return path
    return folder


def saved_config(path: Path) -> Config | None:
    """The config in a checkpoint of `moecomm.train`, or None. Raises OSError or ValueError if it cannot be read."""
    settings = checkpoint.values(path).get("settings")
    if not isinstance(settings, dict) or not isinstance(settings.get("config"), dict):
        return None
    fields = dict(settings["config"])
    fields["experts"] = tuple(fields.get("experts", ()))
    try:
        return Config(**fields)
    except TypeError as error:
        raise ValueError(f"{path} has a config that this version does not know: {error}") from None
