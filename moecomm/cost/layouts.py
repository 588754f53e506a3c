"""Layouts: the sizes that the groups of layers with experts can have, and what each takes in time and memory.

A layer's time is that of its exchange and of its experts, less what overlaps. Every rank is the busiest: experts are
equally popular, and rows are spread evenly over the lanes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from math import gcd, prod
from typing import NamedTuple

import numpy as np

from moecomm.cost.links import GPU_NODES, Links
from moecomm.cost.model import Cost, Tokens, predict_groups, predict_relayed
from moecomm.nodes import Nodes
from moecomm.topology import Topology
from moecomm.traffic import Lanes

PASSES = {"training": (2, 3), "inference": (1, 1)}
"""How often an exchange is made, and how often experts multiply: a backward pass has two products for each."""
KEPT_WIDTHS = {2: 2, 3: 4}
"""Of an expert with so many matrices: activations as wide as its inside that the backward pass needs."""
FLOAT32 = 4
"""Bytes. Gates are float32, and so are sums of answers at least."""
MOST_COMBINATIONS = 200_000


@dataclass(frozen=True)
class Machine:
    """What the ranks run on.

    nodes      which ranks share a node
    links      between the ranks
    flops      operations a second of a rank in the products of its experts
    bandwidth  bytes a second at which a rank reads the weights of its experts
    overlap    share of the shorter of exchange and experts that is hidden behind the longer one, 0 .. 1
    chunks     pieces in which the hierarchical all-to-all sends

    Raises ValueError for rates that are not above 0, and an overlap outside 0 .. 1.
    """

    nodes: Nodes
    links: Links = GPU_NODES
    flops: float = 400e12
    bandwidth: float = 3e12
    overlap: float = 0.0
    chunks: int = 1

    def __post_init__(self) -> None:
        for name in ("flops", "bandwidth"):
            # Written so that nan is refused too.
            if not getattr(self, name) > 0:
                raise ValueError(f"Machine: {name} is {getattr(self, name)!r}, expected a number > 0")
        if not 0 <= self.overlap <= 1:
            raise ValueError(f"Machine: overlap is {self.overlap!r}, expected 0 .. 1")


@dataclass(frozen=True)
class Workload:
    """Layers with experts, and what goes through them.

    experts          of each layer: (64,), or of a pyramid (32, 32, 64)
    hidden, ffn      numbers in a row, and inside an expert
    top_k            experts of a token
    tokens           of a rank. Tensor ranks have the same tokens
    dtype_bytes      of a number in rows and weights
    matrices         of an expert: 2, or 3 for SwiGLU
    mode             "training": forward and backward pass. "inference": forward alone, without gradients and optimizer
    optimizer_bytes  of a parameter. 12: two moments and a copy of the weights in float32
    dense            parameters beside experts and gates; tensor ranks share them

    Raises ValueError for a mode or a number of matrices that there is not, and more choices than experts.
    """

    experts: tuple[int, ...]
    hidden: int
    ffn: int
    top_k: int
    tokens: int
    dtype_bytes: int = 2
    matrices: int = 2
    mode: str = "training"
    optimizer_bytes: float = 12
    dense: float = 0

    def __post_init__(self) -> None:
        if self.mode not in PASSES:
            raise ValueError(f"Workload: mode is {self.mode!r}, expected one of {', '.join(PASSES)}")
        if self.matrices not in KEPT_WIDTHS:
            raise ValueError(f"Workload: matrices is {self.matrices!r}, expected 2 or 3")
        if not self.experts or self.top_k > min(self.experts):
            raise ValueError(f"Workload: top_k is {self.top_k}, with layers of {list(self.experts)} experts")


class Sizes(NamedTuple):
    """The sizes to try. expert: None is whatever divides both the experts and the ranks."""

    tensor: Sequence[int] = (1,)
    expert_tensor: Sequence[int] = (1,)
    expert: Sequence[int] | None = None


class RankMemory(NamedTuple):
    """Bytes of a rank. activations: what the backward pass needs, or the rows of one layer; staging: of an exchange."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    staging: float = 0

    @property
    def total(self) -> float:
        """All of it at once."""
        return sum(self)


