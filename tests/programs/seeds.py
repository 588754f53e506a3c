"""--seed and --seeds of the programs whose inputs are random, and what repeats a case that failed."""

from __future__ import annotations

import argparse
import secrets
from collections.abc import Iterator
from contextlib import contextmanager


def add_seeds(parser: argparse.ArgumentParser) -> None:
    """The two options, for `seeds_of`."""
    parser.add_argument("--seed", type=int, default=secrets.randbelow(2**31), help="the first (default: a new one)")
    parser.add_argument("--seeds", type=int, default=1, help="how many, one after the other (default: %(default)s)")


def seeds_of(options: argparse.Namespace) -> range:
    """Those that were asked for. All cases are run with each."""
    return range(options.seed, options.seed + options.seeds)


@contextmanager
def repeated_by(command: str) -> Iterator[None]:
    """Says which command runs what is within alone, if it fails."""
    try:
        yield
    except BaseException as error:
        print(f"{error!r}\nagain: {command}", flush=True)
        raise
