"""JSON objects with known keys: what `from_json` of a Topology and of Links reads."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

JsonObject = dict[str, Any]


def read_object(call: str, text: str, keys: Iterable[str]) -> JsonObject:
    """The JSON object in `text`, which must have exactly these keys. `call` is named in the ValueError if not."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{call}: not JSON: {error}") from None
    return check_object(call, "the text", value, keys)


def check_object(call: str, name: str, value: object, keys: Iterable[str]) -> JsonObject:
    """`value`, if it is an object with exactly these keys. ValueError if not."""
    expected = sorted(keys)
    actual = sorted(value) if isinstance(value, dict) else f"a {type(value).__name__}"
    if isinstance(value, dict) and actual == expected:
        return value
    raise ValueError(f"{call}: {name} has {actual}, expected an object with {expected}")
