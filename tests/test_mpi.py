"""The MPI transport. Tests marked mpi run inside `mpirun -n 4` and `-n 8`; the others start mpirun themselves."""

from __future__ import annotations

import gc
import tracemalloc
import warnings
import weakref

import numpy as np
import pytest
from conftest import LIMIT, PROGRAMS, check_group_of_a_library, check_limits, mpi_run, mpirun

from moecomm import Comm, CommError, FlatAllToAll, HierarchicalAllToAll, Nodes, testing
from moecomm.transports.wrappers import Checked, Timed

SIZES = {4: (1, 2, 3, 4), 8: (5, 8)}
"""Numbers of ranks tried under `mpirun -n 4` and under `mpirun -n 8`."""


def sizes() -> tuple[int, ...]:
    from mpi4py import MPI

    return SIZES.get(MPI.COMM_WORLD.size, (MPI.COMM_WORLD.size,))


@pytest.mark.mpi(min_size=4)
@pytest.mark.parametrize("limit", [None, LIMIT])
def test_conformance(limit: float | None) -> None:
    testing.check_comm(lambda size, body: mpi_run(size, body, limit), sizes=sizes())


@pytest.mark.mpi(min_size=4)
def test_all_that_takes_a_comm_takes_a_communicator() -> None:
    mpi_run(4, lambda comm: check_group_of_a_library(comm._comm))  # type: ignore[attr-defined]


@pytest.mark.mpi(min_size=4)
@pytest.mark.parametrize("wrap", [Checked, Timed])
def test_conformance_of_wrappers(wrap: type) -> None:
    testing.check_comm(lambda size, body: mpi_run(size, lambda comm: body(wrap(comm))), sizes=sizes()[-1:])


@pytest.mark.mpi(min_size=4)
@pytest.mark.parametrize("largest_count", [1, 7, 64])
def test_rows_of_more_bytes_than_a_count_can_say(largest_count: int) -> None:
    """With a limit of 2**31 - 1 this takes gigabytes; with 7 a row of 24 bytes is too large already."""

    def body(comm: Comm) -> None:
        comm._largest_count = largest_count  # type: ignore[attr-defined]
        comm._free_row_types()  # type: ignore[attr-defined]
        for counts in testing.count_matrices(comm.size):
            rows = testing.sent_rows(counts, comm.rank)
            got = comm.all_to_all(rows, counts[comm.rank], counts[:, comm.rank])
            assert (got == testing.received_rows(counts, comm.rank)).all()
        x = np.arange(comm.size * 5) + 100 * comm.rank
        assert (
            comm.all_gather(x) == np.concatenate([np.arange(comm.size * 5) + 100 * s for s in range(comm.size)])
        ).all()
        assert (comm.all_reduce(np.arange(20)) == comm.size * np.arange(20)).all()
        nodes = Nodes.of_size(2, comm.size)
        testing.check_all_to_all_on(comm, HierarchicalAllToAll(comm, nodes))

    mpi_run(4, body)


@pytest.mark.mpi(min_size=4)
@pytest.mark.parametrize("ranks_per_node", [1, 2, 3, 8])
def test_hierarchical_conformance(ranks_per_node: int) -> None:
    testing.check_all_to_all(
        mpi_run, lambda comm: HierarchicalAllToAll(comm, Nodes.of_size(ranks_per_node, comm.size)), sizes=sizes()
    )


@pytest.mark.mpi(min_size=4)
def test_flat_conformance() -> None:
    testing.check_all_to_all(mpi_run, FlatAllToAll, sizes=sizes())


@pytest.mark.mpi(min_size=4)
def test_an_mpi4py_communicator_may_be_passed_directly() -> None:
    def body(comm: Comm) -> None:
        raw = comm._comm  # type: ignore[attr-defined]
        for a2a in (FlatAllToAll(raw), HierarchicalAllToAll(raw)):
            assert a2a(np.full(4, comm.rank)).tolist() == [0, 1, 2, 3]
            a2a.free()
        raw.Barrier()  # it stays the caller's

    mpi_run(4, body)


@pytest.mark.mpi(min_size=4)
def test_buffers_live_as_long_as_mpi_may_write_there() -> None:
    def body(comm: Comm) -> None:
        from moecomm.transports.mpi import MpiComm

        raw, counts = comm._comm, np.full(4, 1000)  # type: ignore[attr-defined]
        copy = raw.Dup()

        def start() -> tuple[weakref.ref, object]:
            rows, out = np.full(4000, comm.rank), np.zeros(4000, np.int64)
            started = MpiComm(copy).start(rows, out, counts, counts)
            return weakref.ref(out), started if comm.rank else None  # rank 0 loses the Comm too

        if comm.rank == 0:
            out, _ = start()
            gc.collect()
            assert out() is not None
        raw.Barrier()  # nobody else has come until here
        if comm.rank:
            _, started = start()
            while not started.done():
                pass
        raw.Barrier()

    mpi_run(4, body)


