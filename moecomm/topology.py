"""Topology: which ranks form which group. Plain arithmetic: ranks are a reshaped arange, a group is a slice of it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import KW_ONLY, asdict, dataclass, fields
from typing import Any, Literal

import numpy as np

AXES = ("pipeline", "data", "tensor", "expert_data", "expert", "expert_tensor", "lane", "expert_lane")
"""Every axis that ranks can be grouped along."""

DENSE = ("pipeline", "data", "tensor")
"""The axes of the dense grid, the last one running fastest."""


@dataclass(frozen=True)
class Topology:
    """The ranks 0 .. world_size - 1 factored twice, the last axis running fastest:

        dense layers   pipeline x data x tensor
        expert layers  pipeline x expert_data x expert x expert_tensor

    tensor         ranks that hold the same tokens and slices of a dense weight
    pipeline       stages
    expert         ranks among which the experts are divided
    expert_tensor  ranks that hold slices of one expert
    inner          which of expert and expert_data runs faster: "expert" puts an expert group on neighbouring ranks,
                   "expert_data" the copies of an expert (DeepSpeed's D-before-E)

    Two more axes come from both grids. A lane is the ranks of a stage with the same tensor rank: the same groups as
    data. An expert_lane is the ranks of an expert group that are on one lane.

    Layers with different expert sizes have one Topology each, over the same ranks. Immutable, hashable.
    Raises TypeError for a size that is no integer, ValueError for one that does not divide the ranks it is to share.
    Source: DeepSpeed-MoE (arXiv 2201.05596), section 5; two grids over the same ranks: Megatron's parallel folding.
    """

    world_size: int
    """p, the number of ranks."""
    _: KW_ONLY
    tensor: int = 1
    pipeline: int = 1
    expert: int = 1
    expert_tensor: int = 1
    inner: Literal["expert", "expert_data"] = "expert"

    def __post_init__(self) -> None:
        for name in ("world_size", "tensor", "pipeline", "expert", "expert_tensor"):
            object.__setattr__(self, name, as_integer(getattr(self, name), f"Topology: {name}"))
        if self.world_size < 1:
            raise ValueError(f"Topology: world_size is {self.world_size}, expected at least 1")
        self._check_divides("pipeline")
        self._check_divides("tensor", "pipeline")
        self._check_divides("expert_tensor", "pipeline")
        self._check_divides("expert", "pipeline", "expert_tensor")
        if self.inner not in ("expert", "expert_data"):
            raise ValueError(f"Topology: inner is {self.inner!r}, expected 'expert' or 'expert_data'")

    @property
    def data(self) -> int:
        """Ranks that hold the same dense weights and different tokens."""
        return self.world_size // (self.pipeline * self.tensor)

    @property
    def expert_data(self) -> int:
        """Ranks that hold the same experts."""
        return self.world_size // (self.pipeline * self.expert * self.expert_tensor)

    def groups(self, *axes: str) -> list[list[int]]:
        """The groups along one axis, or along a product of axes: the ranks that differ in these coordinates only.

        axes     of one grid: pipeline, data or lane, tensor; or pipeline, expert_data, expert, expert_tensor; or
                 expert_lane, with or without pipeline
        returns  every rank once. Members are in rank order. Groups along expert axes come by pipeline, then
                 expert_tensor, then lowest rank, as DeepSpeed numbers them; the parts of an expert group on its lanes
                 stay together. Groups along dense axes come by lowest rank

        Raises ValueError for axes that do not go together.
        """
        grid, free = self._resolve("groups", axes)
        fixed = [axis for axis in grid if axis not in free]
        fixed.sort(key=lambda axis: {"pipeline": 0, "expert_tensor": 1}.get(axis, 2))  # stable: the rest in grid order
        order = [grid.index(axis) for axis in (*fixed, *(axis for axis in grid if axis in free))]
        ranks = np.arange(self.world_size).reshape(self._shape(grid)).transpose(order)
        groups: list[list[int]] = ranks.reshape(-1, math.prod(self._shape(free))).tolist()
        return [part for group in groups for part in self._by_lane(group)] if "expert_lane" in axes else groups

    def group_of(self, rank: int, *axes: str) -> list[int]:
        """The one of `groups(*axes)` that `rank` is in."""
        grid, free = self._resolve("group_of", axes)
        rank, shape = self._as_rank("group_of", rank), self._shape(grid)
        place = zip(grid, np.unravel_index(rank, shape), strict=True)
        ranks = np.arange(self.world_size).reshape(shape)
        group = ranks[tuple(slice(None) if axis in free else i for axis, i in place)].ravel()
        if "expert_lane" in axes:
            group = group[group % self.tensor == rank % self.tensor]
        return [int(member) for member in group]

    def coords(self, rank: int) -> dict[str, int]:
        """For every axis, the place of `rank` in its group along it. Which lane it is on says "tensor", not "lane"."""
        rank = self._as_rank("coords", rank)
        place: dict[str, int] = {}
        for grid in (DENSE, self._experts):
            place.update(zip(grid, map(int, np.unravel_index(rank, self._shape(grid))), strict=True))
        place["lane"] = place["data"]
        place["expert_lane"] = self.group_of(rank, "expert_lane").index(rank)
        return {axis: place[axis] for axis in AXES}

    def device_mesh(self, device_type: str = "cuda") -> tuple[Any, Any]:
        """torch DeviceMeshes of the dense grid and of the expert grid, whose dimensions have the names of the axes.

        Collective over torch.distributed's world, which must be initialised and have world_size ranks.
        """
        import torch
        from torch.distributed.device_mesh import DeviceMesh

        grids = (DENSE, self._experts)
        ranks = [torch.arange(self.world_size, dtype=torch.int).reshape(self._shape(grid)) for grid in grids]
        dense, experts = (DeviceMesh(device_type, r, mesh_dim_names=g) for g, r in zip(grids, ranks, strict=True))
        return dense, experts

    def to_json(self) -> str:
        """The sizes and the groups along every axis, as stable text: one line for each."""
        lines = [f'  "{name}": {json.dumps(value)},' for name, value in asdict(self).items()]
        tables = ",\n".join(f'    "{axis}": {json.dumps(self.groups(axis))}' for axis in AXES)
        return "\n".join(["{", *lines, '  "groups": {', tables, "  }", "}"])

    @classmethod
    def from_json(cls, text: str) -> Topology:
        """The Topology that `to_json` wrote. ValueError if the text is something else or its groups disagree."""
        try:
            read = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"Topology.from_json: not JSON: {error}") from None
        sizes = [field.name for field in fields(cls)]
        check_keys(read, [*sizes, "groups"], "the text")
        check_keys(read["groups"], list(AXES), "groups")
        try:
            topology = cls(**{name: read[name] for name in sizes})
        except (TypeError, ValueError) as error:
            raise ValueError(f"Topology.from_json: {error}") from None
        for axis in AXES:
            if read["groups"][axis] != topology.groups(axis):
                raise ValueError(f"Topology.from_json: the groups along {axis} are not those of {topology}")
        return topology

    # ---- the two grids ---------------------------------------------------------------------------------------------

    @property
    def _experts(self) -> tuple[str, ...]:
        outer = "expert_data" if self.inner == "expert" else "expert"
        return ("pipeline", outer, self.inner, "expert_tensor")

    def _shape(self, axes: Iterable[str]) -> tuple[int, ...]:
        return tuple(getattr(self, axis) for axis in axes)

    def _by_lane(self, group: list[int]) -> list[list[int]]:
        lanes: dict[int, list[int]] = {}
        for rank in group:
            lanes.setdefault(rank % self.tensor, []).append(rank)
        return list(lanes.values())

    # ---- checks ----------------------------------------------------------------------------------------------------

    def _resolve(self, call: str, axes: tuple[str, ...]) -> tuple[tuple[str, ...], set[str]]:
        """The grid that has these axes, and those of its axes along which a group runs."""
        for axis in axes:
            if axis not in AXES:
                raise ValueError(f"Topology.{call}: {axis!r} is no axis, expected some of {', '.join(AXES)}")
        free = {{"lane": "data", "expert_lane": "expert"}.get(axis, axis) for axis in axes}
        if axes and len(free) == len(axes):
            if free <= set(DENSE):
                return DENSE, free
            if free <= ({"pipeline", "expert"} if "expert_lane" in axes else set(self._experts)):
                return self._experts, free
        raise ValueError(
            f"Topology.{call}: axes are {axes}, expected different ones that go together: pipeline, data (the same as "
            f"lane), tensor; or pipeline, expert_data, expert, expert_tensor; or pipeline, expert_lane"
        )

    def _as_rank(self, call: str, rank: Any) -> int:
        number = as_integer(rank, f"Topology.{call}: rank")
        if not 0 <= number < self.world_size:
            raise ValueError(f"Topology.{call}: rank is {number}, expected 0 .. {self.world_size - 1}")
        return number

    def _check_divides(self, name: str, *others: str) -> None:
        size, shared = getattr(self, name), self.world_size // math.prod(self._shape(others))
        if size < 1 or shared % size:
            product = " * ".join(f"{other} {getattr(self, other)}" for other in others)
            product = f"({product})" if len(others) > 1 else product
            computed = f"{shared} = world_size {self.world_size} / {product}" if others else f"world_size {shared}"
            raise ValueError(f"Topology: {name}={size} does not divide {computed}; valid: {divisors(shared)}")


def as_integer(value: Any, name: str) -> int:
    """`value` as an int. TypeError if it is something else, a bool included."""
    if isinstance(value, int | np.integer) and not isinstance(value, bool):
        return int(value)
    raise TypeError(f"{name} is {value!r}, expected an integer")


def divisors(number: int) -> str:
    """The divisors of `number`, ascending, as a list in words."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return ", ".join(map(str, sorted({*small, *(number // d for d in small)})))


def check_keys(read: Any, keys: list[str], name: str) -> None:
    """Raise ValueError unless `read` is a JSON object with exactly these keys."""
    found = sorted(read) if isinstance(read, dict) else f"a {type(read).__name__}"
    if found != sorted(keys):
        raise ValueError(f"Topology.from_json: {name} has {found}, expected an object with {sorted(keys)}")
