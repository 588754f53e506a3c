"""Ranks of a torch.distributed process group: gloo for host memory, NCCL for GPUs."""

from __future__ import annotations

import atexit
import hashlib
import inspect
import os
import secrets
import socket
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TypedDict

import numpy as np

from moecomm.arrays import Array, Counts, as_bytes, is_torch, on_host, row_bytes
from moecomm.comm import Comm
from moecomm.errors import CommError
from moecomm.failures import Sharers, refused
from moecomm.transports.limit import check_limit, wait

try:
    import torch
    import torch.distributed as dist
    import torch.distributed.distributed_c10d as c10d
except ImportError as error:
    raise ImportError(f"moecomm's torch transport needs torch ({error}): pip install 'moecomm[torch]'") from error


SHARERS: weakref.WeakKeyDictionary[dist.ProcessGroup, Sharers] = weakref.WeakKeyDictionary()
"""The TorchComms over each group."""


class _GroupOptions(TypedDict, total=False):
    """Keyword arguments of dist.new_group."""

    timeout: timedelta
    sort_ranks: bool


class TorchComm(Comm):
    """The ranks of a torch ProcessGroup; torch.distributed.group.WORLD is all of them.

    group  an initialised group that this rank belongs to; stays the caller's
    limit  seconds that a collective may take; None: as long as the group's own timeout. A collective that takes longer
           raises CommError on this rank, every later call on the Comm raises CommError, and the process ends with
           status 1 when Python ends, because torch cannot cancel a collective.

    Making one is not collective. A group with NCCL alone moves CUDA tensors; host arrays (the counts among them) are
    copied through the current CUDA device, which must then be set to this rank's own.
    """

    def __init__(self, group: dist.ProcessGroup, *, limit: float | None = None) -> None:
        if not isinstance(group, dist.ProcessGroup):
            raise TypeError(
                f"TorchComm: group is a {type(group).__name__}, expected an initialised torch ProcessGroup of this rank"
            )
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        # Weak: torch aborts at exit if a group outlives destroy_process_group.
        self._group_ref = weakref.ref(group)
        self._limit = check_limit("TorchComm", limit)
        # Buffers of collectives that did not end: torch may still write to them.
        self._pending: list[torch.Tensor] = []
        # Such as cpu:gloo,cuda:nccl.
        self._backends = dist.get_backend_config(group)
        self._moves_host_memory = any(backend.startswith("cpu:") for backend in self._backends.split(","))
        self._owned = False
        self._sharers = SHARERS.setdefault(group, Sharers())
        self._sharers.add(self)

    def fail(self, why: str) -> None:
        super().fail(why)
        self._sharers.fail(why)

    @property
    def _group(self) -> dist.ProcessGroup | None:
        return self._group_ref()

    def check_usable(self, call: str) -> None:
        if self.failure is None and not _is_alive(self._group):
            self.failure = "its process group was destroyed"
        super().check_usable(call)

    def _call(self, name: str, start: Callable[[], dist.Work], *buffers: torch.Tensor) -> None:
        name = self._part_of or name
        try:
            work = start()
            is_done = self._limit is None or wait(work.is_completed, self._limit)
            if is_done:
                # For device arrays the current stream waits, not the host.
                work.wait()
                return
        except RuntimeError as error:
            # torch's DistBackendError among them.
            self.fail(f"{name} failed: {error}")
            raise CommError(f"{name}: {error}{self.where()}") from error
        except BaseException:
            # Such as KeyboardInterrupt: the collective still runs.
            self._leave_pending(buffers)
            raise
        self._leave_pending(buffers)
        self._give_up(name)

    def _leave_pending(self, buffers: tuple[torch.Tensor, ...]) -> None:
        self._pending.extend(buffers)
        # At exit torch would wait again for the ranks that did not come.
        atexit.register(_leave)

    def _all_to_all(self, rows: Array, out: Array, send_counts: Counts | None, recv_counts: Counts | None) -> None:
        send = self._movable(rows)
        recv = self._movable(out)
        width = row_bytes(rows)
        recv_splits = _split_sizes(recv_counts, width)
        send_splits = _split_sizes(send_counts, width)

        def start() -> dist.Work:
            return dist.all_to_all_single(recv, send, recv_splits, send_splits, group=self._group, async_op=True)

        self._call("all_to_all", start, send, recv)
        _copy_back(out, recv)

    def _all_gather(self, rows: Array, out: Array, recv_counts: Counts | None) -> None:
        send = self._movable(rows)
        sizes = _split_sizes(recv_counts, row_bytes(rows))
        if sizes is not None:
            # gloo gathers equal sizes only: each rank pads its rows to the longest.
            padded = send.new_zeros(max(sizes))
            padded[: send.numel()] = send
            send = padded
        recv = send.new_empty(self.size, send.numel())

        def start() -> dist.Work:
            return dist.all_gather(list(recv.unbind()), send, group=self._group, async_op=True)

        self._call("all_gather", start, send, recv)
        if sizes is not None:
            recv = torch.cat([padded[:size] for padded, size in zip(recv, sizes, strict=True)])
        _copy_back(out, recv.view(-1))

    def _all_reduce(self, array: Array) -> Array:
        total = array.detach().clone() if is_torch(array) else torch.from_numpy(np.array(array))
        moved = total.to(self._device()) if total.device.type == "cpu" else total

        def start() -> dist.Work:
            return dist.all_reduce(moved, group=self._group, async_op=True)

        self._call("all_reduce", start, moved)
        total = moved.to(total.device)
        return total if is_torch(array) else total.numpy()

    def _barrier(self) -> None:
        self._all_reduce(np.zeros(1, np.int32))

    def _split(self, color: int, key: int) -> Comm:
        self._part_of = "split"
        try:
            # Each rank's color, key and nonce.
            keys = np.empty((self.size, 3), np.int64)
            self._all_gather(np.array([[color, key, secrets.randbits(62)]], np.int64), keys, None)
            root, ranks, options = self._color_group(keys, color)
            group = None
            problem = ""
            try:
                group = _new_group(f"moecomm_{keys[root, 2]:x}", ranks, self._backends, options)
            except Exception as error:
                # torch raises DistStoreError, DistBackendError or plain RuntimeError.
                problem = f"the new group could not be made: {type(error).__name__}: {error}"
            self._check_connected(problem)
        finally:
            self._part_of = None
        child = TorchComm(group, limit=self._limit)
        child._owned = True
        return child

    def _color_group(self, keys: Counts, color: int) -> tuple[int, list[int], _GroupOptions]:
        """Of the ranks with this color: the first one, all of them as ranks of the world, and options of their group.

        keys  [size, 3]  each rank's color and key. ValueError on all ranks if this version of torch cannot order them
        """
        members: dict[int, list[int]] = {}
        world_ranks: dict[int, list[int]] = {}
        # lexsort is stable: ranks with the same color and key stay in order.
        for rank in np.lexsort((keys[:, 1], keys[:, 0])).tolist():
            rank_color = int(keys[rank, 0])
            members.setdefault(rank_color, []).append(rank)
            world_ranks.setdefault(rank_color, []).append(dist.get_global_rank(self._group, rank))
        options: _GroupOptions = {}
        if self._limit is not None:
            options["timeout"] = timedelta(seconds=self._limit)
        # All colors are looked at: either all ranks refuse or none.
        if any(ranks != sorted(ranks) for ranks in world_ranks.values()):
            options["sort_ranks"] = False
            if "sort_ranks" not in inspect.signature(dist.new_group).parameters:
                raise refused(
                    ValueError(
                        f"split: key gives ranks another order than they have in the world, which torch >= 2.12 can "
                        f"do, and this is {torch.__version__}{self.where()}"
                    )
                )
        return members[color][0], world_ranks[color], options

    def _check_connected(self, problem: str) -> None:
        """Return when every rank has its new group, or raise on all: no rank can connect to one that has freed it.

        problem  the error of this rank, or ""
        """
        failures = np.empty((self.size, 1), np.int64)
        try:
            self._all_gather(np.array([[problem != ""]], np.int64), failures, None)
        except CommError:
            if not problem:
                raise
        if problem:
            raise CommError(f"split: {problem}{self.where()}")
        failed = [self.world_rank(rank) for rank in np.flatnonzero(failures).tolist()]
        if failed:
            raise CommError(f"split: rank {failed[0]} could not make its new group{self.where()}")

    def _node_key(self) -> int:
        # Two hosts may have one name, and two containers of one host one boot id: a node has both in common.
        boot_id = Path("/proc/sys/kernel/random/boot_id")
        name = socket.gethostname() + (boot_id.read_text() if boot_id.exists() else "")
        return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big") >> 1

    def _free(self) -> None:
        if self._owned:
            dist.destroy_process_group(self._group)

    def _device(self) -> torch.device:
        """The device to which host arrays are copied for this group."""
        return torch.device("cpu") if self._moves_host_memory else torch.device("cuda", torch.cuda.current_device())

    def _movable(self, rows: Array) -> torch.Tensor:
        """The bytes of rows as a tensor that the group can move."""
        flat = as_bytes(rows)
        if is_torch(flat):
            return flat
        if not on_host(flat):
            raise refused(TypeError("the torch transport moves numpy arrays and torch tensors, got a cupy array"))
        # torch has no read-only tensors.
        writeable = flat if flat.flags.writeable else flat.copy()
        return torch.from_numpy(writeable).to(self._device())


