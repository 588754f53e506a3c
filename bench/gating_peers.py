"""What bench/gating.py measures: the gate of moecomm, of plain torch, of torch.compile and of DeepSpeed.

Each class has route(logits) -> choice, permute(x, choice) -> rows and unpermute(rows, choice) -> y, for one top_k.
"""

from __future__ import annotations

import logging
import sys
import tarfile
import types
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import moecomm
from moecomm.gating import permute, route_permute, unpermute


class Moecomm:
    """Our kernels, each token to all its experts: nothing is dropped. `whole` is route_permute and unpermute."""

    name = "moecomm"

    def __init__(self, top_k: int) -> None:
        self.top_k = top_k

    def route(self, logits: Tensor) -> Any:
        return moecomm.route(logits, self.top_k)

    def permute(self, x: Tensor, routing: Any) -> Tensor:
        return permute(x, routing)

    def unpermute(self, rows: Tensor, routing: Any) -> Tensor:
        return unpermute(rows, routing)

    def route_permute(self, logits: Tensor, x: Tensor) -> tuple[Any, Tensor]:
        return route_permute(logits, x, self.top_k)

    def whole(self, logits: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        routing, rows = self.route_permute(logits, x)
        return unpermute(rows, routing), rows

    @staticmethod
    def weights(routing: Any) -> tuple[Tensor, Tensor]:
        """[T, K] expert (-1: dropped) and weight."""
        return routing.expert, routing.weight


class Unfused:
    """whole = route, permute, unpermute."""

    def whole(self: Any, logits: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        choice = self.route(logits)
        rows = self.permute(x, choice)
        return self.unpermute(rows, choice), rows


class Torch(Unfused):
    """Sort by expert, index_select there and back, the weighted sum in float32: faster than one-hot and index_add."""

    name = "torch"

    def __init__(self, top_k: int) -> None:
        self.top_k = top_k

    def route(self, logits: Tensor) -> tuple[Tensor, ...]:
        weight, expert = logits.softmax(1).topk(self.top_k)
        flat = expert.flatten()
        order = flat.argsort(stable=True)
        row = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        count = torch.zeros(logits.shape[1], dtype=torch.int64, device=flat.device)
        count.scatter_add_(0, flat, torch.ones_like(flat))
        return expert, weight, order, row, count

    def permute(self, x: Tensor, choice: tuple[Tensor, ...]) -> Tensor:
        return x.index_select(0, choice[2] // self.top_k)

    def unpermute(self, rows: Tensor, choice: tuple[Tensor, ...]) -> Tensor:
        weight, row = choice[1], choice[3]
        back = rows.index_select(0, row).view(*weight.shape, rows.shape[1])
        return (back * weight[..., None]).sum(1).to(rows.dtype)

    @staticmethod
    def weights(choice: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        return choice[0], choice[1]


class Compiled(Torch):
    """Torch, through torch.compile."""

    name = "torch.compile"

    def __init__(self, top_k: int) -> None:
        super().__init__(top_k)
        torch._dynamo.reset()
        for stage in ("route", "permute", "unpermute", "whole"):
            setattr(self, stage, torch.compile(getattr(Torch(top_k), stage), dynamic=False))


class DeepSpeed(Unfused):
    """The gate and dispatch of the released deepspeed/moe/sharded_moe.py, with its defaults: capacity factor 1, at
    least 4 rows an expert, more are dropped (k = 1: at random, k = 8: the least probable). k = 2: no sampling."""

    name = "deepspeed"

    def __init__(self, top_k: int, source: Path) -> None:
        self.top_k, self.moe = top_k, load_deepspeed(source)

    def gate(self, logits: Tensor, sparse_routes: bool) -> Any:
        if self.top_k == 1:
            return self.moe.top1gating(logits, 1.0, 4, sparse_routes=sparse_routes)
        if self.top_k == 2:
            return self.moe.top2gating(logits, 1.0, 4, top2_2nd_expert_sampling=False, sparse_routes=sparse_routes)
        return self.moe.topkgating(logits, self.top_k, 1.0, 4, sparse_routes=sparse_routes)

    def route(self, logits: Tensor) -> tuple[Any, ...]:
        _, capacity, experts, indices, locations, gates, _ = self.gate(logits, True)
        slots = self.moe._route_slots(indices, locations, experts, int(capacity))
        return indices, gates, slots, experts, int(capacity)

    def permute(self, x: Tensor, choice: tuple[Any, ...]) -> Tensor:
        return self.moe._sparse_encode(x, *choice[2:])

    def unpermute(self, rows: Tensor, choice: tuple[Any, ...]) -> Tensor:
        indices, gates, slots, *_ = choice
        return self.moe._sparse_decode(rows.view(-1, rows.shape[-1]), slots, gates, indices.shape[1])

    @staticmethod
    def weights(choice: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
        return choice[0].t(), choice[1].t()


class DeepSpeedEinsum(DeepSpeed):
    """The dense [T, E, C] masks of DeepSpeed up to 0.19.3, which its paper (arXiv 2201.05596) compares with. The gate
    is that of the release above, dispatch and combine are the einsums of the older MOELayer."""

    name = "deepspeed einsum"

    def route(self, logits: Tensor) -> tuple[Any, ...]:
        _, combine, mask, _ = self.gate(logits, False)
        return combine, mask

    def permute(self, x: Tensor, choice: tuple[Any, ...]) -> Tensor:
        return self.moe.einsum("sec,sm->ecm", choice[1].type_as(x), x)

    def unpermute(self, rows: Tensor, choice: tuple[Any, ...]) -> Tensor:
        return self.moe.einsum("sec,ecm->sm", choice[0].type_as(rows), rows)

    @staticmethod
    def weights(choice: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
        weight = choice[0].sum(2)  # [T, E]
        expert = torch.arange(weight.shape[1], device=weight.device).expand_as(weight)
        return torch.where(weight > 0, expert, -1), weight


def load_deepspeed(source: Path) -> Any:
    """sharded_moe.py of the archive, as released. What it imports of the rest serves many ranks, and is empty here."""
    if "deepspeed.moe.sharded_moe" in sys.modules:
        return sys.modules["deepspeed.moe.sharded_moe"]
    with tarfile.open(source) as archive:
        member = next(m for m in archive.getmembers() if m.name.endswith("/deepspeed/moe/sharded_moe.py"))
        code = archive.extractfile(member)
        assert code is not None
        text = code.read().decode()
    empty: dict[str, dict[str, Any]] = {
        "deepspeed": {},
        "deepspeed.moe": {"__path__": []},
        "deepspeed.comm": {"ProcessGroup": object, "pg_utils": types.SimpleNamespace()},
        "deepspeed.utils": {"logger": logging.getLogger("deepspeed"), "groups": types.SimpleNamespace()},
        "deepspeed.utils.timer": {"SynchronizedWallClockTimer": object},
        "deepspeed.utils.bwc": {"bwc_tensor_model_parallel_world_size": None},
        "deepspeed.moe.mappings": {"drop_tokens": None, "gather_tokens": None},
    }
    for name, content in empty.items():
        module = types.ModuleType(name)
        vars(module).update(content)
        sys.modules[name] = module
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)
    module = types.ModuleType("deepspeed.moe.sharded_moe")
    module.__package__ = "deepspeed.moe"
    sys.modules[module.__name__] = module
    exec(compile(text, member.name, "exec"), vars(module))
    return module


def make(name: str, top_k: int, deepspeed: Path | None) -> Any:
    """The implementation of that name; None if it is DeepSpeed's and there is no archive of it."""
    if name in ("deepspeed", "deepspeed einsum"):
        kind = DeepSpeed if name == "deepspeed" else DeepSpeedEinsum
        return kind(top_k, deepspeed) if deepspeed else None
    return {"moecomm": Moecomm, "torch": Torch, "torch.compile": Compiled}[name](top_k)
