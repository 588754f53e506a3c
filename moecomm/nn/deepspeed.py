"""Experts, gates and residual MLPs out of DeepSpeed checkpoints: layer_<i>_expert_<j>_mp_rank_<t>_model_states.pt."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moecomm.comm import Comm
from moecomm.nn.experts import Experts
from moecomm.nn.linear import MLP
from moecomm.nn.moe import MoE
from moecomm.nn.residual import ResidualMoE
from moecomm.nn.seeds import Slice, part_of
from moecomm.together import together

MEGATRON = {
    "up": "dense_h_to_4h.weight",
    "up_bias": "dense_h_to_4h.bias",
    "down": "dense_4h_to_h.weight",
    "down_bias": "dense_4h_to_h.bias",
}
EXPERTS, GATE = ".deepspeed_moe.experts.deepspeed_experts.", ".deepspeed_moe.gate.wg.weight"
RESIDUAL, COEFFICIENT = ".mlp.", ".coefficient."
WHOLE = Slice(0, (0, 1))
Weights = dict[str, tuple[Tensor, Slice]]
"""A network's weights by the names of Experts, as views that lie as torch.nn.Linear's, and which slices they are."""
Pair = tuple[Tensor, Tensor]
"""A weight, or a view of a part of one, and what is to be in it."""


@torch.no_grad()
def load_deepspeed(
    folder: str | Path, model: nn.Module, *, names: dict[str, str] = MEGATRON, comm: Comm | None = None
) -> None:
    """Fill the experts, gates and residual MLPs of a model's MoE layers. What else the model has stays as it is.

    folder  <save_dir>/<tag> of DeepSpeed, which numbers MoE layers in the order of the model, and experts globally
    model   with all layers (no pipeline stage), its experts split in any way
    names   each weight of Experts -> what DeepSpeed calls it behind the expert's number, there as torch.nn.Linear has
            it. None given: those of Megatron's MLP
    comm    all ranks; None: this one alone

    A layer of DeepSpeed with use_residual is a ResidualMoE with combine="learned" here: its MLP, which has the names of
    an expert, and its coefficient are filled too. An MLP without biases there has biases of 0 here.

    Slices of experts and MLPs (tensor ranks t) are put together. Files are read by torch.load(weights_only=True): where
    one has more than tensors, such as Megatron's arguments, torch.serialization.add_safe_globals([argparse.Namespace])
    lets it pass.

    Collective. On all ranks, ValueError or OSError, before anything is changed, for what is missing or does not fit:
    also for weights of an expert or MLP that `names` does not have, and for a residual MLP here or there alone.
    Source: deepspeed/moe/layer.py and runtime/engine.py of DeepSpeed.
    """
    folder = Path(folder)
    residuals = {id(module.moe): module for module in model.modules() if isinstance(module, ResidualMoE)}
    layers = [module for module in model.modules() if isinstance(module, MoE)]

    def found() -> list[Pair]:
        first = folder / "mp_rank_00_model_states.pt"
        files = sorted(folder.glob("mp_rank_*_model_states.pt")) if residuals else [first]
        mains = [_read(file).get("module") or {} for file in files or [first]]
        pairs: list[Pair] = []
        for number, layer in enumerate(layers):
            experts, prefix = _experts(folder, number, layers, names)
            gate = _whole(first, mains[:1], prefix + GATE, layer.gate, WHOLE)
            pairs += [*experts, (layer.gate, gate), *_residual(first, mains, prefix, residuals.get(id(layer)), names)]
        return pairs

    for values, read in together(comm, "checkpoint", found):
        values.copy_(read)


def _experts(folder: Path, number: int, layers: list[MoE], names: dict[str, str]) -> tuple[list[Pair], str]:
    """The weights of a layer's experts with what is to be in them, and what DeepSpeed calls the layer."""
    layer, bank = layers[number], layers[number].experts
    unnamed = [name for name, _ in bank.named_parameters() if name not in names]
    if unnamed:
        raise ValueError(f"names has {', '.join(names)}, but nothing for {', '.join(unnamed)}")
    for beyond in (f"layer_{number}_expert_{layer.num_experts}", f"layer_{len(layers)}_expert_0"):
        if any(folder.glob(f"{beyond}_mp_rank_*")):
            raise ValueError(f"{folder} has {beyond}, which the model does not have")
    found: list[Pair] = []
    prefix = ""
    for place, expert in enumerate(bank.experts):
        files = sorted(folder.glob(f"layer_{number}_expert_{expert}_mp_rank_*_model_states.pt"))
        if not files:
            raise FileNotFoundError(f"{folder} has no layer_{number}_expert_{expert}_mp_rank_*_model_states.pt")
        parts = [_read(file) for file in files]
        prefix = next(iter(parts[0]), "").partition(EXPERTS)[0]
        found += _network(files[0], parts, f"{prefix}{EXPERTS}{expert}.", _of_expert(bank, place), names)
    return found, prefix