class _Names:
    """The names of the groups that threads of this process are making.

    Torch has no argument for a group's name: its function that makes names is replaced while a thread needs another.
    """

    def __init__(self) -> None:
        self._by_thread: dict[int, str] = {}
        self._restore: Callable[[], None] | None = None
        self._lock = threading.Lock()

    @contextmanager
    def used(self, name: str) -> Iterator[None]:
        """The group that this thread makes gets this name, and only its members need to make it."""
        thread = threading.get_ident()
        try:
            with self._lock:
                self._by_thread[thread] = name
                if self._restore is None:
                    self._restore = self._replace()
            yield
        finally:
            with self._lock:
                self._by_thread.pop(thread, None)
                # With the last thread: an earlier one may still need the replacement.
                if not self._by_thread and self._restore is not None:
                    self._restore()
                    self._restore = None

    def _replace(self) -> Callable[[], None]:
        """Replace torch's function, and return one that restores it."""
        world = dist.group.WORLD
        device = world.bound_device_id
        torch_name = c10d._hash_ranks_to_str

        def name_of(ranks: list[int]) -> str:
            return self._by_thread.get(threading.get_ident()) or torch_name(ranks)

        def restore() -> None:
            c10d._hash_ranks_to_str = torch_name
            world.bound_device_id = device

        c10d._hash_ranks_to_str = name_of
        # Where the world was initialised with a device_id torch would split the world's NCCL communicator, to which all
        # its ranks would have to come.
        world.bound_device_id = None
        return restore


