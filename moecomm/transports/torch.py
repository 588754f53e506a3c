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
from typing import Any

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


SHARERS: weakref.WeakKeyDictionary[Any, Sharers] = weakref.WeakKeyDictionary()
"""Which TorchComms there are over a group."""


class TorchComm(Comm):
    """The ranks of a torch ProcessGroup; torch.distributed.group.WORLD is all of them.

    group  an initialised group that this rank belongs to; stays the caller's
    limit  seconds that a collective may take; None: as long as the group's own timeout. A collective that takes longer
           raises CommError here, the Comm is of no use any more, and the process ends with status 1 when Python ends,
           because torch cannot take back a collective.

    Making one is not collective. A group with NCCL alone moves CUDA tensors; host arrays (the counts among them) go
    through the current CUDA device, which must then be set to this rank's own.
    """

    def __init__(self, group: Any, *, limit: float | None = None) -> None:
        if not isinstance(group, dist.ProcessGroup):
            raise TypeError(
                f"TorchComm: group is a {type(group).__name__}, expected an initialised torch ProcessGroup of this rank"
            )
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        self._group_ref = weakref.ref(group)  # torch aborts at exit if a group outlives destroy_process_group
        self._limit = check_limit("TorchComm", limit)
        self._pending: list[Any] = []
        self._backends = dist.get_backend_config(group)  # such as cpu:gloo,cuda:nccl
        self._moves_host_memory = any(backend.startswith("cpu:") for backend in self._backends.split(","))
        self._owned = False
        self._sharers = SHARERS.setdefault(group, Sharers())
        self._sharers.add(self)

    def fail(self, why: str) -> None:
        super().fail(why)
        self._sharers.fail(why)

    @property
    def _group(self) -> Any:
        return self._group_ref()

    def check_usable(self, call: str) -> None:
        if self.failure is None and not _is_alive(self._group):
            self.failure = "its process group was destroyed"
        super().check_usable(call)

    def _call(self, name: str, start: Callable[[], Any], *buffers: Any) -> None:
        name = self._part_of or name
        try:
            work = start()
            is_done = self._limit is None or wait(work.is_completed, self._limit)
            if is_done:
                work.wait()  # for device arrays the current stream waits, not the host
                return
        except RuntimeError as error:  # torch's own DistBackendError is one
            self.fail(f"{name} failed: {error}")
            raise CommError(f"{name}: {error}{self.where()}") from error
        except BaseException:  # such as KeyboardInterrupt
            self._leave_pending(buffers)
            raise
        self._leave_pending(buffers)
        self._give_up(name)

    def _leave_pending(self, buffers: tuple[Any, ...]) -> None:
        self._pending.append(buffers)  # torch may still write there
        atexit.register(_leave)  # torch would wait for the others again before it lets Python end

    def _all_to_all(self, rows: Array, out: Array, send_counts: Counts | None, recv_counts: Counts | None) -> None:
        send, recv = self._movable(rows), self._movable(out)
        splits = [None if c is None else (c * row_bytes(rows)).tolist() for c in (recv_counts, send_counts)]

        def start() -> Any:
            return dist.all_to_all_single(recv, send, *splits, group=self._group, async_op=True)

        self._call("all_to_all", start, send, recv)
        _bring(out, recv)

    def _all_gather(self, rows: Array, out: Array, recv_counts: Counts | None) -> None:
        send = self._movable(rows)
        sizes = None if recv_counts is None else (recv_counts * row_bytes(rows)).tolist()
        if sizes is not None:  # gloo gathers equal parts only: pad each to the longest
            padded = send.new_zeros(max(sizes))
            padded[: send.numel()] = send
            send = padded
        recv = send.new_empty(self.size * send.numel())

        def start() -> Any:
            return dist.all_gather(list(recv.view(self.size, -1).unbind()), send, group=self._group, async_op=True)

        self._call("all_gather", start, send, recv)
        if sizes is not None:
            recv = torch.cat([part[:n] for part, n in zip(recv.view(self.size, -1), sizes, strict=True)])
        _bring(out, recv)

    def _all_reduce(self, array: Array) -> Array:
        total = array.detach().clone() if is_torch(array) else torch.from_numpy(np.array(array))
        moved = total.to(self._device()) if total.device.type == "cpu" else total
        self._call("all_reduce", lambda: dist.all_reduce(moved, group=self._group, async_op=True), moved)
        total = moved.to(total.device)
        return total if is_torch(array) else total.numpy()

    def _barrier(self) -> None:
        self._all_reduce(np.zeros(1, np.int32))

    def _split(self, color: int, key: int) -> Comm:
        self._part_of = "split"
        try:
            wishes = np.empty((self.size, 3), np.int64)
            self._all_gather(np.array([[color, key, secrets.randbits(62)]], np.int64), wishes, None)
            first, ranks, options = self._wanted_group(wishes, color)
            group, problem = None, ""
            try:
                group = _new_group(f"moecomm_{wishes[first, 2]:x}", ranks, backend=self._backends, **options)
            except Exception as error:  # of torch: DistStoreError, DistBackendError, plain RuntimeError
                problem = f"the new group could not be made: {type(error).__name__}: {error}"
            self._all_connected(problem)
        finally:
            self._part_of = None
        child = TorchComm(group, limit=self._limit)
        child._owned = True
        return child

    def _wanted_group(self, wishes: Counts, color: int) -> tuple[int, list[int], dict[str, Any]]:
        """Of the ranks with this color: the first one, all of them as ranks of the world, and how to make their group.

        wishes  [size, 3]  each rank's color and key. ValueError on all ranks if this version of torch cannot do it
        """
        members: dict[int, list[int]] = {}
        for rank in np.lexsort((wishes[:, 1], wishes[:, 0])).tolist():  # stable: ties by rank
            members.setdefault(int(wishes[rank, 0]), []).append(rank)
        globally = {c: [dist.get_global_rank(self._group, rank) for rank in group] for c, group in members.items()}
        options: dict[str, Any] = {}
        if self._limit is not None:
            options["timeout"] = timedelta(seconds=self._limit)
        if any(ranks != sorted(ranks) for ranks in globally.values()):
            options["sort_ranks"] = False
            if "sort_ranks" not in inspect.signature(dist.new_group).parameters:
                raise refused(
                    ValueError(
                        f"split: key gives ranks another order than they have in the world, which torch >= 2.12 can "
                        f"do, and this is {torch.__version__}{self.where()}"
                    )
                )
        return members[color][0], globally[color], options

    def _all_connected(self, problem: str) -> None:
        """Return when every rank has its new group, or raise on all of them: nobody can connect to a rank that frees.

        problem  what this rank failed with, or ""
        """
        every = np.empty((self.size, 1), np.int64)
        try:
            self._all_gather(np.array([[problem != ""]], np.int64), every, None)
        except CommError:
            if not problem:
                raise
        if problem:
            raise CommError(f"split: {problem}{self.where()}")
        failed = [self.world_rank(rank) for rank in np.flatnonzero(every).tolist()]
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

    def _device(self) -> Any:
        """Where host arrays must be for this group."""
        return torch.device("cpu") if self._moves_host_memory else torch.device("cuda", torch.cuda.current_device())

    def _movable(self, rows: Array) -> Any:
        """The bytes of rows as a tensor that the group can move."""
        flat = as_bytes(rows)
        if is_torch(flat):
            return flat
        if not on_host(flat):
            raise refused(TypeError("the torch transport moves numpy arrays and torch tensors, got a cupy array"))
        return torch.from_numpy(flat if flat.flags.writeable else flat.copy()).to(
            self._device()
        )  # torch knows no other


