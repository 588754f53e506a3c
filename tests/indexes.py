"""Indexes of checkpoints as others write them, for tests of what a load makes of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from xxhash import xxh3_128_hexdigest


def write_index(path: Path, content: dict[str, Any]) -> None:
    """With the checksum that goes with it."""
    text = json.dumps({key: content[key] for key in content if key != "checksum"}).encode()[:-1]
    (path / "checkpoint.json").write_bytes(text + f', "checksum": "{xxh3_128_hexdigest(text)}"}}'.encode())


def first_version(path: Path) -> dict[str, Any]:
    """The index of a checkpoint as version 1 had it."""
    index = json.loads((path / "checkpoint.json").read_text())
    lines = [line[:6] for line in index["tensors"]]
    return {**{key: index[key] for key in ("format", "id", "values", "groups")}, "version": 1, "tensors": lines}
