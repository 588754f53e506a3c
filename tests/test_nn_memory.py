"""memory_estimate against models: weights, gradients and optimizer to the byte, peaks of real steps within 10 %.

Measured is every byte of every tensor that is alive, by a mode that sees each operation's results. Activations: what a
forward pass leaves. Peak: the most at any moment of a step after the first, from zero_grad to the optimizer's own.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from conftest import gloo_run

torch = pytest.importorskip("torch")

from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402

from moecomm import Comm, Topology  # noqa: E402
from moecomm.nn import (  # noqa: E402
    CONFIGS,
    Config,
    TransformerLM,
    layer_groups,
    layer_topologies,
    memory_estimate,
    next_token_loss,
    reduce_gradients,
)
from moecomm.transports import threads  # noqa: E402

torch.set_num_threads(1)
CONFIG = Config(4, 128, 4, (4, 8), residual="sum", vocabulary=256, context=64)
TOP_2 = replace(CONFIG, residual="none", top_k=2)
LEARNED = replace(CONFIG, residual="learned", activation="swiglu")


class Alive(TorchDispatchMode):
    """Counts the bytes of the storages that exist."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: dict[int, object] = {}

    def add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self.known:

            def gone(_: object) -> None:
                self.now -= size
                del self.known[key]

            self.known[key] = weakref.ref(storage, gone)
            self.now += size
            self.peak = max(self.peak, self.now)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.add(leaf)
        return result


def measure(model: TransformerLM, optimizer: Any, sequences: int, length: int) -> tuple[int, int, float]:
    """Bytes of activations and at the peak; the mean number of rows that came to the experts of a layer."""
    rows: list[int] = []
    for layer in model.moe_layers():
        layer.experts.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    alive = Alive()
    activations, peaks = [], []
    with alive:
        for tensor in (*model.parameters(), *model.buffers()):
            alive.add(tensor)
        for step in range(4):  # what another thread of gloo still holds for a moment can only add: the least counts
            optimizer.zero_grad()
            alive.peak = alive.now
            for micro in range(2):
                generator = torch.Generator().manual_seed(10 * min(step, 1) + micro)
                tokens = torch.randint(model.config.vocabulary, (sequences, length + 1), generator=generator)
                before = alive.now
                output = model(tokens[:, :-1])
                loss = next_token_loss(output.logits, tokens[:, 1:]) + output.loss
                activations.append(alive.now - before)
                loss.backward()
                del output, loss
            reduce_gradients(model, model.groups, 2)
            optimizer.step()
            peaks.append(alive.peak)
    return (
        min(activations[3::2]),
        min(peaks[1:]),
        sum(rows[-len(model.moe_layers()) :]) / max(1, len(model.moe_layers())),
    )


def compare(
    config: Config, topologies: Sequence[Topology], model: TransformerLM, rank: int, batch: Sequence[int]
) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0, fused=True)  # each step routes the tokens alike
    activations, peak, rows = measure(model, optimizer, *batch)
    even = memory_estimate(config, topologies, sequences=batch[0], length=batch[1], rank=rank)
    assert even.weights == sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    assert even.gradients == sum(parameter.grad.nbytes for parameter in model.parameters())
    states = [value for state in optimizer.state.values() for value in state.values() if value.dim()]
    assert even.optimizer == sum(value.nbytes for value in states)
    first = topologies[0]
    each = batch[0] * batch[1] * config.top_k * first.expert_tensor / first.tensor
    skew = rows / each if config.capacity_factor is None and config.experts else 1.0
    got = memory_estimate(config, topologies, sequences=batch[0], length=batch[1], rank=rank, skew=skew)
    assert got.activations == pytest.approx(activations, rel=0.02)
    assert got.total == pytest.approx(peak, rel=0.1)


@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        TOP_2,
        LEARNED,
        replace(CONFIG, vocabulary=4096),
        replace(CONFIG, capacity_factor=1.5),
        replace(CONFIG, experts=(0, 8)),
        replace(CONFIG, experts=()),
    ],
)
@pytest.mark.parametrize("batch", [(8, 64), (1, 16)])
def test_one_rank(config: Config, batch: tuple[int, int]) -> None:
    compare(config, layer_topologies(1, config.experts or (0,)), TransformerLM(config), 0, batch)


@pytest.mark.slow
def test_two_ranks() -> None:
    def body(comm: Comm) -> None:
        for config, sizes in (
            (CONFIG, {"expert": 2}),
            (CONFIG, {"expert": 1}),
            (CONFIG, {"expert": 2, "tensor": 2}),
            (TOP_2, {"expert": 1, "tensor": 2, "expert_tensor": 2}),
            (replace(LEARNED, experts=(2, 4)), {"expert": 2}),
        ):
            groups = layer_groups(comm, config.experts, **sizes)
            for batch in ((8, 64), (1, 16)):
                model = TransformerLM(config, groups=groups)
                compare(config, [group.topology for group in groups], model, comm.rank, batch)

    gloo_run(2, body)


@pytest.mark.parametrize("config", [CONFIG, TOP_2, LEARNED])
def test_weights_of_every_rank(config: Config) -> None:
    config = replace(config, hidden=16, heads=2)

    def body(comm: Comm) -> None:
        for sizes in ({"pipeline": 2, "tensor": 2}, {"tensor": 2, "expert_tensor": 2}, {"pipeline": 4}):
            groups = layer_groups(comm, config.experts, **sizes)
            mine = groups[0].pipeline
            model = TransformerLM(config, groups=groups, stage=(mine.rank, mine.size))
            got = memory_estimate(config, [group.topology for group in groups], sequences=1, rank=comm.rank, states=1)
            assert got.weights == sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
            assert got.gradients == got.optimizer == sum(p.nbytes for p in model.parameters())

    threads.run(4, body)


def test_the_papers_largest_model() -> None:
    """52 billion parameters on 128 GPUs, one expert of each layer on each: the model is not made."""
    config = CONFIGS["1.3b-moe-128"]
    got = memory_estimate(config, Topology(128, expert=128), sequences=4, dtype=torch.bfloat16)
    gates = 12 * 128 * 2048
    dense = config.num_parameters() - 12 * 128 * (2 * 2048 * 8192 + 8192 + 2048)
    on_a_rank = dense + 12 * (2 * 2048 * 8192 + 8192 + 2048)
    assert got.gradients == 2 * on_a_rank + 2 * gates
    assert got.optimizer == 2 * got.gradients
    assert got.total == got.weights + got.gradients + got.optimizer + got.activations + got.buffers


def test_what_it_refuses() -> None:
    with pytest.raises(ValueError, match="got 3 topologies, expected 2"):
        memory_estimate(CONFIG, [Topology(1)] * 3, sequences=1)
    with pytest.raises(ValueError, match="4 layers, which pipeline=3 stages cannot share"):
        memory_estimate(CONFIG, Topology(3, pipeline=3), sequences=1)
    with pytest.raises(ValueError, match="rank is 1, expected 0"):
        memory_estimate(CONFIG, Topology(1), sequences=1, rank=1)
