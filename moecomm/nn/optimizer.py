"""What an optimizer knows of a model's parameters, as pieces that a checkpoint has, and back."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from moecomm.nn.slices import Held, Piece
from moecomm.nn.stored import Stored

NOT_SAVED = {"params", "param_names"}
"""Of a parameter group: which parameters it has is this rank's own business."""
KINDS = ("optimizer/", "number/")
"""What a name begins with that is no tensor of the model but a tensor, or a number, of the optimizer."""


def groups(optimizer: Any) -> list[dict[str, Any]]:
    """The settings of each parameter group."""
    return [{key: group[key] for key in group.keys() - NOT_SAVED} for group in optimizer.param_groups]


def parameters(optimizer: Any, tensors: list[Held]) -> list[Any]:
    """All of an optimizer, in its order. ValueError if one is not the model's."""
    found = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if not {*map(id, found)} <= {id(one.tensor) for one in tensors}:
        raise ValueError("the optimizer has a parameter that the model does not have")
    return found


def parts(tensors: list[Held], optimizer: Any) -> Iterator[list[Piece]]:
    """Each piece of the model on this rank, and behind it what the optimizer knows of it."""
    states = {id(p): optimizer.state.get(p, {}) for p in parameters(optimizer, tensors)} if optimizer else {}
    for one in tensors:
        pieces = one.pieces(one.tensor)
        known = [[piece] for piece in pieces]
        for state, value in states.get(id(one.tensor), {}).items():
            kind = "optimizer" if isinstance(value, Tensor) else "number"
            if isinstance(value, int | float):
                value = torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else None)
            if not isinstance(value, Tensor) or (value.shape != one.tensor.shape and value.numel() > 1):
                got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                wanted = f"a number or a tensor {tuple(one.tensor.shape)}"
                raise ValueError(f"optimizer state {state} of {one.name} is {got}, expected {wanted}")
            if value.shape == one.tensor.shape:
                views = [view._replace(name=f"optimizer/{state}/{view.name}") for view in one.pieces(value)]
            else:  # one for the whole tensor
                alone = Piece("", tuple(value.shape), (0,) * value.dim(), value.detach())
                names = [f"{kind}/{state}/{piece.name}" for piece in pieces if not any(piece.start)]
                views = [alone._replace(name=name, values=alone.values.clone()) for name in names]
            for part, view in zip(known, views, strict=False):
                part.append(view)
        yield from known


def state_dict(optimizer: Any, tensors: list[Held], groups: Any, stored: Stored) -> dict[str, Any]:
    """What optimizer.load_state_dict takes: of each group the settings saved, of each parameter the states.

    Raises ValueError if they are not those of this optimizer, and as `Stored.fill`.
    """
    if groups is None:
        raise ValueError(f"{stored.path} has no optimizer")
    if len(groups) != len(optimizer.param_groups):
        raise ValueError(
            f"{stored.path} has {len(groups)} parameter groups, the optimizer {len(optimizer.param_groups)}"
        )
    numbers = {id(parameter): number for number, parameter in enumerate(parameters(optimizer, tensors))}
    by_piece: dict[str, list[str]] = {}
    for name in stored.tensors:
        if name.startswith(KINDS):
            kind, state, of = name.split("/", 2)
            by_piece.setdefault(of, []).append(f"{kind}/{state}/")
    states = {}
    for one in tensors:
        if id(one.tensor) in numbers:
            pieces = one.pieces(one.tensor)
            prefixes = by_piece.get(pieces[0].name, []) if pieces else []
            if prefixes:
                states[numbers[id(one.tensor)]] = {
                    prefix.split("/")[1]: _read_state(prefix, one, pieces, stored) for prefix in prefixes
                }
    settings = []
    for group, saved in zip(optimizer.param_groups, groups, strict=True):
        read = {name: _setting(value, group.get(name)) for name, value in saved.items()}
        settings.append({**group, **read, "params": [numbers[id(parameter)] for parameter in group["params"]]})
    return {"state": states, "param_groups": settings}


def _setting(saved: Any, now: Any) -> Any:
    """A setting of a group: a tensor where it was one or is one now, and then on the device of that."""
    if isinstance(saved, list):  # JSON knows no tuples
        of_each = now if isinstance(now, tuple) and len(now) == len(saved) else [None] * len(saved)
        return tuple(map(_setting, saved, of_each))
    return torch.as_tensor(saved).to(now) if isinstance(now, Tensor) else saved


def _read_state(prefix: str, one: Held, pieces: list[Piece], stored: Stored) -> Any:
    """A state of a parameter: shaped as that, or one number for all its pieces."""
    shape, dtype, _ = stored.tensors[prefix + pieces[0].name]
    if shape == pieces[0].shape:
        values = torch.empty(one.tensor.shape, dtype=dtype)
        of_state = [Piece(prefix + name, *box) for name, *box in one.pieces(values)]
        stored.check(of_state)
        stored.fill(of_state)
        return values
    if math.prod(shape) != 1:
        raise ValueError(f"{prefix}{pieces[0].name} in {stored.path} has shape {shape}, expected {pieces[0].shape}")
    found = [stored.whole(prefix + name) for name in dict.fromkeys(piece.name for piece in pieces)]
    if not all(torch.equal(other, found[0]) for other in found):
        raise ValueError(f"{prefix}{pieces[0].name} is not that of the other experts in one bank")
    return found[0].item() if prefix.startswith("number") else found[0]
