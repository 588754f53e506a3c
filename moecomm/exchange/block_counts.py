"""BlockCounts: what the ranks of a hop tell each other before any row goes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from moecomm.all_to_all import AllToAll, Route
from moecomm.all_to_all.base import Hop
from moecomm.arrays import Array, Counts, zeros
from moecomm.comm import Comm
from moecomm.exchange.path import Leg
from moecomm.exchange.table import as_int32, repeated
from moecomm.failures import refused
from moecomm.gating.routing import STATUSES, problem

if TYPE_CHECKING:
    import torch

UNKNOWN_EXPERT = STATUSES
"""The bit of a status that says so: the lower ones are those of Routing.status."""
ALARMS = 2 * STATUSES
"""An alarm is this times the number of ranks from its rank to the last, plus the status of the routing, or 0 where that
is 0. So the largest alarm is that of the lowest rank."""


class BlockCounts:
    """How many assignments, in blocks, and rows each rank of a hop sends to each other.

    Where the numbers are on a GPU they are copied to the host beside the work that is queued after them, and
    `on_host` waits for them: legs do so when rows first go along them.

    assignments  [size of the hop, blocks] those that each rank has for this one
    rows         [size of the hop] the same of rows
    others       [size of the hop, columns] what else the ranks had to tell
    alarm        [size of the hop] whether one of them, or a rank that it speaks for, has an unusable routing

    Made by `exchange`, which is collective.
    """

    def __init__(self, all_to_all: AllToAll, sent: Array, num_blocks: int) -> None:
        received, self._hops = all_to_all._tell(sent)
        self._all_to_all = all_to_all
        self._num_blocks = num_blocks
        # Blocks are moved by their counts in one piece of memory.
        assignments = received[:, :num_blocks]
        on_host = isinstance(received, np.ndarray)
        self.assignments = np.ascontiguousarray(assignments) if on_host else assignments.contiguous()
        self.rows = received[:, num_blocks]
        self.others = received[:, num_blocks + 1 : -1]
        self.alarm = received[:, -1]
        self._numbers = [sent, received, *(numbers for hop in self._hops for numbers in hop)]
        self._event: torch.cuda.Event | None = None
        if not on_host:
            self._copy_to_host()

    @classmethod
    def exchange(
        cls, all_to_all: AllToAll, assignments: Array, rows: Array | None, alarm: Array, others: Array | None = None
    ) -> BlockCounts:
        """What this rank tells: the same arrays, by the rank that is told; rows None: as many as assignments.

        Collective over the all-to-all.
        """
        _refuse_capture(assignments)
        size, num_blocks = assignments.shape
        num_others = 0 if others is None else others.shape[1]
        sent = zeros((size, num_blocks + num_others + 2), "int64", assignments)
        sent[:, :num_blocks] = assignments
        # All numbers in one message for each rank: with few tokens a dispatch costs what its messages cost.
        sent[:, num_blocks] = assignments.sum(1) if rows is None else rows
        if others is not None:
            sent[:, num_blocks + 1 : -1] = others
        sent[:, -1] = alarm
        return cls(all_to_all, sent, num_blocks)

    def _copy_to_host(self) -> None:
        import torch

        # Tensors on a CPU share their memory with numpy.
        if self.alarm.device.type == "cpu":
            self._numbers = [numbers.numpy() for numbers in self._numbers]
            return
        on_device = self._numbers
        # Pinned memory: a copy to other memory would hold the host up until the device has come to it.
        copies = [torch.empty_like(numbers, device="cpu", pin_memory=True) for numbers in on_device]
        for copy, numbers in zip(copies, on_device, strict=True):
            copy.copy_(numbers, non_blocking=True)
        self._event = torch.cuda.Event()
        self._event.record()
        self._numbers = [copy.numpy() for copy in copies]

    def on_host(self) -> list[Counts]:
        """What was sent, what was received and what each hop saw, as numpy. Waits for the device where it is on one."""
        if self._event is not None:
            self._event.synchronize()
            self._event = None
        return self._numbers

    def received_on_host(self) -> Counts:
        """`assignments` as a numpy array."""
        return self.on_host()[1][:, : self._num_blocks]

    def raise_alarm(self, comm: Comm) -> None:
        """Raise ValueError where a rank has an unusable routing. All ranks of comm got the same alarms."""
        # The same one on all ranks, so that all raise the same error and go on together.
        alarm = int(self.on_host()[1][:, -1].max())
        if not alarm:
            return
        ranks_left, status = divmod(alarm, ALARMS)
        rank = comm.size - ranks_left
        texts = [problem(status)] if status % UNKNOWN_EXPERT else []
        texts += ["routing.expert names an expert that no rank holds"] if status & UNKNOWN_EXPERT else []
        told = f"dispatch: the gate of rank {comm.world_rank(rank)} had no answer: {'; '.join(texts)}"
        raise refused(ValueError(f"{told}{comm.where()}"))

    def leg_of_rows(self, alarmed: Comm | None = None) -> Leg:
        """The leg of the rows. alarmed: where the counts come home the alarms of its ranks are raised."""

        def route() -> Route:
            if alarmed is not None:
                self.raise_alarm(alarmed)
            return self._route(slice(self._num_blocks, self._num_blocks + 1))

        return Leg(self._all_to_all, route)

    def send_choices(self, choice: Array, num_choices: int) -> Array:
        """The numbers of assignments, in blocks: of each its row and choice, row * num_choices + choice.

        choice   [N] int32, rows counted among those for the same rank
        returns  [M] int32, rows counted among all that come

        Collective.
        """
        choice = Leg(self._all_to_all, lambda: self._route(slice(0, self._num_blocks))).out(choice)
        # Each source counted its own rows from 0; here those of the sources before it come first.
        first_row = self.rows.cumsum(0) - self.rows
        return choice + as_int32(repeated(first_row * num_choices, self.assignments.sum(1), len(choice)))

    def _route(self, columns: slice) -> Route:
        """The route of the sums over some columns. Collective."""
        sums = [numbers[:, columns].sum(axis=1) for numbers in self.on_host()]
        hops = [Hop(*sums[first : first + 3]) for first in range(2, len(sums), 3)]
        return self._all_to_all._told_route(sums[0], sums[1], hops)


def _refuse_capture(array: Array) -> None:
    if isinstance(array, np.ndarray) or not array.is_cuda:
        return
    import torch

    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "dispatch: a CUDA graph cannot hold it, because the host waits for counts of rows; StaticExchange sends "
            "none"
        )
