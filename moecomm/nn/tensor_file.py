"""One file of tensors, in the safetensors format (https://huggingface.co/docs/safetensors), with a checksum of each.

The package safetensors (0.8) serves the tests only, which read these files with it and load files that it wrote: it
cannot keep what a checkpoint promises. Its reader maps a file into memory. A sector that the disk cannot read then
ends the process by a signal, where a read raises OSError, and a page may come from the disk again after its checksum
was compared. Its parser of bytes takes a file as a whole, of which a rank may need a small piece. Its writer takes all
tensors at once in host memory, where this one needs room for the largest tensor of a device.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from torch import Tensor

from moecomm.nn.files import regular

try:
    from xxhash import xxh3_128_hexdigest
except ImportError as error:
    raise ImportError(f"checkpoints need xxhash ({error}): pip install 'moecomm[torch]'") from error

checksum = xxh3_128_hexdigest
HASH = "xxh3_128"
"""The name of this checksum in an index."""
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
    """What the header says of a tensor: its dtype as in NAMES, and which bytes of the file it is."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def write(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> dict[str, str]:
    """A new file, on the disk when this returns the checksum of each tensor.

    Raises OSError, and ValueError for a dtype that the format does not know.
    """
    for name, values in tensors.items():
        if values.dtype not in NAMES:
            known = ", ".join(map(str, NAMES))
            raise ValueError(f"{name} is {values.dtype}, expected one of {known}")
    # Wide numbers come first, so that each tensor begins at a multiple of its item size.
    widths = {name: -values.dtype.itemsize for name, values in tensors.items()}
    order = sorted(tensors, key=widths.__getitem__)
    header: dict[str, object] = {"__metadata__": metadata}
    end = 0
    for name in order:
        values = tensors[name]
        begin = end
        end = end + values.nbytes
        header[name] = {"dtype": NAMES[values.dtype], "shape": values.shape, "data_offsets": (begin, end)}
    text = json.dumps(header).encode()
    # The format wants the numbers to begin at a multiple of 8 bytes.
    text += b" " * (-len(text) % 8)
    checksums = {}
    try:
        with path.open("xb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name in order:
                # One tensor at a time comes from its device. As bytes, since numpy has no bfloat16.
                values = tensors[name].cpu().contiguous()
                numbers = values.reshape(-1).view(torch.uint8).numpy()
                file.write(numbers.data)
                checksums[name] = checksum(numbers)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        # A write that fails does not name its file.
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
        """Read a tensor into values, contiguous, on the host, of its shape and dtype.

        expected  its checksum; None: any

        Raises ValueError for another checksum, or OSError if it cannot be read.
        """
        numbers = values.reshape(-1).view(torch.uint8).numpy()
        entry = self.entries[name]
        if (entry.dtype, entry.end - entry.begin) != (NAMES[values.dtype], numbers.nbytes):
            raise ValueError(f"{self.path} is damaged: {name} is {entry}, expected {numbers.nbytes} bytes")
        self.file.seek(entry.begin)
        # Into the memory of the tensor: no copy of it in between.
        if self.file.readinto(numbers.data) != numbers.nbytes:
            raise ValueError(f"{self.path} is damaged: it ends within {name}")
        # Of the memory that is used from now on, not of the file, which might be read differently a second time.
        if expected is not None and checksum(numbers) != expected:
            raise ValueError(f"{self.path} is damaged: {name} has another checksum than it was written with")


def _header(file: BinaryIO) -> tuple[dict[str, str], dict[str, Entry]]:
    """The metadata and the entries. ValueError, TypeError, KeyError or AttributeError for what is no such file."""
    file_end = file.seek(0, os.SEEK_END)
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    origin = 8 + length
    # Before the read: a damaged length would ask for more memory than there is.
    if origin > file_end:
        raise ValueError("it ends within its header")
    header = json.loads(file.read(length))
    metadata = dict(header.pop("__metadata__", {}))
    entries = {}
    ranges = []
    for name, fields in header.items():
        begin, end = fields["data_offsets"]
        ranges.append((begin, end))
        entries[name] = Entry(fields["dtype"], tuple(fields["shape"]), origin + begin, origin + end)
    # The format has no gaps: each byte behind the header is of exactly one tensor.
    ranges.sort()
    begins = [begin for begin, _ in ranges]
    ends = [end for _, end in ranges]
    types = {type(offset) for offset in begins + ends}
    if types - {int} or [*begins, file_end - origin] != [0, *ends]:
        raise ValueError("its numbers do not end where the file ends")
    return metadata, entries
