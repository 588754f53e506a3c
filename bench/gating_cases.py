"""The shapes and stages of bench/gating.py, their inputs, and what each stage must answer."""

# ruff: noqa: N806 - capitals are dimensions

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from gating_peers import DeepSpeed, Moecomm

from moecomm.gating import cuda, cuda_rows
from moecomm.gating.choices import Choices, Gradients, Saved

STAGES = ["route", "permute", "unpermute", "whole", "route_permute", "route_bwd", "permute_bwd", "unpermute_bwd"]
TOLERANCE = 4e-3
"""Of sums, as a share of the whole: they are rounded to bfloat16 once, by torch twice."""


class Shape(NamedTuple):
    T: int
    E: int
    k: int
    H: int

    def row_bytes(self, reads: int, writes: int) -> int:
        return (reads + writes) * self.T * self.H * 2

    def streams(self, stage: str) -> tuple[int, int]:
        """How often [T, H] is read and written."""
        return {
            "permute": (1, self.k),
            "route_permute": (1, self.k),
            "unpermute": (self.k, 1),
            "permute_bwd": (self.k, 1),
            "unpermute_bwd": (self.k + 1, self.k),
            "whole": (1 + self.k, self.k + 1),
        }.get(stage, (0, 0))

    def least_bytes(self, stage: str) -> int:
        """What must move: inputs once, outputs once."""
        T, E, k, _ = self
        route = 4 * T * E + 16 * T * k + 4 * E
        beside = {
            "route": route,
            "route_permute": route,
            "permute": 4 * T * k,
            "unpermute": 8 * T * k,
            "whole": route + 8 * T * k,
            "route_bwd": 8 * T * E + 12 * T * k,
            "permute_bwd": 4 * T * k,
            "unpermute_bwd": 12 * T * k,
        }
        return self.row_bytes(*self.streams(stage)) + beside[stage]


class Inputs:
    """One set: logits, tokens, and what the later stages start from."""

    def __init__(self, shape: Shape, peer: Any, stage: str) -> None:
        T, E, k, H = shape
        self.logits = torch.randn(T, E, device="cuda")
        self.x = torch.randn(T, H, device="cuda").bfloat16()
        if stage in ("permute", "unpermute", "permute_bwd", "unpermute_bwd", "route_bwd"):
            self.choice = peer.route(self.logits)
        if stage in ("unpermute", "permute_bwd", "unpermute_bwd"):
            self.rows = torch.randn_like(peer.permute(self.x, self.choice))
        if stage == "route_bwd":
            self.grads = torch.randn(T, k, device="cuda"), torch.ones((), device="cuda"), torch.ones((), device="cuda")


def call(peer: Any, stage: str, a: Inputs) -> Any:
    if stage == "route":
        return peer.route(a.logits)
    if stage == "permute":
        return peer.permute(a.x, a.choice)
    if stage == "unpermute":
        return peer.unpermute(a.rows, a.choice)
    if stage in ("whole", "route_permute"):
        return getattr(peer, stage)(a.logits, a.x)
    routing = a.choice
    if stage == "route_bwd":
        saved = Saved(a.logits, routing.expert, routing.lse, routing.load, mask=None)
        return cuda.route_backward(Gradients(*a.grads), saved, Choices(top_k=routing.expert.shape[1]))
    if stage == "permute_bwd":
        return cuda_rows.permute_backward(a.rows, routing.row)
    return cuda_rows.unpermute_backward(a.x, a.rows, routing.row, routing.weight, routing.source)


# ---- right or wrong ------------------------------------------------------------------------------------------------


