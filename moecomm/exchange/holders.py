"""Holders: which rank holds which expert, and the order in which assignments are sent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from moecomm.arrays import Array
from moecomm.exchange.table import constant


@dataclass(frozen=True, eq=False)
class Holders:
    """Experts have places: numbers in the order in which assignments are sent. numpy, or tensors on a device.

    place  [E + 3] of each expert id; P for ids that no rank holds. The last three, which E, -2 and -1 read as indices,
           are P for ids above, P for ids below and P + 1 for an assignment that was dropped
    rank   [P + 2] that holds the expert of each place; the number of ranks for the last two
    local  [P + 2] its number among that rank's experts; 0 for the last two
    """

    place: Array
    rank: Array
    local: Array
    num_places: int
    num_experts: int
    """E, one more than the highest id."""
    widest: int
    """The most experts of a rank."""
    copies: dict[Any, Holders] = field(default_factory=dict)
    """By device."""

    @classmethod
    def of(cls, experts: Sequence[Sequence[int]], order: Sequence[int] | None = None) -> Holders:
        """experts: the ids that each rank holds. Places go by rank, or by the ranks as `order` has them."""
        by_rank = [np.asarray(ids, np.int64) for ids in experts]
        order = range(len(experts)) if order is None else order
        ids = np.concatenate([by_rank[rank] for rank in order])
        num_experts = int(ids.max(initial=-1)) + 1
        place = np.full(num_experts + 3, len(ids))
        place[ids] = np.arange(len(ids))
        # Behind all others, so that a sort leaves what was dropped at the end.
        place[-1] = len(ids) + 1
        rank = np.concatenate([np.full(len(by_rank[rank]), rank) for rank in order])
        local = np.concatenate([np.arange(len(by_rank[rank])) for rank in order])
        nobody = len(experts)
        return cls(
            place,
            np.append(rank, [nobody, nobody]),
            np.append(local, [0, 0]),
            len(ids),
            num_experts,
            max(map(len, experts)),
        )

    def on(self, like: Array) -> Holders:
        """The same where `like` is."""
        if isinstance(like, np.ndarray):
            return self
        if like.device not in self.copies:
            place, rank, local = (constant(array, like) for array in (self.place, self.rank, self.local))
            self.copies[like.device] = Holders(place, rank, local, self.num_places, self.num_experts, self.widest)
        return self.copies[like.device]

    def places(self, expert: Array) -> Array:
        """[T, K] expert ids -> the places of their experts. `expert` is where the holders are."""
        # On a device ids are not checked before: those that no rank holds are counted, and told to all ranks.
        return self.place[expert.clip(-2, self.num_experts)]

    def is_held(self) -> Array:
        """[E] whether any rank holds the expert."""
        return self.place[: self.num_experts] < self.num_places


def expert_lists(experts_per_rank: Any, size: int) -> list[list[int]]:
    """The ids that each rank holds, as RoutedExchange's experts_per_rank says."""
    if isinstance(experts_per_rank, int | np.integer):
        experts_per_rank = [int(experts_per_rank)] * size
    groups = list(experts_per_rank)
    if len(groups) != size:
        raise ValueError(f"RoutedExchange: experts_per_rank has {len(groups)} entries, expected {size}, one per rank")
    if all(isinstance(count, int | np.integer) for count in groups):
        if min(groups) < 0:
            raise ValueError(f"RoutedExchange: experts_per_rank is {groups}, expected counts >= 0")
        ends = np.cumsum(groups).tolist()
        groups = [range(end - count, end) for count, end in zip(groups, ends, strict=True)]
    experts = [[int(expert) for expert in group] for group in groups]
    held = [expert for group in experts for expert in group]
    if len(set(held)) < len(held) or min(held, default=0) < 0:
        raise ValueError(f"RoutedExchange: experts_per_rank is {experts}, expected every expert on one rank only")
    return experts
