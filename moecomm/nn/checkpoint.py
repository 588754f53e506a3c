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
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from moecomm.comm import Comm
from moecomm.nn.files import locked, to_disk
from moecomm.nn.linear import part_in
from moecomm.nn.optimizer import KINDS, State, group_settings, optimizer_states, state_dict, states_to_read
from moecomm.nn.slices import Held, Piece, held
from moecomm.nn.stored import INDEX, Index, Stored, Target, write_index
from moecomm.nn.tensor_file import write
from moecomm.together import gather, together

UNFINISHED = "unfinished"


def save(
    folder: str | Path,
    step: int,
    model: nn.Module,
    optimizer: Optimizer | None = None,
    *,
    comm: Comm | None = None,
    values: dict[str, Any] | None = None,
    keep: int | None = None,
) -> Path:
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
    folder = Path(folder)
    rank = part_in(comm)[0]
    finished = folder / f"step-{step:06d}"
    unfinished = folder / UNFINISHED
    # In all files of this save, so that a file of another save is told from them.
    identity = gather(comm, secrets.token_hex(8))[0]
    order, pieces = _owned(comm, together(comm, "checkpoint", lambda: _held_pieces(model, optimizer)))
    with ExitStack() as stack:
        together(comm, "checkpoint", lambda: stack.enter_context(_begun(folder, finished)) if rank == 0 else None)
        file = unfinished / f"rank-{rank:05d}.safetensors"
        written = together(comm, "checkpoint", lambda: _write(file, pieces, identity))
        lines = _lines(comm, written)
        index: Index = {
            "id": identity,
            "values": values or {},
            "groups": None if optimizer is None else group_settings(optimizer),
            "tensors": [lines[key] for key in order],
        }
        together(comm, "checkpoint", lambda: _finish(unfinished, finished, index, keep) if rank == 0 else None)
    return finished