def _residual(
    file: Path, mains: list[Any], prefix: str, layer: ResidualMoE | None, names: dict[str, str]
) -> list[Pair]:
    """The MLP and the coefficient of a layer. layer: None where the model has a plain MoE."""
    if layer is None or layer.coefficient is None:
        parts = (COEFFICIENT,) if layer else (RESIDUAL, COEFFICIENT)
        extra = next((key for key in mains[0] if key.startswith(tuple(prefix + part for part in parts))), None)
        if extra is not None:
            raise ValueError(f"{file} has {extra}, expected none: in the model it is no ResidualMoE(combine='learned')")
    if layer is None:
        return []
    found = _network(file, mains, prefix + RESIDUAL, _of_mlp(layer.mlp), names)
    if layer.coefficient is not None:
        for name, values in layer.coefficient.named_parameters():
            found.append((values, _whole(file, mains[:1], prefix + COEFFICIENT + name, values, WHOLE)))
    return found


def _network(file: Path, parts: list[Any], prefix: str, weights: Weights, names: dict[str, str]) -> list[Pair]:
    """The weights of one expert or MLP. Those without a name, biases, become 0."""
    found = [
        (values, _whole(file, parts, prefix + names[name], values, of) if name in names else torch.zeros_like(values))
        for name, (values, of) in weights.items()
        if values.numel()
    ]
    known = {prefix + names[name] for name in weights if name in names}
    others = sorted(key for key in parts[0] if key.startswith(prefix) and key not in known)
    if others:
        raise ValueError(f"{file} has {others[0]}, which neither names nor the model has")
    return found


def _of_expert(bank: Experts, place: int) -> Weights:
    part = bank.slices["up"].part
    weights = {"up": (bank.up[place].T, Slice(0, part)), "down": (bank.down[place].T, Slice(1, part))}
    if bank.activation == "swiglu":
        weights["gate"] = bank.gate[place].T, Slice(0, part)
    else:
        weights["up_bias"] = bank.up_bias[place], Slice(0, part)
        none = bank.up_bias.new_empty(0)  # another slice has it
        weights["down_bias"] = none if bank.down_bias is None else bank.down_bias[place], WHOLE
    return weights


def _of_mlp(mlp: MLP) -> Weights:
    part = mlp.up.slices["weight"].part
    weights = {"down": (mlp.down.weight, Slice(1, part)), "down_bias": (mlp.down.bias, WHOLE)}
    blocks = ("gate", "up") if mlp.activation == "swiglu" else ("up",)
    views = zip(blocks, mlp.up.weight.chunk(len(blocks)), mlp.up.bias.chunk(len(blocks)), strict=True)
    for name, weight, bias in views:
        weights[name], weights[f"{name}_bias"] = (weight, Slice(0, part)), (bias, Slice(0, part))
    return weights


def _whole(file: Path, parts: list[Any], key: str, values: Tensor, of: Slice) -> Tensor:
    """What belongs into values, from one whole weight or from slices of it."""
    if any(key not in part for part in parts):
        raise ValueError(f"{file} has no {key}, but {', '.join(list(parts[0])[:6])}")
    tensors = [part[key] for part in parts]
    shape = [size * of.part[1] if dim == of.dim else size for dim, size in enumerate(values.shape)]
    whole = tensors[0] if list(tensors[0].shape) == shape else torch.cat(tensors, of.dim)
    if list(whole.shape) != shape:
        raise ValueError(f"{key} in {file} has shape {tuple(whole.shape)}, expected {tuple(shape)}")
    return part_of(whole, of.dim, of.part)


def _read(file: Path) -> dict[str, Any]:
    try:
        return dict(torch.load(file, map_location="cpu", weights_only=True))
    except (pickle.UnpicklingError, RuntimeError, EOFError, TypeError) as error:
        reason = str(error).rpartition("WeightsUnpickler error: ")[2].partition("\n")[0]
        raise ValueError(f"{file} cannot be read as tensors: {reason}") from None
