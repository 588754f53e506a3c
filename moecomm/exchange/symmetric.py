"""Memory that the GPUs of one node can write in each other: plain cudaMalloc opened through CUDA IPC, or torch's."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moecomm.comm import Comm
from moecomm.gating.kernel import libcuda

ALREADY_ENABLED = 704
"""CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED"""


@dataclass(frozen=True, eq=False)
class SymmetricMemory:
    """The same number of bytes on every rank, zeros at first.

    pointers  [size]  each rank's part, as an address that this rank's kernels can use
    own       [num_bytes]  uint8, this rank's part, as a CUDA tensor that does not own it
    free      gives it back. Collective, once no kernel uses it any more.
    """

    pointers: Sequence[int]
    own: Any
    free: Callable[[], None]


def ipc_memory(comm: Comm, num_bytes: int) -> SymmetricMemory:
    """cudaMalloc on the current device, opened by the other ranks: as processes through CUDA IPC, as threads at once.

    comm  ranks of one node; works over every transport

    Collective. Raises ValueError if the ranks are not on one node, RuntimeError where a GPU cannot reach another.
    """
    import cupy
    import torch
    from cupy.cuda import runtime

    node = comm.all_gather(np.array([comm.node_key()])).tolist()
    if len(set(node)) > 1:
        other = next(rank for rank, key in enumerate(node) if key != node[0])
        raise ValueError(f"ipc_memory: ranks 0 and {other} are on two nodes, expected one{comm.where()}")
    device = torch.cuda.current_device()
    cupy.cuda.Device(device).use()  # cupy may have a current device of its own
    pointer = runtime.malloc(num_bytes)
    runtime.memset(pointer, 0, num_bytes)
    runtime.deviceSynchronize()
    handle = np.frombuffer(runtime.ipcGetMemHandle(pointer), np.uint8)
    handles = comm.all_gather(handle[None].copy())
    places = comm.all_gather(np.array([[os.getpid(), device, pointer]]))
    opened, pointers = [], []
    for rank, (process, other, address) in enumerate(places.tolist()):
        if process == os.getpid():
            if other != device and not runtime.deviceCanAccessPeer(device, other):
                raise RuntimeError(f"ipc_memory: GPU {device} cannot reach GPU {other} of rank {rank}{comm.where()}")
            _enable(other, device)
        else:
            address = runtime.ipcOpenMemHandle(handles[rank].tobytes())
            opened.append(address)
        pointers.append(int(address))

    def free() -> None:
        runtime.deviceSynchronize()
        for address in opened:
            runtime.ipcCloseMemHandle(address)
        comm.barrier()
        runtime.free(pointer)

    comm.barrier()  # nobody writes before all have cleared theirs
    return SymmetricMemory(pointers, _tensor(pointer, num_bytes), free)


def torch_memory(comm: Comm, num_bytes: int) -> SymmetricMemory:
    """torch's symmetric memory, for ranks of a torch process group. Collective."""
    import torch
    import torch.distributed._symmetric_memory as symmetric

    group = getattr(comm, "_group", None)
    if group is None:
        raise TypeError(f"torch_memory: comm is a {type(comm).__name__}, expected one over a torch process group")
    own = symmetric.empty(num_bytes, dtype=torch.uint8, device=torch.device("cuda", torch.cuda.current_device()))
    own.zero_()
    handle = symmetric.rendezvous(own, group)
    torch.cuda.synchronize()
    comm.barrier()
    return SymmetricMemory(list(handle.buffer_ptrs), own, comm.barrier)


def _enable(other: int, device: int) -> None:
    """Let the current device write to another. By the driver: the runtime would keep "already enabled" as its error."""
    if other == device:
        return
    context = ctypes.c_void_p()
    error = libcuda().cuDevicePrimaryCtxRetain(ctypes.byref(context), other)
    error = error or libcuda().cuCtxEnablePeerAccess(context, 0)
    if error not in (0, ALREADY_ENABLED):
        raise RuntimeError(f"ipc_memory: GPU {device} cannot reach GPU {other}: CUresult {error}")


def _tensor(pointer: int, num_bytes: int) -> Any:
    import cupy
    import torch

    memory = cupy.cuda.UnownedMemory(pointer, num_bytes, None)
    return torch.as_tensor(cupy.ndarray((num_bytes,), cupy.uint8, cupy.cuda.MemoryPointer(memory, 0)), device="cuda")
