from __future__ import annotations

import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import check_limits

from moecomm import Comm, CommError, FlatAllToAll, HierarchicalAllToAll, testing
from moecomm.transports import threads


def test_conformance() -> None:
    testing.check_comm(threads.run, sizes=(1, 2, 3, 5, 8))


def test_conformance_of_torch_tensors() -> None:
    torch = pytest.importorskip("torch")
    testing.check_comm(threads.run, make=torch.from_numpy)


def test_results_are_in_rank_order() -> None:
    assert threads.run(5, lambda comm: comm.rank * 10) == [0, 10, 20, 30, 40]


def test_a_failing_rank_ends_all_and_is_the_one_reported() -> None:
    seen = []

    def body(comm: Comm) -> None:
        if comm.rank == 1:
            raise KeyError("the first error")
        try:
            comm.barrier()
        except CommError as error:
            seen.append(str(error))
            raise

    with pytest.raises(KeyError, match="the first error") as caught:
        threads.run(3, body)
    if hasattr(caught.value, "__notes__"):
        assert caught.value.__notes__ == ["raised on rank 1 of 3"]
    assert len(seen) == 2
    assert all("rank 1 failed: KeyError" in text for text in seen)


def test_a_rank_that_returns_early_is_noticed_without_a_limit() -> None:
    def body(comm: Comm) -> None:
        if comm.rank != 2:
            comm.all_to_all(np.zeros(comm.size))

    with pytest.raises(CommError, match="all_to_all: rank 2 has returned"):
        threads.run(4, body)


def test_a_rank_that_stays_away_is_named() -> None:
    def body(comm: Comm) -> None:
        if comm.rank == 1:
            time.sleep(4)
        comm.barrier()

    with pytest.raises(CommError, match=r"barrier: waited 2 s for rank\(s\) \[1\], which did not come"):
        threads.run(3, body, limit=2)


def test_different_calls_are_noticed() -> None:
    def body(comm: Comm) -> None:
        if comm.rank == 0:
            comm.barrier()
        else:
            comm.all_reduce(np.zeros(2))

    with pytest.raises(CommError, match="rank 0 called barrier while rank 1 called all_reduce"):
        threads.run(3, body)


@pytest.mark.parametrize(
    "other", [np.zeros((2, 3), np.float64), np.zeros((2, 4), np.float32), np.zeros((4, 3), np.float32)]
)
def test_different_rows_are_noticed(other: np.ndarray) -> None:
    rows = np.zeros((2, 3), np.float32)
    with pytest.raises(CommError, match=r"rank . sent"):
        threads.run(2, lambda comm: comm.all_to_all(rows if comm.rank else other))


@pytest.mark.parametrize("counts", [[2**62] * 4, [2**62 + 1, 2**62, 2**62, 2**62], [2**63 - 1, 2**63 - 1, 3, 0]])
def test_counts_whose_sum_wraps_around(counts: list[int]) -> None:
    """They add up to the rows given, in 64 bits."""

    def body(comm: Comm) -> None:
        rows = np.zeros((sum(counts) % 2**64, 3))
        with pytest.raises(ValueError, match=r"send_counts\[0\] is .*, expected <= "):
            comm.all_to_all(rows, counts, counts)
        for make in (FlatAllToAll, HierarchicalAllToAll):
            with pytest.raises(ValueError, match=r"send_counts\[0\] is .*, expected <= "):
                make(comm).rows(rows, counts)

    threads.run(4, body)


def test_a_failed_comm_stays_failed() -> None:
    def body(comm: Comm) -> None:
        if comm.rank == 0:
            return
        with pytest.raises(CommError):
            comm.barrier()
        with pytest.raises(CommError, match="cannot be used: barrier: rank 0 has returned"):
            comm.barrier()

    threads.run(2, body)


def test_after_a_mismatch_no_call_works_any_more() -> None:
    """Otherwise the ranks would be one call apart, and rows of two calls would be taken for each other's."""

    def body(comm: Comm) -> None:
        recv_counts = [2, 1] if comm.rank == 1 else [1, 1]
        with pytest.raises(CommError, match=r"rank 0 sent 1 rows .* rank 1 expected 2 rows"):
            comm.all_to_all(np.zeros((2, 1)), [1, 1], recv_counts)
        with pytest.raises(CommError, match="cannot be used"):
            comm.all_to_all(np.zeros((2, 1)))

    threads.run(2, body)


@pytest.mark.parametrize("size", [0, -1, 2.0, "3"])
def test_bad_size(size: object) -> None:
    with pytest.raises(ValueError, match="expected a whole number >= 1"):
        threads.run(size, lambda comm: None)  # type: ignore[arg-type]


def test_limits() -> None:
    check_limits("run", lambda limit: threads.run(2, lambda comm: comm.all_reduce(np.ones(1)), limit=limit))


KERNELS = {
    "route": "route(np.zeros((100_000, 8), np.float32), 2)",
    "ring": "ring.begin(transfer, none, none); ring.step(10**6)",
}


@pytest.mark.parametrize("kernel", KERNELS)
def test_python_ends_while_a_thread_is_in_a_kernel(kernel: str) -> None:
    """A daemon thread that wants Python's lock back once Python has ended must not take the process along."""
    program = f"""
import threading
import numpy as np
from moecomm import route
from moecomm._core import NodeRing, RingLayout, Transfer

layout = RingLayout(num_ranks=2, num_nodes=1, num_slots=4, num_leaders=1, window=64)
ring = NodeRing(np.zeros(layout.num_bytes, np.uint8), layout, local_rank=0, node=0, spin_us=0)
none, zeros = np.zeros(0, np.uint8), np.zeros(1, np.int64)
side = zeros, zeros, np.zeros((0, 3), np.int64), 0
transfer = Transfer(*side, *side, 1, 64, 1)
is_running = threading.Event()

def work():
    while True:
        is_running.set()
        {KERNELS[kernel]}

threading.Thread(target=work, daemon=True).start()
is_running.wait()
"""
    job = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (job.returncode, job.stderr) == (0, "")
