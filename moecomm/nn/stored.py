"""Checkpoints as they lie on disk: the index, the tensors, and what an optimizer takes of them."""

from __future__ import annotations

import json
import math
import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moecomm.nn.slices import Held, Piece

try:
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import save_file
except ImportError as error:
    raise ImportError(f"checkpoints need safetensors ({error}): pip install 'moecomm[torch]'") from error

VERSION = 1
INDEX = "checkpoint.json"
KINDS = ("optimizer/", "number/")
"""What a name begins with that is no tensor of the model but a tensor, or a number, of the optimizer."""


def write(file: Path, tensors: dict[str, Tensor], name: str) -> None:
    """A file of tensors with the id of its checkpoint, on the disk when this returns. Raises OSError."""
    if not file.parent.exists():
        raise OSError(f"{file.parent} is not seen here: the folder must be on a file system that all ranks share")
    try:
        save_file({key: values.contiguous() for key, values in tensors.items()}, file, {"id": name})
    except SafetensorError as error:
        raise OSError(f"{file}: {error}") from None
    to_disk(file)


def to_disk(path: Path) -> None:
    """Return when a file or folder would outlast a power failure."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def read_index(folder: str | Path | None) -> tuple[Path, dict[str, Any]]:
    """The folder and what its checkpoint.json says. OSError or ValueError if there is none that this version reads."""
    if folder is None:
        raise FileNotFoundError("there is none yet")
    path = Path(folder)
    if not path.is_dir():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    try:
        index = json.loads((path / INDEX).read_text())
        version = index["version"] if index["format"] == "moecomm" else None
    except (OSError, ValueError, TypeError, KeyError):
        version = None
    if not isinstance(version, int):
        raise ValueError(f"{path} is no checkpoint of moecomm: it has no usable {INDEX}")
    if version > VERSION:
        raise ValueError(f"{path} was written by a newer moecomm: version {version}, this one reads up to {VERSION}")
    return path, dict(index)


class Stored:
    """The tensors of a checkpoint, its files open."""

    def __init__(self, path: Path, index: dict[str, Any], stack: ExitStack) -> None:
        self.path = path
        self.tensors: dict[str, tuple[tuple[int, ...], Any, list[Any]]] = {}
        for name, shape, dtype, file, start, size in index["tensors"]:
            one = self.tensors.setdefault(name, (tuple(shape), getattr(torch, dtype), []))
            one[2].append((file, start, size))
        self.of_optimizer = {name: name.split("/", 2) for name in self.tensors if name.startswith(KINDS)}
        """name -> kind, state, name of the piece that it is of."""
        sizes: dict[str, dict[str, list[int]]] = {}
        for name, (shape, _, parts) in self.tensors.items():
            for file, start, size in parts:
                sizes.setdefault(file, {})[_part(name, shape, start, size).key()] = size
        self.files = {}
        for file, wanted in sizes.items():
            try:
                opened = self.files[file] = stack.enter_context(safe_open(path / file, "pt"))
            except (OSError, SafetensorError) as error:
                raise ValueError(f"{path / file} is damaged: {error}") from None
            found = {key: opened.get_slice(key).get_shape() for key in opened.keys()}  # noqa: SIM118 - it is no dict
            if found != wanted or (opened.metadata() or {}).get("id") != index.get("id"):  # the first ones had none
                raise ValueError(f"{path / file} is not the file that {INDEX} speaks of")

    def checked(self, piece: Piece) -> Piece:
        """The piece, if the checkpoint has it."""
        shape, _, parts = self.tensors.get(piece.name, ((), None, []))
        if not parts:
            raise ValueError(f"{self.path} has no {piece.name}")
        if shape != piece.shape:
            raise ValueError(f"{piece.name} in {self.path} has shape {shape}, expected {piece.shape}")
        if sum(math.prod(size) for _, _, size in parts) != math.prod(shape):
            raise ValueError(f"{self.path} has only parts of {piece.name}")
        return piece

    def fill(self, *pieces: Piece) -> None:
        """Read the numbers of pieces, from all parts that overlap with them."""
        for piece, (file, start, size) in ((p, part) for p in pieces for part in self.tensors[p.name][2]):
            part = _part(piece.name, piece.shape, start, size)
            low = [*map(max, piece.start, part.start)]
            high = [min(a + n, b + m) for a, n, b, m in zip(piece.start, piece.values.shape, start, size, strict=True)]
            if all(a < b for a, b in zip(low, high, strict=True)):
                here, there = (
                    tuple(slice(a - s, b - s) for a, b, s in zip(low, high, begin, strict=True))
                    for begin in (piece.start, part.start)
                )
                piece.values[here].copy_(self.files[file].get_slice(part.key())[there])

    def whole(self, name: str) -> Tensor:
        """One tensor."""
        shape, dtype, _ = self.tensors.get(name, ((), None, None))
        piece = self.checked(Piece(name, shape, (0,) * len(shape), torch.empty(shape, dtype=dtype)))
        self.fill(piece)
        return piece.values


def _part(name: str, shape: tuple[int, ...], start: list[int], size: list[int]) -> Piece:
    """What a file has of a tensor, not read."""
    return Piece(name, shape, tuple(start), torch.empty(size, device="meta"))


def parameters(optimizer: Any, tensors: list[Held]) -> list[Any]:
    """All of an optimizer, in its order. ValueError if one is not the model's."""
    found = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if not {*map(id, found)} <= {id(one.tensor) for one in tensors}:
        raise ValueError("the optimizer has a parameter that the model does not have")
    return found


