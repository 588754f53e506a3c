"""What bench/exchange.py compares, and what it sends."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import harness
import numpy as np
from numpy.typing import NDArray

from moecomm import (
    AllToAll,
    Comm,
    FlatAllToAll,
    Groups,
    HierarchicalAllToAll,
    Nodes,
    Plan,
    RoutedExchange,
    Routing,
    TensorParallelExchange,
    Topology,
    build_groups,
)
from moecomm.exchange import HierarchicalExchange, StaticExchange, StaticHierarchicalExchange

ALGORITHMS: dict[str, Callable[[Comm, Nodes], AllToAll]] = {
    "flat": lambda comm, nodes: FlatAllToAll(comm),
    "hierarchical": HierarchicalAllToAll,
}

SENDS = ("assignments", "tokens", "nodes", "static", "static_nodes")


def ways(sends: list[str]) -> list[tuple[str, str]]:
    """(algorithm, send) to compare: one row for each token and node takes two hops."""
    return [(name, send) for name in ALGORITHMS for send in sends if name != "flat" or "nodes" not in send]


def exchange_over(all_to_all: AllToAll, experts: list[list[int]], send: Any, max_tokens: int) -> RoutedExchange:
    """What sends a row for each assignment, for each token and rank, or node; "static": in blocks of one size."""
    if send == "static":
        return StaticExchange(all_to_all, experts, max_tokens)
    if send in ("nodes", "static_nodes"):
        assert isinstance(all_to_all, HierarchicalAllToAll)
        if send == "static_nodes":
            return StaticHierarchicalExchange(all_to_all, experts, max_tokens)
        return HierarchicalExchange(all_to_all, experts)
    return RoutedExchange(all_to_all, experts, send=send)


# ---- what is compared ----------------------------------------------------------------------------------------------


class Exchange(Protocol):
    def dispatch(self, x: Any, routing: Routing, /) -> tuple[Any, Any]: ...

    def combine(self, rows: Any, plan: Any, /) -> Any: ...


class SlicedPlan(NamedTuple):
    inner: Plan
    answers: list[int]  # of each tensor rank


class SlicedExchange:
    """Tensor rank i sends slice i of the tokens; afterwards all of them gather all answers."""

    def __init__(self, inner: RoutedExchange, tensor: Comm) -> None:
        self.inner = inner
        self.tensor = tensor

    def dispatch(self, x: Any, routing: Routing) -> tuple[Any, SlicedPlan]:
        slices = np.array_split(np.arange(len(x)), self.tensor.size)
        end = sum(len(tokens) for tokens in slices[: self.tensor.rank + 1])
        mine = slice(end - len(slices[self.tensor.rank]), end)
        rows, plan = self.inner.dispatch(x[mine], Routing(routing.expert[mine], routing.weight[mine]))
        return rows, SlicedPlan(plan, [len(tokens) for tokens in slices])

    def combine(self, rows: Any, plan: SlicedPlan) -> Any:
        return self.tensor.all_gather(self.inner.combine(rows, plan.inner), plan.answers)


def innermost(plan: Any) -> Plan:
    """The plan of the RoutedExchange that does the work."""
    return plan if isinstance(plan, Plan) else plan.inner


class Case(NamedTuple):
    algorithm: str
    exchange: str
    send: str


class Setting:
    """One tensor size: its groups, and what is compared over them. Collective over comm."""

    def __init__(self, comm: Comm, nodes: Nodes, tensor: int, options: argparse.Namespace) -> None:
        topology = Topology(comm.size, tensor=tensor, expert=options.expert or comm.size)
        self.groups = build_groups(comm, topology, nodes)
        self.experts_per_rank = options.experts_per_rank
        self._max_tokens = options.tokens
        self.cases: dict[Case, Exchange] = {}
        self._all_to_alls: list[AllToAll] = []
        everywhere = {name: self._over("expert", make, nodes) for name, make in ALGORITHMS.items()}
        on_lane = {name: self._over("expert_lane", make, nodes) for name, make in ALGORITHMS.items() if tensor > 1}
        for algorithm, send in ways(options.send):
            for exchange, made in self._exchanges(everywhere[algorithm], on_lane.get(algorithm), send).items():
                self.cases[Case(algorithm, exchange, send)] = made

    def _over(self, axis: str, make: Callable[[Comm, Nodes], AllToAll], nodes: Nodes) -> AllToAll:
        comm: Comm = getattr(self.groups, axis)
        members = self._members(axis)
        places = [np.flatnonzero(nodes.node_of[members] == node).tolist() for node in range(len(nodes))]
        self._all_to_alls.append(make(comm, Nodes(filter(None, places))))
        return self._all_to_alls[-1]

    def _exchanges(self, everywhere: AllToAll, on_lane: AllToAll | None, send: str) -> dict[str, Exchange]:
        unrestricted = exchange_over(everywhere, self._experts("expert"), send, self._max_tokens)
        if on_lane is None:  # one tensor rank: there is only one way
            return {"all": unrestricted}
        tensor = self.groups.tensor
        inner = exchange_over(on_lane, self._experts("expert_lane"), send, self._max_tokens)
        return {
            "lane": TensorParallelExchange(inner, tensor),
            "all": SlicedExchange(unrestricted, tensor),
            "naive": unrestricted,
        }

    def _members(self, axis: str) -> list[int]:
        return self.groups.topology.group_of(self.groups.world.rank, axis)

    def _experts(self, axis: str) -> list[list[int]]:
        """The ids of the experts that each rank of the group holds."""
        num = self.experts_per_rank
        places = [self.groups.topology.coords(rank)["expert"] for rank in self._members(axis)]
        return [list(range(place * num, (place + 1) * num)) for place in places]

    def free(self) -> None:
        for all_to_all in self._all_to_alls:
            all_to_all.free()
        self.groups.free()


# ---- what is sent --------------------------------------------------------------------------------------------------


class Traffic:
    """The tokens and the routing of this rank's tensor group, and the answer that it must get.

    An expert multiplies a row by a number of its own. All numbers are whole, or eighths, and small, so that float32 has
    them exactly in whatever order they are added: an answer is right to the last bit or wrong.
    """

    def __init__(self, groups: Groups, options: argparse.Namespace) -> None:
        topology, shape = groups.topology, (options.tokens, options.top_k)
        num_local = options.experts_per_rank
        self._cuda = options.device == "cuda"
        rng = np.random.default_rng([harness.SEED, topology.group_of(groups.world.rank, "tensor")[0]])
        self._tokens = rng.integers(0, 128, (options.tokens, options.hidden))
        self._num_calls = 0
        weight = (rng.integers(1, 9, shape) / 8).astype(np.float32)
        expert = balanced(rng, *shape, topology.expert * num_local)
        self.routing = Routing(self._placed(expert), self._placed(weight))
        self._expected = self._placed((weight * factor(expert)).sum(axis=1, keepdims=True))
        first = topology.coords(groups.world.rank)["expert"] * num_local
        self._factors = factor(np.arange(first, first + num_local))

    def _placed(self, array: NDArray[Any]) -> Any:
        """As the exchange is to get it: on the GPU, if that is asked for."""
        if not self._cuda:
            return array
        import torch

        return torch.from_numpy(array).cuda()

    def wait(self) -> None:
        """For the GPU, where there is one."""
        if self._cuda:
            import torch

            torch.cuda.synchronize()

    def renew(self) -> None:
        """Other tokens for the next call, so that an answer to an earlier one is noticed."""
        self._num_calls += 1
        self.x = self._placed(((self._tokens + self._num_calls) % 128).astype(np.float32))

    def answer(self, rows: Any, rows_per_expert: Any) -> Any:
        """What the experts of this rank make of their rows, and zeros of what lies behind them."""
        count = rows_per_expert if isinstance(rows_per_expert, np.ndarray) else rows_per_expert.cpu().numpy()
        factors = np.zeros((len(rows), 1), np.float32)
        factors[: count.sum(), 0] = np.repeat(self._factors, count)
        return rows * self._placed(factors)

    def num_wrong(self, y: Any) -> int:
        if y.shape != self.x.shape:
            return len(self.x)
        return int((y != self.x * self._expected).any(1).sum())


def balanced(rng: np.random.Generator, num_tokens: int, top_k: int, num_experts: int) -> NDArray[np.int64]:
    """[T, K] different experts for each token, drawn so that all experts get equally many, as far as that goes."""
    tokens_per_round = num_experts // top_k
    rounds = np.tile(np.arange(num_experts), (-(-num_tokens // tokens_per_round), 1))
    drawn: NDArray[np.int64] = rng.permuted(rounds, axis=1)[:, : tokens_per_round * top_k]
    return drawn.reshape(-1, top_k)[:num_tokens]


def factor(expert: NDArray[np.int64]) -> NDArray[np.float32]:
    """What an expert multiplies its rows by."""
    return (1 + expert % 61).astype(np.float32)
