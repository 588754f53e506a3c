"""Copying rows to where they are needed inside a rank, and summing the answers back: never communication.

Everything an exchange does beside communicating is one of two functions, and each is the other's gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from moecomm.arrays import Array, Counts, as_dtype, is_torch, sum_dtype


@dataclass(frozen=True, eq=False)
class Copies:
    """N copies of T rows: copy i is of row row[i], as that row's choice[i]; no row has a choice twice."""

    row: Counts
    choice: Counts
    num_rows: int
    num_choices: int

    def by_choice(self) -> tuple[Counts, list[slice]]:
        """[N] the copies, those of a row's first choice first; and where each choice's are among them."""
        ends = np.cumsum(np.bincount(self.choice, minlength=self.num_choices)).tolist()
        return sorting(self.choice), [slice(*ends_of) for ends_of in pairwise([0, *ends])]

    def places(self) -> Counts | None:
        """[T] where the one copy of each row is, or None if some row has none or several."""
        if self.num_choices != 1 or len(self.row) != self.num_rows:
            return None
        places = np.empty_like(self.row)
        places[self.row] = np.arange(len(self.row))
        return places


def one_each(destination: Counts, num_destinations: int) -> tuple[Copies, Counts]:
    """One copy of a row for each different destination that it has.

    destination  [T, K] of the row's choices; num_destinations: none
    returns      (N copies, by destination and then row; their destinations [N]). The choice of a copy is how many of
                 the row's destinations come before
    """
    T, K = destination.shape  # noqa: N806
    is_first = destination < num_destinations  # [T, K] of the row's choices that go there
    for k in range(1, K):
        is_first[:, k] &= (destination[:, :k] != destination[:, k : k + 1]).all(axis=1)
    firsts = np.flatnonzero(is_first)
    firsts = firsts[sorting(destination.reshape(-1)[firsts])]
    row, to = firsts // max(K, 1), destination.reshape(-1)[firsts]
    return Copies(row, _places(row, T), T, K), to


def by_label(labels: Counts) -> tuple[Copies, Counts]:
    """One copy of a row for each label >= 0 that it has: labels [T, S] -> the copies, by label and then row; these."""
    T, S = labels.shape  # noqa: N806
    order = sorting(labels)[np.count_nonzero(labels < 0) :]
    row, choice = np.divmod(order, max(S, 1))
    return Copies(row, choice, T, S), labels.reshape(-1)[order]


def sorting(numbers: Counts) -> Counts:
    """The flat indices that sort numbers >= -1, equal ones in their order."""
    if numbers.max(initial=0) < 2**15:
        numbers = numbers.astype(np.int16)  # which numpy sorts by radix, several times as fast
    return np.argsort(numbers, axis=None, kind="stable")


def _places(row: Counts, num_rows: int) -> Counts:
    """[N] how many copies of the same row come before."""
    order = sorting(row)
    counts = np.bincount(row, minlength=num_rows)
    places = np.empty_like(row)
    places[order] = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
    return places


def copy_out(x: Array, copies: Copies) -> Array:
    """x [T, H] -> [N, H], the copies in their order. Differentiable."""
    if is_torch(x):
        return _torch_functions().CopyOut.apply(x, copies)
    return x[copies.row]


def sum_back(rows: Array, copies: Copies, weight: Array | None = None, dtype: Any = None) -> Array:
    """rows [N, H] -> [T, H]: for each of T rows the sum of its copies, first choice first.

    weight  [T, num_choices] the factor of each copy; None: 1
    dtype   of the result; None: that of rows

    Summed in float32 (float64 for float64 rows) in a fixed order, and rounded once. Differentiable in rows and weight.
    """
    if is_torch(rows):
        return _torch_functions().SumBack.apply(rows, weight, copies, dtype)
    dtype = rows.dtype if dtype is None else dtype
    places = copies.places()
    if weight is None and places is not None:
        return as_dtype(rows[places], dtype)
    total = np.zeros((copies.num_rows, *rows.shape[1:]), sum_dtype(rows))
    order, parts = copies.by_choice()
    for choice, here in enumerate(parts):
        of = copies.row[order[here]]
        part = rows[order[here]].astype(total.dtype)
        total[of] += part if weight is None else part * _as_column(weight[of, choice], part)
    return as_dtype(total, dtype)


def _as_column(weight: np.ndarray, rows: np.ndarray) -> np.ndarray:
    return weight.astype(rows.dtype).reshape(-1, *(1,) * (rows.ndim - 1))


def _torch_functions() -> Any:
    from moecomm.exchange import autograd

    return autograd