@dataclass(frozen=True)
class Option:
    """A layer in one topology by one all-to-all.

    num_nodes  on which a rank and those that it sends to lie, where they are most
    exchange   dispatch and combine, once, with the sharing of answers among tensor ranks
    terms      seconds of all passes: the parts of a Cost, "sharing", "experts", and "hidden", which is negative
    staging    bytes of a rank beside rows sent and received
    """

    topology: Topology
    all_to_all: str
    num_nodes: int
    exchange: Cost
    terms: dict[str, float]
    staging: float

    @property
    def seconds(self) -> float:
        """From start to end."""
        return sum(self.terms.values())


@dataclass(frozen=True, eq=False)
class Candidate:
    """An option for each number of experts that layers have.

    options  number of experts -> option
    layers   number of experts -> how many layers
    terms    seconds in which p * tokens tokens go through all layers. Where L ranks have the same tokens, these are L
             passes
    memory   of a rank
    """

    options: dict[int, Option]
    layers: dict[int, int]
    terms: dict[str, float]
    memory: RankMemory

    @property
    def seconds(self) -> float:
        """Those of all terms."""
        return sum(self.terms.values())

    @property
    def topologies(self) -> tuple[Topology, ...]:
        """One for each number of experts."""
        return tuple(option.topology for option in self.options.values())

    @property
    def all_to_all(self) -> str:
        """The algorithm, or flat/hierarchical where layers differ."""
        return "/".join(dict.fromkeys(option.all_to_all for option in self.options.values()))

    @property
    def sizes(self) -> tuple[float, float]:
        """Seconds and bytes: what a layout should have least of."""
        return self.seconds, self.memory.total


MemoryOf = Callable[[dict[int, Topology]], RankMemory]
"""Number of experts -> topology of these layers; the memory of a rank without staging."""


def candidates(
    machine: Machine, workload: Workload, sizes: Sizes, memory_of: MemoryOf | None = None
) -> list[Candidate]:
    """All layouts by all algorithms, the fastest first; of layouts as fast as each other, the one with least memory.

    memory_of  None: `layers_memory`

    Where layers differ, an option is left out if it differs from another in its placement or algorithm alone and is
    neither faster nor smaller. SharedAllToAll, for rows in host memory, is tried unless the links are GPU_NODES.
    Raises ValueError for a size that divides no layer's experts or not its ranks, if the tensor ranks reach all experts
    in none of the layouts, and for more than 200,000 combinations.
    """
    layers = Counter(workload.experts)
    result = []
    for tensor in sizes.tensor:
        by_layer = []
        for num_experts in layers:
            options = []
            for topology in layouts(machine.nodes.world_size, num_experts, tensor, sizes):
                options += layer_options(machine, workload, num_experts, topology)
            by_layer.append(options if len(layers) == 1 else _worthwhile(options))
        if prod(map(len, by_layer)) > MOST_COMBINATIONS:
            raise ValueError(
                f"candidates: layers of {len(layers)} sizes have {prod(map(len, by_layer)):,} combinations of layouts, "
                f"expected at most {MOST_COMBINATIONS:,}: name the sizes of expert to try"
            )
        for chosen in product(*by_layer):
            options_of = dict(zip(layers, chosen, strict=True))
            result.append(_candidate(workload, tensor, options_of, memory_of))
    if not result:
        raise ValueError("candidates: in none of the layouts do tensor ranks together reach all experts")
    return sorted(result, key=lambda candidate: candidate.sizes)


def pareto_front(best_first: Sequence[Candidate]) -> list[Candidate]:
    """Those of `candidates` that no other candidate beats in time and memory: each is smaller than all faster ones."""
    front: list[Candidate] = []
    for candidate in best_first:
        if not front or candidate.memory.total < front[-1].memory.total:
            front.append(candidate)
    return front


