"""moecomm.nn.hf: tiny random models of Hugging Face transformers give the same logits on 2 and 4 ranks as on one.

float32, logits within 1e-5. Each rank has its own sentences; the tensor ranks of a group have the same ones.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from conftest import gloo_run

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from transformers import (  # noqa: E402
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.activations import ACT2FN  # noqa: E402

from moecomm import Comm, Topology, build_groups  # noqa: E402
from moecomm.nn import checkpoint, parameter_groups, reduce_gradients  # noqa: E402
from moecomm.nn.hf import SpreadExperts, parallelize  # noqa: E402
from moecomm.transports import threads  # noqa: E402

SIZES: dict[str, Any] = {
    "vocab_size": 99, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 64, "initializer_range": 0.3,
}  # fmt: skip
QWEN: dict[str, Any] = {**SIZES, "num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 12}
MODELS: dict[str, Callable[[], Any]] = {
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2)),
    "qwen2": lambda: Qwen2MoeForCausalLM(Qwen2MoeConfig(**QWEN, shared_expert_intermediate_size=20)),
    "qwen3": lambda: Qwen3MoeForCausalLM(Qwen3MoeConfig(**QWEN, norm_topk_prob=True)),
}
TOPOLOGIES = {
    2: [Topology(2, expert=2), Topology(2, tensor=2, expert=2), Topology(2, tensor=2, expert_tensor=2), Topology(2)],
    4: [Topology(4, expert=4), Topology(4, expert=2), Topology(4, tensor=2, expert=2, expert_tensor=2)],
}


@cache
def whole(name: str, seed: int = 1) -> Any:
    torch.manual_seed(seed)
    return MODELS[name]().eval()


def made(name: str, seed: int = 1) -> Any:
    """A copy: threads that draw random numbers at once would draw from one generator."""
    return copy.deepcopy(whole(name, seed))


def sentences(rank: int) -> torch.Tensor:
    """[2, 7 + rank] of a data rank: not as long as the others'."""
    return torch.randint(99, (2, 7 + rank), generator=torch.Generator().manual_seed(rank))


