"""The flat all-to-all: one hop, straight to the destination."""

from __future__ import annotations

import numpy as np

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
        self.comm.move(x, out)

    def _uneven(self, rows: Array, send_counts: Counts) -> tuple[Array, Counts]:
        recv_counts = np.empty_like(send_counts)
        self.comm.move(send_counts, recv_counts)
        out = empty_rows(int(recv_counts.sum()), rows)
        self.comm.move(rows, out, send_counts, recv_counts)
        return out, recv_counts
