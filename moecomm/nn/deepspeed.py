"""Experts, gates and residual MLPs out of DeepSpeed checkpoints: layer_<i>_expert_<j>_mp_rank_<t>_model_states.pt."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
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
EXPERTS = ".deepspeed_moe.experts.deepspeed_experts."
GATE = ".deepspeed_moe.gate.wg.weight"
RESIDUAL = ".mlp."
COEFFICIENT = ".coefficient."
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
    # Nothing is changed before all ranks have read and checked everything.
    for values, read in together(comm, "checkpoint", lambda: _model_pairs(folder, model, names)):
        values.copy_(read)


def _model_pairs(folder: Path, model: nn.Module, names: dict[str, str]) -> list[Pair]:
    """All weights with what is to be in them, read and checked."""
    layers = []
    residuals: dict[int, ResidualMoE] = {}
    for module in model.modules():
        if isinstance(module, MoE):
            layers.append(module)
        elif isinstance(module, ResidualMoE):
            residuals[id(module.moe)] = module
    main = [folder / "mp_rank_00_model_states.pt"]
    # Gates are whole in the first of these files; only residual MLPs are sliced over all of them.
    paths = sorted(folder.glob("mp_rank_*_model_states.pt")) if residuals else main
    files = _Files(paths or main, names)
    files.states = [state.get("module") or {} for state in files.states]
    pairs: list[Pair] = []
    for number, layer in enumerate(layers):
        prefix = ""
        for place, bank_files in enumerate(_expert_files(folder, number, layers, names)):
            prefix = next(iter(bank_files.states[0]), "").partition(EXPERTS)[0]
            expert = layer.experts.experts[place]
            pairs += bank_files.network(f"{prefix}{EXPERTS}{expert}.", _of_expert(layer.experts, place))
        pairs.append((layer.gate, files.whole(prefix + GATE, layer.gate)))
        pairs += _residual(files, prefix, residuals.get(id(layer)))
    return pairs


def _expert_files(folder: Path, number: int, layers: list[MoE], names: dict[str, str]) -> Iterator[_Files]:
    """The files of each of a layer's experts on this rank. Raises ValueError if the layer is not that of the model."""
    layer = layers[number]
    unnamed = [name for name, _ in layer.experts.named_parameters() if name not in names]
    if unnamed:
        raise ValueError(f"names has {', '.join(names)}, but nothing for {', '.join(unnamed)}")
    # An expert more, or a layer more, is of another model.
    for excess in (f"layer_{number}_expert_{layer.num_experts}", f"layer_{len(layers)}_expert_0"):
        if any(folder.glob(f"{excess}_mp_rank_*")):
            raise ValueError(f"{folder} has {excess}, which the model does not have")
    for expert in layer.experts.experts:
        pattern = f"layer_{number}_expert_{expert}_mp_rank_*_model_states.pt"
        paths = sorted(folder.glob(pattern))
        if not paths:
            raise FileNotFoundError(f"{folder} has no {pattern}")
        yield _Files(paths, names)


