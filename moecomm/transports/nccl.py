"""Ranks that have a GPU each, through cupy's interface to NCCL, without torch.distributed.

Another Comm, the bootstrap, connects the ranks and moves arrays in host memory, the counts among them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING, NoReturn

import numpy as np

from moecomm.arrays import Array, Counts, dtype_name, is_torch, on_host, row_bytes
from moecomm.comm import Comm, CommLike
from moecomm.errors import CommError
from moecomm.failures import refused
from moecomm.transports import as_comm
from moecomm.transports.limit import wait

if TYPE_CHECKING:
    from cupy.cuda import ExternalStream
    from cupy.cuda.nccl import NcclCommunicator


class NcclComm(Comm):
    """The ranks of `bootstrap`: device arrays go through NCCL, host arrays through the bootstrap.

    bootstrap  an mpi4py communicator, a torch ProcessGroup or a moecomm Comm, e.g. MpiComm(comm, limit=60). Stays the
               caller's; what moecomm does on it is ordered with the caller's own collectives

    Moves torch CUDA tensors and cupy arrays, on the current stream of the library that they belong to. The first device
    array selects the GPU: NCCL's communicator is then made, from a unique id that the bootstrap broadcasts, so neither
    making a NcclComm nor splitting it costs anything on the GPU. Each rank of a host needs a GPU of its own.

    With a limit on the bootstrap, a device collective first waits in the bootstrap's barrier for all ranks, and then on
    the host until it is finished; one that takes longer or fails is aborted and raises CommError, and the GPU stays
    usable. Such a collective cannot be captured in a CUDA graph. Without a limit nothing waits on the host, and an
    error that NCCL reports later is raised by the next collective.

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
        self._communicator: NcclCommunicator | None = None
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
            num_bytes = rows.shape[0] * row_bytes(rows)
            byte = self._nccl.NCCL_UINT8

            def start(communicator: NcclCommunicator, stream: int) -> None:
                communicator.allGather(_address(rows), _address(out), num_bytes, byte, stream)

            self._run("all_gather", rows, start)
        else:
            # NCCL gathers equal numbers of rows only: here each rank sends all its rows to every rank.
            counts = np.full(self.size, rows.shape[0], np.int64)
            self._exchange("all_gather", (rows, np.zeros_like(counts), counts), out, recv_counts)

    def _exchange(self, call: str, sent: tuple[Array, Counts, Counts], out: Array, recv_counts: Counts) -> None:
        """Send and receive a block of rows for each rank.

        sent  (rows, [size] first row for each rank, [size] number of rows for it)
        out   the rows from all ranks, one block after the other
        """
        rows, send_starts, send_counts = sent
        recv_starts = np.cumsum(recv_counts) - recv_counts
        width = row_bytes(rows)
        byte = self._nccl.NCCL_UINT8

        def blocks(array: Array, starts: Counts, counts: Counts) -> Iterator[tuple[int, int, int]]:
            """(address, bytes, peer) of the blocks that are not empty."""
            addresses = (_address(array) + starts * width).tolist()
            for peer, num_bytes in enumerate((counts * width).tolist()):
                if num_bytes:
                    yield addresses[peer], num_bytes, peer

        def start(communicator: NcclCommunicator, stream: int) -> None:
            # In one group NCCL runs all sends and receives together: one after the other they would wait in a circle.
            self._nccl.groupStart()
            try:
                for address, num_bytes, peer in blocks(rows, send_starts, send_counts):
                    communicator.send(address, num_bytes, byte, peer, stream)
                for address, num_bytes, peer in blocks(out, recv_starts, recv_counts):
                    communicator.recv(address, num_bytes, byte, peer, stream)
            finally:
                self._nccl.groupEnd()

        self._run(call, rows, start)

    def _all_reduce(self, array: Array) -> Array:
        if on_host(array):
            return self._bootstrap._all_reduce(array)
        total = array.detach().clone() if is_torch(array) else array.copy()
        dtype = getattr(self._nccl, f"NCCL_{dtype_name(array).upper()}")
        address = _address(total)
        num_elements = math.prod(total.shape)

        def start(communicator: NcclCommunicator, stream: int) -> None:
            communicator.allReduce(address, address, num_elements, dtype, self._nccl.NCCL_SUM, stream)

        self._run("all_reduce", total, start)
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

    def _run(self, call: str, rows: Array, start: Callable[[NcclCommunicator, int], None]) -> None:
        """start(NCCL's communicator, current stream) on the GPU of rows, under the limit, with errors as CommError."""
        device = rows.device.index if is_torch(rows) else rows.device.id
        if self._communicator is not None and device != self._device:
            raise refused(
                TypeError(f"{call}: got an array on GPU {device}, this Comm is on GPU {self._device}{self.where()}")
            )
        if self._limit is not None:
            # NCCL would wait without a limit for a rank that it cannot reach; the bootstrap's barrier has one.
            self._bootstrap._barrier()
        with self._cupy.cuda.Device(device):
            stream = self._cupy.cuda.ExternalStream(_current_stream(self._cupy, rows, device))
            try:
                if self._communicator is None:
                    self._communicator = self._connect()
                    self._device = device
                communicator = self._communicator
                communicator.check_async_error()
                start(communicator, stream.ptr)
                if self._limit is None or wait(lambda: self._is_done(communicator, stream), self._limit):
                    return
            except self._nccl.NcclError as error:
                self._failed(call, error)
            except BaseException:
                # Such as KeyboardInterrupt: the caller may release the arrays, which NCCL must not write any more.
                self._abort()
                raise
        self._abort()
        self._give_up(call)

    def _abort(self) -> None:
        """End the work that NCCL still has on the GPU."""
        if self._communicator is not None:
            self._communicator.abort()

    def _connect(self) -> NcclCommunicator:
        """NCCL's communicator of these ranks. Collective."""
        unique_id = np.zeros((1, 128), np.uint8)
        if self.rank == 0:
            unique_id[0] = [byte & 255 for byte in self._nccl.get_unique_id()]
        ids = np.empty((self.size, 128), np.uint8)
        self._bootstrap._all_gather(unique_id, ids, None)
        # cupy 14, which has NcclConfig, takes the id as bytes; earlier versions take a tuple of signed chars.
        takes_bytes = hasattr(self._nccl, "NcclConfig")
        root_id = ids[0].tobytes() if takes_bytes else tuple(ids[0].view(np.int8).tolist())
        return self._nccl.NcclCommunicator(self.size, root_id, self.rank)

    def _is_done(self, communicator: NcclCommunicator, stream: ExternalStream) -> bool:
        communicator.check_async_error()
        return bool(stream.done)

    def _failed(self, call: str, error: Exception) -> NoReturn:
        if self._communicator is None:
            error = CommError(f"no NCCL communicator could be made, has each rank a GPU of its own? {error}")
        self._abort()
        self.fail(f"{call} failed: {error}")
        raise CommError(f"{call}: {error}{self.where()}") from error


@cache
def _load_cupy() -> ModuleType:
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


def _current_stream(cupy: ModuleType, rows: Array, device: int) -> int:
    """The stream on which the library of these rows queues its work on the device."""
    if not is_torch(rows):
        return int(cupy.cuda.get_current_stream().ptr)
    import torch

    return torch.cuda.current_stream(device).cuda_stream
