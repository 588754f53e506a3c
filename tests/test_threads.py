from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from conftest import check_limits

from moecomm import Comm, CommError, FlatAllToAll, HierarchicalAllToAll, Nodes, SharedAllToAll, testing
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


# ---- Ctrl-C --------------------------------------------------------------------------------------------------------


def interrupt() -> None:
    signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)


def ranks_alive() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("rank")]


def barriers(comm: Comm) -> None:
    comm.barrier()


def barriers_of_pairs(comm: Comm) -> None:
    comm.barrier()
    pair = comm.split(comm.rank // 2)
    while True:
        pair.barrier()


def shared_memory(comm: Comm) -> None:
    a2a = SharedAllToAll(comm, Nodes.of_size(2, comm.size))
    while True:
        a2a(np.zeros((comm.size, 1000)))


def shared_memory_of_one_node(comm: Comm) -> None:
    a2a = SharedAllToAll(comm, Nodes.of_size(comm.size, comm.size))
    if comm.rank:  # rank 0 does not come
        a2a(np.zeros((comm.size, 1000)))
    while True:
        comm.check_usable("nothing")


def alone(comm: Comm) -> None:
    only = comm.split(comm.rank)
    while True:
        only.all_reduce(np.ones(1))


@pytest.fixture(autouse=True)
def interrupts_arrive() -> Iterator[None]:
    """Ctrl-C raises, also where the tests run in the background of a shell, which lets its jobs ignore it."""
    earlier = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, earlier)


@pytest.mark.parametrize("work", [barriers, barriers_of_pairs, shared_memory, shared_memory_of_one_node, alone])
@pytest.mark.parametrize("catches", [False, True])
def test_an_interrupt_ends_the_ranks_first(work: Callable[[Comm], None], catches: bool) -> None:
    said = []

    def body(comm: Comm) -> None:
        comm.barrier()
        if comm.rank == 0:
            interrupt()
        try:
            while True:
                work(comm)
        except CommError as error:
            said.append(str(error))
            if not catches:
                raise

    with pytest.raises(KeyboardInterrupt):
        threads.run(4, body)
    assert not ranks_alive()
    assert len(said) == 4
    assert all("run was interrupted by KeyboardInterrupt" in text for text in said), said


class TimeIsUp(BaseException):
    pass


def test_what_another_signal_raises_is_raised() -> None:
    def raise_it(*arguments: object) -> None:
        raise TimeIsUp("a test's time-out")

    before = signal.signal(signal.SIGALRM, raise_it)
    try:
        with pytest.raises(TimeIsUp, match="a test's time-out"):
            signal.setitimer(signal.ITIMER_REAL, 0.05)
            threads.run(3, lambda comm: [comm.barrier() for _ in range(10**9)])
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert not ranks_alive()


@pytest.mark.parametrize("patience", [0.2, 1e6])
def test_a_rank_that_comes_to_no_collective_is_left_and_named(patience: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a while, or at the second interrupt."""
    monkeypatch.setattr(threads, "LONGEST_FAREWELL", patience)
    may_go_on, said = threading.Event(), []

    def body(comm: Comm) -> None:
        comm.barrier()
        try:
            if comm.rank == 1:
                interrupt()
                may_go_on.wait()
            comm.barrier()
        except CommError as error:
            said.append(str(error))
            if comm.rank == 0 and patience > 1:
                interrupt()

    with pytest.raises(KeyboardInterrupt), warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        threads.run(3, body)
    assert "rank 1" in ranks_alive()
    texts = " ".join(str(warning.message) for warning in warned)
    after = r"came to no collective for 0.2 s after KeyboardInterrupt, and go on as daemon threads"
    assert re.fullmatch(rf"run: rank\(s\) \[.*1.*\] {after}" if patience < 1 else "", texts)
    may_go_on.set()
    while ranks_alive():
        time.sleep(0.001)
    assert len(said) == 3, "its next collective ends it"


def test_threads_that_cannot_be_started_end_those_that_were(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(thread: threading.Thread) -> None:
        if thread.name == "rank 3":
            raise RuntimeError("can't start new thread")
        real_start(thread)

    real_start = threading.Thread.start
    monkeypatch.setattr(threading.Thread, "start", start)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        threads.run(5, lambda comm: comm.barrier())
    assert not ranks_alive()


def test_an_interrupted_program_ends_as_programs_do() -> None:
    program = """
import os, signal
import numpy as np
from moecomm import Nodes, SharedAllToAll
from moecomm.transports import threads

def body(comm):
    a2a = SharedAllToAll(comm, Nodes.of_size(2, 4))
    for i in range(10**9):
        a2a(np.zeros((4, 1000)))
        if i == comm.rank == 3:
            os.kill(os.getpid(), signal.SIGINT)

threads.run(4, body)
"""
    job = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert job.returncode == -signal.SIGINT
    assert job.stderr.splitlines()[-1] == "KeyboardInterrupt"
    assert "terminate called" not in job.stderr


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