@pytest.mark.mpi(min_size=4)
def test_a_freed_communicator_is_refused() -> None:
    def body(comm: Comm) -> None:
        from moecomm.transports.mpi import MPI, MpiComm

        raw = comm._comm.Dup()  # type: ignore[attr-defined]
        flat = FlatAllToAll(raw)
        raw.Free()
        with pytest.raises(CommError, match="its MPI communicator was freed"):
            flat(np.zeros(4))
        with pytest.raises(ValueError, match="it was freed, or this rank is not in it"):
            MpiComm(raw)
        with pytest.raises(TypeError, match="expected an mpi4py intracommunicator"):
            MpiComm(MPI.INFO_NULL)

    mpi_run(4, body)


@pytest.mark.mpi(min_size=4)
def test_memory_beside_input_and_output() -> None:
    """Even: one copy of x. Uneven: two buffers of max(given, forwarded, returned) rows."""

    def peak(call) -> int:  # type: ignore[no-untyped-def]
        call()
        tracemalloc.start()
        try:
            call()
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    def body(comm: Comm) -> None:
        a2a = HierarchicalAllToAll(comm, Nodes.of_size(2, 4))
        x = np.zeros((4, 1 << 18), np.uint8)
        out = np.empty_like(x)
        small = 1 << 14
        assert peak(lambda: a2a(x, out)) <= x.nbytes + small
        assert peak(lambda: FlatAllToAll(comm)(x, out)) <= small
        # everything goes from rank 0 over rank 1 to rank 3
        counts = [0, 0, 0, 1000 if comm.rank == 0 else 0]
        rows = np.zeros((sum(counts), 1024), np.uint8)
        most = 1000 * 1024
        result = {0: 0, 1: 0, 2: 0, 3: most}[comm.rank]
        assert peak(lambda: a2a.rows(rows, counts)) <= 2 * most + result + small
        assert peak(lambda: FlatAllToAll(comm).rows(rows, counts)) <= result + small

    mpi_run(4, body)


@pytest.mark.mpi(min_size=4)
def test_limits() -> None:
    def body(comm: Comm) -> None:
        from moecomm.transports.mpi import MpiComm

        raw = comm._comm  # type: ignore[attr-defined]
        check_limits("MpiComm", lambda limit: MpiComm(raw, limit=limit).all_reduce(np.ones(1)))

    mpi_run(4, body)


# ---- what needs a job of its own -----------------------------------------------------------------------------------


def test_one_failing_rank_is_reported_and_hangs_nobody() -> None:
    job = mpirun(2, "-m", "pytest", "--only-mpi", str(PROGRAMS / "one_rank_fails.py"))
    assert job.returncode != 0
    assert "on rank 1 of 2:" in job.stdout
    assert "KeyError: 'before the collective'" in job.stdout
    assert "barrier, call 1 on this Comm, waited 1.0 s" in job.stdout
    assert job.stdout.count("1 failed") == 1, "every rank printed its own report"


@pytest.mark.slow
def test_a_rank_that_never_comes_raises_on_the_others_and_ends_the_job() -> None:
    job = mpirun(4, str(PROGRAMS / "late_rank.py"), "stays")
    assert job.returncode != 0
    for rank in (0, 2, 3):
        first = "first: all_to_all, call 2 on this Comm, waited 2 s for the other 3 rank(s) to come and send"
        assert f"{first}  (rank {rank} of 4)" in job.stdout
    assert job.stdout.count("then: barrier: this Comm cannot be used") == 3


def test_a_killed_rank_ends_the_job() -> None:
    assert mpirun(4, str(PROGRAMS / "late_rank.py"), "killed").returncode != 0


@pytest.mark.parametrize(("p", "num_nodes"), [(8, 2), (9, 4)])
@pytest.mark.slow
def test_nodes_placed_cyclically(p: int, num_nodes: int) -> None:
    """MPICH can pretend that the ranks sit on several nodes; it deals them out like cards."""
    job = mpirun(p, str(PROGRAMS / "fake_nodes.py"), MPIR_CVAR_NUM_CLIQUES=str(num_nodes))
    assert job.returncode == 0, job.stderr
    nodes = eval(job.stdout)
    assert len(nodes) == num_nodes
    assert nodes[0][:2] != [0, 1], "these nodes are blocks: nothing new is tested"
    assert sorted(rank for node in nodes for rank in node) == list(range(p))


def test_mpirun_of_another_library_is_noticed() -> None:
    job = mpirun(1, str(PROGRAMS / "alone.py"))
    assert job.returncode != 0
    assert "Open MPI's mpirun started 2 processes, but each is alone in the MPI library that Python loads" in job.stderr


def test_processes_of_torchrun_are_told_that_mpi_sees_none_of_them() -> None:
    check_launch = pytest.importorskip("moecomm.transports.mpi").check_launch
    for rank, size, num_warnings in (("0", "4", 1), ("1", "4", 0), ("0", "1", 0)):
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            check_launch(1, {"WORLD_SIZE": size, "RANK": rank})
        assert ["mpirun -n 4 python" in str(warning.message) for warning in told] == [True] * num_warnings
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_launch(4, {"WORLD_SIZE": "4", "RANK": "0"})
