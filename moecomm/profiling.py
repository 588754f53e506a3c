"""Ranges in the profiles of torch: torch.profiler, and NVTX through torch.autograd.profiler.emit_nvtx."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


def new_range(name: str) -> Any:
    """A context that names in a profile what runs inside, or None: nobody profiles, and it costs a look at a flag."""
    # Not imported: who profiles with torch has imported it.
    profiler = sys.modules.get("torch.autograd.profiler")
    if profiler is None or not profiler._is_profiler_enabled:
        return None
    return profiler.record_function(f"moecomm.{name}")


def in_range(name: str, function: Callable[[T], T], argument: T) -> T:
    """function(argument), named in a profile."""
    profiled = new_range(name)
    if profiled is None:
        return function(argument)
    with profiled:
        return function(argument)
