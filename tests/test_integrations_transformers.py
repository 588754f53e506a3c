"""moecomm.integrations.transformers: tiny random models on 2 and 4 gloo ranks give one rank's logits and gradients.

All models go through one start of the processes for each world size. Each data rank has its own sentences.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import LIMIT, gloo_run

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch.distributed as dist  # noqa: E402
from safetensors import safe_open  # noqa: E402
from torch.distributed.device_mesh import DeviceMesh  # noqa: E402
from torch.distributed.tensor import DTensor  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM  # noqa: E402
from transformers.distributed import DistributedConfig  # noqa: E402

from moecomm import Comm, CommError, FlatAllToAll, HierarchicalAllToAll, Nodes, RoutedExchange, TensorParallelExchange  # noqa: E402
from moecomm.integrations import transformers as plug  # noqa: E402
from moecomm.integrations.transformers import TESTED, DispatchedExperts, ExpertParallel, local_ids, register  # noqa: E402

SIZES: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "initializer_range": 0.3,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LATENT = {
    "q_lora_rank": 12, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8,
    "num_key_value_heads": 4, "head_dim": 4,
}  # fmt: skip
GROUPED = {
    "n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 12, "n_group": 4, "topk_group": 2,
    "n_shared_experts": 1, "first_k_dense_replace": 1,
}  # fmt: skip
FEW = {"num_local_experts": 4, "num_experts_per_tok": 2}
MANY = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 12}
MODELS: dict[str, dict[str, Any]] = {
    "mixtral": FEW,
    "qwen2_moe": {**MANY, "shared_expert_intermediate_size": 20},
    "qwen3_moe": {**MANY, "norm_topk_prob": True},
    "qwen3_next": {
        **MANY, "shared_expert_intermediate_size": 12, "layer_types": ["linear_attention", "full_attention"],
        "linear_key_head_dim": 4, "linear_value_head_dim": 4, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    },
    "deepseek_v3": {**GROUPED, **LATENT},
    "gpt_oss": {"num_local_experts": 8, "num_experts_per_tok": 3},
    "olmoe": {"num_experts": 8, "num_experts_per_tok": 3},
    "glm4_moe": GROUPED,
    "granitemoe": FEW,
    "phimoe": FEW,
    "minimax_m2": {"num_local_experts": 8, "num_experts_per_tok": 3},
    "ernie4_5_moe": {"moe_num_experts": 8, "moe_k": 3, "moe_intermediate_size": 12, "moe_num_shared_experts": 1},
}  # fmt: skip
LAYOUTS: dict[int, list[dict[str, Any]]] = {
    2: [{"fsdp_size": 2, "ep_size": 2}, {"tp_size": 2, "ep_size": 2}],
    4: [{"fsdp_size": 4, "ep_size": 4}, {"fsdp_size": 2, "tp_size": 2, "ep_size": 4}],
}


def sentences(data_rank: int) -> torch.Tensor:
    """[2, 7 + data_rank]: as many tokens as no other rank has."""
    return torch.randint(3, 96, (2, 7 + data_rank), generator=torch.Generator().manual_seed(data_rank))


def loss_of(model: Any, data_rank: int) -> torch.Tensor:
    text = sentences(data_rank)
    return model(text, labels=text).loss


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny random model of each architecture, under its name."""
    folder = tmp_path_factory.mktemp("models")
    torch.set_num_threads(1)
    for name, sizes in {**MODELS, "three_experts": {**FEW, "num_local_experts": 3}}.items():
        torch.manual_seed(1)
        config = AutoConfig.for_model("mixtral" if name == "three_experts" else name, **{**SIZES, **sizes})
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / name)
    return folder


class Alone:
    """What one rank computes with a model: logits of each data rank's sentences, and gradients of the mean loss."""

    def __init__(self, folder: Path, num_batches: int) -> None:
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        with torch.no_grad():
            self.logits = [model(sentences(rank)).logits for rank in range(num_batches)]
        for rank in range(num_batches):
            (loss_of(model, rank) / num_batches).backward()
        self.gradients = {name: parameter.grad for name, parameter in model.named_parameters()}


def distributed(folder: Path, **layout: Any) -> Any:
    options = {name: layout.pop(name) for name in ("dtype",) if name in layout}
    config = DistributedConfig(ep_implementation="moecomm", **layout)
    return AutoModelForCausalLM.from_pretrained(folder, distributed_config=config, **options).eval()


def num_batches(layout: dict[str, Any]) -> int:
    return layout.get("fsdp_size", 1)


