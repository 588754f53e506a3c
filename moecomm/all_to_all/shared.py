"""The all-to-all of few messages: the ranks of a node gather their rows in shared memory, and leaders exchange them."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from moecomm._core import Event, NodeRing, RingLayout, Transfer
from moecomm.all_to_all.base import AllToAll, Route, agreed_nodes
from moecomm.all_to_all.streams import NodeCounts, Streams
from moecomm.arrays import Array, Counts, as_bytes, empty_rows, is_torch, on_host, row_bytes
from moecomm.comm import Comm, CommLike, Started
from moecomm.errors import CommError
from moecomm.failures import collective, refused
from moecomm.nodes import Nodes
from moecomm.shared_memory import NUM_SLOTS, chunk_bytes, shared_memory
from moecomm.transports import as_comm

SPIN_US = 50
"""How long a waiting rank polls before it sleeps, where each rank of the node has a core of its own."""

PAUSE = 100e-6
"""Seconds between two polls of a leader whose exchange is under way, where ranks share cores."""

PATIENCE_US = 20_000
"""How long a rank sleeps before it lets the transport make progress and looks for ranks that have ended."""

MOST_CORES = 4096
"""Cores of a machine that are told apart; higher numbers are taken modulo this."""

MOST_TRANSFERS = 32
"""Transfers that are cached for the same counts, one for each row size."""


class SharedAllToAll(AllToAll):
    """One message from a node to each other node, and none inside: p/G - 1 a node instead of G (p - 1).

    The G ranks of a node copy their rows into memory that they share. One of them, a leader, exchanges them with the
    leaders of the other nodes; then every rank copies its rows out. More than 2 MiB for a node goes in chunks: while
    some are exchanged, the next is copied in and an earlier one is copied out.

    comm     an mpi4py communicator, a torch ProcessGroup or a moecomm Comm
    nodes    the partition of its ranks into nodes, the same on every rank; None: the nodes found by Nodes.discover
    leaders  how many ranks of each node exchange chunks, in turn: 1 .. ranks of the smallest node

    Rows must be in host memory. A rank that waits sleeps: where ranks share cores, those that have work get them.

    Memory beside input and output: 4 (2 p/G - 1) chunks a node, 64 MiB at most (more than 2048 nodes: more). Uneven
    form: the counts of the node too, 16 p G bytes a rank.

    The constructor is collective over comm and splits it twice. In the uneven form the counts are exchanged like the
    rows, through the shared memory and the leaders.

    Raises ValueError on every rank if an argument is wrong or differs among them, and CommError on every rank if the
    ranks of some node cannot share memory (other systems than Linux, containers of one rank each).
    Source: the hierarchical all-to-all of DeepSpeed-MoE (arXiv 2201.05596), section 5.3, its hop inside the node as a
    copy.
    """

    def __init__(self, comm: CommLike, nodes: Nodes | None = None, *, leaders: int = 1) -> None:
        self.comm = as_comm(comm)
        with collective(type(self).__name__, self.comm):
            self.nodes = agreed_nodes(self.comm, nodes, type(self).__name__)
            self._check_leaders(leaders)
            self.leaders = leaders
            self._streams = Streams(self.nodes, self.comm.rank)
            local = self._streams.local
            self._node_comm = self.comm.split(self._streams.node, key=local)
            # Leader i of each node exchanges with leader i of every other; ordered by node, as message sizes are.
            # The ranks that lead nothing form one more group, which nobody uses.
            self._leader_comm = self.comm.split(
                min(local, leaders), key=self._streams.node if local < leaders else None
            )
            self._ring = self._make_ring()
            # In the even form a row is a block: one from every rank to every rank.
            ones = np.ones((self._streams.num_local, self.comm.size), np.int64)
            self._even_counts = NodeCounts(ones, ones.T, int(self.nodes.sizes().max()) ** 2)
            self._reports = self._streams.transfer_of_reports(self._chunk_bytes)

    def _check_leaders(self, leaders: int) -> None:
        self.comm.agree(f"{type(self).__name__}: leaders", repr(leaders))
        smallest = int(self.nodes.sizes().min())
        if not isinstance(leaders, int) or not 1 <= leaders <= smallest:
            raise refused(
                ValueError(
                    f"{type(self).__name__}: leaders is {leaders!r}, expected 1 .. {smallest}, the ranks of the "
                    f"smallest node{self.comm.where()}"
                )
            )

    def _make_ring(self) -> NodeRing:
        """Collective."""
        num_ranks = self._streams.num_local
        num_nodes = len(self.nodes)
        self._chunk_bytes = chunk_bytes(num_nodes)
        layout = RingLayout(num_ranks, num_nodes, NUM_SLOTS, self.leaders, self._chunk_bytes)
        memory = shared_memory(self._node_comm, layout.num_bytes)
        # All ranks of all nodes must give up together: those of the other nodes would wait for this one's leader.
        on_all_nodes = self.comm.all_gather(np.array([memory is not None])).all()
        if memory is None or not on_all_nodes:
            self._node_comm.free()
            self._leader_comm.free()
            raise refused(CommError(f"{type(self).__name__}: the ranks of a node share no memory{self.comm.where()}"))
        self._memory = memory
        # Polling is faster than sleeping only for a rank that takes no core from a rank with work to do.
        has_core = _num_cores(self._node_comm) >= num_ranks
        self._pause = 0.0 if has_core else PAUSE
        return NodeRing(memory, layout, self._streams.local, self._streams.node, SPIN_US if has_core else 0)

    def _even_arguments(self, x: Array, out: Array | None) -> tuple[Array, Array | None]:
        _check_on_host(x, "x")
        return super()._even_arguments(x, out)

    def _rows_arguments(self, rows: Array, send_counts: Sequence[int] | Counts) -> tuple[Array, Counts]:
        _check_on_host(rows, "rows")
        return super()._rows_arguments(rows, send_counts)

    def _even(self, x: Array, out: Array) -> None:
        self._run(self._transfer(self._even_counts, row_bytes(x)), x, out)

    def _route(self, send_counts: Counts) -> Route:
        reports = np.empty(self._reports.recv_bytes // 8, np.int64)
        self._run(self._reports, self._streams.report(send_counts), reports)
        counts, num_rows = self._streams.read_reports(reports)
        recv_counts = counts.received[:, self._streams.local].copy()
        return SharedRoute(send_counts, recv_counts, counts=counts, num_rows=num_rows)

    def _check_route(self, route: Route) -> None:
        if not isinstance(route, SharedRoute):
            raise TypeError(f"route is a {type(route).__name__}, expected one of {type(self).__name__}")

    def _send(self, rows: Array, route: Route) -> Array:
        assert isinstance(route, SharedRoute)
        return self._send_counted(rows, route.counts, route.recv_counts)

    def _send_back(self, rows: Array, route: Route) -> Array:
        assert isinstance(route, SharedRoute)
        return self._send_counted(rows, route.counts.reversed, route.send_counts)

    def _send_counted(self, rows: Array, counts: NodeCounts, recv_counts: Counts) -> Array:
        out = empty_rows(int(recv_counts.sum()), rows)
        self._run(self._transfer(counts, row_bytes(rows)), rows, out)
        return out

    def _transfer(self, counts: NodeCounts, width: int) -> Transfer:
        """The transfer of rows of `width` bytes, from the cache of these counts."""
        transfers = counts.transfers
        if width not in transfers:
            if len(transfers) >= MOST_TRANSFERS:
                transfers.clear()
            transfers[width] = self._streams.transfer(counts, width, self._chunk_bytes)
        return transfers[width]

    def _run(self, transfer: Transfer, src: Array, dst: Array) -> None:
        ring = self._ring
        call = type(self).__name__
        exchanges: deque[Started] = deque()
        began = time.monotonic()
        try:
            ring.begin(transfer, as_bytes(src), as_bytes(dst))
            while (event := ring.step(PATIENCE_US)) != Event.finished:
                if event == Event.start_exchange:
                    exchanges.append(self._start())
                elif event == Event.finish_exchange:
                    # The ring asks for its exchanges in the order in which they were started.
                    self._finish(exchanges.popleft(), began)
                elif event == Event.failed:
                    # The transport may know more, such as which rank has ended; then this raises.
                    self.comm.waiting(call, 0.0)
                    raise CommError(f"{call}: another rank of this node has failed in it{self.comm.where()}")
                else:
                    self.comm.waiting(call, time.monotonic() - began, self._missing)
                    # A rank of another node may wait for a message that this rank sent before this call.
                    self.comm.progress()
        except BaseException:
            # The other ranks of the node sleep until this one writes or reads its rows, which it never will.
            ring.fail()
            raise

    def _start(self) -> Started:
        outgoing, incoming, to_node, from_node = self._ring.exchange()
        rows = self._memory[outgoing : outgoing + sum(to_node)]
        out = self._memory[incoming : incoming + sum(from_node)]
        return self._leader_comm.start(rows, out, np.array(to_node), np.array(from_node))

    def _finish(self, exchange: Started, began: float) -> None:
        while not exchange.done():
            self._leader_comm.waiting(type(self).__name__, time.monotonic() - began)
            time.sleep(self._pause)

    def _missing(self) -> list[int]:
        """The ranks of this node that have not begun the transfer that this rank has begun."""
        node = self.nodes.ranks[self._streams.node]
        return [node[local] for local in self._ring.missing()]

    def _free(self) -> None:
        self._node_comm.free()
        self._leader_comm.free()
        del self._ring, self._memory


@dataclass(frozen=True, eq=False)
class SharedRoute(Route):
    """A route through shared memory."""

    counts: NodeCounts = field(kw_only=True)
    num_rows: int = field(kw_only=True)
    """Rows of all ranks together."""


def _check_on_host(rows: Array, name: str) -> None:
    if is_torch(rows) and not on_host(rows):
        raise TypeError(f"{name} is on {rows.device}, expected rows in host memory, which the ranks of a node share")


def _num_cores(comm: Comm) -> int:
    """How many cores the ranks of comm may run on, together. Collective."""
    may_use = np.zeros((1, MOST_CORES), np.uint8)
    may_use[0, [core % MOST_CORES for core in os.sched_getaffinity(0)]] = 1
    return int(comm.all_gather(may_use).any(axis=0).sum())
