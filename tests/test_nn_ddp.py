"""Wrappers around a MoE. DistributedDataParallel leaves experts alone or is refused; FSDP is. Two processes of gloo."""

from __future__ import annotations

from typing import Any

import pytest
from conftest import gloo_run

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard  # noqa: E402
from torch.nn.parallel import DistributedDataParallel  # noqa: E402

from moecomm import Comm, Topology, build_groups  # noqa: E402
from moecomm.nn import MoE, exclude_experts, reduce_gradients  # noqa: E402

torch.set_num_threads(1)
TEXT = torch.randn(4, 6, 8, generator=torch.Generator().manual_seed(0))
"""[micro-batches, T, hidden]."""


class Model(nn.Module):
    """A dense layer, experts and a dense layer, with first weights that do not depend on the rank."""

    def __init__(self, groups: Any = None) -> None:
        super().__init__()
        self.moe = MoE(8, 16, 4, 2, groups=groups, std=0.5)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        with torch.no_grad():
            for number, parameter in enumerate(self.layers.parameters()):
                parameter.copy_(torch.linspace(-1, 1 + number, parameter.numel()).sin().view_as(parameter) / 4)

    def forward(self, x: Any) -> Any:
        return self.layers[1](x + self.moe(self.layers[0](x))[0])


def train(model: nn.Module, whole: nn.Module, micro_batches: Any, groups: Any) -> None:
    """Three steps; model may be a wrapper of the whole one."""
    optimizer = torch.optim.SGD(whole.parameters(), 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        for x in micro_batches:
            model(x).square().mean().backward()
        reduce_gradients(model, groups, len(micro_batches))
        optimizer.step()


@pytest.mark.parametrize("sizes", [{"expert": 2}, {}])
def test_the_weights_are_those_of_one_rank(sizes: dict[str, int]) -> None:
    """Two micro-batches on each of two ranks: as four on one. Also where each rank has all experts."""
    alone = Model()
    train(alone, alone, TEXT, None)

    def body(comm: Comm) -> None:
        groups = build_groups(comm, Topology(2, **sizes))
        model = Model(groups)
        first = model.moe.experts.up.detach().clone()
        wrapped = DistributedDataParallel(exclude_experts(model))
        assert torch.equal(model.moe.experts.up, first)
        train(wrapped, model, TEXT.chunk(2)[comm.rank], groups)
        for name, parameter in model.named_parameters():
            wanted = alone.get_parameter(name)
            if sizes and ".experts." in name:
                wanted = wanted.chunk(2)[comm.rank]
            torch.testing.assert_close(parameter, wanted, rtol=1e-5, atol=1e-6)
        assert not torch.equal(model.moe.experts.up, first)

    gloo_run(2, body)


def test_what_it_would_mix() -> None:
    def body(comm: Comm) -> None:
        groups = build_groups(comm, Topology(2, expert=2))
        words = rf"has given this rank the experts of rank 0: .* wrap exclude_experts\(model\)  \(rank {comm.rank} of 2"
        wrapped = DistributedDataParallel(Model(groups))
        for _ in range(2):
            with pytest.raises(ValueError, match=words):
                wrapped(TEXT[0])
        inside = nn.Sequential(exclude_experts(Model(groups)))  # the names are those of another module
        with pytest.raises(ValueError, match=words):
            DistributedDataParallel(inside)(TEXT[0])
        DistributedDataParallel(exclude_experts(inside))(TEXT[0])
        everywhere = Model(build_groups(comm, Topology(2)))
        DistributedDataParallel(everywhere)(TEXT[0])  # each rank has all experts
        sliced = Model(build_groups(comm, Topology(2, tensor=2)))
        with pytest.raises(ValueError, match="is over 2 ranks, expected the 1 of the data group"):
            DistributedDataParallel(sliced)(TEXT[0])

    gloo_run(2, body)


def test_names_that_are_excluded_already_stay() -> None:
    model = Model()
    model._ddp_params_and_buffers_to_ignore = ["layers.0.bias"]
    assert exclude_experts(model) is model
    experts = [f"moe.experts.{name}" for name in ("down", "down_bias", "up", "up_bias")]
    assert model._ddp_params_and_buffers_to_ignore == ["layers.0.bias", *experts]


def test_fsdp_would_mix_experts() -> None:
    """It shards a bank as if all ranks had the same one. Where they do, it is none of the experts' business."""

    def body(comm: Comm) -> None:
        from torch.distributed.device_mesh import init_device_mesh

        groups, mesh = build_groups(comm, Topology(2, expert=2)), init_device_mesh("cpu", (2,))
        with pytest.raises(ValueError, match="Experts: FSDP would mix the experts of its ranks"):
            fully_shard(Model(groups), mesh=mesh)
        for original in (False, True):
            wrapped = FullyShardedDataParallel(Model(groups), device_id=torch.device("cpu"), use_orig_params=original)
            with pytest.raises(ValueError, match="Experts: FSDP would mix the experts of its ranks"):
                wrapped(TEXT[0])
        alone = Model()
        wanted = alone(TEXT[0])
        model = fully_shard(Model(), mesh=mesh)
        torch.testing.assert_close(model(TEXT[0]), wanted)
        with pytest.raises(ValueError, match="reduce_gradients: FSDPModel is sharded by FSDP"):
            reduce_gradients(model, groups)

    gloo_run(2, body)
