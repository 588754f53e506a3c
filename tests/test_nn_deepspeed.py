"""moecomm.nn.deepspeed: files made in DeepSpeed's layout, of one and of two tensor ranks, into any split."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from moecomm import Comm, Topology, build_groups  # noqa: E402
from moecomm.gating import Routing  # noqa: E402
from moecomm.nn import MoE, ResidualMoE  # noqa: E402
from moecomm.nn.deepspeed import load_deepspeed  # noqa: E402
from moecomm.transports import threads  # noqa: E402

torch.set_num_threads(1)  # threads that wait for a busy core take longer than they save
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


def coefficient(layer: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(200 + layer)
    return {
        "coefficient.weight": torch.randn(2, H, generator=generator),
        "coefficient.bias": torch.randn(2, generator=generator),
    }


RESIDUAL = 99
"""In the place of an expert's number: the MLP of a layer."""


def write(folder: Path, tensor: int, residual: bool = False) -> Path:
    """What DeepSpeed writes with so many tensor ranks that slice the experts; 0: two of them, with whole experts.

    residual  with use_residual: an MLP, sliced as an expert, and its coefficient
    """
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
        for layer in range(LAYERS if residual else 0):
            prefix = f"language_model.encoder.layers.{2 * layer + 1}.mlp"
            for name, values in whole(layer, RESIDUAL).items():
                part = values.chunk(tensor, sliced[name])[rank].clone() if name in sliced else values
                module[f"{prefix}.mlp.{name}"] = part
            module.update({f"{prefix}.{name}": values for name, values in coefficient(layer).items()})
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


def residual_layers(combine: str = "learned", **options: Any) -> torch.nn.Module:
    made = [ResidualMoE(H, F, E, combine=combine, key=(number,), **options) for number in range(LAYERS)]
    return torch.nn.ModuleList(made)


def deepspeed_forward(number: int, x: torch.Tensor, routing: Routing) -> torch.Tensor:
    """forward of deepspeed.moe.layer.MoE with use_residual, of the weights that were written."""

    def network(expert: int, rows: torch.Tensor) -> torch.Tensor:
        of = whole(number, expert)
        inner = rows @ of["dense_h_to_4h.weight"].T + of["dense_h_to_4h.bias"]
        return torch.nn.functional.gelu(inner) @ of["dense_4h_to_h.weight"].T + of["dense_4h_to_h.bias"]

    chosen = torch.stack([network(int(routing.expert[t, 0]), x[t]) for t in range(len(x))])
    output = chosen * (x @ gate(number).T).softmax(-1).max(-1).values[:, None]
    of = coefficient(number)
    coef = (x @ of["coefficient.weight"].T + of["coefficient.bias"]).softmax(-1)
    return output * coef[..., 0:1] + network(RESIDUAL, x) * coef[..., 1:]


@pytest.mark.parametrize("tensor", [0, 1, 2, 4])
def test_a_residual_mlp_and_its_coefficient(tensor: int, tmp_path: Path) -> None:
    """The answers are those of DeepSpeed's layer, under every split here and there."""
    write(tmp_path, tensor, residual=True)
    x = torch.randn(5, H, generator=torch.Generator().manual_seed(3))

    def check(model: torch.nn.Module) -> None:
        for number, layer in enumerate(model):
            y, routing = layer(x)
            torch.testing.assert_close(y, deepspeed_forward(number, x, routing), rtol=1e-5, atol=1e-5)

    alone = residual_layers()
    load_deepspeed(tmp_path, alone)
    check(alone)

    def body(comm: Comm) -> None:
        for sizes in ({"expert": 4}, {"tensor": 2, "expert": 2}, {"tensor": 2, "expert_tensor": 2, "expert": 2}):
            model = residual_layers(groups=build_groups(comm, Topology(4, **sizes)))
            load_deepspeed(tmp_path, model, comm=comm)
            check(model)

    threads.run(4, body)


@pytest.mark.parametrize(
    ("model", "residual", "message"),
    [
        (layers, True, r"has .*layers.1.mlp.mlp.dense.*, expected none: in the model it is no ResidualMoE\(combine="),
        (lambda: residual_layers("sum"), True, r"has .*layers.1.mlp.coefficient.weight, expected none"),
        (residual_layers, False, r"has no .*layers.1.mlp.mlp.dense_4h_to_h.weight, but "),
    ],
)
def test_a_residual_mlp_on_one_side_alone(
    model: Callable[[], torch.nn.Module], residual: bool, message: str, tmp_path: Path
) -> None:
    write(tmp_path, 1, residual)
    model = model()
    before = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(ValueError, match=message):
        load_deepspeed(tmp_path, model)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_a_residual_swiglu_with_other_names(tmp_path: Path) -> None:
    """It has no biases there: they are 0 here, whatever they were. A weight without a name is refused."""
    layer = ResidualMoE(H, F, 1, combine="learned", activation="swiglu")
    torch.nn.init.ones_(layer.mlp.up.bias)
    theirs = {name: torch.randn(H if name == "w2" else F, F if name == "w2" else H) for name in ("w1", "w2", "w3")}
    experts = {f"block.deepspeed_moe.experts.deepspeed_experts.0.{name}.weight": w for name, w in theirs.items()}
    file = tmp_path / "layer_0_expert_0_mp_rank_00_model_states.pt"
    torch.save(experts, file)
    module = {f"block.mlp.{name}.weight": values for name, values in theirs.items()}
    module |= {f"block.{name}": values for name, values in coefficient(0).items()}
    module["block.deepspeed_moe.gate.wg.weight"] = torch.ones(1, H)
    torch.save({"module": module}, tmp_path / "mp_rank_00_model_states.pt")
    names = {"gate": "w1.weight", "up": "w3.weight", "down": "w2.weight"}
    load_deepspeed(tmp_path, layer, names=names)
    x = torch.randn(5, H)
    wanted = (torch.nn.functional.silu(x @ theirs["w1"].T) * (x @ theirs["w3"].T)) @ theirs["w2"].T
    torch.testing.assert_close(layer.mlp(x), wanted)
    torch.testing.assert_close(layer(x)[0], wanted)  # the one expert is the same
    torch.save({**experts, "block.deepspeed_moe.experts.deepspeed_experts.0.w1.bias": torch.ones(F)}, file)
    with pytest.raises(ValueError, match=r"experts.0.w1.bias, which neither names nor the model has"):
        load_deepspeed(tmp_path, layer, names=names)


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
