"""The wires: threads, mpi, torch, nccl. Each is one file that knows neither the others nor any algorithm.

NCCL without torch.distributed needs another Comm to begin with: `nccl.NcclComm(MPI.COMM_WORLD)`.
"""

from __future__ import annotations

from moecomm.comm import Comm, CommLike


def as_comm(group: CommLike) -> Comm:
    """The Comm over an mpi4py communicator or a torch ProcessGroup; a moecomm Comm is returned as it is."""
    if isinstance(group, Comm):
        return group
    libraries = {cls.__module__.partition(".")[0] for cls in type(group).__mro__}
    if "mpi4py" in libraries:
        from moecomm.transports.mpi import MpiComm

        return MpiComm(group)
    if "torch" in libraries:
        from moecomm.transports.torch import TorchComm

        return TorchComm(group)
    raise TypeError(
        f"comm is a {type(group).__name__}, expected an mpi4py communicator, a torch ProcessGroup or a moecomm Comm"
    )
