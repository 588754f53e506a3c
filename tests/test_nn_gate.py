"""What a layer's gate decides: random draws, capacity in evaluation, logits that nothing follows from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from conftest import gloo_run, mpi_run

torch = pytest.importorskip("torch")

from torch.utils.checkpoint import checkpoint  # noqa: E402

from moecomm import (  # noqa: E402
    Comm,
    CommError,
    FlatAllToAll,
    HierarchicalAllToAll,
    Nodes,
    RoutedExchange,
    Routing,
    TensorParallelExchange,
    Topology,
    build_groups,
    route,
)
from moecomm.exchange import HierarchicalExchange  # noqa: E402
from moecomm.gating import Generator, Noise  # noqa: E402
from moecomm.nn import CONFIGS, Config, MoE, ResidualMoE, TransformerLM  # noqa: E402
from moecomm.transports import threads  # noqa: E402
from moecomm.transports.wrappers import Checked, Timed  # noqa: E402

torch.set_num_threads(1)
RANDOM: list[dict[str, Any]] = [
    {"choices": {"noise": Noise("gumbel")}},
    {"choices": {"drop": "random"}, "capacity_factor": 0.5},
]


def normal(num_tokens: int = 40, seed: int = 1) -> torch.Tensor:
    return torch.randn(num_tokens, 8, generator=torch.Generator().manual_seed(seed))


def chosen(layer: MoE, x: torch.Tensor) -> list[list[int]]:
    experts: list[list[int]] = layer(x)[1].expert.tolist()
    return experts


# ---- random draws --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", RANDOM, ids=str)
def test_each_forward_pass_draws_anew(options: dict[str, Any]) -> None:
    layer, x = MoE(8, 16, 4, 2, **options), normal()
    torch.manual_seed(7)
    first, second = chosen(layer, x), chosen(layer, x)
    torch.manual_seed(7)
    assert [chosen(layer, x), chosen(layer, x)] == [first, second]
    assert first != second
    torch.manual_seed(7)
    other = MoE(8, 16, 4, 2, key=(0, "another layer"), **options)
    other.gate = layer.gate
    assert chosen(other, x) != first


@pytest.mark.parametrize("options", RANDOM, ids=str)
def test_evaluation_draws_nothing(options: dict[str, Any]) -> None:
    layer, x = MoE(8, 16, 4, 2, eval_capacity_factor=0.5, **options).eval(), normal()
    before = torch.get_rng_state()
    assert chosen(layer, x) == chosen(layer, x)
    assert torch.equal(torch.get_rng_state(), before)


def gradients(layers: list[MoE], call: Callable[..., Any]) -> list[torch.Tensor]:
    """Of x and of all weights, call(layer, x) having been the forward pass of each layer."""
    x = normal().requires_grad_()
    y = x
    for layer in layers:
        layer.zero_grad()
        y = call(lambda y, layer=layer: layer(y)[0], y)
    torch.rand(5)  # the state has moved on until then
    y.square().sum().backward()
    return [x.grad, *(weight.grad.clone() for layer in layers for weight in layer.parameters())]


@pytest.mark.parametrize("options", RANDOM, ids=str)
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_draws_again_what_it_drew(options: dict[str, Any], use_reentrant: bool) -> None:
    layers = [MoE(8, 16, 4, 2, key=(number,), std=0.5, **options) for number in range(3)]
    outcomes = []
    for call in (lambda run, y: run(y), lambda run, y: checkpoint(run, y, use_reentrant=use_reentrant)):
        torch.manual_seed(3)
        outcomes.append(gradients(layers, call))
    for got, wanted in zip(*reversed(outcomes), strict=True):
        torch.testing.assert_close(got, wanted)


def test_draws_of_ranks() -> None:
    """Tensor ranks draw the same whatever their generators say, data ranks others from generators that agree."""

    def body(comm: Comm) -> None:
        groups = build_groups(comm, Topology(4, tensor=2, expert=2))
        for options in RANDOM:
            layers = [MoE(8, 16, 4, 2, key=(number,), groups=groups, std=0.5, **options) for number in range(2)]
            torch.manual_seed(groups.tensor.rank)
            first, second = (layers[0](normal())[1].expert for _ in range(2))
            for_tensor, for_data = (group.all_gather(first[None]) for group in (groups.tensor, groups.data))
            assert torch.equal(for_tensor[0], for_tensor[1])
            assert not torch.equal(for_data[0], for_data[1])
            assert not torch.equal(first, second)
            outcomes = []
            for use_reentrant in (None, False, True):

                def call(run: Any, y: torch.Tensor, use_reentrant: bool | None = use_reentrant) -> Any:
                    return run(y) if use_reentrant is None else checkpoint(run, y, use_reentrant=use_reentrant)

                torch.manual_seed(10 + groups.tensor.rank)
                outcomes.append(gradients(layers, call))
            for wanted, *again in zip(*outcomes, strict=True):
                for got in again:
                    torch.testing.assert_close(got, wanted)

    gloo_run(4, body)


def test_a_generator_of_the_caller_is_refused() -> None:
    with pytest.raises(ValueError, match="MoE: choices has a generator, expected none"):
        MoE(8, 16, 4, choices={"drop": "random", "generator": Generator(1)})


# ---- capacity and weights ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [MoE, ResidualMoE])
def test_capacity_in_evaluation(kind: Any) -> None:
    """Each mode has its own factor. Everybody goes to expert 2, which keeps factor * 16 / 4 of 64 tokens."""
    layer = kind(8, 16, 4, capacity_factor=0.5, eval_capacity_factor=1.0)
    (layer if kind is MoE else layer.moe).bias[2] = 10.0
    assert layer(normal(64))[1].count.tolist() == [0, 0, 8, 0]
    assert layer.eval()(normal(64))[1].count.tolist() == [0, 0, 16, 0]


def test_a_config_says_how_weights_are_normalised_and_what_evaluation_drops() -> None:
    config = replace(CONFIGS["tiny"], residual="none", top_k=2, normalize="selected", eval_capacity_factor=0.25)
    text = torch.arange(64).reshape(2, 32)
    plain = TransformerLM(replace(config, normalize="none", eval_capacity_factor=None))
    model = TransformerLM(config)
    for routing, raw in zip(model(text).routings, plain(text).routings, strict=True):
        torch.testing.assert_close(routing.weight.sum(1), torch.ones(64))
        assert (raw.weight.sum(1) < 0.99).all()
    first = model.eval()(text).routings[0]
    assert first.count.tolist() == [8] * 4
    assert {name for name, each in CONFIGS.items() if each.normalize == "selected"} == {
        name for name, each in CONFIGS.items() if each.top_k == 2
    }
    with pytest.raises(ValueError, match="normalize is 'all', expected 'none' or 'selected'"):
        Config(2, 8, 2, normalize="all")  # type: ignore[arg-type]


def test_weights_are_those_of_deepspeeds_top2gating() -> None:
    """w1 = g1 / (g1 + g2) of the softmax, after drops: a token that lost one route gives the other weight 1."""
    layer = MoE(8, 16, 4, 2, std=0.5, capacity_factor=0.5, choices={"normalize": "selected", "drop": "choice"})
    routing = layer(normal())[1]
    share = (normal() @ layer.gate.T).softmax(-1).detach()
    kept = torch.where(routing.expert >= 0, share.gather(1, routing.expert.clamp(min=0).long()), 0)
    wanted = kept / kept.sum(1, keepdim=True).clamp(min=torch.finfo(torch.float32).eps)
    torch.testing.assert_close(routing.weight.detach(), wanted)
    assert (routing.weight == 1).any() and ((kept > 0).sum(1) == 0).any()


# ---- logits that nothing follows from ------------------------------------------------------------------------------


def lanes(comm: Comm) -> TensorParallelExchange:
    topology = Topology(comm.size, tensor=2, expert=comm.size)
    groups = build_groups(comm, topology)
    held = [[topology.coords(rank)["expert"]] for rank in topology.group_of(comm.rank, "expert_lane")]
    return TensorParallelExchange(RoutedExchange(FlatAllToAll(groups.expert_lane), held), groups.tensor)


EXCHANGES: dict[str, Callable[[Comm], Any]] = {
    "assignments": lambda comm: RoutedExchange(FlatAllToAll(comm), 1),
    "tokens": lambda comm: RoutedExchange(HierarchicalAllToAll(comm, Nodes.of_size(2, 4)), 1, send="tokens"),
    "hierarchical": lambda comm: HierarchicalExchange(HierarchicalAllToAll(comm, Nodes.of_size(2, 4)), 1),
    "uneven nodes": lambda comm: HierarchicalExchange(HierarchicalAllToAll(comm, Nodes([[0, 2, 3], [1]])), 1),
    "some without experts": lambda comm: HierarchicalExchange(
        HierarchicalAllToAll(comm, Nodes([[3, 1], [0], [2]])), [[0, 1], [], [2], [3]]
    ),
    "lanes": lanes,
}


def check_alarm(comm: Comm, make: Callable[[Comm], Any], bad: tuple[int, ...], wrap: Callable[[Comm], Comm]) -> None:
    """Every rank gets the same error, at the same place: the next call of all of them is as ever."""
    exchange, x = make(wrap(comm)), np.ones((3 + comm.rank // 2, 8), np.float32)
    logits = np.zeros((len(x), 4), np.float32)
    logits[-1, 2] = np.nan if comm.rank in bad else 0
    with pytest.raises(ValueError, match=r"dispatch: the gate of rank \d had no answer: logits has a NaN") as caught:
        exchange.dispatch(x, route(logits, 2, unusable="note"))
    said = {text.partition("  (")[0] for text in texts(comm, str(caught.value))}
    assert said == ({f"dispatch: the gate of rank {bad[0]} had no answer: {PROBLEM}"} if make is not lanes else said)
    rows, plan = exchange.dispatch(x, route(np.zeros_like(logits), 2, normalize="selected"))
    np.testing.assert_allclose(exchange.combine(3 * rows, plan), 3 * x, rtol=1e-6)


PROBLEM = "logits has a NaN or +inf, or a row of -inf alone"


def texts(comm: Comm, text: str) -> list[str]:
    every = comm.all_gather(np.frombuffer(text.ljust(300).encode(), np.uint8)[None])
    return [bytes(line).decode().rstrip() for line in every]


@pytest.mark.parametrize("wrap", [lambda comm: comm, Checked, Timed], ids=["plain", "checked", "timed"])
@pytest.mark.parametrize("bad", [(0,), (3,), (1, 2), (0, 1, 2, 3)], ids=str)
@pytest.mark.parametrize("name", EXCHANGES)
def test_unusable_logits_of_some_ranks_raise_on_all(name: str, bad: tuple[int, ...], wrap: Any) -> None:
    if name == "lanes":  # tensor ranks have the same logits
        bad = tuple(rank for rank in range(4) if any(rank // 2 == other // 2 for other in bad))
    threads.run(4, lambda comm: check_alarm(comm, EXCHANGES[name], bad, wrap))


def check_layer(comm: Comm, tensor: int) -> None:
    """A NaN among one rank's tokens, or those of one tensor group."""
    groups = build_groups(comm, Topology(comm.size, tensor=tensor, expert=comm.size))
    for kind in (MoE, ResidualMoE):
        layer = kind(8, 16, 4, groups=groups)
        x = normal()
        if comm.rank // tensor == 1:
            x[5, 3] = float("nan")
        with pytest.raises(ValueError, match=r"the gate of rank \d had no answer: logits has a NaN"):
            layer(x)
        y = layer(normal())[0]
        y.sum().backward()
        assert y.isfinite().all()


