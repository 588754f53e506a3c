"""The hierarchical all-to-all gives the flat one's bytes, for every partition of the ranks, in the promised hops."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from moecomm import Comm, CommError, FlatAllToAll, HierarchicalAllToAll, Nodes, testing
from moecomm.transports import threads
from moecomm.transports.wrappers import Timed


def partitions(p: int) -> Iterator[Nodes]:
    """One node, nodes of one, blocks (ragged where the size does not divide p), cyclic, and any sizes in any places."""
    yield Nodes.of_size(p, p)
    yield Nodes.of_size(1, p)
    for size in (2, 8, int(p**0.5)):
        yield Nodes.of_size(size, p)
    yield Nodes([range(first, p, 3) for first in range(min(3, p))])
    labels = np.random.default_rng(p).integers(0, 4, p)
    yield Nodes([np.flatnonzero(labels == label) for label in set(labels.tolist())])


SIZES = [*range(1, 18), *(pytest.param(p, marks=pytest.mark.slow) for p in range(18, 65))]


@pytest.mark.parametrize("p", SIZES)
def test_bit_equal_to_flat(p: int) -> None:
    matrices = list(testing.count_matrices(p))
    counts = [matrices[2 + p % 4]]

    def body(comm: Comm) -> None:
        rng = np.random.default_rng([p, comm.rank])
        flat = FlatAllToAll(comm)
        x = rng.random((p, 3)).astype(np.float32)
        wanted = flat(x)
        rows = [rng.random((int(c[comm.rank].sum()), 2)) for c in counts]
        wanted_rows = [flat.rows(r, c[comm.rank]) for r, c in zip(rows, counts, strict=True)]
        for nodes in partitions(p):
            a2a = HierarchicalAllToAll(comm, nodes)
            assert a2a(x).tobytes() == wanted.tobytes(), nodes
            for r, c, (wanted_r, wanted_counts) in zip(rows, counts, wanted_rows, strict=True):
                got, got_counts = a2a.rows(r, c[comm.rank])
                assert got.tobytes() == wanted_r.tobytes(), nodes
                assert (got_counts == wanted_counts).all(), nodes

    threads.run(p, body)


@pytest.mark.parametrize(
    "nodes", [[[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]], [[0, 3, 5], [1], [2, 4, 6, 7]], [[0, 2], [1, 3]]]
)
def test_conformance(nodes: list[list[int]]) -> None:
    partition = Nodes(nodes)
    algorithm = lambda comm: HierarchicalAllToAll(comm, partition)  # noqa: E731
    testing.check_all_to_all(threads.run, algorithm, sizes=(partition.world_size,))


def test_conformance_of_torch_tensors() -> None:
    torch = pytest.importorskip("torch")
    algorithm = lambda comm: HierarchicalAllToAll(comm, Nodes.of_size(2, comm.size))  # noqa: E731
    testing.check_all_to_all(threads.run, algorithm, sizes=(1, 4, 5), make=torch.from_numpy)
    testing.check_all_to_all(
        threads.run, algorithm, sizes=(4,), make=lambda array: torch.from_numpy(array).contiguous().clone()
    )


def test_bfloat16() -> None:
    torch = pytest.importorskip("torch")

    def body(comm: Comm) -> None:
        x = (torch.arange(comm.size * 3).reshape(comm.size, 3) + 100 * comm.rank).bfloat16()
        wanted = torch.stack([(torch.arange(3) + 3 * comm.rank + 100 * s).bfloat16() for s in range(comm.size)])
        y = HierarchicalAllToAll(comm, Nodes.of_size(2, comm.size))(x)
        assert y.dtype == torch.bfloat16
        assert torch.equal(y, wanted)

    threads.run(6, body)


# ---- the hops are what the paper says ------------------------------------------------------------------------------


def hops(comm: Comm, nodes: Nodes, num_rows: int, row_bytes: int) -> dict[str, list[int]]:
    """Messages and bytes of one even and one uneven call: [inside the node, between nodes]."""
    timed = Timed(comm)
    a2a = HierarchicalAllToAll(timed, nodes)
    inside = nodes.same_node(comm.rank)
    sums = {}

    def record(name: str, kind: str) -> None:
        if kind in timed.record:
            for what in ("messages", "bytes"):
                numbers = getattr(timed.record[kind], what)
                sums[f"{name} {what}"] = [int(numbers[inside].sum()), int(numbers[~inside].sum())]

    timed.clear()
    a2a(np.zeros((comm.size, row_bytes), np.uint8))
    record("even", "all_to_all")
    record("even", "all_to_allv")
    timed.clear()
    a2a.rows(np.zeros((comm.size * num_rows, row_bytes), np.uint8), [num_rows] * comm.size)
    record("uneven", "all_to_allv")
    record("counts", "all_to_all")
    return sums


@pytest.mark.parametrize(("p", "G"), [(4, 2), (8, 2), (8, 4), (12, 3), (16, 4), (36, 6), (64, 8), (64, 16)])
@pytest.mark.parametrize("placement", ["blocks", "cyclic"])
def test_messages_and_bytes(p: int, G: int, placement: str) -> None:  # noqa: N803
    N = p // G  # noqa: N806
    nodes = Nodes.of_size(G, p) if placement == "blocks" else Nodes([range(first, p, N) for first in range(N)])
    for sums in threads.run(p, lambda comm: hops(comm, nodes, num_rows=3, row_bytes=5)):
        assert sums["even messages"] == [G - 1, N - 1]
        assert sums["uneven messages"] == [G - 1, N - 1]
        assert sums["counts messages"] == [G - 1, N - 1]
        # between nodes: what the flat one sends there; inside: N blocks for each of the other local ranks
        assert sums["even bytes"] == [(G - 1) * N * 5, (p - G) * 5]
        assert sums["uneven bytes"] == [(G - 1) * N * 15, (p - G) * 15]
        assert sums["counts bytes"] == [(G - 1) * N * 8, (N - 1) * G * 8]


def test_the_papers_figure() -> None:
    """p = 64, G = 8: 63 -> 14 messages, 56 -> 7 of them between nodes."""
    nodes = Nodes.of_size(8, 64)
    for sums in threads.run(64, lambda comm: hops(comm, nodes, 1, 1)):
        assert sum(sums["even messages"]) == 14
        assert sums["even messages"][1] == 7


@pytest.mark.parametrize("sizes", [(4, 4, 2), (5, 3), (1, 1, 6), (3, 3, 3, 1), (2, 7)])
def test_messages_between_unequal_nodes(sizes: tuple[int, ...]) -> None:
    """Local rank l of a node of size G forwards to the local ranks k with k mod G = l of every other node."""
    starts = np.cumsum(sizes) - sizes
    nodes = Nodes([range(start, start + size) for start, size in zip(starts, sizes, strict=True)])
    p = nodes.world_size
    every = threads.run(p, lambda comm: hops(comm, nodes, num_rows=1, row_bytes=1))
    for rank in range(p):
        node, l = int(nodes.node_of[rank]), int(nodes.local_rank[rank])  # noqa: E741
        G = sizes[node]  # noqa: N806
        between = sum(len([k for k in range(G2) if k % G == l]) for n, G2 in enumerate(sizes) if n != node)
        assert every[rank]["uneven messages"] == [G - 1, between]
        assert every[rank]["even messages"] == [G - 1, between]
        assert every[rank]["uneven bytes"][1] == between * G  # one row from each rank of this node
    assert sum(sums["uneven bytes"][1] for sums in every) == sum(p - size for size in sizes for _ in range(size))


def test_empty_pairs_are_not_sent() -> None:
    def body(comm: Comm) -> None:
        timed = Timed(comm)
        a2a = HierarchicalAllToAll(timed, Nodes.of_size(4, 8))
        counts = [0] * 8
        counts[7] = 5 if comm.rank == 0 else 0
        a2a.rows(np.zeros((sum(counts), 2)), counts)
        # 0 -> 3, the forwarder to local rank 3, -> 7
        wanted = {0: [3], 3: [7]}.get(comm.rank, [])
        assert np.flatnonzero(timed.record["all_to_allv"].messages).tolist() == wanted

    threads.run(8, body)


def test_one_node_and_nodes_of_one_rank_make_one_hop() -> None:
    for nodes in (Nodes.of_size(6, 6), Nodes.of_size(1, 6)):
        for sums in threads.run(6, lambda comm, nodes=nodes: hops(comm, nodes, 1, 1)):
            assert sum(sums["even messages"]) == sum(sums["uneven messages"]) == sum(sums["counts messages"]) == 5


def test_the_hops_run_over_two_groups_split_once() -> None:
    def body(comm: Comm) -> None:
        timed = Timed(comm)
        a2a = HierarchicalAllToAll(timed, Nodes.of_size(3, 12))
        assert timed.record["split"].calls == 2
        assert (a2a.local.size, a2a.cross.size) == (3, 4)
        a2a(np.zeros((12, 1)))
        a2a.rows(np.zeros((12, 1)), [1] * 12)
        assert timed.record["split"].calls == 2
        a2a.free()
        with pytest.raises(CommError, match="freed"):
            a2a(np.zeros((12, 1)))
        comm.barrier()

    threads.run(12, body)


# ---- bad input -----------------------------------------------------------------------------------------------------


def test_nodes_of_another_size_are_refused_on_every_rank() -> None:
    def body(comm: Comm) -> None:
        nodes = Nodes.of_size(2, 5 if comm.rank == 1 else 4)
        with pytest.raises(ValueError, match="nodes of rank 1 is not that of rank 0; this rank's is Nodes"):
            HierarchicalAllToAll(comm, nodes)
        with pytest.raises(ValueError, match="nodes has 5 ranks, expected Nodes of 4"):
            HierarchicalAllToAll(comm, Nodes.of_size(2, 5))
        comm.barrier()

    threads.run(4, body)


def test_nodes_that_differ_among_ranks_are_refused_on_every_rank() -> None:
    def body(comm: Comm) -> None:
        with pytest.raises(ValueError, match="nodes of rank 3 is not that of rank 0"):
            HierarchicalAllToAll(comm, Nodes.of_size(1 if comm.rank == 3 else 2, 4))
        with pytest.raises(ValueError, match="nodes of rank 3 is not that of rank 0"):
            HierarchicalAllToAll(comm, None if comm.rank == 3 else Nodes.of_size(2, 4))
        with pytest.raises(ValueError, match="nodes is a list, expected Nodes"):
            HierarchicalAllToAll(comm, [[0, 1], [2, 3]])  # type: ignore[arg-type]

    threads.run(4, body)
