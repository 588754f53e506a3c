"""Balancing the experts without a loss: a bias on the gate's scores, moved a step against what each expert carries.

The other two ways are losses, which `route` gives: routing.aux_loss and routing.z_loss, to be added to the model's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moecomm.gating import Routing
from moecomm.nn.moe import MoE


def loss_carried(routing: Routing, token_losses: Tensor) -> Tensor:
    """[E] for each expert the loss of the tokens that it has: what it carries in the loss-aware form of `update_bias`.

    token_losses  [T], of the tokens that were routed

    An expert of hard tokens then counts as full before one of easy ones. The plain form takes routing.load.
    """
    ids = torch.arange(routing.load.shape[0], device=token_losses.device)
    chosen = (routing.expert[..., None] == ids).any(1)
    # A product adds up in a fixed order: the same bits on all tensor ranks, whose gates must agree.
    return token_losses.detach().float() @ chosen.float()


@torch.no_grad()
def update_bias(layer: MoE, carried: Tensor, rate: float = 1e-3) -> None:
    """Move the bias of each expert by `rate`: up where it carries less than the mean of all, down where it has more.

    carried  [E] of this rank's tokens since the last update, such as routing.load or `loss_carried`

    The bias changes which experts are chosen, not their weights, and has no gradient. Collective over the data ranks
    of the layer. Source: DeepSeek-V3 (arXiv 2412.19437), section 2.1.2; for the loss-aware form see the page on PR-MoE.
    Raises ValueError for another shape.
    """
    if carried.shape != layer.bias.shape:
        raise ValueError(f"update_bias: carried is {tuple(carried.shape)}, expected {tuple(layer.bias.shape)}")
    total = carried.float()
    if layer.groups is not None:
        total = layer.groups.data.all_reduce(total)
    # 16 bits would swallow steps of 0.001.
    layer.bias = layer.bias.float()
    layer.bias += rate * (total.mean() - total).sign()
