"""The NCCL transport over a stand-in for cupy's NCCL: the ranks are threads, and torch's host memory plays the GPU.

What needs GPUs is in tests/programs/nccl.py.
"""

from __future__ import annotations

import ctypes
import itertools
import queue
import subprocess
import sys
import threading
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from moecomm import Comm, CommError, FlatAllToAll, HierarchicalAllToAll, Nodes, testing
from moecomm.arrays import is_torch
from moecomm.transports import nccl as transport
from moecomm.transports import threads

torch = pytest.importorskip("torch")

DTYPES = {"NCCL_FLOAT32": "f4", "NCCL_FLOAT64": "f8", "NCCL_INT64": "i8", "NCCL_INT32": "i4"}


class FakeNccl(SimpleNamespace):
    """The functions of cupy.cuda.nccl that the transport calls, with their arguments. A group happens at its end."""

    NcclConfig = object
    NcclError = type("NcclError", (RuntimeError,), {})
    NCCL_UINT8, NCCL_SUM = "u1", 0

    def __init__(self) -> None:
        self.num_made = itertools.count()
        self.ways: dict[tuple[bytes, int, int], queue.Queue[bytes]] = {}
        self.of_thread = threading.local()
        self.get_unique_id = lambda: next(self.num_made).to_bytes(128, "big")
        self.NcclCommunicator = lambda size, unique_id, rank: FakeCommunicator(self, size, unique_id, rank)
        vars(self).update(DTYPES)

    def way(self, unique_id: bytes, source: int, destination: int) -> queue.Queue[bytes]:
        return self.ways.setdefault((unique_id, source, destination), queue.Queue())  # at once, as threads need it

    def groupStart(self) -> None:  # noqa: N802
        self.of_thread.group = []

    def groupEnd(self) -> None:  # noqa: N802
        for step in sorted(self.of_thread.group, key=lambda step: step[0]):  # all sends, then all receives
            step[1]()


class FakeCommunicator:
    def __init__(self, nccl: FakeNccl, size: int, unique_id: bytes, rank: int) -> None:
        self.nccl, self.size, self.id, self.rank = nccl, size, unique_id, rank
        self.is_alive = True

    def send(self, address: int, num_bytes: int, dtype: str, peer: int, stream: int) -> None:
        way = self.nccl.way(self.id, self.rank, peer)
        self.nccl.of_thread.group.append((0, lambda: way.put(ctypes.string_at(address, num_bytes))))

    def recv(self, address: int, num_bytes: int, dtype: str, peer: int, stream: int) -> None:
        def step() -> None:
            came = self.nccl.way(self.id, peer, self.rank).get(timeout=20)
            assert len(came) == num_bytes, "a message of another size than was expected"
            ctypes.memmove(address, came, num_bytes)

        self.nccl.of_thread.group.append((1, step))

    def gathered(self, mine: bytes) -> list[bytes]:
        for peer in range(self.size):
            self.nccl.way(self.id, self.rank, peer).put(mine)
        return [self.nccl.way(self.id, peer, self.rank).get(timeout=20) for peer in range(self.size)]

    def allGather(self, send: int, recv: int, count: int, dtype: str, stream: int) -> None:  # noqa: N802
        every = b"".join(self.gathered(ctypes.string_at(send, count)))
        ctypes.memmove(recv, every, len(every))

    def allReduce(self, send: int, recv: int, count: int, dtype: str, op: int, stream: int) -> None:  # noqa: N802
        every = self.gathered(ctypes.string_at(send, count * np.dtype(dtype).itemsize))
        total = sum(np.frombuffer(part, dtype) for part in every)
        ctypes.memmove(recv, np.asarray(total, dtype).tobytes(), count * np.dtype(dtype).itemsize)

    def check_async_error(self) -> None:
        assert self.is_alive

    def abort(self) -> None:
        self.is_alive = False

    destroy = abort


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    cuda = SimpleNamespace(
        nccl=FakeNccl(),
        Device=lambda device: nullcontext(),
        ExternalStream=lambda ptr: SimpleNamespace(ptr=ptr, done=True),
    )
    monkeypatch.setattr(transport, "_load_cupy", lambda: SimpleNamespace(cuda=cuda))
    monkeypatch.setattr(transport, "on_host", lambda array: not is_torch(array))
    monkeypatch.setattr(transport, "_current_stream", lambda *of: 0)
    return cuda


