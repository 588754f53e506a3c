"""Balancing and the routing report: against their definitions, and the same on any number of ranks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from moecomm import Comm, Topology, build_groups  # noqa: E402
from moecomm.nn import (  # noqa: E402
    CONFIGS,
    MoE,
    TransformerLM,
    checkpoint,
    layer_groups,
    loss_carried,
    plot_routing,
    routing_report,
    update_bias,
)
from moecomm.transports import threads  # noqa: E402
from moecomm.transports.wrappers import Timed  # noqa: E402

torch.set_num_threads(1)  # threads that wait for a busy core take longer than they save
CONFIG = replace(CONFIGS["tiny"], std=0.3)
TOKENS = torch.randint(256, (4, 24), generator=torch.Generator().manual_seed(3))


def test_the_bias_moves_against_the_load() -> None:
    layer = MoE(8, 16, 4)
    update_bias(layer, torch.tensor([4, 0, 1, 3]), rate=0.5)
    assert layer.bias.tolist() == [-0.5, 0.5, 0.5, -0.5]
    update_bias(layer, torch.tensor([2, 2, 2, 2]))
    assert layer.bias.tolist() == [-0.5, 0.5, 0.5, -0.5]


def test_the_bias_balances_what_the_gate_does_not() -> None:
    """And the weights of the answers stay those of the gate alone."""
    torch.manual_seed(0)
    layer, x = MoE(8, 16, 4, std=0.5), torch.randn(256, 8) + 1
    before = layer(x)[1]
    for _ in range(200):
        update_bias(layer, layer(x)[1].load, rate=0.005)
    after = layer(x)[1]
    assert before.load.max() > 110
    assert after.load.max() - after.load.min() <= 12
    share = torch.nn.functional.linear(x, layer.gate).softmax(-1)
    torch.testing.assert_close(after.weight, share.gather(1, after.expert.long()))


def test_the_load_of_all_data_ranks_counts() -> None:
    loads = torch.tensor([[9, 0, 0], [0, 9, 3]])

    def body(comm: Comm) -> list[float]:
        layer = MoE(8, 16, 3, groups=build_groups(comm, Topology(2)))
        update_bias(layer, loads[comm.rank], rate=1.0)
        return layer.bias.tolist()

    assert threads.run(2, body) == [[-1.0, -1.0, 1.0]] * 2


@pytest.mark.parametrize("capacity_factor", [None, 0.5])
def test_loss_carried(capacity_factor: float | None) -> None:
    layer = MoE(8, 16, 6, 2, std=0.5, capacity_factor=capacity_factor)
    x, losses = torch.randn(40, 8), torch.rand(40)
    routing = layer(x)[1]
    wanted = [sum(float(losses[t]) for t in range(40) if e in routing.expert[t].tolist()) for e in range(6)]
    assert loss_carried(routing, losses).tolist() == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("sizes", [{"expert": 4}, {"expert": 2}, {"expert": 4, "tensor": 2}])
def test_report_on_several_ranks(sizes: dict[str, int]) -> None:
    """Load: of all data ranks. Rows and bytes: what a Timed Comm counts below the exchanges."""
    alone = TransformerLM(CONFIG).eval()
    wanted = [report.load for report in routing_report(alone, TOKENS)]

    def body(comm: Comm) -> None:
        timed = Timed(comm)
        groups = layer_groups(timed, CONFIG.experts, **sizes)
        model = TransformerLM(CONFIG, groups=groups).eval()
        data = groups[0].data
        timed.clear()
        reports = routing_report(model, TOKENS.chunk(data.size)[data.rank])
        assert [report.load for report in reports] == wanted
        width = 4 * CONFIG.hidden
        labels = [report.rows // 2 * 8 for report in reports]  # at least: counts travel too, as int64
        moved = int(timed.record["all_to_allv"].bytes.sum())
        rows = sum(report.rows for report in reports)
        assert sum(report.bytes for report in reports) == rows * width
        assert rows * width <= moved <= rows * width + 4 * sum(labels)
        assert all(report.seconds > 0 and report.dropped == 0 for report in reports)

    threads.run(4, body)


def test_report_on_one_rank(tmp_path: Path) -> None:
    model = TransformerLM(replace(CONFIG, capacity_factor=0.5))
    for layer in model.moe_layers():
        layer.bias[1] = 10.0  # all to expert 1
    reports = routing_report(model, TOKENS)
    assert [report.load for report in reports] == [[0, 96, 0, 0], [0, 96, *[0] * 6]]
    assert [report.entropy for report in reports] == [0, 0]
    assert [report.dropped for report in reports] == pytest.approx([1 - 12 / 96, 1 - 6 / 96])
    assert [(report.rows, report.bytes) for report in reports] == [(0, 0)] * 2
    plot_routing(reports, tmp_path / "routing.png")
    assert (tmp_path / "routing.png").read_bytes()[:4] == b"\x89PNG"
    share = np.array(routing_report(TransformerLM(CONFIG), TOKENS)[0].load) / 96
    entropy = -sum(p * np.log(p) for p in share if p) / np.log(4)
    assert routing_report(TransformerLM(CONFIG), TOKENS)[0].entropy == pytest.approx(entropy, rel=1e-5)
    assert not any(type(layer.exchange).__name__ == "_Measured" for layer in model.moe_layers())


def test_a_bias_for_each_expert() -> None:
    with pytest.raises(ValueError, match=r"update_bias: carried is \(1,\), expected \(4,\)"):
        update_bias(MoE(8, 16, 4), torch.ones(1))


CASTS: dict[str, Callable[[torch.nn.Module], torch.nn.Module]] = {
    "bfloat16": lambda model: model.bfloat16(),
    "half": lambda model: model.half(),
    "double": lambda model: model.double(),
    "to": lambda model: model.to("cpu", torch.bfloat16),
    "twice": lambda model: model.half().bfloat16(),
    "like a tensor": lambda model: model.to(torch.zeros(1, dtype=torch.float16)),
    "type": lambda model: model.type(torch.bfloat16),
    "a copy": lambda model: copy.deepcopy(model).bfloat16(),
    "copied": lambda model: copy.deepcopy(model.bfloat16()),
    "averaged": lambda model: torch.optim.swa_utils.AveragedModel(model.bfloat16()).module,
    "taken over": lambda model: assigned(model.bfloat16()),
}


def assigned(model: torch.nn.Module) -> torch.nn.Module:
    """With the tensors of a file that has 16 bits."""
    made = torch.nn.Sequential(MoE(8, 16, 4))
    state = {name: tensor.bfloat16() for name, tensor in model.state_dict().items()}
    made.load_state_dict(state, assign=True)
    return made


@pytest.mark.parametrize("cast", CASTS)
def test_the_bias_does_not_stall_in_16_bits(cast: str) -> None:
    """2000 steps of 0.001 are 2, and what it was before the cast, to float32's last bit, is kept."""
    model = torch.nn.Sequential(MoE(8, 16, 4))
    model[0].bias[:] = 0.50048828125  # 16 bits have no such number
    layer = CASTS[cast](model)[0]
    assert isinstance(layer, MoE)
    assert layer.gate.dtype != torch.float32
    assert layer.bias.dtype == torch.float32
    assert "bias" in dict(layer.named_buffers())
    start = 0.5 if cast == "taken over" else 0.50048828125
    assert layer.bias.tolist() == [start] * 4
    for _ in range(2000):
        update_bias(layer, torch.tensor([0, 1, 1, 1]))
    assert layer.bias.tolist() == pytest.approx([start + 2, *[start - 2] * 3], rel=1e-4)
    layer(torch.ones(3, 8, dtype=layer.gate.dtype))


def test_a_bias_that_something_else_has_cast() -> None:
    layer = MoE(8, 16, 4)
    layer.bias = layer.bias.bfloat16()
    for _ in range(2000):
        update_bias(layer, torch.tensor([0, 1, 1, 1]))
    assert layer.bias.tolist() == pytest.approx([2, -2, -2, -2], rel=1e-4)


def test_a_checkpoint_keeps_all_bits_of_the_bias(tmp_path: Path) -> None:
    model = torch.nn.Sequential(MoE(8, 16, 4)).bfloat16()
    update_bias(model[0], torch.tensor([0, 1, 1, 1]), rate=0.3001)
    checkpoint.save(tmp_path, 1, model)
    other = torch.nn.Sequential(MoE(8, 16, 4)).bfloat16()
    checkpoint.load(tmp_path / "step-000001", other)
    assert torch.equal(other[0].bias, model[0].bias)
    assert other[0].bias[0] == torch.tensor(0.3001)
