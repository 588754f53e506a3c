"""Checkpoints of a run: each rank writes what it holds; a checkpoint counts when all ranks have written."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from moecomm.comm import Comm


def save(model: nn.Module, optimizer: Any, step: int, folder: Path, world: Comm | None) -> Path:
    """Write folder/step-<step>/rank-<r>.npz, then remove older ones: at any time the last complete one is there.

    Parameters have their own names, optimizer states "<state>/<name>". Collective over world.
    """
    rank = 0 if world is None else world.rank
    unfinished, finished = folder / "unfinished", folder / f"step-{step:06d}"
    unfinished.mkdir(parents=True, exist_ok=True)
    arrays = {name: value.detach().cpu().float().numpy() for name, value in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        for state, value in optimizer.state[parameter].items():
            arrays[f"{state}/{name}"] = value.detach().cpu().float().numpy()
    np.savez(unfinished / f"rank-{rank}.npz", **arrays)
    if world is not None:
        world.barrier()
    if rank == 0:
        older = [path for path in folder.glob("step-*") if path != finished]
        shutil.rmtree(finished, ignore_errors=True)
        unfinished.rename(finished)
        for path in older:
            shutil.rmtree(path)
    return finished


def last_checkpoint(folder: Path) -> Path | None:
    """The last complete one, or None."""
    return max(folder.glob("step-*"), default=None)


def restore(model: nn.Module, folder: Path, world: Comm | None, optimizer: Any = None) -> int:
    """Take the weights from the last checkpoint of a run, and the optimizer's states; the steps that it had made.

    Raises ValueError if there is no checkpoint, or it is another model's or of another number of ranks.
    """
    path = last_checkpoint(folder)
    if path is None:
        raise ValueError(f"{folder} has no checkpoint")
    rank, size = (0, 1) if world is None else (world.rank, world.size)
    saved = len(list(path.glob("rank-*.npz")))
    if saved != size:
        raise ValueError(f"{path} was saved by {saved} ranks, expected {size}")
    with np.load(path / f"rank-{rank}.npz") as file:
        arrays = {name: torch.from_numpy(file[name]) for name in file.files}
    weights = {name: value for name, value in arrays.items() if "/" not in name}
    shapes, expected = ({name: tuple(v.shape) for name, v in d.items()} for d in (weights, model.state_dict()))
    if shapes != expected:
        name = min(name for name, _ in shapes.items() ^ expected.items())
        raise ValueError(f"{path} is of another model: {name} is {shapes.get(name)}, expected {expected.get(name)}")
    model.load_state_dict(weights)
    if optimizer is not None:
        for name, parameter in model.named_parameters():
            states = {key.split("/")[0]: value for key, value in arrays.items() if key.endswith("/" + name)}
            optimizer.state[parameter] = {state: value.to(parameter.device) for state, value in states.items()}
    return int(path.name.removeprefix("step-"))
