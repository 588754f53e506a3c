"""After anything that ends a collective before its last step, no later call may take rows of it for its own."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from conftest import PROGRAMS, gloo_run, mpi_run, mpirun

from moecomm import (
    AutoAllToAll,
    Comm,
    CommError,
    FlatAllToAll,
    HierarchicalAllToAll,
    Nodes,
    RoutedExchange,
    Routing,
    TensorParallelExchange,
    Topology,
    build_groups,
)
from moecomm.all_to_all import SharedAllToAll
from moecomm.exchange import HierarchicalExchange
from moecomm.transports import threads
from moecomm.transports.wrappers import Checked, Timed

NODES = Nodes.of_size(2, 4)
FOUR = Routing(np.arange(4).reshape(1, 4), np.full((1, 4), 0.25, np.float32))
"""Each rank's token goes to the experts of all four."""


# ---- interrupted by a signal ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["all_to_all", "all_reduce", "flat", "hierarchical", "shared", "dispatch"])
@pytest.mark.slow
def test_an_interrupted_rank_brings_no_other_rows(call: str) -> None:
    """Rank 1 comes to the first call half a second after rank 0 has left it, and would meet its next one.

    What rank 0 had sent by then is on its way: its peers get the right rows of the first call, or an error.
    """
    job = mpirun(4, str(PROGRAMS / "interrupted_rank.py"), call)
    assert job.returncode != 0
    lines = dict(line.split(": ", 1) for line in job.stdout.splitlines() if line.startswith("rank"))
    assert lines["rank 0 first"] == "InterruptedError: by a signal", job.stdout + job.stderr
    sums, rows = [0 + 1 + 2 + 3] * 12, [source for source in range(4) for _ in range(3)]
    right = f"got {sums if call == 'all_reduce' else rows}"
    for rank in range(4):
        first = lines[f"rank {rank} first"]
        assert rank == 0 or first == right or first.startswith("CommError: "), lines
        for name in ("then", "later", "new"):
            assert lines[f"rank {rank} {name}"].startswith("CommError: "), lines
            if rank == 0 or name != "then":
                assert "this Comm cannot be used: " in lines[f"rank {rank} {name}"], lines


# ---- no memory on one rank -----------------------------------------------------------------------------------------


class Memory:
    """Lets numpy.empty fail on one rank, once, at the n-th time that it is asked while this is armed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rank, self.left, self.asked = "", -1, 0
        self.empty = np.empty
        monkeypatch.setattr(np, "empty", self.allocate)

    def allocate(self, *arguments: Any, **options: Any) -> Any:
        if threading.current_thread().name == self.rank:
            self.asked += 1
            self.left -= 1
            if self.left == 0:
                raise MemoryError("no memory today")
        return self.empty(*arguments, **options)


def rows_of_four(a2a: Any) -> np.ndarray:
    return np.asarray(a2a(np.full((4, 1), a2a.comm.rank)))


def dispatch_and_combine(exchange: Any) -> np.ndarray:
    rows, plan = exchange.dispatch(np.full((1, 2), float(exchange.comm.rank)), FOUR)
    return np.asarray(exchange.combine(rows, plan))


CALLS: dict[str, tuple[Callable[[Comm], Any], Callable[[Any], np.ndarray]]] = {
    "flat": (FlatAllToAll, rows_of_four),
    "hierarchical": (lambda comm: HierarchicalAllToAll(comm, NODES), rows_of_four),
    "shared": (lambda comm: SharedAllToAll(comm, NODES), rows_of_four),
    "auto": (lambda comm: AutoAllToAll(comm, NODES), lambda a2a: a2a.rows(np.full((4, 1), a2a.comm.rank), [1] * 4)[0]),
    "routed": (lambda comm: RoutedExchange(FlatAllToAll(comm), 1), dispatch_and_combine),
    "tokens": (lambda comm: RoutedExchange(FlatAllToAll(comm), 1, send="tokens"), dispatch_and_combine),
    "relayed": (lambda comm: HierarchicalExchange(HierarchicalAllToAll(comm, NODES), 1), dispatch_and_combine),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("wrap", [lambda comm: comm, lambda comm: Timed(comm)], ids=["bare", "timed"])
def test_no_memory_on_one_rank(name: str, wrap: Callable[[Comm], Comm], monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever it runs out inside a call, that rank says so, and from then on nobody gets rows."""
    make, call = CALLS[name]
    memory = Memory(monkeypatch)
    outcomes: dict[int, list[Any]] = {}

    def body(comm: Comm) -> None:
        comm = wrap(comm)
        made = make(comm)
        wanted = call(made)
        comm.barrier()
        if comm.rank == 2:
            memory.rank, memory.left = "rank 2", nth
        outcomes[comm.rank] = []
        for _ in range(3):
            try:
                assert np.array_equal(call(made), wanted)
                outcomes[comm.rank].append(None)
            except (CommError, MemoryError) as error:
                outcomes[comm.rank].append(type(error))

    nth = 0
    while True:
        nth += 1
        memory.rank, memory.asked = "", 0
        threads.run(4, body)
        if MemoryError not in outcomes[2]:
            break  # a whole call asks for less
        failed = outcomes[2].index(MemoryError)
        for rank, several in outcomes.items():
            after = several[failed + 1 :]
            assert after == [CommError] * len(after), (nth, rank, outcomes)
            assert rank == 2 or failed == 2 or CommError in several[failed : failed + 2], (nth, rank, outcomes)
    assert nth > 1 or name in ("routed",), "numpy.empty was never asked"


