"""The flat all-to-all: one hop, straight to the destination."""

from __future__ import annotations

from moecomm.all_to_all.base import AllToAll
from moecomm.arrays import Array, Counts, empty_rows
from moecomm.transports import as_comm


class FlatAllToAll(AllToAll):
    """p - 1 messages a rank, each straight to its destination: the library's own all-to-all.

    comm  an mpi4py communicator, a torch ProcessGroup or a moecomm Comm

    Memory beside input and output: none, even or uneven (8 p bytes of counts). Making one is not collective.
    """

    def __init__(self, comm: object) -> None:
        self.comm = as_comm(comm)

    def _even(self, x: Array, out: Array) -> None:
        self.comm.all_to_all(x, out=out)

    def _uneven(self, rows: Array, send_counts: Counts) -> tuple[Array, Counts]:
        recv_counts: Counts = self.comm.all_to_all(send_counts)
        out = empty_rows(int(recv_counts.sum()), rows)
        return self.comm.all_to_all(rows, send_counts, recv_counts, out=out), recv_counts

    def free(self) -> None:
        """Nothing to give back: the constructor made no group."""
