"""torch.compile of a MoE layer: answers and gradients are those without it, and few graphs serve all sizes."""

from __future__ import annotations

from typing import Any

import pytest
from conftest import gloo_run, mpi_run

torch = pytest.importorskip("torch")

from torch._dynamo.utils import counters  # noqa: E402

from moecomm import Comm, Topology, build_groups  # noqa: E402
from moecomm.nn import MoE, ResidualMoE  # noqa: E402

SIZES = (5, 7, 0, 1, 12, 3, 9, 6, 20, 4)
HIDDEN = 8
# Before and behind the exchange, for each of: the first size, any size, no token, one token.
MOST_GRAPHS = 2 * 4


def results(call: Any, layer: torch.nn.Module, size: int, rank: int) -> list[torch.Tensor]:
    """y and all gradients of a pass forward and back; tokens differ among ranks."""
    layer.zero_grad()
    generator = torch.Generator().manual_seed(100 * size + rank)
    x = torch.randn(size, HIDDEN, generator=generator, requires_grad=True)
    y, routing = call(x)
    (y.square().sum() + routing.aux_loss).backward()
    return [y.detach(), x.grad, *(parameter.grad.clone() for parameter in layer.parameters())]


def check(comm: Comm) -> None:
    torch._dynamo.reset()
    counters.clear()
    groups = build_groups(comm, Topology(comm.size, expert=comm.size))
    layer = MoE(HIDDEN, 16, 2 * comm.size, 2, groups=groups)
    # The backend that compiles backward passes as well, but needs no C++ compiler.
    compiled = torch.compile(layer, backend="aot_eager")
    for size in SIZES:
        # Ranks have other sizes at the same time, so that they compile at different times.
        own = SIZES[(SIZES.index(size) + comm.rank) % len(SIZES)]
        expected = results(layer, layer, own, comm.rank)
        torch.testing.assert_close(results(compiled, layer, own, comm.rank), expected)
    assert 0 < counters["stats"]["unique_graphs"] <= MOST_GRAPHS


@pytest.mark.parametrize("kind", [MoE, ResidualMoE])
def test_one_rank(kind: Any) -> None:
    torch._dynamo.reset()
    layer = kind(HIDDEN, 16, 4)
    compiled = torch.compile(layer, backend="aot_eager")
    for size in SIZES:
        torch.testing.assert_close(results(compiled, layer, size, 0), results(layer, layer, size, 0))


def test_over_gloo() -> None:
    gloo_run(2, check)


@pytest.mark.mpi
def test_over_mpi() -> None:
    mpi_run(2, check)
