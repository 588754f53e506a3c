"""Checkpoints that any split can load: tensors by layer name and global expert id, each saved by one of its owners.

    from moecomm.nn import checkpoint

    checkpoint.save("run", step, model, optimizer, comm=comm)
    checkpoint.load(checkpoint.last("run"), model, optimizer, comm=comm)  # other sizes of expert, tensor ... are fine

A checkpoint is a folder: checkpoint.json says which tensors there are and which safetensors file has which part.
It gets its name when it is complete, so that whatever is interrupted, the ones before stay as they are.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moecomm.comm import Comm
from moecomm.nn.files import locked, to_disk
from moecomm.nn.linear import part_in
from moecomm.nn.optimizer import KINDS, groups, parts, state_dict
from moecomm.nn.slices import Held, Piece, held
from moecomm.nn.stored import INDEX, Stored, read_index, write_index
from moecomm.nn.tensor_file import write
from moecomm.together import gather, together

UNFINISHED = "unfinished"


def save(
    folder: str | Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer | None = None, *,
    comm: Comm | None = None, values: dict[str, Any] | None = None, keep: int | None = None,
) -> Path:  # fmt: skip
    """Write folder/step-<step>, and return its path.

    folder     on a file system that all ranks share; made if it is not there
    model      parameters and persistent buffers; what several ranks have is written by one of them
    optimizer  any of torch's kind whose states are numbers, or tensors of the parameter's shape; None: no states
    comm       all ranks; None: this one alone
    values     to be saved beside, such as the state of a scheduler: what JSON can say, and tensors. Those of rank 0
               count
    keep       how many checkpoints may stay in the folder, this one and those of the highest lower steps; None: all

    Collective. On all ranks, ValueError for a step below 0, a keep below 1, ranks that differ in either, what cannot be
    saved, a step that is there already, or a folder that another job is writing to; OSError for a full disk and the
    like. The checkpoints that were there stay. An old one that cannot be removed gives a warning; of one that is a
    symbolic link the link is removed, and not what it points to.
    """
    if comm is not None:
        comm.agree("checkpoint.save: step and keep", f"{step} and {keep}")
    if step < 0 or (keep is not None and keep < 1):
        raise ValueError(f"checkpoint.save: got step {step} and keep {keep}, expected >= 0 and >= 1 or None")
    folder, rank = Path(folder), part_in(comm)[0]
    tensors = _owned(comm, together(comm, "checkpoint", lambda: [*parts(held(model), optimizer)]))
    name = gather(comm, secrets.token_hex(8))[0]  # in all of its files: those of another save are none of its own
    finished, unfinished = folder / f"step-{step:06d}", folder / UNFINISHED
    with ExitStack() as stack:
        together(comm, "checkpoint", lambda: stack.enter_context(_begun(folder, finished)) if rank == 0 else None)
        file = f"rank-{rank:05d}.safetensors"
        by_key = {piece.key(): piece for piece in tensors}
        values_of = {key: piece.values for key, piece in by_key.items()}
        checksums = together(comm, "checkpoint", lambda: _write(unfinished / file, values_of, name))
        lines = [
            [p.name, p.shape, str(p.values.dtype)[6:], file, p.start, tuple(p.values.shape), checksums[key]]
            for key, p in by_key.items()
        ]
        every = [line for lines in gather(comm, json.dumps(lines)) for line in json.loads(lines)]
        settings = groups(optimizer) if optimizer else None
        index = {"id": name, "values": values or {}, "groups": settings, "tensors": every}
        together(comm, "checkpoint", lambda: _finish(unfinished, finished, index, keep) if rank == 0 else None)
    return finished


def load(
    path: str | Path | None, model: nn.Module, optimizer: torch.optim.Optimizer | None = None, *,
    comm: Comm | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Fill model and optimizer from a checkpoint, whatever the split it was saved under. Returns the values saved.

    path  what `save` or `last` returned

    Every tensor of the model must be in the checkpoint, with the same shape, and every one of the checkpoint in the
    model of some rank; dtypes are the model's. Collective. On all ranks, ValueError for a checkpoint that is damaged,
    of another program, of a newer version, of another model or not the same on all ranks, and OSError for one that is
    missing or cannot be read: model and optimizer are then what they were. A checkpoint without checksums, as the first
    version wrote them, gives a warning on rank 0.

    Each rank reads what it needs once, compares its checksums, and changes nothing before all ranks have done so. For
    that it needs, in host memory, as much as its tensors and their states have, and the largest part of a tensor in a
    file: a part that is cut otherwise is read as a whole. An optimizer's states are then its new ones, not copied once
    more where the optimizer is on the host.
    """
    path, index = together(comm, "checkpoint", lambda: read_index(path))
    if comm is not None:
        comm.agree("checkpoint.load: path", f"{path.name} with id {index.get('id')}")
    with ExitStack() as stack:
        stored = together(comm, "checkpoint", lambda: Stored(path, index, stack))
        if part_in(comm)[0] == 0 and not stored.with_checksums:
            warnings.warn(f"{path} has no checksums: numbers that have changed are not noticed", stacklevel=2)
        tensors = held(model)
        read, pieces = together(comm, "checkpoint", lambda: _to_read(tensors, stored))
        named = {name for names in gather(comm, json.dumps([p.name for p in pieces])) for name in json.loads(names)}
        unknown = sorted(name for name in stored.tensors.keys() - named if not name.startswith(KINDS))
        if unknown:
            raise ValueError(f"{path} has {unknown[0]} ({len(unknown)} such), which the model has on no rank")
        together(comm, "checkpoint", lambda: stored.fill(pieces))
        if optimizer is not None:
            state = together(comm, "checkpoint", lambda: state_dict(optimizer, tensors, index["groups"], stored))
            _load_state(comm, optimizer, state)
    together(comm, "checkpoint", lambda: [one.tensor.detach().copy_(values) for one, values in read])
    return dict(index["values"])