_NAMES = _Names()


def _new_group(name: str, ranks: list[int], backend: str, options: _GroupOptions) -> dist.ProcessGroup:
    """A process group of this name; only its members call this.

    Torch names a group that is made with use_local_synchronization by the number of groups that a rank knows: members
    that know different numbers wait for each other for ever, and so do those of a group made again after it was
    destroyed. Here all members use the same fresh name. Raises RuntimeError if this version of torch ignores it.
    """
    if hasattr(c10d, "_hash_ranks_to_str") and hasattr(c10d, "_process_group_name"):
        with _NAMES.used(name):
            if c10d._process_group_name(ranks, use_hashed_name=True) == name:
                return dist.new_group(ranks, backend=backend, use_local_synchronization=True, **options)
    raise RuntimeError(f"torch {torch.__version__} names groups in a way that moecomm does not know")


def _is_alive(group: dist.ProcessGroup | None) -> bool:
    """Whether the group is not destroyed: torch then raises one of several errors, by version."""
    if group is None:
        return False
    try:
        dist.get_backend(group)
    except (AssertionError, RuntimeError, ValueError):
        return False
    return True


def _leave() -> None:
    """End the process without torch's own exit handlers."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


def _split_sizes(counts: Counts | None, width: int) -> list[int] | None:
    """Bytes for each rank; None for equal sizes."""
    return None if counts is None else (counts * width).tolist()


def _copy_back(out: Array, recv: torch.Tensor) -> None:
    """Copy received bytes into out, unless they were received there."""
    flat = as_bytes(out)
    target = flat if is_torch(flat) else torch.from_numpy(flat)
    if target.data_ptr() != recv.data_ptr():
        target.copy_(recv)
