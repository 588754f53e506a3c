"""Checkpoints of a run: each rank writes what it holds; a checkpoint counts when all ranks have written."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
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
