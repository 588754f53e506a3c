"""The text that a model is trained on: bytes of UTF-8 files, in sequences drawn by step and seed alone."""

from __future__ import annotations

import sysconfig
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moecomm.nn.files import regular

HELD_OUT = 0.05
"""Share of the text, its end, that is never trained on."""


def read_text(files: Sequence[str | Path]) -> Tensor:
    """The bytes of the files, one behind the other, uint8; no files: the Python standard library's own sources.

    Raises ValueError for a file that cannot be read, is no regular file or not UTF-8, or if there is no text at all.
    """
    paths = [Path(file) for file in files]
    if not paths:
        # Sorted, since a folder lists its files in any order and the text must be the same on all ranks.
        paths = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    texts = []
    for path in paths:
        try:
            with open(path, encoding="utf-8", opener=regular) as file:
                texts.append(file.read().encode())
        except UnicodeDecodeError as error:
            raise ValueError(
                f"text: {path} is not UTF-8: byte {error.start} is 0x{error.object[error.start]:02x}"
            ) from None
        except OSError as error:
            raise ValueError(f"text: {path}: {error.strerror}") from None
        if not texts[-1]:
            raise ValueError(f"text: {path} is empty")
    # A copy, since torch must not share memory that cannot be written.
    letters = np.frombuffer(b"".join(texts), np.uint8)
    return torch.from_numpy(letters.copy())


class Text:
    """Sequences of length + 1 bytes from a text: the end of it for validation, the rest for training.

    Raises ValueError if the held-out end is shorter than one sequence.
    """

    def __init__(self, text: Tensor, length: int, seed: int = 0) -> None:
        split = int(len(text) * (1 - HELD_OUT))
        self.training = text[:split]
        self.held_out = text[split:]
        self.length = length
        self.seed = seed
        if len(self.held_out) <= length:
            least = int((length + 2) / HELD_OUT)
            raise ValueError(f"text: got {len(text)} bytes, expected {least} or more for sequences of {length}")

    def identity(self) -> dict[str, Any]:
        """Which text this is: its bytes, and a digest of them."""
        digest = blake2b(self.training.numpy(), digest_size=8)
        digest.update(self.held_out.numpy())
        return {
            "bytes": len(self.training) + len(self.held_out),
            "digest": digest.hexdigest(),
        }

    def batch(self, step: int, num: int) -> Tensor:
        """[num, length + 1] int64, of a step: the same on every rank."""
        return self._draw(self.training, num, (self.seed, step))

    def validation(self, num: int) -> Tensor:
        """[num, length + 1] int64, the same ones always."""
        return self._draw(self.held_out, num, (0,))

    def _draw(self, text: Tensor, num: int, seed: tuple[int, ...]) -> Tensor:
        # A generator for each batch: a run that is resumed draws what the interrupted one would have drawn.
        generator = np.random.default_rng(seed)
        starts = generator.integers(len(text) - self.length, size=num)
        sequences = [text[start : start + self.length + 1] for start in starts]
        return torch.stack(sequences).long()
