"""A token gets the same bits alone, in any batch, at any place in it: from the gate, from rows and from exchanges.

The experts here work number by number. A matrix product may give a row other bits when it has other neighbours.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from moecomm import (
    Comm,
    FlatAllToAll,
    HierarchicalAllToAll,
    Nodes,
    RoutedExchange,
    Routing,
    TensorParallelExchange,
    route,
)
from moecomm.exchange import Exchange, HierarchicalExchange, StaticExchange, StaticHierarchicalExchange
from moecomm.gating import permute, permute_fp8, unpermute
from moecomm.transports import threads

SCORES: list[dict[str, Any]] = [
    {},
    {"normalize": "selected"},
    {"score": "sigmoid", "normalize": "selected", "scale": 2.5},
    {"score": "sigmoid", "num_groups": 4, "top_groups": 2},
]


def batches(rng: np.random.Generator, num_tokens: int) -> list[NDArray[np.intp]]:
    """All tokens in another order, parts of them, and single ones."""
    shuffled = rng.permutation(num_tokens)
    return [shuffled, shuffled[:17], np.arange(5, num_tokens, 3), *(np.array([token]) for token in shuffled[:8])]


@pytest.mark.parametrize("given", SCORES, ids=str)
@pytest.mark.parametrize(("num_experts", "top_k"), [(8, 2), (64, 8), (44, 5), (1020, 3)])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_gate(given: dict[str, Any], num_experts: int, top_k: int, dtype: str) -> None:
    rng = np.random.default_rng(num_experts)
    logits = (2 * rng.normal(size=(300, num_experts))).astype(dtype)
    whole = route(logits, top_k, **given)
    for batch in batches(rng, 300):
        part = route(logits[batch], top_k, threads=2, **given)
        for name in ("expert", "weight", "lse"):
            assert np.array_equal(getattr(part, name), getattr(whole, name)[batch]), name


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("width", [1, 130, 1000])
def test_rows(dtype: str, width: int) -> None:
    rng = np.random.default_rng(width)
    logits = rng.normal(size=(90, 12)).astype(np.float32)
    x = rng.normal(size=(90, width)).astype(dtype)

    def answers(batch: NDArray[np.intp]) -> NDArray[Any]:
        routing = route(logits[batch], 4)
        return unpermute(permute(x[batch], routing) * 1.5, routing)

    whole = answers(np.arange(90))
    for batch in batches(rng, 90):
        assert np.array_equal(answers(batch), whole[batch])


def test_rows_of_eight_bits() -> None:
    """A row's scales are its own."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 300)).astype(np.float32)
    logits = rng.normal(size=(60, 4)).astype(np.float32)
    whole = route(logits, 1)
    rows, scales = permute_fp8(x, whole)
    for batch in batches(rng, 60):
        routing = route(logits[batch], 1)
        some_rows, some_scales = permute_fp8(x[batch], routing)
        place, expected = routing.row[:, 0], whole.row[batch, 0]
        assert np.array_equal(some_rows[place], rows[expected])
        assert np.array_equal(some_scales[place], scales[expected])


Make = Callable[[Comm], Exchange[Any]]
EXPERTS = 8


def uneven(comm: Comm) -> HierarchicalAllToAll:
    return HierarchicalAllToAll(comm, Nodes([[0, 2, 3], [1]]))


EXCHANGES: dict[str, Make] = {
    "a row for each assignment": lambda comm: RoutedExchange(FlatAllToAll(comm), 2),
    "a row for each token and rank": lambda comm: RoutedExchange(FlatAllToAll(comm), 2, send="tokens"),
    "two hops": lambda comm: RoutedExchange(uneven(comm), [[7, 0], [1], [2, 5, 6], [3, 4]], send="tokens"),
    "a row for each token and rank, in float32": lambda comm: RoutedExchange(
        FlatAllToAll(comm), 2, send="tokens", partial_sums="wide"
    ),
    "blocks of one size": lambda comm: StaticExchange(FlatAllToAll(comm), 2, 60),
    "a row for each token and node": lambda comm: HierarchicalExchange(uneven(comm), 2),
    "blocks of one size between nodes": lambda comm: StaticHierarchicalExchange(uneven(comm), 2, 60),
}


