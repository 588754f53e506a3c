"""moecomm.nn on one rank: layers against their definitions, sizes against the paper's, generation against no cache."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import torch.nn.functional as F  # noqa: E402, N812

from moecomm import (  # noqa: E402
    Comm,
    FlatAllToAll,
    RoutedExchange,
    TensorParallelExchange,
    Topology,
    build_groups,
)
from moecomm.gating import Noise  # noqa: E402
from moecomm.nn import (  # noqa: E402
    CONFIGS,
    MLP,
    Config,
    Experts,
    LocalExchange,
    MoE,
    ResidualMoE,
    TransformerLM,
    config_named,
    layer_topologies,
    pyramid,
)
from moecomm.transports import threads  # noqa: E402

torch.set_num_threads(1)  # threads that wait for a busy core take longer than they save
COUNTS = [[3, 0, 5, 1], [0, 0, 0, 0], [0, 9, 0, 0], [1, 1, 1, 1]]
CONFIG = CONFIGS["tiny"]


def normal(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def with_biases(experts: Experts) -> Experts:
    """Biases begin at 0, where a wrong one would not be seen."""
    for name, parameter in experts.named_parameters():
        if "bias" in name:
            parameter.data.copy_(normal(*parameter.shape, seed=len(name)))
    return experts


def answer(bank: Experts, e: int, row: torch.Tensor) -> torch.Tensor:
    """What expert number e of a bank makes of one row: the definition."""
    if bank.activation == "swiglu":
        return (F.silu(row @ bank.gate[e]) * (row @ bank.up[e])) @ bank.down[e]
    return F.gelu(row @ bank.up[e] + bank.up_bias[e]) @ bank.down[e] + bank.down_bias[e]


def by_row(bank: Experts, rows: torch.Tensor, counts: list[int]) -> torch.Tensor:
    owners = np.repeat(np.arange(len(counts)), counts)
    return torch.stack([answer(bank, int(e), row) for e, row in zip(owners, rows, strict=True)])


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize("counts", COUNTS)
def test_experts_and_their_gradients(activation: Any, counts: list[int]) -> None:
    bank = with_biases(Experts(8, 16, range(4), activation=activation))
    rows = normal(sum(counts), 8).requires_grad_()
    got = bank(rows, np.array(counts))
    assert got.shape == rows.shape
    got.square().sum().backward()
    gradients = {name: p.grad.clone() for name, p in bank.named_parameters()}
    if sum(counts) == 0:
        assert all((g == 0).all() for g in gradients.values())
        return
    of_rows, rows.grad = rows.grad.clone(), None
    bank.zero_grad()
    wanted = by_row(bank, rows, counts)
    wanted.square().sum().backward()
    torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(of_rows, rows.grad)
    for name, p in bank.named_parameters():
        torch.testing.assert_close(gradients[name], torch.zeros_like(p) if p.grad is None else p.grad)


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("beyond", [0, 3])
def test_grouped_gemm_is_the_loop(activation: Any, counts: list[int], beyond: int) -> None:
    """In bfloat16, with counts in a tensor, and rows behind the last expert's that say nothing and get no gradient."""
    bank = with_biases(Experts(8, 16, range(4), activation=activation)).bfloat16()
    rows = normal(sum(counts) + beyond, 8).bfloat16()
    rows[sum(counts) :] = float("nan")
    rows.requires_grad_()
    got = bank(rows, torch.tensor(counts, dtype=torch.int32))
    assert (got[sum(counts) :] == 0).all()
    got.float().square().sum().backward()
    gradients = {name: p.grad.float() for name, p in bank.named_parameters()}
    bank.float().zero_grad()
    wanted = bank(rows.detach()[: sum(counts)].float(), torch.tensor(counts))
    wanted.square().sum().backward()
    torch.testing.assert_close(got[: sum(counts)].float(), wanted, atol=2e-2, rtol=2e-2)
    for name, p in bank.named_parameters():
        torch.testing.assert_close(gradients[name], p.grad, atol=5e-2, rtol=5e-2)


