"""Exchange: tokens to the ranks of their experts, and the answers home. The contract that every exchange keeps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Generic, Protocol, TypeVar

from moecomm.arrays import Array
from moecomm.comm import Comm
from moecomm.failures import Failing
from moecomm.gating import Routing


class ExchangePlan(Protocol):
    """What a dispatch decided. The combine of the same exchange takes it; several plans may be in flight."""

    @property
    def rows_per_expert(self) -> Array:
        """[local experts] integers: the rows that dispatch returned for each expert of this rank, padding included.

        numpy, or a tensor on the device of the rows where the host does not know them.
        """


P = TypeVar("P", bound=ExchangePlan)


class Exchange(ABC, Generic[P]):
    """Brings each token to its experts, wherever they are, and the weighted sum of their answers back.

    To write one, set the attributes without a value and those whose default does not fit, write `dispatch` and
    `combine`, and call `testing.check_exchange`.
    """

    num_experts: int
    """E, one more than the highest id of an expert."""
    num_local_experts: int
    """Experts of this rank."""
    local_experts: Sequence[int]
    """Their ids, in the order of the rows that dispatch returns."""
    experts: Sequence[Sequence[int]]
    """The same of each rank that dispatch sends to."""
    on_lanes: bool = False
    """Whether those ranks are the ones of this tensor rank's lane. They are the whole expert group otherwise."""
    tensor: Comm | None = None
    """The ranks that must call dispatch with the same tokens and the same routing, or None: this one alone."""
    needs_table: bool = False
    """Whether dispatch needs the tables of rows that `route` makes. Otherwise expert and weight are enough."""
    fp8: Any = None
    """The 8-bit floats in which dispatch returns rows, with scales in its plan; None: the dtype of the tokens."""
    tells_unusable: bool = False
    """Whether dispatch raises on all ranks where the status of one rank's routing is not 0: a gate that notes its
    status then needs not raise on that rank alone, which would leave the others waiting."""

    @property
    def comms(self) -> tuple[Failing, ...]:
        """What this rank talks to other ranks through. They are made to fail where a rank gives up between dispatch
        and combine."""
        return ()

    @abstractmethod
    def dispatch(self, x: Array, routing: Routing) -> tuple[Array, P]:
        """Send every token to its experts.

        x        [T, H]  a rank may have no tokens
        routing  expert [T, K], -1 for an assignment that was dropped; weight [T, K]
        returns  ([N, H], plan)  the rows for this rank's experts, grouped by expert in the order of `local_experts`,
                 then by source rank, then by token. Padding lies behind the rows of an expert; what lies behind the
                 rows of the last expert means nothing

        Collective, and so is the backward pass: all ranks go through it or none. Differentiable in x.
        """

    @abstractmethod
    def combine(self, rows: Array, plan: P) -> Array:
        """Bring the experts' answers home.

        rows     [N, H]  answers, in the order of what dispatch returned; padding is ignored
        returns  [T, H]  for each token the sum of its experts' answers times their weights; zeros where it has none

        Collective, and so is the backward pass. Differentiable in rows and in the weights given to dispatch.
        """

    def rows_sent(self, plan: P) -> int:
        """Rows that this rank sends to other ranks in dispatch and combine; 0 where the host does not know.

        Not collective.
        """
        return 0
