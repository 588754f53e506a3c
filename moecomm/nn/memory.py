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
    config: Config,
    topology: Topology | Sequence[Topology],
    *,
    sequences: int,
    length: int | None = None,
    skew: float = 1.0,
    states: int = 2,
    dtype: torch.dtype = torch.float32,
    rank: int = 0,
) -> Memory:
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
    topologies = _one_for_each_layer(config, topology)
    axes = topologies[0]
    stage = axes.coords(rank)["pipeline"]
    layers = config.layers_of(stage, axes.pipeline, "memory_estimate")
    dense = config.num_in_ends(stage, axes.pipeline)
    dense += sum(config.num_dense(layer, axes.tensor) for layer in layers)
    gates, experts = _experts(config, topologies, layers, rank)
    tokens = sequences * (config.context if length is None else length)
    size = dtype.itemsize
    activations, buffers = _passes(config, topologies, layers, tokens, skew, size)
    if axes.world_size > 1:
        # The copies in which reduce_gradients adds up: the activations are gone then, and leave room for them.
        copies = size * max(2 * dense, 3 * max(experts.values()))
        buffers = max(buffers, copies - activations)
    # Gates are float32 whatever the model is. Each expert has a bias beside them, 4 bytes, which is no parameter.
    gradients = size * (dense + sum(experts.values())) + 4 * gates
    weights = gradients + 4 * gates // config.hidden
    return Memory(weights, gradients, states * gradients, activations, buffers)


def _one_for_each_layer(config: Config, topology: Topology | Sequence[Topology]) -> list[Topology]:
    """The topologies of the layers with experts. Raises ValueError if they are not as many."""
    count = max(1, len(config.experts))
    topologies = [topology] * count if isinstance(topology, Topology) else list(topology)
    if len(topologies) != count:
        raise ValueError(f"memory_estimate: got {len(topologies)} topologies, expected {count}")
    return topologies


def _experts(config: Config, topologies: list[Topology], layers: range, rank: int) -> tuple[int, dict[Topology, int]]:
    """Numbers in the gates of the layers, and in the experts of this rank. Those of a topology are reduced together."""
    gates = 0
    experts = dict.fromkeys(topologies, 0)
    for layer in layers:
        num_experts = config.experts_of(layer)
        if num_experts:
            gates += num_experts * config.hidden
            topology = topologies[layer // 2]
            portion = (topology.coords(rank)["expert_tensor"], topology.expert_tensor)
            experts[topology] += num_experts // topology.expert * config.num_in_expert(portion)
    return gates, experts


class _Need(NamedTuple):
    """Bytes that a layer needs besides its weights.

    activations  what the backward pass reads
    backward     what its backward pass needs at once
    """

    activations: int
    backward: int = 0


def _passes(config: Config, topologies: list[Topology], layers: range, tokens: int, skew: float, size: int) -> _Need:
    """What the forward and the backward pass of a pipeline stage need."""
    lanes = topologies[0].tensor
    needs = []
    for layer in layers:
        needs.append(_attention(config, tokens, lanes, size))
        num_experts = config.experts_of(layer)
        # An MLP's input is the output of the norm, which _attention counts.
        if not num_experts or config.residual != "none":
            needs.append(_feed_forward(config, tokens, config.ffn // lanes, size))
        if num_experts:
            needs.append(_moe(config, tokens, num_experts, topologies[layer // 2], skew, size))
    activations = sum(need.activations for need in needs)
    backward = max(need.backward for need in needs)
    if layers.start == 0:
        # The embedding's backward pass reads the ids of the tokens.
        activations += 8 * tokens
    if layers.stop == config.num_layers:
        logits = tokens * config.vocabulary
        activations += tokens * (2 * size * config.hidden + 8) + 8 * logits
        # Of these most are gone when the backward pass comes to a layer.
        freed = tokens * 2 * size * config.hidden + 4 * logits
        backward = max(backward - freed, 8 * logits)
    return _Need(activations, backward)


def _attention(config: Config, tokens: int, lanes: int, size: int) -> _Need:
    """With both norms of a layer: their inputs, outputs and statistics; q, k, v and what comes of them."""
    h = config.hidden
    # Float32 of each token: mean and deviation of two norms, and of each head the sum of its softmax.
    statistics = 4 * tokens * (4 + config.heads // lanes)
    activations = size * tokens * (4 * h + 4 * h // lanes)
    return _Need(activations + statistics)


def _feed_forward(config: Config, rows: int, width: int, size: int) -> _Need:
    """What is as wide as the inside of an MLP or expert; the gradients of it, and that of the input."""
    activations, gradients = (4, 3) if config.activation == "swiglu" else (2, 2)
    return _Need(
        size * rows * activations * width,
        size * rows * (config.hidden + gradients * width),
    )


def _moe(
    config: Config,
    tokens: int,
    num_experts: int,
    topology: Topology,
    skew: float,
    size: int,
) -> _Need:
    """Rows at the experts and answers at home; logits and tables of the gate; what "learned" weights."""
    h = config.hidden
    width = config.ffn // topology.expert_tensor
    sent = tokens * config.top_k * topology.expert_tensor // topology.tensor
    rows = int(sent * skew)
    alone = topology.expert * topology.tensor * topology.expert_tensor == 1
    if alone and config.capacity_factor is not None:
        # LocalExchange has a row for each place of each expert, filled or not.
        sent = rows = num_experts * expert_capacity(tokens, num_experts, config.top_k, factor=config.capacity_factor)
    inner = _feed_forward(config, rows, width, size)
    activations = inner.activations + size * (rows + sent) * h
    # Of the gate: float32 logits, and tables of int32 for tokens and rows.
    activations += 4 * (tokens * (num_experts + 4 * config.top_k + 1) + sent)
    if config.residual == "learned":
        activations += 2 * tokens * (size * h + 4)
    # The gradients of a weight are made expert by expert, then put together as one bank.
    banks = 2 * size * num_experts // topology.expert * h * width
    return _Need(activations, max(inner.backward, banks))
