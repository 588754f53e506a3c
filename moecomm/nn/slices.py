"""The tensors of a model on this rank, as pieces of whole tensors under names that do not depend on the split."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from moecomm.nn.experts import ExpertBank
from moecomm.nn.part import SUFFIX, Part
from moecomm.nn.seeds import Slice

Shape = tuple[int, ...]


class Piece(NamedTuple):
    """A box of a whole tensor, as a checkpoint knows it.

    key       its name in a file, from `piece_key`
    name      of the whole tensor. An expert's has its global id: blocks.1.ffn.experts.5.up
    shape     of the whole tensor
    dtype     of its numbers, such as bfloat16
    file      that has the numbers; "": they are in memory
    start     where in the whole tensor the box begins
    size      the shape of the box
    checksum  of its bytes in the file; None: unknown
    """

    key: str
    name: str
    shape: Shape
    dtype: str
    file: str
    start: Shape
    size: Shape
    checksum: str | None


def piece_key(name: str, start: Shape, size: Shape) -> str:
    """The key of a box of a tensor: blocks.0.ffn.up.weight[0:32,0:16]. That of a whole tensor is its name."""
    ranges = [f"{begin}:{begin + length}" for begin, length in zip(start, size, strict=True)]
    return f"{name}[{','.join(ranges)}]"


class Held(NamedTuple):
    """A parameter or buffer of this rank, or an optimizer's state of a parameter.

    name     in the model
    tensor   its numbers on this rank
    slice    which slice of each whole tensor they are; None: all of it
    experts  the global ids along the first dimension; None: it is no bank of experts
    prefix   of the names of its pieces; says which state it is
    """

    name: str
    tensor: Tensor
    slice: Slice | None
    experts: tuple[int, ...] | None
    prefix: str = ""

    def pieces(self) -> list[tuple[Piece, Tensor]]:
        """The boxes of whole tensors that this rank has, with views of their numbers."""
        values = self.tensor.detach()
        names = [self.name]
        tensors = [values]
        if self.experts is not None:
            # An expert is a whole tensor of its own, since another split has other experts in a bank.
            bank, _, weight = self.name.rpartition(".")
            names = [f"{bank}.{expert}.{weight}" for expert in self.experts]
            tensors = list(values.unbind())
        dtype = str(values.dtype).removeprefix("torch.")
        pieces = []
        for weight, tensor in zip(names, tensors, strict=True):
            name = self.prefix + weight
            size = tuple(tensor.shape)
            if self.slice is None or self.slice.portion[1] == 1:
                origin = (0,) * len(size)
                pieces.append((Piece(name, name, size, dtype, "", origin, size, None), tensor))
                continue
            # Matrices side by side are sliced one by one: this rank has a box of each, and the boxes do not touch.
            dim, (number, ranks), blocks = self.slice
            length = size[dim] // blocks
            shape = [*size]
            shape[dim] *= ranks
            for block, view in enumerate(tensor.split(length, dim)):
                start = [0] * len(size)
                start[dim] = (block * ranks + number) * length
                box = tuple(start), tuple(view.shape)
                piece = Piece(piece_key(name, *box), name, tuple(shape), dtype, "", *box, None)
                pieces.append((piece, view))
        return pieces


def held(model: nn.Module) -> list[Held]:
    """The parameters and persistent buffers of a model, each once.

    A module whose weights are slices says so in its `slices`: {parameter: Slice}, as ColumnLinear and RowLinear do.
    """
    slices: dict[str, Slice] = {}
    experts: dict[str, tuple[int, ...]] = {}
    places = set()
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        for name, of_weight in getattr(module, "slices", {}).items():
            slices[prefix + name] = of_weight
        if isinstance(module, ExpertBank):
            for name, _ in [*module.named_parameters(), *module.named_buffers()]:
                experts[prefix + name] = module.experts
        if isinstance(module, Part):
            places.add(prefix + SUFFIX)
    tensors: dict[int, Held] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        # The place of a Part is left out, since it depends on the split; the names of pieces say the same.
        # A weight that two modules share is there under its first name.
        if name not in places:
            tensors.setdefault(id(tensor), Held(name, tensor, slices.get(name), experts.get(name)))
    return list(tensors.values())
