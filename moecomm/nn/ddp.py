"""MoE layers inside torch's DistributedDataParallel, which gives all ranks the same weights and gradients."""

from __future__ import annotations

from typing import Any, TypeVar

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from moecomm.comm import Comm
from moecomm.nn.experts import FSDP, ExpertBank

Model = TypeVar("Model", bound=nn.Module)
IGNORED = "_ddp_params_and_buffers_to_ignore"


def exclude_experts(model: Model) -> Model:
    """Tell DistributedDataParallel to leave the experts of a model alone. Changes and returns model. Not collective.

        wrapped = DistributedDataParallel(exclude_experts(model), process_group=group_of_the_data_ranks)

    model  the very module that is wrapped, not one inside it

    The experts' gradients are summed by `reduce_gradients`, after all backward passes of a step; the others have been
    averaged then, which averaging them again does not change.
    """
    names = set(getattr(model, IGNORED, ()))
    # A layer that is used twice has two names, and the wrapper may know it by either.
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, ExpertBank):
            names.update(name for name, _ in module.named_parameters(path))
    setattr(model, IGNORED, sorted(names))
    return model


def check_wrapping(experts: ExpertBank, data: Comm) -> None:
    """ValueError in a forward pass of a wrapper that takes the experts of other ranks for this one's.

    data  the ranks that have the same dense weights

    Called by each layer in each pass: it looks once at each DistributedDataParallel.
    """
    if experts.split and experts.is_flattened():
        raise ValueError(f"Experts: {FSDP}")
    wrapper: Any = getattr(DistributedDataParallel, "_active_ddp_module", None)
    if wrapper is None or experts.wrapper == id(wrapper):
        return
    size = dist.get_world_size(wrapper.process_group)
    if size != data.size:
        raise ValueError(
            f"DistributedDataParallel is over {size} ranks, expected the {data.size} of the data group: give "
            f"process_group{data.where()}"
        )
    # By identity: the wrapper may be around a module that has this layer under a longer name.
    wrapped = set()
    for name, parameter in wrapper.module.named_parameters():
        if name not in wrapper.parameters_to_ignore:
            wrapped.add(id(parameter))
    if experts.split and any(id(parameter) in wrapped for parameter in experts.parameters()):
        raise ValueError(
            "DistributedDataParallel has given this rank the experts of rank 0: make the model again and wrap "
            f"exclude_experts(model){data.where()}"
        )
    experts.wrapper = id(wrapper)
