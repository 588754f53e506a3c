"""Gradients of the loss over all ranks and micro-batches, from those that each rank has; groups for an optimizer."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from moecomm.arrays import as_dtype, sum_dtype
from moecomm.comm import Comm
from moecomm.groups import Groups, reduce_expert_gradient
from moecomm.nn.experts import Experts
from moecomm.nn.moe import ExpertLayer
from moecomm.nn.slices import held
from moecomm.nn.transformer import TransformerLM


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

    groups             with the dense axes, which are those of the model's layers; None: one rank
    num_micro_batches  whose losses' gradients this rank has added up, as many as every other

    Experts: summed over the ranks that hold them, see `reduce_expert_gradient`. All others: averaged over data. An
    embedding that the first and the last pipeline stage share: summed over the two. A parameter without a gradient
    gets zeros, unless it is frozen (requires_grad=False): an optimizer leaves it alone. Collective over all ranks; the
    same parameters must be frozen on all of them. Raises ValueError, on all ranks and before any gradient is changed,
    for num_micro_batches < 1 or not the same on all, no groups where the model has some, groups of other dense axes
    than those, and a model that is sharded by torch's FSDP.
    """
    layers = [m for m in model.modules() if isinstance(m, ExpertLayer) and m.groups is not None]
    of_layers = [layer.groups for layer in layers if layer.groups is not None]
    problem = _problem(model, of_layers, groups, num_micro_batches)
    for known in (of_layers if groups is None else [groups])[:1]:
        known.world.agree("reduce_gradients: num_micro_batches", problem or str(num_micro_batches))
    if problem:
        raise ValueError(f"reduce_gradients: {problem}")
    experts: dict[int, tuple[Groups, list[Any]]] = {}
    of_experts: set[int] = set()
    for layer, of_layer in zip(layers, of_layers, strict=True):
        theirs = _trained(layer.experts)
        experts.setdefault(id(of_layer), (of_layer, []))[1].extend(theirs)
        of_experts.update(map(id, theirs))
    for parameter in _trained(model):
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        parameter.grad = gradient / num_micro_batches if num_micro_batches > 1 else gradient
    if groups is None:
        return
    _replace(
        [p for p in _trained(model) if id(p) not in of_experts],
        partial(_mean, data=groups.data),
    )
    for of_layer, theirs in experts.values():
        _replace(theirs, partial(reduce_expert_gradient, groups=of_layer))
    for module in model.modules():
        if isinstance(module, TransformerLM) and groups.pipeline.size > 1:
            _sum_embedding(module, groups.pipeline)


def gradient_norm(model: torch.nn.Module, groups: Groups | None) -> Tensor:
    """The norm of the gradients of the whole model, the same on all ranks. After reduce_gradients. Collective over all.

    torch.nn.utils.clip_grad_norm_ sees this rank's experts and slices alone, so that ranks would scale the weights that
    they have in common differently; clip_grads_with_norm_(model.parameters(), max_norm, this norm) does not. Raises
    ValueError for a model and groups that `reduce_gradients` does not take.
    """
    of_layers = [m.groups for m in model.modules() if isinstance(m, ExpertLayer) and m.groups is not None]
    problem = _problem(model, of_layers, groups)
    if problem:
        raise ValueError(f"gradient_norm: {problem}")
    copies: dict[int, int] = {}
    for module in model.modules():
        if isinstance(module, ExpertLayer) and module.groups is not None:
            copies.update(dict.fromkeys(map(id, module.experts.parameters()), module.groups.topology.expert_data))
    stages = [module for module in model.modules() if isinstance(module, TransformerLM) and module.stage[1] > 1]
    twice = {id(module.embedding) for module in stages if hasattr(module, "embedding")}
    total = torch.zeros(1, dtype=torch.float64, device=next(model.parameters()).device)
    for one in held(model):
        if one.tensor.grad is not None:
            ranks = 1
            if groups is not None:
                sliced = one.slice is not None and one.slice.part[1] > 1
                ranks = groups.data.size * (1 if sliced else groups.tensor.size) * (2 if id(one.tensor) in twice else 1)
            norm = torch.linalg.vector_norm(one.tensor.grad, dtype=torch.float64)
            total += norm.square() / copies.get(id(one.tensor), ranks)
    return (total if groups is None else groups.world.all_reduce(total)).sqrt().float()[0]


def agree_on_overflow(model: torch.nn.Module, groups: Groups | None) -> None:
    """Where a gradient of any rank is inf or NaN, make all gradients of all ranks NaN. Collective over all.

    For torch.amp.GradScaler, which sees the gradients of its own rank alone: between reduce_gradients and the scaler's
    unscale_ or step, so that all ranks skip the step and lower the scale, or none does. The scale must be the same on
    all ranks to begin with. No host waits for a GPU. Raises ValueError as gradient_norm.
    """
    overflow = gradient_norm(model, groups) * 0  # 0 or NaN
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad += overflow.to(parameter.grad.device)


def _problem(model: torch.nn.Module, of_layers: list[Groups], groups: Groups | None, num_micro_batches: int = 1) -> str:
    """What is wrong with the arguments of reduce_gradients, or ""."""
    if num_micro_batches < 1:
        return f"num_micro_batches is {num_micro_batches}, expected at least 1"
    for module in model.modules():
        if {"FSDPModule", "FullyShardedDataParallel"} & {kind.__name__ for kind in type(module).__mro__}:
            return f"{type(module).__name__} is sharded by FSDP, which reduces gradients itself: expected none"
    if groups is None:
        split = any(of_layer.world.size > 1 for of_layer in of_layers)
        return "groups is None, expected those of the model's layers: they are on several ranks" if split else ""
    for of_layer in of_layers:
        if _dense(of_layer) != _dense(groups):
            return f"groups has {_dense(groups)}, expected {_dense(of_layer)} as a layer of the model has it"
    return ""


def _dense(groups: Groups) -> dict[str, int]:
    of = groups.topology
    return {"world_size": of.world_size, "pipeline": of.pipeline, "data": of.data, "tensor": of.tensor}


def _trained(module: torch.nn.Module) -> list[Any]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def _mean(flat: Tensor, data: Comm) -> Tensor:
    """Over the data ranks; divided first, as an expert's gradient: the sum may be too large for 16 bits. Uses flat."""
    return as_dtype(data.all_reduce(as_dtype(flat, sum_dtype(flat)).div_(data.size)), flat.dtype)


def _sum_embedding(model: TransformerLM, pipeline: Comm) -> None:
    """Stages between the first and the last have no embedding, nor know whether it is frozen: they add zeros."""
    embedding = getattr(model, "embedding", None)
    here = None if embedding is None else embedding.grad
    if here is None:
        here = next(model.parameters()).new_zeros(model.config.vocabulary, model.config.hidden).detach()
    total = pipeline.all_reduce(here)
    if embedding is not None and embedding.requires_grad:
        embedding.grad = total


def _replace(parameters: list[Any], reduced: Callable[[Tensor], Tensor]) -> None:
    """Put in the place of their gradients what comes of all of them, as one row of numbers."""
    if parameters:
        flat = reduced(torch.cat([p.grad.flatten() for p in parameters]))
        for p, values in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            p.grad.copy_(values.view_as(p))
