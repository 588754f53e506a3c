"""Checkpoints that any split can load: tensors by layer name and global expert id, each saved by one of its owners.

    from moecomm.nn import checkpoint

    checkpoint.save("run", step, model, optimizer, comm=comm)
    checkpoint.load(checkpoint.last("run"), model, optimizer, comm=comm)  # other sizes of expert, tensor ... are fine

A checkpoint is a folder: checkpoint.json says which tensors there are and which safetensors file has which part.
It gets its name when it is complete, so that whatever is interrupted, the ones before stay as they are.
"""

from __future__ import annotations

import fcntl
import json
import secrets
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moecomm.comm import Comm
from moecomm.nn.linear import part_in
from moecomm.nn.slices import Held, Piece, held
from moecomm.nn.stored import INDEX, VERSION, Stored, parameters, read_index, state_dict, to_disk, write
from moecomm.together import gather, together

UNFINISHED = "unfinished"
NOT_SAVED = {"params", "param_names"}
"""Of a parameter group: which parameters it has is this rank's own business."""


def save(
    folder: str | Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer | None = None, *,
    comm: Comm | None = None, values: dict[str, Any] | None = None, keep: int | None = None,
) -> Path:  # fmt: skip
    """Write folder/step-<step>, and return its path.

    folder     on a file system that all ranks share; made if it is not there
    model      parameters and persistent buffers; what several ranks have is written by one of them
    optimizer  any of torch's kind whose states are numbers, or tensors of the parameter's shape; None: no states
    comm       all ranks; None: this one alone
    values     to be saved beside, such as the state of a scheduler: what JSON can say. Those of rank 0 count
    keep       how many checkpoints may stay in the folder, this one and those of the highest lower steps; None: all

    Collective. On all ranks, ValueError for a step below 0, a keep below 1, ranks that differ in either, what cannot be
    saved, a step that is there already, or a folder that another job is writing to; OSError for a full disk and the
    like. The checkpoints that were there stay.
    """
    if comm is not None:
        comm.agree("checkpoint.save: step and keep", f"{step} and {keep}")
    if step < 0 or (keep is not None and keep < 1):
        raise ValueError(f"checkpoint.save: got step {step} and keep {keep}, expected >= 0 and >= 1 or None")
    folder, rank = Path(folder), part_in(comm)[0]
    parts = together(comm, "checkpoint", lambda: [*_parts(held(model), optimizer)])
    tensors = _owned(comm, parts)
    name = gather(comm, secrets.token_hex(8))[0]  # in all of its files: those of another save are none of its own
    finished, unfinished = folder / f"step-{step:06d}", folder / UNFINISHED
    with ExitStack() as stack:
        together(comm, "checkpoint", lambda: stack.enter_context(_begun(folder, finished)) if rank == 0 else None)
        file = f"rank-{rank:05d}.safetensors"
        found = {piece.key(): piece.values for piece in tensors}
        together(comm, "checkpoint", lambda: write(unfinished / file, found, name))
        lines = [[p.name, p.shape, str(p.values.dtype)[6:], file, p.start, tuple(p.values.shape)] for p in tensors]
        every = [line for lines in gather(comm, json.dumps(lines)) for line in json.loads(lines)]
        groups = [{k: g[k] for k in g.keys() - NOT_SAVED} for g in optimizer.param_groups] if optimizer else None
        index = {"format": "moecomm", "version": VERSION, "id": name, "values": values or {}, "groups": groups}
        index["tensors"] = every
        together(comm, "checkpoint", lambda: _finish(unfinished, finished, index, keep) if rank == 0 else None)
    return finished


