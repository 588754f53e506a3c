"""MoE with experts that a user has written: a module that maps rows and counts to rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import Tensor, nn  # noqa: E402

from moecomm import Comm, Topology, build_groups  # noqa: E402
from moecomm.nn import (  # noqa: E402
    MoE,
    ResidualMoE,
    checkpoint,
    exchange_over,
    exclude_experts,
    gradient_norm,
    parameter_groups,
    reduce_gradients,
)
from moecomm.transports import threads  # noqa: E402

torch.set_num_threads(1)
HIDDEN, NUM_EXPERTS, RANKS, TOKENS = 6, 4, 4, 10


class Powers(nn.Module):
    """Expert e: tanh(row * scale[e]) @ mix[e] + shift[e], and a buffer. Its rows are found by where they end."""

    def __init__(self, experts: Any) -> None:
        super().__init__()
        weights = [torch.randn(HIDDEN, HIDDEN + 2, generator=torch.Generator().manual_seed(e)) for e in experts]
        bank = torch.stack(weights) if weights else torch.zeros(0, HIDDEN, HIDDEN + 2)
        self.mix = nn.Parameter(bank[..., :HIDDEN].clone())
        self.inner = nn.ParameterDict({"scale": bank[..., HIDDEN].clone(), "shift": bank[..., HIDDEN + 1].clone()})
        self.register_buffer("number", torch.tensor([float(e) for e in experts]))

    def forward(self, rows: Tensor, rows_per_expert: np.ndarray | Tensor) -> Tensor:
        ends = torch.as_tensor(rows_per_expert, device=rows.device).cumsum(0)
        expert = torch.bucketize(torch.arange(len(rows)), ends, right=True)
        scaled = torch.tanh(rows * self.inner["scale"][expert])
        return torch.einsum("nh,nhj->nj", scaled, self.mix[expert]) + self.inner["shift"][expert]


def tokens(rank: int) -> Tensor:
    return torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(100 + rank))


def layer_on(groups: Any, **options: Any) -> MoE:
    exchange = exchange_over(groups, NUM_EXPERTS)
    module = Powers(exchange.local_experts)
    return MoE(
        HIDDEN, None, NUM_EXPERTS, 2, groups=groups, exchange=exchange, experts=module, std=0.5, key=(3, 1), **options
    )


def loss_of(layer: MoE, x: Tensor) -> Tensor:
    y, routing = layer(x)
    loss: Tensor = y.square().mean() + routing.z_loss
    return loss


def definition(x: Tensor) -> Tensor:
    """The answers, token by token and expert by expert, from the weights of a layer on one rank."""
    layer = layer_on(None)
    scores = (x @ layer.gate.T).softmax(-1)
    rows = []
    for token, of_token in zip(x, scores, strict=True):
        best = of_token.topk(2).indices.tolist()
        bank: Any = layer.experts.module
        answers = [
            of_token[e] * (torch.tanh(token * bank.inner["scale"][e]) @ bank.mix[e] + bank.inner["shift"][e])
            for e in best
        ]
        rows.append(sum(answers, torch.zeros(HIDDEN)))
    return torch.stack(rows)


def by_expert(layer: MoE, name: str) -> dict[int, Tensor]:
    """The gradient of each expert's weight, by its global id."""
    gradient = layer.experts.get_parameter(f"module.{name}").grad
    assert gradient is not None
    return dict(zip(layer.experts.experts, gradient, strict=True))


def test_answers_are_those_of_loops_over_tokens_and_experts() -> None:
    layer = layer_on(None)
    y, _ = layer(tokens(0))
    assert torch.allclose(y, definition(tokens(0)), atol=1e-6)
    empty, _ = layer(tokens(0)[:0])
    assert empty.shape == (0, HIDDEN)


SPLITS = [{"expert": 2}, {"expert": 4}, {"expert": 1}, {"expert": 4, "tensor": 2}, {"expert": 2, "tensor": 2}]


@pytest.mark.parametrize("sizes", SPLITS, ids=str)
def test_answers_gradients_and_checkpoints_do_not_depend_on_the_split(sizes: dict[str, int], tmp_path: Path) -> None:
    tensor = sizes.get("tensor", 1)
    data = RANKS // tensor
    whole = layer_on(None)
    wanted_loss = torch.stack([loss_of(whole, tokens(number)) for number in range(data)]).mean()
    wanted_loss.backward()
    wanted_norm = torch.sqrt(sum(p.grad.square().sum() for p in whole.parameters() if p.grad is not None))

    def body(comm: Comm) -> None:
        groups = build_groups(comm, Topology(RANKS, **sizes))
        layer = layer_on(groups)
        number = groups.data.rank
        y, _ = layer(tokens(number))
        assert torch.allclose(y, definition(tokens(number)), atol=1e-6)
        loss_of(layer, tokens(number)).backward()
        reduce_gradients(layer, groups)
        assert torch.allclose(layer.gate.grad, whole.gate.grad, atol=1e-6)
        for name in ("mix", "inner.scale", "inner.shift"):
            expected = by_expert(whole, name)
            for expert, gradient in by_expert(layer, name).items():
                assert torch.allclose(gradient, expected[expert], atol=1e-6), (name, expert)
        assert float(gradient_norm(layer, groups)) == pytest.approx(float(wanted_norm), rel=1e-5)
        # A step, so that what is saved is not what any layer begins with.
        torch.optim.SGD(layer.parameters(), 1.0).step()
        checkpoint.save(tmp_path, 1, layer, comm=comm)

    threads.run(RANKS, body)
    torch.optim.SGD(whole.parameters(), 1.0).step()
    loaded = layer_on(None)
    checkpoint.load(tmp_path / "step-000001", loaded)
    for name, weight in whole.state_dict().items():
        assert torch.allclose(loaded.state_dict()[name], weight, atol=1e-6), name


