"""Parameter groups, and gradients that are never None."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from moecomm import Comm, Topology, build_groups  # noqa: E402
from moecomm.groups import Groups  # noqa: E402
from moecomm.nn import (  # noqa: E402
    CONFIGS,
    Config,
    MoE,
    TransformerLM,
    agree_on_overflow,
    gradient_norm,
    layer_groups,
    parameter_groups,
    reduce_gradients,
)
from moecomm.transports import threads  # noqa: E402

torch.set_num_threads(1)  # threads that wait for a busy core take longer than they save


def test_two_groups_have_every_parameter_once() -> None:
    model = TransformerLM(CONFIGS["tiny"])
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    dense, experts = parameter_groups(model, lr=0.5)
    assert {names[id(p)] for p in experts["params"]} == {name for name in names.values() if ".experts." in name}
    assert sorted(names[id(p)] for group in (dense, experts) for p in group["params"]) == sorted(names.values())
    assert (dense["name"], experts["name"], experts["lr"], "lr" in dense) == ("dense", "experts", 0.5, False)


@pytest.mark.parametrize(
    "make",
    [lambda p: torch.optim.SGD(p, 1.0), lambda p: torch.optim.Adam(p, 1.0), lambda p: torch.optim.Adagrad(p, 1.0)],
)
def test_an_optimizer_takes_them(make: Callable[[Any], Any]) -> None:
    """All tokens go to expert 2; the others, on both ranks, get zeros and stay where they are."""

    def body(comm: Comm) -> None:
        groups = build_groups(comm, Topology(2, expert=2))
        layer = torch.nn.Sequential(MoE(8, 16, 4, groups=groups), MoE(8, 16, 4, groups=groups))
        layer[0].bias[2] = 10
        optimizer = make(parameter_groups(layer, lr=1e-3))
        before = layer[0].experts.up.detach().clone()
        layer[0](torch.ones(5, 8))[0].square().sum().backward()  # the second layer is not even called
        reduce_gradients(layer, groups)
        assert all(p.grad is not None for p in layer.parameters())
        assert all((p.grad == 0).all() for p in layer[1].parameters())
        optimizer.step()
        moved = (layer[0].experts.up != before).flatten(1).any(1).tolist()
        assert moved == ([True, False] if comm.rank == 1 else [False, False])

    threads.run(2, body)


def test_a_frozen_parameter_stays() -> None:
    """A gradient of zeros would let the optimizer's weight decay move it."""

    def body(comm: Comm) -> None:
        groups = build_groups(comm, Topology(2, expert=2))
        layer = MoE(8, 16, 4, groups=groups)
        frozen = [layer.gate, layer.experts.up]
        for parameter in frozen:
            parameter.requires_grad_(False)
        before = [parameter.clone() for parameter in frozen]
        optimizer = torch.optim.AdamW(layer.parameters(), weight_decay=0.5)
        down = layer.experts.down.detach().clone()
        layer(torch.ones(5, 8))[0].square().sum().backward()
        reduce_gradients(layer, groups)
        optimizer.step()
        assert all(torch.equal(*pair) for pair in zip(frozen, before, strict=True))
        assert not torch.equal(layer.experts.down, down)

    threads.run(2, body)


def test_the_mean_of_16_bit_gradients_has_no_infinite_sum() -> None:
    def body(comm: Comm) -> None:
        model = torch.nn.Linear(3, 2, dtype=torch.float16)
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, 40000.0 + 64 * comm.rank)
        reduce_gradients(model, build_groups(comm, Topology(2)))
        assert all((p.grad == 40032).all() and p.grad.dtype == torch.float16 for p in model.parameters())

    threads.run(2, body)
    with pytest.raises(ValueError, match="reduce_gradients: num_micro_batches is 0, expected at least 1"):
        reduce_gradients(torch.nn.Linear(3, 2), None, 0)


@pytest.mark.parametrize("frozen", [(), (0, 2)])
def test_the_embedding_of_two_stages_in_a_wrapped_model(frozen: tuple[int, ...]) -> None:
    """First and last stage share it: what each has, the sum of the two, also where the model is a part of another.

    Stages between the two cannot know that it is frozen, and do not wait.
    """

    def body(comm: Comm) -> None:
        groups = build_groups(comm, Topology(3, pipeline=3))
        config = Config(3, 16, 2, vocabulary=32, context=8)
        model = torch.nn.Sequential(TransformerLM(config, groups=[groups], stage=(comm.rank, 3)))
        if comm.rank != 1:
            model[0].embedding.requires_grad_(comm.rank not in frozen)
            if comm.rank not in frozen:
                model[0].embedding.grad = torch.full_like(model[0].embedding, 1.0 + comm.rank)
        reduce_gradients(model, groups)
        if comm.rank in frozen:
            assert model[0].embedding.grad is None
        elif comm.rank != 1:
            assert (model[0].embedding.grad == 4).all()

    threads.run(3, body)


