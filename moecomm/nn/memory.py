"""How much memory a rank needs to train a model, before there is one: arithmetic alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass

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
    """The most that is there beside all these for a moment: the gradient of the logits or of a layer's experts, rows
    that travel, or the copies in which gradients are summed over the ranks."""

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
    the index tables of an exchange, some 40 bytes a row in host memory, and whatever libraries allocate for themselves.
    """
    topologies = [topology] * max(1, len(config.experts)) if isinstance(topology, Topology) else list(topology)
    if len(topologies) != max(1, len(config.experts)):
        raise ValueError(f"memory_estimate: got {len(topologies)} topologies, expected {max(1, len(config.experts))}")
    first, size = topologies[0], dtype.itemsize
    stage, stages, lanes = first.coords(rank)["pipeline"], first.pipeline, first.tensor
    length = config.context if length is None else length
    h, f, tokens = config.hidden, config.ffn, sequences * length
    swiglu, is_last = config.activation == "swiglu", stage == stages - 1
    mlp = (3 if swiglu else 2) * h * f // lanes + (2 if swiglu else 1) * f // lanes + h
    inner, passing = (
        (4, 3) if swiglu else (2, 2)
    )  # activations as wide as a feed-forward layer; gradients of them at once
    dense, gates, kept, buffers = 0, 0, 0, 0
    experts: dict[Topology, int] = {}
    each = config.num_layers // stages
    for layer in range(stage * each, (stage + 1) * each):
        count = config.experts_of(layer)
        dense += 4 * h * h // lanes + 3 * h // lanes + 5 * h
        kept += size * tokens * (4 * h + 4 * h // lanes) + 4 * tokens * (4 + config.heads // lanes)
        if not count or config.residual != "none":
            dense += mlp
            kept += size * tokens * inner * f // lanes
            buffers = max(buffers, size * tokens * (h + passing * f // lanes))
        if count:
            mine = topologies[layer // 2]
            bank = _Bank(config, count, mine, tokens, skew)
            is_first_slice = mine.coords(rank)["expert_tensor"] == 0
            experts[mine] = experts.get(mine, 0) + bank.numbers(config, is_first_slice)
            gates += count * h
            dense += 2 * h + 2 if config.residual == "learned" else 0
            kept += size * (bank.rows * (h + inner * f // mine.expert_tensor) + bank.sent * h)
            kept += 4 * (tokens * (count + 4 * config.top_k + 1) + bank.sent)
            kept += 2 * tokens * (size * h + 4) if config.residual == "learned" else 0
            of_rows = bank.rows * (h + passing * f // mine.expert_tensor)
            buffers = max(buffers, size * of_rows, 2 * size * bank.matrix)
    dense += config.vocabulary * h if stage == 0 or is_last else 0
    dense += config.context * h if stage == 0 else 0
    kept += 8 * tokens if stage == 0 else 0
    if is_last:
        dense += 2 * h
        kept += tokens * (2 * size * h + 8 + 8 * config.vocabulary)
        freed = tokens * (2 * size * h + 4 * config.vocabulary)  # before the backward pass comes to a layer
        buffers = max(buffers - freed, 8 * tokens * config.vocabulary)
    if first.world_size > 1:  # the copies of reduce_gradients: when it runs, there are no activations
        buffers = max(buffers, size * max(2 * dense, 3 * max(experts.values(), default=0)) - kept)
    parameters = size * (dense + sum(experts.values())) + 4 * gates
    biases = 4 * sum(config.experts_of(layer) for layer in range(stage * each, (stage + 1) * each))
    return Memory(parameters + biases, parameters, states * parameters, kept, buffers)


class _Bank:
    """The experts of one layer on one rank.

    rows    that come to them; sent: that this rank sends
    matrix  numbers in the [experts, hidden, ffn] of one of their weights
    """

    def __init__(self, config: Config, count: int, topology: Topology, tokens: int, skew: float) -> None:
        slices = topology.expert_tensor
        self.local = count // topology.expert
        self.matrix = self.local * config.hidden * config.ffn // slices
        self.sent = tokens * config.top_k * slices // topology.tensor
        self.rows = int(self.sent * skew)
        if topology.expert == topology.tensor == slices == 1 and config.capacity_factor is not None:
            capacity = expert_capacity(tokens, count, config.top_k, factor=config.capacity_factor)
            self.sent = self.rows = count * capacity  # places that no token fills are rows too
        self.slices = slices

    def numbers(self, config: Config, is_first_slice: bool) -> int:
        """In all their weights."""
        if config.activation == "swiglu":
            return 3 * self.matrix
        return 2 * self.matrix + self.local * (config.ffn // self.slices + is_first_slice * config.hidden)
