"""Keys and values of many sequences, in pages that a sequence takes when it grows and gives back when it ends."""

from __future__ import annotations

import heapq
from typing import Any

import torch

from moecomm.nn import Config

PAGE = 64
"""Positions of a page."""


def pages_for(length: int) -> int:
    """How many pages hold so many positions."""
    return -(-length // PAGE)


class PagedCache:
    """Keys and values [layers, 1 + pages, heads, PAGE, hidden / heads] of this rank's heads.

    pages  that sequences may have; one more is for rows that fill up a batch
    ranks  that share the heads
    like   device, dtype

    A sequence's table lists its pages in the order of its positions. Page 0 belongs to none.
    """

    def __init__(self, config: Config, pages: int, ranks: int, **like: Any) -> None:
        shape = (config.num_layers, 1 + pages, config.heads // ranks, PAGE, config.hidden // config.heads)
        # Zeros: a masked position weighs 0, and 0 times what memory happened to hold might be NaN.
        self.keys = torch.zeros(shape, **like)
        self.values = torch.zeros(shape, **like)
        self._free = list(range(1, 1 + pages))

    @property
    def num_free(self) -> int:
        """Pages that no sequence has."""
        return len(self._free)

    def grow(self, table: list[int], length: int) -> bool:
        """Add pages to a table until it holds so many positions; False, and nothing changes: there are too few."""
        missing = pages_for(length) - len(table)
        if missing > len(self._free):
            return False
        # The lowest first: all ranks take the same ones.
        table += [heapq.heappop(self._free) for _ in range(missing)]
        return True

    def release(self, table: list[int]) -> None:
        """Take back the pages of a table, and empty it."""
        for page in table:
            heapq.heappush(self._free, page)
        table.clear()


def cache_bytes(config: Config, pages: int, ranks: int, dtype: torch.dtype) -> int:
    """Of the keys and values on each rank."""
    return 2 * config.num_layers * (1 + pages) * PAGE * config.hidden // ranks * dtype.itemsize
