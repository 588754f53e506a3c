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


def test_what_it_refuses() -> None:
    def body(comm: Comm) -> None:
        groups = build_groups(comm, Topology(3, expert=3))
        with pytest.raises(ValueError, match="num_experts is 4, which expert=3 ranks cannot share"):
            parallelize(made("mixtral"), groups)
        dense = LlamaForCausalLM(LlamaConfig(**SIZES))
        with pytest.raises(ValueError, match="LlamaForCausalLM has none of the blocks MixtralSparseMoeBlock, Qwen2"):
            parallelize(dense, groups)
        model = made("mixtral")
        model.config.hidden_act = "gelu"
        with pytest.raises(ValueError, match="hidden_act of the model is 'gelu', expected 'silu'"):
            parallelize(model, groups)
        twice = parallelize(made("mixtral"), build_groups(comm, Topology(3)))
        with pytest.raises(ValueError, match="the experts of MixtralForCausalLM are parallelized already"):
            parallelize(twice, groups)

    whole("mixtral")
    threads.run(3, body)