def test_weights_depend_on_the_global_id_alone() -> None:
    whole, some = Experts(4, 8, range(6), key=(7,)), Experts(4, 8, [4, 1], key=(7,))
    torch.testing.assert_close(whole.up[[4, 1]], some.up, rtol=0, atol=0)
    assert not torch.equal(whole.up[0], whole.up[1])
    assert not torch.equal(whole.up, Experts(4, 8, range(6), key=(8,)).up)


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_slices_add_up_to_the_expert(activation: Any) -> None:
    rows, counts = normal(5, 4), np.array([2, 3])
    slices = [Experts(4, 12, range(2), activation=activation, part=(i, 3)) for i in range(3)]
    whole = Experts(4, 12, range(2), activation=activation)
    torch.testing.assert_close(sum(part(rows, counts) for part in slices), whole(rows, counts))
    with pytest.raises(ValueError, match="ffn is 12, which 5 slices cannot share"):
        Experts(4, 12, range(2), part=(0, 5))


def defined_moe(layer: MoE, x: torch.Tensor) -> torch.Tensor:
    """Every token through its top_k experts, weighted by the softmax; ties and drops aside."""
    share = F.linear(x, layer.gate).softmax(-1)
    weight, expert = share.topk(layer.top_k)
    return torch.stack(
        [
            sum(w * answer(layer.experts, int(e), row) for w, e in zip(ws, es, strict=True))
            for row, ws, es in zip(x, weight, expert, strict=True)
        ]
    )


@pytest.mark.parametrize("top_k", [1, 2, 4])
@pytest.mark.parametrize("num_tokens", [1, 13])
def test_moe_and_its_gradients(top_k: int, num_tokens: int) -> None:
    layer = MoE(8, 16, 4, top_k, std=0.5)
    x = normal(num_tokens, 8).requires_grad_()
    y, routing = layer(x)
    assert int(routing.load.sum()) == num_tokens * top_k
    gradients = torch.autograd.grad(y.square().sum(), [x, layer.gate, layer.experts.up])
    wanted = defined_moe(layer, x)
    torch.testing.assert_close(y, wanted)
    for got, want in zip(
        gradients, torch.autograd.grad(wanted.square().sum(), [x, layer.gate, layer.experts.up]), strict=True
    ):
        torch.testing.assert_close(got, want)


