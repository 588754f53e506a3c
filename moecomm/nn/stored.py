"""Checkpoints as they lie on disk: the index, which says what there is and where, and the files of tensors."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack, closing
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moecomm.nn.files import regular, to_disk
from moecomm.nn.slices import Piece, Shape, piece_key
from moecomm.nn.tensor_file import HASH, NAMES, TensorFile, checksum

VERSION = 2
"""The first had no checksums."""
INDEX = "checkpoint.json"
CHECKSUM = b', "checksum": '
"""What is before the last entry of an index: the checksum of all bytes up to there."""
TENSOR = "moecomm.tensor"
"""The key that says that a value in an index is a tensor: {"moecomm.tensor": [dtype, numbers]}."""
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in NAMES}
ENTRIES = {"values": dict, "groups": list | None, "tensors": list}
"""Of an index, and their types."""
Index = dict[str, Any]
Target = tuple[Piece, Tensor]
"""A piece of a model, and the memory on the host that its numbers belong in."""
Box = tuple[slice, ...]


# ---- writing ---------------------------------------------------------------------------------------------------------


def write_index(file: Path, index: Index) -> None:
    """The index with the version and the checksums' names, and at its end its own checksum, on the disk."""
    content = {"format": "moecomm", "version": VERSION, "hash": HASH, **index}
    text = json.dumps(content, default=_as_json).encode().removesuffix(b"}")
    file.write_bytes(text + CHECKSUM + _checksum_entry(text))
    to_disk(file)


def _checksum_entry(text: bytes) -> bytes:
    return f'"{checksum(text)}"}}'.encode()


def _as_json(value: object) -> object:
    if isinstance(value, Tensor):
        return {TENSOR: [str(value.dtype).removeprefix("torch."), value.tolist()]}
    # A loss or a step that was computed with numpy.
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"a {type(value).__name__} is nothing that JSON can say")


def _from_json(entries: Index) -> object:
    if entries.keys() != {TENSOR}:
        return entries
    dtype, numbers = entries[TENSOR]
    return torch.tensor(numbers, dtype=DTYPES[dtype])


# ---- reading ---------------------------------------------------------------------------------------------------------


def _read_index(folder: str | Path | None) -> tuple[Path, Index]:
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
        # A damaged byte may make anything of JSON, and of a tensor's dtype and numbers in it.
        pass
    if type(version) is not int or version < 1:
        raise ValueError(f"{path} is no checkpoint of moecomm: it has no usable {INDEX}")
    # Its entries may mean something else: they are not looked at.
    if version > VERSION:
        raise ValueError(f"{path} was written by a newer moecomm: version {version}, this one reads up to {VERSION}")
    if version > 1:
        _check_checksum(path, index, text)
    damaged = f"{path / INDEX} is damaged"
    for entry, kinds in ENTRIES.items():
        if entry not in index or not isinstance(index[entry], kinds):
            raise ValueError(f"{damaged}: got {entry} {type(index.get(entry)).__name__}")
    if not all(isinstance(group, dict) for group in index["groups"] or ()):
        raise ValueError(f"{damaged}: a parameter group is no dict")
    return path, dict(index)


def _check_checksum(path: Path, index: Index, text: bytes) -> None:
    """Raises ValueError unless the text of an index ends with its own checksum."""
    if index.get("hash") != HASH:
        raise ValueError(f"{path}: its checksums are {index.get('hash')}, this version knows {HASH}")
    content, _, entry = text.rpartition(CHECKSUM)
    if entry != _checksum_entry(content):
        raise ValueError(f"{path / INDEX} is damaged: its checksum is not that of what it says")


