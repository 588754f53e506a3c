"""The all-to-all through shared memory gives the flat one's bytes, in one message from a node to each other node."""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from conftest import LIMIT, PROGRAMS, gloo_run, mpi_run, mpirun

from moecomm import AutoAllToAll, Comm, CommError, FlatAllToAll, Nodes, shared_memory, testing
from moecomm._core import Event, NodeRing, RingLayout, Transfer
from moecomm.all_to_all import SharedAllToAll, shared, streams
from moecomm.transports import threads
from moecomm.transports.wrappers import Timed


def use_chunks_of(num_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """So small that a transfer takes many and slots are used again and again."""
    monkeypatch.setattr(shared, "chunk_bytes", lambda num_nodes: num_bytes)


def partitions(p: int) -> Iterator[Nodes]:
    """One node, nodes of one, blocks (ragged where the size does not divide p), cyclic, and any sizes in any places."""
    yield Nodes.of_size(p, p)
    yield Nodes.of_size(1, p)
    for size in (2, 8, int(p**0.5)):
        yield Nodes.of_size(size, p)
    yield Nodes([range(first, p, 3) for first in range(min(3, p))])
    labels = np.random.default_rng(p).integers(0, 4, p)
    yield Nodes([np.flatnonzero(labels == label) for label in set(labels.tolist())])


RAGGED = (
    [[0]],
    [[0, 1, 2, 3]],
    [[0], [1], [2]],
    [[0, 2], [1, 3]],
    [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]],
    [[0, 3, 5], [1], [2, 4, 6, 7]],
    [[0, 5], [1, 4], [2, 3]],  # the second ranks of the nodes are in reverse order
)


# ---- the rows are right --------------------------------------------------------------------------------------------


SIZES = [*range(1, 20), *(pytest.param(p, marks=pytest.mark.slow) for p in (24, 33, 64))]


@pytest.mark.parametrize("p", SIZES)
def test_bit_equal_to_flat(p: int, monkeypatch: pytest.MonkeyPatch) -> None:
    use_chunks_of(64 if p % 2 else 4096, monkeypatch)
    counts = list(testing.count_matrices(p))[2 + p % 4]

    def body(comm: Comm) -> None:
        rng = np.random.default_rng([p, comm.rank])
        flat = FlatAllToAll(comm)
        x = rng.random((p, 3)).astype(np.float32)
        rows = rng.random((int(counts[comm.rank].sum()), 2))
        wanted, (wanted_rows, wanted_counts) = flat(x), flat.rows(rows, counts[comm.rank])
        for nodes in partitions(p):
            with SharedAllToAll(comm, nodes) as a2a:
                assert a2a(x).tobytes() == wanted.tobytes(), nodes
                got, got_counts = a2a.rows(rows, counts[comm.rank])
                assert got.tobytes() == wanted_rows.tobytes(), nodes
                assert (got_counts == wanted_counts).all(), nodes

    threads.run(p, body)