def test_rows_that_begin_at_multiples() -> None:
    """choices={"align": 8} puts gaps between the experts' rows, which changes no answer and no gradient."""
    x = normal(21, 8)
    plain, aligned = (MoE(8, 16, 4, 2, std=0.5, choices=choices) for choices in ({}, {"align": 8}))
    outcomes = []
    for layer in (plain, aligned):
        with_biases(layer.experts)
        y = layer(x)[0]
        outcomes.append([y, *torch.autograd.grad(y.square().sum(), list(layer.parameters()))])
    for got, wanted in zip(*reversed(outcomes), strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("capacity_factor", [None, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tokens_at_all(capacity_factor: float | None, dtype: torch.dtype) -> None:
    layer = MoE(8, 16, 4, capacity_factor=capacity_factor, dtype=dtype)
    y, routing = layer(torch.zeros(0, 8, dtype=dtype, requires_grad=True))
    assert y.shape == (0, 8)
    assert routing.load.tolist() == [0] * 4
    y.sum().backward()


def test_capacity_drops_in_training_alone() -> None:
    layer = MoE(8, 16, 4, capacity_factor=0.5, std=0.5)
    layer.bias[2] = 10.0  # everybody to expert 2
    x = normal(16, 8)
    y, routing = layer(x)
    assert routing.count.tolist() == [0, 0, 4, 0]  # the least capacity
    assert (y[4:] == 0).all()
    torch.testing.assert_close(y[:4], layer.eval()(x)[0][:4])
    assert layer(x)[1].count.tolist() == [0, 0, 16, 0]


@pytest.mark.parametrize("capacity_factor", [None, 1.0])
def test_an_exchange_that_the_caller_brings(capacity_factor: float | None) -> None:
    """Two ranks over RoutedExchange give what one rank gives, dropped tokens included."""
    x = normal(2, 9, 8)
    alone = MoE(8, 16, 4, 2, capacity_factor=capacity_factor, std=0.5)

    def body(comm: Comm) -> torch.Tensor:
        groups = build_groups(comm, Topology(2, expert=2))
        exchange = RoutedExchange(FlatAllToAll(groups.expert), 2, send="tokens")
        layer = MoE(8, 16, 4, 2, groups=groups, exchange=exchange, capacity_factor=capacity_factor, std=0.5)
        return layer(x[comm.rank])[0]

    for got, mine in zip(threads.run(2, body), x, strict=True):
        torch.testing.assert_close(got, alone(mine)[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("residual", ["none", "learned"])
def test_a_model_in_another_dtype(dtype: torch.dtype, residual: Any) -> None:
    """By `to`, by a default or by an argument: its answers are about those in float32, and it learns."""
    config = replace(CONFIG, residual=residual)
    tokens = torch.arange(20).reshape(2, 10)
    wanted = TransformerLM(config)
    models = [TransformerLM(config).to(dtype), TransformerLM(config, dtype=dtype)]
    torch.set_default_dtype(dtype)
    try:
        models.append(TransformerLM(config))
    finally:
        torch.set_default_dtype(torch.float32)
    for model in models:
        assert model.embedding.dtype == dtype
        torch.testing.assert_close(model.embedding, wanted.embedding.to(dtype), rtol=0, atol=0)
        torch.testing.assert_close(model(tokens).logits, wanted(tokens).logits, rtol=0, atol=0.02)
        output = model(tokens)
        (output.logits.sum() + output.loss).backward()
        assert all(p.grad.dtype == p.dtype and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_answers_have_the_dtype_of_the_tokens(dtype: torch.dtype) -> None:
    x = normal(5, 8)
    layer = MoE(8, 16, 4, 2, std=0.5, capacity_factor=1.0)
    layer.bias[2] = 0.1
    wanted = layer(x)[0]
    y = layer.to(dtype)(x.to(dtype))[0]
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), wanted, rtol=0, atol=0.05 if dtype == torch.bfloat16 else 1e-6)


def test_noise_is_for_training_alone() -> None:
    choices = {"noise": Noise("gumbel", 100.0)}
    plain, noisy = MoE(8, 16, 4), MoE(8, 16, 4, choices=choices)
    x = normal(50, 8)
    assert not torch.equal(noisy(x)[1].expert, plain(x)[1].expert)
    assert torch.equal(noisy.eval()(x)[1].expert, plain(x)[1].expert)


def test_what_moe_refuses() -> None:
    def body(comm: Comm) -> None:
        groups = build_groups(comm, Topology(2, expert=2))
        with pytest.raises(ValueError, match="num_experts is 3, which expert=2 ranks cannot share"):
            MoE(8, 16, 3, groups=groups)
        with pytest.raises(ValueError, match="give the groups too"):
            MoE(8, 16, 4, exchange=RoutedExchange(FlatAllToAll(comm), 2))
        with pytest.raises(ValueError, match="the exchange has 6"):
            MoE(8, 16, 4, groups=groups, exchange=RoutedExchange(FlatAllToAll(comm), 3))
        with pytest.raises(ValueError, match="the exchange has 4 of 4 experts here, expected one of expert=2 equal"):
            MoE(8, 16, 4, groups=groups, exchange=LocalExchange(4))
        for experts in ([1, 3], [[0, 2], [1, 3]], [[0, 1], [3, 2]]):
            with pytest.raises(
                ValueError, match=r"here, expected one of|expected \[\[0, 1\], \[2, 3\]\] as the groups"
            ):
                MoE(8, 16, 4, groups=groups, exchange=RoutedExchange(FlatAllToAll(comm), experts))
        lanes = build_groups(comm, Topology(2, tensor=2, expert=2))
        inner = RoutedExchange(FlatAllToAll(lanes.expert_lane), [[comm.rank, comm.rank + 2]])
        with pytest.raises(ValueError, match=r"expected \[\[[02], [13]\]\] as the groups"):
            MoE(8, 16, 4, groups=lanes, exchange=TensorParallelExchange(inner, lanes.tensor))

    threads.run(2, body)
    with pytest.raises(ValueError, match="'gelu' or 'swiglu'"):
        MoE(8, 16, 4, activation="relu")  # type: ignore[arg-type]


@pytest.mark.parametrize("combine", ["sum", "learned"])
def test_residual(combine: Any) -> None:
    layer = ResidualMoE(8, 16, 4, combine=combine, std=0.5)
    x = normal(2, 7, 8)
    fixed, corrected = layer.mlp(x), layer.moe(x)[0]
    wanted = fixed + corrected
    if layer.coefficient is not None:
        of_expert, of_mlp = F.linear(x, layer.coefficient.weight).softmax(-1).unbind(-1)
        wanted = of_expert[..., None] * corrected + of_mlp[..., None] * fixed
    torch.testing.assert_close(layer(x)[0], wanted)
    with pytest.raises(ValueError, match="'sum' or 'learned'"):
        ResidualMoE(8, 16, 4, combine="mean")  # type: ignore[arg-type]


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_sliced_mlp_and_its_gradients(activation: Any) -> None:
    x = normal(5, 8)
    whole = MLP(8, 12, activation=activation, std=0.5)
    wanted = x.clone().requires_grad_()
    whole(wanted).square().sum().backward()

    def body(comm: Comm) -> None:
        mine = x.clone().requires_grad_()
        sliced = MLP(8, 12, activation=activation, std=0.5, tensor=comm)
        y = sliced(mine)
        torch.testing.assert_close(y, whole(x))
        y.square().sum().backward()
        torch.testing.assert_close(mine.grad, wanted.grad)
        torch.testing.assert_close(sliced.down.weight.grad, whole.down.weight.grad.chunk(2, 1)[comm.rank])

    threads.run(2, body)


def test_pyramid() -> None:
    assert pyramid(12, 32) == (32,) * 10 + (64,) * 2  # 350M+PR-MoE-32/64
    assert pyramid(10, 64) == (64,) * 8 + (128,) * 2
    assert pyramid(5, 4, "first-half") == (4, 4, 0, 0, 0)
    assert pyramid(5, 4, "second-half") == (0, 0, 4, 4, 4)
    assert pyramid(3, 4, "standard") == (4, 4, 4)
    with pytest.raises(ValueError, match="shape is 'cone'"):
        pyramid(3, 4, "cone")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="num_wide 4"):
        pyramid(3, 4, num_wide=4)


def test_each_layer_has_as_many_ranks_as_its_experts_need() -> None:
    """The paper's {32, 64, 128} experts on 128 ranks: shared by as many ranks, {4, 2, 1} copies."""
    found = layer_topologies(128, (32, 64, 128))
    assert [(t.expert, t.expert_data) for t in found] == [(32, 4), (64, 2), (128, 1)]
    assert [t.expert for t in layer_topologies(128, (32, 64, 128), expert=64, tensor=8)] == [32, 64, 64]
    assert [t.expert for t in layer_topologies(12, (8, 6, 5), pipeline=2)] == [2, 6, 1]
    with pytest.raises(ValueError, match="expert=5 does not divide"):
        layer_topologies(8, (4,), expert=5)


PAPER = {
    "350m-moe-128": 13.15,
    "1.3b-moe-128": 52.47,
    "350m-pr-moe-32-64": 4.12,
    "1.3b-pr-moe-64-128": 31.39,
    "350m-pr-moe-mos-21": 3.54,
    "1.3b-pr-moe-mos-21": 26.95,
}


def test_parameters_of_the_papers_models() -> None:
    assert list(CONFIGS)[:6] == list(PAPER)
    assert {name: round(CONFIGS[name].num_parameters() / 1e9, 2) for name in PAPER} == PAPER


@pytest.mark.parametrize("residual", ["none", "sum", "learned"])
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize("experts", [(), (0, 3), (4, 8)])
def test_num_parameters_is_what_a_model_has(residual: Any, activation: Any, experts: tuple[int, ...]) -> None:
    config = replace(CONFIG, residual=residual, activation=activation, experts=experts)
    assert config.num_parameters() == sum(p.numel() for p in TransformerLM(config).parameters())


def test_what_a_config_refuses() -> None:
    with pytest.raises(ValueError, match="expected one of 350m-moe-128, "):
        config_named("350m")
    with pytest.raises(ValueError, match="hidden is 10, which 4 heads"):
        Config(2, 10, 4)
    with pytest.raises(ValueError, match="experts has 2 entries, expected 1"):
        Config(2, 8, 4, (4, 4))
    with pytest.raises(ValueError, match="top_k is 2, expected 1"):
        Config(2, 8, 4, (4,), top_k=2, residual="sum")
    with pytest.raises(ValueError, match="activation is 'relu', expected 'gelu' or 'swiglu'"):
        Config(2, 8, 2, activation="relu")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="activation is 'relu', expected 'gelu' or 'swiglu'"):
        MLP(8, 16, activation="relu")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="residual is 'mean', expected 'none', 'sum' or 'learned'"):
        Config(2, 8, 2, residual="mean")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"stage is \(2, 2\), expected"):
        TransformerLM(CONFIGS["tiny"], stage=(2, 2))
    with pytest.raises(ValueError, match="4 layers, which pipeline=3"):
        TransformerLM(CONFIG, stage=(0, 3))
    with pytest.raises(ValueError, match="33 positions, expected <= 32"):
        TransformerLM(CONFIG)(torch.zeros(1, 33, dtype=torch.int64))


