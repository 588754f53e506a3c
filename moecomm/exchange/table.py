"""RowTable: which rows a rank makes of its tokens, for numpy and torch alike. Never communication."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moecomm.arrays import Array, Counts
from moecomm.gating.rows import copy_rows, sum_rows

if TYPE_CHECKING:
    import torch

LARGEST = 2**31 - 1
"""Rows and choices are numbered by int32, as `route` does it."""


@dataclass(frozen=True, eq=False)
class RowTable:
    """N copies of T rows. A row has up to S copies, and they are summed in the order of these S choices.

    row     [T, S] int32: where the copy of each choice is, -1: there is none
    source  [N] int32: of which row and choice each copy is, t * S + s

    numpy where the rows are on the host, and tensors on their device otherwise.
    """

    row: Array
    source: Array

    def on(self, device: torch.device) -> RowTable:
        """The table as tensors there."""
        import torch

        return RowTable(torch.from_numpy(self.row).to(device), torch.from_numpy(self.source).to(device))

    def out(self, rows: Array) -> Array:
        """[T, ...] -> [N, ...], the copies."""
        return copy_rows(rows, self.row, self.source)

    def back(self, rows: Array) -> Array:
        """[N, ...] -> [T, ...], the sums over the copies of each row: the adjoint of `out`."""
        return sum_rows(rows, self.row, self.source)


def by_label(labels: NDArray[Any]) -> tuple[RowTable, NDArray[Any]]:
    """One copy of a row for each label >= 0 that it has.

    labels   [T, S]; -1: none
    returns  the copies, ordered by label and then by row, and the label of each
    """
    order = sorting(labels)[np.count_nonzero(labels < 0) :]
    return _table(order, *labels.shape), labels.reshape(-1)[order]


def one_each(destination: Counts, num_destinations: int) -> tuple[RowTable, Counts, Counts]:
    """One copy of a row for each different destination that it has.

    destination  [T, K] of the row's choices; num_destinations: none
    returns      the copies, ordered by destination and then by row; the row [N] and the destination [N] of each
    """
    T, K = destination.shape  # noqa: N806
    is_first = destination < num_destinations
    for k in range(1, K):
        is_first[:, k] &= (destination[:, :k] != destination[:, k : k + 1]).all(axis=1)
    firsts = np.flatnonzero(is_first)
    firsts = firsts[sorting(destination.reshape(-1)[firsts])]
    row = firsts // max(K, 1)
    # A row's copies are summed in the order of their destinations: choice s is the s-th of them.
    return _table(row * K + _earlier(row, T), T, K), row, destination.reshape(-1)[firsts]


def sorting(numbers: NDArray[Any]) -> Counts:
    """The flat indices that sort numbers >= -1, equal ones in their order."""
    if numbers.max(initial=0) < 2**15:
        # numpy sorts int16 by radix, several times as fast as int64.
        numbers = numbers.astype(np.int16)
    return np.argsort(numbers, axis=None, kind="stable")


def check_size(num_rows: int, num_choices: int) -> None:
    """ValueError where a table has more choices than it can number."""
    if num_rows * num_choices > LARGEST:
        raise ValueError(f"{num_rows} rows with {num_choices} choices are too many, expected {LARGEST} choices at most")


def _table(source: Counts, num_rows: int, num_choices: int) -> RowTable:
    check_size(num_rows, num_choices)
    row = np.full((num_rows, num_choices), -1, np.int32)
    row.reshape(-1)[source] = np.arange(len(source), dtype=np.int32)
    return RowTable(row, source.astype(np.int32))


def _earlier(row: Counts, num_rows: int) -> Counts:
    """[N] how many copies of the same row come before."""
    order = sorting(row)
    counts = np.bincount(row, minlength=num_rows)
    earlier = np.empty_like(row)
    earlier[order] = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
    return earlier
