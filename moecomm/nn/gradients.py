"""Gradients of the loss over all ranks and micro-batches, from those that each rank has; groups for an optimizer."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from moecomm.arrays import as_dtype, sum_dtype
from moecomm.comm import Comm
from moecomm.groups import Groups, reduce_expert_gradient
from moecomm.nn.experts import ExpertBank
from moecomm.nn.moe import MoE
from moecomm.nn.slices import held
from moecomm.nn.transformer import TransformerLM


def parameter_groups(model: nn.Module, **of_experts: Any) -> list[dict[str, Any]]:
    """The parameters in two groups for any torch optimizer, "dense" and "experts". Not collective.

    of_experts  settings of the second, such as lr=1e-4

    An expert without tokens has a gradient of zeros, never None: so says `reduce_gradients`, and momentum goes on.
    """
    experts: list[nn.Parameter] = []
    for module in model.modules():
        if isinstance(module, ExpertBank):
            experts += module.parameters()
    # By identity: `in` would compare the numbers of tensors.
    ids = {id(parameter) for parameter in experts}
    dense = [parameter for parameter in model.parameters() if id(parameter) not in ids]
    return [
        {"name": "dense", "params": dense},
        {"name": "experts", "params": experts, **of_experts},
    ]


def reduce_gradients(model: nn.Module, groups: Groups | None, num_micro_batches: int = 1) -> None:
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
    layers = _layers(model)
    problem = _problem(model, layers, groups, num_micro_batches)
    # Where the model has groups, this rank may be the only one that was called without: it tells the others.
    known = groups or next((layer_groups for _, layer_groups in layers), None)
    if known is not None:
        known.world.agree("reduce_gradients: num_micro_batches", problem or str(num_micro_batches))
    if problem:
        raise ValueError(f"reduce_gradients: {problem}")
    for parameter in _trained(model):
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        parameter.grad = gradient / num_micro_batches if num_micro_batches > 1 else gradient
    if groups is None:
        return
    # Layers of the same topology share their groups, so that their experts take one collective together.
    banks: dict[int, tuple[Groups, list[nn.Parameter]]] = {}
    expert_ids: set[int] = set()
    for layer, layer_groups in layers:
        experts = _trained(layer.experts)
        banks.setdefault(id(layer_groups), (layer_groups, []))[1].extend(experts)
        expert_ids.update(id(parameter) for parameter in experts)
    dense = [parameter for parameter in _trained(model) if id(parameter) not in expert_ids]
    _replace(dense, partial(_mean, data=groups.data))
    for layer_groups, experts in banks.values():
        _replace(experts, partial(reduce_expert_gradient, groups=layer_groups))
    for module in model.modules():
        if isinstance(module, TransformerLM) and groups.pipeline.size > 1:
            _sum_embedding(module, groups.pipeline)


def gradient_norm(model: nn.Module, groups: Groups | None) -> Tensor:
    """The norm of the gradients of the whole model, the same on all ranks. After reduce_gradients. Collective over all.

    torch.nn.utils.clip_grad_norm_ sees this rank's experts and slices alone, so that ranks would scale the weights that
    they have in common differently; clip_grads_with_norm_(model.parameters(), max_norm, this norm) does not. Raises
    ValueError for a model and groups that `reduce_gradients` does not take.
    """
    layers = _layers(model)
    problem = _problem(model, layers, groups)
    if problem:
        raise ValueError(f"gradient_norm: {problem}")
    copies: dict[int, int] = {}
    for layer, layer_groups in layers:
        for parameter in layer.experts.parameters():
            copies[id(parameter)] = layer_groups.topology.expert_data
    # The first and the last pipeline stage share the embedding.
    shared = set()
    for module in model.modules():
        if isinstance(module, TransformerLM) and module.is_first != module.is_last:
            shared.add(id(module.embedding))
    device = next(model.parameters()).device
    # In float64: squares of 16-bit gradients overflow, and sums of many small ones lose digits.
    total = torch.zeros(1, dtype=torch.float64, device=device)
    for weight in held(model):
        gradient = weight.tensor.grad
        if gradient is None:
            continue
        # All ranks add up their squares, so each number is divided by how many of them have it.
        ranks = copies.get(id(weight.tensor), 1)
        if groups is not None and id(weight.tensor) not in copies:
            ranks = groups.data.size
            if weight.slice is None or weight.slice.portion[1] == 1:
                ranks *= groups.tensor.size
            if id(weight.tensor) in shared:
                ranks *= 2
        norm = torch.linalg.vector_norm(gradient, dtype=torch.float64)
        total += norm.square() / ranks
    if groups is not None:
        total = groups.world.all_reduce(total)
    return total.sqrt().float()[0]


def agree_on_overflow(model: nn.Module, groups: Groups | None) -> None:
    """Where a gradient of any rank is inf or NaN, make all gradients of all ranks NaN. Collective over all.

    For torch.amp.GradScaler, which sees the gradients of its own rank alone: between reduce_gradients and the scaler's
    unscale_ or step, so that all ranks skip the step and lower the scale, or none does. The scale must be the same on
    all ranks to begin with. No host waits for a GPU. Raises ValueError as gradient_norm.
    """
    # 0 or NaN: a sum of squares that is inf or NaN becomes NaN.
    overflow = gradient_norm(model, groups) * 0
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad += overflow.to(parameter.grad.device)


def _layers(model: nn.Module) -> list[tuple[MoE, Groups]]:
    """The layers whose experts are on several ranks, with their groups."""
    layers = []
    for module in model.modules():
        if isinstance(module, MoE) and module.groups is not None:
            layers.append((module, module.groups))
    return layers


def _problem(
    model: nn.Module, layers: list[tuple[MoE, Groups]], groups: Groups | None, num_micro_batches: int = 1
) -> str:
    """What is wrong with the arguments of reduce_gradients, or ""."""
    if num_micro_batches < 1:
        return f"num_micro_batches is {num_micro_batches}, expected at least 1"
    for module in model.modules():
        # By name: importing FSDP takes longer than this library, and few models use it.
        if {"FSDPModule", "FullyShardedDataParallel"} & {kind.__name__ for kind in type(module).__mro__}:
            return f"{type(module).__name__} is sharded by FSDP, which reduces gradients itself: expected none"
    if groups is None:
        split = any(layer_groups.world.size > 1 for _, layer_groups in layers)
        return "groups is None, expected those of the model's layers: they are on several ranks" if split else ""
    for _, layer_groups in layers:
        if _dense_axes(layer_groups) != _dense_axes(groups):
            expected = _dense_axes(layer_groups)
            return f"groups has {_dense_axes(groups)}, expected {expected} as a layer of the model has it"
    return ""


def _dense_axes(groups: Groups) -> dict[str, int]:
    topology = groups.topology
    return {name: getattr(topology, name) for name in ("world_size", "pipeline", "data", "tensor")}


def _trained(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def _mean(flat: Tensor, data: Comm) -> Tensor:
    """The mean over the data ranks. Uses flat."""
    # Divided first, as an expert's gradient is: the sum may be too large for 16 bits.
    shares = as_dtype(flat, sum_dtype(flat)).div_(data.size)
    return as_dtype(data.all_reduce(shares), flat.dtype)


def _sum_embedding(model: TransformerLM, pipeline: Comm) -> None:
    """Add up the gradients of the embedding that the first and the last stage share. Collective over pipeline."""
    embedding = getattr(model, "embedding", None)
    gradient = None if embedding is None else embedding.grad
    # Stages between the two have no embedding and do not know whether it is frozen: they add zeros.
    if gradient is None:
        config = model.config
        gradient = next(model.parameters()).detach().new_zeros(config.vocabulary, config.hidden)
    total = pipeline.all_reduce(gradient)
    if embedding is not None and embedding.requires_grad:
        embedding.grad = total


def _replace(parameters: list[nn.Parameter], reduced: Callable[[Tensor], Tensor]) -> None:
    """Replace the gradients by what `reduced` makes of all of them, which it gets as one row of numbers."""
    # One collective for all: a layer norm's few numbers alone would cost the latency of a whole one.
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients:
        return
    flat = reduced(torch.cat([gradient.flatten() for gradient in gradients]))
    sizes = [gradient.numel() for gradient in gradients]
    for gradient, values in zip(gradients, flat.split(sizes), strict=True):
        gradient.copy_(values.view_as(gradient))
