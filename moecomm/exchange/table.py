"""Tables of rows inside a rank, for numpy and torch alike. Never communication.

An assignment is a pair (token t, choice k), with the flat index t * K + k. On a GPU nothing here waits for the device:
sizes come from the host, and what only the device knows stays there.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moecomm.arrays import Array, Counts, copy_blocks, empty_rows, on_host, zeros
from moecomm.gating.rows import copy_rows, sum_rows

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

    def out(self, rows: Array) -> Array:
        """[T, ...] -> [N, ...], the copies."""
        return copy_rows(rows, self.row, self.source)

    def back(self, rows: Array) -> Array:
        """[N, ...] -> [T, ...], the sums over the copies of each row: the adjoint of `out`."""
        return sum_rows(rows, self.row, self.source)


@dataclass(frozen=True, eq=False)
class Constant:
    """A numpy array that does not change, brought to each device once."""

    array: NDArray[Any]
    on_devices: dict[Any, Array] = field(default_factory=dict)

    def at(self, like: Array) -> Array:
        """Of the kind of `like`, where that is."""
        if isinstance(like, np.ndarray):
            return self.array
        if like.device not in self.on_devices:
            self.on_devices[like.device] = constant(self.array, like)
        return self.on_devices[like.device]


@dataclass(frozen=True, eq=False)
class BlockOrder:
    """Blocks of rows in another order.

    order    [B] which block comes first, second, ...
    inverse  [B] the order that undoes it
    """

    order: Constant
    inverse: Constant

    changes: bool
    """Whether any block changes its place."""

    def at(self, rows: Array) -> tuple[Array, Array]:
        """order and inverse where the rows are."""
        if on_host(rows):
            return self.order.array, self.inverse.array
        return self.order.at(rows), self.inverse.at(rows)

    @classmethod
    def sorted_by(cls, *keys: NDArray[Any]) -> BlockOrder:
        """Ascending by the first key [B], equal ones by the next."""
        order = np.lexsort(keys[::-1])
        is_changed = order != np.arange(len(order))
        return cls(Constant(order), Constant(np.argsort(order)), bool(is_changed.any()))


@dataclass(frozen=True, eq=False)
class Blocks:
    """Rows that lie in blocks, brought to another order of the blocks.

    sizes  [B] rows of each block before: numpy where the rows are on the host, a tensor on their device otherwise
    """

    order: BlockOrder
    sizes: Array

    def out(self, rows: Array) -> Array:
        """[N, ...] -> [N, ...]"""
        return self._moved(rows, self.order.at(rows)[0], self.sizes) if self.order.changes else rows

    def back(self, rows: Array) -> Array:
        """The adjoint of `out`, which is its inverse."""
        if not self.order.changes:
            return rows
        order, inverse = self.order.at(rows)
        return self._moved(rows, inverse, self.sizes[order])

    def _moved(self, rows: Array, order: Array, sizes: Array) -> Array:
        moved = empty_rows(len(rows), rows)
        copy_blocks(moved, rows, order, sizes)
        return moved


def by_label(label: Array, num_labels: int) -> tuple[RowTable, Counts | Array]:
    """The assignments, ordered by label and then by token.

    label    [T, K] 0 .. num_labels - 1; what has the label num_labels or more is left out of the host's tables. On a
             device it comes last: how many there are is not known
    returns  the copies of tokens, one for each assignment, and the count [num_labels] of each label
    """
    if isinstance(label, np.ndarray):
        count = np.bincount(label.reshape(-1), minlength=num_labels)[:num_labels]
        return _table(_sorting(label)[: count.sum()], label.shape), count
    import torch

    # No bincount: it asks the device for the largest label, and waits for the answer.
    source, ends = _sorted_labels(label.reshape(-1), num_labels)
    count = torch.diff(ends, prepend=ends.new_zeros(1))
    table = table_of(source, label.shape)
    # What has no label has a place in the order all the same; no row of its token may be read from there.
    return RowTable(torch.where(label < num_labels, table.row, -1), table.source), count


@dataclass(frozen=True, eq=False)
class Copies:
    """One copy of a row for each different destination of its assignments, ordered by destination and then by row."""

    table: RowTable
    """A row's copies are summed in the order of their destinations: choice s is the s-th of them."""
    slot: Array
    """[N] of each assignment: the place of its copy among those for the same destination."""
    count: Array
    """[destinations] copies for each."""


