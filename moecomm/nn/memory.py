"""How much memory a rank needs to train a model, before there is one: arithmetic alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import NamedTuple

import torch

from moecomm.gating import expert_capacity
from moecomm.nn.configs import Config
from moecomm.topology import Topology


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank."""

    weights: int
    """Of parameters and buffers."""
    gradients: int
    optimizer: int
    activations: int
    """Of a micro-batch, between its forward and its backward pass: what the latter needs, and the logits."""
    buffers: int
    """The most that is there beside all these for a moment: gradients of the logits or of one layer's rows or experts,
    or the copies in which gradients are summed over the ranks."""

    @property
    def total(self) -> int:
        """The peak of a step."""
        return sum(astuple(self))


def memory_estimate(
    config: Config, topology: Topology | Sequence[Topology], *, sequences: int, length: int | None = None,
    skew: float = 1.0, states: int = 2, dtype: torch.dtype = torch.float32, rank: int = 0,
) -> Memory:  # fmt: skip
    """The memory of a training step of TransformerLM(config), its gradients summed up over several micro-batches.

    topology   of all layers, or of each layer with experts: as `layer_topologies` gives them
    sequences  of a micro-batch of this rank's tensor group
    length     of a sequence; None: config.context
    skew       how many times its even share of the rows comes to this rank's experts
    states     tensors that the optimizer keeps of each parameter: 2 for Adam, 1 for SGD with momentum
    dtype      of weights and activations. Gates and logits are float32
    rank       whose memory: it decides the pipeline stage

    Of one micro-batch at a time: a pipeline schedule that has several under way keeps the activations of each. Without
    the index tables of an exchange, some 40 bytes a row in host memory, and what libraries allocate for themselves.
    Raises ValueError for topologies that are not one for each layer with experts, stages that cannot share the layers,
    or a rank that the topologies do not have.
    """
    topologies = [topology] * max(1, len(config.experts)) if isinstance(topology, Topology) else list(topology)
    if len(topologies) != max(1, len(config.experts)):
        raise ValueError(f"memory_estimate: got {len(topologies)} topologies, expected {max(1, len(config.experts))}")
    first, size = topologies[0], dtype.itemsize
    if config.num_layers % first.pipeline:
        raise ValueError(
            f"memory_estimate: {config.num_layers} layers, which pipeline={first.pipeline} stages cannot share"
        )
    tokens = sequences * (config.context if length is None else length)
    stage, each = first.coords(rank)["pipeline"], config.num_layers // first.pipeline
    needs, gates, experts = [], 0, dict.fromkeys(topologies, 0)
    for layer in range(stage * each, (stage + 1) * each):
        needs.append(_attention(config, tokens, first.tensor, size))
        count = config.experts_of(layer)
        if not count or config.residual != "none":
            needs.append(_mlp(config, tokens, first.tensor, size))
        if count:
            mine = topologies[layer // 2]
            needs.append(_moe(config, tokens, count, mine, skew, size))
            gates += count
            part = (mine.coords(rank)["expert_tensor"], mine.expert_tensor)
            experts[mine] += count // mine.expert * config.num_in_expert(part)
    dense, kept = (sum(need[i] for need in needs) for i in range(2))
    buffers = max(need.moment for need in needs)
    h, vocabulary = config.hidden, config.vocabulary
    if stage == 0:
        dense, kept = dense + config.context * h, kept + 8 * tokens
    if stage in (0, first.pipeline - 1):
        dense += vocabulary * h
    if stage == first.pipeline - 1:  # norm, logits, their log-softmax
        dense, kept = dense + 2 * h, kept + tokens * (2 * size * h + 8 * vocabulary + 8)
        freed = tokens * (2 * size * h + 4 * vocabulary)  # when the backward pass comes to a layer
        buffers = max(buffers - freed, 8 * tokens * vocabulary)
    if first.world_size > 1:  # the copies of reduce_gradients; there are no activations then
        buffers = max(buffers, size * max(2 * dense, 3 * max(experts.values())) - kept)
    gradients = size * (dense + sum(experts.values())) + 4 * gates * h
    return Memory(gradients + 4 * gates, gradients, states * gradients, kept, buffers)


class _Need(NamedTuple):
    """Of a part of the model.

    dense   numbers in weights, gates and experts aside
    kept    bytes of activations
    moment  bytes that its backward pass needs at once
    """

    dense: int
    kept: int
    moment: int = 0


def _attention(config: Config, tokens: int, lanes: int, size: int) -> _Need:
    """With both norms of a layer: their inputs, outputs and statistics; q, k, v and what comes of them."""
    h = config.hidden
    kept = size * tokens * (4 * h + 4 * h // lanes) + 4 * tokens * (4 + config.heads // lanes)
    return _Need((4 * h + 3) * h // lanes + 5 * h, kept)


def _widths(config: Config) -> tuple[int, int]:
    """Of a feed-forward layer: how many activations as wide as it are kept, how many gradients are there at once."""
    return (4, 3) if config.activation == "swiglu" else (2, 2)


def _mlp(config: Config, tokens: int, lanes: int, size: int) -> _Need:
    h, width, (kept, passing) = config.hidden, config.ffn // lanes, _widths(config)
    return _Need(config.num_in_mlp(lanes), size * tokens * kept * width, size * tokens * (h + passing * width))


def _moe(config: Config, tokens: int, count: int, topology: Topology, skew: float, size: int) -> _Need:
    """Rows at the experts and answers at home; logits and tables of the gate; what "learned" weights."""
    h, width, (kept, passing) = config.hidden, config.ffn // topology.expert_tensor, _widths(config)
    sent = tokens * config.top_k * topology.expert_tensor // topology.tensor
    rows = int(sent * skew)
    if topology.expert * topology.tensor * topology.expert_tensor == 1 and config.capacity_factor is not None:
        sent = rows = count * expert_capacity(tokens, count, config.top_k, factor=config.capacity_factor)
    learned = config.residual == "learned"
    of_rows = size * (rows * (h + kept * width) + sent * h)
    of_gate = 4 * (tokens * (count + 4 * config.top_k + 1) + sent)
    weight = size * count // topology.expert * h * width
    return _Need(
        learned * (2 * h + 2),
        of_rows + of_gate + learned * 2 * tokens * (size * h + 4),
        max(size * rows * (h + passing * width), 2 * weight),  # a weight's gradients one by one, then as one bank
    )
