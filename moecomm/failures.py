"""What makes a Comm unusable: whatever leaves a collective before its last step.

A rank that leaves between two steps would bring the rows of its next call into the call that the other ranks are still
in. So the Comm refuses all later calls, and the other ranks end within their limit.
"""

from __future__ import annotations

import weakref
from typing import Protocol, TypeVar

from moecomm.errors import CommError
from moecomm.profiling import new_range

E = TypeVar("E", bound=BaseException)


class Failing(Protocol):
    """What `collective` needs of a Comm, or of an exchange that communicates without one."""

    failure: str | None

    def fail(self, why: str) -> None:
        """Refuse every later call."""


class collective:  # noqa: N801 - read as a word: with collective("dispatch", comm)
    """`with collective(call, *comms):` around all steps of a collective, its checks included.

    Any exception inside makes each of the Comms fail: a CommError, KeyboardInterrupt from the handler of a signal,
    MemoryError. An error that was marked by `refused` does not. The call has a range of its name in a profile.
    """

    __slots__ = ("_call", "_comms", "_range")

    def __init__(self, call: str, *comms: Failing) -> None:
        self._call = call
        self._comms = comms
        self._range = new_range(call)

    def __enter__(self) -> None:
        if self._range is not None:
            self._range.__enter__()

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if self._range is not None:
            self._range.__exit__(kind, error, trace)
        if error is None or getattr(error, "nothing_was_sent", False):
            return
        # A CommError says already what has failed; the name of any other exception is part of the reason.
        reason = str(error) if isinstance(error, CommError) else f"{type(error).__name__}: {error}"
        for comm in self._comms:
            comm.fail(f"{self._call} failed: {reason}")


def refused(error: E) -> E:
    """Mark an error that is raised before anything is sent, or on all ranks alike: the Comm stays usable."""
    # On the error itself: it may pass through the calls of several Comms on its way up.
    error.nothing_was_sent = True  # type: ignore[attr-defined]
    return error


class Sharers:
    """The Comms of this rank over one communicator of a library: when one of them fails, all do."""

    def __init__(self) -> None:
        self._failure: str | None = None
        self._comms: weakref.WeakSet[Failing] = weakref.WeakSet()

    def add(self, comm: Failing) -> None:
        """A new Comm over the communicator, which has failed already if an earlier one has."""
        self._comms.add(comm)
        comm.failure = self._failure

    def fail(self, why: str) -> None:
        """One of them has failed."""
        self._failure = self._failure or why
        for comm in self._comms:
            if comm.failure is None:
                comm.fail(why)