def load(
    path: str | Path | None, model: nn.Module, optimizer: torch.optim.Optimizer | None = None, *,
    comm: Comm | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Fill model and optimizer from a checkpoint, whatever the split it was saved under. Returns the values saved.

    path  what `save` or `last` returned

    Every tensor of the model must be in the checkpoint, with the same shape, and every one of the checkpoint in the
    model of some rank; dtypes are the model's. Collective. On all ranks, ValueError for a checkpoint that is truncated,
    of another program, of a newer version, of another model or not the same on all ranks, and OSError for one that is
    missing: all found before anything is changed.
    """
    path, index = together(comm, "checkpoint", lambda: read_index(path))
    if comm is not None:
        comm.agree("checkpoint.load: path", f"{path.name} with id {index.get('id')}")
    with ExitStack() as stack:
        stored = together(comm, "checkpoint", lambda: Stored(path, index, stack))
        mine = held(model)
        wanted = together(comm, "checkpoint", lambda: [stored.checked(p) for h in mine for p in h.pieces(h.tensor)])
        named = {name for names in gather(comm, json.dumps([p.name for p in wanted])) for name in json.loads(names)}
        unknown = sorted({*stored.tensors} - {*stored.of_optimizer} - named)
        if unknown:
            raise ValueError(f"{path} has {unknown[0]} ({len(unknown)} such), which the model has on no rank")
        if optimizer is not None:
            state = together(comm, "checkpoint", lambda: state_dict(optimizer, mine, index["groups"], stored))
        together(comm, "checkpoint", lambda: stored.fill(*wanted))
        if optimizer is not None:
            together(comm, "checkpoint", lambda: optimizer.load_state_dict(state))
    return dict(index["values"])


def last(folder: str | Path) -> Path | None:
    """The complete checkpoint of the highest step in a folder, or None. Not collective."""
    return max(_steps(Path(folder)), default=None, key=_step)


# ---- what is saved, and by whom --------------------------------------------------------------------------------------


def _parts(tensors: list[Held], optimizer: Any) -> Iterator[list[Piece]]:
    """Each piece of the model on this rank, and behind it what the optimizer knows of it."""
    states = {id(p): optimizer.state.get(p, {}) for p in parameters(optimizer, tensors)} if optimizer else {}
    for one in tensors:
        pieces = one.pieces(one.tensor)
        parts = [[piece] for piece in pieces]
        for state, value in states.get(id(one.tensor), {}).items():
            kind = "optimizer" if isinstance(value, Tensor) else "number"
            if isinstance(value, int | float):
                value = torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else None)
            if not isinstance(value, Tensor) or (value.shape != one.tensor.shape and value.numel() > 1):
                got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                wanted = f"a number or a tensor {tuple(one.tensor.shape)}"
                raise ValueError(f"optimizer state {state} of {one.name} is {got}, expected {wanted}")
            if value.shape == one.tensor.shape:
                views = [view._replace(name=f"optimizer/{state}/{view.name}") for view in one.pieces(value)]
            else:  # one for the whole tensor
                alone = Piece("", tuple(value.shape), (0,) * value.dim(), value.detach())
                names = [f"{kind}/{state}/{piece.name}" for piece in pieces if not any(piece.start)]
                views = [alone._replace(name=name, values=alone.values.clone()) for name in names]
            for part, view in zip(parts, views, strict=False):
                part.append(view)
        yield from parts


def _owned(comm: Comm | None, parts: list[list[Piece]]) -> list[Piece]:
    """The pieces that this rank writes: of a part's holders, the one with the fewest numbers so far. Collective."""
    lines = [[part[0].key(), part[0].shape, str(part[0].values.dtype), part[0].values.numel()] for part in parts]
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
    return [piece for part in parts if owner[part[0].key()] == mine for piece in part]


# ---- writing ---------------------------------------------------------------------------------------------------------


@contextmanager
def _begun(folder: Path, finished: Path) -> Iterator[None]:
    """An empty folder for what is unfinished, while no other job can have one."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:  # let go when the process ends, however it ends
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another job is writing a checkpoint to {folder}") from None
        if finished.exists():
            raise ValueError(f"{finished} is there already: remove it, or give another folder")
        unfinished = folder / UNFINISHED
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        try:
            yield
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)


def _finish(unfinished: Path, finished: Path, index: dict[str, Any], keep: int | None) -> None:
    """Write the index, give the folder its name, remove old ones."""
    (unfinished / INDEX).write_text(json.dumps(index, default=float))
    for path in (unfinished / INDEX, unfinished):
        to_disk(path)
    unfinished.rename(finished)
    to_disk(finished.parent)
    older = sorted((p for p in _steps(finished.parent) if _step(p) < _step(finished)), key=_step)
    for path in older[: max(0, len(older) + 1 - keep)] if keep else ():
        shutil.rmtree(path.rename(unfinished))


def _steps(folder: Path) -> list[Path]:
    """The complete checkpoints; what someone has put aside under another name is none of them."""
    return [path for path in folder.glob("step-*") if path.name[5:].isdecimal()]


def _step(path: Path) -> int:
    return int(path.name[5:])
