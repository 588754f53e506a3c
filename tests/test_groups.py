"""Groups of a topology over real Comms, and the expert-gradient rule."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from conftest import gloo_run

from moecomm import (
    Comm,
    CommError,
    FlatAllToAll,
    Nodes,
    RoutedExchange,
    Routing,
    TensorParallelExchange,
    Topology,
    build_groups,
    reduce_expert_gradient,
)
from moecomm.groups import SPLIT_AXES
from moecomm.transports import threads

torch = pytest.importorskip("torch")


@pytest.mark.parametrize(
    "topology",
    [
        Topology(16, tensor=2, expert=4),
        Topology(16, tensor=2, expert=4, expert_tensor=2),
        Topology(16, tensor=2, pipeline=2, expert=2, inner="expert_data"),
        Topology(1),
    ],
    ids=str,
)
def test_each_comm_has_the_ranks_of_its_group(topology: Topology) -> None:
    def body(comm: Comm) -> None:
        groups = build_groups(comm, topology)
        for axis in SPLIT_AXES:
            group = getattr(groups, axis)
            assert group.all_gather(np.array([comm.rank])).tolist() == topology.group_of(comm.rank, axis)
            assert group.rank == topology.coords(comm.rank)[axis]
        groups.free()
        with pytest.raises(CommError, match="freed"):
            groups.expert.barrier()
        comm.barrier()

    threads.run(topology.world_size, body)


def test_a_tensor_group_over_two_nodes_is_warned_of_once() -> None:
    def body(comm: Comm) -> None:
        build_groups(comm, Topology(8, tensor=4), nodes=Nodes.of_size(2, 8))

    with pytest.warns(UserWarning, match=r"2 of 2 tensor groups span nodes, \[0, 1, 2, 3\] is the first") as caught:
        threads.run(8, body)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        threads.run(8, lambda comm: build_groups(comm, Topology(8, tensor=4), nodes=Nodes.of_size(4, 8)))
        threads.run(8, lambda comm: build_groups(comm, Topology(8, tensor=4)))


def test_a_topology_that_does_not_fit_is_refused_on_every_rank() -> None:
    def body(comm: Comm) -> None:
        with pytest.raises(ValueError, match="topology has 8 ranks, expected 4"):
            build_groups(comm, Topology(8))
        with pytest.raises(ValueError, match="topology of rank 2 is not that of rank 0; this rank's is Topology"):
            build_groups(comm, Topology(4, tensor=2 if comm.rank == 2 else 1))
        comm.barrier()

    threads.run(4, body)


# ---- the expert-gradient rule --------------------------------------------------------------------------------------

NUM_EXPERTS, NUM_TOKENS, TOP_K = 4, 24, 2


def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same on every rank: x, expert, gate weight, and one number for each expert: its weight."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(NUM_TOKENS, 3, generator=generator, dtype=torch.float64)
    expert = torch.stack([torch.randperm(NUM_EXPERTS, generator=generator)[:TOP_K] for _ in range(NUM_TOKENS)])
    gate = torch.rand(NUM_TOKENS, TOP_K, generator=generator, dtype=torch.float64)
    return x, expert, gate, torch.randn(NUM_EXPERTS, generator=generator, dtype=torch.float64)


def gradient_on_one_rank() -> torch.Tensor:
    x, expert, gate, weight = batch()
    weight.requires_grad_()
    y = (torch.tanh(x[:, None] * weight[expert][:, :, None]) * gate[:, :, None]).sum(1)
    return torch.autograd.grad((y**2).sum(1).mean(), weight)[0]


def check_gradient(comm: Comm, topology: Topology) -> None:
    """The mean loss over all tokens, cut among the data-parallel ranks: every layout has the gradient of one rank."""
    groups = build_groups(comm, topology)
    per_rank = NUM_EXPERTS // topology.expert
    ids = {rank: [topology.coords(rank)["expert"] * per_rank + i for i in range(per_rank)] for rank in range(comm.size)}
    inner = RoutedExchange(
        FlatAllToAll(groups.expert_lane), [ids[rank] for rank in topology.group_of(comm.rank, "expert_lane")]
    )
    exchange = TensorParallelExchange(inner, groups.tensor)
    mine = slice(*(np.array([0, 1]) + groups.data.rank) * (NUM_TOKENS // topology.data))
    x, expert, gate, weight = batch()
    local = weight[ids[comm.rank]].requires_grad_()
    rows, plan = exchange.dispatch(x[mine], Routing(expert[mine], gate[mine]))
    of = torch.from_numpy(np.repeat(np.arange(per_rank), plan.rows_per_expert))
    y = exchange.combine(torch.tanh(rows * local[of][:, None]), plan)
    gradient = torch.autograd.grad((y**2).sum(1).mean(), local)[0]
    torch.testing.assert_close(reduce_expert_gradient(gradient, groups), gradient_on_one_rank()[ids[comm.rank]])


@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize("expert", [1, 2, 4])
def test_expert_gradients_do_not_depend_on_the_layout(expert: int, tensor: int) -> None:
    threads.run(4, lambda comm: check_gradient(comm, Topology(4, tensor=tensor, expert=expert)))


def test_expert_gradients_over_gloo() -> None:
    def body(comm: Comm) -> None:
        for expert in (1, 2, 4):
            for tensor in (1, 2):
                check_gradient(comm, Topology(4, tensor=tensor, expert=expert))

    gloo_run(4, body)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_gradients_that_are_large_for_16_bits(dtype: torch.dtype) -> None:
    def body(comm: Comm) -> None:
        groups = build_groups(comm, Topology(2))
        mean = reduce_expert_gradient(torch.full((2,), 60000.0, dtype=dtype), groups)
        assert mean.dtype == dtype
        assert (mean == 60000).all()

    threads.run(2, body)


def test_device_mesh_over_gloo() -> None:
    def body(comm: Comm) -> None:
        topology = Topology(8, tensor=2, expert=4)
        dense, experts = topology.device_mesh("cpu")
        assert dense.mesh_dim_names == ("pipeline", "data", "tensor")
        assert experts.mesh_dim_names == ("pipeline", "expert_data", "expert", "expert_tensor")
        for mesh in (dense, experts):
            for axis in mesh.mesh_dim_names:
                assert mesh[axis].mesh.reshape(-1).tolist() == topology.group_of(comm.rank, axis)

    gloo_run(8, body)