@pytest.mark.parametrize("chunk_bytes", [64, 192, 1 << 20])
@pytest.mark.parametrize("nodes", RAGGED, ids=str)
def test_conformance(nodes: list[list[int]], chunk_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    use_chunks_of(chunk_bytes, monkeypatch)
    partition = Nodes(nodes)
    for leaders in range(1, int(partition.sizes().min()) + 1):
        algorithm = lambda comm, leaders=leaders: SharedAllToAll(comm, partition, leaders=leaders)  # noqa: E731
        testing.check_all_to_all(threads.run, algorithm, sizes=(partition.world_size,))


@pytest.mark.slow
def test_random_transfers_over_random_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each world makes several all-to-alls over different nodes and calls them in any order."""
    use_chunks_of(64, monkeypatch)
    for world in range(12):
        p = int(np.random.default_rng(world).integers(1, 10))
        threads.run(p, lambda comm, world=world: random_transfers(comm, seed=world, rounds=60))


def random_transfers(comm: Comm, seed: int, rounds: int) -> None:
    """All ranks draw the same."""
    rng = np.random.default_rng(seed)
    p = comm.size
    several = []
    for _ in range(3):
        labels = rng.integers(0, rng.integers(1, p + 1), p)
        nodes = Nodes([np.flatnonzero(labels == label) for label in set(labels.tolist())])
        several.append(SharedAllToAll(comm, nodes, leaders=int(rng.integers(1, nodes.sizes().min() + 1))))
    flat = FlatAllToAll(comm)
    routes = []
    for round in range(rounds):
        a2a = several[rng.integers(3)]
        most, share = rng.choice([1, 4, 30]), rng.choice([0.1, 0.5, 1.0])
        counts = rng.integers(0, most + 1, (p, p)) * (rng.random((p, p)) < share)
        values = rng.integers(0, 256, (p, counts.sum(1).max(initial=0), rng.integers(0, 9)), np.uint8)
        rows = values[comm.rank, : counts[comm.rank].sum()]
        wanted, wanted_counts = flat.rows(rows, counts[comm.rank])
        route = a2a.route(counts[comm.rank])
        got = a2a.send(rows, route)
        assert (route.recv_counts == wanted_counts).all(), (seed, round)
        assert np.array_equal(got, wanted), (seed, round)
        routes.append((a2a, route, rows, wanted))
        if rng.random() < 0.5:
            a2a, route, rows, wanted = routes[rng.integers(len(routes))]
            assert np.array_equal(a2a.send_back(wanted, route), rows), (seed, round)
        if rng.random() < 0.3:
            x = rng.integers(0, 256, (p, p, 5))[comm.rank]
            assert np.array_equal(several[rng.integers(3)](x), flat(x)), (seed, round)
    for a2a in several:
        a2a.free()


def test_counters_may_wrap(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slot's counters are 32 bits wide: here they come to 2**32 after two more uses."""
    use_chunks_of(64, monkeypatch)
    nodes = Nodes([[0, 1, 2], [3, 4]])
    uses = 2**32 - 2

    def body(comm: Comm) -> None:
        a2a = SharedAllToAll(comm, nodes, leaders=2)
        none, nothing = np.zeros(2, np.int64), np.zeros(0, np.uint8)
        side = (none, none, np.zeros((0, 3), np.int64), 0)
        before = Transfer(*side, *side, 1, 64, uses * shared.NUM_SLOTS)  # as if it had been done
        a2a._ring.begin(before, nothing, nothing)
        num_ranks = len(nodes.ranks[nodes.node_of[comm.rank]])
        lines = a2a._memory[64 : 64 * (1 + 3 * shared.NUM_SLOTS)].view(np.uint32).reshape(shared.NUM_SLOTS, 3, 16)
        if nodes.local_rank[comm.rank] == 0:
            lines[:, :, 0] = np.array([num_ranks * uses, uses, num_ranks * uses]) % 2**32
        comm.barrier()
        for round in range(3):
            x = np.random.default_rng([round, comm.rank]).integers(0, 256, (5, 40), np.uint8)
            assert np.array_equal(a2a(x), FlatAllToAll(comm)(x))
        assert (lines[:, 1, 0] < 100).all(), "the counters have not wrapped"

    threads.run(5, body)


def test_torch_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    use_chunks_of(64, monkeypatch)
    algorithm = lambda comm: SharedAllToAll(comm, Nodes.of_size(2, comm.size))  # noqa: E731
    testing.check_all_to_all(threads.run, algorithm, sizes=(1, 4, 5), make=torch.from_numpy)

    def body(comm: Comm) -> None:
        a2a = algorithm(comm)
        x = (torch.arange(comm.size * 3).reshape(3, comm.size) + 100 * comm.rank).bfloat16().T
        assert not x.is_contiguous()
        wanted = torch.stack([(torch.arange(3) * comm.size + comm.rank + 100 * s) for s in range(comm.size)]).bfloat16()
        y = a2a(x)
        assert y.dtype == torch.bfloat16
        assert torch.equal(y, wanted)
        rows, counts = a2a.rows(x, [1] * comm.size)
        assert torch.equal(rows, wanted)
        assert counts.tolist() == [1] * comm.size
        for call in (lambda: a2a(x.to("meta")), lambda: a2a.rows(x.to("meta"), [1] * comm.size)):
            with pytest.raises(TypeError, match="on meta, expected rows in host memory"):
                call()
        assert torch.equal(a2a(x), wanted)

    threads.run(6, body)


def test_rows_without_bytes_and_odd_inputs() -> None:
    def body(comm: Comm) -> None:
        a2a = SharedAllToAll(comm, Nodes.of_size(2, 4))
        rows, counts = a2a.rows(np.zeros((6, 0, 3), np.float32), [3, 1, 0, 2])
        assert rows.shape == (4 * [3, 1, 0, 2][comm.rank], 0, 3)
        assert counts.tolist() == [[3, 1, 0, 2][comm.rank]] * 4
        x = np.broadcast_to(np.float64(comm.rank), (4, 5))  # read-only and not contiguous
        assert np.array_equal(a2a(x), np.arange(4.0)[:, None].repeat(5, axis=1))
        assert a2a(np.full(4, "rank"))[3] == "rank"
        for row_bytes in range(1, 3 * shared.MOST_TRANSFERS):  # more sizes than are kept
            assert (a2a(np.full((4, row_bytes), comm.rank, np.uint8))[:, -1] == np.arange(4)).all()

    threads.run(4, body)


@pytest.mark.mpi(min_size=4)
@pytest.mark.parametrize("ranks_per_node", [1, 2, 3, 8])
def test_conformance_over_mpi(ranks_per_node: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from mpi4py import MPI

    for chunk_bytes, limit in ((1 << 20, LIMIT), (1 << 20, None), (64, None)):
        use_chunks_of(chunk_bytes, monkeypatch)

        def body(comm: Comm) -> None:
            nodes = Nodes.of_size(ranks_per_node, comm.size)
            for leaders in {1, int(nodes.sizes().min())}:
                with SharedAllToAll(comm, nodes, leaders=leaders) as a2a:
                    testing.check_all_to_all_on(comm, a2a)

        for size in {4: (1, 2, 3, 4), 8: (5, 8)}.get(MPI.COMM_WORLD.size, (MPI.COMM_WORLD.size,)):
            mpi_run(size, body, limit)


@pytest.mark.mpi(min_size=4)
def test_random_transfers_over_mpi(monkeypatch: pytest.MonkeyPatch) -> None:
    from mpi4py import MPI

    use_chunks_of(64, monkeypatch)
    for seed in range(6):
        mpi_run(MPI.COMM_WORLD.size, lambda comm, seed=seed: random_transfers(comm, seed, rounds=100), None)


def test_conformance_over_gloo() -> None:
    torch = pytest.importorskip("torch")

    def body(comm: Comm) -> None:
        for nodes, leaders in ((Nodes.discover(comm), 4), (Nodes([[0, 2], [1, 3]]), 1), (Nodes.of_size(2, 4), 2)):
            with SharedAllToAll(comm, nodes, leaders=leaders) as a2a:
                testing.check_all_to_all_on(comm, a2a, make=torch.from_numpy)

    gloo_run(4, body)


# ---- which bytes go where, against the definition ------------------------------------------------------------------


class Recorded(NamedTuple):
    """What a Transfer is told."""

    send_totals: Any
    send_num_pieces: Any
    send_pieces: Any
    send_rows: int
    recv_totals: Any
    recv_num_pieces: Any
    recv_pieces: Any
    recv_rows: int
    row_bytes: int
    window: int
    num_chunks: int


def carried(nodes: Nodes, transfers: list[Recorded], given: list[list[Any]]) -> tuple[list[list[Any]], dict[Any, Any]]:
    """Carry out the transfers of all ranks, row by row: what each rank gets, and the streams by (from, to)."""
    contents: dict[tuple[int, int], list[Any]] = {}
    for a in range(len(nodes)):
        for b in range(len(nodes)):
            lengths = {int(transfers[rank].send_totals[b]) for rank in nodes.ranks[a]}
            lengths |= {int(transfers[rank].recv_totals[a]) for rank in nodes.ranks[b]}
            assert len(lengths) == 1, "the ranks do not agree on the length of a stream"
            contents[a, b] = [None] * lengths.pop()
    for rank, transfer in enumerate(transfers):
        assert len(given[rank]) == transfer.send_rows
        pieces = iter(transfer.send_pieces.tolist())
        for b, num_pieces in enumerate(transfer.send_num_pieces.tolist()):
            stream = contents[int(nodes.node_of[rank]), b]
            for _ in range(num_pieces):
                start, num_rows, local = next(pieces)
                for i in range(num_rows):
                    assert stream[start + i] is None, "two pieces lie over each other"
                    stream[start + i] = given[rank][local + i]
    got = []
    for rank, transfer in enumerate(transfers):
        rows: list[Any] = [None] * transfer.recv_rows
        pieces = iter(transfer.recv_pieces.tolist())
        for a, num_pieces in enumerate(transfer.recv_num_pieces.tolist()):
            for _ in range(num_pieces):
                start, num_rows, local = next(pieces)
                for i in range(num_rows):
                    assert rows[local + i] is None, "a row is written twice"
                    rows[local + i] = contents[a, int(nodes.node_of[rank])][start + i]
        got.append(rows)
    return got, contents


MANY_NODES = [*map(Nodes, RAGGED), *partitions(7), *partitions(12)]


@pytest.mark.parametrize("nodes", MANY_NODES, ids=str)
def test_streams_are_ordered_by_destination_then_source(nodes: Nodes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "Transfer", Recorded)
    p = nodes.world_size
    for counts in testing.count_matrices(p):
        longest = max(counts[np.ix_(a, b)].sum() for a in nodes.ranks for b in nodes.ranks)
        ways, ways_back = [], []
        for rank in range(p):
            node = list(nodes.ranks[nodes.node_of[rank]])
            of_node = streams.NodeCounts(counts[node], counts[:, node], int(longest))
            here = streams.Streams(nodes, rank)
            ways.append(here.transfer(of_node, 24, 128))
            ways_back.append(here.transfer(of_node.reversed, 24, 128))
        rows = [list(map(tuple, testing.sent_rows(counts, rank).tolist())) for rank in range(p)]
        wanted = [list(map(tuple, testing.received_rows(counts, rank).tolist())) for rank in range(p)]
        got, contents = carried(nodes, ways, rows)
        assert got == wanted
        for (a, b), stream in contents.items():
            blocks = [(s, d) for d in nodes.ranks[b] for s in nodes.ranks[a]]
            assert stream == [(s, d, i) for s, d in blocks for i in range(counts[s, d])]
        assert carried(nodes, ways_back, wanted)[0] == rows
        for rank, way in enumerate(ways):
            check_chunks(nodes, rank, way, {pair: 24 * len(stream) for pair, stream in contents.items()})


def check_chunks(nodes: Nodes, rank: int, recorded: Recorded, stream_bytes: dict[tuple[int, int], int]) -> None:
    num_chunks, window, here = recorded.num_chunks, recorded.window, int(nodes.node_of[rank])
    assert window % 64 == 0
    assert 64 <= window <= 128
    assert num_chunks == -(-max(stream_bytes.values()) // 128)
    layout = RingLayout(num_ranks=1, num_nodes=len(nodes), num_slots=4, num_leaders=1, window=128)
    ring = NodeRing(np.zeros(layout.num_bytes, np.uint8), layout, local_rank=0, node=here, spin_us=0)
    transfer = Transfer(*recorded)
    src, dst = np.zeros(24 * recorded.send_rows, np.uint8), np.zeros(24 * recorded.recv_rows, np.uint8)
    ring.begin(transfer, src, dst)
    for chunk in range(num_chunks):
        while (event := ring.step(0)) == Event.finish_exchange:
            pass
        assert event == Event.start_exchange
        begin, end = chunk * window, (chunk + 1) * window
        _, _, sent, received = ring.exchange()
        for other in range(len(nodes)):
            there = other != here
            assert sent[other] == there * len(range(begin, min(end, stream_bytes[here, other])))
            assert received[other] == there * len(range(begin, min(end, stream_bytes[other, here])))


@pytest.mark.parametrize("nodes", MANY_NODES, ids=str)
def test_every_node_learns_its_counts(nodes: Nodes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "Transfer", Recorded)
    p = nodes.world_size
    every = [streams.Streams(nodes, rank) for rank in range(p)]
    for counts in testing.count_matrices(p):
        given = [here.report(counts[rank]).tolist() for rank, here in enumerate(every)]
        transfers = [here.transfer_of_reports(64) for here in every]
        assert all(t.window * t.num_chunks >= 8 * max(*t.send_totals, *t.recv_totals) for t in transfers)
        assert len({(t.window, t.num_chunks) for t in transfers}) == 1
        found, _ = carried(nodes, transfers, given)
        longest = set()
        for rank, here in enumerate(every):
            of_node, num_rows = here.read_reports(np.array(found[rank], np.int64))
            node = list(nodes.ranks[nodes.node_of[rank]])
            assert np.array_equal(of_node.sent, counts[node])
            assert np.array_equal(of_node.received, counts[:, node])
            assert num_rows == counts.sum()
            longest.add(of_node.longest)
        assert len(longest) == 1, "the ranks would go on for different numbers of chunks"
        assert longest.pop() >= max(counts[np.ix_(a, b)].sum() for a in nodes.ranks for b in nodes.ranks)


# ---- messages ------------------------------------------------------------------------------------------------------


def messages(comm: Comm, nodes: Nodes, leaders: int, row_bytes: int) -> list[np.ndarray]:
    """[p] messages and bytes to each rank, of one even call; messages of one uneven call and of its counts alone."""
    timed = Timed(comm)
    with SharedAllToAll(timed, nodes, leaders=leaders) as a2a:
        timed.clear()
        a2a(np.zeros((comm.size, row_bytes), np.uint8))
        none = np.zeros(comm.size, np.int64)
        even = timed.record.get("all_to_allv")
        found = [even.messages, even.bytes] if even else [none, none]
        timed.clear()
        route = a2a.route([1] * comm.size)
        for _ in range(2):
            found.append(timed.record["all_to_allv"].messages if "all_to_allv" in timed.record else none)
            timed.clear()
            a2a.send(np.zeros((comm.size, row_bytes), np.uint8), route)
        assert set(timed.record) <= {"all_to_allv"}, "something else was sent as well"
        return found


@pytest.mark.parametrize(("p", "G"), [(4, 2), (8, 2), (8, 4), (12, 3), (16, 4), (6, 6), (5, 1)])
@pytest.mark.parametrize("placement", ["blocks", "cyclic"])
def test_one_message_from_node_to_node(p: int, G: int, placement: str) -> None:  # noqa: N803
    N = p // G  # noqa: N806
    nodes = Nodes.of_size(G, p) if placement == "blocks" else Nodes([range(first, p, N) for first in range(N)])
    every = threads.run(p, lambda comm: messages(comm, nodes, leaders=1, row_bytes=5))
    for rank in range(p):
        is_leader = nodes.local_rank[rank] == 0
        to = [node[0] for node in nodes.ranks if rank not in node] if is_leader else []
        for found in (every[rank][0], *every[rank][2:]):
            assert np.flatnonzero(found).tolist() == to
            assert found.max(initial=0) <= 1
        assert every[rank][1].sum() == 5 * G * G * len(to)


def test_the_figure_at_64_ranks() -> None:
    """p = 64, G = 8: 7 messages a node; the flat one sends 8 * 63, 8 * 56 of them to other nodes."""
    every = threads.run(64, lambda comm: messages(comm, Nodes.of_size(8, 64), leaders=1, row_bytes=1))
    for kind in (0, 2, 3):
        assert [sum(int(every[rank][kind].sum()) for rank in range(n, n + 8)) for n in range(0, 64, 8)] == [7] * 8


@pytest.mark.parametrize("leaders", [1, 2, 3])
def test_a_message_a_chunk_and_leaders_take_turns(leaders: int, monkeypatch: pytest.MonkeyPatch) -> None:
    use_chunks_of(64, monkeypatch)
    nodes = Nodes.of_size(3, 9)
    every = threads.run(9, lambda comm: messages(comm, nodes, leaders, row_bytes=64))  # 9 blocks a stream: 9 chunks
    for rank in range(9):
        turns = len(range(rank % 3, 9, leaders)) if rank % 3 < leaders else 0
        wanted = [turns * (other % 3 == rank % 3 and other != rank) for other in range(9)]
        assert every[rank][0].tolist() == wanted
        assert every[rank][3].tolist() == wanted


def test_empty_pairs_are_not_sent() -> None:
    def body(comm: Comm) -> None:
        timed = Timed(comm)
        a2a = SharedAllToAll(timed, Nodes.of_size(4, 12))
        counts = [0] * 12
        counts[7] = 5 if comm.rank == 1 else 0
        route = a2a.route(counts)
        timed.clear()
        a2a.send(np.zeros((sum(counts), 2)), route)
        sent = np.flatnonzero(timed.record["all_to_allv"].messages).tolist() if comm.rank % 4 == 0 else []
        assert sent == ([4] if comm.rank == 0 else [])

    threads.run(12, body)


def test_the_groups_are_split_once() -> None:
    def body(comm: Comm) -> None:
        timed = Timed(comm)
        a2a = SharedAllToAll(timed, Nodes.of_size(3, 6))
        assert timed.record["split"].calls == 2
        a2a(np.zeros((6, 1)))
        a2a.rows(np.zeros((6, 1)), [1] * 6)
        assert timed.record["split"].calls == 2
        a2a.free()
        a2a.free()
        for call in (lambda: a2a(np.zeros((6, 1))), lambda: a2a.route([1] * 6)):
            with pytest.raises(CommError, match="SharedAllToAll: it was freed"):
                call()
        comm.barrier()

    threads.run(6, body)


# ---- the memory ----------------------------------------------------------------------------------------------------


def check_shared(comm: Comm) -> None:
    memory = shared_memory.shared_memory(comm, 10_000)
    assert memory is not None
    assert memory.shape == (10_000,)
    assert not memory.any()
    comm.barrier()
    memory[comm.rank :: comm.size] = comm.rank + 1
    comm.barrier()
    assert memory.tolist() == (list(range(1, comm.size + 1)) * 10_000)[:10_000]
    comm.barrier()


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def mapped_names() -> list[str]:
    return [line for line in Path("/proc/self/maps").read_text().splitlines() if "moecomm-" in line]


def test_memory_is_shared_and_goes() -> None:
    before = open_files(), mapped_names()
    threads.run(3, check_shared)
    assert (open_files(), mapped_names()) == before


@pytest.mark.mpi(min_size=4)
def test_memory_is_shared_by_processes() -> None:
    before = open_files(), mapped_names()
    mpi_run(4, check_shared)
    assert (open_files(), mapped_names()) == before


def test_a_freed_all_to_all_keeps_no_memory() -> None:
    before = mapped_names()

    def body(comm: Comm) -> None:
        with SharedAllToAll(comm, Nodes.of_size(2, 4)) as a2a:
            a2a(np.zeros((4, 100)))
            assert mapped_names() != before
            comm.barrier()
        comm.barrier()
        assert mapped_names() == before
        comm.barrier()

    threads.run(4, body)


def cannot(*arguments: object) -> Any:
    raise OSError("not here")


def rank_2_sees_none(process: int, file: int, nonce: int, num_bytes: int) -> Any:
    if threading.current_thread().name == "rank 2":
        return mapped(process, file, nonce + 1, num_bytes)  # as if the process of that number were another one
    return mapped(process, file, nonce, num_bytes)


mapped = shared_memory._mapped


@pytest.mark.parametrize("missing", ["memfd_create", "posix_fallocate", "a rank"])
def test_ranks_that_cannot_share_memory(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if missing == "a rank":
        monkeypatch.setattr(shared_memory, "_mapped", rank_2_sees_none)
    else:
        monkeypatch.setattr(os, missing, cannot)
    freed: list[int] = []
    monkeypatch.setattr(threads.ThreadComm, "_free", lambda self: freed.append(self.size))
    before = open_files(), mapped_names()

    def body(comm: Comm) -> None:
        assert shared_memory.shared_memory(comm, 100) is None
        nodes = Nodes.of_size(2, 4)
        with pytest.raises(CommError, match="SharedAllToAll: the ranks of a node share no memory"):
            SharedAllToAll(comm, nodes)
        comm.barrier()  # nothing else has failed
        assert FlatAllToAll(comm)(np.full(4, comm.rank)).tolist() == [0, 1, 2, 3]

    threads.run(4, body)
    assert (open_files(), mapped_names()) == before
    assert len(freed) == 8, "two groups a rank"


def test_memory_of_a_stranger_is_not_taken(tmp_path: Path) -> None:
    with (tmp_path / "moecomm-1").open("w+b") as file:
        file.write(bytes(100))
        file.flush()
        assert mapped(os.getpid(), file.fileno(), 1, 100) is None
    assert mapped(os.getpid(), 10**6, 1, 100) is None
    assert mapped(2**22 + 1, 0, 1, 100) is None


# ---- ranks that fail -----------------------------------------------------------------------------------------------


def ready(comm: Comm, nodes: Nodes, leaders: int = 1) -> SharedAllToAll:
    """When all ranks have it and have called it, so that the next call is the ring's alone."""
    a2a = SharedAllToAll(comm, nodes, leaders=leaders)
    a2a(np.zeros((comm.size, 3)))
    comm.barrier()
    return a2a


@pytest.mark.parametrize("leaders", [1, 2])
@pytest.mark.parametrize("failing", range(4))
def test_a_rank_that_fails_before_the_call_ends_the_others(failing: int, leaders: int) -> None:
    raised = []

    def body(comm: Comm) -> None:
        a2a = ready(comm, Nodes.of_size(2, 4), leaders)
        if comm.rank == failing:
            raise KeyError("before the call")
        try:
            a2a(np.zeros((4, 3)))
        except CommError as error:
            raised.append(str(error))
            with pytest.raises(CommError, match="cannot be used: "):
                a2a(np.zeros((4, 3)))
            raise

    with pytest.raises(KeyError, match="before the call"):
        threads.run(4, body)
    assert len(raised) == 3


def fail_at_chunk_2(a2a: SharedAllToAll) -> None:
    chunks = iter(range(3))

    def start() -> Any:
        if next(chunks) == 2:
            raise RuntimeError("in the middle")
        return SharedAllToAll._start(a2a)

    a2a._start = start  # type: ignore[method-assign]


def check_failure_inside(comm: Comm, nodes: Nodes) -> None:
    a2a = SharedAllToAll(comm, nodes)
    x = np.zeros((comm.size, 200), np.uint8)
    a2a(x)
    if comm.rank == 0:
        fail_at_chunk_2(a2a)
        with pytest.raises(RuntimeError, match="in the middle"):
            a2a(x)
    else:
        with pytest.raises(CommError):
            a2a(x)
    for _ in range(3):
        with pytest.raises(CommError):
            a2a(x)


@pytest.mark.parametrize("ranks_per_node", [1, 2, 4])
def test_a_leader_that_fails_inside_ends_the_others(ranks_per_node: int, monkeypatch: pytest.MonkeyPatch) -> None:
    use_chunks_of(64, monkeypatch)
    threads.run(4, lambda comm: check_failure_inside(comm, Nodes.of_size(ranks_per_node, 4)))


@pytest.mark.mpi(min_size=4)
def test_a_leader_that_fails_inside_ends_its_node_without_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    use_chunks_of(64, monkeypatch)
    mpi_run(4, lambda comm: check_failure_inside(comm, Nodes.of_size(4, 4)), None)


def test_a_rank_that_never_comes() -> None:
    others_are_done = threading.Semaphore(0)

    def body(comm: Comm) -> None:
        a2a = ready(comm, Nodes.of_size(3, 6))
        if comm.rank == 4:
            for _ in range(5):
                others_are_done.acquire()
            return
        with pytest.raises(CommError, match="rank"):
            a2a(np.zeros((6, 3)))
        others_are_done.release()

    threads.run(6, body, limit=2)


def test_a_rank_that_returns_instead() -> None:
    def body(comm: Comm) -> None:
        a2a = ready(comm, Nodes.of_size(3, 6))
        if comm.rank != 4:
            with pytest.raises(CommError):
                a2a(np.zeros((6, 3)))

    threads.run(6, body)


def test_a_rank_that_gets_nothing_stays_until_all_have_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 64)  # each rank has a core of its own

    def body(comm: Comm) -> int:
        a2a = SharedAllToAll(comm, Nodes.of_size(3, 3))
        route = a2a.route([1, 0, 1])
        if comm.rank == 2:
            time.sleep(0.5)
        return len(a2a.send(np.zeros((2, 1)), route))

    assert threads.run(3, body) == [3, 0, 3]


def wait_for_the_end_of(*ranks: int) -> None:
    names = {f"rank {rank}" for rank in ranks}
    while any(thread.name in names for thread in threading.enumerate()):
        time.sleep(0.001)


@pytest.mark.parametrize("late", [2, 3], ids=["leader", "other"])
def test_ranks_that_have_returned_after_the_call_are_not_gone(late: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the machine is loaded: a node still works on a call that the other node's ranks ended long ago."""
    monkeypatch.setattr(shared, "PATIENCE_US", 1000)
    looked = []

    def waiting(comm: Comm, call: str, seconds: float, missing: Any) -> None:
        real_waiting(comm, call, seconds, missing)
        looked.append(comm.rank)

    real_waiting = threads.ThreadComm.waiting
    monkeypatch.setattr(threads.ThreadComm, "waiting", waiting)

    def body(comm: Comm) -> list[int]:
        a2a = ready(comm, Nodes.of_size(2, 4), leaders=2 if late == 3 else 1)
        real_start = a2a._start

        def start() -> Any:
            started = real_start()
            if comm.rank == late:
                wait_for_the_end_of(0, 1)
                looked.clear()
                while len(looked) < 5:  # of the other rank of this node, which waits for this one
                    time.sleep(0.001)
            return started

        a2a._start = start  # type: ignore[method-assign]
        return a2a(np.full((4, 3), comm.rank))[:, 0].tolist()

    assert threads.run(4, body) == [[0, 1, 2, 3]] * 4


@pytest.mark.parametrize("ranks_per_node", [1, 2, 3, 6])
def test_all_ranks_hear_of_one_that_has_returned(ranks_per_node: int) -> None:
    """Those of other nodes too, though nobody else ends before all have heard."""
    heard: list[str] = []

    def body(comm: Comm) -> None:
        a2a = ready(comm, Nodes.of_size(ranks_per_node, 6))
        if comm.rank == 4:
            return
        try:
            a2a(np.zeros((6, 3)))
        except Exception as error:
            heard.append(repr(error))
        else:
            heard.append("nothing")
        while len(heard) < 5:
            time.sleep(0.001)

    threads.run(6, body)
    assert len(heard) == 5
    assert all(re.search("rank 4 has returned|another rank of this node has failed", text) for text in heard), heard
    assert all(text.startswith("CommError") for text in heard), heard


# On a busy machine four ranks may need some seconds until all have memory.
@pytest.mark.parametrize("limit", ["8", "none"])
@pytest.mark.parametrize("how", ["killed", "killed_inside"])
def test_a_killed_rank_ends_the_job_and_leaves_no_memory(how: str, limit: str) -> None:
    job = mpirun(4, str(PROGRAMS / "shared_rank.py"), how, limit)
    assert job.returncode != 0
    names = {line.split()[1] for line in job.stdout.splitlines() if line.startswith("memory: ")}
    assert len(names) == 2, job.stdout
    while any(in_use(name) for name in names):  # until the last process is gone
        time.sleep(0.1)
    assert not list(Path("/dev/shm").glob("*moecomm*"))


def in_use(name: str) -> bool:
    for maps in Path("/proc").glob("[0-9]*/maps"):
        try:
            if name in maps.read_text():
                return True
        except OSError:  # it has just ended
            continue
    return False


@pytest.mark.parametrize("how", ["stays", "raises"])
@pytest.mark.slow
def test_a_rank_that_never_comes_over_mpi(how: str) -> None:
    job = mpirun(4, str(PROGRAMS / "shared_rank.py"), how, "2")
    assert job.returncode != 0
    lines = job.stdout.splitlines()
    assert sum(line.startswith("first: ") for line in lines) == 3, job.stdout
    assert sum(line.startswith("then: SharedAllToAll: this Comm cannot be used") for line in lines) == 3, job.stdout
    assert "first: SharedAllToAll, call " in job.stdout
    assert "waited 2.0 s for the other" in job.stdout


# ---- the ring alone -------------------------------------------------------------------------------------------------


def numbers(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def transfer(pieces: list[list[int]], *, total: int = 10, rows: int = 10, num_chunks: int = 1) -> Transfer:
    """Of one node and one rank; the same comes back as goes."""
    side = numbers(total), numbers(len(pieces)), np.array(pieces, np.int64).reshape(-1, 3), rows
    return Transfer(*side, *side, 2, 64, num_chunks)


def ring_of_one() -> NodeRing:
    layout = RingLayout(num_ranks=1, num_nodes=1, num_slots=4, num_leaders=1, window=64)
    return NodeRing(np.zeros(layout.num_bytes, np.uint8), layout, local_rank=0, node=0, spin_us=0)


def test_a_ring_that_has_failed_stays_so() -> None:
    ring, whole = ring_of_one(), transfer([[0, 10, 0]])
    src, dst = np.arange(20, dtype=np.uint8), np.zeros(20, np.uint8)
    ring.begin(whole, src, dst)
    assert [ring.step(0) for _ in range(3)] == [Event.start_exchange, Event.finish_exchange, Event.finished]
    assert (dst == src).all()
    ring.fail()
    for _ in range(2):
        ring.begin(whole, src, dst)
        assert ring.step(0) == Event.failed


def test_a_ring_knows_who_has_not_begun() -> None:
    layout = RingLayout(num_ranks=3, num_nodes=1, num_slots=4, num_leaders=1, window=64)
    memory, nothing = np.zeros(layout.num_bytes, np.uint8), np.zeros(0, np.uint8)
    rings = [NodeRing(memory, layout, local_rank=rank, node=0, spin_us=0) for rank in range(3)]
    none = Transfer(*(numbers(0), numbers(0), np.zeros((0, 3), np.int64), 0) * 2, 1, 64, 0)
    begun = [0, 0, 0]
    for rank in (0, 0, 2, 1, 1, 2, 2, 1, 0):
        rings[rank].begin(none, nothing, nothing)
        begun[rank] += 1
        for ring, count in zip(rings, begun, strict=True):
            assert ring.missing() == [other for other in range(3) if begun[other] < count]


def test_a_transfer_that_cannot_be_is_refused() -> None:
    for pieces in ([[0, 11, 0]], [[5, 6, 0]], [[0, 5, 6]], [[0, 5, 0], [4, 2, 5]], [[-1, 2, 0]], [[0, 1, -1]]):
        with pytest.raises(ValueError, match="a piece lies outside its stream or rows, or over another"):
            transfer(pieces)
    with pytest.raises(ValueError, match="longer than all chunks"):
        transfer([], total=33)
    with pytest.raises(ValueError, match="too few pieces"):
        Transfer(
            numbers(1),
            numbers(1),
            np.zeros((0, 3), np.int64),
            1,
            *(numbers(0),) * 2,
            numbers(0, 0, 0)[None],
            0,
            1,
            64,
            1,
        )
    ring, whole, bytes_20 = ring_of_one(), transfer([[0, 10, 0]]), np.zeros(20, np.uint8)
    for src, dst in ((bytes_20[1:], bytes_20), (bytes_20, bytes_20[1:])):
        with pytest.raises(ValueError, match="src or dst does not fit the transfer"):
            ring.begin(whole, src, dst)
    wide = Transfer(*(numbers(0), numbers(0), np.zeros((0, 3), np.int64), 0) * 2, 1, 128, 1)
    with pytest.raises(ValueError, match="does not fit the ring"):
        ring.begin(wide, bytes_20[:0], bytes_20[:0])
    with pytest.raises(ValueError, match="memory is too small"):
        NodeRing(bytes_20, RingLayout(1, 1, 4, 1, 64), 0, 0, 0)


# ---- bad input -----------------------------------------------------------------------------------------------------


def test_bad_arguments_are_refused_on_every_rank() -> None:
    def body(comm: Comm) -> None:
        nodes = Nodes([[0, 1, 2], [3, 4]])
        for leaders in (0, 3, -1, 1.0, None):
            with pytest.raises(ValueError, match=r"leaders is .*, expected 1 \.\. 2, the ranks of the smallest node"):
                SharedAllToAll(comm, nodes, leaders=leaders)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="leaders of rank 2 is not that of rank 0; this rank's is"):
            SharedAllToAll(comm, nodes, leaders=2 if comm.rank == 2 else 1)
        with pytest.raises(ValueError, match="nodes of rank 3 is not that of rank 0"):
            SharedAllToAll(comm, Nodes.of_size(1 if comm.rank == 3 else 2, 5))
        with pytest.raises(ValueError, match="nodes has 4 ranks, expected Nodes of 5"):
            SharedAllToAll(comm, Nodes.of_size(2, 4))
        assert SharedAllToAll(comm, nodes, leaders=2)(np.full(5, comm.rank)).tolist() == [0, 1, 2, 3, 4]

    threads.run(5, body)


@pytest.mark.parametrize("algorithm", [SharedAllToAll, AutoAllToAll])
def test_a_route_of_another_algorithm_is_refused(algorithm: Any) -> None:
    def body(comm: Comm) -> None:
        a2a = algorithm(comm, Nodes.of_size(2, 4))
        foreign = FlatAllToAll(comm).route([1] * 4)
        for call in (a2a.send, a2a.send_back):
            with pytest.raises(TypeError, match=f"route is a Route, expected one of {algorithm.__name__}"):
                call(np.zeros((4, 1)), foreign)
        assert a2a.send(np.full((4, 1), comm.rank), a2a.route([1] * 4)).tolist() == [[0], [1], [2], [3]]

    threads.run(4, body)