def layouts(world_size: int, num_experts: int, tensor: int, sizes: Sizes) -> Iterator[Topology]:
    """The topologies of a layer: each size that divides, with expert groups on neighbouring ranks and spread.

    Raises ValueError for a size that does not divide.
    """
    for expert_tensor in sizes.expert_tensor:
        # Raises what a Topology raises for tensor and expert_tensor.
        copies = Topology(world_size, tensor=tensor, expert_tensor=expert_tensor).expert_data
        common = gcd(num_experts, copies)
        divisors = [size for size in range(1, common + 1) if common % size == 0]
        for expert in divisors if sizes.expert is None else sizes.expert:
            if num_experts % expert:
                raise ValueError(
                    f"expert={expert} does not divide the {num_experts} experts; valid: {', '.join(map(str, divisors))}"
                )
            topology = Topology(world_size, tensor=tensor, expert=expert, expert_tensor=expert_tensor)
            yield topology
            # An expert group of one rank or of all ranks has nothing to spread.
            if 1 < expert < copies:
                yield Topology(
                    world_size, tensor=tensor, expert=expert, expert_tensor=expert_tensor, inner="expert_data"
                )


def layer_options(machine: Machine, workload: Workload, num_experts: int, topology: Topology) -> list[Option]:
    """A layer in one topology by each all-to-all; [] if its tensor ranks do not reach all experts together.

    With tensor ranks the exchange is a TensorParallelExchange. "relayed" is HierarchicalExchange, which is tried
    without tensor ranks; all others send a row for each assignment.
    """
    lanes = Lanes(topology)
    if lanes.incomplete():
        return []
    tensor = topology.tensor
    node_of = machine.nodes.node_of
    members = lanes.members()
    shares = lanes.shares * workload.tokens * workload.top_k
    row_bytes = workload.hidden * workload.dtype_bytes
    on_lane = predict_groups(machine.links, node_of, members, float(shares.max()) * row_bytes, chunks=machine.chunks)
    if tensor == 1 and workload.top_k > 1:
        tokens = Tokens(workload.tokens, row_bytes, workload.top_k, num_experts)
        on_lane["relayed"] = predict_relayed(machine.links, node_of, members, tokens, chunks=machine.chunks)
    answers = _answer_bytes(workload, topology, float(lanes.answers(workload.tokens, workload.top_k).max()))
    tensor_groups = np.arange(len(node_of)).reshape(-1, tensor)
    sharing = predict_groups(machine.links, node_of, tensor_groups, answers)["flat"]
    num_exchanges, _ = PASSES[workload.mode]
    nodes_of_lanes = np.sort(node_of[members], axis=1)
    num_nodes = 1 + int((np.diff(nodes_of_lanes, axis=1) > 0).sum(axis=1).max())
    rows = float(shares[members].sum(axis=1).max())
    experts = expert_seconds(machine, workload, num_experts, topology, rows)
    options = []
    for algorithm in _algorithms(machine.links, on_lane):
        exchange = on_lane[algorithm].then(on_lane[algorithm])
        terms = {name: num_exchanges * seconds for name, seconds in exchange.parts.items()}
        terms["sharing"] = 0.0
        if tensor > 1:
            exchange = exchange.then(sharing)
            terms["sharing"] = num_exchanges * sharing.seconds
        terms["experts"] = experts
        terms["hidden"] = -machine.overlap * min(experts, num_exchanges * exchange.seconds)
        staging = exchange.staging + tensor * answers
        options.append(Option(topology, algorithm, num_nodes, exchange, terms, staging))
    return options


def expert_seconds(machine: Machine, workload: Workload, num_experts: int, topology: Topology, rows: float) -> float:
    """Seconds in which a rank multiplies its rows with its experts, in all passes.

    The products at the machine's rate or, where rows are few, the weights of the experts that have rows, read once.
    """
    parameters = workload.matrices * workload.hidden * workload.ffn / topology.expert_tensor
    products = 2 * rows * parameters / machine.flops
    num_used = min(num_experts / topology.expert, rows)
    reading = num_used * parameters * workload.dtype_bytes / machine.bandwidth
    _, num_products = PASSES[workload.mode]
    return num_products * max(products, reading)