def last(folder: str | Path) -> Path | None:
    """The complete checkpoint of the highest step in a folder, or None. Not collective."""
    return max(_steps(Path(folder)), default=None, key=_step)


def _to_read(tensors: list[Held], stored: Stored) -> tuple[list[tuple[Held, Tensor]], list[Piece]]:
    """For each tensor memory of its own on the host, and the pieces of all; the checkpoint has them."""
    read = []
    for one in tensors:
        if one.tensor.is_meta:
            raise ValueError(f"{one.name} is on the meta device, expected one that has memory")
        read.append((one, torch.empty(one.tensor.shape, dtype=one.tensor.dtype)))
    pieces = [piece for one, values in read for piece in one.pieces(values)]
    stored.check(pieces)
    return read, pieces


def _load_state(comm: Comm | None, optimizer: Any, state: dict[str, Any]) -> None:
    """optimizer.load_state_dict on all ranks, or on none: a device's memory may be too small on one. Collective."""
    before = optimizer.state, optimizer.param_groups  # which load_state_dict replaces and does not change
    try:
        together(comm, "checkpoint", lambda: optimizer.load_state_dict(state))
    except BaseException:
        optimizer.state, optimizer.param_groups = before
        raise


# ---- writing ---------------------------------------------------------------------------------------------------------


def _owned(comm: Comm | None, parts: list[list[Piece]]) -> list[Piece]:
    """The pieces that this rank writes: of a part's holders, the one with the fewest numbers so far. Collective."""
    keys = [part[0].key() for part in parts]
    first = [part[0] for part in parts]
    lines = [[key, p.shape, str(p.values.dtype), p.values.numel()] for key, p in zip(keys, first, strict=True)]
    holders: dict[str, list[int]] = {}
    looks: dict[str, Any] = {}
    for rank, text in enumerate(gather(comm, json.dumps(lines))):
        for key, *look in json.loads(text):
            if looks.setdefault(key, look) != look:
                raise ValueError(f"checkpoint.save: {key} is {looks[key][:2]}, but {look[:2]} on rank {rank}")
            holders.setdefault(key, []).append(rank)
    mine, size = part_in(comm)
    load, owner = [0] * size, {}
    for key, ranks in holders.items():
        owner[key] = min(ranks, key=load.__getitem__)
        load[owner[key]] += looks[key][-1]
    return [piece for key, part in zip(keys, parts, strict=True) if owner[key] == mine for piece in part]


@contextmanager
def _begun(folder: Path, finished: Path) -> Iterator[None]:
    """An empty folder for what is unfinished, while no other job can have one."""
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / "lock", f"another job is writing a checkpoint to {folder}"):
        if os.path.lexists(finished):
            raise ValueError(f"{finished} is there already: remove it, or give another folder")
        unfinished = folder / UNFINISHED
        _remove(unfinished)
        unfinished.mkdir()
        try:
            yield
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)


def _write(file: Path, tensors: dict[str, Tensor], name: str) -> dict[str, str]:
    """A file of the checkpoint with this id; the checksum of each tensor."""
    if not file.parent.exists():
        raise OSError(f"{file.parent} is not seen here: the folder must be on a file system that all ranks share")
    return write(file, tensors, {"id": name})


def _finish(unfinished: Path, finished: Path, index: dict[str, Any], keep: int | None) -> None:
    """Write the index, give the folder its name, remove old ones."""
    write_index(unfinished / INDEX, index)
    to_disk(unfinished)
    unfinished.rename(finished)
    to_disk(finished.parent)
    older = sorted((p for p in _steps(finished.parent) if _step(p) < _step(finished)), key=_step)
    for path in older[: max(0, len(older) + 1 - keep)] if keep else ():
        try:
            _remove(path if path.is_symlink() else path.rename(unfinished))
        except OSError as error:
            left = path
            if os.path.lexists(unfinished):  # the next save needs the name
                left = unfinished.rename(path.with_name(f"{path.name}-not-removed"))
            warnings.warn(f"{left} is an old checkpoint that cannot be removed: {error}", stacklevel=2)


def _remove(path: Path) -> None:
    """A folder with what is in it, or a link, whose target stays. ValueError for a file, which no checkpoint is."""
    if path.is_symlink():
        path.unlink()
    elif path.is_dir():
        shutil.rmtree(path)
    elif os.path.lexists(path):
        raise ValueError(f"{path} is a file, expected nothing: remove it")


def _steps(folder: Path) -> list[Path]:
    """The complete checkpoints, or links to such; what someone has put aside under another name is none of them."""
    return [path for path in folder.glob("step-*") if path.name[5:].isdecimal() and path.is_dir()]


def _step(path: Path) -> int:
    return int(path.name[5:])
