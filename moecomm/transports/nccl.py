"""Ranks that have a GPU each, through NCCL as cupy calls it: no torch.distributed.

Another Comm, the bootstrap, brings the ranks together and moves what is in host memory, counts among it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any, NoReturn

import numpy as np

from moecomm.arrays import Array, Counts, dtype_name, is_torch, on_host, row_bytes
from moecomm.comm import Comm, CommLike
from moecomm.errors import CommError
from moecomm.failures import refused
from moecomm.transports import as_comm
from moecomm.transports.limit import wait


class NcclComm(Comm):
    """The ranks of `bootstrap`: device arrays go through NCCL, host arrays through the bootstrap.

    bootstrap  an mpi4py communicator, a torch ProcessGroup or a moecomm Comm, e.g. MpiComm(comm, limit=60). Stays the
               caller's; what moecomm does on it is ordered with the caller's own collectives

    Moves torch CUDA tensors and cupy arrays, on the current stream of the library that they belong to. The GPU is that
    of the first device array: NCCL's communicator is made when that comes, from a unique id that the bootstrap carries,
    so neither making a NcclComm nor splitting it costs anything on the GPU. A host has one rank a GPU.

    With a limit on the bootstrap, a device collective first waits there for all ranks to come, and then on the host
    until it is finished; one that takes longer or fails is aborted and raises CommError, and the GPU stays usable. That
    cannot be captured in a CUDA graph. Without a limit nothing waits on the host, and an error that NCCL finds later is
    raised by the next collective.

    Making one is not collective. Raises ImportError where cupy or its NCCL is missing.
    """

    def __init__(self, bootstrap: CommLike) -> None:
        self._cupy = _load_cupy()
        self._nccl = self._cupy.cuda.nccl
        self._bootstrap = as_comm(bootstrap)
        self.rank = self._bootstrap.rank
        self.size = self._bootstrap.size
        self._limit = self._bootstrap._limit
        self._owned = False
        self._communicator: Any = None
        self._device = -1

    def check_usable(self, call: str) -> None:
        super().check_usable(call)
        self._bootstrap.check_usable(call)

    def _all_to_all(self, rows: Array, out: Array, send_counts: Counts | None, recv_counts: Counts | None) -> None:
        if on_host(rows):
            self._bootstrap._all_to_all(rows, out, send_counts, recv_counts)
            return
        if send_counts is None or recv_counts is None:
            send_counts = recv_counts = np.full(self.size, rows.shape[0] // self.size, np.int64)
        starts = np.cumsum(send_counts) - send_counts
        self._exchange("all_to_all", (rows, starts, send_counts), out, recv_counts)

    def _all_gather(self, rows: Array, out: Array, recv_counts: Counts | None) -> None:
        if on_host(rows):
            self._bootstrap._all_gather(rows, out, recv_counts)
        elif recv_counts is None:
            arguments = _address(rows), _address(out), rows.shape[0] * row_bytes(rows), self._nccl.NCCL_UINT8
            self._run("all_gather", rows, lambda communicator, stream: communicator.allGather(*arguments, stream))
        else:
            everything = np.full(self.size, rows.shape[0], np.int64)
            self._exchange("all_gather", (rows, np.zeros_like(everything), everything), out, recv_counts)

    def _exchange(self, call: str, sent: tuple[Array, Counts, Counts], out: Array, recv_counts: Counts) -> None:
        """Send each rank rows [start, start + count), and receive one behind the other what they send here."""
        rows, *ranges = sent
        width, nccl = row_bytes(rows), self._nccl
        begins = np.cumsum(recv_counts) - recv_counts
        to_each, from_each = ((np.stack(part, axis=1) * width).tolist() for part in (ranges, (begins, recv_counts)))

        def start(communicator: Any, stream: int) -> None:
            nccl.groupStart()
            try:
                for move, array, parts in ((communicator.send, rows, to_each), (communicator.recv, out, from_each)):
                    for peer, (begin, num_bytes) in enumerate(parts):
                        if num_bytes:
                            move(_address(array) + begin, num_bytes, nccl.NCCL_UINT8, peer, stream)
            finally:
                nccl.groupEnd()

        self._run(call, rows, start)

    def _all_reduce(self, array: Array) -> Array:
        if on_host(array):
            return self._bootstrap._all_reduce(array)
        total = array.detach().clone() if is_torch(array) else array.copy()
        dtype = getattr(self._nccl, f"NCCL_{dtype_name(array).upper()}")
        arguments = _address(total), _address(total), math.prod(total.shape), dtype, self._nccl.NCCL_SUM
        self._run("all_reduce", total, lambda communicator, stream: communicator.allReduce(*arguments, stream))
        return total

    def _barrier(self) -> None:
        self._bootstrap._barrier()

    def _split(self, color: int, key: int) -> Comm:
        bootstrap = self._bootstrap._split(color, key)
        self._bootstrap._adopt(bootstrap)
        child = NcclComm(bootstrap)
        child._owned = True
        return child

    def _node_key(self) -> int:
        return self._bootstrap._node_key()

    def progress(self) -> None:
        self._bootstrap.progress()

    def _free(self) -> None:
        if self._communicator is not None:
            self._communicator.destroy()
        if self._owned:
            self._bootstrap.free()

    # ---- NCCL ------------------------------------------------------------------------------------------------------

    def _run(self, call: str, rows: Array, start: Callable[[Any, int], None]) -> None:
        """start(NCCL's communicator, current stream), and what its errors and the limit need."""
        device = rows.device.index if is_torch(rows) else rows.device.id
        if self._communicator is not None and device != self._device:
            raise refused(
                TypeError(f"{call}: got an array on GPU {device}, this Comm is on GPU {self._device}{self.where()}")
            )
        if self._limit is not None:
            self._bootstrap._barrier()  # NCCL would wait without a limit for a rank that it cannot reach
        with self._cupy.cuda.Device(device):
            stream = self._cupy.cuda.ExternalStream(_current_stream(self._cupy, rows, device))
            try:
                if self._communicator is None:
                    self._communicator, self._device = self._connect(), device
                self._communicator.check_async_error()
                start(self._communicator, stream.ptr)
                is_done = self._limit is None or wait(lambda: self._is_done(stream), self._limit)
            except self._nccl.NcclError as error:
                self._failed(call, error)
            except BaseException:  # such as KeyboardInterrupt: nothing of this call may run on when its arrays go
                if self._communicator is not None:
                    self._communicator.abort()
                raise
        if not is_done:
            self._communicator.abort()
            self._give_up(call)

    def _connect(self) -> Any:
        """NCCL's communicator of these ranks. Collective."""
        unique_id = np.zeros((1, 128), np.uint8)
        if self.rank == 0:
            unique_id[0] = [byte & 255 for byte in self._nccl.get_unique_id()]
        every = np.empty((self.size, 128), np.uint8)
        self._bootstrap._all_gather(unique_id, every, None)
        takes_bytes = hasattr(self._nccl, "NcclConfig")  # since cupy 14; before, a tuple of signed chars
        first = every[0].tobytes() if takes_bytes else tuple(every[0].view(np.int8).tolist())
        return self._nccl.NcclCommunicator(self.size, first, self.rank)

    def _is_done(self, stream: Any) -> bool:
        self._communicator.check_async_error()
        return bool(stream.done)

    def _failed(self, call: str, error: Exception) -> NoReturn:
        if self._communicator is None:
            error = CommError(f"no NCCL communicator could be made, has each rank a GPU of its own? {error}")
        else:
            self._communicator.abort()  # ends what it still runs on the GPU
        self.fail(f"{call} failed: {error}")
        raise CommError(f"{call}: {error}{self.where()}") from error


@cache
def _load_cupy() -> Any:
    install = "pip install 'moecomm[cuda13]' or 'moecomm[cuda12]' brings both"
    try:
        import cupy
        import cupy.cuda.nccl
    except ImportError as error:
        raise ImportError(f"moecomm's NCCL transport needs cupy and NCCL ({error}): {install}") from error
    if not cupy.cuda.nccl.available:
        raise ImportError(f"moecomm's NCCL transport needs cupy and NCCL, and cupy finds no libnccl.so.2: {install}")
    return cupy


def _address(rows: Array) -> int:
    return int(rows.data_ptr() if is_torch(rows) else rows.data.ptr)


def _current_stream(cupy: Any, rows: Array, device: int) -> int:
    """Where work on such arrays is queued."""
    if not is_torch(rows):
        return int(cupy.cuda.get_current_stream().ptr)
    import torch

    return torch.cuda.current_stream(device).cuda_stream