def test_a_state_of_other_experts_is_refused() -> None:
    states: dict[int, dict[str, Tensor]] = {}

    def body(comm: Comm) -> None:
        layer = layer_on(build_groups(comm, Topology(2, expert=2)))
        states[comm.rank] = layer.state_dict()
        comm.barrier()
        assert {"experts.module.mix", "experts.module.inner.scale"} <= states[0].keys()
        layer.load_state_dict(states[comm.rank])
        with pytest.raises(RuntimeError, match=r"the state_dict has slice 0 of 1 of experts \[[0-9, ]+\], this rank"):
            layer.load_state_dict(states[1 - comm.rank])

    threads.run(2, body)


def test_optimizers_and_wrappers_know_them_as_experts() -> None:
    model = nn.Sequential(nn.Linear(HIDDEN, HIDDEN), layer_on(None))
    dense, experts = parameter_groups(model)
    assert [len(dense["params"]), len(experts["params"])] == [3, 3]
    ignored = exclude_experts(model)._ddp_params_and_buffers_to_ignore
    assert ignored == [f"1.experts.module.{name}" for name in ("inner.scale", "inner.shift", "mix")]


def test_a_residual_layer_takes_them_too() -> None:
    layer = ResidualMoE(HIDDEN, 8, NUM_EXPERTS, experts=Powers(range(NUM_EXPERTS)))
    y, _ = layer(tokens(0))
    assert y.shape == (TOKENS, HIDDEN) and layer.mlp(tokens(0)).shape == y.shape


class Narrow(nn.Module):
    """Answers that are no rows."""

    def forward(self, rows: Tensor, rows_per_expert: Any) -> Tensor:
        return rows[:, 1:]


def test_experts_that_fail_on_a_rank_end_the_call_on_all() -> None:
    def body(comm: Comm) -> None:
        groups = build_groups(comm, Topology(2, expert=2))
        exchange = exchange_over(groups, 2)
        module = Narrow() if comm.rank else nn.Identity()
        module.forward = module.forward if comm.rank else lambda rows, counts: rows  # type: ignore[method-assign]
        layer = MoE(HIDDEN, None, 2, 1, groups=groups, exchange=exchange, experts=module)
        layer(tokens(comm.rank))

    with pytest.raises(ValueError, match=r"MoE: experts returned \(\d+, 5\), expected \(\d+, 6\)"):
        threads.run(2, body)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"top_k": 5}, ValueError, "top_k is 5, expected 1 .. num_experts=4"),
        ({"top_k": 0}, ValueError, "top_k is 0, expected 1 .. num_experts=4"),
        ({"dtyp": torch.float32}, TypeError, "MoE: unknown keyword dtyp"),
        ({"choices": {"scor": "sigmoid"}}, TypeError, "MoE: unknown choice scor, expected some of .*score"),
        ({"choices": {"bias": None}}, TypeError, "MoE: unknown choice bias"),
        ({"ffn": None}, ValueError, "MoE: ffn is None, expected the width of the experts"),
        ({"experts": nn.Identity()}, ValueError, "MoE: ffn is 8, expected None beside a module of experts"),
        (
            {"ffn": None, "experts": Powers(range(3))},
            ValueError,
            r"MoE: mix of experts has shape \(3, 6, 6\), expected \(4, ...\)",
        ),
        (
            {"ffn": None, "experts": nn.ParameterDict({"a": torch.tensor(1.0)})},
            ValueError,
            r"a of experts has shape \(\)",
        ),
    ],
)
def test_what_does_not_fit_is_said_at_construction(options: dict[str, Any], kind: Any, message: str) -> None:
    sizes = {"hidden": HIDDEN, "ffn": 8, "num_experts": NUM_EXPERTS}
    with pytest.raises(kind, match=message):
        MoE(**sizes | options)


def test_sliced_experts_cannot_be_a_module() -> None:
    def body(comm: Comm) -> None:
        groups = build_groups(comm, Topology(2, tensor=2, expert_tensor=2))
        with pytest.raises(ValueError, match="experts is a module, which 2 tensor ranks cannot slice"):
            layer_on(groups)

    threads.run(2, body)


def test_rows_of_another_width_are_refused_by_name() -> None:
    layer = MoE(HIDDEN, 8, NUM_EXPERTS)
    with pytest.raises(ValueError, match=r"MoE: x has shape \(3, 5\), expected \(..., hidden=6\)"):
        layer(torch.zeros(3, 5))
    groups = threads.run(1, lambda comm: build_groups(comm, Topology(1)))[0]
    with pytest.raises(ValueError, match=r"hidden=6\)  \(rank 0 of 1\)"):
        MoE(HIDDEN, 8, NUM_EXPERTS, groups=groups)(torch.zeros(2, 3, 7))
