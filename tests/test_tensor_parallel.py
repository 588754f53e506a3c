"""TensorParallelExchange gives what the exchange without lanes gives, with fewer peers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pytest

from moecomm import (
    Comm,
    FlatAllToAll,
    HierarchicalAllToAll,
    Nodes,
    RoutedExchange,
    Routing,
    TensorParallelExchange,
    Topology,
)
from moecomm.transports import threads
from moecomm.transports.wrappers import Checked, Timed

torch = pytest.importorskip("torch")

TOPOLOGIES = [
    Topology(2, tensor=2),  # both lanes hold the one expert group
    Topology(2, tensor=2, expert=2),
    Topology(4, tensor=2, expert=4),
    Topology(4, tensor=2, expert=2),
    Topology(4, tensor=4, expert=2),
    Topology(8, tensor=2, expert=4),
    Topology(8, tensor=4, expert=8),
    Topology(6, tensor=3, expert=6),
    Topology(6, tensor=3, expert=3),
    Topology(8, tensor=2, expert=2, inner="expert_data"),
    Topology(8, tensor=2, expert=4, pipeline=2),
]


@dataclass
class Case:
    """Tokens and routing of each tensor group, an odd number of them, and what each rank makes of them."""

    topology: Topology
    K: int
    per_rank: int = 2
    send: Literal["assignments", "tokens"] = "assignments"
    output: Literal["replicated", "sequence"] = "replicated"
    dtype: Any = torch.float64
    T: int = 7
    batches: list = field(default_factory=list)

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.K)
        E = self.topology.expert * self.per_rank  # noqa: N806
        for group in range(self.topology.world_size // self.topology.tensor):
            T = self.T + group  # noqa: N806
            expert = np.array([rng.permutation(E)[: self.K] for _ in range(T)])
            expert[rng.random(expert.shape) < 0.1] = -1
            x, weight = torch.tensor(rng.standard_normal((T, 3))).to(self.dtype), torch.tensor(rng.random((T, self.K)))
            self.batches.append((x, expert, weight, torch.tensor(rng.standard_normal((T, 3))).to(self.dtype)))

    def batch(self, rank: int) -> Any:
        return self.batches[self.topology.groups("tensor").index(self.topology.group_of(rank, "tensor"))]

    def experts_of(self, rank: int) -> list[int]:
        first = self.topology.coords(rank)["expert"] * self.per_rank
        return list(range(first, first + self.per_rank))

    def exchange(self, comm: Comm, wrap: Any = lambda comm: comm, nodes: int | None = None) -> TensorParallelExchange:
        t = self.topology
        lane = comm.split(t.group_of(comm.rank, "expert_lane")[0])
        tensor = wrap(comm.split(t.group_of(comm.rank, "tensor")[0]))
        experts = [self.experts_of(rank) for rank in t.group_of(comm.rank, "expert_lane")]
        a2a = HierarchicalAllToAll(lane, Nodes.of_size(nodes, lane.size)) if nodes else FlatAllToAll(lane)
        return TensorParallelExchange(RoutedExchange(a2a, experts, send=self.send), tensor, output=self.output)

    def scale(self, rank: int, rows_per_expert: np.ndarray) -> Any:
        return torch.tensor(np.repeat(np.array(self.experts_of(rank)) + 2, rows_per_expert)).to(self.dtype)[:, None]


@pytest.mark.parametrize("output", ["replicated", "sequence"])
@pytest.mark.parametrize("send", ["assignments", "tokens"])
@pytest.mark.parametrize("K", [1, 2, 4])
@pytest.mark.parametrize("topology", TOPOLOGIES, ids=str)
def test_forward_and_backward(topology: Topology, K: int, send: Any, output: Any) -> None:  # noqa: N803
    per_rank = max(2, -(-K // topology.expert))
    case = Case(topology, K, per_rank, send, output)

    def body(comm: Comm) -> None:
        exchange = case.exchange(comm, nodes=2 if K == 2 else None)
        x, expert, weight, direction = case.batch(comm.rank)
        x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
        rows, plan = exchange.dispatch(x, Routing(expert, weight))
        y = exchange.combine(torch.tanh(rows * case.scale(comm.rank, plan.rows_per_expert)), plan)

        x2, weight2 = x.detach().requires_grad_(), weight.detach().requires_grad_()
        scales, kept = torch.from_numpy(expert + 2)[:, :, None], torch.from_numpy(expert >= 0)
        y2 = (torch.tanh(x2[:, None] * scales) * (weight2 * kept)[:, :, None]).sum(1)
        wanted_x, wanted_weight = torch.autograd.grad(y2, (x2, weight2), direction)
        if output == "sequence":
            direction, y2 = (torch.tensor_split(a, topology.tensor)[exchange.tensor.rank] for a in (direction, y2))
        grad_x, grad_weight = torch.autograd.grad(y, (x, weight), direction)
        torch.testing.assert_close(y, y2)
        torch.testing.assert_close(grad_x, wanted_x)
        torch.testing.assert_close(grad_weight, wanted_weight)

    threads.run(topology.world_size, body)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("topology", TOPOLOGIES, ids=str)
def test_top_1_has_the_bits_of_the_exchange_without_lanes(topology: Topology, dtype: Any) -> None:
    case = Case(topology, K=1, dtype=dtype, T=9)

    def without_lanes(comm: Comm) -> Any:
        """One rank for each tensor group would do; here every rank asks its whole expert group."""
        group = comm.split(topology.group_of(comm.rank, "expert")[0])
        exchange = RoutedExchange(FlatAllToAll(group), case.per_rank)
        x, expert, weight, _ = case.batch(comm.rank)
        rows, plan = exchange.dispatch(x, Routing(expert, weight))
        return exchange.combine(torch.tanh(rows * case.scale(comm.rank, plan.rows_per_expert)), plan)

    def body(comm: Comm) -> None:
        exchange = case.exchange(comm)
        x, expert, weight, _ = case.batch(comm.rank)
        rows, plan = exchange.dispatch(x, Routing(expert, weight))
        y = exchange.combine(torch.tanh(rows * case.scale(comm.rank, plan.rows_per_expert)), plan)
        assert torch.equal(y, without_lanes(comm))

    threads.run(topology.world_size, body)


@pytest.mark.parametrize("K", [1, 2, 4, 8])
def test_numpy_and_both_ways_to_share(K: int) -> None:  # noqa: N803
    """K = 1 is gathered; from K = 4 on most tokens have answers on three lanes, and an all-reduce is shorter."""
    case = Case(Topology(4, tensor=4, expert=4), K)

    def body(comm: Comm) -> None:
        exchange = case.exchange(comm, wrap=Timed)
        x, expert, weight, _ = case.batch(comm.rank)
        rows, plan = exchange.dispatch(x.numpy(), Routing(expert, weight.numpy()))
        y = exchange.combine(rows, plan)
        torch.testing.assert_close(
            torch.from_numpy(y), x * (weight * torch.from_numpy(expert >= 0)).sum(1, keepdim=True)
        )
        exchange.tensor.barrier()
        assert ("all_reduce" in exchange.tensor.record) == (K >= 4)  # type: ignore[attr-defined]

    threads.run(4, body)


def test_each_rank_talks_to_its_own_lane_only() -> None:
    """16 ranks, 2 lanes: 7 peers for the rows and 1 to share the results, not 15."""
    case = Case(Topology(16, tensor=2, expert=16), K=2, per_rank=1, T=40)

    def body(comm: Comm) -> None:
        timed = Timed(comm)
        exchange = case.exchange(timed)
        timed.clear()
        x, expert, weight, _ = case.batch(comm.rank)
        rows, plan = exchange.dispatch(x.numpy(), Routing(expert, weight.numpy()))
        exchange.combine(rows, plan)
        peers = set(np.flatnonzero(sum(timed.record[kind].messages for kind in ("all_to_all", "all_to_allv"))).tolist())
        assert peers == set(case.topology.group_of(comm.rank, "expert_lane")) - {comm.rank}
        assert len(peers) == 7
        assert np.flatnonzero(timed.record["all_gather"].messages).tolist() == [comm.rank ^ 1]

    threads.run(16, body)


def test_the_papers_128_ranks() -> None:
    """Tensor 8, expert 128: 15 peers in place of 127, and each assignment is processed once."""
    topology = Topology(128, tensor=8, expert=128)
    case = Case(topology, K=1, per_rank=1, T=128)

    def body(comm: Comm) -> int:
        exchange = case.exchange(comm)
        assert exchange.inner.comm.size == 16
        x, expert, weight, _ = case.batch(comm.rank)
        rows, plan = exchange.dispatch(x.numpy(), Routing(expert, weight.numpy()))
        exchange.combine(rows, plan)
        return len(rows)

    processed = sum(threads.run(128, body))
    assert processed == sum(int((expert >= 0).sum()) for _, expert, _, _ in case.batches)


@pytest.mark.parametrize(
    "topology", [Topology(4, tensor=2, expert=2, expert_tensor=2), Topology(4, tensor=4, expert_tensor=2)]
)
def test_sliced_experts(topology: Topology) -> None:
    """Each of two slices does a part of every expert's work; the parts are added with the lanes."""
    case = Case(topology, K=2)

    def body(comm: Comm) -> None:
        part = topology.coords(comm.rank)["expert_tensor"]
        plain = case.exchange(comm) if topology.tensor == topology.expert_tensor else None
        lane = comm.split(topology.group_of(comm.rank, "expert_lane")[0])
        tensor = comm.split(topology.group_of(comm.rank, "tensor")[0])
        experts = [case.experts_of(rank) for rank in topology.group_of(comm.rank, "expert_lane")]
        exchange = TensorParallelExchange(RoutedExchange(FlatAllToAll(lane), experts), tensor, part=(part, 2))
        x, expert, weight, _ = case.batch(comm.rank)
        rows, plan = exchange.dispatch(x, Routing(expert, weight))
        share = (0.25, 0.75)[part] * case.scale(comm.rank, plan.rows_per_expert)
        y = exchange.combine(rows * share, plan)
        factor = (weight * torch.from_numpy((expert + 2) * (expert >= 0))).sum(1, keepdim=True)
        torch.testing.assert_close(y, x * factor)
        assert plain is None or plain.num_experts == exchange.num_experts

    threads.run(4, body)