def check_model(folder: Path, alone: Alone, layout: dict[str, Any]) -> Any:
    """A model of this layout has the logits and gradients of one rank."""
    model = distributed(folder, **layout)
    data_rank = dist.get_rank() // layout.get("tp_size", 1)
    with torch.no_grad():
        logits = model(sentences(data_rank)).logits
    torch.testing.assert_close(logits, alone.logits[data_rank], rtol=0, atol=1e-5)
    loss_of(model, data_rank).backward()
    check_gradients(model, alone.gradients)
    return model


def check_gradients(model: Any, wanted: dict[str, Any]) -> None:
    named = dict(model.named_parameters())
    assert named.keys() == wanted.keys()
    for name, parameter in named.items():
        # Collective: all ranks come to the same parameters in one order.
        grad = None if parameter.grad is None else whole(parameter.grad)
        if wanted[name] is None:
            assert grad is None or not grad.any(), name
        else:
            torch.testing.assert_close(grad, wanted[name], rtol=1e-4, atol=1e-5, msg=f"{name}: {{}}".format)


class Dispatches:
    """Counts the rows that moecomm brings to this process's experts, one number for each pass through a layer."""

    def __init__(self) -> None:
        self.num_rows: list[int] = []
        answers = DispatchedExperts._answers

        def counted(experts: DispatchedExperts, rows: Any, rows_per_expert: Any) -> Any:
            self.num_rows.append(len(rows))
            return answers(experts, rows, rows_per_expert)

        DispatchedExperts._answers = counted  # type: ignore[method-assign]


@pytest.mark.slow
@pytest.mark.parametrize("size", LAYOUTS)
def test_logits_and_gradients_are_those_of_one_rank(saved: Path, tmp_path: Path, size: int) -> None:
    """And the files that are written after a step have all experts: one rank loads them."""
    cases = cases_of(size)
    wanted = {(name, num_batches(layout)): Alone(saved / name, num_batches(layout)) for name, layout in cases}

    def body(comm: Comm) -> None:
        register(limit=LIMIT)
        dispatches = Dispatches()
        for number, (name, layout) in enumerate(cases):
            before = len(dispatches.num_rows)
            model = check_model(saved / name, wanted[name, num_batches(layout)], layout)
            assert len(dispatches.num_rows) - before >= 2
            save_after_step(model, tmp_path / str(number), comm.rank)

    gloo_run(size, body)
    for number, (name, _) in enumerate(cases):
        folder = tmp_path / str(number)
        # Of a divided model transformers writes tied weights under both of their names.
        assert names_in(folder) - {"lm_head.weight"} == names_in(saved / name) - {"lm_head.weight"}
        check_saved(folder)


def cases_of(size: int) -> list[tuple[str, dict[str, Any]]]:
    """Each architecture on 2 ranks in both layouts. On 4 ranks, which take longer, in one: the layouts take turns."""
    layouts = LAYOUTS[size]
    if size == 2:
        return [(name, layout) for name in MODELS for layout in layouts]
    return [(name, layouts[number % 2]) for number, name in enumerate(MODELS)]


def save_after_step(model: Any, folder: Path, rank: int) -> None:
    """Train a step, write the model, and the logits that it has now."""
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    model.save_pretrained(folder)
    with torch.no_grad():
        logits = model(sentences(0)).logits
    if rank == 0:
        torch.save(logits, folder / "logits.pt")


def check_saved(folder: Path) -> None:
    """What save_after_step wrote is a model for one rank too."""
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(folder).eval()(sentences(0)).logits
    torch.testing.assert_close(
        logits, torch.load(folder / "logits.pt"), rtol=0, atol=1e-5, msg=f"{folder}: {{}}".format
    )


def names_in(folder: Path) -> set[str]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return set(file.keys())


# ---- other ways through a layer -------------------------------------------------------------------------------------


PAIR = {"fsdp_size": 2, "ep_size": 2}


def two_copies_of_each_expert(folder: Path, alone: Alone) -> None:
    check_model(folder, alone, {"fsdp_size": 4, "ep_size": 2})


def two_hops(folder: Path, alone: Alone) -> None:
    register("two hops", all_to_all=lambda comm: HierarchicalAllToAll(comm, Nodes.of_size(2, comm.size)), limit=LIMIT)
    config = DistributedConfig(fsdp_size=4, ep_size=4, ep_implementation="two hops")
    model = AutoModelForCausalLM.from_pretrained(folder, distributed_config=config)
    with torch.no_grad():
        logits = model(sentences(dist.get_rank())).logits
    torch.testing.assert_close(logits, alone.logits[dist.get_rank()], rtol=0, atol=1e-5)


def read_under_another_layout(folder: Path, shards: Path) -> None:
    """The files of each rank alone, which it need not gather."""
    model = distributed(folder, fsdp_size=4, ep_size=4)
    model.save_pretrained(shards, distributed_checkpoint=True)
    text = sentences(0)
    for layout in ({"fsdp_size": 4, "ep_size": 2}, {"tp_size": 2, "fsdp_size": 2, "ep_size": 4}):
        with torch.no_grad():
            torch.testing.assert_close(
                distributed(shards, **layout)(text).logits, model(text).logits, rtol=0, atol=1e-5
            )


