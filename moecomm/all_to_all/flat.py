"""The flat all-to-all: one hop, straight to the destination."""

from __future__ import annotations

import numpy as np

from moecomm.all_to_all.base import AllToAll, Hop, Route
from moecomm.arrays import Array, Counts, empty_rows
from moecomm.comm import CommLike
from moecomm.transports import as_comm


class FlatAllToAll(AllToAll):
    """p - 1 messages a rank, each straight to its destination: the library's own all-to-all.

    comm  an mpi4py communicator, a torch ProcessGroup or a moecomm Comm

    Memory beside input and output: none, even or uneven (8 p bytes of counts). Making one is not collective.
    """

    def __init__(self, comm: CommLike) -> None:
        self.comm = as_comm(comm)

    def _even(self, x: Array, out: Array) -> None:
        self.comm.move(x, out)

    def _route(self, send_counts: Counts) -> Route:
        recv_counts = np.empty_like(send_counts)
        self.comm.move(send_counts, recv_counts)
        return Route(send_counts, recv_counts)

    def _told_route(self, send_counts: Counts, recv_counts: Counts, hops: list[Hop]) -> Route:
        return Route(send_counts, recv_counts)

    def _send(self, rows: Array, route: Route) -> Array:
        out = empty_rows(int(route.recv_counts.sum()), rows)
        self.comm.move(rows, out, route.send_counts, route.recv_counts)
        return out

    def _send_back(self, rows: Array, route: Route) -> Array:
        # The way back is the way of the reversed route: there are no hops to undo.
        return self._send(rows, Route(route.recv_counts, route.send_counts))
