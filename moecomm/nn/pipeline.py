"""A stage of a TransformerLM as torch.distributed.pipelining wants it: tensors in, tensors out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage

from moecomm.nn.transformer import TransformerLM, next_token_loss


class Stage(nn.Module):
    """model, a part of a TransformerLM: tokens, or hidden states and the gates' loss [1] -> the two for the next stage.

    The last stage gives logits and the loss, for `stage_loss`.
    """

    def __init__(self, model: TransformerLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, loss: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Collective over the ranks of this stage."""
        output = self.model(x, None if loss is None else loss[0])
        return output.logits, output.loss[None]


def pipeline_stage(model: TransformerLM, micro_batch: int, length: int, group: Any) -> PipelineStage:
    """The stage of this rank for one of torch's schedules.

    model        made with stage=(i, n)
    micro_batch  sequences in each micro-batch, of so many tokens
    length       of each
    group        torch ProcessGroup of the pipeline ranks: topology.device_mesh(...)[0].get_group("pipeline")

    Gradients: make the schedule with scale_grads=False and tell `reduce_gradients` the number of micro-batches.
    """
    weight = next(model.parameters())

    # Given its shapes a stage needs no exchange of them before the first step.
    def passed(width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        hidden = torch.empty(micro_batch, length, width, dtype=dtype, device="meta", requires_grad=True)
        return hidden, torch.empty(1, device="meta", requires_grad=True)

    tokens = torch.empty(micro_batch, length, dtype=torch.int64, device="meta")
    hidden_states = passed(model.config.hidden, weight.dtype)
    logits = passed(model.config.vocabulary, torch.float32)
    return PipelineStage(
        Stage(model),
        *model.stage,
        weight.device,
        input_args=(tokens,) if model.is_first else hidden_states,
        output_args=logits if model.is_last else hidden_states,
        group=group,
    )


def stage_loss(output: tuple[Tensor, Tensor], following: Tensor) -> Tensor:
    """The loss of a micro-batch from what the last stage gave and the tokens [B, S] that come next."""
    logits, loss = output
    return next_token_loss(logits, following) + loss[0]
