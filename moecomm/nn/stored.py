"""Checkpoints as they lie on disk: the index, which says what there is and where, and the files of tensors."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, closing
from itertools import chain, groupby
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from moecomm.nn.files import regular, to_disk
from moecomm.nn.slices import Piece, key
from moecomm.nn.tensor_file import HASH, NAMES, TensorFile, checksum

VERSION = 2
"""The first had no checksums."""
INDEX = "checkpoint.json"
CHECKSUM = b', "checksum": '
"""What is before the last entry of an index: the checksum of all bytes up to there."""
TENSOR = "moecomm.tensor"
"""The key that says that a value in an index is a tensor: {"moecomm.tensor": [dtype, numbers]}."""
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in NAMES}


# ---- writing ---------------------------------------------------------------------------------------------------------


def write_index(file: Path, index: dict[str, Any]) -> None:
    """The index with the version and the checksums' names, and at its end its own checksum, on the disk."""
    told = {"format": "moecomm", "version": VERSION, "hash": HASH, **index}
    text = json.dumps(told, default=_as_json).encode().removesuffix(b"}")
    file.write_bytes(text + CHECKSUM + _checksum_entry(text))
    to_disk(file)


def _checksum_entry(text: bytes) -> bytes:
    return f'"{checksum(text)}"}}'.encode()


def _as_json(value: Any) -> Any:
    if isinstance(value, Tensor):
        return {TENSOR: [str(value.dtype).removeprefix("torch."), value.tolist()]}
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"a {type(value).__name__} is nothing that JSON can say")


def _from_json(entries: dict[str, Any]) -> Any:
    if entries.keys() != {TENSOR}:
        return entries
    dtype, numbers = entries[TENSOR]
    return torch.tensor(numbers, dtype=DTYPES[dtype])


# ---- reading ---------------------------------------------------------------------------------------------------------


def read_index(folder: str | Path | None) -> tuple[Path, dict[str, Any]]:
    """The folder and what its checkpoint.json says. OSError or ValueError if there is none that this version reads."""
    if folder is None:
        raise FileNotFoundError("there is none yet")
    path = Path(folder)
    if not path.is_dir():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    version = None
    try:
        with open(path / INDEX, "rb", opener=regular) as file:
            text = file.read()
        index = json.loads(text, object_hook=_from_json)
        version = index["version"] if index["format"] == "moecomm" else None
    except (FileNotFoundError, ValueError, TypeError, KeyError, RuntimeError, OverflowError):
        pass
    if type(version) is not int or version < 1:
        raise ValueError(f"{path} is no checkpoint of moecomm: it has no usable {INDEX}")
    if version > VERSION:
        raise ValueError(f"{path} was written by a newer moecomm: version {version}, this one reads up to {VERSION}")
    damaged = f"{path / INDEX} is damaged"
    if version > 1 and index.get("hash") != HASH:
        raise ValueError(f"{path}: its checksums are {index.get('hash')}, this version knows {HASH}")
    before, _, last = text.rpartition(CHECKSUM)
    if version > 1 and last != _checksum_entry(before):
        raise ValueError(f"{damaged}: its checksum is not that of what it says")
    for entry, kinds in {"values": dict, "groups": list | None, "tensors": list}.items():
        if entry not in index or not isinstance(index[entry], kinds):
            raise ValueError(f"{damaged}: got {entry} {type(index.get(entry)).__name__}")
    if not all(isinstance(group, dict) for group in index["groups"] or ()):
        raise ValueError(f"{damaged}: a parameter group is no dict")
    return path, dict(index)


class Part(NamedTuple):
    """What one file has of a tensor."""

    file: str
    key: str
    """Its name in the file."""
    start: tuple[int, ...]
    size: tuple[int, ...]
    checksum: str | None
    """None: the index has none."""


