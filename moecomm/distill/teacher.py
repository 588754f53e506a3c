"""The teacher: an object that gives logits for tokens. A trained model, or one whose answers are kept on disk."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Protocol
from uuid import uuid4

import numpy as np
import torch
from torch import Tensor

from moecomm.comm import Comm
from moecomm.nn import TransformerLM


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
        self.vocabulary, self.context = model.config.vocabulary, model.config.context

    def __call__(self, tokens: Tensor) -> Tensor:
        """Collective as the model is."""
        with torch.no_grad():
            return self.model(tokens).logits


class CachedTeacher:
    """teacher, asked once for each batch: its answers are kept as files, for other students and later runs.

    folder  a file for each batch that was asked for; of one teacher alone
    top     how many logits of each token are kept; all the others then count as equal, with the right sum of
            probabilities (at temperature 1)
    world   of a teacher that is split over ranks: they take an answer from the files if all of them have it

    Collective as the teacher is, and over world. Raises ValueError for a top beyond the vocabulary.
    """

    def __init__(self, teacher: Teacher, folder: Path, top: int, world: Comm | None = None) -> None:
        self.vocabulary, self.context = teacher.vocabulary, teacher.context
        if not 1 <= top <= self.vocabulary:
            raise ValueError(f"CachedTeacher: top is {top}, expected 1 .. {self.vocabulary}, the vocabulary")
        self.teacher, self.folder, self.top, self.world = teacher, folder, top, world
        folder.mkdir(parents=True, exist_ok=True)

    def __call__(self, tokens: Tensor) -> Tensor:
        """Collective, see the class."""
        name = hashlib.blake2b(tokens.cpu().numpy().tobytes(), digest_size=12, key=repr(tuple(tokens.shape)).encode())
        path = self.folder / f"{name.hexdigest()}-{self.top}.npz"
        missing = np.array([float(not path.exists())])
        if (missing if self.world is None else self.world.all_reduce(missing))[0]:
            self._write(path, self.teacher(tokens).float())
        with np.load(path) as file:
            values, places, rest = (
                torch.from_numpy(file[key]).to(tokens.device) for key in ("values", "places", "rest")
            )
        whole = rest[..., None].expand(*rest.shape, self.vocabulary)
        return whole.scatter(-1, places.long(), values)

    def _write(self, path: Path, logits: Tensor) -> None:
        values, places = logits.topk(self.top)
        others = logits.scatter(-1, places, -torch.inf).logsumexp(-1) - np.log(max(1, self.vocabulary - self.top))
        unfinished = path.with_suffix(f".{uuid4().hex}")  # renamed when whole: other ranks may write the same
        with unfinished.open("wb") as file:
            arrays = {"values": values, "places": places.int(), "rest": others}
            np.savez(file, **{key: array.cpu().numpy() for key, array in arrays.items()})
        unfinished.rename(path)
