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

from moecomm.arrays import Array, is_torch
from moecomm.comm import Comm
from moecomm.conformance.moves import Make, Run
from moecomm.exchange.contract import Exchange
from moecomm.gating import Routing, route

HIDDEN = 5
TOLERANCE = {"float64": 1e-12, "float32": 1e-5, "float16": 4e-3, "bfloat16": 3e-2}
"""Relative, of a sum of several products that is rounded once or twice."""


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
                run(size, lambda comm, case=case: check_exchange_on(comm, exchange(comm, case), case, make))  # type: ignore[misc]


def check_exchange_on(comm: Comm, exchange: Exchange, case: ExchangeCase, make: Make = np.asarray) -> None:
    """The same for one exchange among all ranks of `comm`. Collective over comm."""
    assert exchange.num_experts == case.num_experts, f"num_experts is {exchange.num_experts}, case {case}"
    batch_of_rank = _batch_numbers(comm, exchange)
    held = _held_experts(comm, exchange)
    assert exchange.num_local_experts == len(held[comm.rank]), f"num_local_experts is {exchange.num_local_experts}"
    for batches in worlds(comm.size, case):
        world = [batches[number] for number in batch_of_rank]
        routing = _routing(world[comm.rank], make, exchange.needs_table)
        _check_call(comm, exchange, case, make, world, held, routing)


def cases(size: int, dtype: str) -> Iterator[ExchangeCase]:
    """One choice for each token, some, and nearly all experts."""
    for experts_per_rank, top_k in ((1, 1), (2, 2), (4, 4 * size - 1)):
        yield ExchangeCase(experts_per_rank * size, min(top_k, 24), HIDDEN, 11, dtype)


def worlds(size: int, case: ExchangeCase) -> Iterator[list[Batch]]:
    """For each rank a batch: the hard cases."""
    rng = np.random.default_rng([size, case.num_experts, case.top_k])
    most = case.max_tokens
    uneven = [0 if rank == 1 else int(rng.integers(1, most + 1)) for rank in range(size)]
    for num_tokens in ([0] * size, [1] * size, uneven):
        yield [_batch(rng, case, num_tokens[rank]) for rank in range(size)]
    yield [_batch(rng, case, most, ties=True) for _ in range(size)]
    yield [_batch(rng, case, most, popular=True) for _ in range(size)]
    yield [_batch(rng, case, most, masked=rank == size - 1) for rank in range(size)]
    yield [_batch(rng, case, most, popular=True, capacity=2) for _ in range(size)]


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
    routing = route(logits, case.top_k, mask=mask, capacity=capacity, score="sigmoid")
    shape = (num_tokens, case.hidden)
    # Numbers that every dtype of a case has exactly, so that rows can be compared bit by bit.
    x = rng.integers(-64, 65, shape) / 64
    direction = rng.integers(-8, 9, shape) / 8
    return Batch(x, routing.expert, routing.weight, capacity, logits, mask, direction)


def _routing(batch: Batch, make: Make, needs_table: bool) -> Routing:
    """With the tables of rows, or with what an exchange can do with alone."""
    if not needs_table:
        return Routing(make(batch.expert), make(batch.weight))
    top_k = batch.expert.shape[1]
    return route(make(batch.logits), top_k, mask=make(batch.mask), capacity=batch.capacity, score="sigmoid")


# ---- which ranks hold what -----------------------------------------------------------------------------------------


def _batch_numbers(comm: Comm, exchange: Exchange) -> list[int]:
    """[size] which batch each rank has: that of the first of its tensor ranks."""
    first = comm.rank if exchange.tensor is None else int(exchange.tensor.all_gather(np.array([comm.rank])).min())
    return comm.all_gather(np.array([first])).tolist()


def _held_experts(comm: Comm, exchange: Exchange) -> list[list[int]]:
    """[size] the ids of each rank's experts."""
    ids = np.full((1, exchange.num_experts), -1)
    ids[0, : exchange.num_local_experts] = exchange.local_experts
    return [row[row >= 0].tolist() for row in comm.all_gather(ids)]


# ---- one dispatch and combine --------------------------------------------------------------------------------------


