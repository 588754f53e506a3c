"""check_comm and check_all_to_all: whether rows arrive where the contracts of Comm and AllToAll say.

Every rank makes the whole world's rows from the counts alone, so each knows what it must get without asking anyone. A
row is (source, destination, place): a wrong one says where it came from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeAlias, cast

import numpy as np

from moecomm.all_to_all import AllToAll, Route
from moecomm.arrays import Array, Counts, is_cupy, is_torch
from moecomm.comm import Comm
from moecomm.errors import CommError

Run: TypeAlias = Callable[[int, Callable[[Comm], object]], object]
"""run(size, body): call body(comm) on `size` ranks and raise if one of them raises."""

Make: TypeAlias = Callable[[np.ndarray], Array]
"""Turns a numpy array into the kind of array to test, e.g. torch.from_numpy."""

DTYPES = ("float32", "float64", "float16", "int64", "uint8", "bool", "complex64")


def check_comm(run: Run, sizes: Iterable[int] = (1, 2, 3, 4), make: Make = np.asarray) -> None:
    """Raise AssertionError unless the Comm that `run` hands to its body keeps the contract of `Comm`.

    run    starts the ranks, e.g. threads.run
    sizes  numbers of ranks to try
    make   the kind of array to move
    """
    checks = (
        _equal_blocks,
        _uneven_rows,
        _started,
        _dtypes,
        _gathers,
        _reduces,
        _splits,
        _node_keys,
        _refuses,
        _is_freed,
    )
    for size in sizes:
        for check in checks:
            run(size, lambda comm, check=check: check(comm, make))  # type: ignore[misc]


def check_all_to_all(
    run: Run,
    algorithm: Callable[[Comm], AllToAll],
    sizes: Iterable[int] = (1, 2, 3, 4),
    make: Make = np.asarray,
) -> None:
    """Raise AssertionError unless algorithm(comm) moves every block and row to where AllToAll says.

    algorithm  collective; makes the AllToAll to test, e.g. FlatAllToAll
    """
    for size in sizes:
        run(size, lambda comm: check_all_to_all_on(comm, algorithm(comm), make))


def check_all_to_all_on(comm: Comm, a2a: AllToAll, make: Make = np.asarray) -> None:
    """The same for one AllToAll over `comm`. Collective over comm."""
    _even_form(comm, a2a, make)
    _uneven_form(comm, a2a, make)
    _even_form_refuses(comm, a2a, make)


# ---- rows that say where they come from ----------------------------------------------------------------------------


def count_matrices(size: int) -> Iterator[Counts]:
    """[size, size] rows from each source (first axis) to each destination: the hard cases."""
    rng = np.random.default_rng(size)
    yield np.zeros((size, size), np.int64)
    yield np.ones((size, size), np.int64)
    yield rng.integers(0, 5, (size, size))
    yield rng.integers(0, 9, (size, size)) * (rng.random((size, size)) < 0.2)  # most pairs are empty
    skewed = rng.integers(0, 2, (size, size))
    skewed[:, 0] += 37  # everybody's favourite
    yield skewed
    lonely = rng.integers(0, 4, (size, size))
    lonely[-1], lonely[:, size // 2] = 0, 0  # one rank sends nothing, one gets nothing
    yield lonely


def sent_rows(counts: Counts, source: int) -> np.ndarray:
    """[N, 3] what `source` sends, ordered by destination."""
    pairs = [(source, d, i) for d in range(len(counts)) for i in range(counts[source, d])]
    return np.array(pairs, np.int64).reshape(-1, 3)


def received_rows(counts: Counts, destination: int) -> np.ndarray:
    """[M, 3] what `destination` must get, ordered by source."""
    pairs = [(s, destination, i) for s in range(len(counts)) for i in range(counts[s, destination])]
    return np.array(pairs, np.int64).reshape(-1, 3)


# ---- checks of a Comm: each is called on every rank ----------------------------------------------------------------


def _equal_blocks(comm: Comm, make: Make) -> None:
    for num_rows in (0, 1, 3):
        counts = np.full((comm.size, comm.size), num_rows)
        sent = sent_rows(counts, comm.rank)
        wanted = received_rows(counts, comm.rank)
        _same(comm.all_to_all(make(sent.copy())), wanted, "all_to_all of equal blocks", comm)
        out = make(np.full_like(wanted, -1))
        assert comm.all_to_all(make(sent.copy()), out=out) is out, "all_to_all: out is not what was returned"
        _same(out, wanted, "all_to_all into out", comm)


def _uneven_rows(comm: Comm, make: Make) -> None:
    for counts in count_matrices(comm.size):
        rows = make(sent_rows(counts, comm.rank))
        result = comm.all_to_all(rows, counts[comm.rank], counts[:, comm.rank])
        _same(result, received_rows(counts, comm.rank), "all_to_all with counts", comm)
        _same(rows, sent_rows(counts, comm.rank), "all_to_all changed its input", comm)
        as_lists = comm.all_to_all(rows, counts[comm.rank].tolist(), counts[:, comm.rank].tolist())
        _same(as_lists, received_rows(counts, comm.rank), "all_to_all with counts in lists", comm)


def _started(comm: Comm, make: Make) -> None:
    """Two at a time, while other ranks wait elsewhere."""
    under_way = []
    for counts in list(count_matrices(comm.size))[:2]:
        rows = make(sent_rows(counts, comm.rank))
        out = make(np.empty_like(received_rows(counts, comm.rank)))
        started = comm.start(rows, out, counts[comm.rank].copy(), counts[:, comm.rank].copy())
        under_way.append((started, rows, out, received_rows(counts, comm.rank)))
    for started, _, out, wanted in under_way:
        while not started.done():
            comm.progress()
            comm.waiting("check_comm", 0.0)
        _same(out, wanted, "a started all_to_all", comm)


def _dtypes(comm: Comm, make: Make) -> None:
    for dtype in DTYPES:
        for shape in ((), (3,), (2, 5), (0,), (1, 1, 1)):
            whole = np.zeros((comm.size, comm.size, *shape), dtype)
            whole[...] = (np.arange(comm.size**2) % 2).reshape(comm.size, comm.size, *(1,) * len(shape))
            result = comm.all_to_all(make(whole[comm.rank]))
            _same(result, whole[:, comm.rank], f"all_to_all of {dtype} {shape}", comm)
    strided = make(np.arange(comm.size * 6).reshape(3, 2 * comm.size) + 100 * comm.rank).T[::2]
    wanted = np.stack([(np.arange(comm.size * 6).reshape(3, -1) + 100 * s).T[2 * comm.rank] for s in range(comm.size)])
    _same(comm.all_to_all(strided), wanted, "all_to_all of a non-contiguous array", comm)


def _gathers(comm: Comm, make: Make) -> None:
    for counts in ([2] * comm.size, [0] * comm.size, list(range(comm.size)), [5] + [0] * (comm.size - 1)):
        every = [np.full((n, 2), rank, np.float32) for rank, n in enumerate(counts)]
        _same(comm.all_gather(make(every[comm.rank]), counts), np.concatenate(every), f"all_gather {counts}", comm)
        if len(set(counts)) == 1:
            _same(comm.all_gather(make(every[comm.rank])), np.concatenate(every), "all_gather of equal parts", comm)


def _reduces(comm: Comm, make: Make) -> None:
    total = comm.size * (comm.size + 1) // 2
    for dtype in ("float32", "float64", "float16", "int64", "int32"):
        for shape in ((), (3,), (2, 0), (4, 5)):
            mine = make(np.full(shape, comm.rank + 1, dtype))
            _same(comm.all_reduce(mine), np.full(shape, total, dtype), f"all_reduce of {dtype} {shape}", comm)
            _same(mine, np.full(shape, comm.rank + 1, dtype), "all_reduce changed its input", comm)
    bits = comm.all_gather(comm.all_reduce(make(np.array([0.1 * 3**comm.rank], np.float32))))
    assert len({float(bit) for bit in bits}) == 1, "all_reduce: the ranks got different sums"


def _splits(comm: Comm, make: Make) -> None:
    half = comm.split(comm.rank % 2)
    members = list(range(comm.rank % 2, comm.size, 2))
    assert (half.rank, half.size) == (comm.rank // 2, len(members)), "split: wrong rank or size"
    _same(half.all_gather(make(np.array([comm.rank]))), np.array(members), "all_gather after split", comm)
    single = half.split(half.rank)
    assert (single.rank, single.size) == (0, 1), "split of a split: wrong rank or size"
    _same(single.all_to_all(make(np.array([7]))), np.array([7]), "all_to_all with oneself", comm)
    single.free()
    half.free()
    comm.barrier()


def _node_keys(comm: Comm, make: Make) -> None:
    key = comm.node_key()
    assert 0 <= key < 2**63, f"node_key: {key} is out of range"
    assert key == comm.node_key(), "node_key: it changes"


def _refuses(comm: Comm, make: Make) -> None:
    """The same bad call on every rank: an error before anything is sent, and the Comm works afterwards."""
    p, rows = comm.size, make(np.zeros((comm.size, 2), np.float32))
    ones, fractions = [1] * p, cast(Any, [1.0] * p)
    for error, match, call in (
        (ValueError, "sums to", lambda: comm.all_to_all(rows, [2] * p, ones)),
        (ValueError, "expected >= 0", lambda: comm.all_to_all(rows, ones, [-1] * p)),
        (TypeError, "whole numbers", lambda: comm.all_to_all(rows, fractions, ones)),
        (ValueError, "shape", lambda: comm.all_to_all(rows, [*ones, 0], ones)),
        (ValueError, "both", lambda: comm.all_to_all(rows, ones)),
        (ValueError, "no rows", lambda: comm.all_to_all(make(np.array(1.0)))),
        (TypeError, "numpy array", lambda: comm.all_to_all(cast(Any, [1.0] * p))),
        (TypeError, "Python objects", lambda: comm.all_to_all(np.array([None] * p))),
        (ValueError, "shape", lambda: comm.all_to_all(rows, out=make(np.zeros((p, 3), np.float32)))),
        (TypeError, "dtype", lambda: comm.all_to_all(rows, out=make(np.zeros((p, 2), np.float64)))),
        (ValueError, "contiguous", lambda: comm.all_to_all(rows, out=make(np.zeros((p, 4), np.float32))[:, ::2])),
        (ValueError, "shares memory", lambda: comm.all_to_all(rows, out=rows)),
        (ValueError, "recv_counts", lambda: comm.all_gather(rows, [p + 1] * p)),
        (TypeError, "one that is summed", lambda: comm.all_reduce(make(np.zeros(2, bool)))),
        (ValueError, "color", lambda: comm.split(-1)),
    ):
        _raises(error, match, call, comm)
    if p > 1:
        _raises(ValueError, "equal blocks", lambda: comm.all_to_all(make(np.zeros(p + 1))), comm)
    _same(comm.all_to_all(rows), np.zeros((p, 2), np.float32), "all_to_all after a refused call", comm)


def _is_freed(comm: Comm, make: Make) -> None:
    for _ in range(4):  # the same ranks again and again
        part = comm.split(0)
        part.barrier()
        part.free()
        part.free()
        _raises(CommError, "freed", part.barrier, comm)


# ---- checks of an AllToAll -----------------------------------------------------------------------------------------


def _even_form(comm: Comm, a2a: AllToAll, make: Make) -> None:
    p = comm.size
    for shape, dtype in (((), "int64"), ((3,), "uint8"), ((2, 5), "float32"), ((0,), "float32"), ((700,), "float64")):
        whole = np.zeros((p, p, *shape), dtype)
        whole[...] = np.arange(p * p).reshape(p, p, *(1,) * len(shape)) % 251
        x = make(whole[comm.rank].copy())
        wanted = whole[:, comm.rank]
        _same(a2a(x), wanted, f"{dtype} blocks of shape {shape}", comm)
        out = make(np.ones_like(wanted))
        assert a2a(x, out=out) is out, "out is not what was returned"
        _same(out, wanted, f"{dtype} blocks of shape {shape} into out", comm)
        _same(x, whole[comm.rank], "the input was changed", comm)


def _uneven_form(comm: Comm, a2a: AllToAll, make: Make) -> None:
    for counts in count_matrices(comm.size):
        rows = make(sent_rows(counts, comm.rank))
        result, recv_counts = a2a.rows(rows, counts[comm.rank])
        _same(result, received_rows(counts, comm.rank), "rows", comm)
        _same(recv_counts, counts[:, comm.rank], "counts", comm)
        _same(rows, sent_rows(counts, comm.rank), "the input was changed", comm)
        route = a2a.route(counts[comm.rank])
        _same(route.recv_counts, counts[:, comm.rank], "counts of the route", comm)
        for _ in range(2):
            sent = a2a.send(rows, route)
            _same(sent, received_rows(counts, comm.rank), "rows sent along a route", comm)
            _same(a2a.send_back(sent, route), sent_rows(counts, comm.rank), "rows sent back along a route", comm)
        back, back_counts = a2a.rows(result, recv_counts)
        _same(back, sent_rows(counts, comm.rank), "rows sent back by the same exchange", comm)
        _same(back_counts, counts[comm.rank], "counts sent back", comm)


def _even_form_refuses(comm: Comm, a2a: AllToAll, make: Make) -> None:
    p, x = comm.size, make(np.zeros((comm.size, 2), np.float32))
    fractions = cast(Any, [1.0] * p)
    for error, match, call in (
        (ValueError, "one block per rank", lambda: a2a(make(np.zeros((p + 1, 2), np.float32)))),
        (TypeError, "dtype", lambda: a2a(x, out=make(np.zeros((p, 2), np.int32)))),
        (ValueError, "shape", lambda: a2a(x, out=make(np.zeros((p, 1), np.float32)))),
        (ValueError, "contiguous", lambda: a2a(x, out=make(np.zeros((p, 4), np.float32))[:, ::2])),
        (ValueError, "shares memory", lambda: a2a(x, out=x)),
        (ValueError, "sums to", lambda: a2a.rows(x, [2] * p)),
        (TypeError, "whole numbers", lambda: a2a.rows(x, fractions)),
        (ValueError, "expected >= 0", lambda: a2a.rows(x, [-1] * p)),
        (ValueError, "expected >= 0", lambda: a2a.route([-1] * p)),
        (ValueError, "sums to", lambda: a2a.send(x, Route(np.full(p, 2), np.full(p, 2)))),
        (ValueError, "sums to", lambda: a2a.send_back(x, Route(np.full(p, 2), np.full(p, 2)))),
    ):
        _raises(error, match, call, comm)
    _same(a2a(x), np.zeros((p, 2), np.float32), "after a refused call", comm)


def _same(got: Any, wanted: np.ndarray, what: str, comm: Comm) -> None:
    array = got.detach().cpu().numpy() if is_torch(got) else got.get() if is_cupy(got) else np.asarray(got)
    assert array.dtype == wanted.dtype and array.shape == wanted.shape and (array == wanted).all(), (
        f"{what}: got {array.dtype}{list(array.shape)} {array.reshape(-1)[:24]}, "
        f"wanted {wanted.dtype}{list(wanted.shape)} {wanted.reshape(-1)[:24]}{comm.where()}"
    )


def _raises(error: type[Exception], match: str, call: Callable[[], object], comm: Comm) -> None:
    try:
        call()
    except error as caught:
        assert match in str(caught), f"the error says {str(caught)!r}, without {match!r}{comm.where()}"
        assert f"rank {comm.rank} of {comm.size}" in str(caught) or error is CommError, f"no rank in {str(caught)!r}"
    else:
        raise AssertionError(f"expected a {error.__name__} with {match!r}{comm.where()}")
