"""An optimizer's states of a model's parameters, for a checkpoint, and back."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from moecomm.nn.slices import Held, Piece
from moecomm.nn.stored import DTYPES, Stored

NOT_SAVED = {"params", "param_names"}
"""Of a parameter group: which parameters it has depends on the rank."""
KINDS = ("optimizer/", "number/")
"""The prefixes of names that are no tensor of the model: a tensor of the optimizer, or a Python number of it."""
Settings = dict[str, Any]
"""Of a parameter group, such as its learning rate."""


def group_settings(optimizer: Optimizer) -> list[Settings]:
    """The settings of each parameter group."""
    return [{name: group[name] for name in group.keys() - NOT_SAVED} for group in optimizer.param_groups]


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
    kind = "optimizer"
    if isinstance(value, int | float):
        kind = "number"
        value = torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else None)
    if not isinstance(value, Tensor) or (value.shape != shape and value.numel() > 1):
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        expected = f"a number or a tensor {tuple(shape)}"
        raise ValueError(f"optimizer state {name} of {parameter.name} is {got}, expected {expected}")
    prefix = f"{kind}/{name}/"
    if kind == "optimizer" and value.shape == shape:
        return parameter._replace(tensor=value, prefix=prefix)
    if parameter.experts is not None:
        # Each expert gets a copy: those of a bank may be in several banks when the checkpoint is loaded.
        value = value.expand(len(parameter.experts), *value.shape)
    return parameter._replace(tensor=value, slice=None, prefix=prefix)


class Reading(NamedTuple):
    """A state to be read from a checkpoint.

    number  of its parameter, in the optimizer's order
    state   such as exp_avg
    target  memory for it
    form    "tensor": shaped as the parameter. "scalar": one number for all of it, "number": a Python number
    """

    number: int
    state: str
    target: Held
    form: str

    def scalar(self) -> Tensor | float:
        """The number that has been read. Raises ValueError if it is not the same for all experts of a bank."""
        value = self.target.tensor
        if self.target.experts is not None:
            copies, value = value, value[0]
            if not torch.equal(copies, value.expand_as(copies)):
                raise ValueError(f"{self.target.prefix}{self.target.name} is not the same for all experts of a bank")
        return value.item() if self.form == "number" else value


def states_to_read(optimizer: Optimizer, tensors: list[Held], stored: Stored) -> list[Reading]:
    """The states that a checkpoint has of an optimizer's parameters, with memory for them. tensors: the model's.

    Raises ValueError for a parameter that the model does not have, and states of another shape.
    """
    prefixes: dict[str, list[str]] = defaultdict(list)
    for name in stored.tensors:
        if name.startswith(KINDS):
            kind, state, weight = name.split("/", 2)
            prefixes[weight].append(f"{kind}/{state}/")
    numbers = _parameter_numbers(optimizer, tensors)
    readings = []
    for parameter in tensors:
        if id(parameter.tensor) in numbers:
            # The experts of a bank have the same states, so the first one says which; an empty bank has none.
            for piece, _ in parameter.pieces()[:1]:
                number = numbers[id(parameter.tensor)]
                readings += _readings(parameter, piece, number, prefixes[piece.name], stored)
    return readings


def _readings(parameter: Held, piece: Piece, number: int, prefixes: list[str], stored: Stored) -> list[Reading]:
    """The states of one parameter. piece: its first."""
    readings = []
    experts = () if parameter.experts is None else (len(parameter.experts),)
    for prefix in prefixes:
        kind, state, _ = prefix.split("/")
        saved = stored.tensors[prefix + piece.name][0]
        dtype = DTYPES[saved.dtype]
        if kind == "optimizer" and saved.shape == piece.shape:
            values = torch.empty(parameter.tensor.shape, dtype=dtype)
            target = parameter._replace(tensor=values, prefix=prefix)
            readings.append(Reading(number, state, target, "tensor"))
        elif math.prod(saved.shape) == 1:
            values = torch.empty((*experts, *saved.shape), dtype=dtype)
            target = parameter._replace(tensor=values, slice=None, prefix=prefix)
            readings.append(Reading(number, state, target, "number" if kind == "number" else "scalar"))
        else:
            raise ValueError(f"{saved.name} in {stored.path} has shape {saved.shape}, expected {piece.shape}")
    return readings


def state_dict(
    optimizer: Optimizer, tensors: list[Held], groups: list[Settings], readings: list[Reading]
) -> dict[str, object]:
    """What optimizer.load_state_dict takes: the settings saved of each group, the states read of each parameter."""
    states: dict[int, dict[str, Tensor | float]] = defaultdict(dict)
    for reading in readings:
        value = reading.target.tensor if reading.form == "tensor" else reading.scalar()
        states[reading.number][reading.state] = value
    numbers = _parameter_numbers(optimizer, tensors)
    settings = []
    for group, saved in zip(optimizer.param_groups, groups, strict=True):
        merged = dict(group)
        for name, value in saved.items():
            merged[name] = _setting(value, group.get(name))
        merged["params"] = [numbers[id(parameter)] for parameter in group["params"]]
        settings.append(merged)
    return {"state": dict(states), "param_groups": settings}


def check_groups(path: object, optimizer: Optimizer, groups: list[Settings] | None) -> list[Settings]:
    """groups, the settings in the checkpoint at path. Raises ValueError if the optimizer has not as many groups."""
    if groups is None:
        raise ValueError(f"{path} has no optimizer")
    if len(groups) != len(optimizer.param_groups):
        raise ValueError(f"{path} has {len(groups)} parameter groups, the optimizer {len(optimizer.param_groups)}")
    return groups


def _parameter_numbers(optimizer: Optimizer, tensors: list[Held]) -> Mapping[int, int]:
    """id of a parameter -> its number, by which torch's state_dict names it. ValueError if the model has it not."""
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
