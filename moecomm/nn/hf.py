"""Models of Hugging Face transformers with their experts over several ranks: Mixtral, Qwen2-MoE, Qwen3-MoE.

    model = AutoModelForCausalLM.from_pretrained("mistralai/Mixtral-8x7B-v0.1")
    parallelize(model, build_groups(comm, Topology(comm.size, expert=comm.size)))

What the ranks share is the experts: all else stays whole on each of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from moecomm.all_to_all import FlatAllToAll
from moecomm.exchange import Exchange, RoutedExchange
from moecomm.gating import Routing
from moecomm.groups import Groups
from moecomm.nn.experts import Experts
from moecomm.nn.moe import ExpertLayer, exchange_over, held_experts
from moecomm.together import together

Model = TypeVar("Model", bound=nn.Module)
BLOCKS = {
    "MixtralSparseMoeBlock": "MixtralExperts",
    "Qwen2MoeSparseMoeBlock": "Qwen2MoeExperts",
    "Qwen3MoeSparseMoeBlock": "Qwen3MoeExperts",
}
"""The class of a block -> that of its experts: another one computes in another way or has more than the two weights."""
WEIGHTS = {"gate_up_proj", "down_proj"}
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


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
            theirs.down_proj.shape[1], ffn, here, activation="swiglu", part=part,
            num_experts=exchange.num_experts, weights=weights, **like,
        )  # fmt: skip
        self.experts.down.requires_grad_(theirs.down_proj.requires_grad)
        for weight in (self.experts.gate, self.experts.up):
            weight.requires_grad_(theirs.gate_up_proj.requires_grad)
        self.train(theirs.training)

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
    `reduce_gradients` and `checkpoint` know the experts. Frozen experts stay frozen, and training or evaluation what it
    was. A model inside another module (a wrapper) is found too; one in DistributedDataParallel has to be parallelized
    before.

    Collective. Raises ValueError on all ranks, before anything is changed, if on any of them the model has no such
    blocks, is parallelized already, or has experts of another kind than two whole weights in float32, bfloat16 or
    float16 and SiLU: quantized, offloaded, adapted (LoRA), sharded or hooked ones; and for experts that the ranks
    cannot share.
    """
    blocks = together(groups.world, "parallelize", lambda: _blocks(model))
    sizes = [(*block.experts.gate_up_proj.shape, str(block.experts.gate_up_proj.dtype)) for _, block in blocks]
    groups.world.agree("parallelize: the experts", repr(sizes))
    exchanges = [exchange(groups, block.experts.num_experts) for _, block in blocks]
    for place, made in enumerate(exchanges):
        if made.needs_table:  # the routers of the blocks make none
            exchanges[place] = RoutedExchange(FlatAllToAll(groups.expert), made.num_experts)
        held_experts(groups, exchanges[place])
    for (_, block), made in zip(blocks, exchanges, strict=True):
        block.experts = SpreadExperts(block.experts, groups, made)
    return model


def _blocks(model: nn.Module) -> list[tuple[str, Any]]:
    """The MoE blocks of a model and their names. ValueError unless all can be taken over."""
    wrapped = next((type(m).__name__ for m in model.modules() if isinstance(m, DistributedDataParallel)), None)
    if wrapped:
        raise ValueError(f"the model is in {wrapped}, which knows its parameters already: parallelize it before")
    blocks = [(name, module) for name, module in model.named_modules() if type(module).__name__ in BLOCKS]
    if not blocks:
        raise ValueError(f"{type(model).__name__} has none of the blocks {', '.join(BLOCKS)}")
    if any(isinstance(block.experts, SpreadExperts) for _, block in blocks):
        raise ValueError(f"the experts of {type(model).__name__} are parallelized already")
    for name, block in blocks:
        problem = _problem(block.experts, BLOCKS[type(block).__name__])
        if problem:
            raise ValueError(f"{name}.experts {problem}")
    return blocks


def _problem(experts: Any, kind: str) -> str:
    """What experts have or lack, so that their two weights are not all that they are; "" if nothing."""
    if type(experts).__name__ != kind:
        return f"is {type(experts).__name__}, expected {kind}: neither quantized nor adapted (merge adapters first)"
    activation = type(experts.act_fn).__name__
    if activation not in ("SiLU", "SiLUActivation"):
        return f"has the activation {activation}, expected SiLU"
    weights = dict(experts.named_parameters())
    names = {*weights, *dict(experts.named_buffers())}
    if names != WEIGHTS:
        return f"has {', '.join(sorted(names)) or 'no weights'}, expected {', '.join(sorted(WEIGHTS))} alone"
    hooks = [name for name, value in vars(experts).items() if name.endswith("_hooks") and value]
    hooks += [name for name in ("forward", "_hf_hook") if name in vars(experts)]
    if hooks or getattr(experts, "_is_expert_parallel", False):
        return f"has {', '.join(hooks) or 'a tp_plan'}, as of accelerate or a tp_plan: it would be lost"
    _, hidden, ffn = experts.down_proj.shape
    shapes = {"gate_up_proj": (2 * ffn, hidden), "down_proj": (hidden, ffn)}
    for name, weight in weights.items():
        if weight.is_meta:
            return f"has {name} on the device meta, expected its values: load the model without offloading"
        if type(weight) is not nn.Parameter or weight.dtype not in DTYPES:
            return f"has {name} as {type(weight).__name__} of {weight.dtype}, expected a Parameter of one of {DTYPES}"
        if tuple(weight.shape) != (experts.num_experts, *shapes[name]):
            return f"has {name} {tuple(weight.shape)}, expected {(experts.num_experts, *shapes[name])}"
        if weight._backward_hooks or getattr(weight, "_post_accumulate_grad_hooks", None):
            return f"has a gradient hook on {name}, which would be lost"
    kinds = {f"{weight.dtype} on {weight.device}" for weight in weights.values()}
    return f"has weights of {' and of '.join(sorted(kinds))}, expected one" if len(kinds) > 1 else ""