def _check_call(
    comm: Comm,
    exchange: Exchange,
    case: ExchangeCase,
    make: Make,
    world: list[Batch],
    held: list[list[int]],
    routing: Routing,
) -> None:
    own = world[comm.rank]
    x = make(own.x.astype(case.dtype))
    is_differentiable = is_torch(x)
    if is_differentiable:
        x = x.requires_grad_()
        routing = replace(routing, weight=routing.weight.detach().requires_grad_())
    rows, plan = exchange.dispatch(x, routing)
    counts = _numpy(plan.rows_per_expert).astype(np.int64)
    _check_rows(comm, exchange, world, held[comm.rank], _numpy(rows), counts)
    y = exchange.combine(_answers(rows, held[comm.rank], counts, make), plan)
    sums, grad_x, grad_weight = definition(own)
    part = slice(None)
    if exchange.tensor is not None and len(y) != len(x):  # this rank's part of the sequence
        ends = np.cumsum([0, *map(len, np.array_split(own.x, exchange.tensor.size))])
        part = slice(ends[exchange.tensor.rank], ends[exchange.tensor.rank + 1])
    tolerance = TOLERANCE[case.dtype]
    _close(y, sums[part], tolerance, "combine", comm)
    assert y.dtype == x.dtype, f"combine: dtype is {y.dtype}, expected {x.dtype}{comm.where()}"
    if is_differentiable:
        y.backward(make(own.direction[part].astype(case.dtype)))
        _close(x.grad, grad_x, tolerance, "the gradient of x", comm)
        kept = own.expert >= 0
        _close(_numpy(routing.weight.grad) * kept, grad_weight, max(tolerance, 1e-5), "the gradient of weight", comm)


def definition(batch: Batch) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """The sums [T, H], and the gradients of x [T, H] and of weight [T, K]. Expert e answers v with factor(e) v^2."""
    y, grad_x = np.zeros_like(batch.x), np.zeros_like(batch.x)
    grad_weight = np.zeros(batch.weight.shape)
    for t, k in np.ndindex(*batch.expert.shape):
        expert, weight = batch.expert[t, k], float(batch.weight[t, k])
        if expert >= 0:
            answer = factor(expert) * batch.x[t] ** 2
            y[t] += weight * answer
            grad_x[t] += weight * factor(expert) * 2 * batch.x[t] * batch.direction[t]
            grad_weight[t, k] = (answer * batch.direction[t]).sum()
    return y, grad_x, grad_weight


def factor(expert: int) -> float:
    """What an expert multiplies the squares by."""
    return 0.25 * (1 + expert % 7)


def _answers(rows: Array, experts: list[int], counts: NDArray[np.int64], make: Make) -> Array:
    """Of this rank's experts, for the rows that dispatch returned; as many rows."""
    factors = np.zeros((len(rows), 1))
    factors[: counts.sum(), 0] = np.repeat([factor(expert) for expert in experts], counts)
    dtype = str(rows.dtype).removeprefix("torch.")
    return make(factors.astype(dtype)) * rows * rows


def _check_rows(
    comm: Comm,
    exchange: Exchange,
    world: list[Batch],
    experts: list[int],
    rows: NDArray[Any],
    counts: NDArray[np.int64],
) -> None:
    """Rows of an exchange without lanes must be those of the definition, in order; with lanes, be among them."""
    assert len(counts) == len(experts), f"rows_per_expert has {len(counts)} entries, expected {len(experts)}"
    talking = [comm.rank] if len(exchange.experts) == 1 else list(range(comm.size))
    start = 0
    for expert, count in zip(experts, counts.tolist(), strict=True):
        block = rows[start : start + count].astype(np.float64)
        start += count
        wanted = [world[rank].x[(world[rank].expert == expert).any(axis=1)] for rank in talking]
        if exchange.on_lanes:
            tokens = {row.tobytes() for batch in wanted for row in batch}
            assert all(row.tobytes() in tokens for row in block), f"dispatch: expert {expert} got a stranger's row"
            continue
        _same_rows(block, np.concatenate(wanted), f"dispatch: rows of expert {expert}", comm)


def _same_rows(block: NDArray[np.float64], wanted: NDArray[np.float64], what: str, comm: Comm) -> None:
    """Padding may lie behind them."""
    assert len(block) >= len(wanted), f"{what}: {len(block)}, expected {len(wanted)}{comm.where()}"
    assert (block[: len(wanted)] == wanted).all(), f"{what}: got {block}, expected {wanted}{comm.where()}"
    assert (block[len(wanted) :] == 0).all(), f"{what}: padding is {block[len(wanted) :]}{comm.where()}"


def _close(got: Array, wanted: NDArray[np.float64], tolerance: float, what: str, comm: Comm) -> None:
    array = _numpy(got).astype(np.float64)
    assert array.shape == wanted.shape, f"{what}: shape {array.shape}, expected {wanted.shape}{comm.where()}"
    error = np.abs(array - wanted).max(initial=0.0)
    most = tolerance * max(1.0, np.abs(wanted).max(initial=0.0))
    assert error <= most, f"{what}: {error} away from the definition, at most {most} expected{comm.where()}"


def _numpy(array: Array) -> NDArray[Any]:
    return array.detach().cpu().numpy() if is_torch(array) else np.asarray(array)
