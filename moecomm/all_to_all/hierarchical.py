"""The hierarchical all-to-all of DeepSpeed-MoE: first inside the node, then between nodes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np

from moecomm.all_to_all.base import AllToAll, Hop, Route, agreed_nodes
from moecomm.arrays import Array, Counts, copy_blocks, copy_rows, empty_rows, zeros
from moecomm.comm import Comm, CommLike
from moecomm.failures import collective
from moecomm.nodes import Nodes
from moecomm.transports import as_comm

Step: TypeAlias = Callable[[Array, Array], None]
"""(src, dst): a layout transform or an exchange of equal blocks."""


class HierarchicalAllToAll(AllToAll):
    """Two hops instead of one: (G - 1) + (p/G - 1) messages a rank instead of p - 1, with G ranks a node.

    A row for local rank l of another node goes first to this node's local rank l (layout transform, all-to-all inside
    the node), and from there straight to its destination (layout transform, all-to-all among the ranks of equal local
    rank). The bytes between nodes stay those of the flat all-to-all; what is new is a copy inside the node.

    comm   an mpi4py communicator, a torch ProcessGroup or a moecomm Comm
    nodes  the partition of its ranks into nodes, the same on every rank; None: the nodes found by Nodes.discover

    Nodes may be of any size and placed in any order. Where sizes differ, the forwarder to local rank l is local rank
    l mod (size of the source's node), and the second hop runs among all ranks that so come to share a destination.
    A hop of one rank is left out: one node, or nodes of one rank, make a flat all-to-all.

    Memory beside input and output, with nodes of one size: even form, one copy of x (`out` is used as scratch); uneven
    form, two buffers of max(rows given, forwarded, returned) rows. With nodes of several sizes the even form needs what
    the uneven form does. Counts take 8 (p + G^2 + p/G) bytes more.

    The constructor is collective over comm and splits it once for each hop; nothing is split later. In the uneven form
    each hop's counts go through that hop's own group, in one small equal-block exchange.

    Raises ValueError on every rank if `nodes` is not a partition of comm's ranks or differs among them.
    Source: DeepSpeed-MoE (arXiv 2201.05596), section 5.3.
    """

    def __init__(self, comm: CommLike, nodes: Nodes | None = None) -> None:
        self.comm = as_comm(comm)
        with collective(type(self).__name__, self.comm):
            self.nodes = agreed_nodes(self.comm, nodes, type(self).__name__)
            forwarding = _Forwarding(self.nodes, self.comm.rank)
            self.local = self.comm.split(forwarding.node, key=self.comm.rank)
            """The ranks of this node."""
            self.cross = self.comm.split(forwarding.lane, key=self.comm.rank)
            """The ranks that the second hop runs among: of equal local rank, where nodes are of one size."""
        hops = [forwarding.hop_inside(self.local), forwarding.hop_between(self.cross)]
        self._hops = [hop for hop in hops if hop.comm.size > 1]
        self._order_by_source = forwarding.order_by_source()
        self._blocks_are_equal = all(hop.blocks_are_equal() for hop in self._hops)
        self._even_steps = self._steps()
        self._even_route = self._route_of_ones()

    # ---- even form -------------------------------------------------------------------------------------------------

    def _steps(self) -> list[Step]:
        """The even form as a chain of steps; layout transforms that change nothing are left out."""
        steps: list[Step] = []
        for hop in self._hops:
            if not _is_sorted(hop.order):
                steps.append(_transform(hop.order))
            steps.append(hop.comm.move)
        if not _is_sorted(self._order_by_source):
            steps.append(_transform(self._order_by_source))
        if not steps:
            # One rank: the blocks are copied to out all the same.
            steps.append(_copy)
        return steps

    def _even(self, x: Array, out: Array) -> None:
        if not self._blocks_are_equal:
            # Nodes of several sizes: forwarders carry different numbers of blocks, as in the uneven form.
            self._send_into(x, self._even_route, out)
            return
        # Steps write to out and scratch in turn, such that the last one writes to out.
        scratch = empty_rows(x.shape[0], x) if len(self._even_steps) > 1 else out
        src = x
        steps_left = len(self._even_steps)
        for step in self._even_steps:
            dst = out if steps_left % 2 == 1 else scratch
            step(src, dst)
            src = dst
            steps_left -= 1

    # ---- uneven form -----------------------------------------------------------------------------------------------

    def _route(self, send_counts: Counts) -> Route:
        received, hops = self._tell(send_counts.reshape(-1, 1))
        return Route(send_counts, received[:, 0], tuple(Hop(*(numbers[:, 0] for numbers in hop)) for hop in hops))

    def _tell(self, numbers: Array) -> tuple[Array, list[tuple[Array, Array, Array]]]:
        hops = []
        for hop in self._hops:
            after, to_ranks, from_ranks = hop.exchange_numbers(numbers)
            hops.append((numbers, to_ranks, from_ranks))
            numbers = after
        return numbers[self._order_by_source], hops

    def _told_route(self, send_counts: Counts, recv_counts: Counts, hops: list[Hop]) -> Route:
        return Route(send_counts, recv_counts, tuple(hops))

    def _route_of_ones(self) -> Route:
        """Of blocks of one row, which need not be exchanged to be known."""
        sizes = np.ones(self.comm.size, np.int64)
        hops = []
        for hop in self._hops:
            hops.append(Hop(np.ones(len(hop.order), np.int64), hop.send_blocks, hop.recv_blocks))
            sizes = np.ones(int(hop.recv_blocks.sum()), np.int64)
        return Route(np.ones(self.comm.size, np.int64), sizes[self._order_by_source], tuple(hops))

    def _check_route(self, route: Route) -> None:
        if len(route.hops) != len(self._hops):
            raise TypeError(
                f"route has {len(route.hops)} hops, expected {len(self._hops)}, as of this all-to-all's own"
            )

    def _send(self, rows: Array, route: Route) -> Array:
        return self._send_into(rows, route, None)

    def _send_into(self, rows: Array, route: Route, out: Array | None) -> Array:
        """out: where the result goes, or None for a new array."""
        ends_with_hop = bool(self._hops) and _is_sorted(self._order_by_source)
        last = len(self._hops) - 1
        for number, (hop, counts) in enumerate(zip(self._hops, route.hops, strict=True)):
            packed = _reordered(rows, hop.order, counts.sizes)
            # Dropped as soon as possible: at most two buffers live at a time.
            del rows
            if number == last and ends_with_hop and out is not None:
                rows = out
            else:
                rows = empty_rows(int(counts.recv_counts.sum()), packed)
            hop.comm.move(packed, rows, counts.send_counts, counts.recv_counts)
            del packed
        if ends_with_hop:
            return rows
        sizes = route.recv_counts[_inverse(self._order_by_source)]
        return _copied(rows, self._order_by_source, sizes, out)

    def _send_back(self, rows: Array, route: Route) -> Array:
        if not self._hops:
            return _copied(rows, self._order_by_source, route.recv_counts, None)
        rows = _reordered(rows, _inverse(self._order_by_source), route.recv_counts)
        for hop, counts in zip(reversed(self._hops), reversed(route.hops), strict=True):
            unpacked = empty_rows(int(counts.send_counts.sum()), rows)
            hop.comm.move(rows, unpacked, counts.recv_counts, counts.send_counts)
            rows = _reordered(unpacked, _inverse(hop.order), counts.sizes[hop.order])
        return rows

    def _free(self) -> None:
        self.local.free()
        self.cross.free()


@dataclass(frozen=True)
class _Hop:
    """One exchange of blocks among the ranks of `comm`. A block is what one source has for one destination."""

    comm: Comm
    order: Counts  # [blocks here before the hop] the order in which they are sent: by receiver
    send_blocks: Counts  # [comm.size] how many of them go to each rank
    recv_blocks: Counts  # [comm.size] how many come from each rank
    widest: int  # the most blocks that any rank of comm sends to any other
    sent_cells: Counts = field(init=False)  # [blocks sent] where each is in an array of `widest` for each rank
    received_cells: Counts = field(init=False)  # [blocks received] the same

    def __post_init__(self) -> None:
        for name, num_blocks in (("sent_cells", self.send_blocks), ("received_cells", self.recv_blocks)):
            object.__setattr__(self, name, np.flatnonzero(np.arange(self.widest) < num_blocks[:, None]))

    def blocks_are_equal(self) -> bool:
        counts = {*self.send_blocks.tolist(), *self.recv_blocks.tolist()}
        return len(counts) == 1

    def exchange_numbers(self, numbers: Array) -> tuple[Array, Array, Array]:
        """numbers [blocks, C] of the blocks here before the hop, such as their sizes. Collective.

        Returns those of the blocks here after the hop, and their sums over the blocks to and from each rank.

        Each rank sends each other rows of numbers, padded to the same length: one small exchange of equal blocks.
        """
        num_columns = numbers.shape[1]
        send = zeros((self.comm.size * self.widest, num_columns), "int64", numbers)
        send[self.sent_cells] = numbers[self.order]
        recv = empty_rows(len(send), send)
        self.comm.move(send, recv)
        by_rank = (self.comm.size, self.widest, num_columns)
        # What pads the rows is 0, so they can be summed.
        return recv[self.received_cells], send.reshape(by_rank).sum(1), recv.reshape(by_rank).sum(1)


class _Forwarding:
    """Who forwards what, seen from one rank: plain arithmetic on the nodes.

    The forwarder from node n to a destination of local rank l is local rank l mod (size of n). A block is named by its
    source and its destination; the blocks here are, in this order,
      before hop one    (rank, d) for all d
      after hop one     (s, d) for s in this node, for d in `forwards[node][local]`
      after hop two     (s, rank) for each node's forwarder to here, by rank, for s in that node
    """

    def __init__(self, nodes: Nodes, rank: int) -> None:
        self.nodes = nodes
        self.rank = rank
        self.node = int(nodes.node_of[rank])
        self.local = int(nodes.local_rank[rank])
        self._lanes = _lanes(nodes.sizes())
        self.lane = self._lanes[self.local]

    def forwarded(self, node: int, local: int) -> Counts:
        """The destinations that local rank `local` of `node` forwards to, ascending."""
        return np.flatnonzero(self.nodes.local_rank % len(self.nodes.ranks[node]) == local)

    def hop_inside(self, comm: Comm) -> _Hop:
        """Each rank of the node gets the blocks that it will forward, from all of them alike."""
        ranks_per_node = comm.size
        forwarder = self.nodes.local_rank % ranks_per_node  # [p] of each destination
        order = np.argsort(forwarder, kind="stable")
        send_blocks = np.bincount(forwarder, minlength=ranks_per_node)
        recv_blocks = np.full(ranks_per_node, send_blocks[self.local])
        return _Hop(comm, order, send_blocks, recv_blocks, widest=int(send_blocks.max()))

    def hop_between(self, comm: Comm) -> _Hop:
        """A forwarder sends each destination one block from each rank of its node."""
        ranks_per_node = len(self.nodes.ranks[self.node])
        lane_of_rank = np.array(self._lanes)[self.nodes.local_rank]
        members = np.flatnonzero(lane_of_rank == self.lane)
        destinations = self.forwarded(self.node, self.local)
        # The blocks here are ordered by source and then destination; they are sent by destination and then source.
        by_source = np.arange(ranks_per_node * len(destinations)).reshape(ranks_per_node, len(destinations))
        order = by_source.T.reshape(-1)
        send_blocks = np.where(np.isin(members, destinations), ranks_per_node, 0)
        recv_blocks = np.array([self._blocks_from(rank) for rank in members.tolist()], np.int64)
        return _Hop(comm, order, send_blocks, recv_blocks, widest=int(self.nodes.sizes().max()))

    def order_by_source(self) -> Counts:
        """The order that sorts the blocks after hop two by their source."""
        sources: list[int] = []
        for rank in range(self.nodes.world_size):
            if self._blocks_from(rank):
                node = self.nodes.node_of[rank]
                sources += self.nodes.ranks[node]
        return np.argsort(sources, kind="stable")

    def _blocks_from(self, rank: int) -> int:
        """How many blocks `rank` sends here in hop two: one for each rank of its node if it forwards to here."""
        ranks_per_node = len(self.nodes.ranks[self.nodes.node_of[rank]])
        is_forwarder = self.local % ranks_per_node == self.nodes.local_rank[rank]
        return ranks_per_node if is_forwarder else 0


def _lanes(sizes: Counts) -> list[int]:
    """[largest node] the lane of each local rank: local ranks that the second hop joins have the same.

    Each node of size G joins l and l mod G. Nodes of one size: lane = local rank.
    """
    lanes = list(range(int(sizes.max())))
    for size in sorted(set(sizes.tolist())):
        for local in range(len(lanes)):
            # Joining two local ranks joins all that were joined to either, as in a union of sets.
            pair = {lanes[local], lanes[local % size]}
            lanes = [min(pair) if lane in pair else lane for lane in lanes]
    return lanes


def _transform(order: Counts) -> Step:
    return lambda src, dst: copy_blocks(dst, src, order)


def _copy(src: Array, dst: Array) -> None:
    copy_rows(dst, src)


def _is_sorted(order: Counts) -> bool:
    return bool((order == np.arange(len(order))).all())


def _inverse(order: Counts) -> Counts:
    return np.argsort(order)


def _reordered(rows: Array, order: Counts, sizes: Counts) -> Array:
    # Most hops of nodes in blocks need no transform: then the rows themselves are sent.
    return rows if _is_sorted(order) else _copied(rows, order, sizes, None)


def _copied(rows: Array, order: Counts, sizes: Counts, out: Array | None) -> Array:
    if out is None:
        out = empty_rows(rows.shape[0], rows)
    copy_blocks(out, rows, order, sizes)
    return out
