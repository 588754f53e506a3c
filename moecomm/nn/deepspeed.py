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
State = dict[str, Tensor]
"""What a file of DeepSpeed has, by name."""


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
    for values, read in together(comm, "checkpoint", lambda: _model_pairs(folder, model, names)):
        values.copy_(read)


def _model_pairs(folder: Path, model: nn.Module, names: dict[str, str]) -> list[Pair]:
    """All weights with what is to be in them, read and checked."""
    residuals = {id(module.moe): module for module in model.modules() if isinstance(module, ResidualMoE)}
    layers = [module for module in model.modules() if isinstance(module, MoE)]
    main = folder / "mp_rank_00_model_states.pt"
    # Gates are whole in the first of these files; only residual MLPs are sliced over all of them.
    files = sorted(folder.glob("mp_rank_*_model_states.pt")) if residuals else []
    states = [_read(file).get("module") or {} for file in files or [main]]
    pairs: list[Pair] = []
    for number, layer in enumerate(layers):
        experts, prefix = _experts(folder, number, layers, names)
        gate = _whole(main, states[:1], prefix + GATE, layer.gate, WHOLE)
        pairs += experts
        pairs.append((layer.gate, gate))
        pairs += _residual(main, states, prefix, residuals.get(id(layer)), names)
    return pairs


def _experts(folder: Path, number: int, layers: list[MoE], names: dict[str, str]) -> tuple[list[Pair], str]:
    """The weights of a layer's experts with what is to be in them, and what DeepSpeed calls the layer."""
    layer, bank = layers[number], layers[number].experts
    unnamed = [name for name, _ in bank.named_parameters() if name not in names]
    if unnamed:
        raise ValueError(f"names has {', '.join(names)}, but nothing for {', '.join(unnamed)}")
    # An expert more, or a layer more, is of another model.
    for excess in (f"layer_{number}_expert_{layer.num_experts}", f"layer_{len(layers)}_expert_0"):
        if any(folder.glob(f"{excess}_mp_rank_*")):
            raise ValueError(f"{folder} has {excess}, which the model does not have")
    pairs: list[Pair] = []
    prefix = ""
    for place, expert in enumerate(bank.experts):
        pattern = f"layer_{number}_expert_{expert}_mp_rank_*_model_states.pt"
        files = sorted(folder.glob(pattern))
        if not files:
            raise FileNotFoundError(f"{folder} has no {pattern}")
        states = [_read(file) for file in files]
        prefix = next(iter(states[0]), "").partition(EXPERTS)[0]
        pairs += _network(files[0], states, f"{prefix}{EXPERTS}{expert}.", _of_expert(bank, place), names)
    return pairs, prefix


def _residual(
    file: Path, states: list[State], prefix: str, layer: ResidualMoE | None, names: dict[str, str]
) -> list[Pair]:
    """The MLP and the coefficient of a layer. layer: None where the model has a plain MoE."""
    if layer is None or layer.coefficient is None:
        # What the file has and the model has not would be lost silently.
        unknown = (COEFFICIENT,) if layer else (RESIDUAL, COEFFICIENT)
        prefixes = tuple(prefix + name for name in unknown)
        excess = next((key for key in states[0] if key.startswith(prefixes)), None)
        if excess is not None:
            raise ValueError(
                f"{file} has {excess}, expected none: in the model it is no ResidualMoE(combine='learned')"
            )
    if layer is None:
        return []
    pairs = _network(file, states, prefix + RESIDUAL, _of_mlp(layer.mlp), names)
    if layer.coefficient is not None:
        for name, values in layer.coefficient.named_parameters():
            pairs.append((values, _whole(file, states[:1], prefix + COEFFICIENT + name, values, WHOLE)))
    return pairs


def _network(file: Path, states: list[State], prefix: str, weights: Weights, names: dict[str, str]) -> list[Pair]:
    """The weights of one expert or MLP. Those without a name, biases, become 0."""
    pairs = []
    for name, (values, slice_of) in weights.items():
        if not values.numel():
            continue
        if name in names:
            pairs.append((values, _whole(file, states, prefix + names[name], values, slice_of)))
        else:
            pairs.append((values, torch.zeros_like(values)))
    known = {prefix + names[name] for name in weights if name in names}
    unknown = sorted(key for key in states[0] if key.startswith(prefix) and key not in known)
    if unknown:
        raise ValueError(f"{file} has {unknown[0]}, which neither names nor the model has")
    return pairs


def _of_expert(bank: Experts, place: int) -> Weights:
    ranks = bank.slices["up"].portion
    columns, rows = Slice(0, ranks), Slice(1, ranks)
    weights = {"up": (bank.up[place].T, columns), "down": (bank.down[place].T, rows)}
    if bank.activation == "swiglu":
        weights["gate"] = bank.gate[place].T, columns
        return weights
    weights["up_bias"] = bank.up_bias[place], columns
    # Slice 0 alone has this bias; without numbers it is left out.
    nothing = bank.up_bias.new_empty(0)
    weights["down_bias"] = nothing if bank.down_bias is None else bank.down_bias[place], WHOLE
    return weights


def _of_mlp(mlp: MLP) -> Weights:
    ranks = mlp.up.slices["weight"].portion
    weights = {"down": (mlp.down.weight, Slice(1, ranks)), "down_bias": (mlp.down.bias, WHOLE)}
    blocks = ("gate", "up") if mlp.activation == "swiglu" else ("up",)
    matrices = mlp.up.weight.chunk(len(blocks))
    biases = mlp.up.bias.chunk(len(blocks))
    for name, weight, bias in zip(blocks, matrices, biases, strict=True):
        weights[name] = weight, Slice(0, ranks)
        weights[f"{name}_bias"] = bias, Slice(0, ranks)
    return weights


def _whole(file: Path, states: list[State], key: str, values: Tensor, slice_of: Slice) -> Tensor:
    """What belongs into values, from one whole weight or from slices of it."""
    if any(key not in state for state in states):
        raise ValueError(f"{file} has no {key}, but {', '.join(list(states[0])[:6])}")
    tensors = [state[key] for state in states]
    dim, ranks = slice_of.dim, slice_of.portion
    shape = list(values.shape)
    shape[dim] *= ranks[1]
    # DeepSpeed slices by its own tensor ranks, which need not be as many as ours; a weight may be whole in each file.
    weight = tensors[0] if list(tensors[0].shape) == shape else torch.cat(tensors, dim)
    if list(weight.shape) != shape:
        raise ValueError(f"{key} in {file} has shape {tuple(weight.shape)}, expected {tuple(shape)}")
    return part_of(weight, dim, ranks)


def _read(file: Path) -> dict[str, Any]:
    try:
        return dict(torch.load(file, map_location="cpu", weights_only=True))
    except (pickle.UnpicklingError, RuntimeError, EOFError, TypeError) as error:
        reason = str(error).rpartition("WeightsUnpickler error: ")[2].partition("\n")[0]
        raise ValueError(f"{file} cannot be read as tensors: {reason}") from None
