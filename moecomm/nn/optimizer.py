"""An optimizer's states of a model's parameters, for a checkpoint, and back."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from moecomm.nn.slices import Held, Piece
from moecomm.nn.stored import DTYPES, Stored

NOT_SAVED = {"params", "param_names"}
"""Of a parameter group: which parameters it has depends on the rank."""
NUMBER = "number/"
KINDS = ("optimizer/", NUMBER)
"""The prefixes of names that are no tensor of the model: a tensor of the optimizer, or a Python number of it."""
Settings = dict[str, Any]
"""Of a parameter group, such as its learning rate."""
State = tuple[Held, Held]
"""A parameter, and the memory for a state of it, whose prefix says which."""


def group_settings(optimizer: Optimizer) -> list[Settings]:
    """The settings of each parameter group."""
    settings = []
    for group in optimizer.param_groups:
        settings.append({name: group[name] for name in group.keys() - NOT_SAVED})
    return settings


def optimizer_states(optimizer: Optimizer, tensors: list[Held]) -> list[Held]:
    """What an optimizer has of each of its parameters. tensors: the model's.

    Raises ValueError for a parameter that the model does not have, and a state that is no number and has another shape
    than its parameter.
    """
    numbers = _parameter_numbers(optimizer, tensors)
    states = []
    for parameter in tensors:
        if id(parameter.tensor) in numbers:
            for name, value in optimizer.state.get(parameter.tensor, {}).items():
                states.append(_state(parameter, name, value))
    return states


def _state(parameter: Held, name: str, value: object) -> Held:
    """A state as tensors that are sliced as its parameter, or as a number for each whole tensor of it."""
    shape = parameter.tensor.shape
    # The kind is in the names: a number need not be sliced with its parameter, and comes back as what it was.
    kind = "optimizer"
    if isinstance(value, int | float):
        kind = "number"
        value = torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else None)
    if not isinstance(value, Tensor) or (value.shape != shape and value.numel() > 1):
        form = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(
            f"optimizer state {name} of {parameter.name} is {form}, expected a number or a tensor {tuple(shape)}"
        )
    prefix = f"{kind}/{name}/"
    if kind == "optimizer" and value.shape == shape:
        return parameter._replace(tensor=value, prefix=prefix)
    if parameter.experts is not None:
        # Each expert gets a copy: those of a bank may be in several banks when the checkpoint is loaded.
        value = value.expand(len(parameter.experts), *value.shape)
    return parameter._replace(tensor=value, slice=None, prefix=prefix)


def states_to_read(optimizer: Optimizer, tensors: list[Held], stored: Stored) -> list[State]:
    """The states that a checkpoint has of an optimizer's parameters, with memory for them. tensors: the model's.

    Raises ValueError for an optimizer with other groups or of a parameter that the model does not have, and for states
    of another shape.
    """
    groups = stored.index["groups"]
    if groups is None:
        raise ValueError(f"{stored.path} has no optimizer")
    if len(groups) != len(optimizer.param_groups):
        raise ValueError(
            f"{stored.path} has {len(groups)} parameter groups, the optimizer {len(optimizer.param_groups)}"
        )
    prefixes: dict[str, list[str]] = defaultdict(list)
    for name in stored.tensors:
        if name.startswith(KINDS):
            kind, state, weight = name.split("/", 2)
            prefixes[weight].append(f"{kind}/{state}/")
    numbers = _parameter_numbers(optimizer, tensors)
    states = []
    for parameter in tensors:
        if id(parameter.tensor) in numbers:
            # The experts of a bank have the same states, so the first one says which; an empty bank has none.
            for piece, _ in parameter.pieces()[:1]:
                for prefix in prefixes[piece.name]:
                    states.append((parameter, _target(parameter, piece, prefix, stored)))
    return states


def _target(parameter: Held, piece: Piece, prefix: str, stored: Stored) -> Held:
    """Memory for a state of a parameter. piece: its first."""
    saved = stored.tensors[prefix + piece.name][0]
    shape = tuple(parameter.tensor.shape)
    if saved.shape != piece.shape or prefix.startswith(NUMBER):
        if math.prod(saved.shape) != 1:
            raise ValueError(f"{saved.name} in {stored.path} has shape {saved.shape}, expected {piece.shape}")
        # A number is not sliced with its parameter. Each expert of a bank has its copy.
        parameter = parameter._replace(slice=None)
        shape = saved.shape if parameter.experts is None else (len(parameter.experts), *saved.shape)
    return parameter._replace(tensor=torch.empty(shape, dtype=DTYPES[saved.dtype]), prefix=prefix)


def state_dict(
    optimizer: Optimizer, tensors: list[Held], groups: list[Settings], states: list[State]
) -> dict[str, object]:
    """What optimizer.load_state_dict takes: the settings saved of each group, the states read of each parameter."""
    numbers = _parameter_numbers(optimizer, tensors)
    values: dict[int, dict[str, object]] = defaultdict(dict)
    for parameter, target in states:
        _, name, _ = target.prefix.split("/")
        values[numbers[id(parameter.tensor)]][name] = _value(parameter, target)
    settings = []
    for group, saved in zip(optimizer.param_groups, groups, strict=True):
        # What a newer torch has as a setting, and the checkpoint does not, stays as it is.
        merged = dict(group)
        for name, value in saved.items():
            merged[name] = _setting(value, group.get(name))
        merged["params"] = [numbers[id(parameter)] for parameter in group["params"]]
        settings.append(merged)
    return {"state": dict(values), "param_groups": settings}


def _value(parameter: Held, target: Held) -> Tensor | float:
    """A state that has been read. Raises ValueError for a number that the experts of a bank have differently."""
    value = target.tensor
    number = target.prefix.startswith(NUMBER)
    if value.shape == parameter.tensor.shape and target.slice == parameter.slice and not number:
        return value
    if target.experts is not None:
        copies = value
        value = value[0]
        if not torch.equal(copies, value.expand_as(copies)):
            raise ValueError(f"{target.prefix}{target.name} is not the same for all experts of a bank")
    return value.item() if number else value


def _parameter_numbers(optimizer: Optimizer, tensors: list[Held]) -> Mapping[int, int]:
    """id of a parameter -> its number, by which torch's state_dict names it. ValueError if the model has it not."""
    # In the order of the groups, as torch counts them.
    numbers: dict[int, int] = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            numbers[id(parameter)] = len(numbers)
    of_model = {id(tensor.tensor) for tensor in tensors}
    if not numbers.keys() <= of_model:
        raise ValueError("the optimizer has a parameter that the model does not have")
    return numbers


def _setting(saved: object, current: object) -> object:
    """A saved setting in the form of the current one.

    JSON makes a list of a tuple; and where a setting is a tensor now, it stays one, on its device.
    """
    if isinstance(saved, list):
        matches = isinstance(current, tuple) and len(current) == len(saved)
        currents: Any = current if matches else [None] * len(saved)
        return tuple(map(_setting, saved, currents))
    return torch.as_tensor(saved).to(current) if isinstance(current, Tensor) else saved