@pytest.mark.parametrize("tensor", [1, 2])
def test_a_layer_with_unusable_logits_on_threads(tensor: int) -> None:
    threads.run(2 * tensor, lambda comm: check_layer(comm, tensor))


@pytest.mark.parametrize("tensor", [1, 2])
def test_a_layer_with_unusable_logits_on_gloo(tensor: int) -> None:
    gloo_run(2 * tensor, lambda comm: check_layer(comm, tensor))


@pytest.mark.mpi(min_size=4)
@pytest.mark.parametrize("tensor", [1, 2])
def test_a_layer_with_unusable_logits_on_mpi(tensor: int) -> None:
    mpi_run(2 * tensor, lambda comm: check_layer(comm, tensor))


@pytest.mark.parametrize("tensor", [1, 2])
def test_experts_that_fail_on_one_rank(tensor: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """It cannot go on with the next batch, which the others would take for this one's answers; they end too."""
    ended = []

    def body(comm: Comm) -> None:
        layer = MoE(8, 16, 4, groups=build_groups(comm, Topology(comm.size, tensor=tensor, expert=comm.size)))
        if comm.rank == 1:
            monkeypatch.setattr(layer.experts, "forward", lambda *rows: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                layer(normal())
            monkeypatch.undo()
        with pytest.raises(CommError, match=r"MoE failed: ZeroDivisionError|rank 1") as caught:
            layer(normal())
        ended.append(comm.rank)
        raise caught.value

    with pytest.raises(CommError):
        threads.run(2 * tensor, body)
    assert 1 in ended


def test_alone_a_layer_raises_as_route_does() -> None:
    with pytest.raises(ValueError, match="route: logits has a NaN"):
        MoE(8, 16, 4)(torch.full((2, 8), torch.nan))


def test_a_status_without_tables() -> None:
    """Of a routing that the caller has made, as of a GPU: the experts may be any."""

    def body(comm: Comm) -> None:
        expert, weight = np.zeros((3, 1), np.int32), np.ones((3, 1), np.float32)
        routing = Routing(expert, weight, status=np.int32(2 * (comm.rank == 1)))
        with pytest.raises(ValueError, match="the gate of rank 1 had no answer: bias has a number that is not finite"):
            RoutedExchange(FlatAllToAll(comm), 1).dispatch(np.ones((3, 2)), routing)

    threads.run(2, body)
