"""Topology: which ranks form which group. Plain arithmetic: ranks are a reshaped arange, a group is a slice of it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import KW_ONLY, asdict, dataclass, fields
from typing import TYPE_CHECKING, Literal

import numpy as np

from moecomm.arrays import Counts
from moecomm.json_objects import check_object, read_object

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

AXES = ("pipeline", "data", "tensor", "expert_data", "expert", "expert_tensor", "lane", "expert_lane")
"""All axes along which ranks can be grouped."""

DENSE = ("pipeline", "data", "tensor")
"""The axes of the dense grid, the last one running fastest."""

GRID_AXIS = {"lane": "data", "expert_lane": "expert"}
"""The axis of a grid along which a lane runs."""


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
    Raises TypeError for a size that is not an integer, ValueError for a size that does not divide its share of the
    ranks.
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
        # Sizes often come as numpy integers. As int, equal topologies have the same repr, which ranks compare.
        for name in ("world_size", "tensor", "pipeline", "expert", "expert_tensor"):
            size = as_integer(getattr(self, name), f"Topology: {name}")
            object.__setattr__(self, name, size)
        if self.world_size < 1:
            raise ValueError(f"Topology: world_size is {self.world_size}, expected at least 1")
        # Each size is checked after the sizes that it shares the ranks with, so that no quotient below is rounded.
        self._check_divides("pipeline")
        self._check_divides("tensor", "pipeline")
        self._check_divides("expert_tensor", "pipeline")
        self._check_divides("expert", "pipeline", "expert_tensor")
        if self.inner not in ("expert", "expert_data"):
            raise ValueError(f"Topology: inner is {self.inner!r}, expected 'expert' or 'expert_data'")

    @property
    def data(self) -> int:
        """The number of ranks that hold the same dense weights and different tokens."""
        return self.world_size // (self.pipeline * self.tensor)

    @property
    def expert_data(self) -> int:
        """The number of ranks that hold the same experts."""
        return self.world_size // (self.pipeline * self.expert * self.expert_tensor)

    def groups(self, *axes: str) -> list[list[int]]:
        """The groups along one axis, or along a product of axes: the ranks that differ in these coordinates only.

        axes     of one grid: pipeline, data or lane, tensor; or pipeline, expert_data, expert, expert_tensor; or
                 expert_lane, with or without pipeline
        returns  lists that contain each rank once, in rank order. Groups along expert axes are ordered by pipeline,
                 then expert_tensor, then lowest rank, as DeepSpeed numbers them; the lanes of an expert group follow
                 one another. Groups along dense axes are ordered by lowest rank

        Raises ValueError for axes that do not go together.
        """
        grid, free = self._resolve("groups", axes)
        fixed = [axis for axis in grid if axis not in free]
        # The sort is stable: after the stage and the slice, the grid's own order makes the lowest rank decide.
        fixed.sort(key=lambda axis: (axis != "pipeline", axis != "expert_tensor"))
        order = [grid.index(axis) for axis in fixed + free]
        ranks = self._ranks(grid).transpose(order)
        size = math.prod(self._sizes(free))
        groups: list[list[int]] = ranks.reshape(-1, size).tolist()
        if "expert_lane" in axes:
            return [lane for group in groups for lane in self._lanes(group)]
        return groups

    def group_of(self, rank: int, *axes: str) -> list[int]:
        """The group of `groups(*axes)` that contains `rank`."""
        grid, free = self._resolve("group_of", axes)
        rank = self._as_rank("group_of", rank)
        ranks = self._ranks(grid)
        # A slice of one grid, not a search through all groups: a program may call this for each of many ranks.
        coordinates = np.unravel_index(rank, ranks.shape)
        place = tuple(
            slice(None) if axis in free else coordinate for axis, coordinate in zip(grid, coordinates, strict=True)
        )
        group: list[int] = ranks[place].ravel().tolist()
        if "expert_lane" in axes:
            return next(lane for lane in self._lanes(group) if rank in lane)
        return group

    def coords(self, rank: int) -> dict[str, int]:
        """The index of `rank` in its group along each axis. The lane that it is on is the index along "tensor"."""
        rank = self._as_rank("coords", rank)
        return {axis: self.group_of(rank, axis).index(rank) for axis in AXES}

    def device_mesh(self, device_type: str = "cuda") -> tuple[DeviceMesh, DeviceMesh]:
        """torch DeviceMeshes of the dense grid and of the expert grid, whose dimensions have the names of the axes.

        Collective over torch.distributed's world, which must be initialised and have world_size ranks.
        """
        # torch is needed for this call alone, and is slow to import
        from torch.distributed.device_mesh import DeviceMesh

        dense, experts = [
            DeviceMesh(device_type, self._ranks(grid).tolist(), mesh_dim_names=grid) for grid in self._grids
        ]
        return dense, experts

    def to_json(self) -> str:
        """The sizes and the groups along each axis, as stable text with a line for each of them."""
        # json.dumps has no such layout: its indent puts each rank on a line of its own
        sizes = [f'  "{name}": {json.dumps(value)},' for name, value in asdict(self).items()]
        groups = [f'    "{axis}": {json.dumps(self.groups(axis))}' for axis in AXES]
        return "\n".join(["{", *sizes, '  "groups": {', ",\n".join(groups), "  }", "}"])

    @classmethod
    def from_json(cls, text: str) -> Topology:
        """The Topology that `to_json` wrote. ValueError if the text is something else or its groups disagree."""
        call = "Topology.from_json"
        sizes = [field.name for field in fields(cls)]
        entries = read_object(call, text, [*sizes, "groups"])
        groups = check_object(call, "groups", entries.pop("groups"), AXES)
        try:
            topology = cls(**entries)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{call}: {error}") from None
        # The groups follow from the sizes. A text in which they differ came from another program or was edited.
        for axis in AXES:
            if groups[axis] != topology.groups(axis):
                raise ValueError(f"{call}: the groups along {axis} are not those of {topology}")
        return topology

    # ---- the two grids ---------------------------------------------------------------------------------------------

    @property
    def _grids(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        outer = "expert_data" if self.inner == "expert" else "expert"
        return DENSE, ("pipeline", outer, self.inner, "expert_tensor")

    def _sizes(self, axes: Iterable[str]) -> list[int]:
        return [getattr(self, axis) for axis in axes]

    def _ranks(self, grid: tuple[str, ...]) -> Counts:
        return np.arange(self.world_size).reshape(self._sizes(grid))

    def _lanes(self, group: list[int]) -> list[list[int]]:
        # tensor runs fastest in the dense grid, so the remainder is the tensor rank
        lanes: dict[int, list[int]] = {}
        for rank in group:
            lanes.setdefault(rank % self.tensor, []).append(rank)
        return list(lanes.values())

    # ---- checks ----------------------------------------------------------------------------------------------------

    def _resolve(self, call: str, axes: tuple[str, ...]) -> tuple[tuple[str, ...], list[str]]:
        """The grid that has these axes, and which of its axes the ranks of a group differ in."""
        for axis in axes:
            if axis not in AXES:
                raise ValueError(f"Topology.{call}: {axis!r} is no axis, expected some of {', '.join(AXES)}")
        free = {GRID_AXIS.get(axis, axis) for axis in axes}
        # A lane is a tensor rank, which is no coordinate of the expert grid: only the stage may vary with expert_lane.
        combinable = "expert_lane" not in axes or free <= {"pipeline", "expert"}
        if axes and combinable and len(free) == len(axes):
            for grid in self._grids:
                if free <= set(grid):
                    return grid, [axis for axis in grid if axis in free]
        raise ValueError(
            f"Topology.{call}: axes are {axes}, expected different ones that go together: pipeline, data (the same as "
            f"lane), tensor; or pipeline, expert_data, expert, expert_tensor; or pipeline, expert_lane"
        )

    def _as_rank(self, call: str, rank: object) -> int:
        number = as_integer(rank, f"Topology.{call}: rank")
        if not 0 <= number < self.world_size:
            raise ValueError(f"Topology.{call}: rank is {number}, expected 0 .. {self.world_size - 1}")
        return number

    def _check_divides(self, name: str, *outer: str) -> None:
        """ValueError unless the size divides the ranks that the outer axes leave for it."""
        size = getattr(self, name)
        remaining = self.world_size // math.prod(self._sizes(outer))
        if size >= 1 and remaining % size == 0:
            return
        dividend = f"world_size {remaining}"
        if outer:
            product = " * ".join(f"{axis} {getattr(self, axis)}" for axis in outer)
            if len(outer) > 1:
                product = f"({product})"
            dividend = f"{remaining} = world_size {self.world_size} / {product}"
        raise ValueError(f"Topology: {name}={size} does not divide {dividend}; valid: {divisors(remaining)}")


def as_integer(value: object, name: str) -> int:
    """`value` as an int. TypeError if it is something else; a bool is refused too, though Python counts with it."""
    if isinstance(value, int | np.integer) and not isinstance(value, bool):
        return int(value)
    raise TypeError(f"{name} is {value!r}, expected an integer")


def divisors(number: int) -> str:
    """The divisors of `number`, ascending, with commas between them."""
    # Divisors come in pairs around the root, so a large world needs no loop over all its ranks.
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    large = [number // d for d in small]
    return ", ".join(map(str, sorted({*small, *large})))
