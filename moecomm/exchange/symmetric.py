"""Memory that the GPUs of one node can write in each other: plain cudaMalloc opened through CUDA IPC, or torch's."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from moecomm.comm import Comm
from moecomm.gating.kernel import libcuda, load_cupy
from moecomm.together import together

if TYPE_CHECKING:
    from torch import Tensor

ALREADY_ENABLED = 704
"""CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED"""


@dataclass(frozen=True, eq=False)
class SymmetricMemory:
    """The same number of bytes on every rank, zeros at first.

    pointers  [size]  the memory of each rank, as an address that this rank's kernels can use
    own       [num_bytes]  uint8, the memory of this rank, as a CUDA tensor that does not own it
    free      gives the memory back. Collective, once no kernel uses it any more.
    """

    pointers: Sequence[int]
    own: Tensor
    free: Callable[[], None]


def ipc_memory(comm: Comm, num_bytes: int) -> SymmetricMemory:
    """cudaMalloc on the current device, opened by the other ranks: through CUDA IPC, or directly in the same process.

    comm  ranks of one node; works over every transport

    Collective. Raises ValueError if the ranks are not on one node, RuntimeError where a GPU cannot reach another.
    """
    import torch

    node = comm.all_gather(np.array([comm.node_key()])).tolist()
    if len(set(node)) > 1:
        distant = next(rank for rank, key in enumerate(node) if key != node[0])
        raise ValueError(f"ipc_memory: ranks 0 and {distant} are on two nodes, expected one{comm.where()}")
    # What a rank has done is undone in reverse order: by `free`, or at once where a step fails.
    with ExitStack() as undo:
        device, pointer, handle = together(comm, "ipc_memory", lambda: _allocated(num_bytes, undo))
        handles = comm.all_gather(np.frombuffer(handle, np.uint8)[None].copy())
        places = comm.all_gather(np.array([[os.getpid(), device, pointer]])).tolist()
        # Runs after the handles are closed and before memory is freed: no rank frees what a peer still has open.
        undo.callback(comm.barrier)

        def addresses() -> list[int]:
            return [_opened(place, handles[rank].tobytes(), device, undo) for rank, place in enumerate(places)]

        pointers = together(comm, "ipc_memory", addresses)
        # The first step of `free`: kernels of this rank may still write in the memory of its peers.
        undo.callback(torch.cuda.synchronize, device)
        free = undo.pop_all().close
    return SymmetricMemory(pointers, _tensor(pointer, num_bytes), free)


def torch_memory(comm: Comm, num_bytes: int) -> SymmetricMemory:
    """torch's symmetric memory, for ranks of a torch process group. Collective."""
    import torch
    import torch.distributed._symmetric_memory as symmetric

    group = getattr(comm, "_group", None)
    if group is None:
        raise TypeError(f"torch_memory: comm is a {type(comm).__name__}, expected one over a torch process group")
    device = torch.device("cuda", torch.cuda.current_device())
    own = together(comm, "torch_memory", lambda: symmetric.empty(num_bytes, dtype=torch.uint8, device=device).zero_())
    handle = symmetric.rendezvous(own, group)
    # The zeros must be there before a peer writes.
    torch.cuda.synchronize()
    comm.barrier()
    return SymmetricMemory(list(handle.buffer_ptrs), own, comm.barrier)


def _allocated(num_bytes: int, undo: ExitStack) -> tuple[int, int, bytes]:
    """The current device, zeros on it, and what other processes open them by."""
    cupy = load_cupy()
    import torch
    from cupy.cuda import runtime

    device = torch.cuda.current_device()
    # cupy and torch each have a current device; allocations below are cupy's.
    cupy.cuda.Device(device).use()
    # Not from torch's allocator: an IPC handle opens a whole allocation, of which torch's tensors are pieces.
    pointer = runtime.malloc(num_bytes)
    undo.callback(runtime.free, pointer)
    runtime.memset(pointer, 0, num_bytes)
    runtime.deviceSynchronize()
    return device, pointer, runtime.ipcGetMemHandle(pointer)


def _opened(place: list[int], handle: bytes, device: int, undo: ExitStack) -> int:
    """The address in this process of what a rank has allocated. place: its process, device and address there."""
    from cupy.cuda import runtime

    process, peer, address = place
    # CUDA does not open a handle in the process that made it: threads use the address itself.
    if process == os.getpid():
        if peer != device and not runtime.deviceCanAccessPeer(device, peer):
            raise RuntimeError(f"GPU {device} cannot reach GPU {peer}")
        _enable(peer, device)
        return address
    address = int(runtime.ipcOpenMemHandle(handle))
    undo.callback(runtime.ipcCloseMemHandle, address)
    return address


def _enable(peer: int, device: int) -> None:
    """Let kernels of the current device write in the memory of a peer."""
    if peer == device:
        return
    # By the driver: the runtime would keep "already enabled" as the error of this thread, which the next caller that
    # asks for the last error would get.
    context = ctypes.c_void_p()
    error = libcuda().cuDevicePrimaryCtxRetain(ctypes.byref(context), peer)
    error = error or libcuda().cuCtxEnablePeerAccess(context, 0)
    if error not in (0, ALREADY_ENABLED):
        raise RuntimeError(f"GPU {device} cannot reach GPU {peer}: CUresult {error}")


def _tensor(pointer: int, num_bytes: int) -> Tensor:
    import cupy
    import torch

    memory = cupy.cuda.UnownedMemory(pointer, num_bytes, None)
    return torch.as_tensor(cupy.ndarray((num_bytes,), cupy.uint8, cupy.cuda.MemoryPointer(memory, 0)), device="cuda")
