"""The teacher: an object that gives logits for tokens. A trained model, or one whose answers are kept on disk."""

from __future__ import annotations

import hashlib
import warnings
from pathlib import Path
from typing import Protocol
from uuid import uuid4

import numpy as np
import torch
from torch import Tensor

from moecomm.comm import Comm
from moecomm.nn import TransformerLM
from moecomm.nn.files import regular
from moecomm.together import together


class Teacher(Protocol):
    """What a student asks.

    vocabulary  V, the student's too
    context     most tokens in a sequence
    """

    vocabulary: int
    context: int

    def __call__(self, tokens: Tensor) -> Tensor:
        """tokens [B, S] -> logits [B, S, V], without a gradient. Collective where the teacher is split over ranks."""


class ModelTeacher:
    """model, in evaluation mode and with weights that stay. Collective as the model is."""

    def __init__(self, model: TransformerLM) -> None:
        self.model = model.eval().requires_grad_(False)
        self.vocabulary = model.config.vocabulary
        self.context = model.config.context

    def __call__(self, tokens: Tensor) -> Tensor:
        """Collective as the model is."""
        with torch.no_grad():
            return self.model(tokens).logits


ANSWERS = ("values", "places", "rest")
"""What is kept of each token: the largest logits, which ones they are, and one for each of the others."""


class CachedTeacher:
    """teacher, asked once for each batch: its answers are kept as files, for other students and later runs.

    folder  a file for each batch that was asked for; of one teacher alone
    top     how many logits of each token are kept; all the others then count as equal, with the right sum of
            probabilities (at temperature 1)
    world   of a teacher that is split over ranks: they take an answer from the files if all of them have it

    A file that is damaged gives a warning, and the teacher is asked again. Collective as the teacher is, and over
    world. Raises ValueError for a top beyond the vocabulary, and OSError if an answer cannot be written.
    """

    def __init__(self, teacher: Teacher, folder: Path, top: int, world: Comm | None = None) -> None:
        self.vocabulary = teacher.vocabulary
        self.context = teacher.context
        if not 1 <= top <= self.vocabulary:
            raise ValueError(f"CachedTeacher: top is {top}, expected 1 .. {self.vocabulary}, the vocabulary")
        self.teacher = teacher
        self.folder = folder
        self.top = top
        self.world = world
        folder.mkdir(parents=True, exist_ok=True)

    def __call__(self, tokens: Tensor) -> Tensor:
        """Collective, see the class."""
        # The shape is in the digest: the same numbers in other rows are other sequences.
        shape = repr(tuple(tokens.shape)).encode()
        digest = hashlib.blake2b(tokens.cpu().numpy().tobytes(), digest_size=12, key=shape).hexdigest()
        path = self.folder / f"{digest}-{self.top}.npz"
        answers = _read(path)
        missing = np.array([float(answers is None)])
        if self.world is not None:
            missing = self.world.all_reduce(missing)
        # A teacher that is split needs all its ranks: they ask it where one rank lacks the file.
        if missing[0]:
            logits = self.teacher(tokens).float()
            answers = together(self.world, "CachedTeacher", lambda: self._write(path, logits))
        assert answers is not None
        values, places, rest = (torch.from_numpy(array).to(tokens.device) for array in answers)
        logits = rest[..., None].expand(*rest.shape, self.vocabulary)
        return logits.scatter(-1, places.long(), values)

    def _write(self, path: Path, logits: Tensor) -> list[np.ndarray]:
        """Keep the answers, and return what was kept."""
        values, places = logits.topk(self.top)
        # The logits that are dropped share their probability evenly.
        dropped = logits.scatter(-1, places, -torch.inf).logsumexp(-1)
        rest = dropped - np.log(max(1, self.vocabulary - self.top))
        answers = [array.cpu().numpy() for array in (values, places.int(), rest)]
        # A name of its own until it is complete: other ranks may write the same answers.
        unfinished = path.with_suffix(f".{uuid4().hex}")
        with unfinished.open("xb") as file:
            np.savez(file, **dict(zip(ANSWERS, answers, strict=True)))
        unfinished.rename(path)
        return answers


def _read(path: Path) -> list[np.ndarray] | None:
    """The answers kept in a file, None if there is none. A file that is damaged or none of ours is one no longer."""
    try:
        with open(path, "rb", opener=regular) as file, np.load(file) as arrays:
            return [arrays[key] for key in ANSWERS]
    except FileNotFoundError:
        return None
    except Exception as error:
        # zipfile raises many kinds of errors for a damaged file, its own and zlib's among them.
        warnings.warn(f"{path} is damaged, the teacher is asked again: {error}", stacklevel=3)
        return None
