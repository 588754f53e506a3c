"""What a student makes smaller: the loss of the text, and its distance from how its teacher would go on."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from moecomm.comm import Comm


def distillation_loss(
    losses: Tensor,
    logits: Tensor,
    teacher: Tensor,
    *,
    alpha: float,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    tensor: Comm | None = None,
) -> Tensor:
    """The mean over tokens of loss + alpha * T^2 * KL(teacher || student), a scalar of at least float32.

    losses       [...] of each token: the cross-entropy of the text
    logits       [..., V] of the student; differentiable
    teacher      [..., V] its logits
    temperature  T, that both logits are divided by; T^2 keeps the gradient's size, whatever T is
    mask         [...] bool: the tokens that count, the others may be anything; None: all. If none does, the loss is 0
    tensor       as for `divergence`

    Differentiable in losses and logits. Raises ValueError if shapes do not fit, and as `divergence`.

    Source: DeepSpeed-MoE (arXiv 2201.05596), equation 1; Hinton et al. 2015 (arXiv 1503.02531).
    """
    _check_shape("losses", losses, logits)
    if mask is not None:
        _check_shape("mask", mask, logits)
        # Before they are used: in the backward pass a gradient of 0 times a slope of NaN is NaN.
        logits = torch.where(mask[..., None], logits, 0)
        teacher = torch.where(mask[..., None], teacher, 0)
    total = losses + alpha * temperature**2 * divergence(logits, teacher, temperature, tensor)
    if mask is None:
        return total.mean()
    return torch.where(mask, total, 0).sum() / mask.sum().clamp(min=1)


def _check_shape(name: str, values: Tensor, logits: Tensor) -> None:
    expected = tuple(logits.shape[:-1])
    if tuple(values.shape) != expected:
        raise ValueError(f"distillation_loss: {name} is {tuple(values.shape)}, expected {expected}, the logits' tokens")


def divergence(logits: Tensor, teacher: Tensor, temperature: float = 1.0, tensor: Comm | None = None) -> Tensor:
    """KL(teacher || student) of each token, in nats: logits [..., V], teacher [..., V] -> [...], float32 or float64.

    tensor  ranks that have a slice [..., V / L] of both logits each: the answer is that of the whole vocabulary, the
            same on all of them. Then collective; the backward pass is not. None: the logits are whole

    Differentiable in logits. Raises ValueError if the two shapes differ or the temperature is not above 0 and finite.
    """
    if logits.shape != teacher.shape:
        raise ValueError(f"divergence: teacher is {tuple(teacher.shape)}, expected {tuple(logits.shape)} as the logits")
    check_temperature("divergence", temperature)
    result: Tensor = _Divergence.apply(_exact(logits), _exact(teacher), temperature, tensor)
    return result


def check_temperature(function: str, temperature: float) -> None:
    """Raises ValueError unless it is above 0 and finite."""
    if not 0 < temperature < math.inf:
        raise ValueError(f"{function}: temperature is {temperature}, expected > 0 and finite")


def _exact(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _log_share(logits: Tensor, tensor: Comm | None) -> Tensor:
    """The log of each probability, over the vocabulary of all slices."""
    # The whole vocabulary's sum is that of the slices' sums, of which each is one number a token.
    total = logits.logsumexp(-1)
    if tensor is not None:
        total = tensor.all_gather(total[None]).logsumexp(0)
    return logits - total[..., None]


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, teacher: Tensor, temperature: float, tensor: Comm | None) -> Tensor:
        student = _log_share(logits / temperature, tensor)
        teacher = _log_share(teacher / temperature, tensor)
        share = teacher.exp()
        # The gradient is known here already; the log-softmax of either need not be kept for it.
        ctx.save_for_backward((student.exp() - share) / temperature)
        # A share of 0 has the logarithm -inf, and counts 0.
        result = torch.where(share > 0, share * (teacher - student), 0).sum(-1)
        return result if tensor is None else tensor.all_reduce(result)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (slope,) = ctx.saved_tensors
        return grad[..., None] * slope, None, None, None
