"""One file of tensors, in the safetensors format (https://huggingface.co/docs/safetensors), with a checksum of each.

That package maps files into memory. Here they are read, once: what a disk cannot give is then an OSError and no signal
that ends the process, and what has been compared with its checksum is what is used. Written is one tensor at a time, so
that the host has no copy of all that a device holds.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from moecomm.nn.files import regular

try:
    from xxhash import xxh3_128_hexdigest
except ImportError as error:
    raise ImportError(f"checkpoints need xxhash ({error}): pip install 'moecomm[torch]'") from error

HASH = "xxh3_128"
NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""The format's name of each dtype."""


class Entry(NamedTuple):
    """What a file says of one of its tensors."""

    dtype: str
    """As in NAMES."""
    shape: tuple[int, ...]
    begin: int
    """Where in the file its bytes are."""
    end: int


def write(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> dict[str, str]:
    """A new file, on the disk when this returns the checksum of each tensor.

    Raises OSError, and ValueError for a dtype that the format does not know.
    """
    if other := [name for name, values in tensors.items() if values.dtype not in NAMES]:
        known = ", ".join(map(str, NAMES))
        raise ValueError(f"{other[0]} is {tensors[other[0]].dtype}, expected one of {known}")
    order = sorted(tensors, key=lambda name: -tensors[name].dtype.itemsize)  # each at a multiple of its item size
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name in order:
        values = tensors[name]
        begin, end = end, end + values.nbytes
        header[name] = {"dtype": NAMES[values.dtype], "shape": values.shape, "data_offsets": (begin, end)}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    checksums = {}
    try:
        with path.open("xb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name in order:
                numbers = memory(tensors[name].cpu().contiguous())
                file.write(numbers)
                checksums[name] = checksum(numbers)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise OSError(f"{path}: {error.strerror}") from None
    return checksums


class TensorFile:
    """A file to read tensors from, open until `close`.

    Raises ValueError if it is missing or not of the format, OSError if it is no regular file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.file = open(path, "rb", opener=regular)  # noqa: SIM115 - until `close`
        except FileNotFoundError as error:
            raise ValueError(f"{path} is damaged: {error.strerror}") from None
        try:
            self.metadata, self.entries = _header(self.file)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            self.file.close()
            raise ValueError(f"{path} is damaged: {error}") from None

    def close(self) -> None:
        """Nothing can be read afterwards."""
        self.file.close()

    def read(self, name: str, values: Tensor, expected: str | None) -> None:
        """A tensor into values, contiguous, on the host, of its shape and dtype.

        expected  its checksum; None: any

        Raises ValueError if it has another one, or OSError if it cannot be read.
        """
        numbers, entry = memory(values), self.entries[name]
        if (entry.dtype, entry.end - entry.begin) != (NAMES[values.dtype], numbers.nbytes):
            raise ValueError(f"{self.path} is damaged: {name} is {entry}, expected {numbers.nbytes} bytes")
        self.file.seek(entry.begin)
        if self.file.readinto(numbers) != numbers.nbytes:
            raise ValueError(f"{self.path} is damaged: it ends within {name}")
        if expected is not None and checksum(numbers) != expected:
            raise ValueError(f"{self.path} is damaged: {name} has another checksum than it was written with")


def checksum(numbers: bytes | memoryview) -> str:
    """In hexadecimal, by the hash that HASH names."""
    return xxh3_128_hexdigest(numbers)


def memory(values: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the host."""
    numbers: np.ndarray = values.reshape(-1).view(torch.uint8).numpy()
    return numbers.data


def _header(file: BinaryIO) -> tuple[dict[str, Any], dict[str, Entry]]:
    """The metadata and the entries. ValueError, TypeError, KeyError or AttributeError for what is no such file."""
    end = file.seek(0, os.SEEK_END)
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    start = 8 + length
    if start > end:
        raise ValueError("it ends within its header")
    header = json.loads(file.read(length))
    metadata = dict(header.pop("__metadata__", {}))
    spans = sorted(one["data_offsets"] for one in header.values())
    begins, ends = [span[0] for span in spans], [span[1] for span in spans]
    if {*map(type, begins + ends)} - {int} or [*begins, end - start] != [0, *ends]:
        raise ValueError("its numbers do not end where the file ends")
    entries = {}
    for name, one in header.items():
        begin, end = one["data_offsets"]
        entries[name] = Entry(one["dtype"], tuple(one["shape"]), start + begin, start + end)
    return metadata, entries