def test_a_slice_that_no_tensor_rank_holds() -> None:
    topology = Topology(8, tensor=2, expert=2, expert_tensor=4)

    def body(comm: Comm) -> None:
        lane = comm.split(topology.group_of(comm.rank, "expert_lane")[0])
        tensor = comm.split(topology.group_of(comm.rank, "tensor")[0])
        part = topology.coords(comm.rank)["expert_tensor"], 4
        with pytest.raises(ValueError, match=r"no tensor rank reaches part \d of expert 0"):
            TensorParallelExchange(RoutedExchange(FlatAllToAll(lane), 1), tensor, part=part)
        comm.barrier()

    threads.run(8, body)


def test_different_routing_on_the_tensor_ranks_is_found_by_checked() -> None:
    case = Case(Topology(4, tensor=2, expert=4), K=2)

    def body(comm: Comm) -> None:
        exchange = case.exchange(comm, wrap=Checked)
        x, expert, weight, _ = case.batch(comm.rank)
        if comm.rank == 1:
            expert = expert[::-1].copy()
        if comm.rank < 2:
            with pytest.raises(ValueError, match=r"the ranks differ: .*routing \w+, rank 1 .*routing \w+"):
                exchange.dispatch(x, Routing(expert, weight))
        comm.barrier()

    threads.run(4, body)