@pytest.mark.parametrize(
    "sizes",
    [{}, {"expert": 2}, {"tensor": 2}, {"tensor": 2, "expert_tensor": 2}, {"tensor": 2, "pipeline": 2}],
)
def test_the_norm_of_all_gradients(sizes: dict[str, int]) -> None:
    """However the model is split: first weights, and so weights plus 1 as gradients, are those of one rank."""

    def norm(model: TransformerLM, groups: Any) -> float:
        for parameter in model.parameters():
            parameter.grad = parameter.detach() + 1
        return float(gradient_norm(model, groups))

    config = CONFIGS["tiny"]
    alone = TransformerLM(config)
    wanted = norm(alone, None)
    assert wanted == pytest.approx(float(torch.nn.utils.clip_grad_norm_(alone.parameters(), 1e9)))

    def body(comm: Comm) -> None:
        groups = layer_groups(comm, config.experts, **sizes)
        pipeline = groups[0].pipeline
        model = TransformerLM(config, groups=groups, stage=(pipeline.rank, pipeline.size))
        assert norm(model, groups[0]) == pytest.approx(wanted, rel=1e-6)

    threads.run(4, body)


REFUSED: dict[str, Callable[[Groups, int], tuple[Groups | None, int]]] = {
    "num_micro_batches of rank 1 is not that of rank 0": lambda groups, rank: (groups, 2 - rank),
    "num_micro_batches is 0, expected at least 1": lambda groups, rank: (groups, 0),
    "num_micro_batches of rank 1 is not": lambda groups, rank: (groups, 1 - rank),
    "groups is None, expected those of the model's layers": lambda groups, rank: (None, 1),
    r"num_micro_batches of rank 1 is not that of rank 0; this rank's is ": lambda groups, rank: (
        groups if rank else None,
        1,
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_arguments_that_differ_or_do_not_fit_change_no_gradient(message: str) -> None:
    def body(comm: Comm) -> None:
        groups = build_groups(comm, Topology(2, expert=2))
        layer = MoE(8, 16, 4, groups=groups)
        layer(torch.ones(5, 8))[0].square().sum().backward()
        before = [None if p.grad is None else p.grad.clone() for p in layer.parameters()]
        with pytest.raises(ValueError, match=f"reduce_gradients: {message}"):
            reduce_gradients(layer, *REFUSED[message](groups, comm.rank))
        for parameter, grad in zip(layer.parameters(), before, strict=True):
            assert (parameter.grad is None) if grad is None else torch.equal(parameter.grad, grad)
        reduce_gradients(layer, groups)
        with pytest.raises(ValueError, match="gradient_norm: groups is None, expected those of the model's layers"):
            gradient_norm(layer, None)

    threads.run(2, body)


def test_groups_with_other_dense_axes() -> None:
    def body(comm: Comm) -> None:
        layer = MoE(8, 16, 4, groups=build_groups(comm, Topology(4, expert=2, tensor=2)))
        other = build_groups(comm, Topology(4, expert=2))
        for function in (reduce_gradients, gradient_norm):
            with pytest.raises(ValueError, match=f"{function.__name__}: groups has .*'data': 4, .*, expected .*: 2, "):
                function(layer, other)

    threads.run(4, body)
    alone = MoE(8, 16, 4, groups=build_groups(threads.run(1, lambda comm: comm)[0], Topology(1)))
    reduce_gradients(alone, None)  # one rank: there is nobody to ask


@pytest.mark.parametrize("agreed", [True, False])
def test_an_overflow_on_one_rank_skips_the_step_on_all(agreed: bool) -> None:
    """Step 1: one expert's gradient, on rank 1 alone, is too large once it is scaled. Without agreement ranks part."""

    def body(comm: Comm) -> tuple[list[float], list[list[bool]]]:
        groups = build_groups(comm, Topology(2, expert=2))
        model = torch.nn.Sequential(MoE(8, 16, 4, groups=groups), torch.nn.Linear(8, 8))
        with torch.no_grad():
            model[1].weight.copy_(torch.linspace(-1, 1, 64).view(8, 8))
            model[1].bias.zero_()
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        scales, moved = [], []
        for step in range(3):
            before = [parameter.detach().clone() for parameter in model.parameters()]
            optimizer.zero_grad()
            x = torch.randn(6, 8, generator=torch.Generator().manual_seed(step))
            scaler.scale(model[1](model[0](x)[0]).square().mean()).backward()
            reduce_gradients(model, groups)
            if step == 1 and comm.rank == 1:
                model[0].experts.up.grad[0, 0, 0] = torch.inf
            if agreed:
                agree_on_overflow(model, groups)
            scaler.unscale_(optimizer)
            norm = gradient_norm(model, groups)
            torch.nn.utils.clip_grads_with_norm_(model.parameters(), 1.0, norm)
            scaler.step(optimizer)
            scaler.update()
            scales.append(scaler.get_scale())
            moved.append([not torch.equal(*pair) for pair in zip(model.parameters(), before, strict=True)])
            assert all(parameter.isfinite().all() for parameter in model.parameters()) or not agreed
        return scales, [list(map(any, zip(*moved[::2], strict=True))), moved[1]]

    (scales, moved), other = threads.run(2, body)
    if agreed:
        assert scales == other[0] == [2.0**11, 2.0**10, 2.0**11]
        assert all(moved[0]) and not any(moved[1]) and not any(other[1][1])
    else:  # what this is for
        assert scales != other[0]


def test_finite_gradients_stay_what_they_are() -> None:
    model = torch.nn.Linear(3, 2)
    model(torch.ones(4, 3)).sum().backward()
    before = [parameter.grad.clone() for parameter in model.parameters()]
    agree_on_overflow(model, None)
    assert all(torch.equal(p.grad, grad) for p, grad in zip(model.parameters(), before, strict=True))
    model.bias.grad[1] = torch.nan
    agree_on_overflow(model, None)
    assert all(parameter.grad.isnan().all() for parameter in model.parameters())
