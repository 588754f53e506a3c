"""The right calls of a case and the answers that they must give, known to every rank from the seed alone.

A unit is a generator of steps, one public call each; it is sent what the call returned. Rows are
(turn, source, destination, place), so a wrong one says where and when it comes from; weights and tokens are small whole
numbers, so that sums are exact in any order.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from case import Case

from moecomm import (
    AutoAllToAll,
    Comm,
    FlatAllToAll,
    HierarchicalAllToAll,
    Nodes,
    RoutedExchange,
    Routing,
    SharedAllToAll,
    TensorParallelExchange,
)
from moecomm.exchange import HierarchicalExchange

K, HIDDEN, EXPERTS_PER_RANK, MOST_TOKENS = 3, 4, 2, 5
SLICES = 2
"""Tensor ranks, in the cases with lanes: an even number of ranks, and ranks 2 i and 2 i + 1 hold the same tokens."""


@dataclass
class Step:
    """One call. `wanted` is what `read` must find in the result; None: nothing is compared."""

    name: str
    function: Callable[..., Any]
    arguments: dict[str, Any] = field(default_factory=dict)
    wanted: Any = None
    read: Callable[[Any], Any] = lambda result: result

    def run(self) -> tuple[Any, str]:
        """The result, and "right" or what is wrong with it."""
        result = self.function(**self.arguments)
        if self.wanted is None:
            return result, "right"
        found = as_numpy(self.read(result))
        is_right = found.shape == self.wanted.shape and (found == self.wanted).all()
        return result, "right" if is_right else f"wrong: {found.tolist()}, expected {self.wanted.tolist()}"


Unit = Generator[Step, Any, None]


class World:
    """One rank's Comm and what is made over it, when it is first asked for: by all ranks at the same place."""

    def __init__(self, comm: Comm, case: Case, use_torch: bool) -> None:
        self.comm = comm
        self.case = case
        self.rank = comm.rank
        self.size = comm.size
        self.use_torch = use_torch
        self.nodes = random_nodes(case.random(1), comm.size)

    def make(self, array: np.ndarray) -> Any:
        """The kind of array that this case moves."""
        if not self.use_torch:
            return array
        import torch

        return torch.from_numpy(array)

    def counts(self, turn: int) -> np.ndarray:
        """[p, p] rows from each rank to each."""
        return self.case.random(2, turn).integers(0, 4, (self.size, self.size))

    def sent(self, counts: np.ndarray, turn: int) -> Any:
        """Rows of this rank, by destination."""
        return self.make(rows_between(counts, turn, [self.rank], range(self.size)))

    def received(self, counts: np.ndarray, turn: int) -> np.ndarray:
        """Rows for this rank, by source."""
        return rows_between(counts, turn, range(self.size), [self.rank])

    def all_to_all(self, name: str, comm: Any = None) -> Any:
        """A new one. Collective."""
        comm = self.comm if comm is None else comm
        nodes = self.nodes if comm.size == self.size else Nodes.of_size(2, comm.size)
        return {
            "flat": lambda: FlatAllToAll(comm),
            "hierarchical": lambda: HierarchicalAllToAll(comm, nodes),
            "shared": lambda: SharedAllToAll(comm, nodes),
            "auto": lambda: AutoAllToAll(comm, nodes),
        }[name]()

    @cached_property
    def algorithms(self) -> dict[str, Any]:
        """Those that are in use, by name."""
        return {}

    def algorithm(self, name: str) -> Any:
        if name not in self.algorithms:
            self.algorithms[name] = self.all_to_all(name)
        return self.algorithms[name]

    def exchange(self, name: str) -> Any:
        if name not in self.algorithms:
            self.algorithms[name] = self._exchange(name)
        return self.algorithms[name]

    def _exchange(self, name: str) -> Any:
        if name == "two_hops":
            return HierarchicalExchange(self.algorithm("hierarchical"), EXPERTS_PER_RANK)
        if name == "lanes":
            self.tensor = self.comm.split(self.rank // SLICES)
            self.lane = self.comm.split(self.rank % SLICES)
            inner = RoutedExchange(self.all_to_all("flat", self.lane), lane_experts(self.rank % SLICES, self.lane.size))
            return TensorParallelExchange(inner, self.tensor)
        algorithm, send = name.split("_")
        return RoutedExchange(self.algorithm(algorithm), EXPERTS_PER_RANK, send=send)  # type: ignore[arg-type]

    def prepare(self, unit: str) -> None:
        """Make what a unit needs, on all ranks. Collective."""
        name, _, form = unit.partition("_")
        if form in ("even", "uneven", "routes"):
            self.algorithm(name)
        elif form in ("assignments", "tokens") or unit in ("two_hops", "lanes"):
            self.exchange(unit)

    def comms(self) -> list[Comm]:
        """All that this rank's calls go through."""
        return [self.comm, *(comm for comm in (getattr(self, "tensor", None), getattr(self, "lane", None)) if comm)]


def random_nodes(random: np.random.Generator, size: int) -> Nodes:
    """Any partition: blocks, cyclic, ragged."""
    num_nodes = int(random.integers(1, size + 1))
    node = random.integers(0, num_nodes, size)
    return Nodes([np.flatnonzero(node == i).tolist() for i in np.unique(node)])


def lane_experts(lane: int, lane_size: int) -> list[list[int]]:
    """The experts of each rank of a lane: rank r of the world has EXPERTS_PER_RANK from EXPERTS_PER_RANK * r on."""
    ranks = [SLICES * i + lane for i in range(lane_size)]
    return [list(range(EXPERTS_PER_RANK * r, EXPERTS_PER_RANK * (r + 1))) for r in ranks]


def rows_between(counts: np.ndarray, turn: int, sources: Any, destinations: Any) -> np.ndarray:
    rows = [(turn, s, d, i) for s in sources for d in destinations for i in range(counts[s, d])]
    return np.array(rows, np.int64).reshape(-1, 4)


def as_numpy(value: Any) -> np.ndarray:
    return value.detach().numpy() if hasattr(value, "detach") else np.asarray(value)


# ---- a Comm's own ----------------------------------------------------------------------------------------------------


def equal_blocks(world: World, turn: int) -> Unit:
    counts = np.full((world.size, world.size), 2)
    arguments = {"rows": world.sent(counts, turn)}
    yield Step("comm.all_to_all", world.comm.all_to_all, arguments, world.received(counts, turn))


def uneven_blocks(world: World, turn: int) -> Unit:
    counts = world.counts(turn)
    arguments = {"rows": world.sent(counts, turn), "send_counts": counts[world.rank]}
    arguments["recv_counts"] = counts[:, world.rank].copy()
    yield Step("comm.all_to_allv", world.comm.all_to_all, arguments, world.received(counts, turn))


def gather(world: World, turn: int) -> Unit:
    rows = [np.array([[turn, rank, 0, i] for i in range(2)]) for rank in range(world.size)]
    arguments = {"rows": world.make(rows[world.rank])}
    yield Step("comm.all_gather", world.comm.all_gather, arguments, np.concatenate(rows))


def uneven_gather(world: World, turn: int) -> Unit:
    counts = world.counts(turn)[0]
    rows = [np.array([[turn, rank, 0, i] for i in range(n)], np.int64).reshape(-1, 4) for rank, n in enumerate(counts)]
    arguments = {"rows": world.make(rows[world.rank]), "recv_counts": counts}
    yield Step("comm.all_gatherv", world.comm.all_gather, arguments, np.concatenate(rows))


def reduce(world: World, turn: int) -> Unit:
    parts = [np.array([turn, 1 << rank, rank], np.float64) for rank in range(world.size)]
    yield Step("comm.all_reduce", world.comm.all_reduce, {"array": world.make(parts[world.rank])}, sum(parts))


def barrier(world: World, turn: int) -> Unit:
    yield Step("comm.barrier", world.comm.barrier)


def node_key(world: World, turn: int) -> Unit:
    yield Step("comm.node_key", world.comm.node_key)


def split(world: World, turn: int) -> Unit:
    part = yield Step("comm.split", world.comm.split, {"color": world.rank % 2}, None)
    members = np.arange(world.rank % 2, world.size, 2)
    arguments = {"rows": world.make(np.array([world.rank + 1000 * turn]))}
    yield Step("split.all_gather", part.all_gather, arguments, members + 1000 * turn)


# ---- all-to-all ------------------------------------------------------------------------------------------------------


def even_form(name: str) -> Callable[[World, int], Unit]:
    def unit(world: World, turn: int) -> Unit:
        counts = np.ones((world.size, world.size), np.int64)
        arguments = {"x": world.sent(counts, turn)}
        yield Step(f"{name}.even", world.algorithm(name), arguments, world.received(counts, turn))

    return unit


def uneven_form(name: str) -> Callable[[World, int], Unit]:
    def unit(world: World, turn: int) -> Unit:
        counts = world.counts(turn)
        arguments = {"rows": world.sent(counts, turn), "send_counts": counts[world.rank]}
        wanted = world.received(counts, turn)
        yield Step(f"{name}.rows", world.algorithm(name).rows, arguments, wanted, lambda result: result[0])

    return unit


def routes(name: str) -> Callable[[World, int], Unit]:
    """Two routes, so that one rank may take the other one."""

    def unit(world: World, turn: int) -> Unit:
        algorithm = world.algorithm(name)
        made = []
        for i in range(2):
            counts = world.counts(1000 * turn + i)
            step = Step(f"{name}.route", algorithm.route, {"counts": counts[world.rank]}, counts[:, world.rank])
            step.function = lambda counts: algorithm.route(counts)
            step.read = lambda route: route.recv_counts
            route = yield step
            made.append((counts, route))
        (counts, route), (_, other) = made
        sent, received = world.sent(counts, turn), world.received(counts, turn)
        arguments = {"rows": sent, "route": route, "_other": (world.sent(made[1][0], turn), other)}
        yield Step(f"{name}.send", _without_other(algorithm.send), arguments, received)
        arguments = {"rows": world.make(received), "route": route}
        arguments["_other"] = world.make(world.received(made[1][0], turn)), other
        yield Step(f"{name}.send_back", _without_other(algorithm.send_back), arguments, as_numpy(sent))

    return unit


def _without_other(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda rows, route, _other: function(rows, route)


def construction(name: str) -> Callable[[World, int], Unit]:
    """An algorithm is made, used once and freed."""

    def unit(world: World, turn: int) -> Unit:
        classes = {"hierarchical": HierarchicalAllToAll, "shared": SharedAllToAll, "auto": AutoAllToAll}
        made = yield Step(f"{name}.make", classes[name], {"comm": world.comm, "nodes": world.nodes})
        counts = np.ones((world.size, world.size), np.int64)
        yield Step(f"{name}.first", made, {"x": world.sent(counts, turn)}, world.received(counts, turn))
        yield Step(f"{name}.free", made.free)

    return unit


# ---- exchanges -------------------------------------------------------------------------------------------------------


def tokens(world: World, turn: int) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """For each group of ranks with the same tokens: x [T, H], expert [T, K], weight [T, K]."""
    random = world.case.random(3, turn)
    num_experts = EXPERTS_PER_RANK * world.size
    k = min(K, num_experts)
    batches = []
    for _ in range(world.size):
        num_tokens = int(random.integers(0, MOST_TOKENS))
        expert = np.array([random.permutation(num_experts)[:k] for _ in range(num_tokens)], np.int64)
        expert = np.where(random.random((num_tokens, k)) < 0.1, -1, expert.reshape(num_tokens, k))
        x = random.integers(-9, 9, (num_tokens, HIDDEN)) + 100.0 * turn
        batches.append((x, expert, random.integers(1, 4, (num_tokens, k)).astype(np.float64)))
    return batches


def dispatch_and_combine(name: str) -> Callable[[World, int], Unit]:
    def unit(world: World, turn: int) -> Unit:
        exchange = world.exchange(name)
        batches = tokens(world, turn)
        has_lanes = name == "lanes"
        x, expert, weight = batches[world.rank // SLICES if has_lanes else world.rank]
        sources = range(world.size // SLICES) if has_lanes else range(world.size)
        experts = [EXPERTS_PER_RANK * world.rank + i for i in range(EXPERTS_PER_RANK)]
        arguments = {"x": world.make(x), "routing": Routing(expert, world.make(weight))}
        if world.use_torch:
            arguments["x"].requires_grad_()
        wanted = [batches[s][0][t] for e in experts for s in sources for t in np.nonzero(batches[s][1] == e)[0]]
        owner = [e for e in experts for s in sources for _ in np.nonzero(batches[s][1] == e)[0]]
        step = Step(f"{name}.dispatch", exchange.dispatch, arguments, np.array(wanted).reshape(-1, HIDDEN))
        step.read = lambda result: result[0]
        rows, plan = yield step
        factor = np.array(owner, np.float64).reshape(-1, 1) + 2
        arguments = {"rows": rows * world.make(factor), "plan": plan}
        times = (np.where(expert >= 0, weight * (expert + 2), 0)).sum(axis=1, keepdims=True)
        y = yield Step(f"{name}.combine", exchange.combine, arguments, x * times)
        if world.use_torch:
            leaf = step.arguments["x"]
            wanted_gradient = np.broadcast_to(times, x.shape)
            yield Step(f"{name}.backward", y.sum().backward, {}, wanted_gradient, lambda _: leaf.grad)

    return unit


UNITS: dict[str, Callable[[World, int], Unit]] = {
    "equal_blocks": equal_blocks,
    "uneven_blocks": uneven_blocks,
    "gather": gather,
    "uneven_gather": uneven_gather,
    "reduce": reduce,
    "barrier": barrier,
    "node_key": node_key,
    "split": split,
    **{f"{name}_even": even_form(name) for name in ("flat", "hierarchical", "shared", "auto")},
    **{f"{name}_uneven": uneven_form(name) for name in ("flat", "hierarchical", "shared", "auto")},
    **{f"{name}_routes": routes(name) for name in ("flat", "hierarchical", "shared", "auto")},
    **{f"{name}_construction": construction(name) for name in ("hierarchical", "shared", "auto")},
    "flat_assignments": dispatch_and_combine("flat_assignments"),
    "flat_tokens": dispatch_and_combine("flat_tokens"),
    "hierarchical_assignments": dispatch_and_combine("hierarchical_assignments"),
    "hierarchical_tokens": dispatch_and_combine("hierarchical_tokens"),
    "shared_assignments": dispatch_and_combine("shared_assignments"),
    "auto_tokens": dispatch_and_combine("auto_tokens"),
    "two_hops": dispatch_and_combine("two_hops"),
    "lanes": dispatch_and_combine("lanes"),
}


def num_steps(name: str, use_torch: bool) -> int:
    """Steps of a unit in which all ranks call the same Comm."""
    if name.endswith("_routes"):
        return 4
    if name.endswith("_construction"):
        return 3
    return (3 if use_torch else 2) if name.endswith(("_assignments", "_tokens", "two_hops", "lanes")) else 1


def fits(name: str, size: int, use_torch: bool) -> bool:
    """Whether a unit is for that many ranks and that kind of array."""
    return name != "lanes" or size % SLICES == 0


def random_size(random: np.random.Generator, transport: str, name: str) -> int:
    """2 .. 5 ranks; an even number for lanes."""
    if name == "lanes":
        return 4
    return int(random.integers(2, 6 if transport == "threads" else 5))