def state_dict(optimizer: Any, tensors: list[Held], groups: Any, stored: Stored) -> dict[str, Any]:
    """What optimizer.load_state_dict takes: of each group the settings saved, of each parameter the states."""
    if groups is None:
        raise ValueError(f"{stored.path} has no optimizer")
    if len(groups) != len(optimizer.param_groups):
        raise ValueError(
            f"{stored.path} has {len(groups)} parameter groups, the optimizer {len(optimizer.param_groups)}"
        )
    numbers = {id(parameter): number for number, parameter in enumerate(parameters(optimizer, tensors))}
    by_piece: dict[str, list[tuple[str, str]]] = {}
    for kind, state, name in stored.of_optimizer.values():
        by_piece.setdefault(name, []).append((kind, state))
    states = {}
    for one in tensors:
        names = [piece.name for piece in one.pieces(one.tensor)]
        if id(one.tensor) in numbers and names and names[0] in by_piece:
            of_one = {state: _read_state(f"{kind}/{state}/", one, stored) for kind, state in by_piece[names[0]]}
            states[numbers[id(one.tensor)]] = of_one
    settings = []
    for group, saved in zip(optimizer.param_groups, groups, strict=True):
        read = {k: tuple(v) if isinstance(v, list) else v for k, v in saved.items()}  # JSON knows no tuples
        settings.append({**group, **read, "params": [numbers[id(parameter)] for parameter in group["params"]]})
    return {"state": states, "param_groups": settings}


def _read_state(prefix: str, one: Held, stored: Stored) -> Any:
    """A state of a parameter: shaped as that, or one number for all its pieces."""
    pieces = one.pieces(one.tensor)
    shape, dtype, _ = stored.tensors[prefix + pieces[0].name]
    if shape == pieces[0].shape:
        values = torch.empty(one.tensor.shape, dtype=dtype)
        for piece in one.pieces(values):
            stored.fill(stored.checked(piece._replace(name=prefix + piece.name)))
        return values
    found = [stored.whole(prefix + name) for name in dict.fromkeys(piece.name for piece in pieces)]
    if any(other != found[0] for other in found):
        raise ValueError(f"{prefix}{pieces[0].name} is not that of the other experts in one bank")
    return found[0].item() if prefix.startswith("number") else found[0]