def num_parameters(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("size", TOPOLOGIES)
def test_logits_are_those_of_one_rank(size: int) -> None:
    torch.set_num_threads(1)
    wanted = {}
    for name in MODELS:
        with torch.no_grad():
            wanted[name] = [made(name)(sentences(rank)).logits for rank in range(size)]
        assert wanted[name][0].std() > 0.1

    def body(comm: Comm) -> None:
        for topology in TOPOLOGIES[size]:
            groups = build_groups(comm, topology)
            for name in MODELS:
                model = made(name)
                total = num_parameters(model)
                experts = sum(block.numel() for key, block in model.named_parameters() if ".experts." in key)
                assert parallelize(model, groups) is model
                assert num_parameters(model) == total - experts + experts // (topology.expert * topology.expert_tensor)
                with torch.no_grad():
                    got = model(sentences(groups.data.rank), output_router_logits=True)
                torch.testing.assert_close(got.logits, wanted[name][groups.data.rank], rtol=0, atol=1e-5)
                assert len(got.router_logits) == 2
            groups.free()

    gloo_run(size, body)


@pytest.mark.parametrize("name", MODELS)
def test_gradients_and_generation(name: str) -> None:
    alone = made(name)
    for rank in range(2):
        (alone(sentences(rank), labels=sentences(rank)).loss / 2).backward()
    wanted = alone.generate(sentences(0), max_new_tokens=5, do_sample=False)

    def body(comm: Comm) -> None:
        groups = build_groups(comm, Topology(2, expert=2))
        model = parallelize(made(name), groups)
        model(sentences(comm.rank), labels=sentences(comm.rank)).loss.backward()
        reduce_gradients(model, groups)
        for key, parameter in model.named_parameters():
            if ".experts." not in key:
                torch.testing.assert_close(parameter.grad, alone.get_parameter(key).grad, rtol=1e-4, atol=1e-6)
        for key, module in model.named_modules():
            if isinstance(module, SpreadExperts):
                down = alone.get_submodule(key).down_proj.grad.chunk(2)[comm.rank].mT
                torch.testing.assert_close(module.experts.down.grad, down, rtol=1e-4, atol=1e-6)
        assert model.generate(sentences(0), max_new_tokens=5, do_sample=False).tolist() == wanted.tolist()

    threads.run(2, body)


def test_a_checkpoint_of_two_ranks_is_loaded_by_four(tmp_path: Path) -> None:
    def saved(comm: Comm) -> None:
        model = parallelize(made("qwen3"), build_groups(comm, Topology(2, expert=2)))
        checkpoint.save(tmp_path, 1, model, comm=comm)

    def loaded(comm: Comm) -> None:
        other = parallelize(made("qwen3", seed=2), build_groups(comm, Topology(4, expert=4)))
        checkpoint.load(tmp_path / "step-000001", other, comm=comm)
        mine = parallelize(made("qwen3"), build_groups(comm, Topology(4, expert=4)))
        assert all(torch.equal(a, b) for a, b in zip(mine.parameters(), other.parameters(), strict=True))

    whole("qwen3"), whole("qwen3", seed=2)
    threads.run(2, saved)
    threads.run(4, loaded)


def test_a_checkpoint_of_two_ranks_is_loaded_by_one(tmp_path: Path) -> None:
    def saved(comm: Comm) -> None:
        model = parallelize(made("mixtral"), build_groups(comm, Topology(2, expert=2)))
        checkpoint.save(tmp_path, 1, model, comm=comm)

    def loaded(comm: Comm) -> None:
        model = parallelize(made("mixtral", seed=2), build_groups(comm, Topology(1)))
        checkpoint.load(tmp_path / "step-000001", model)
        with torch.no_grad():
            torch.testing.assert_close(model(sentences(0)).logits, wanted, rtol=0, atol=1e-5)
        experts = parameter_groups(model)[1]["params"]
        assert sum(p.numel() for p in experts) == 2 * 3 * 4 * 16 * 24

    whole("mixtral", seed=2)
    with torch.no_grad():
        wanted = made("mixtral")(sentences(0)).logits
    threads.run(2, saved)
    threads.run(1, loaded)


def test_frozen_experts_and_evaluation_stay() -> None:
    """As after LoRA on attention: one weight of each layer is trained, and half of the experts' in the second."""

    def body(comm: Comm) -> None:
        groups = build_groups(comm, Topology(2, expert=2))
        model = made("mixtral")
        model.requires_grad_(False)
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.requires_grad_(True)
        model.model.layers[1].mlp.experts.down_proj.requires_grad_(True)
        model.model.layers[1].mlp.train()
        parallelize(model, groups)
        of_layer = "model.layers.{}.self_attn.q_proj.weight"
        wanted = {of_layer.format(0), of_layer.format(1), "model.layers.1.mlp.experts.experts.down"}
        assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == wanted
        trained = {name for name, module in model.named_modules() if module.training}
        assert trained and all(name.startswith("model.layers.1.mlp") for name in trained)
        assert {"model.layers.1.mlp.experts", "model.layers.1.mlp.experts.experts"} < trained
        model(sentences(comm.rank), labels=sentences(comm.rank)).loss.backward()
        reduce_gradients(model, groups)
        assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == wanted

    whole("mixtral")
    threads.run(2, body)


def test_a_wrapped_model() -> None:
    with torch.no_grad():
        wanted = made("qwen3")(sentences(0)).logits

    def body(comm: Comm) -> None:
        wrapped = torch.nn.ModuleDict({"inner": made("qwen3")})
        parallelize(wrapped, build_groups(comm, Topology(2, tensor=2, expert=2)))
        with torch.no_grad():
            torch.testing.assert_close(wrapped["inner"](sentences(0)).logits, wanted, rtol=0, atol=1e-5)

    threads.run(2, body)


class LoraExperts(torch.nn.Module):
    """What adapters make of a module: another one around it."""

    def __init__(self, base: Any) -> None:
        super().__init__()
        self.base_layer = base

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.base_layer, name)


def experts_of(model: Any) -> Any:
    """Of the last block: those before are all right, so that a late error would leave them changed."""
    return model.model.layers[-1].mlp.experts


def convert(experts: Any, dtype: torch.dtype) -> None:
    for name in ("gate_up_proj", "down_proj"):
        values = getattr(experts, name).detach().to(dtype)
        setattr(experts, name, torch.nn.Parameter(values, requires_grad=False))


