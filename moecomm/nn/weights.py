"""First weights that are the same on all ranks that hold copies of them, however each rank has drawn them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from moecomm.comm import Comm
from moecomm.groups import Groups
from moecomm.nn.experts import ExpertBank
from moecomm.nn.moe import MoE
from moecomm.nn.part import Part


@torch.no_grad()
def agree_on_weights(model: nn.Module, groups: Groups | None) -> None:
    """Give each copy of a parameter or buffer the values of the lowest rank that has one, bit for bit.

    groups  with the dense axes, which are those of the model's layers; None: one rank

    Experts: over the ranks that hold the same ones. Slices of a weight: over the data ranks. All others: over data and
    tensor ranks. For models whose weights come from torch's own generators, which are in another state on each rank:
    of another seed, or because ranks as threads of one process share the one generator. Layers of moecomm.nn draw the
    same weights everywhere by themselves. Collective over all ranks; the model is built alike on all of them.
    """
    if groups is None:
        return
    of_experts: set[int] = set()
    for layer in model.modules():
        if isinstance(layer, MoE):
            weights = [*layer.experts.parameters(), *layer.experts.buffers()]
            of_experts.update(map(id, weights))
            _copy_from_first(weights, (layer.groups or groups).expert_data)
    sliced: set[int] = set()
    for module in model.modules():
        if isinstance(module, Part) and not isinstance(module, ExpertBank):
            sliced.update(map(id, module.parameters(recurse=False)))
    dense: list[Tensor] = []
    whole: list[Tensor] = []
    for weight in (*model.parameters(), *model.buffers()):
        if id(weight) not in of_experts:
            dense.append(weight)
            if id(weight) not in sliced:
                whole.append(weight)
    _copy_from_first(dense, groups.data)
    _copy_from_first(whole, groups.tensor)


def _copy_from_first(weights: Iterable[Tensor], comm: Comm) -> None:
    if comm.size == 1:
        return
    for weight in weights:
        if weight.numel() == 0:
            continue
        # As bytes, of which all ranks but the first have zeros: their sum has the first rank's bits in any dtype.
        numbers = weight.detach().reshape(-1)
        values = numbers.contiguous().view(torch.uint8)
        if comm.rank > 0:
            values = torch.zeros_like(values)
        total = comm.all_reduce(values)
        weight.copy_(total.view(weight.dtype).reshape(weight.shape))