class Stored:
    """A checkpoint: its index, and its tensors, read from files that are opened when they are needed.

    folder  of the checkpoint
    stack   closes the files

    Raises OSError or ValueError if there is no checkpoint that this version reads, or its index contradicts itself.
    """

    def __init__(self, folder: str | Path | None, stack: ExitStack) -> None:
        self.path, self.index = _read_index(folder)
        self.stack = stack
        self.tensors: dict[str, list[Piece]] = defaultdict(list)
        """name -> its pieces, which have each of its numbers once."""
        self.sizes: dict[str, dict[str, Shape]] = defaultdict(dict)
        """file -> the pieces' keys in it -> their sizes."""
        self.opened: dict[str, TensorFile] = {}
        self.with_checksums = self.index["version"] > 1
        damaged = f"{self.path / INDEX} is damaged"
        try:
            pieces = _pieces(self.index["tensors"], self.with_checksums)
        except (TypeError, ValueError):
            raise ValueError(f"{damaged}: its list of tensors is not one") from None
        for piece in pieces:
            self.tensors[piece.name].append(piece)
            self.sizes[piece.file][piece.key] = piece.size
            form = self.tensors[piece.name][0]
            if (piece.shape, piece.dtype) != (form.shape, form.dtype):
                raise ValueError(f"{damaged}: {piece.name} has two shapes or dtypes")
        for name, boxes in self.tensors.items():
            # Nearly all tensors are one box, for which this is quicker.
            piece = boxes[0]
            is_whole = len(boxes) == 1 and piece.size == piece.shape and not any(piece.start)
            if not is_whole and not _is_cut(boxes):
                raise ValueError(f"{damaged}: the parts of {name} are not each of its numbers once")

    def check(self, targets: list[Target]) -> None:
        """Raises ValueError unless the checkpoint has the tensors that targets are of, in the same shapes."""
        for piece, _ in targets:
            if piece.name not in self.tensors:
                raise ValueError(f"{self.path} has no {piece.name}")
            shape = self.tensors[piece.name][0].shape
            if shape != piece.shape:
                raise ValueError(f"{piece.name} in {self.path} has shape {shape}, expected {piece.shape}")

    def fill(self, targets: list[Target], progress: Callable[[int, int], object] | None = None) -> None:
        """Read the numbers of targets, whose memory is on the host, from all pieces that overlap with them.

        progress  progress(done, total), in bytes

        Raises ValueError for a file that is not as it was written, OSError for one that cannot be read.
        """
        by_name: dict[str, list[Target]] = defaultdict(list)
        for target in targets:
            by_name[target[0].name].append(target)
        total = sum(values.nbytes for _, values in targets)
        done = 0
        for name, boxes in by_name.items():
            piece, values = boxes[0]
            for source in self.tensors[name]:
                same_box = source.start == piece.start and source.size == piece.size and source.dtype == piece.dtype
                if same_box and len(boxes) == 1 and values.is_contiguous():
                    # The usual case needs no memory between the file and the target.
                    file = self.opened.get(source.file) or self._open(source.file)
                    file.read(source.key, values, source.checksum)
                else:
                    self._copy(source, boxes)
            done += sum(values.nbytes for _, values in boxes)
            if progress is not None:
                progress(done, total)

    def _copy(self, source: Piece, targets: list[Target]) -> None:
        """What targets have in common with a piece of the checkpoint.

        The piece is read as a whole and once for all of them, since its checksum is that of the whole.
        """
        boxes = []
        for piece, values in targets:
            overlap = _overlap(piece, source)
            if overlap is not None:
                boxes.append((values, *overlap))
        if boxes:
            numbers = torch.empty(source.size, dtype=DTYPES[source.dtype])
            file = self.opened.get(source.file) or self._open(source.file)
            file.read(source.key, numbers, source.checksum)
            for values, in_target, in_source in boxes:
                values[in_target].copy_(numbers[in_source])

    def _open(self, name: str) -> TensorFile:
        """Raises ValueError for a file that is not the one that the index describes."""
        path = self.path / name
        file = self.stack.enter_context(closing(TensorFile(path)))
        sizes = {key: entry.shape for key, entry in file.entries.items()}
        # A file of another save may have the same names and shapes, but not the id. The first version had no ids.
        if sizes != self.sizes[name] or file.metadata.get("id") != self.index.get("id"):
            raise ValueError(f"{path} is not the file that {INDEX} speaks of")
        self.opened[name] = file
        return file


def _pieces(lines: list[Any], with_checksums: bool) -> list[Piece]:
    """The pieces that an index lists. TypeError or ValueError for a list that is none.

    Checked column by column: a check of each line would take longer than reading the index.
    """
    columns = [*zip(*lines, strict=True)] or [()] * (6 + with_checksums)
    names, shapes, dtypes, files, starts, sizes, *checksums = columns
    if len(checksums) != with_checksums:
        raise ValueError("a line has another number of entries")
    texts = {*map(type, chain(names, dtypes, files, *checksums))}
    if texts - {str} or {*dtypes} - DTYPES.keys():
        raise ValueError("a name or a dtype is none")
    boxes = [*chain(shapes, starts, sizes)]
    numbers = [*chain.from_iterable(boxes)]
    # By type: True is an int for isinstance.
    kinds = {*map(type, boxes)} - {list} | {*map(type, numbers)} - {int}
    if kinds or min(numbers, default=0) < 0:
        raise ValueError("a shape is none")
    if not [*map(len, shapes)] == [*map(len, starts)] == [*map(len, sizes)]:
        raise ValueError("a box has another number of dimensions than its tensor")
    # A path would be read from outside the checkpoint.
    if any(Path(file).name != file for file in {*files}):
        raise ValueError("a file's name is a path")
    pieces = []
    for name, shape, dtype, file, start, size, *sums in lines:
        box = tuple(start), tuple(size)
        key = name if shape == size else piece_key(name, *box)
        pieces.append(Piece(key, name, tuple(shape), dtype, file, *box, sums[0] if sums else None))
    return pieces


def _is_cut(pieces: list[Piece]) -> bool:
    """Whether pieces are their tensor, cut along one dimension."""
    shape = pieces[0].shape
    cut = [dim for dim, length in enumerate(shape) if any(piece.size[dim] != length for piece in pieces)]
    if len(cut) != 1:
        return False
    dim = cut[0]
    end = 0
    for piece in sorted(pieces, key=lambda piece: piece.start[dim]):
        # The sum of all starts: that of each other dimension must be 0.
        if piece.start[dim] != end or sum(piece.start) != end:
            return False
        end += piece.size[dim]
    return end == shape[dim]


def _overlap(target: Piece, source: Piece) -> tuple[Box, Box] | None:
    """What two boxes of a tensor have in common, as slices of each; None if that is nothing."""
    in_target = []
    in_source = []
    for start, size, origin, length in zip(target.start, target.size, source.start, source.size, strict=True):
        low = max(start, origin)
        high = min(start + size, origin + length)
        if low >= high:
            return None
        in_target.append(slice(low - start, high - start))
        in_source.append(slice(low - origin, high - origin))
    return tuple(in_target), tuple(in_source)