def scaled(model: Any) -> None:
    experts_of(model).gate_up_proj_scale = torch.nn.Parameter(torch.ones(4, 1, 1))


def offloaded(model: Any) -> None:
    """As accelerate does it: the values are elsewhere, and a forward of its own fetches them."""
    experts = experts_of(model).to("meta")
    experts._hf_hook = object()
    experts.forward = lambda *arguments: None


def sharded(model: Any) -> None:
    experts = experts_of(model)
    experts.down_proj = torch.nn.Parameter(experts.down_proj[:2].detach())


class Quantized(torch.Tensor):
    """A tensor that is more than its numbers, as torchao's are."""


def subclass(model: Any) -> None:
    experts = experts_of(model)
    experts.down_proj = torch.nn.Parameter(experts.down_proj.detach().as_subclass(Quantized))


REFUSED: dict[str, Callable[[Any], object]] = {
    "is LoraExperts, expected MixtralExperts: neither quantized nor adapted": lambda model: setattr(
        model.model.layers[-1].mlp, "experts", LoraExperts(experts_of(model))
    ),
    "has down_proj, gate_up_proj, gate_up_proj_scale, expected down_proj, gate_up_proj alone": scaled,
    "has forward, _hf_hook, as of accelerate or a tp_plan": offloaded,
    "has gate_up_proj on the device meta, expected its values": lambda model: experts_of(model).to("meta"),
    "has _forward_pre_hooks, as of": lambda model: experts_of(model).register_forward_pre_hook(lambda *a: None),
    "has gate_up_proj as Parameter of torch.float8_e4m3fn": lambda model: convert(
        experts_of(model), torch.float8_e4m3fn
    ),
    "has gate_up_proj as Parameter of torch.int8": lambda model: convert(experts_of(model), torch.int8),
    "has down_proj as Quantized of torch.float32": subclass,
    r"has down_proj \(2, 16, 24\), expected \(4, 16, 24\)": sharded,
    "has a gradient hook on down_proj": lambda model: experts_of(model).down_proj.register_hook(lambda grad: grad),
    "has weights of torch.bfloat16 on cpu and of torch.float32 on cpu": lambda model: setattr(
        experts_of(model), "down_proj", torch.nn.Parameter(experts_of(model).down_proj.detach().bfloat16())
    ),
    "has the activation GELUActivation, expected SiLU": lambda model: setattr(
        experts_of(model), "act_fn", ACT2FN["gelu"]
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_experts_that_are_more_than_their_weights(message: str) -> None:
    """Of one rank's last block: both ranks say so, and no block is changed."""

    def body(comm: Comm) -> None:
        model = made("mixtral")
        if comm.rank == 1:
            REFUSED[message](model)
        before = [layer.mlp.experts for layer in model.model.layers]
        with pytest.raises(ValueError, match=rf"parallelize: model.layers.1.mlp.experts {message}.*\(rank 1 of 2\)"):
            parallelize(model, build_groups(comm, Topology(2, expert=2)))
        assert [layer.mlp.experts for layer in model.model.layers] == before

    whole("mixtral")
    threads.run(2, body)


def test_what_it_refuses() -> None:
    def body(comm: Comm) -> None:
        groups = build_groups(comm, Topology(3, expert=3))
        with pytest.raises(ValueError, match="num_experts is 4, which expert=3 ranks cannot share"):
            parallelize(made("mixtral"), groups)
        dense = LlamaForCausalLM(LlamaConfig(**SIZES))
        with pytest.raises(ValueError, match="LlamaForCausalLM has none of the blocks MixtralSparseMoeBlock, Qwen2"):
            parallelize(dense, groups)
        with pytest.raises(ValueError, match="parallelize: the experts of rank 1 is not that of rank 0"):
            parallelize(made("mixtral").to(torch.bfloat16 if comm.rank == 1 else torch.float32), groups)
        twice = parallelize(made("mixtral"), build_groups(comm, Topology(3)))
        with pytest.raises(ValueError, match="the experts of MixtralForCausalLM are parallelized already"):
            parallelize(twice, groups)

    whole("mixtral")
    threads.run(3, body)
