"""The training loop: steps over micro-batches, the same losses on any number of ranks."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from moecomm.nn import (
    Config,
    LayerReport,
    Output,
    TransformerLM,
    loss_carried,
    reduce_gradients,
    routing_report,
    update_bias,
)
from moecomm.nn.linear import part_in
from moecomm.train.text import Text

Balance = Literal["aux", "z", "bias", "loss-bias", "none"]
WARM_UP = 20
"""Steps over which the learning rate grows."""


@dataclass(frozen=True)
class TrainingPlan:
    """What is trained, on all ranks together.

    batch        sequences in a step
    micro_batch  sequences that are routed together: capacity and losses of the gate are over these, so results do not
                 depend on the number of ranks
    balance      "bias": the selection bias follows each expert's tokens; "loss-bias": the loss that it carries. The
                 others are the model's business, see `balanced`
    bias_rate    of these two
    decay_steps  over which the learning rate falls to a tenth, along a line; None: it stays
    precision    "bfloat16": matrix products and what travels, by torch's autocast; the weights stay float32

    Raises ValueError if micro_batch does not divide batch.
    """

    batch: int = 16
    micro_batch: int = 4
    learning_rate: float = 3e-3
    balance: Balance = "aux"
    bias_rate: float = 1e-2
    decay_steps: int | None = None
    precision: Literal["float32", "bfloat16"] = "float32"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.batch < 1 or self.micro_batch < 1 or self.batch % self.micro_batch:
            raise ValueError(f"batch is {self.batch}, which micro-batches of {self.micro_batch} sequences cannot share")


def balanced(config: Config, balance: Balance) -> Config:
    """config with the gate's losses that go with a way of balancing: "aux" or "z" alone, or none."""
    return replace(config, aux_loss=0.01 * (balance == "aux"), z_loss=0.001 * (balance == "z"))


class Trainer:
    """Steps of AdamW on a model that is split as its groups say.

    Raises ValueError if the data ranks cannot share the micro-batches.
    """

    def __init__(self, model: TransformerLM, text: Text, plan: TrainingPlan) -> None:
        self.model = model
        self.text = text
        self.plan = plan
        self.data = None if model.groups is None else model.groups.data
        _, ranks = part_in(self.data)
        num_micro = plan.batch // plan.micro_batch
        if num_micro % ranks:
            raise ValueError(f"{num_micro} micro-batches (batch / micro-batch), which {ranks} data ranks cannot share")
        # Fused: one pass over all parameters instead of several kernels for each.
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=plan.learning_rate, betas=(0.9, 0.95), fused=True)
        self.device = next(model.parameters()).device

    def settings(self) -> dict[str, Any]:
        """What a log says of this run before its first step."""
        return {
            "config": asdict(self.model.config),
            "plan": asdict(self.plan),
            "text": self.text.identity(),
        }

    def step(self, number: int) -> float:
        """Train on the step's batch; the mean loss of next tokens on this rank. Collective over all ranks."""
        self.model.train()
        for group in self.optimizer.param_groups:
            group["lr"] = self._learning_rate(number)
        self.optimizer.zero_grad()
        layers = self.model.moe_layers()
        # Over the whole step: one micro-batch has few tokens of an expert.
        carried = [torch.zeros(layer.num_experts, device=self.device) for layer in layers]
        means = []
        micro_batches = self._micro_batches(self.text.batch(number, self.plan.batch))
        for tokens in micro_batches:
            losses, output = self._losses(tokens)
            self.objective(number, tokens, losses, output).backward()
            # Kept on the device, so that the host does not wait for it before the step's end.
            means.append(losses.detach().mean())
            for total, routing in zip(carried, output.routings, strict=True):
                total += loss_carried(routing, losses) if self.plan.balance == "loss-bias" else routing.load
        reduce_gradients(self.model, self.model.groups, len(micro_batches))
        self.optimizer.step()
        if self.plan.balance in ("bias", "loss-bias"):
            # After the step: all micro-batches of a step choose by the same biases, whatever their number on a rank.
            for layer, total in zip(layers, carried, strict=True):
                update_bias(layer, total, self.plan.bias_rate)
        return float(torch.stack(means).mean())

    def objective(self, number: int, tokens: Tensor, losses: Tensor, output: Output) -> Tensor:
        """What a step makes smaller, for one micro-batch: the mean loss of next tokens and what the gates add.

        number  of the step
        tokens  [B, S + 1], of which the first S were read
        losses  [B * S] of the S next ones
        """
        return losses.mean() + output.loss

    @torch.no_grad()
    def validate(self, num_batches: int = 4) -> float:
        """The mean loss on held-out sequences, on this rank. Collective over all ranks."""
        self.model.eval()
        sequences = self.text.validation(num_batches * self.plan.batch)
        means = [self._losses(tokens)[0].mean() for tokens in self._micro_batches(sequences)]
        return float(torch.stack(means).mean())

    def report(self) -> list[LayerReport]:
        """Of the first held-out micro-batch of each data rank. Collective over all ranks."""
        self.model.eval()
        # One micro-batch, as in a step: capacity and load are those of tokens that are routed together.
        tokens = self._micro_batches(self.text.validation(self.plan.batch))[0]
        with self._precision():
            return routing_report(self.model, tokens[:, :-1])

    def _learning_rate(self, number: int) -> float:
        share = min(1.0, (number + 1) / WARM_UP)
        if self.plan.decay_steps is not None:
            share *= 1 - 0.9 * min(1.0, number / self.plan.decay_steps)
        return self.plan.learning_rate * share

    def _precision(self) -> torch.autocast:
        mixed = self.plan.precision == "bfloat16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=mixed)

    def _micro_batches(self, batch: Tensor) -> tuple[Tensor, ...]:
        """Those of this data rank."""
        # Consecutive ones, so that the micro-batches of all ranks are those that one rank alone would make.
        rank, ranks = part_in(self.data)
        sequences = batch.to(self.device).chunk(ranks)[rank]
        return sequences.split(self.plan.micro_batch)

    def _losses(self, tokens: Tensor) -> tuple[Tensor, Output]:
        """[B * S] of each next token."""
        with self._precision():
            output = self.model(tokens[:, :-1])
        # Not their mean: the loss-aware bias and a teacher need that of each token.
        logits = output.logits.flatten(0, 1)
        targets = tokens[:, 1:].flatten()
        return F.cross_entropy(logits, targets, reduction="none"), output