def answer(rows: Any, experts: Any, rows_per_expert: Any) -> Any:
    """Of expert e, number by number: a row's neighbours do not matter. Rows behind the last expert's are padding."""
    factor = np.zeros((len(rows), 1), np.float32)
    of_expert = np.repeat(np.array(experts) + 1, np.asarray(rows_per_expert))
    factor[: len(of_expert), 0] = of_expert
    if isinstance(rows, np.ndarray):
        return (np.sqrt(np.abs(rows)) * factor).astype(rows.dtype)
    import torch

    return (rows.abs().sqrt() * torch.from_numpy(factor)).to(rows.dtype)


def layer(exchange: Exchange[Any], x: Any, expert: Any, weight: Any) -> Any:
    rows, plan = exchange.dispatch(x, Routing(expert, weight))
    return exchange.combine(answer(rows, exchange.local_experts, plan.rows_per_expert), plan)


def spread(rng: np.random.Generator, num_tokens: int, num_ranks: int) -> list[list[NDArray[np.intp]]]:
    """Ways of dealing tokens out to ranks, for each rank which ones: some ranks have none, and one token is alone."""
    ways = [np.array_split(rng.permutation(num_tokens), num_ranks)]
    for rank in range(num_ranks):
        only = [np.arange(0)] * num_ranks
        ways.append([*only[:rank], rng.permutation(num_tokens)[:21], *only[rank + 1 :]])
        ways.append([*only[:rank], np.array([rng.integers(num_tokens)]), *only[rank + 1 :]])
    return ways


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", EXCHANGES)
def test_exchange(name: str, kind: str) -> None:
    """Of any rank: the token's answer depends on its experts' places alone."""
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(1)
    x = torch.from_numpy(rng.normal(size=(60, 24))).to(getattr(torch, kind))
    expert = rng.random((60, EXPERTS)).argsort(axis=1)[:, :5]
    expert[rng.random(expert.shape) < 0.1] = -1
    weight = torch.from_numpy(rng.random((60, 5)).astype(np.float32))
    ways = spread(rng, 60, 4)

    def body(comm: Comm) -> list[Any]:
        exchange = EXCHANGES[name](comm)
        return [layer(exchange, x[way[comm.rank]], expert[way[comm.rank]], weight[way[comm.rank]]) for way in ways]

    results = threads.run(4, body)
    whole = torch.empty_like(x)
    for rank, tokens in enumerate(ways[0]):
        whole[tokens] = results[rank][0]
    for number, way in enumerate(ways):
        for rank, tokens in enumerate(way):
            assert torch.equal(results[rank][number], whole[tokens]), (number, rank)


def test_two_tensor_ranks() -> None:
    """Each expert is on one lane, so a token's sum has two parts, whichever way they are added."""
    rng = np.random.default_rng(2)
    x = rng.normal(size=(40, 6)).astype(np.float32)
    expert = rng.random((40, EXPERTS)).argsort(axis=1)[:, :3]
    weight = rng.random((40, 3)).astype(np.float32)
    some = batches(rng, 40)

    def body(comm: Comm) -> None:
        tensor = comm.split(comm.rank // 2)
        lane = comm.split(comm.rank % 2)
        held = [[0, 1, 2], [5]] if comm.rank % 2 == 0 else [[3], [4, 6, 7]]
        exchange = TensorParallelExchange(RoutedExchange(FlatAllToAll(lane), held), tensor)
        whole = layer(exchange, x, expert, weight)
        for batch in some:
            # The other tensor group has other tokens, or none.
            tokens = batch if comm.rank < 2 else batch[: len(batch) // 2]
            assert np.array_equal(layer(exchange, x[tokens], expert[tokens], weight[tokens]), whole[tokens])

    threads.run(4, body)