def wrong(peer: Any, stage: str, a: Inputs) -> bool:
    """Whether the stage's answer for these inputs is not what its definition says."""
    if stage == "route":
        return wrong_choice(peer, peer.route(a.logits), a)
    if isinstance(peer, Moecomm):
        return wrong_answer(call(peer, stage, a), stage, a, peer.route(a.logits))
    # There and straight back: x times the sum of the weights. What DeepSpeed drops is drawn anew at each call.
    choice = peer.route(a.logits)
    expert, weight = peer.weights(choice)
    y = peer.unpermute(peer.permute(a.x, choice), choice)
    if far(y, a.x.double() * (weight.double() * (expert >= 0)).sum(1, keepdim=True)):
        return True
    return stage == "whole" and not isinstance(peer, DeepSpeed) and far(peer.whole(a.logits, a.x)[0], y.double())


def wrong_answer(got: Any, stage: str, a: Inputs, routing: Any) -> bool:
    """Of moecomm's stages but route."""
    tokens = routing.source.long() // routing.row.shape[1]
    if stage == "permute":
        return not torch.equal(got, a.x[tokens])
    if stage == "unpermute":
        return far(got, weighted(a.rows, routing.row, routing.weight))
    if stage == "permute_bwd":
        return far(got, weighted(a.rows, routing.row, torch.ones_like(routing.weight)))
    if stage == "route_bwd":
        return far(got, route_gradient(a, routing.row.shape[1]))
    if stage == "unpermute_bwd":
        return wrong_gradients(got, a)
    rows = got[1]
    if not torch.equal(rows, a.x[tokens]):
        return True
    return stage == "whole" and far(got[0], weighted(rows, routing.row, routing.weight))


def far(got: torch.Tensor, wanted: torch.Tensor, size: torch.Tensor | None = None) -> bool:
    """size: the magnitudes of wanted's terms added up, where they may cancel: then it is no measure of the error."""
    measure = wanted if size is None else size
    return not float((got.double() - wanted).norm() / measure.norm().clamp(min=1e-30)) < TOLERANCE


def weighted(rows: torch.Tensor, row: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    y = torch.zeros(row.shape[0], rows.shape[1], dtype=torch.float64, device=rows.device)
    for j in range(row.shape[1]):
        y += weight[:, j, None].double() * rows[row[:, j].long()].double()
    return y


def wrong_choice(peer: Any, choice: Any, a: Inputs) -> bool:
    expert, weight = peer.weights(choice)
    scores = a.logits.double().softmax(1)
    if isinstance(peer, DeepSpeed):
        kept = torch.where(expert >= 0, scores.gather(1, expert.clamp(min=0).long()), 0)
        return far(weight, kept if peer.top_k == 1 else kept / kept.sum(1, keepdim=True).clamp(min=1e-30))
    wanted = a.logits.sort(dim=1, descending=True, stable=True).indices[:, : peer.top_k]
    best = scores.gather(1, wanted)
    if far(weight, best):
        return True
    if not isinstance(peer, Moecomm):  # of scores that are equal in float32 others may take another one
        return far(scores.gather(1, expert.long()), best)
    if not torch.equal(expert.long(), wanted):
        return True
    order = wanted.flatten().sort(stable=True).indices
    places = torch.arange(len(order), device="cuda")
    return not torch.equal(choice.source.long(), order) or not torch.equal(choice.row.flatten()[order].long(), places)


def route_gradient(a: Inputs, k: int) -> torch.Tensor:
    logits = a.logits.double().requires_grad_()
    scores, (T, E) = logits.softmax(1), logits.shape
    aux_loss = E / k * (scores.mean(0) * a.choice.load / T).sum()
    z_loss = logits.logsumexp(1).square().mean()
    loss = (scores.gather(1, a.choice.expert.long()) * a.grads[0]).sum() + aux_loss + z_loss
    return torch.autograd.grad(loss, logits)[0]


def wrong_gradients(got: tuple[torch.Tensor, torch.Tensor], a: Inputs) -> bool:
    row, weight = a.choice.row.long(), a.choice.weight
    for j in range(row.shape[1]):
        if far(got[0][row[:, j]], weight[:, j, None].double() * a.x):
            return True
        products = a.x.double() * a.rows[row[:, j]].double()
        if far(got[1][:, j], products.sum(1), products.abs().sum(1)):
            return True
    return False
