"""Gradients of the loss over all ranks and micro-batches, from those that each rank has; groups for an optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moecomm.groups import Groups, reduce_expert_gradient
from moecomm.nn.experts import Experts
from moecomm.nn.moe import ExpertLayer


def parameter_groups(model: torch.nn.Module, **of_experts: Any) -> list[dict[str, Any]]:
    """The parameters in two groups for any torch optimizer, "dense" and "experts". Not collective.

    of_experts  settings of the second, such as lr=1e-4

    An expert without tokens has a gradient of zeros, never None: so says `reduce_gradients`, and momentum goes on.
    """
    experts = [p for module in model.modules() if isinstance(module, Experts) for p in module.parameters()]
    ids = {*map(id, experts)}
    dense = [parameter for parameter in model.parameters() if id(parameter) not in ids]
    return [{"name": "dense", "params": dense}, {"name": "experts", "params": experts, **of_experts}]


def reduce_gradients(model: torch.nn.Module, groups: Groups | None, num_micro_batches: int = 1) -> None:
    """Turn each parameter's gradient into that of the mean loss over all micro-batches of all data-parallel ranks.

    groups             with the dense axes; None: one rank
    num_micro_batches  whose losses' gradients this rank has added up

    Experts: summed over the ranks that hold them, see `reduce_expert_gradient`. All others: averaged over data. An
    embedding that the first and the last pipeline stage share: summed over the two. A parameter without a gradient
    gets zeros. Collective over all ranks.
    """
    experts: dict[int, tuple[Groups, list[Any]]] = {}
    of_experts: set[int] = set()
    for module in model.modules():
        if isinstance(module, ExpertLayer) and module.groups is not None:
            theirs = list(module.experts.parameters())
            experts.setdefault(id(module.groups), (module.groups, []))[1].extend(theirs)
            of_experts.update(map(id, theirs))
    for parameter in model.parameters():
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        parameter.grad = gradient / num_micro_batches if num_micro_batches > 1 else gradient
    if groups is None:
        return
    dense = [p.grad for p in model.parameters() if id(p) not in of_experts]
    _replace(dense, groups.data.all_reduce(_flat(dense)) / groups.data.size)
    for of_layer, theirs in experts.values():
        gradients = [p.grad for p in theirs]
        _replace(gradients, reduce_expert_gradient(_flat(gradients), of_layer))
    _sum_embedding(model, groups)


def _sum_embedding(model: Any, groups: Groups) -> None:
    """Stages between the first and the last have no embedding: they add zeros."""
    if groups.pipeline.size > 1:
        config = model.config
        if hasattr(model, "embedding"):
            model.embedding.grad = groups.pipeline.all_reduce(model.embedding.grad)
        else:
            like = next(model.parameters())
            groups.pipeline.all_reduce(like.new_zeros(config.vocabulary, config.hidden).detach())


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


def _replace(tensors: Sequence[Tensor], flat: Tensor) -> None:
    for tensor, values in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(values.view_as(tensor))