def num_copies(destination: Array, row: Array, num_destinations: int, num_rows: int) -> Array:
    """[destinations] the counts of `copies` alone."""
    is_copied = _pairs(destination, row, num_destinations, num_rows)[0]
    return is_copied.reshape(num_destinations + 1, num_rows).sum(1)[:-1]


def _pairs(destination: Array, row: Array, num_destinations: int, num_rows: int) -> tuple[Array, Array]:
    """A bit for each pair of a destination and a row, set where there is an assignment; and the pair of each one."""
    # One more destination stands for none, so that no index has to be left out: on a device that would need its count.
    pair = destination * num_rows + row
    is_copied = zeros((num_destinations + 1) * num_rows, "bool", destination)
    is_copied[pair] = True
    return is_copied, pair


def copies(destination: Array, row: Array, num_destinations: int, shape: tuple[int, int]) -> Copies:
    """destination [N] and row [N] of the assignments, shape (rows, choices of a row).

    Assignments without a destination have num_destinations. On a device their copies come last.
    """
    num_rows, num_choices = shape
    # Both orders, that of all copies and that of the copies of a row, are running sums over these bits.
    is_copied, pair = _pairs(destination, row, num_destinations, num_rows)
    by_destination = is_copied.reshape(num_destinations + 1, num_rows)
    count = by_destination.sum(1)
    start = count.cumsum(0) - count
    # Assignments of one pair find the same copy and the same choice, so what they write below is the same.
    copy = is_copied.cumsum(0)[pair] - 1
    choice = row * num_choices + by_destination.cumsum(0).reshape(-1)[pair] - 1
    has_destination = destination < num_destinations
    if isinstance(copy, np.ndarray):
        # The host knows how many have a destination, and makes a table of no more.
        copy_of, choice_of = copy[has_destination], choice[has_destination]
        source = zeros(int(count[:-1].sum()), "int32", copy)
        source[copy_of] = choice_of
        where = np.full(num_rows * num_choices, -1, np.int32)
        where[choice_of] = copy_of
    else:
        source = zeros(len(copy), "int32", copy)
        source[copy] = choice.int()
        where = source.new_full((num_rows * num_choices,), -1)
        where[choice] = copy.where(has_destination, -1).int()
    return Copies(RowTable(where.reshape(shape), source), copy - start[destination], count[:-1])


def padded_copies(
    destination: Array, row: Array, num_destinations: int, shape: tuple[int, int], room: int
) -> tuple[RowTable, Array]:
    """`copies` in blocks of `room` for each destination, with empty places, and how many rows found no room.

    All assignments [T K] are given, those without a destination too.
    """
    num_rows, num_choices = shape
    is_copied, pair = _pairs(destination, row, num_destinations, num_rows)
    by_destination = is_copied.reshape(num_destinations + 1, num_rows)
    slot = by_destination.cumsum(1).reshape(-1)[pair] - 1
    choice = row * num_choices + by_destination.cumsum(0).reshape(-1)[pair] - 1
    has_destination = destination < num_destinations
    fits = has_destination & (slot < room)
    # What goes nowhere is written behind the end, which is cut off.
    place, choice_end = num_destinations * room, num_rows * num_choices
    copy = where(fits, destination * room + slot, place)
    source = zeros(place + 1, "int32", destination) - 1
    source[copy] = as_int32(choice)
    table = zeros(choice_end + 1, "int32", destination) - 1
    table[where(has_destination, choice, choice_end)] = as_int32(where(fits, copy, -1))
    lost = (by_destination[:-1].sum(1) - room).clip(0).sum()
    return RowTable(table[:-1].reshape(shape), source[:-1]), lost