def load(
    path: str | Path | None,
    model: nn.Module,
    optimizer: Optimizer | None = None,
    *,
    comm: Comm | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> dict[str, Any]:
    """Fill model and optimizer from a checkpoint, whatever the split it was saved under. Returns the values saved.

    path      what `save` or `last` returned
    progress  progress(done, total): how many bytes of this rank's are read

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
    with ExitStack() as stack:
        stored = together(comm, "checkpoint", lambda: Stored(path, stack))
        path = stored.path
        index = stored.index
        if comm is not None:
            comm.agree("checkpoint.load: path", f"{path.name} with id {index.get('id')}")
        if part_in(comm)[0] == 0 and not stored.with_checksums:
            warnings.warn(f"{path} has no checksums: numbers that have changed are not noticed", stacklevel=2)
        tensors = held(model)
        copies, states, targets = together(comm, "checkpoint", lambda: _memory(tensors, optimizer, stored))
        _check_names(comm, stored, targets)
        together(comm, "checkpoint", lambda: stored.fill(targets, progress))
    # All ranks have read and compared everything. What fails from here on is undone.
    if optimizer is not None:
        groups = index["groups"]
        state = together(comm, "checkpoint", lambda: state_dict(optimizer, tensors, groups, states))
        _load_state(comm, optimizer, state)
    together(comm, "checkpoint", lambda: _fill_model(tensors, copies))
    return dict(index["values"])


def values(path: str | Path) -> dict[str, Any]:
    """The values of a checkpoint, without its tensors. Raises as `load`. Not collective."""
    with ExitStack() as stack:
        return dict(Stored(path, stack).index["values"])


def last(folder: str | Path) -> Path | None:
    """The complete checkpoint of the highest step in a folder, or None. Not collective."""
    return max(_steps(Path(folder)), default=None, key=_step)


def _memory(
    tensors: list[Held], optimizer: Optimizer | None, stored: Stored
) -> tuple[list[Held], list[State], list[Target]]:
    """The tensors, and the optimizer's states in the checkpoint, with new memory on the host; and the pieces of both.

    Raises ValueError for a tensor without memory, and for what the checkpoint does not have, or in another shape.
    """
    copies = []
    for tensor in tensors:
        if tensor.tensor.is_meta:
            raise ValueError(f"{tensor.name} is on the meta device, expected one that has memory")
        memory = torch.empty(tensor.tensor.shape, dtype=tensor.tensor.dtype)
        copies.append(tensor._replace(tensor=memory))
    # Before the states: a checkpoint of another model is called so.
    targets = _pieces(copies)
    stored.check(targets)
    states = [] if optimizer is None else states_to_read(optimizer, tensors, stored)
    targets += _pieces([target for _, target in states])
    stored.check(targets)
    return copies, states, targets


def _pieces(tensors: list[Held]) -> list[Target]:
    pieces = []
    for tensor in tensors:
        pieces += tensor.pieces()
    return pieces


def _check_names(comm: Comm | None, stored: Stored, targets: list[Target]) -> None:
    """Raises ValueError if the checkpoint has a tensor that the model has on no rank. Collective."""
    # A pipeline stage has some of the tensors, and a rank some of the experts: the names of all ranks count.
    names: set[str] = set()
    for text in gather(comm, json.dumps([piece.name for piece, _ in targets])):
        names.update(json.loads(text))
    unknown = sorted(name for name in stored.tensors.keys() - names if not name.startswith(KINDS))
    if unknown:
        raise ValueError(f"{stored.path} has {unknown[0]} ({len(unknown)} such), which the model has on no rank")


def _fill_model(tensors: list[Held], copies: list[Held]) -> None:
    for tensor, copy in zip(tensors, copies, strict=True):
        tensor.tensor.detach().copy_(copy.tensor)


def _load_state(comm: Comm | None, optimizer: Optimizer, state: dict[str, Any]) -> None:
    """optimizer.load_state_dict on all ranks, or on none. Collective."""
    # A device's memory may be too small on one rank. load_state_dict replaces these two and does not change them.
    former = optimizer.state, optimizer.param_groups
    try:
        together(comm, "checkpoint", lambda: optimizer.load_state_dict(state))
    except BaseException:
        optimizer.state, optimizer.param_groups = former
        raise


# ---- writing ---------------------------------------------------------------------------------------------------------


def _held_pieces(model: nn.Module, optimizer: Optimizer | None) -> list[Target]:
    """All that this rank has of a model and an optimizer."""
    tensors = held(model)
    states = [] if optimizer is None else optimizer_states(optimizer, tensors)
    return _pieces(tensors + states)


def _owned(comm: Comm | None, pieces: list[Target]) -> tuple[list[str], dict[Piece, Tensor]]:
    """The keys of all ranks, and the pieces that this rank writes. Collective.

    A piece that several ranks have is written by the one that writes the fewest numbers so far. The order of the keys
    does not depend on that: an optimizer that is loaded gets the states of a parameter in the order they were in.

    Raises ValueError for ranks that have pieces of the same name in other shapes or dtypes.
    """
    lines = [[piece.key, values.numel(), piece.shape, f"torch.{piece.dtype}"] for piece, values in pieces]
    ranks: dict[str, list[int]] = defaultdict(list)
    forms: dict[str, list[object]] = {}
    sizes: dict[str, int] = {}
    for rank, text in enumerate(gather(comm, json.dumps(lines))):
        for key, size, *form in json.loads(text):
            if forms.setdefault(key, form) != form:
                raise ValueError(f"checkpoint.save: {key} is {forms[key]}, but {form} on rank {rank}")
            ranks[key].append(rank)
            sizes[key] = size
    rank, num_ranks = part_in(comm)
    load = [0] * num_ranks
    owned = set()
    # What one rank alone has comes first, then the largest, so that the small ones can even out the load.
    for key in sorted(ranks, key=lambda key: (len(ranks[key]), -sizes[key])):
        owner = min(ranks[key], key=load.__getitem__)
        load[owner] += sizes[key]
        if owner == rank:
            owned.add(key)
    # A tensor that has two names in the model may have two pieces of one key: they are written once.
    return list(ranks), {piece: values for piece, values in pieces if piece.key in owned}


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


def _write(path: Path, pieces: dict[Piece, Tensor], identity: str) -> list[Piece]:
    """Write a file of the checkpoint with this id. Returns the pieces as they are in it."""
    if not path.parent.exists():
        raise OSError(f"{path.parent} is not seen here: the folder must be on a file system that all ranks share")
    tensors = {piece.key: values for piece, values in pieces.items()}
    checksums = write(path, tensors, {"id": identity})
    return [piece._replace(file=path.name, checksum=checksums[piece.key]) for piece in pieces]


def _lines(comm: Comm | None, pieces: list[Piece]) -> dict[str, object]:
    """The key of each rank's pieces, and what the index has of a piece. Collective."""
    lines: dict[str, object] = {}
    # The key is not in the index: it follows from name, start and size.
    of_rank = {piece.key: piece[1:] for piece in pieces}
    for text in gather(comm, json.dumps(of_rank)):
        lines.update(json.loads(text))
    return lines


def _finish(unfinished: Path, finished: Path, index: Index, keep: int | None) -> None:
    """Write the index, give the folder its name, remove old ones."""
    write_index(unfinished / INDEX, index)
    # The names in a folder reach the disk with the folder, not with the files.
    to_disk(unfinished)
    unfinished.rename(finished)
    to_disk(finished.parent)
    if keep is None:
        return
    # A higher step is of a run that this one does not continue: it stays, and does not count.
    older = [path for path in _steps(finished.parent) if _step(path) < _step(finished)]
    older.sort(key=_step)
    for path in older[: max(0, len(older) + 1 - keep)]:
        _remove_old(path, unfinished)


def _remove_old(path: Path, unfinished: Path) -> None:
    """Remove an old checkpoint, or warn that it cannot be removed: the new one is complete."""
    try:
        # Renamed first, so that no folder that is called a step is ever without some of its files.
        _remove(path if path.is_symlink() else path.rename(unfinished))
    except OSError as error:
        left = path
        # The next save needs the name.
        if os.path.lexists(unfinished):
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
    paths = folder.glob("step-*")
    return [path for path in paths if path.name[5:].isdecimal() and path.is_dir()]


def _step(path: Path) -> int:
    return int(path.name[5:])
