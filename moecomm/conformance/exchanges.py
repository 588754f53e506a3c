"""check_exchange: whether tokens reach their experts and the weighted sums come home, as the contract of Exchange says.

Every rank makes the whole world's tokens and choices from a seed, so each knows what it must get without asking. What
an exchange gives is compared with a dense definition: loops over tokens and choices, in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moecomm.arrays import Array, dtype_name, is_torch
from moecomm.comm import Comm
from moecomm.conformance.moves import Make, Run, as_numpy, naming_rank
from moecomm.exchange.contract import Exchange
from moecomm.gating import Routing, route

HIDDEN = 5
TOLERANCE = {"float64": 1e-12, "float32": 1e-5, "float16": 4e-3, "bfloat16": 3e-2}
"""Relative, of a sum of several products that is rounded once or twice."""

WEIGHT_TOLERANCE = 1e-5
"""At least, of the gradient of the weights, which are float32 whatever the tokens are."""


@dataclass(frozen=True)
class ExchangeCase:
    """The sizes that an exchange is made for."""

    num_experts: int
    """E, a multiple of the number of ranks."""
    top_k: int
    hidden: int
    max_tokens: int
    """The most tokens of a rank."""
    dtype: str
    """Of the tokens, as numpy and torch name it."""


@dataclass(frozen=True, eq=False)
class Batch:
    """The tokens of one rank, or of several that hold the same ones."""

    x: NDArray[np.float64]
    """[T, H]"""
    expert: NDArray[np.int32]
    """[T, K]"""
    weight: NDArray[np.float32]
    """[T, K]"""
    capacity: int | None
    logits: NDArray[np.float32]
    """[T, E] that `route` makes expert and weight from."""
    mask: NDArray[np.bool_]
    """[T] the tokens that are routed at all."""
    direction: NDArray[np.float64]
    """[T, H] the gradient of the sums."""


def check_exchange(
    run: Run,
    exchange: Callable[[Comm, ExchangeCase], Exchange],
    sizes: Iterable[int] = (1, 2, 3, 4),
    make: Make = np.asarray,
    dtypes: Iterable[str] = ("float32", "float64"),
) -> None:
    """Raise AssertionError unless the exchange keeps the contract of `Exchange`, gradients included for torch tensors.

    run       starts the ranks, e.g. threads.run
    exchange  collective; makes the exchange to test, for the sizes of a case
    sizes     numbers of ranks to try
    make      the kind of array that tokens, weights and choices come in; a torch tensor has its gradient checked
    dtypes    of the tokens: names that numpy knows
    """
    for size in sizes:
        for dtype in dtypes:
            for case in cases(size, dtype):

                def check(comm: Comm, case: ExchangeCase = case) -> None:
                    check_exchange_on(comm, exchange(comm, case), case, make)

                run(size, check)


def check_exchange_on(comm: Comm, exchange: Exchange, case: ExchangeCase, make: Make = np.asarray) -> None:
    """The same for one exchange among all ranks of `comm`. Collective over comm."""
    with naming_rank(comm):
        assert exchange.num_experts == case.num_experts, f"num_experts is {exchange.num_experts}, case {case}"
        batch_of_rank = _batch_numbers(comm, exchange)
        experts = _local_experts(comm, exchange)
        assert exchange.num_local_experts == len(experts), f"num_local_experts is {exchange.num_local_experts}"
        for batches in worlds(comm.size, case):
            # Ranks that share their tokens, as tensor ranks do, have one batch.
            world = [batches[number] for number in batch_of_rank]
            _Check(comm, exchange, case, make, world, experts).run()


def cases(size: int, dtype: str) -> Iterator[ExchangeCase]:
    """One choice for each token, some, and nearly all experts."""
    for experts_per_rank, top_k in ((1, 1), (2, 2), (4, 4 * size - 1)):
        yield ExchangeCase(
            num_experts=experts_per_rank * size,
            top_k=min(top_k, 24),
            hidden=HIDDEN,
            max_tokens=11,
            dtype=dtype,
        )


def worlds(size: int, case: ExchangeCase) -> Iterator[list[Batch]]:
    """For each rank a batch: the hard cases."""
    rng = np.random.default_rng([size, case.num_experts, case.top_k])
    # A rank without tokens among others that have some.
    uneven = rng.integers(1, case.max_tokens + 1, size)
    uneven[1:2] = 0
    for num_tokens in ([0] * size, [1] * size, uneven):
        yield [_batch(rng, case, int(number)) for number in num_tokens]
    full = case.max_tokens
    yield [_batch(rng, case, full, ties=True) for _ in range(size)]
    yield [_batch(rng, case, full, popular=True) for _ in range(size)]
    yield [_batch(rng, case, full, masked=rank == size - 1) for rank in range(size)]
    yield [_batch(rng, case, full, popular=True, capacity=2) for _ in range(size)]


def _batch(
    rng: np.random.Generator,
    case: ExchangeCase,
    num_tokens: int,
    *,
    ties: bool = False,
    popular: bool = False,
    masked: bool = False,
    capacity: int | None = None,
) -> Batch:
    """Tokens whose gate has equal numbers, has experts that all tokens choose, or drops what it chose."""
    logits = rng.standard_normal((num_tokens, case.num_experts)).astype(np.float32)
    if ties:
        logits = np.round(logits)
    if popular:
        logits[:, : case.top_k] += 100
    mask = np.full(num_tokens, not masked)
    if num_tokens > 2:
        mask[rng.integers(num_tokens)] = False
    routing = route(
        logits,
        case.top_k,
        mask=mask,
        capacity=capacity,
        score="sigmoid",
    )
    shape = (num_tokens, case.hidden)
    # Numbers that every dtype of a case has exactly, so that rows can be compared bit by bit.
    x = rng.integers(-64, 65, shape) / 64
    direction = rng.integers(-8, 9, shape) / 8
    return Batch(
        x,
        routing.expert,
        routing.weight,
        capacity,
        logits,
        mask,
        direction,
    )


# ---- which ranks hold what -----------------------------------------------------------------------------------------


def _batch_numbers(comm: Comm, exchange: Exchange) -> list[int]:
    """[size] which batch each rank has: that of the lowest of its tensor ranks."""
    rank = np.array([comm.rank])
    if exchange.tensor is not None:
        rank = exchange.tensor.all_gather(rank).min(keepdims=True)
    return comm.all_gather(rank).tolist()


def _local_experts(comm: Comm, exchange: Exchange) -> list[int]:
    """The ids of this rank's experts, which together with those of the other ranks must be all experts."""
    experts = list(exchange.local_experts)
    ids = np.full((1, exchange.num_experts), -1)
    ids[0, : len(experts)] = experts
    all_ids = np.unique(comm.all_gather(ids))
    # A missing expert would show as a token that comes nowhere, far from its cause.
    missing = np.setdiff1d(np.arange(exchange.num_experts), all_ids)
    assert not missing.size, f"no rank holds the experts {missing}"
    return experts


