"""Models of Hugging Face transformers with their experts over several ranks: Mixtral, Qwen2-MoE, Qwen3-MoE.

    model = AutoModelForCausalLM.from_pretrained("mistralai/Mixtral-8x7B-v0.1")
    parallelize(model, build_groups(comm, Topology(comm.size, expert=comm.size)))

What the ranks share is the experts: all else stays whole on each of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor, nn

from moecomm.all_to_all import FlatAllToAll
from moecomm.exchange import RoutedExchange
from moecomm.gating import Routing
from moecomm.groups import Groups
from moecomm.nn.experts import Experts
from moecomm.nn.local import LocalExchange
from moecomm.nn.moe import Exchange, ExpertLayer, exchange_over, held_experts

Model = TypeVar("Model", bound=nn.Module)
BLOCKS = ("MixtralSparseMoeBlock", "Qwen2MoeSparseMoeBlock", "Qwen3MoeSparseMoeBlock")


class SpreadExperts(ExpertLayer):
    """In the place of a block's experts: those of this rank, and an exchange. The block keeps its own router."""

    def __init__(self, theirs: Any, groups: Groups, exchange: Exchange) -> None:
        super().__init__()
        self.groups, self.exchange = groups, exchange
        here, part = held_experts(groups, exchange)
        ffn = theirs.down_proj.shape[2]

        def weights(e: int, name: str) -> Tensor:
            if name == "down":
                return theirs.down_proj[e].detach().T
            gate, up = theirs.gate_up_proj[e].detach().split(ffn)
            return (gate if name == "gate" else up).T

        like = {"device": theirs.down_proj.device, "dtype": theirs.down_proj.dtype}
        self.experts = Experts(
            theirs.down_proj.shape[1], ffn, here, activation="swiglu", part=part, weights=weights, **like
        )

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """[T, H], and what the router chose, [T, K] each -> [T, H]. Collective."""
        return self.answers(hidden_states, Routing(top_k_index, top_k_weights))


def parallelize(model: Model, groups: Groups, *, exchange: Callable[[Groups, int], Exchange] = exchange_over) -> Model:
    """Leave each rank its own experts of each MoE block; tokens travel to the others. Changes and returns model.

    model     of transformers 5.0 or newer, the same on all ranks, with all experts
    groups    who holds which experts; what else the model has stays whole on each rank
    exchange  exchange(groups, num_experts) makes the exchange of a block

    Each rank then calls the model with its own tokens (the same ones within a tensor group) and gets the logits that
    the whole model would give. All ranks must call it equally often: `generate` to the same length, for example.
    `reduce_gradients` and `checkpoint` know the experts. Collective. Raises ValueError, before anything is changed, for
    a model without such blocks, one that is parallelized already, another activation than SiLU, or experts that the
    ranks cannot share.
    """
    blocks = [module for module in model.modules() if type(module).__name__ in BLOCKS]
    if not blocks:
        raise ValueError(f"parallelize: {type(model).__name__} has none of the blocks {', '.join(BLOCKS)}")
    activation = getattr(model.config, "hidden_act", None)
    if activation != "silu":
        raise ValueError(f"parallelize: hidden_act of the model is {activation!r}, expected 'silu'")
    if any(isinstance(block.experts, SpreadExperts) for block in blocks):
        raise ValueError(f"parallelize: the experts of {type(model).__name__} are parallelized already")
    exchanges = [exchange(groups, block.experts.num_experts) for block in blocks]
    for place, made in enumerate(exchanges):
        if isinstance(made, LocalExchange):  # it takes the tables of `route`, which the blocks' routers do not make
            exchanges[place] = RoutedExchange(FlatAllToAll(groups.expert), made.num_experts)
        held_experts(groups, exchanges[place])
    for block, made in zip(blocks, exchanges, strict=True):
        block.experts = SpreadExperts(block.experts, groups, made)
    return model