class _Files:
    """Files of DeepSpeed's tensor ranks, which have the same names.

    names  as in load_deepspeed
    """

    def __init__(self, paths: list[Path], names: dict[str, str]) -> None:
        self.path = paths[0]
        self.states = [_read(path) for path in paths]
        self.names = names

    def network(self, prefix: str, weights: Weights) -> list[Pair]:
        """The weights of one expert or MLP. Those without a name, biases, become 0."""
        pairs = []
        known = set()
        for name, (values, slice_of) in weights.items():
            if name not in self.names:
                pairs.append((values, torch.zeros_like(values)))
                continue
            key = prefix + self.names[name]
            known.add(key)
            if values.numel():
                pairs.append((values, self.whole(key, values, slice_of)))
        unknown = sorted(key for key in self.states[0] if key.startswith(prefix) and key not in known)
        if unknown:
            raise ValueError(f"{self.path} has {unknown[0]}, which neither names nor the model has")
        return pairs

    def whole(self, key: str, values: Tensor, slice_of: Slice = WHOLE) -> Tensor:
        """What belongs into values, from one whole weight or from slices of it."""
        dim = slice_of.dim
        shape = list(values.shape)
        shape[dim] *= slice_of.portion[1]
        tensors = [state[key] for state in self.states if key in state]
        # DeepSpeed slices by its own tensor ranks, which need not be as many as ours. A whole weight may be in each
        # file, or in the first alone.
        is_whole = key in self.states[0] and list(tensors[0].shape) == shape
        if not is_whole and len(tensors) < len(self.states):
            raise ValueError(f"{self.path} has no {key}, but {', '.join(list(self.states[0])[:6])}")
        weight = tensors[0] if is_whole else torch.cat(tensors, dim)
        if list(weight.shape) != shape:
            raise ValueError(f"{key} in {self.path} has shape {tuple(weight.shape)}, expected {tuple(shape)}")
        return part_of(weight, dim, slice_of.portion)


def _residual(files: _Files, prefix: str, layer: ResidualMoE | None) -> list[Pair]:
    """The MLP and the coefficient of a layer. layer: None where the model has a plain MoE."""
    # What the file has and the model has not would be lost silently.
    unknown = [] if layer else [prefix + RESIDUAL]
    if layer is None or layer.coefficient is None:
        unknown.append(prefix + COEFFICIENT)
    for key in files.states[0]:
        if key.startswith(tuple(unknown)):
            raise ValueError(
                f"{files.path} has {key}, expected none: in the model it is no ResidualMoE(combine='learned')"
            )
    if layer is None:
        return []
    pairs = files.network(prefix + RESIDUAL, _of_mlp(layer.mlp))
    if layer.coefficient is not None:
        for name, values in layer.coefficient.named_parameters():
            pairs.append((values, files.whole(prefix + COEFFICIENT + name, values)))
    return pairs


def _of_expert(bank: Experts, place: int) -> Weights:
    ranks = bank.slices["up"].portion
    columns = Slice(0, ranks)
    # Transposed, as torch.nn.Linear has them: our banks are [inputs, outputs].
    weights = {
        "up": (bank.up[place].T, columns),
        "down": (bank.down[place].T, Slice(1, ranks)),
    }
    if bank.activation == "swiglu":
        weights["gate"] = bank.gate[place].T, columns
        return weights
    weights["up_bias"] = bank.up_bias[place], columns
    # Slice 0 alone has this bias; without numbers it is left out.
    bias = bank.up_bias.new_empty(0) if bank.down_bias is None else bank.down_bias[place]
    weights["down_bias"] = bias, WHOLE
    return weights


def _of_mlp(mlp: MLP) -> Weights:
    ranks = mlp.up.slices["weight"].portion
    columns = Slice(0, ranks)
    weights = {
        "down": (mlp.down.weight, Slice(1, ranks)),
        "down_bias": (mlp.down.bias, WHOLE),
    }
    # Gate and up lie in one matrix here, and in two of DeepSpeed.
    blocks = ("gate", "up") if mlp.activation == "swiglu" else ("up",)
    matrices = mlp.up.weight.chunk(len(blocks))
    biases = mlp.up.bias.chunk(len(blocks))
    for name, weight, bias in zip(blocks, matrices, biases, strict=True):
        weights[name] = weight, columns
        weights[f"{name}_bias"] = bias, columns
    return weights


def _read(file: Path) -> dict[str, Any]:
    try:
        return dict(torch.load(file, map_location="cpu", weights_only=True))
    except (pickle.UnpicklingError, RuntimeError, EOFError, TypeError) as error:
        reason = str(error).rpartition("WeightsUnpickler error: ")[2].partition("\n")[0]
        raise ValueError(f"{file} cannot be read as tensors: {reason}") from None
