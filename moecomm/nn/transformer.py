"""TransformerLM: a GPT-like language model with experts in every other layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from moecomm.exchange import Exchange
from moecomm.gating import Routing
from moecomm.groups import Groups
from moecomm.nn.configs import Config
from moecomm.nn.linear import MLP, ColumnLinear, RowLinear, part_in
from moecomm.nn.moe import MoE
from moecomm.nn.residual import ResidualMoE
from moecomm.nn.seeds import Key, Portion, draw, parameter

Cache = dict[int, tuple[Tensor, Tensor]]
"""layer -> keys and values [B, heads, positions so far, hidden / heads]."""


@dataclass(frozen=True)
class Output:
    """What a forward pass gives.

    logits    [B, S, vocabulary] float32; of a pipeline stage that is not the last: the hidden states [B, S, hidden]
    loss      what the gates add to the model's loss: aux_loss and z_loss of all layers so far, by the config's weights
    routings  of each MoE layer of this rank, first to last
    """

    logits: Tensor
    loss: Tensor
    routings: tuple[Routing, ...]


class Attention(nn.Module):
    """Causal self-attention, its heads sliced over the tensor ranks. Collective over tensor."""

    def __init__(self, config: Config, layer: int, **options: Any) -> None:
        super().__init__()
        ranks = part_in(options["tensor"])[1]
        if config.heads % ranks:
            raise ValueError(f"TransformerLM: {config.heads} heads, which tensor={ranks} ranks cannot share")
        self.layer = layer
        self.heads = config.heads // ranks
        key = options.pop("key")
        self.qkv = ColumnLinear(config.hidden, config.hidden, blocks=3, key=(*key, "qkv"), **options)
        self.out = RowLinear(config.hidden, config.hidden, key=(*key, "out"), **options)

    def forward(self, x: Tensor, cache: Cache | None) -> Tensor:
        """x [B, S, hidden] -> [B, S, hidden]; the positions in cache come before, and x's are added to it."""
        # The ranks' slices are whole heads, so each computes its own without the others.
        by_head = self.qkv(x).unflatten(-1, (3, self.heads, -1))
        q, k, v = by_head.permute(2, 0, 3, 1, 4)
        mask = None
        if cache is not None:
            if self.layer in cache:
                keys, values = cache[self.layer]
                k = torch.cat([keys, k], 2)
                v = torch.cat([values, v], 2)
                # is_causal would take the first new position for position 0.
                mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=x.device)
                mask = mask.tril(k.shape[2] - q.shape[2])
            cache[self.layer] = k, v
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return self.out(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x)), where the feed-forward layer is an MLP or has experts."""

    def __init__(
        self,
        config: Config,
        layer: int,
        groups: Groups | None,
        exchange: Exchange | None,
        key: Key,
        **like: Any,
    ) -> None:
        super().__init__()
        h = config.hidden
        self.norms = nn.ModuleList([nn.LayerNorm(h, **like), nn.LayerNorm(h, **like)])
        tensor = None if groups is None else groups.tensor
        self.attention = Attention(config, layer, tensor=tensor, std=config.std, key=key, **like)
        options = like | {"activation": config.activation, "std": config.std, "key": (*key, "ffn")}
        self.ffn: MLP | MoE | ResidualMoE
        experts = config.experts_of(layer)
        if not experts:
            self.ffn = MLP(h, config.ffn, tensor=tensor, **options)
            return
        options |= {
            "groups": groups,
            "exchange": exchange,
            "choices": {"normalize": config.normalize},
            "capacity_factor": config.capacity_factor,
            "eval_capacity_factor": config.eval_capacity_factor,
        }
        if config.residual == "none":
            self.ffn = MoE(h, config.ffn, experts, config.top_k, **options)
        else:
            self.ffn = ResidualMoE(h, config.ffn, experts, combine=config.residual, **options)

    def forward(self, x: Tensor, cache: Cache | None) -> tuple[Tensor, Routing | None]:
        """x [B, S, hidden] -> the same, and the routing where there are experts."""
        x = x + self.attention(self.norms[0](x), cache)
        y = self.ffn(self.norms[1](x))
        routing = None
        if not isinstance(self.ffn, MLP):
            y, routing = y
        return x + y, routing


class TransformerLM(nn.Module):
    """tokens [B, S] -> Output. The same first weights and the same losses under every split.

    config    sizes; CONFIGS has some by name
    groups    of each layer with experts, from `layer_groups`: expert, tensor and data parallelism. None: one rank
    stage     (i, n): this rank has part i of n of the layers, the first one the embeddings, the last one the logits
    exchange  exchange(groups, num_experts) makes the exchange of an MoE layer; None: `exchange_over`
    seed      of the first weights
    like      device, dtype

    Collective as its layers are. Raises ValueError for sizes that do not divide or groups that are not one per layer.
    """

    def __init__(
        self,
        config: Config,
        *,
        groups: Sequence[Groups] | None = None,
        stage: Portion = (0, 1),
        exchange: Callable[[Any, int], Exchange] | None = None,
        seed: int = 0,
        **like: Any,
    ) -> None:
        super().__init__()
        number, num_stages = stage
        if not 0 <= number < num_stages:
            raise ValueError(f"TransformerLM: stage is {stage}, expected (i, n) with 0 <= i < n")
        layers = config.layers_of(number, num_stages, "TransformerLM")
        if groups is not None and len(groups) != max(1, len(config.experts)):
            raise ValueError(f"TransformerLM: got {len(groups)} groups, expected {max(1, len(config.experts))}")
        self.config = config
        self.stage = stage
        self.groups = groups[0] if groups else None
        self.is_first = number == 0
        self.is_last = number == num_stages - 1
        self.blocks = nn.ModuleDict()
        for layer in layers:
            # Groups are one for each layer with experts, and such are every second. A dense layer needs the tensor
            # group alone, which all of them have in common.
            layer_groups = groups[min(layer // 2, len(groups) - 1)] if groups else None
            num_experts = config.experts_of(layer)
            layer_exchange = exchange(layer_groups, num_experts) if exchange and num_experts else None
            # Named by their number in the whole model, as a checkpoint of any split has them.
            self.blocks[str(layer)] = Block(
                config, layer, layer_groups, layer_exchange, key=(seed, "layer", layer), **like
            )

        def table(name: str, rows: int) -> nn.Parameter:
            return parameter(draw((rows, config.hidden), config.std, seed, name), like)

        # The matrix of the logits is the embedding, so that both ends of a pipeline have it.
        if self.is_first or self.is_last:
            self.embedding = table("embedding", config.vocabulary)
        if self.is_first:
            self.position = table("position", config.context)
        if self.is_last:
            self.norm = nn.LayerNorm(config.hidden, **like)

    def forward(self, x: Tensor, loss: Tensor | None = None, cache: Cache | None = None) -> Output:
        """x: tokens [B, S]; for a later pipeline stage the hidden states and the loss of the one before.

        cache  keys and values of earlier positions, which these are added to; {} to begin with
        """
        if self.is_first:
            start = next(iter(cache.values()))[0].shape[2] if cache else 0
            end = start + x.shape[1]
            if end > self.config.context:
                raise ValueError(f"TransformerLM: {end} positions, expected <= {self.config.context}")
            x = F.embedding(x, self.embedding) + self.position[start:end]
        if loss is None:
            # In float32 whatever the model's dtype: small terms are added up over the layers.
            loss = x.new_zeros((), dtype=torch.float32)
        routings = []
        for block in self.blocks.values():
            x, routing = block(x, cache)
            if routing is not None:
                loss = loss + self.config.aux_loss * routing.aux_loss + self.config.z_loss * routing.z_loss
                routings.append(routing)
        if self.is_last:
            x = F.linear(self.norm(x), self.embedding).float()
        return Output(x, loss, tuple(routings))

    @torch.no_grad()
    def generate(
        self, tokens: Tensor, num_new: int, *, temperature: float = 0.0, generator: torch.Generator | None = None
    ) -> Tensor:
        """Continue tokens [B, S] by num_new: [B, S + num_new]. Each new one is computed from the cache alone.

        temperature  0: the likeliest token; otherwise drawn from the softmax of logits / temperature by `generator`,
                     which must be in the same state on all tensor ranks

        Collective: all ranks of a model call it with as many steps, in evaluation mode if there is a capacity. With an
        eval_capacity_factor the tokens of a step share the experts' capacity, so the cache is not without effect.
        """
        # Keys and values of a position do not change with later ones, so each is computed once.
        cache: Cache = {}
        sequence = [tokens]
        for _ in range(num_new):
            # The cache has all positions but the newest.
            logits = self(sequence[-1], cache=cache).logits[:, -1]
            if temperature > 0:
                chances = (logits / temperature).softmax(-1)
                token = torch.multinomial(chances, 1, generator=generator)
            else:
                token = logits.argmax(-1, keepdim=True)
            sequence.append(token)
        return torch.cat(sequence, 1)

    def moe_layers(self) -> list[MoE]:
        """The MoE layers of this rank, first to last: the order of Output.routings."""
        return [module for module in self.modules() if isinstance(module, MoE)]


def next_token_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    """The mean cross-entropy of logits [B, S, vocabulary] and the tokens [B, S] that come next."""
    return F.cross_entropy(logits.flatten(0, 1).float(), tokens.flatten())
