"""What of a model is here: each tensor of this rank as pieces of whole ones, by names that no split changes."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from moecomm.nn.experts import Experts
from moecomm.nn.part import SUFFIX, Part
from moecomm.nn.seeds import Slice


def key(name: str, shape: tuple[int, ...], start: tuple[int, ...], size: tuple[int, ...]) -> str:
    """The name of a piece in a file: blocks.0.ffn.up.weight, or blocks.0.ffn.up.weight[0:32,0:16] for a part of it."""
    if shape == size:
        return name
    return f"{name}[{','.join(f'{begin}:{begin + length}' for begin, length in zip(start, size, strict=True))}]"


class Piece(NamedTuple):
    """A box out of a whole tensor."""

    name: str
    """Of the whole tensor; an expert's has its global id: blocks.1.ffn.experts.5.up."""
    shape: tuple[int, ...]
    """Of the whole tensor."""
    start: tuple[int, ...]
    """Where in it the piece begins."""
    values: Tensor
    """A view of what this rank has of it."""

    def key(self) -> str:
        """Its name in a file."""
        return key(self.name, self.shape, self.start, tuple(self.values.shape))


class Held(NamedTuple):
    """A parameter or buffer of this rank."""

    name: str
    tensor: Tensor
    slice: Slice | None
    """Which slice of each whole tensor it has; None: all."""
    experts: tuple[int, ...] | None
    """The global ids along its first dimension; None: it is no bank of experts."""

    def pieces(self, values: Tensor) -> list[Piece]:
        """Views of values, which is shaped as the tensor: itself, or what an optimizer knows of each of its numbers."""
        values = values.detach()
        if self.experts is None:
            return _cut(self.name, values, self.slice)
        module, _, last = self.name.rpartition(".")
        banks = zip(self.experts, values.unbind(), strict=True)
        return [piece for e, one in banks for piece in _cut(f"{module}.{e}.{last}", one, self.slice)]


def held(model: nn.Module) -> list[Held]:
    """The parameters and persistent buffers of a model, each once.

    A module whose weights are slices says so in its `slices`: {parameter: Slice}, as ColumnLinear and RowLinear do.
    """
    slices: dict[str, Slice] = {}
    experts: dict[str, tuple[int, ...]] = {}
    places = set()  # the names of pieces say it
    for path, module in model.named_modules():
        before = f"{path}." if path else ""
        slices.update({before + name: part for name, part in getattr(module, "slices", {}).items()})
        if isinstance(module, Experts):
            experts.update({before + name: module.experts for name, _ in module.named_parameters()})
        if isinstance(module, Part):
            places.add(before + SUFFIX)
    once: dict[int, Held] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name not in places:
            once.setdefault(id(tensor), Held(name, tensor, slices.get(name), experts.get(name)))
    return list(once.values())


def _cut(name: str, values: Tensor, of: Slice | None) -> list[Piece]:
    if of is None or of.part[1] == 1:
        return [Piece(name, tuple(values.shape), (0,) * values.dim(), values)]
    number, parts = of.part
    shape = tuple(size * parts if dim == of.dim else size for dim, size in enumerate(values.shape))
    length = values.shape[of.dim] // of.blocks
    found = []
    for block, view in enumerate(values.split(length, of.dim)):
        start = [0] * values.dim()
        start[of.dim] = (block * parts + number) * length
        found.append(Piece(name, shape, tuple(start), view))
    return found