class _Names:
    """The names of the groups that threads of this process are making, and where torch takes them from meanwhile.

    Torch has no argument for a group's name: the function that makes names is replaced while a thread needs its own.
    """

    def __init__(self) -> None:
        self._by_thread: dict[int, str] = {}
        self._replaced: tuple[Any, Any, Any] | None = None
        self._lock = threading.Lock()

    @contextmanager
    def given(self, name: str) -> Iterator[None]:
        """What this thread makes has this name, and needs its members alone."""
        thread = threading.get_ident()
        try:
            with self._lock:
                self._by_thread[thread] = name
                self._replace()
            yield
        finally:
            with self._lock:
                self._by_thread.pop(thread, None)
                if not self._by_thread:
                    self._put_back()

    def _replace(self) -> None:
        if self._replaced is not None:
            return
        world, torch_name = dist.group.WORLD, c10d._hash_ranks_to_str
        self._replaced = torch_name, world, world.bound_device_id
        c10d._hash_ranks_to_str = lambda ranks: self._by_thread.get(threading.get_ident()) or torch_name(ranks)
        # Where the world was initialised with a device_id torch would split the world's NCCL communicator, to which all
        # its ranks would have to come.
        world.bound_device_id = None

    def _put_back(self) -> None:
        if self._replaced is not None:
            c10d._hash_ranks_to_str, world, device = self._replaced
            world.bound_device_id = device
            self._replaced = None


_NAMES = _Names()


def _new_group(name: str, ranks: list[int], **options: Any) -> Any:
    """A process group of this name that really needs nobody but its members.

    Torch names a group that is made with use_local_synchronization by how many groups a rank knows: members that know
    different numbers wait for each other for ever, and so do those of a group made again after it was destroyed. Here
    all members give the same fresh name. Raises RuntimeError if this version of torch takes it from elsewhere.
    """
    if hasattr(c10d, "_hash_ranks_to_str") and hasattr(c10d, "_process_group_name"):
        with _NAMES.given(name):
            if c10d._process_group_name(ranks, use_hashed_name=True) == name:
                return dist.new_group(ranks, use_local_synchronization=True, **options)
    raise RuntimeError(f"torch {torch.__version__} names groups in a way that moecomm does not know")


def _is_alive(group: Any) -> bool:
    if group is None:
        return False
    try:
        dist.get_backend(group)
    except (AssertionError, RuntimeError, ValueError):
        return False
    return True


def _leave() -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


def _bring(out: Array, recv: Any) -> None:
    """Put what was received into out, where it is not there already."""
    flat = as_bytes(out)
    target = flat if is_torch(flat) else torch.from_numpy(flat)
    if target.data_ptr() != recv.data_ptr():
        target.copy_(recv)
