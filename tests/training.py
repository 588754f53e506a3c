"""A training loop in few lines, for tests of what must not change it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from moecomm.nn import TransformerLM, next_token_loss, reduce_gradients


def train(
    model: TransformerLM, optimizer: Any, micro_batches: Callable[[int], torch.Tensor], steps: Iterable[int]
) -> list[float]:
    """The mean loss over all micro-batches, at each step; micro_batches(step) has all of them, for all data ranks."""
    data = None if model.groups is None else model.groups.data
    losses = []
    for step in steps:
        every = micro_batches(step)
        mine = every if data is None else every.chunk(data.size)[data.rank]
        optimizer.zero_grad()
        total = torch.zeros(1)
        for batch in mine:
            output = model(batch[:, :-1])
            loss = next_token_loss(output.logits, batch[:, 1:]) + output.loss
            loss.backward()
            total += loss.detach()
        reduce_gradients(model, model.groups, len(mine))
        optimizer.step()
        losses.append(float(total if data is None else data.all_reduce(total)) / len(every))
    return losses
