"""moecomm.nn.deepspeed: files made in DeepSpeed's layout, of one and of two tensor ranks, into any split."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from moecomm import Comm, Topology, build_groups  # noqa: E402
from moecomm.nn import MoE  # noqa: E402
from moecomm.nn.deepspeed import load_deepspeed  # noqa: E402
from moecomm.transports import threads  # noqa: E402

torch.serialization.add_safe_globals([Namespace])
H, F, E, LAYERS = 4, 8, 4, 2


def whole(layer: int, expert: int) -> dict[str, torch.Tensor]:
    """An expert as Megatron has it: Linear(H, F), Linear(F, H)."""
    generator = torch.Generator().manual_seed(10 * layer + expert)
    shapes = {"dense_h_to_4h.weight": (F, H), "dense_h_to_4h.bias": (F,), "dense_4h_to_h.weight": (H, F)}
    return {
        name: torch.randn(shape, generator=generator) for name, shape in {**shapes, "dense_4h_to_h.bias": (H,)}.items()
    }


def gate(layer: int) -> torch.Tensor:
    return torch.randn(E, H, generator=torch.Generator().manual_seed(100 + layer))


def write(folder: Path, tensor: int) -> Path:
    """What DeepSpeed writes with so many tensor ranks that slice the experts; 0: two of them, with whole experts."""
    sliced = {"dense_h_to_4h.weight": 0, "dense_h_to_4h.bias": 0, "dense_4h_to_h.weight": 1} if tensor else {}
    module = {"language_model.embedding": torch.zeros(3)}
    for layer in range(LAYERS):
        prefix = f"language_model.encoder.layers.{2 * layer + 1}.mlp.deepspeed_moe"
        module[f"{prefix}.gate.wg.weight"] = gate(layer)
        for expert in range(E):
            for rank in range(tensor or 2):
                state = {
                    f"{prefix}.experts.deepspeed_experts.{expert}.{name}": values.chunk(tensor, sliced[name])[
                        rank
                    ].clone()
                    if name in sliced
                    else values
                    for name, values in whole(layer, expert).items()
                }
                torch.save(state, folder / f"layer_{layer}_expert_{expert}_mp_rank_{rank:02d}_model_states.pt")
    for rank in range(tensor or 2):
        content = {"module": module, "args": Namespace(num_layers=4), "dp_world_size": 4, "optimizer": None}
        torch.save(content, folder / f"mp_rank_{rank:02d}_model_states.pt")
    return folder


def layers(**options: Any) -> torch.nn.Module:
    return torch.nn.ModuleList(MoE(H, F, E, key=(number,), **options) for number in range(LAYERS))


@pytest.mark.parametrize("tensor", [0, 1, 2, 4])
def test_into_any_split(tensor: int, tmp_path: Path) -> None:
    write(tmp_path, tensor)
    alone = layers()
    load_deepspeed(tmp_path, alone)
    for number, layer in enumerate(alone):
        assert torch.equal(layer.gate, gate(number))
        for e in range(E):
            theirs = whole(number, e)
            assert torch.equal(layer.experts.up[e], theirs["dense_h_to_4h.weight"].T)
            assert torch.equal(layer.experts.up_bias[e], theirs["dense_h_to_4h.bias"])
            assert torch.equal(layer.experts.down[e], theirs["dense_4h_to_h.weight"].T)
            assert torch.equal(layer.experts.down_bias[e], theirs["dense_4h_to_h.bias"])
    x = torch.randn(5, H, generator=torch.Generator().manual_seed(3))

    def body(comm: Comm) -> None:
        for sizes in ({"expert": 4}, {"expert": 2}, {"tensor": 2, "expert_tensor": 2, "expert": 2}):
            mine = layers(groups=build_groups(comm, Topology(4, **sizes)))
            load_deepspeed(tmp_path, mine, comm=comm)
            for layer, wanted in zip(mine, alone, strict=True):
                torch.testing.assert_close(layer(x)[0], wanted(x)[0])

    threads.run(4, body)


def test_other_names(tmp_path: Path) -> None:
    layer = MoE(H, F, 1, activation="swiglu")
    theirs = {name: torch.randn(H if name == "w2" else F, F if name == "w2" else H) for name in ("w1", "w2", "w3")}
    prefix = "block.deepspeed_moe"
    state = {f"{prefix}.experts.deepspeed_experts.0.{name}.weight": values for name, values in theirs.items()}
    torch.save(state, tmp_path / "layer_0_expert_0_mp_rank_00_model_states.pt")
    module = {f"{prefix}.gate.wg.weight": torch.ones(1, H)}
    torch.save({"module": module}, tmp_path / "mp_rank_00_model_states.pt")
    load_deepspeed(tmp_path, layer, names={"gate": "w1.weight", "up": "w3.weight", "down": "w2.weight"})
    assert torch.equal(layer.experts.gate[0], theirs["w1"].T)
    assert torch.equal(layer.experts.up[0], theirs["w3"].T)
    assert torch.equal(layer.experts.down[0], theirs["w2"].T)
    with pytest.raises(ValueError, match=r"names has up, up_bias, down, down_bias, but nothing for gate"):
        load_deepspeed(tmp_path, layer)
    with pytest.raises(ValueError, match=r"has no block.*0.dense_h_to_4h.weight, but block.*0.w1.weight"):
        load_deepspeed(tmp_path, MoE(H, F, 1))


class Evil:
    """Code that runs when a pickle is loaded."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (exec, ("raise SystemExit('it ran')",))


FILE = "layer_1_expert_2_mp_rank_00_model_states.pt"
SPOILED: dict[str, Callable[[Path], object]] = {
    "has no layer_1_expert_2_mp_rank": lambda folder: (folder / FILE).unlink(),
    f"{FILE} cannot be read as tensors: PytorchStreamReader": lambda folder: (folder / FILE).write_bytes(
        (folder / FILE).read_bytes()[:-100]
    ),
    f"{FILE} cannot be read as tensors: ": lambda folder: (folder / FILE).write_bytes(b""),
    "cannot be read as tensors: Unsupported global: GLOBAL exec": lambda folder: torch.save(Evil(), folder / FILE),
    r"dense_h_to_4h.weight in .* has shape \(9, 4\), expected \(8, 4\)": lambda folder: torch.save(
        {f"a.deepspeed_moe.experts.deepspeed_experts.2.{name}": torch.zeros(9, 4) for name in whole(1, 2)},
        folder / FILE,
    ),
    "has layer_0_expert_4, which the model does not have": lambda folder: torch.save(
        {}, folder / "layer_0_expert_4_mp_rank_00_model_states.pt"
    ),
    "has layer_2_expert_0, which the model does not have": lambda folder: torch.save(
        {}, folder / "layer_2_expert_0_mp_rank_00_model_states.pt"
    ),
    "No such file .*mp_rank_00_model_states.pt": lambda folder: (folder / "mp_rank_00_model_states.pt").unlink(),
}


@pytest.mark.parametrize("message", SPOILED)
def test_what_does_not_fit(message: str, tmp_path: Path) -> None:
    """Both ranks say so, though one alone reads the file, and the weights are what they were."""
    write(tmp_path, 1)
    SPOILED[message](tmp_path)

    def body(comm: Comm) -> None:
        mine = layers(groups=build_groups(comm, Topology(2, expert=2)))
        before = [parameter.clone() for parameter in mine.parameters()]
        with pytest.raises((ValueError, OSError), match=message):
            load_deepspeed(tmp_path, mine, comm=comm)
        assert all(torch.equal(a, b) for a, b in zip(before, mine.parameters(), strict=True))

    threads.run(2, body)