@pytest.mark.slow
def test_four_ranks_in_other_ways(saved: Path, tmp_path: Path) -> None:
    alone = {name: Alone(saved / name, 4) for name in ("mixtral", "gpt_oss")}

    def body(comm: Comm) -> None:
        register(limit=LIMIT)
        for name, expected in alone.items():
            two_copies_of_each_expert(saved / name, expected)
            two_hops(saved / name, expected)
            read_under_another_layout(saved / name, tmp_path / name)

    gloo_run(4, body)


def recomputed(folder: Path, alone: Alone) -> None:
    """Activation checkpointing sends the rows of a layer again, in the backward pass."""
    model = distributed(folder, **PAIR).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    loss_of(model, dist.get_rank()).backward()
    check_gradients(model, alone.gradients)


def by_loops(folder: Path, alone: Alone) -> None:
    """transformers' own loop over experts, in place of its grouped products."""
    model = distributed(folder, **PAIR)
    model.set_experts_implementation("eager")
    loss_of(model, dist.get_rank()).backward()
    check_gradients(model, alone.gradients)


def generated(folder: Path, tokens: list[list[list[int]]]) -> None:
    """The prompts differ in length and content, and one rank may be done before the other."""
    rank = dist.get_rank()
    got = distributed(folder, **PAIR).generate(sentences(rank), max_new_tokens=5, do_sample=False)
    assert got.tolist() == tokens[rank]


def in_bfloat16(folder: Path, logits: Any) -> None:
    model = distributed(folder, dtype=torch.bfloat16, **PAIR)
    with torch.no_grad():
        got = model(sentences(dist.get_rank())).logits
    assert got.dtype == torch.bfloat16
    wanted = logits[dist.get_rank()].float()
    assert (got - wanted).abs().mean() < 2**-7 * wanted.abs().max()


def all_to_one_rank(folder: Path, alone: Alone, dispatches: Dispatches, comm: Comm) -> None:
    """Every token chooses the experts of one rank: the other has no rows, and its experts no gradient."""
    before = len(dispatches.num_rows)
    check_model(folder, alone, PAIR)
    num_idle = comm.all_gather(np.array([[rows == 0 for rows in dispatches.num_rows[before:]]]))
    assert num_idle.shape == (2, 4)
    assert num_idle.sum(axis=0).tolist() == [1, 1, 1, 1]


@pytest.mark.slow
def test_two_ranks_in_other_ways(saved: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(saved / "mixtral")
    for layer in model.model.layers:
        layer.mlp.gate.weight.detach().zero_()  # ties go to the same experts
    model.save_pretrained(tmp_path)
    idle = Alone(tmp_path, 2)
    alone = Alone(saved / "qwen3_moe", 2)
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(saved / "qwen3_moe").eval()
        tokens = [model.generate(sentences(rank), max_new_tokens=5, do_sample=False).tolist() for rank in range(2)]
        model = AutoModelForCausalLM.from_pretrained(saved / "gpt_oss", dtype=torch.bfloat16).eval()
        half = [model(sentences(rank)).logits for rank in range(2)]

    def body(comm: Comm) -> None:
        register(limit=LIMIT)
        dispatches = Dispatches()
        recomputed(saved / "qwen3_moe", alone)
        by_loops(saved / "qwen3_moe", alone)
        generated(saved / "qwen3_moe", tokens)
        in_bfloat16(saved / "gpt_oss", half)
        all_to_one_rank(tmp_path, idle, dispatches, comm)

    gloo_run(2, body)


# ---- what it refuses ------------------------------------------------------------------------------------------------


class Doubling(torch.nn.Module):
    """Experts as transformers divides them: two of this rank, which double their rows."""

    num_experts = 2

    def forward(self, rows: Any, local_id: Any, weight: Any) -> Any:
        assert int(local_id.max()) < 2
        return 2 * rows * weight


def test_errors_on_all_ranks(saved: Path) -> None:
    def body(comm: Comm) -> None:
        with pytest.raises(ValueError, match="`ep_implementation='moecomm'` names no registered implementation"):
            distributed(saved / "mixtral", **PAIR)
        register(limit=LIMIT)
        with pytest.raises(ValueError, match="Cannot evenly shard 3 experts across 2 expert-parallel ranks"):
            distributed(saved / "three_experts", **PAIR)
        own = [dist.new_group([rank]) for rank in range(comm.size)]
        pair = dist.new_group([0, 1])
        of_this_rank, of_both = (DeviceMesh.from_group(group, "cpu") for group in (own[comm.rank], pair))
        make = ExpertParallel(FlatAllToAll, limit=LIMIT)
        with pytest.raises(ValueError, match=r"moecomm: ranks \[0, 1\] hold the same batch, expected them among the"):
            make(Doubling(), of_this_rank, of_both)
        dispatched = make(Doubling(), of_both, of_this_rank)
        x, weight = torch.ones(3, 4), torch.full((3, 2), 0.25)
        assert torch.equal(dispatched(x, torch.tensor([[0, 3]] * 3), weight), x)
        with pytest.raises(ValueError, match=r"routing.expert has 0\.\.4, expected -1\.\.3"):
            dispatched(x, torch.tensor([[0, 4]] * 3), weight)
        dist.destroy_process_group(pair)
        with pytest.raises(CommError, match="its process group was destroyed"):
            dispatched(x, torch.tensor([[0, 3]] * 3), weight)

    gloo_run(2, body)


def test_transformers_that_is_missing_or_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    # transformers puts another object under its name while it is used.
    installed = sys.modules["transformers"]
    assert ".".join(installed.__version__.split(".")[:2]) in TESTED
    for version in ("5.22.2", "6.0.0", "5.2"):
        monkeypatch.setattr(installed, "__version__", version)
        with pytest.raises(ImportError, match=rf"transformers is {re.escape(version)}, expected 5.23 or 5.24, with"):
            register()
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"needs transformers .*: pip install 'moecomm\[transformers\]'"):
        register()


