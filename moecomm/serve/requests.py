"""Requests: what is asked of an engine, checked, and what came of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeAlias

from moecomm.nn import Config

Reason: TypeAlias = Literal["length", "stop", "cancelled", "failed"]
Prompt: TypeAlias = "Sequence[int] | bytes | str"
"""Token ids; bytes, which are ids of a model that reads bytes; a text, which stands for its UTF-8."""
SEED_BITS = 63


@dataclass(eq=False)
class Request:
    """A prompt and its continuation. Made by `Engine.add`; its options are described there.

    finished  None while there is more to come; "length": max_new or the engine's max_length is reached; "stop": it
              ends with one of `stop`; "cancelled"; "failed": a step of the engine raised, tokens has what came before
    """

    number: int
    """Counts an engine's requests from 0."""
    prompt: tuple[int, ...]
    max_new: int
    temperature: float
    seed: int
    sequence: int
    top_k: int
    top_p: float
    stop: tuple[tuple[int, ...], ...]
    tokens: list[int] = field(default_factory=list)
    log_probabilities: list[float] = field(default_factory=list)
    finished: Reason | None = None
    table: list[int] = field(default_factory=list, repr=False)
    """Its pages of the cache, while it has any."""

    @property
    def length(self) -> int:
        """Tokens so far, those of the prompt included."""
        return len(self.prompt) + len(self.tokens)

    def append(self, token: int, log_probability: float, max_length: int) -> Token:
        """Add a token, and see whether it is the last."""
        self.tokens.append(token)
        self.log_probabilities.append(log_probability)
        if any(tuple(self.tokens[-len(ending) :]) == ending for ending in self.stop):
            self.finished = "stop"
        elif len(self.tokens) == self.max_new or self.length == max_length:
            self.finished = "length"
        return Token(self, token, log_probability, self.finished)


class Token(NamedTuple):
    """What a step gives for a request: one more token, its log-probability, and why it is the last one or None."""

    request: Request
    token: int
    log_probability: float
    finished: Reason | None


def checked_options(config: Config, max_length: int, prompts: Sequence[Prompt], **options: Any) -> list[dict[str, Any]]:
    """The fields of a Request for each prompt. Raises ValueError or TypeError that names the argument.

    options  of `Engine.generate`
    """
    shared = _checked_numbers(config, **options)
    endings = options["stop"]
    if isinstance(endings, str | bytes):
        raise TypeError(f"stop is {endings!r}, expected a sequence of endings")
    shared["stop"] = tuple(_ids(config, f"stop[{i}]", ending) for i, ending in enumerate(endings))
    if isinstance(prompts, str | bytes):
        raise TypeError(f"prompts is {prompts!r}, expected a sequence of prompts")
    requests = []
    for number, prompt in enumerate(prompts):
        ids = _ids(config, f"prompts[{number}]", prompt)
        # One position at least for what is new.
        if len(ids) >= max_length:
            raise ValueError(f"prompts[{number}] has {len(ids)} tokens, expected less than max_length {max_length}")
        requests.append({"prompt": ids, **shared})
    return requests


def _checked_numbers(
    config: Config,
    *,
    max_new: int,
    temperature: float,
    seed: int,
    top_k: int | None,
    top_p: float,
    stop: object,
) -> dict[str, Any]:
    cut = config.vocabulary if top_k is None else top_k
    bounds = {"max_new": (max_new, 1, None), "seed": (seed, 0, 2**SEED_BITS), "top_k": (cut, 1, None)}
    for name, (value, least, end) in bounds.items():
        if type(value) is not int:
            raise TypeError(f"{name} is {value!r}, expected a whole number")
        if value < least or (end is not None and value >= end):
            raise ValueError(f"{name} is {value}, expected {least} or more" + (f", below {end}" if end else ""))
    if not (math.isfinite(temperature) and temperature >= 0):
        raise ValueError(f"temperature is {temperature}, expected a number >= 0")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}, expected 0 < top_p <= 1")
    return {
        "max_new": max_new,
        "temperature": float(temperature),
        "seed": seed,
        "top_k": min(cut, config.vocabulary),
        "top_p": float(top_p),
    }


def _ids(config: Config, name: str, prompt: Prompt | int) -> tuple[int, ...]:
    """Token ids. Raises ValueError if there are none or the model has no such."""
    if isinstance(prompt, str | bytes):
        # Only of these models is it known what a token stands for.
        if config.vocabulary != 256:
            raise ValueError(
                f"{name} is text, which needs a model that reads bytes: this has {config.vocabulary} tokens"
            )
        prompt = prompt.encode() if isinstance(prompt, str) else prompt
    try:
        ids = (prompt,) if isinstance(prompt, int) else tuple(int(token) for token in prompt)
    except TypeError:
        raise TypeError(f"{name} is {prompt!r}, expected token ids, bytes or a text") from None
    if not ids:
        raise ValueError(f"{name} is empty")
    for token in ids:
        if not 0 <= token < config.vocabulary:
            raise ValueError(f"{name} has the token {token}, expected 0 .. {config.vocabulary - 1}")
    return ids