def layers_memory(workload: Workload, topologies: dict[int, Topology]) -> RankMemory:
    """The memory of a rank for layers with experts and `workload.dense` other parameters, without activations of these.

    topologies  number of experts -> that of the layers

    As nn.memory_estimate has it, which knows whole models.
    """
    h = workload.hidden
    parameters = gates = 0.0
    activations = []
    for num_experts in workload.experts:
        topology = topologies[num_experts]
        width = workload.ffn // topology.expert_tensor
        # Two matrices have biases: one for each number inside, and one for each number of the row on one slice.
        of_expert = (2 * h + 1) * width + h if workload.matrices == 2 else 3 * h * width
        parameters += num_experts // topology.expert * of_expert
        gates += num_experts
        rows = workload.tokens * workload.top_k * topology.expert_tensor / topology.tensor
        kept = rows * (h + KEPT_WIDTHS[workload.matrices] * width) + rows * h
        activations.append(workload.dtype_bytes * kept)
        parameters_beside = workload.dense / topology.tensor
    parameters += parameters_beside
    gradients = workload.dtype_bytes * parameters + FLOAT32 * gates * h
    # A gate has a bias beside its weights, which balancing moves.
    weights = gradients + FLOAT32 * gates
    if workload.mode == "inference":
        # One layer's rows are freed before those of the next.
        return RankMemory(weights, 0, 0, max(activations))
    return RankMemory(weights, gradients, workload.optimizer_bytes * (parameters + gates * h), sum(activations))


def _algorithms(links: Links, on_lane: dict[str, Cost]) -> list[str]:
    """What is worth a line: two hops only where a lane has several nodes and several ranks on one of them."""
    inside, between = on_lane["flat"].messages
    names = ["flat"]
    if inside and between:
        names += [name for name in ("hierarchical", "relayed") if name in on_lane]
    # SharedAllToAll moves rows in host memory: the assumed machine has its rows on GPUs.
    if links != GPU_NODES:
        names.append("shared")
    return names


def _answer_bytes(workload: Workload, topology: Topology, answers: float) -> float:
    """Bytes that a rank sends to each tensor rank to share its answers; 0 without tensor ranks."""
    tensor = topology.tensor
    if tensor == 1:
        return 0
    # An all-reduce, where it is shorter, moves what a gather of 2 / L of the tokens from each rank does.
    answers = min(answers, 2 * workload.tokens / tensor)
    # Answers of several experts or slices are sums, which are shared in float32 at least.
    is_sum = workload.top_k * topology.expert_tensor > 1
    return answers * workload.hidden * max(workload.dtype_bytes, FLOAT32 if is_sum else 0)


def _worthwhile(options: list[Option]) -> list[Option]:
    """Without those that another option of the same sizes beats: sizes decide all memory but staging."""
    by_sizes: dict[tuple[int, int], list[Option]] = {}
    for option in sorted(options, key=lambda option: (option.seconds, option.staging)):
        key = (option.topology.expert, option.topology.expert_tensor)
        faster = by_sizes.setdefault(key, [])
        if not faster or option.staging < faster[-1].staging:
            faster.append(option)
    return [option for faster in by_sizes.values() for option in faster]


def _candidate(workload: Workload, tensor: int, options: dict[int, Option], memory_of: MemoryOf | None) -> Candidate:
    layers = dict(Counter(workload.experts))
    names = next(iter(options.values())).terms
    terms = {
        name: tensor * sum(layers[num_experts] * option.terms[name] for num_experts, option in options.items())
        for name in names
    }
    topologies = {num_experts: option.topology for num_experts, option in options.items()}
    memory = layers_memory(workload, topologies) if memory_of is None else memory_of(topologies)
    staging = max(option.staging for option in options.values())
    return Candidate(options, layers, terms, memory._replace(staging=staging))