def test_what_was_there_before_names_its_place() -> None:
    from moecomm.nn.hf import parallelize

    with pytest.raises(NotImplementedError, match=r"moecomm\.integrations\.transformers\.register"):
        parallelize(torch.nn.Linear(1, 1), None)


def test_gpus_of_a_node_share_an_exchange_of_each_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where max_tokens is given. The exchange itself stands for one that needs GPUs."""
    made: list[Any] = []

    class Exchange:
        def __init__(self, comm: Comm, *arguments: Any, **options: Any) -> None:
            made.append((arguments, options))

    monkeypatch.setattr(plug, "DirectExchange", Exchange)

    def body(comm: Comm) -> None:
        both, own = dist.new_group([0, 1]), [dist.new_group([rank]) for rank in range(2)][comm.rank]
        gpus = SimpleNamespace(device_type="cuda", get_group=lambda: both)
        alone = SimpleNamespace(device_type="cuda", get_group=lambda: own)
        make = ExpertParallel(FlatAllToAll, max_tokens=64, limit=LIMIT)
        layers = [make(Doubling(), gpus, alone).exchange_of for _ in range(2)]
        x = torch.ones(3, 8)
        first, second = (exchange_of(x, 2) for exchange_of in layers)
        assert first is second
        assert layers[0](x.bfloat16(), 2) is not first
        assert layers[0](x, 3) is not first
        assert [arguments for arguments, _ in made] == [
            (64, 8, 4, 2, torch.float32),
            (64, 8, 4, 2, torch.bfloat16),
            (64, 8, 4, 3, torch.float32),
        ]
        assert made[0][1] == {"limit": LIMIT}
        # The two hold the same batch, or nobody said how many tokens there are.
        assert isinstance(make(Doubling(), gpus, gpus).exchange_of(x, 2), TensorParallelExchange)
        without = ExpertParallel(FlatAllToAll, limit=LIMIT)
        assert isinstance(without(Doubling(), gpus, alone).exchange_of(x, 2), RoutedExchange)

    gloo_run(2, body)


def test_local_ids_where_only_the_device_knows_the_rows() -> None:
    """As of DirectExchange: more rows than the experts have."""
    on_device = local_ids(torch.tensor([2, 0, 1], dtype=torch.int32), 5, torch.device("cpu"))
    assert on_device.tolist() == [[0], [0], [2], [3], [3]]
    on_host = local_ids(np.array([2, 0, 1]), 3, torch.device("cpu"))
    assert on_host.tolist() == [[0], [0], [2]]


def test_unused_rows_reach_neither_results_nor_gradients() -> None:
    """Rows and gradients behind the last expert's are as they are left: NaN here."""
    experts = Doubling()
    dispatched = DispatchedExperts(experts, lambda x, top_k: pytest.fail("no exchange here"))
    rows = torch.tensor([[1.0], [2.0], [torch.nan]], requires_grad=True)
    experts.forward = lambda rows, local_id, weight: rows * rows * weight  # type: ignore[method-assign]
    dispatched.experts_forward = experts.forward
    answers = dispatched._answers(rows, torch.tensor([1, 1], dtype=torch.int32))
    answers.backward(torch.tensor([[1.0], [1.0], [torch.nan]]))
    assert answers.tolist() == [[1.0], [4.0], [0.0]]
    assert rows.grad is not None
    assert rows.grad.tolist() == [[2.0], [4.0], [0.0]]
