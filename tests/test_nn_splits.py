"""The same losses however the model is split: over experts, slices of experts, tensor, data and pipeline ranks.

One rank computes all micro-batches one after the other; that is the definition. 12 steps in float32; losses must agree
within 1e-5 of their value. The optimizer is SGD: Adam does not notice a gradient that is several times too large. One
layer has 2 experts and one 4, so that with expert=4 they have different topologies.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
from conftest import ROOT, gloo_run

torch = pytest.importorskip("torch")

from training import train  # noqa: E402

from moecomm import Comm  # noqa: E402
from moecomm.nn import CONFIGS, TransformerLM, layer_groups, reduce_gradients  # noqa: E402
from moecomm.nn.pipeline import pipeline_stage, stage_loss  # noqa: E402
from moecomm.transports import threads  # noqa: E402

STEPS, MICRO_BATCHES, MICRO_BATCH, LENGTH = 12, 4, 2, 12
CONFIG = replace(CONFIGS["tiny"], std=0.2, experts=(2, 4), z_loss=0.001, capacity_factor=1.25)
TOP_2 = replace(CONFIG, residual="none", top_k=2, experts=(4, 4))


def tokens(step: int) -> torch.Tensor:
    """[MICRO_BATCHES, MICRO_BATCH, LENGTH + 1], all of a step."""
    generator = torch.Generator().manual_seed(step)
    start = torch.randint(256, (MICRO_BATCHES, MICRO_BATCH, 1), generator=generator)
    return (start + 3 * torch.arange(LENGTH + 1)) % 256  # something that can be learned


def trained(model: TransformerLM) -> list[float]:
    return train(model, torch.optim.SGD(model.parameters(), 0.1, momentum=0.9), tokens, range(STEPS))


@cache
def on_one_rank(config: object) -> list[float]:
    losses = trained(TransformerLM(config))
    assert losses[-1] < losses[0] - 0.3
    return losses


def on_many(comm: Comm, config: object, **sizes: int) -> list[float]:
    groups = layer_groups(comm, config.experts, **sizes)
    return trained(TransformerLM(config, groups=groups))


SPLITS = [
    *((CONFIG, {"expert": expert, "tensor": tensor}) for expert in (1, 2, 4) for tensor in (1, 2)),
    (TOP_2, {"expert": 2, "tensor": 2, "expert_tensor": 2}),
]


@pytest.mark.slow
def test_expert_and_tensor_parallel_losses_are_those_of_one_rank() -> None:
    torch.set_num_threads(1)
    wanted = {config: on_one_rank(config) for config, _ in SPLITS}

    def body(comm: Comm, splits: Any) -> None:
        for config, sizes in splits:
            assert on_many(comm, config, **sizes) == pytest.approx(wanted[config], rel=1e-5), sizes

    threads.run(4, lambda comm: body(comm, SPLITS[:-1]))


@pytest.mark.slow
def test_losses_over_gloo_are_those_of_one_rank() -> None:
    """In an interpreter of its own: a fork after matrices were multiplied may leave a lock of the library taken."""
    code = "import test_nn_splits; test_nn_splits.check_over_gloo()"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT / "tests", check=True, timeout=170)


def check_over_gloo() -> None:
    config, sizes = SPLITS[-1]

    def body(comm: Comm) -> None:
        assert on_many(comm, config, **sizes) == pytest.approx(on_one_rank(config), rel=1e-5), sizes

    gloo_run(4, body)


@pytest.mark.slow
def test_all_axes_at_once() -> None:
    """Pipeline 2 x tensor 2 x data 2, the experts over the data ranks; 1F1B."""
    torch.set_num_threads(1)
    wanted = on_one_rank(CONFIG)

    def body(comm: Comm) -> None:
        assert in_stages(comm) == pytest.approx(wanted, rel=1e-5)

    gloo_run(8, body)


def in_stages(comm: Comm) -> list[float]:
    from torch.distributed.pipelining import Schedule1F1B

    groups = layer_groups(comm, CONFIG.experts, pipeline=2, tensor=2, expert=2)
    mine = groups[0]
    model = TransformerLM(CONFIG, groups=groups, stage=(mine.pipeline.rank, 2))
    group = mine.topology.device_mesh("cpu")[0].get_group("pipeline")
    num_micro = MICRO_BATCHES // mine.data.size
    stage = pipeline_stage(model, MICRO_BATCH, LENGTH, group)
    schedule = Schedule1F1B(stage, num_micro, loss_fn=stage_loss, scale_grads=False)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    losses = []
    for step in range(STEPS):
        batch = tokens(step).chunk(mine.data.size)[mine.data.rank].flatten(0, 1)
        optimizer.zero_grad()
        of_step: list[torch.Tensor] = []
        if mine.pipeline.rank == 0:
            schedule.step(batch[:, :-1])
        else:
            schedule.step(target=batch[:, 1:], losses=of_step)
        reduce_gradients(model, mine, num_micro)
        optimizer.step()
        total = torch.stack(of_step).sum() if of_step else torch.zeros(())
        total = mine.pipeline.all_reduce(mine.data.all_reduce(total.detach()))
        losses.append(float(total) / MICRO_BATCHES)
    return losses