def test_memory_for_a_copy_of_the_argument(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check copies what is not contiguous: without Checked one rank alone fails there, with it all of them."""
    copy = np.ascontiguousarray

    def fails(array: Any, *arguments: Any, **options: Any) -> Any:
        if threading.current_thread().name == "rank 1" and getattr(array, "shape", ()) == (2, 5):
            raise MemoryError("no memory today")
        return copy(array, *arguments, **options)

    monkeypatch.setattr(np, "ascontiguousarray", fails)

    def bare(comm: Comm) -> None:
        with pytest.raises(MemoryError if comm.rank == 1 else CommError):
            comm.all_to_all(np.zeros((5, 2)).T)
        with pytest.raises(CommError, match="cannot be used"):
            comm.all_to_all(np.zeros((2, 4)))

    def checked(comm: Comm) -> None:
        comm = Checked(comm)
        with pytest.raises(MemoryError if comm.rank == 1 else ValueError, match="no memory today"):
            comm.all_to_all(np.zeros((5, 2)).T)
        assert comm.all_to_all(np.full((2, 4), comm.rank))[:, 0].tolist() == [0, 1]

    threads.run(2, bare)
    threads.run(2, checked)


def test_no_memory_for_a_sum_over_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is added up where the ranks meet; the one that has no memory says so, as everywhere."""
    torch = pytest.importorskip("torch")
    clone = torch.Tensor.clone

    def no_memory(tensor: Any, *arguments: Any, **options: Any) -> Any:
        if threading.current_thread().name == "rank 1":
            raise MemoryError("no memory today")
        return clone(tensor, *arguments, **options)

    def body(comm: Comm) -> None:
        with pytest.raises(MemoryError if comm.rank == 1 else CommError, match=r"no memory today"):
            comm.all_reduce(torch.ones(2))
        with pytest.raises(CommError, match=r"cannot be used: .*no memory today"):
            comm.barrier()

    monkeypatch.setattr(torch.Tensor, "clone", no_memory)
    threads.run(2, body)


# ---- what fails together -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["routed", "tokens", "relayed"])
def test_no_memory_in_a_backward_pass(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of four ranks meet in a hop: its Comm fails, and so does that of the whole exchange, on all that notice."""
    torch = pytest.importorskip("torch")
    memory = Memory(monkeypatch)

    def body(comm: Comm) -> None:
        exchange = CALLS[name][0](comm)
        routing = Routing(FOUR.expert, torch.full((1, 4), 0.25))
        x = torch.ones(1, 2, requires_grad=True)
        rows, plan = exchange.dispatch(x, routing)
        y = exchange.combine(rows, plan)
        comm.barrier()
        if comm.rank == 2:
            memory.rank, memory.left = "rank 2", 1
        with pytest.raises(MemoryError if comm.rank == 2 else CommError):
            y.sum().backward()
        assert comm.failure is not None
        with pytest.raises(CommError, match=r"cannot be used: "):
            exchange.dispatch(x, routing)

    threads.run(4, body, limit=1)


def test_a_hop_that_cannot_be_used_makes_the_whole_useless() -> None:
    """The others are in the first hop already, or in the next."""

    def body(comm: Comm) -> None:
        exchange = HierarchicalExchange(HierarchicalAllToAll(comm, NODES), 1)
        dispatch_and_combine(exchange)
        if comm.rank == 1:
            exchange.all_to_all.local.fail("out of order")
        for _ in range(2):
            with pytest.raises(CommError):
                dispatch_and_combine(exchange)
            assert comm.failure is not None

    threads.run(4, body, limit=1)


def test_what_was_split_from_a_failed_comm_fails_too() -> None:
    def body(comm: Comm) -> None:
        part = comm.split(comm.rank % 2)
        of_part = Timed(part).split(0)
        a2a = HierarchicalAllToAll(comm, NODES)
        if comm.rank == 3:
            return
        with pytest.raises(CommError, match=r"rank 3 has returned"):
            comm.barrier()
        for one in (part, of_part, a2a.local, a2a.cross):
            with pytest.raises(CommError, match=r"split from cannot be used: .*rank 3 has returned"):
                one.barrier()

    threads.run(4, body)


def test_errors_inside_a_hop_name_world_ranks() -> None:
    """Rank 3 meets rank 1 in the second hop, where they are ranks 1 and 0."""

    def body(comm: Comm) -> None:
        a2a = HierarchicalAllToAll(comm, NODES)
        rows_of_four(a2a)
        comm.barrier()
        if comm.rank == 1:
            raise KeyError("before the call")
        with pytest.raises(CommError) as caught:
            rows_of_four(a2a)
        messages[comm.rank] = str(caught.value)

    messages: dict[int, str] = {}
    with pytest.raises(KeyError):
        threads.run(4, body)
    for rank, message in messages.items():
        assert "rank 1 failed: KeyError" in message, messages
        assert f"(rank {rank} of 4" in message, messages


def test_constructors_that_do_not_come_to_their_end() -> None:
    """A rank leaves the constructor at each of its collectives in turn; the Comm is of no use on any rank."""
    makers: list[Callable[[Comm], Any]] = [
        lambda comm: HierarchicalAllToAll(comm, NODES),
        lambda comm: SharedAllToAll(comm, NODES),
        lambda comm: AutoAllToAll(comm, NODES),
        lambda comm: build_groups(comm, Topology(4, tensor=2, expert=4)),
    ]

    class Leaves(Timed):
        """Raises KeyboardInterrupt in its n-th gather."""

        left = 0

        def _all_gather(self, *arguments: Any) -> None:
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt
            super()._all_gather(*arguments)

    for make in makers:
        nth, ended = 0, False
        while not ended:
            nth += 1

            def body(comm: Comm, make: Callable[[Comm], Any] = make, nth: int = nth) -> bool:
                comm = Leaves(comm)
                comm.left = nth if comm.rank == 1 else 0
                try:
                    make(comm)
                    return True
                except (CommError, KeyboardInterrupt):
                    with pytest.raises(CommError, match="cannot be used"):
                        comm.barrier()
                    return False

            outcomes = threads.run(4, body)
            ended = outcomes[1]
            assert ended or not any(outcomes), (nth, outcomes)
        assert nth > 1


def test_auto_takes_a_time_out_for_no_lack_of_shared_memory() -> None:
    """One rank is late while the others look for shared memory: no rank gets an algorithm that others do not have."""
    from moecomm.all_to_all import shared

    found = shared.shared_memory

    def late(comm: Comm, num_bytes: int) -> Any:
        if threading.current_thread().name == "rank 3":
            threading.Event().wait(1.5)
        return found(comm, num_bytes)

    def body(comm: Comm) -> str:
        try:
            return f"made {sorted(AutoAllToAll(comm, NODES).algorithms)}"
        except CommError:
            with pytest.raises(CommError, match="cannot be used"):
                comm.barrier()
            return "failed"

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shared, "shared_memory", late)
        assert threads.run(4, body, limit=0.4) == ["failed"] * 4


# ---- limits of what MPI has in a blocking form alone ---------------------------------------------------------------


@pytest.mark.parametrize("call", ["split", "node_key"])
@pytest.mark.parametrize("fault", ["barrier", "lost"])
def test_split_ends_within_the_limit(call: str, fault: str) -> None:
    job = mpirun(3, str(PROGRAMS / "split_and_barrier.py"), call, fault)
    assert job.returncode != 0
    ended = f"moecomm: {call} waited 2 s inside MPI for the other 2 rank(s): ending the job"
    if fault == "lost":
        assert ended in job.stderr
        assert "returned" not in job.stdout
    else:  # a barrier may be taken for the meeting before node_key
        assert "CommError" in job.stdout or ended in job.stderr
        assert not re.search("rank [02]: returned", job.stdout)


# ---- rows that differ ----------------------------------------------------------------------------------------------


OTHERS = {
    "dtype": np.zeros((2, 3), np.int64),
    "row shape": np.zeros((2, 4)),
    "no bytes": np.zeros((2, 0)),
}


def differing_first_calls(comm: Comm) -> None:
    """The first call of each object compares, and the object works afterwards; later ones are `Checked`'s business."""
    nodes = Nodes.of_size(1, 2)
    for other in OTHERS.values():
        rows = other if comm.rank else np.zeros((2, 3))
        for make in (FlatAllToAll, lambda comm: HierarchicalAllToAll(comm, nodes), lambda comm: AutoAllToAll(comm)):
            a2a = make(comm)
            with pytest.raises(ValueError, match=r"the ranks differ: rank 0 called .*float64 .*, rank 1 called "):
                a2a(rows)
            with pytest.raises(ValueError, match=r"the ranks differ: rank 0 called .*float64 .*, rank 1 called "):
                a2a.rows(rows, [1, 1])
            assert a2a(np.full((2, 1), comm.rank)).tolist() == [[0], [1]]
        exchange = RoutedExchange(FlatAllToAll(comm), 1)
        routing = Routing(np.array([[0], [1]]), np.ones((2, 1), np.float32))
        with pytest.raises(ValueError, match=r"the ranks differ: rank 0 called RoutedExchange.dispatch"):
            exchange.dispatch(rows, routing)
        assert exchange.dispatch(np.full((2, 1), comm.rank), routing)[0][:, 0].tolist() == [0, 1]


def test_first_calls_that_differ_over_threads() -> None:
    threads.run(2, differing_first_calls)


def test_first_calls_that_differ_over_gloo() -> None:
    gloo_run(2, differing_first_calls)


@pytest.mark.mpi(min_size=4)
@pytest.mark.parametrize("limit", [None, 20.0])
def test_first_calls_that_differ_over_mpi(limit: float | None) -> None:
    def body(comm: Comm) -> None:
        differing_first_calls(comm)
        for other in OTHERS.values():
            with pytest.raises(ValueError, match=r"the ranks differ: rank 0 called all_to_all with float64"):
                type(comm)(comm._comm, limit=limit).all_to_all(other if comm.rank else np.zeros((2, 3)))  # type: ignore[call-arg, attr-defined]

    mpi_run(2, body, limit)


@pytest.mark.mpi(min_size=4)
def test_rows_without_bytes_over_mpi() -> None:
    def body(comm: Comm) -> None:
        assert comm.all_to_all(np.zeros((4, 0))).shape == (4, 0)
        assert comm.all_to_all(np.zeros((10, 0)), [1, 2, 3, 4], [comm.rank + 1] * 4).shape == (4 * (comm.rank + 1), 0)
        assert comm.all_gather(np.zeros((2, 0))).shape == (8, 0)

    mpi_run(4, body)


# ---- routes under Checked ------------------------------------------------------------------------------------------


def algorithms(comm: Comm) -> Iterator[Any]:
    yield FlatAllToAll(comm)
    yield HierarchicalAllToAll(comm, NODES)
    yield SharedAllToAll(comm, NODES)
    yield AutoAllToAll(comm, NODES)


def test_a_rank_that_sends_along_another_route() -> None:
    """The two routes differ in what ranks 0 and 1 send each other; ranks 2 and 3 alone could not tell."""

    def body(comm: Comm) -> None:
        for a2a in algorithms(Checked(comm)):
            one = np.ones(4, np.int64)
            two = one.copy()
            if comm.rank == 0:
                two[1] = 0
            first, second = a2a.route(one), a2a.route(two)
            for rank in range(4):
                route = first if comm.rank == rank else second
                rows = np.zeros((int(route.send_counts.sum()), 2))
                with pytest.raises(
                    ValueError, match=rf"the ranks differ: rank 0 called {type(a2a).__name__}.send with"
                ):
                    a2a.send(rows, route)
                back = np.zeros((int(route.recv_counts.sum()), 2))
                with pytest.raises(ValueError, match=r"the ranks differ: rank 0 called .*send_back with .* route"):
                    a2a.send_back(back, route)
            rows = np.arange(first.send_counts.sum()).reshape(-1, 1) + 10 * comm.rank
            assert a2a.send(rows, first)[:, 0].tolist() == [comm.rank + 10 * source for source in range(4)]

    threads.run(4, body)


def test_another_exchange_on_one_rank() -> None:
    def body(comm: Comm) -> None:
        comm = Checked(comm)
        a2a = HierarchicalAllToAll(comm, NODES)
        several = [RoutedExchange(a2a, 1), RoutedExchange(a2a, 1, send="tokens"), HierarchicalExchange(a2a, 1)]
        for first, second in ((0, 1), (1, 2), (2, 0)):
            exchange = several[first if comm.rank else second]
            with pytest.raises(ValueError, match=r"the ranks differ: rank 0 called .*Exchange.dispatch with .*send="):
                exchange.dispatch(np.zeros((1, 2)), FOUR)
        for exchange in several:
            assert dispatch_and_combine(exchange).tolist() == [[comm.rank, comm.rank]]

    threads.run(4, body)


def test_what_one_tensor_rank_refuses_is_raised_on_all_lanes() -> None:
    def body(comm: Comm) -> None:
        groups = build_groups(Checked(comm), Topology(4, tensor=2, expert=4))
        inner = RoutedExchange(FlatAllToAll(groups.expert_lane), [[comm.rank % 2], [2 + comm.rank % 2]])
        exchange = TensorParallelExchange(inner, groups.tensor)
        x = np.zeros((1, 2))
        for other in (np.zeros((1, 3)), np.zeros((1, 2), np.float32), [1.0]):
            with pytest.raises((ValueError, TypeError), match=r"TensorParallelExchange\.dispatch"):
                exchange.dispatch(other if comm.rank == 1 else x, FOUR)  # type: ignore[arg-type]
        rows, plan = exchange.dispatch(x, FOUR)
        with pytest.raises((ValueError, TypeError), match=r"TensorParallelExchange\.combine"):
            exchange.combine([1.0] if comm.rank == 1 else rows, plan)  # type: ignore[arg-type]
        assert exchange.combine(rows, plan).tolist() == [[0, 0]]

    threads.run(4, body)