class Whole(NamedTuple):
    """A tensor of a checkpoint. Its parts have each of its numbers once."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    parts: list[Part]


class Stored:
    """The tensors of a checkpoint, read from files that are opened when they are needed.

    stack  closes them

    Raises ValueError if the index contradicts itself.
    """

    def __init__(self, path: Path, index: dict[str, Any], stack: ExitStack) -> None:
        self.path, self.id, self.stack = path, index.get("id"), stack
        self.tensors: dict[str, Whole] = {}
        self.shapes: dict[str, dict[str, tuple[int, ...]]] = defaultdict(dict)
        """file -> name there -> shape."""
        self.opened: dict[str, TensorFile] = {}
        self.with_checksums = index["version"] > 1
        damaged = f"{path / INDEX} is damaged"
        try:
            columns = _columns(index["tensors"], self.with_checksums)
        except (TypeError, ValueError):
            raise ValueError(f"{damaged}: its list of tensors is not one") from None
        for name, shape, dtype, file, start, size, told in zip(*columns, strict=True):
            if name not in self.tensors:
                self.tensors[name] = Whole(shape, DTYPES[dtype], [])
            whole = self.tensors[name]
            if whole.shape != shape or whole.dtype != DTYPES[dtype]:
                raise ValueError(f"{damaged}: {name} has two shapes or dtypes")
            in_file = key(name, shape, start, size)
            whole.parts.append(Part(file, in_file, start, size, told))
            self.shapes[file][in_file] = size
        for name, (shape, _, parts) in self.tensors.items():
            first, *others = parts
            if (first.size != shape or any(first.start)) if not others else not _cut_up(shape, parts):
                raise ValueError(f"{damaged}: the parts of {name} are not each of its numbers once")

    def check(self, pieces: Iterable[Piece]) -> None:
        """Raises ValueError unless the checkpoint has what pieces are of."""
        for piece in pieces:
            if piece.name not in self.tensors:
                raise ValueError(f"{self.path} has no {piece.name}")
            shape = self.tensors[piece.name].shape
            if shape != piece.shape:
                raise ValueError(f"{piece.name} in {self.path} has shape {shape}, expected {piece.shape}")

    def fill(self, pieces: Iterable[Piece]) -> None:
        """Read the numbers of pieces, whose values are on the host, from all parts that overlap with them.

        A part is read as a whole, since its checksum is; once for all pieces of one tensor that follow each other.

        Raises ValueError for a file that is not as it was written, OSError for one that cannot be read.
        """
        for name, group in groupby(pieces, attrgetter("name")):
            first, *others = group
            _, dtype, parts = self.tensors[name]
            for part in parts:
                values = first.values
                fits = not others and part.start == first.start and part.size == values.shape
                if fits and values.dtype == dtype and values.is_contiguous():
                    self._read(part, values)
                    continue
                boxes = [(piece.values, box) for piece in (first, *others) if (box := _overlap(piece, part))]
                if boxes:
                    values = torch.empty(part.size, dtype=dtype)
                    self._read(part, values)
                    for target, (of_piece, of_part) in boxes:
                        target[of_piece].copy_(values[of_part])

    def whole(self, name: str) -> Tensor:
        """One tensor. Raises as `check` and `fill`."""
        if name not in self.tensors:
            raise ValueError(f"{self.path} has no {name}")
        shape, dtype, _ = self.tensors[name]
        values = torch.empty(shape, dtype=dtype)
        self.fill([Piece(name, shape, (0,) * len(shape), values)])
        return values

    def _read(self, part: Part, values: Tensor) -> None:
        """A part into values, contiguous and of its shape and dtype."""
        if part.file not in self.opened:
            self.opened[part.file] = self._open(part.file)
        self.opened[part.file].read(part.key, values, part.checksum)

    def _open(self, name: str) -> TensorFile:
        file = self.stack.enter_context(closing(TensorFile(self.path / name)))
        shapes = {in_file: entry.shape for in_file, entry in file.entries.items()}
        if shapes != self.shapes[name] or file.metadata.get("id") != self.id:  # the first ones had none
            raise ValueError(f"{self.path / name} is not the file that {INDEX} speaks of")
        return file


def _columns(lines: list[Any], with_checksums: bool) -> list[Sequence[Any]]:
    """Of an index's lines: names, shapes, dtypes, files, starts, sizes, checksums. TypeError or ValueError if wrong."""
    columns = [*zip(*lines, strict=True)] or [()] * (6 + with_checksums)
    names, shapes, dtypes, files, starts, sizes, *checksums = columns
    texts = [*chain(names, dtypes, files, *checksums)]
    boxes = [*chain(shapes, starts, sizes)]
    numbers = [*chain.from_iterable(boxes)]
    if len(checksums) != with_checksums or {*map(type, texts)} - {str} or {*dtypes} - DTYPES.keys():
        raise ValueError
    if {*map(type, boxes)} - {list} or {*map(type, numbers)} - {int} or min(numbers, default=0) < 0:
        raise ValueError
    if not [*map(len, shapes)] == [*map(len, starts)] == [*map(len, sizes)]:
        raise ValueError
    if any(Path(file).name != file for file in {*files}):
        raise ValueError
    as_tuples = [[*map(tuple, column)] for column in (shapes, starts, sizes)]
    told = checksums[0] if with_checksums else [None] * len(names)
    return [names, as_tuples[0], dtypes, files, as_tuples[1], as_tuples[2], told]


def _cut_up(shape: tuple[int, ...], parts: list[Part]) -> bool:
    """Whether parts are the tensor cut along one dimension."""
    cut = [dim for dim, size in enumerate(shape) if any(part.size[dim] != size for part in parts)]
    if len(cut) != 1:
        return False
    (dim,), end = cut, 0
    for part in sorted(parts, key=lambda part: part.start[dim]):
        if part.start[dim] != end or sum(part.start) != end:
            return False
        end += part.size[dim]
    return end == shape[dim]


def _overlap(piece: Piece, part: Part) -> tuple[tuple[slice, ...], tuple[slice, ...]] | None:
    """What both have, as slices of each; None if there is nothing."""
    low = [*map(max, piece.start, part.start)]
    ends = zip(piece.start, piece.values.shape, part.start, part.size, strict=True)
    high = [min(a + size, b + other) for a, size, b, other in ends]
    if any(a >= b for a, b in zip(low, high, strict=True)):
        return None
    of_piece, of_part = (
        tuple(slice(a - s, b - s) for a, b, s in zip(low, high, start, strict=True))
        for start in (piece.start, part.start)
    )
    return of_piece, of_part
