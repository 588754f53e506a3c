"""The tables that exchanges make on a GPU, made of CPU tensors: the same operations, and no number of the host's."""

from __future__ import annotations

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
    build_groups,
    testing,
)
from moecomm.exchange import HierarchicalExchange, StaticExchange, StaticHierarchicalExchange
from moecomm.transports import threads

torch = pytest.importorskip("torch")

import test_exchange  # noqa: E402
import test_exchange_float8  # noqa: E402
import test_hierarchical_exchange  # noqa: E402

from moecomm import arrays  # noqa: E402
from moecomm.conformance.exchanges import ExchangeCase  # noqa: E402
from moecomm.exchange import autograd, float8, routed, table  # noqa: E402
from moecomm.gating import row_tensors, rows  # noqa: E402


@pytest.fixture(autouse=True)
def as_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU tensors pass for tensors on a device, but where the kernels of the CPU read tables."""

    def on_cpu(function: object) -> object:
        def call(x: object, *arguments: object) -> object:
            return function(x, *(_numpy(a) if _is_table(a) else a for a in arguments))  # type: ignore[operator]

        return call

    def spread(grad: object, x: object, row: object, source: object, weight: object) -> object:
        return row_tensors.spread_rows(grad, x, _numpy(row), _numpy(source), weight)  # type: ignore[arg-type]

    monkeypatch.setattr(routed, "is_on_host", lambda array: isinstance(array, np.ndarray))
    monkeypatch.setattr(table, "copy_rows", on_cpu(rows.copy_rows))
    monkeypatch.setattr(float8, "copy_rows_fp8", on_cpu(rows.copy_rows_fp8))
    monkeypatch.setattr(table, "sum_rows", on_cpu(rows.sum_rows))
    monkeypatch.setattr(autograd, "sum_rows", on_cpu(rows.sum_rows))
    monkeypatch.setattr(autograd, "spread_rows", spread)
    monkeypatch.setattr(table, "copy_blocks", _copy_blocks)
    monkeypatch.setattr(table, "on_host", lambda array: isinstance(array, np.ndarray))


def _is_table(array: object) -> bool:
    return isinstance(array, torch.Tensor) and array.dtype == torch.int32


def _numpy(array: object) -> object:
    return array.numpy() if isinstance(array, torch.Tensor) else array


def _copy_blocks(dst: object, src: object, *blocks: object) -> None:
    copy = arrays._copy_blocks_on_device if isinstance(src, torch.Tensor) else arrays.copy_blocks
    copy(dst, src, *blocks)  # type: ignore[arg-type]


@pytest.mark.parametrize("send", ["assignments", "tokens"])
@pytest.mark.parametrize("hierarchical", [False, True])
def test_routed(send: str, hierarchical: bool) -> None:
    def make(comm: Comm, case: ExchangeCase) -> RoutedExchange:
        all_to_all = HierarchicalAllToAll(comm, _nodes(comm.size)) if hierarchical else FlatAllToAll(comm)
        return RoutedExchange(all_to_all, case.num_experts // comm.size, send=send)  # type: ignore[arg-type]

    testing.check_exchange(threads.run, make, make=torch.tensor)


def test_hierarchical() -> None:
    def make(comm: Comm, case: ExchangeCase) -> HierarchicalExchange:
        return HierarchicalExchange(HierarchicalAllToAll(comm, _nodes(comm.size)), case.num_experts // comm.size)

    testing.check_exchange(threads.run, make, sizes=(1, 2, 3, 4, 5), make=torch.tensor)


def test_static() -> None:
    def make(comm: Comm, case: ExchangeCase) -> StaticExchange:
        return StaticExchange(FlatAllToAll(comm), case.num_experts // comm.size, case.max_tokens)

    testing.check_exchange(threads.run, make, make=torch.tensor)


def test_static_hierarchical() -> None:
    def make(comm: Comm, case: ExchangeCase) -> StaticExchange:
        a2a = HierarchicalAllToAll(comm, _nodes(comm.size))
        return StaticHierarchicalExchange(a2a, case.num_experts // comm.size, case.max_tokens)

    testing.check_exchange(threads.run, make, sizes=(1, 2, 3, 4, 5), make=torch.tensor)


@pytest.mark.parametrize("kind", test_exchange_float8.EXCHANGES)
def test_float8(kind: str) -> None:
    test_exchange_float8.test_tensors(kind, torch.bfloat16)


@pytest.mark.parametrize(("nodes", "experts"), test_hierarchical_exchange.PLACES)
def test_ragged_nodes_and_experts(nodes: list[list[int]], experts: object) -> None:
    p = sum(map(len, nodes))
    K = min(5, sum(map(len, test_exchange.expert_ids(p, experts))))  # type: ignore[arg-type]  # noqa: N806
    threads.run(p, lambda comm: test_hierarchical_exchange.check(comm, nodes, experts, K))


@pytest.mark.parametrize("send", ["assignments", "tokens"])
def test_expert_that_nobody_holds_is_refused_by_all(send: str) -> None:
    """The host does not look at ids on a device: the ranks tell each other with the counts."""

    def body(comm: Comm) -> None:
        exchange = RoutedExchange(FlatAllToAll(comm), [[0], [3]], send=send)  # type: ignore[arg-type]
        for wrong in (1, 4, -2, 10**12):
            expert = torch.tensor([[wrong if comm.rank == 1 else 0, -1]])
            with pytest.raises(ValueError, match=r"the gate of rank 1 had no answer: .*no rank holds"):
                exchange.dispatch(torch.ones(1, 3), Routing(expert, torch.ones(1, 2)))
        expert = torch.tensor([[0, -1], [3, 0]])
        rows, plan = exchange.dispatch(torch.ones(2, 3), Routing(expert, torch.ones(2, 2)))
        assert exchange.combine(rows, plan).tolist() == [[1] * 3, [2] * 3]

    threads.run(2, body)


def _nodes(size: int) -> Nodes:
    ragged = [list(range(0, size, 2)), list(range(1, size, 2))]
    return Nodes([ranks for ranks in ragged if ranks])


@pytest.mark.parametrize("output", ["replicated", "sequence"])
@pytest.mark.parametrize("inner", [RoutedExchange, StaticExchange, StaticHierarchicalExchange])
@pytest.mark.parametrize("top_k", [1, 3])
def test_lanes(output: str, inner: type[RoutedExchange], top_k: int) -> None:
    """Against one rank's own sum, gradients too: 2 lanes of 2 expert ranks, 5 tokens that each pair of lanes shares."""

    def body(comm: Comm) -> None:
        groups = build_groups(comm, Topology(4, tensor=2, expert=4))
        lane = groups.topology.group_of(comm.rank, "expert_lane")
        held = [[2 * rank, 2 * rank + 1] for rank in lane]
        two_hops = HierarchicalAllToAll(groups.expert_lane, Nodes.of_size(1, groups.expert_lane.size))
        a2a = two_hops if inner is StaticHierarchicalExchange else FlatAllToAll(groups.expert_lane)
        sizes = () if inner is RoutedExchange else (5,)
        exchange = TensorParallelExchange(inner(a2a, held, *sizes), groups.tensor, output=output)  # type: ignore[arg-type]
        generator = torch.Generator().manual_seed(comm.rank // 2)
        x = torch.randn(5, 3, generator=generator, dtype=torch.float64, requires_grad=True)
        weight = torch.rand(5, top_k, generator=generator, dtype=torch.float64, requires_grad=True)
        expert = torch.stack([torch.randperm(8, generator=generator)[:top_k] for _ in range(5)])
        rows, plan = exchange.dispatch(x, Routing(expert, weight))
        ids = torch.tensor(held[groups.expert_lane.rank]).repeat_interleave(torch.as_tensor(plan.rows_per_expert))
        factor = torch.zeros(len(rows), 1, dtype=torch.float64)
        factor[: len(ids), 0] = ids.double() + 1
        y = exchange.combine(torch.tanh(rows) * factor, plan)
        wanted = torch.tanh(x) * (weight * (expert + 1)).sum(1, keepdim=True)
        part = wanted if output == "replicated" else wanted.tensor_split(2)[groups.tensor.rank]
        torch.testing.assert_close(y, part)
        # Each token's gradient counts once: the lanes' copies of a whole output, or the parts, are one output.
        grads = torch.autograd.grad(y.sum(), (x, weight))
        for got, correct in zip(grads, torch.autograd.grad(wanted.sum(), (x, weight)), strict=True):
            torch.testing.assert_close(got, correct)

    threads.run(4, body)