def test_no_token_sees_a_later_one() -> None:
    model = TransformerLM(CONFIG).eval()
    tokens = torch.arange(20).reshape(2, 10)
    changed = tokens.clone()
    changed[:, 6] += 1
    before, after = model(tokens).logits, model(changed).logits
    torch.testing.assert_close(before[:, :6], after[:, :6])
    assert (before[:, 6:] != after[:, 6:]).any(-1).all()


def test_the_cache_changes_nothing() -> None:
    model = TransformerLM(replace(CONFIG, std=0.3, capacity_factor=1.0)).eval()
    tokens = torch.arange(12).reshape(2, 6) * 7
    cache: dict = {}
    parts = [model(part, cache=cache).logits for part in tokens.split([3, 1, 2], 1)]
    torch.testing.assert_close(torch.cat(parts, 1), model(tokens).logits, rtol=1e-4, atol=1e-4)
    wanted = tokens
    for _ in range(8):
        wanted = torch.cat([wanted, model(wanted).logits[:, -1:].argmax(-1)], 1)
    assert model.generate(tokens, 8).tolist() == wanted.tolist()


def test_generation_draws_from_the_generator_alone() -> None:
    model = TransformerLM(CONFIG).eval()
    tokens = torch.zeros(1, 2, dtype=torch.int64)

    def drawn(seed: int) -> list[int]:
        generator = torch.Generator().manual_seed(seed)
        return model.generate(tokens, 6, temperature=1.0, generator=generator)[0].tolist()

    assert drawn(1) == drawn(1) != drawn(2)


def test_repr_says_sizes_experts_and_exchange() -> None:
    text = repr(MoE(8, 16, 4, top_k=2))
    assert "hidden=8, num_experts=4, top_k=2, exchange=LocalExchange" in text
    assert "Experts((8, 16), activation='gelu', experts=[0, 1, 2, 3])" in text

    def on_two_slices(comm: Comm) -> None:
        groups = build_groups(comm, Topology(4, tensor=2, expert=2, expert_tensor=2))
        text = repr(MoE(8, 16, 4, groups=groups))
        assert "exchange=TensorParallelExchange" in text
        first = 2 * groups.expert.rank
        assert f"experts={[first, first + 1]}, part=({groups.expert_tensor.rank}, 2)" in text

    threads.run(4, on_two_slices)
