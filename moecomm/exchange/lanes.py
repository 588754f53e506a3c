"""What tensor ranks do among themselves: the same input to all of them, and one answer made of theirs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from moecomm.arrays import Array, Counts, empty_rows, is_torch
from moecomm.comm import Comm
from moecomm.exchange.adjoint import linear


@dataclass(frozen=True, eq=False)
class Share:
    """Who has which answers: known to all tensor ranks from the routing alone.

    tokens  for each lane, the tokens that it has an answer for, ascending; None where only a device knows
    shape   (T, K)
    output  "replicated" or "sequence", as in TensorParallelExchange
    """

    tokens: list[Counts] | None
    shape: tuple[int, int]
    output: Literal["replicated", "sequence"]

    def one_lane_each(self) -> bool:
        """Whether no token has answers on two lanes: then nothing is left to add."""
        if self.tokens is None:
            return self.shape[1] <= 1
        tokens = np.concatenate(self.tokens)
        return len(np.unique(tokens)) == len(tokens)

    def gather_is_shorter(self) -> bool:
        """An all-gather moves (L - 1) / L of all answered rows to each rank, an all-reduce 2 (L - 1) / L of T rows."""
        if self.tokens is None:
            return False
        num_answered = sum(len(tokens) for tokens in self.tokens)
        return num_answered <= 2 * self.shape[0]

    def slice_sizes(self, num_lanes: int) -> Counts:
        """[L] tokens of each tensor rank's slice of the sequence, as np.array_split cuts them."""
        # The first slices have one token more where the tokens do not divide.
        least, remainder = divmod(self.shape[0], num_lanes)
        return np.array([least + (lane < remainder) for lane in range(num_lanes)], np.int64)

    def in_slice(self, rank: int) -> Iterator[Counts]:
        """For each lane, its tokens in the slice of a tensor rank, counted from that slice's start."""
        assert self.tokens is not None
        sizes = self.slice_sizes(len(self.tokens))
        end = sizes[: rank + 1].sum()
        start = end - sizes[rank]
        for tokens in self.tokens:
            # Tokens ascend, so those of a slice are a slice of them.
            begin, behind = np.searchsorted(tokens, (start, end))
            yield tokens[begin:behind] - start


def replicated(x: Array, tensor: Comm) -> Array:
    """x, which all tensor ranks have. For torch: its gradient is summed over them, a collective."""
    # requires_grad is the same on all tensor ranks, which have the same x: no rank goes another way here.
    if not is_torch(x) or not x.requires_grad:
        return x
    return linear(x, None, lambda x: x.view_as(x), tensor.all_reduce, tensor)[0]


def summed(terms: Array, tensor: Comm) -> Array:
    """The sum over the tensor ranks, the same on all of them; so is its gradient, which each rank passes on as it is.

    Collective over tensor; the backward pass is not.
    """
    return linear(terms, None, tensor.all_reduce, lambda grad: grad)[0]


def share(answers: Array, plan: Share, tensor: Comm) -> Array:
    """answers [T, ...], of this lane -> the sum over all lanes, whole or this rank's slice of it. Collective.

    Differentiable: the gradient of each lane is the whole one, gathered first where it comes in slices.
    """

    def whole_gradient(grad: Array) -> Array:
        if plan.output == "sequence":
            return tensor.all_gather(grad, plan.slice_sizes(tensor.size))
        return grad

    return linear(answers, None, lambda answers: sum_over_lanes(answers, plan, tensor), whole_gradient, tensor)[0]


def sum_over_lanes(answers: Array, plan: Share, tensor: Comm) -> Array:
    """`share` without a gradient."""
    if plan.output == "replicated" and not plan.gather_is_shorter():
        return tensor.all_reduce(answers)
    if plan.tokens is None:
        return _sum_of_slice(answers, plan.slice_sizes(tensor.size), tensor)
    # Rows that a lane has no answer for are zeros, which need not travel.
    answered = answers[plan.tokens[tensor.rank]]
    if plan.output == "replicated":
        num_rows, tokens = plan.shape[0], plan.tokens
        rows = tensor.all_gather(answered, [len(of_lane) for of_lane in tokens])
    else:
        num_rows = int(plan.slice_sizes(tensor.size)[tensor.rank])
        tokens = list(plan.in_slice(tensor.rank))
        send_counts = [len(list(plan.in_slice(rank))[tensor.rank]) for rank in range(tensor.size)]
        rows = tensor.all_to_all(answered, send_counts, [len(of_lane) for of_lane in tokens])
    total = empty_rows(num_rows, answers)
    total[...] = 0
    # In lane order, so that all ranks and all runs get the same bits.
    start = 0
    for of_lane in tokens:
        end = start + len(of_lane)
        total[of_lane] += rows[start:end]
        start = end
    return total


def _sum_of_slice(answers: Array, slice_sizes: Counts, tensor: Comm) -> Array:
    """This rank's slice of the sum of answers [T, ...], added lane by lane. Collective."""
    size = int(slice_sizes[tensor.rank])
    rows = tensor.all_to_all(answers, slice_sizes, np.full(tensor.size, size))
    total = rows[:size]
    for lane in range(1, tensor.size):
        total = total + rows[lane * size : (lane + 1) * size]
    return total
