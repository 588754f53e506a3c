"""Placement: copies of hot experts on ranks with spare slots, and which rows go to which copy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moecomm.arrays import Counts
from moecomm.nodes import Nodes

PRECISION = 500
"""The load of the fullest rank is found to this part of it."""


@dataclass(frozen=True, eq=False)
class Placement:
    """Which expert each spare slot holds, and how many rows each rank takes of each expert.

    slots  [p, slots] expert ids, -1: empty
    rows   [p, E] rows of each expert that each rank takes: those of all ranks add up to the expert's load
    """

    slots: Counts
    rows: Counts

    def load(self) -> Counts:
        """[p] rows of each rank."""
        return self.rows.sum(axis=1)

    def __repr__(self) -> str:
        load = self.load()
        mean = max(load.mean(), 1.0)
        num_copies = np.count_nonzero(self.slots >= 0)
        return f"Placement({num_copies} copies, the fullest rank has {load.max() / mean:.2f} of the mean)"


def balance(
    load: NDArray[np.generic] | Sequence[int], slots: int, experts: Sequence[Sequence[int]], nodes: Nodes | None = None
) -> Placement:
    """Place copies of experts so that the fullest rank has as few rows as they allow.

    load     [E] rows of each expert, or [p, E] by the rank that has the tokens
    slots    spare places on each rank, each for one copy
    experts  the ids that each of the p ranks holds, each expert on one rank, as `Exchange.experts` has them
    nodes    the ranks' nodes: a copy goes inside the expert's node where that is as good. None: one node

    The same on every rank that calls it with the same arguments; not collective. Raises ValueError for a load that is
    negative, not finite or of another shape, and for slots below 0.
    Source: experts are replicated by their load, as in EPLB (DeepSeek-V3, arXiv 2412.19437, section 3.4); rows are
    divided among an expert's copies as finely as they come.
    """
    num_rows = _checked_load(load, slots, experts, nodes)
    holder = np.full(len(num_rows), -1)
    for rank, ids in enumerate(experts):
        holder[list(ids)] = rank
    node_of = np.zeros(len(experts), np.int64) if nodes is None else nodes.node_of
    # The least load that the fullest rank can have, by bisection: whether a bound can be kept is easy to say.
    own = np.bincount(holder, num_rows, minlength=len(experts))
    most = int(own.max(initial=0))
    least = -(-int(num_rows.sum()) // len(experts))
    best = _Moves(num_rows, holder, node_of, slots, most)
    # Closer than this, another copy would cost more than it saves.
    while slots and most - least > least // PRECISION:
        bound = (least + most) // 2
        for fills in (False, True):
            moves = _Moves(num_rows, holder, node_of, slots, bound, fills)
            if moves.run():
                best, most = moves, bound
                break
        else:
            least = bound + 1
    return Placement(best.slots, best.rows)


class _Moves:
    """Rows moved from the fullest rank to the emptiest one with a free slot, until no rank has more than `bound`.

    fills  whether a move fills the emptier rank, though the fuller one may end below the bound: then it is filled later
           by another rank's rows. Rows go in chains so. Otherwise no more than the surplus moves
    """

    def __init__(
        self, load: Counts, holder: Counts, node_of: Counts, slots: int, bound: int, fills: bool = False
    ) -> None:
        num_ranks = len(node_of)
        self.slots = np.full((num_ranks, slots), -1)
        self.rows = np.zeros((num_ranks, len(load)), np.int64)
        self.rows[holder, np.arange(len(load))] = load
        self._total = self.rows.sum(axis=1)
        self._num_used = np.zeros(num_ranks, np.int64)
        self._node_of = node_of
        self._bound = bound
        self._fills = fills

    def run(self) -> bool:
        """Whether the bound can be kept so."""
        while (self._total > self._bound).any():
            if not self._relieve(int(self._total.argmax())):
                return False
        return True

    def _relieve(self, fullest: int) -> bool:
        """Move some rows of its hottest expert away; of the next ones if all that have a gap hold that already."""
        # Asked once and not for each of many experts: a bound that is too low ends here.
        has_room = (self._num_used < self.slots.shape[1]) & (self._total < self._bound)
        if not has_room.any():
            return False
        surplus = int(self._total[fullest]) - self._bound
        for expert in np.argsort(-self.rows[fullest], kind="stable").tolist():
            num_rows = int(self.rows[fullest, expert])
            if num_rows == 0:
                return False
            offered = num_rows if self._fills else min(num_rows, surplus)
            target = self._target(fullest, expert, offered)
            if target is None:
                continue
            # Rows are divisible: a copy takes exactly what its rank has room for.
            moved = min(self._bound - int(self._total[target]), offered)
            self.rows[fullest, expert] -= moved
            self.rows[target, expert] += moved
            self._total[fullest] -= moved
            self._total[target] += moved
            self.slots[target, self._num_used[target]] = expert
            self._num_used[target] += 1
            return True
        return False

    def _target(self, fullest: int, expert: int, offered: int) -> int | None:
        """The rank with a free slot that takes the most; of equal ones one inside the node, then the one less empty."""
        gap = self._bound - self._total
        can_take = (self._num_used < self.slots.shape[1]) & (gap > 0) & (self.rows[:, expert] == 0)
        can_take &= ~(self.slots == expert).any(axis=1)
        if not can_take.any():
            return None
        taken = np.where(can_take, np.minimum(gap, offered), -1)
        is_far = self._node_of != self._node_of[fullest]
        # lexsort's last key comes first; equal keys leave the lowest rank first.
        return int(np.lexsort((gap, is_far, -taken))[0])


def _checked_load(
    load: NDArray[np.generic] | Sequence[int], slots: int, experts: Sequence[Sequence[int]], nodes: Nodes | None
) -> Counts:
    """[E] the rows of each expert."""
    if not isinstance(slots, int | np.integer) or slots < 0:
        raise ValueError(f"balance: slots is {slots!r}, expected an integer >= 0")
    num_ranks = len(experts)
    ids = sorted(expert for held in experts for expert in held)
    if ids != list(range(len(ids))):
        raise ValueError(f"balance: experts is {list(experts)}, expected each of 0 .. E - 1 on one rank")
    array = np.asarray(load)
    if array.shape not in ((len(ids),), (num_ranks, len(ids))):
        raise ValueError(f"balance: load has shape {array.shape}, expected (E,) or (p, E) = {(num_ranks, len(ids))}")
    if not np.isfinite(array).all() or (array < 0).any():
        raise ValueError("balance: load has numbers that are negative or not finite, expected rows >= 0")
    if nodes is not None and nodes.world_size != num_ranks:
        raise ValueError(f"balance: nodes has {nodes.world_size} ranks, expected {num_ranks}, as experts has")
    return np.rint(array.sum(axis=0) if array.ndim == 2 else array).astype(np.int64)