# ---- one dispatch and combine --------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Check:
    """One batch on each rank, sent to its experts and brought home."""

    comm: Comm
    exchange: Exchange
    case: ExchangeCase
    make: Make
    world: list[Batch]
    """[size] the batch of each rank."""
    experts: list[int]
    """The ids of this rank's experts."""

    def run(self) -> None:
        """Dispatch, combine and, of torch tensors, the backward pass. Collective."""
        batch = self.world[self.comm.rank]
        x = self.make(batch.x.astype(self.case.dtype))
        routing = self._routing(batch)
        is_differentiable = is_torch(x)
        if is_differentiable:
            x = x.requires_grad_()
            # A weight without a history: its gradient stops here instead of going on into the gate.
            weight = routing.weight.detach().requires_grad_()
            routing = replace(routing, weight=weight)
        rows, plan = self.exchange.dispatch(x, routing)
        counts = as_numpy(plan.rows_per_expert).astype(np.int64)
        self._check_rows(as_numpy(rows), counts)
        y = self.exchange.combine(self._answers(rows, counts), plan)
        assert y.dtype == x.dtype, f"combine: dtype is {y.dtype}, expected {x.dtype}"
        tokens = self._tokens_at_home(len(batch.x), len(y))
        sums, grad_x, grad_weight = definition(batch)
        self._check_close(y, sums[tokens], "combine")
        if is_differentiable:
            direction = batch.direction[tokens].astype(self.case.dtype)
            y.backward(self.make(direction))
            self._check_close(x.grad, grad_x, "the gradient of x")
            # A choice that was dropped has no answer, so its gradient says nothing.
            gradient = as_numpy(routing.weight.grad) * (batch.expert >= 0)
            self._check_close(gradient, grad_weight, "the gradient of weight", WEIGHT_TOLERANCE)

    def _routing(self, batch: Batch) -> Routing:
        """With the tables of rows, or with what an exchange can do with alone."""
        if not self.exchange.needs_table:
            return Routing(self.make(batch.expert), self.make(batch.weight))
        return route(
            self.make(batch.logits),
            self.case.top_k,
            mask=self.make(batch.mask),
            capacity=batch.capacity,
            score="sigmoid",
        )

    def _answers(self, rows: Array, counts: NDArray[np.int64]) -> Array:
        """Of this rank's experts, for the rows that dispatch returned; as many rows."""
        factors = np.zeros((len(rows), 1))
        # Padding behind the last expert's rows is answered with zeros.
        num_rows = counts.sum()
        factors[:num_rows, 0] = np.repeat([factor(expert) for expert in self.experts], counts)
        return self.make(factors.astype(dtype_name(rows))) * rows * rows

    def _tokens_at_home(self, num_tokens: int, num_sums: int) -> slice:
        """The tokens whose sums combine returns: all, or those of this rank's share of the sequence."""
        tensor = self.exchange.tensor
        if tensor is None or num_sums == num_tokens:
            return slice(None)
        share = np.array_split(np.arange(num_tokens), tensor.size)[tensor.rank]
        start = int(share[0]) if share.size else num_tokens
        return slice(start, start + share.size)

    def _check_rows(self, rows: NDArray[Any], counts: NDArray[np.int64]) -> None:
        """Rows of an exchange without lanes must be those of the definition, in order; with lanes, be among them."""
        assert len(counts) == len(self.experts), (
            f"rows_per_expert has {len(counts)} entries, expected {len(self.experts)}"
        )
        start = 0
        for expert, count in zip(self.experts, counts.tolist(), strict=True):
            block = rows[start : start + count].astype(np.float64)
            start += count
            label = f"dispatch: rows of expert {expert}"
            if self.exchange.on_lanes:
                # Which lane takes an assignment is the exchange's choice.
                tokens = {row.tobytes() for row in self._rows_of(expert)}
                is_known = [row.tobytes() in tokens for row in block]
                assert all(is_known), f"{label}: got a row that no rank sent"
            else:
                self._check_block(block, self._rows_of(expert), label)

    def _rows_of(self, expert: int) -> NDArray[np.float64]:
        """The tokens that chose the expert, in rank order, of the ranks that this one exchanges rows with."""
        # An exchange of one group alone, on one rank, stays local however many ranks the world has.
        is_local = len(self.exchange.experts) == 1
        batches = [self.world[self.comm.rank]] if is_local else self.world
        return np.concatenate([batch.x[(batch.expert == expert).any(axis=1)] for batch in batches])

    def _check_block(self, block: NDArray[np.float64], expected: NDArray[np.float64], label: str) -> None:
        """Padding may lie behind them."""
        num_rows = len(expected)
        assert len(block) >= num_rows, f"{label}: {len(block)}, expected {num_rows}"
        assert (block[:num_rows] == expected).all(), f"{label}: got {block}, expected {expected}"
        assert (block[num_rows:] == 0).all(), f"{label}: padding is {block[num_rows:]}"

    def _check_close(
        self,
        result: Array,
        expected: NDArray[np.float64],
        label: str,
        tolerance: float = 0.0,
    ) -> None:
        """Within the tolerance of the dtype, or the given one where that is larger."""
        array = as_numpy(result).astype(np.float64)
        assert array.shape == expected.shape, f"{label}: shape {array.shape}, expected {expected.shape}"
        error = np.abs(array - expected).max(initial=0.0)
        # Small numbers may be differences of large ones: they are judged by the largest.
        scale = max(1.0, np.abs(expected).max(initial=0.0))
        bound = scale * max(tolerance, TOLERANCE[self.case.dtype])
        assert error <= bound, f"{label}: {error} away from the definition, at most {bound} expected"


def definition(batch: Batch) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """The sums [T, H], and the gradients of x [T, H] and of weight [T, K]. Expert e answers v with factor(e) v^2."""
    sums = np.zeros_like(batch.x)
    grad_x = np.zeros_like(batch.x)
    grad_weight = np.zeros(batch.weight.shape)
    for token, choice in np.ndindex(*batch.expert.shape):
        expert = batch.expert[token, choice]
        if expert < 0:
            continue
        weight = float(batch.weight[token, choice])
        x = batch.x[token]
        direction = batch.direction[token]
        answer = factor(expert) * x**2
        slope = factor(expert) * 2 * x
        sums[token] += weight * answer
        grad_x[token] += weight * slope * direction
        grad_weight[token, choice] = (answer * direction).sum()
    return sums, grad_x, grad_weight


def factor(expert: int) -> float:
    """What an expert multiplies the squares by."""
    # Few bits: a product with it is exact, and neighbouring experts differ.
    return 0.25 * (1 + expert % 7)
