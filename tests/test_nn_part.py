"""state_dict of a rank is its own: another rank's is refused, whatever way it came; checkpoints need no such thing."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from safetensors.torch import load_file, save_file  # noqa: E402

from moecomm import Comm, Topology, build_groups  # noqa: E402
from moecomm.nn import MLP, Config, Experts, MoE, ResidualMoE, TransformerLM, checkpoint  # noqa: E402
from moecomm.transports import threads  # noqa: E402

torch.set_num_threads(1)  # threads that wait for a busy core take longer than they save
State = dict[str, Any]


def through_a_file(state: State) -> State:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return dict(torch.load(file, weights_only=True))


def through_safetensors(state: State, folder: Path) -> State:
    save_file({name: tensor.clone() for name, tensor in state.items()}, folder / "all")
    return dict(load_file(folder / "all"))


WAYS: dict[str, Callable[[State, Path], State]] = {
    "itself": lambda state, _: state,
    "a file": lambda state, _: through_a_file(state),
    "safetensors": through_safetensors,
    "prefixes": lambda state, _: {f"module.{name}"[7:]: tensor for name, tensor in state.items()},
    "16 bits": lambda state, _: {name: tensor.bfloat16() for name, tensor in state.items()},
    "a copy": lambda state, _: copy.deepcopy(state),
}
SPLITS = [{"expert": 2}, {"tensor": 2, "expert_tensor": 2}, {"tensor": 2, "expert": 2}]


@pytest.mark.parametrize("way", WAYS)
def test_experts_of_another_rank_are_refused(way: str, tmp_path: Path) -> None:
    """Strict or not, and the bank stays as it was; that of the rank itself is taken, also strictly."""

    def states(comm: Comm) -> list[State]:
        return [made(comm, sizes).state_dict() for sizes in SPLITS]

    def made(comm: Comm, sizes: dict[str, int]) -> torch.nn.Module:
        return torch.nn.Sequential(MoE(8, 16, 4, groups=build_groups(comm, Topology(2, **sizes))))

    saved = [[WAYS[way](state, tmp_path) for state in of_rank] for of_rank in threads.run(2, states)]

    def body(comm: Comm) -> None:
        for number, sizes in enumerate(SPLITS):
            model = made(comm, sizes)
            before = [parameter.detach().clone() for parameter in model[0].experts.parameters()]
            for options in ({}, {"strict": False}, {"assign": True}):
                with pytest.raises(RuntimeError, match=r"0.experts: the state_dict has slice .*, this rank slice "):
                    model.load_state_dict(saved[1 - comm.rank][number], **options)
                assert all(torch.equal(*pair) for pair in zip(model[0].experts.parameters(), before, strict=True))
            got = model.load_state_dict(saved[comm.rank][number])
            assert not got.missing_keys and not got.unexpected_keys

    threads.run(2, body)


def test_a_place_survives_16_bits() -> None:
    """bfloat16 has no 257: both sides are cast."""
    here = Experts(4, 4, range(256, 260), num_experts=300)
    state = {name: tensor.bfloat16() for name, tensor in here.state_dict().items()}
    here.load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"slice 0 of 1 of experts \[256"):
        Experts(4, 4, range(4), num_experts=300).load_state_dict(state)


def test_a_state_without_places_is_taken() -> None:
    """As of before there were any, and as tools make them that know of weights alone."""
    here = Experts(4, 4, range(2, 4), num_experts=4)
    weights = {name: tensor.clone() + 1 for name, tensor in here.named_parameters()}
    here.load_state_dict(weights)
    assert all(torch.equal(parameter, weights[name]) for name, parameter in here.named_parameters())


def test_slices_of_dense_layers() -> None:
    """Those of another tensor rank are refused; a whole layer's state has weights alone."""
    whole = ResidualMoE(8, 16, 4)
    assert {*whole.state_dict()} == {name for name, _ in (*whole.named_parameters(), *whole.named_buffers())}

    def body(comm: Comm) -> State:
        return MLP(8, 16, tensor=comm).state_dict()

    saved = threads.run(2, body)

    def other(comm: Comm) -> None:
        layer = MLP(8, 16, tensor=comm)
        layer.load_state_dict(saved[comm.rank])
        words = rf"up: the state_dict has slice {1 - comm.rank} of 2, this rank slice {comm.rank} of 2"
        with pytest.raises(RuntimeError, match=words):
            layer.load_state_dict(saved[1 - comm.rank])

    threads.run(2, other)


def test_checkpoints_and_models_on_meta(tmp_path: Path) -> None:
    """A checkpoint of four ranks has no place in it and is one rank's; a model may be made without memory first."""
    config = Config(2, 16, 2, experts=(4,), vocabulary=32, context=8, residual="sum")

    def save(comm: Comm) -> None:
        groups = build_groups(comm, Topology(4, expert=2, tensor=2, expert_tensor=2))
        checkpoint.save(tmp_path, 1, TransformerLM(config, groups=[groups]), comm=comm)

    threads.run(4, save)
    assert "_extra_state" not in (tmp_path / "step-000001" / "checkpoint.json").read_text()
    alone = TransformerLM(config, seed=1)
    checkpoint.load(tmp_path / "step-000001", alone)
    assert all(torch.equal(*pair) for pair in zip(alone.parameters(), TransformerLM(config).parameters(), strict=True))
    empty = ResidualMoE(8, 16, 4).to("meta")
    full = ResidualMoE(8, 16, 4, key=(1,))
    empty.load_state_dict(full.state_dict(), assign=True)
    assert torch.equal(empty.moe.experts.up, full.moe.experts.up)
    full.load_state_dict(ResidualMoE(8, 16, 4).to("meta").state_dict(), assign=True)
