"""Experts and gates out of DeepSpeed checkpoints: layer_<i>_expert_<j>_mp_rank_<t>_model_states.pt."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moecomm.comm import Comm
from moecomm.nn.moe import MoE
from moecomm.nn.seeds import Slice, part_of
from moecomm.together import together

MEGATRON = {
    "up": "dense_h_to_4h.weight",
    "up_bias": "dense_h_to_4h.bias",
    "down": "dense_4h_to_h.weight",
    "down_bias": "dense_4h_to_h.bias",
}
EXPERTS, GATE = ".deepspeed_moe.experts.deepspeed_experts.", ".deepspeed_moe.gate.wg.weight"


@torch.no_grad()
def load_deepspeed(
    folder: str | Path, model: nn.Module, *, names: dict[str, str] = MEGATRON, comm: Comm | None = None
) -> None:
    """Fill the experts and gates of a model's MoE layers. What else the model has stays as it is.

    folder  <save_dir>/<tag> of DeepSpeed, which numbers MoE layers in the order of the model, and experts globally
    model   with all layers (no pipeline stage), its experts split in any way
    names   each weight of Experts -> what DeepSpeed calls it behind the expert's number, there as torch.nn.Linear has
            it. None given: those of Megatron's MLP
    comm    all ranks; None: this one alone

    Slices of experts (tensor ranks t) are put together. Files are read by torch.load(weights_only=True): where
    one has more than tensors, such as Megatron's arguments, torch.serialization.add_safe_globals([argparse.Namespace])
    lets it pass.

    Collective. On all ranks, ValueError or OSError, before anything is changed, for what is missing or does not fit.
    """
    folder = Path(folder)
    layers = [module for module in model.modules() if isinstance(module, MoE)]

    def found() -> list[tuple[Tensor, Tensor]]:
        main = folder / "mp_rank_00_model_states.pt"
        gates = _read(main).get("module", {})
        pairs = []
        for number, layer in enumerate(layers):
            experts, gate = _experts(folder, number, layers, names)
            pairs += [*experts, (layer.gate, _whole(main, [gates], gate, layer.gate.T, Slice(0, (0, 1))).T)]
        return pairs

    for values, read in together(comm, "checkpoint", found):
        values.copy_(read)


def _experts(
    folder: Path, number: int, layers: list[MoE], names: dict[str, str]
) -> tuple[list[tuple[Tensor, Tensor]], str]:
    """The weights of a layer's experts with what is to be in them, and the name of its gate."""
    layer, bank = layers[number], layers[number].experts
    unnamed = [name for name, _ in bank.named_parameters() if name not in names]
    if unnamed:
        raise ValueError(f"names has {', '.join(names)}, but nothing for {', '.join(unnamed)}")
    for beyond in (f"layer_{number}_expert_{layer.num_experts}", f"layer_{len(layers)}_expert_0"):
        if any(folder.glob(f"{beyond}_mp_rank_*")):
            raise ValueError(f"{folder} has {beyond}, which the model does not have")
    found, prefix = [], ""
    for place, expert in enumerate(bank.experts):
        files = sorted(folder.glob(f"layer_{number}_expert_{expert}_mp_rank_*_model_states.pt"))
        if not files:
            raise FileNotFoundError(f"{folder} has no layer_{number}_expert_{expert}_mp_rank_*_model_states.pt")
        parts = [_read(file) for file in files]
        prefix = next(iter(parts[0]), "").partition(EXPERTS)[0]
        for name, theirs in names.items():
            if getattr(bank, name, None) is not None:  # another slice may have the bias
                key, values = f"{prefix}{EXPERTS}{expert}.{theirs}", getattr(bank, name)[place]
                found.append((values, _whole(files[0], parts, key, values, bank.slices.get(name, Slice(0, (0, 1))))))
    return found, prefix + GATE


def _whole(file: Path, parts: list[Any], key: str, values: Tensor, of: Slice) -> Tensor:
    """What belongs into values, from one whole weight or from slices of it."""
    if any(key not in part for part in parts):
        raise ValueError(f"{file} has no {key}, but {', '.join(list(parts[0])[:6])}")
    tensors = [part[key].T if values.dim() == 2 else part[key] for part in parts]
    shape = [size * of.part[1] if dim == of.dim else size for dim, size in enumerate(values.shape)]
    whole = tensors[0] if list(tensors[0].shape) == shape else torch.cat(tensors, of.dim)
    if list(whole.shape) != shape:
        raise ValueError(f"{key} in {file} has shape {tuple(whole.T.shape)}, expected {tuple(shape[::-1])}")
    return part_of(whole, of.dim, of.part)


def _read(file: Path) -> dict[str, Any]:
    try:
        return dict(torch.load(file, map_location="cpu", weights_only=True))
    except (pickle.UnpicklingError, RuntimeError, EOFError, TypeError) as error:
        reason = str(error).rpartition("WeightsUnpickler error: ")[2].partition("\n")[0]
        raise ValueError(f"{file} cannot be read as tensors: {reason}") from None