def padded_by_label(
    label: Array, num_labels: int, max_rows: int, order_of_rows: Array | None = None
) -> tuple[RowTable, Array, Array]:
    """`by_label` with max_rows copies, the last ones empty: also the count of each label, and rows without room.

    label          [M, K] 0 .. num_labels; num_labels: none
    order_of_rows  [M] in which those of a label come; None: in theirs
    """
    flat = label.reshape(-1)
    if order_of_rows is None:
        order, ends = _sorted_labels(flat, num_labels)
    else:
        choice = arange(len(flat), flat).reshape(label.shape)[order_of_rows].reshape(-1)
        order, ends = _sorted_labels(flat[choice], num_labels)
        order = choice[order]
    num_rows = ends[-1] if num_labels else zeros((), "int64", flat)
    ends = ends.clip(None, max_rows)
    # The inverse of the order: where each assignment's copy is.
    place = empty_rows(len(flat), order)
    place[order] = arange(len(flat), flat)
    row = where((flat < num_labels) & (place < max_rows), place, -1)
    source = zeros(max_rows, "int32", flat) - 1
    num_sources = min(max_rows, len(flat))
    source[:num_sources] = as_int32(where(arange(num_sources, flat) < num_rows, order[:num_sources], -1))
    # Rows without room are those of the last labels: their counts end with the room.
    count = ends + 0
    count[1:] -= ends[:-1]
    return RowTable(as_int32(row).reshape(label.shape), source), count, (num_rows - max_rows).clip(0)


def _sorted_labels(label: Array, num_labels: int) -> tuple[Array, Array]:
    """The order of labels [N] 0 .. num_labels, and where the assignments of each label but the last end in it."""
    if isinstance(label, np.ndarray):
        return _sorting(label), np.bincount(label, minlength=num_labels)[:num_labels].cumsum()
    import torch

    ordered, order = label.sort(stable=True)
    return order, torch.searchsorted(ordered, torch.arange(num_labels, device=label.device), right=True)


def table_of(choice: Array, shape: tuple[int, int]) -> RowTable:
    """The copies whose rows and choices, r * K + k, are `choice` [N], in this order."""
    if isinstance(choice, np.ndarray):
        return _table(choice, shape)
    check_size(*shape)
    import torch

    row = choice.new_full((shape[0] * shape[1],), -1, dtype=torch.int32)
    row[choice.long()] = torch.arange(len(choice), dtype=torch.int32, device=choice.device)
    return RowTable(row.reshape(shape), choice.int())


def check_size(num_rows: int, num_choices: int) -> None:
    """ValueError where a table has more choices than it can number."""
    if num_rows * num_choices > LARGEST:
        raise ValueError(f"{num_rows} rows with {num_choices} choices are too many, expected {LARGEST} choices at most")


# ---- numpy and torch alike -----------------------------------------------------------------------------------------


def constant(array: NDArray[Any], like: Array) -> Array:
    """A numpy array, as one of the kind of `like`, where that is."""
    if isinstance(like, np.ndarray):
        return array
    import torch

    # torch warns of memory that cannot be written, as that of broadcast arrays.
    return torch.from_numpy(array.copy()).to(like.device)


def arange(length: int, like: Array) -> Array:
    """0 .. length - 1 where `like` is."""
    if isinstance(like, np.ndarray):
        return np.arange(length)
    import torch

    return torch.arange(length, device=like.device)


def where(condition: Array, chosen: Array, other: Array | int) -> Array:
    """np.where, torch.where."""
    return np.where(condition, chosen, other) if isinstance(chosen, np.ndarray) else chosen.where(condition, other)


def concatenated(left: Array, right: Array) -> Array:
    """[N, A] and [N, B] -> [N, A + B]"""
    if isinstance(left, np.ndarray):
        return np.concatenate([left, right], axis=1)
    import torch

    return torch.cat([left, right], dim=1)


def as_int32(array: Array) -> Array:
    """As `route` numbers rows."""
    return array.astype(np.int32) if isinstance(array, np.ndarray) else array.int()


def repeated(values: Array, counts: Array, length: int) -> Array:
    """[length] value i counts[i] times, one behind the other. length: the sum of the counts."""
    if isinstance(values, np.ndarray):
        return np.repeat(values, counts)
    return values.repeat_interleave(counts, output_size=length)


def _sorting(numbers: NDArray[Any]) -> Counts:
    """The flat indices that sort numbers >= 0, equal ones in their order."""
    if numbers.max(initial=0) < 2**15:
        # numpy sorts int16 by radix, several times as fast as int64.
        numbers = numbers.astype(np.int16)
    return np.argsort(numbers, axis=None, kind="stable")


def _table(source: Counts, shape: tuple[int, ...]) -> RowTable:
    num_rows, num_choices = shape
    # int32 below would wrap around without a word.
    check_size(num_rows, num_choices)
    row = np.full((num_rows, num_choices), -1, np.int32)
    row.reshape(-1)[source] = np.arange(len(source), dtype=np.int32)
    return RowTable(row, source.astype(np.int32))