def run(size: int, body: Any, limit: float | None = None) -> None:
    threads.run(size, lambda comm: body(transport.NcclComm(comm)), limit=limit)


@pytest.mark.parametrize("limit", [None, 20.0])
@pytest.mark.parametrize("make", [np.asarray, torch.from_numpy], ids=["numpy", "torch"])
def test_conformance(cuda: SimpleNamespace, make: testing.Make, limit: float | None) -> None:
    testing.check_comm(lambda size, body: run(size, body, limit), make=make)


def test_all_to_all_conformance(cuda: SimpleNamespace) -> None:
    def body(comm: Comm) -> None:
        testing.check_all_to_all_on(comm, FlatAllToAll(comm), make=torch.from_numpy)
        for ranks_per_node in (1, 2, 3):
            a2a = HierarchicalAllToAll(comm, Nodes.of_size(ranks_per_node, comm.size))
            testing.check_all_to_all_on(comm, a2a, make=torch.from_numpy)

    run(4, body)


def test_nccl_is_asked_for_nothing_before_a_device_array_comes(cuda: SimpleNamespace) -> None:
    def body(comm: Comm) -> None:
        part = comm.split(0)
        part.barrier()
        assert part.all_gather(np.array([part.rank])).tolist() == [0, 1]
        part.free()

    run(2, body)
    assert next(cuda.nccl.num_made) == 0


def test_an_error_of_nccl(cuda: SimpleNamespace) -> None:
    """Its communicator is aborted, so that nothing of it stays on the GPU."""

    def body(comm: Comm) -> None:
        x = torch.ones(2, 3)
        assert (comm.all_to_all(x) == 1).all()
        communicator = comm._communicator  # type: ignore[attr-defined]

        def fails() -> None:
            raise cuda.nccl.NcclError("remote process exited")

        communicator.check_async_error = fails
        with pytest.raises(CommError, match=rf"all_to_all: remote process exited  \(rank {comm.rank} of 2\)"):
            comm.all_to_all(x)
        assert not communicator.is_alive
        with pytest.raises(CommError, match="barrier: this Comm cannot be used: all_to_all failed"):
            comm.barrier()

    run(2, body)


def test_two_ranks_on_one_gpu(cuda: SimpleNamespace) -> None:
    def refuse(size: int, unique_id: bytes, rank: int) -> None:
        raise cuda.nccl.NcclError("invalid usage")

    cuda.nccl.NcclCommunicator = refuse

    def body(comm: Comm) -> None:
        with pytest.raises(CommError, match=r"all_reduce: no NCCL communicator could be made, .* invalid usage"):
            comm.all_reduce(torch.ones(3))

    run(2, body)


def test_a_collective_that_does_not_end(cuda: SimpleNamespace) -> None:
    def body(comm: Comm) -> None:
        comm.all_to_all(torch.ones(2, 3))
        communicator = comm._communicator  # type: ignore[attr-defined]
        cuda.ExternalStream = lambda ptr: SimpleNamespace(ptr=ptr, done=False)
        with pytest.raises(CommError, match=r"all_to_all waited 0.2 s for the other 1 rank\(s\)"):
            comm.all_to_all(torch.ones(2, 3))
        assert not communicator.is_alive

    run(2, body, limit=0.2)


def test_a_rank_that_never_comes(cuda: SimpleNamespace) -> None:
    """Noticed before NCCL is called, which would wait without a limit."""

    def body(comm: Comm) -> None:
        if comm.rank == 0:
            with pytest.raises(CommError, match=r"waited|has returned"):
                comm.all_to_all(torch.ones(2, 3))

    run(2, body, limit=0.2)


@pytest.mark.parametrize("missing", ["cupy", "cupy.cuda.nccl"])
def test_it_says_what_is_missing(missing: str) -> None:
    program = (
        f"import sys; sys.modules[{missing!r}] = None\n"
        "from moecomm.transports import nccl, threads\n"
        "threads.run(1, nccl.NcclComm)"
    )
    job = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert job.returncode != 0
    assert "ImportError: moecomm's NCCL transport needs cupy and NCCL" in job.stderr
    assert "pip install 'moecomm[cuda13]'" in job.stderr