def test_an_expert_that_no_lane_reaches() -> None:
    def body(comm: Comm) -> None:
        alone = comm.split(comm.rank)
        with pytest.raises(ValueError, match="no tensor rank reaches part 0 of expert 1"):
            TensorParallelExchange(RoutedExchange(FlatAllToAll(alone), [[0] if comm.rank else [2]]), comm)
        comm.barrier()

    threads.run(2, body)


def test_bad_arguments() -> None:
    def body(comm: Comm) -> None:
        inner = RoutedExchange(FlatAllToAll(comm), 1)
        with pytest.raises(ValueError, match="output is 'scatter', expected 'replicated' or 'sequence'"):
            TensorParallelExchange(inner, comm, output="scatter")  # type: ignore[arg-type]
        for part in (0, (2, 2), (0,)):
            with pytest.raises(ValueError, match=r"part is .*, expected \(i, n\), slice i of n"):
                TensorParallelExchange(inner, comm, part=part)  # type: ignore[arg-type]
        for different in ({"part": (0, 1 + comm.rank)}, {"output": ("replicated", "sequence")[comm.rank]}):
            with pytest.raises(ValueError, match="output and the number of slices of rank 1 is not that of rank 0"):
                TensorParallelExchange(inner, comm, **different)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"part is \(2, 2\), .* \(rank 1 of 2\)"):  # on both
            TensorParallelExchange(inner, comm, part=(2 * comm.rank, 2))
        exchange = TensorParallelExchange(inner, comm)
        with pytest.raises(ValueError, match=r"routing.expert has 0\.\.2, expected -1\.\.1"):
            exchange.dispatch(np.zeros((2, 3)), Routing(np.array([[0], [2]]), np.ones((2, 1))))

    threads.run(2, body)
