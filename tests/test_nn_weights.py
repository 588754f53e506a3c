"""Copies of a weight on several ranks are made equal, and what is no copy stays."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")

from torch import Tensor, nn  # noqa: E402

from moecomm import Comm, Topology, build_groups  # noqa: E402
from moecomm.nn import ColumnLinear, MoE, agree_on_weights, exchange_over  # noqa: E402
from moecomm.transports import threads  # noqa: E402

torch.set_num_threads(1)


class Scales(nn.Module):
    """Experts that a rank has drawn by itself."""

    def __init__(self, count: int, draw: Any) -> None:
        super().__init__()
        self.scale = nn.Parameter(draw(count, 3))

    def forward(self, rows: Tensor, rows_per_expert: Any) -> Tensor:
        return rows


def test_each_copy_gets_the_weights_of_the_lowest_rank_that_has_it() -> None:
    """Four ranks: two tensor ranks, two data ranks; two ranks share the experts, of which there are two copies."""

    def body(comm: Comm) -> dict[str, Tensor]:
        # A generator for each rank: torch's own would be shared by the threads.
        generator = torch.Generator().manual_seed(comm.rank)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        groups = build_groups(comm, Topology(4, tensor=2, expert=2))
        exchange = exchange_over(groups, 4)
        layer = MoE(3, None, 4, groups=groups, exchange=exchange, experts=Scales(2, draw))
        column = ColumnLinear(3, 4, tensor=groups.tensor, key=(comm.rank,))
        norm = nn.BatchNorm1d(3)
        norm.running_mean = draw(3)
        norm.num_batches_tracked = torch.tensor(comm.rank + 2**40)
        half = nn.Linear(3, 2).bfloat16()
        half.weight.data = draw(2, 3).bfloat16()
        half.bias.data = torch.full((2,), float("nan") if comm.rank else -0.0).bfloat16()
        model = nn.ModuleDict({"moe": layer, "column": column, "norm": norm, "narrow": half})
        before = {name: value.clone() for name, value in model.state_dict().items()}
        agree_on_weights(model, groups)
        for name, value in model.state_dict().items():
            before[f"after {name}"] = value.clone()
        before["experts"] = torch.tensor(exchange.local_experts)
        before["slice"] = torch.tensor(groups.tensor.rank)
        return before

    ranks = threads.run(4, body)

    def first_with(rank: int, key: str | None) -> int:
        if key is None:
            return 0
        return next(other for other in range(4) if torch.equal(ranks[other][key], ranks[rank][key]))

    of_copies = {"moe.experts.module.scale": "experts", "column.weight": "slice", "column.bias": "slice"}
    names = [name.removeprefix("after ") for name in ranks[0] if name.startswith("after ")]
    for rank, of_rank in enumerate(ranks):
        for name in names:
            if "_extra_state" in name:
                continue
            wanted = ranks[first_with(rank, of_copies.get(name))][name]
            got = of_rank[f"after {name}"]
            # The bits: -0.0 stays, and so does the sign of what is no number.
            assert torch.equal(got.reshape(-1).view(torch.uint8), wanted.reshape(-1).view(torch.uint8)), (rank, name)
    assert not torch.equal(ranks[0]["after column.weight"], ranks[1]["after column.weight"])


def test_a_model_on_one_rank_stays() -> None:
    model = nn.Linear(2, 2)
    before = model.weight.clone()
    agree_on_weights(model, None)
    assert torch.equal(model.weight, before)


def test_ranks_as_threads_that_share_a_generator() -> None:
    """As a user would write it: torch.manual_seed on each rank, which alone makes other weights."""

    def body(comm: Comm) -> Tensor:
        torch.manual_seed(0)
        comm.barrier()
        model = nn.Linear(4, 4)
        agree_on_weights(model, build_groups(comm, Topology(3)))
        return model.weight.detach()

    weights = threads.run(3, body)
    assert all(torch.equal(weight, weights[0]) for weight in weights)
