"""check_comm and check_all_to_all: whether rows arrive where the contracts of Comm and AllToAll say.

Every rank makes the whole world's rows from the counts alone, so each knows what it must get without asking anyone. A
row is (source, destination, place): a wrong one says where it came from.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeAlias

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
        _strided_rows,
        _gathers,
        _reduces,
        _splits,
        _node_keys,
        _refuses,
        _is_freed,
    )
    for size in sizes:
        for check in checks:
            # Ranks of their own for each check: what an earlier one leaves behind cannot hide a fault.
            run(size, partial(_run_check, check=check, make=make))


def _run_check(comm: Comm, check: Callable[[Comm, Make], None], make: Make) -> None:
    with naming_rank(comm):
        check(comm, make)


def check_all_to_all(
    run: Run,
    algorithm: Callable[[Comm], AllToAll],
    sizes: Iterable[int] = (1, 2, 3, 4),
    make: Make = np.asarray,
) -> None:
    """Raise AssertionError unless algorithm(comm) moves every block and row to where AllToAll says.

    algorithm  collective; makes the AllToAll to test, e.g. FlatAllToAll
    """

    def check(comm: Comm) -> None:
        check_all_to_all_on(comm, algorithm(comm), make)

    for size in sizes:
        run(size, check)


def check_all_to_all_on(comm: Comm, a2a: AllToAll, make: Make = np.asarray) -> None:
    """The same for one AllToAll over `comm`. Collective over comm."""
    with naming_rank(comm):
        _even_form(comm, a2a, make)
        _uneven_form(comm, a2a, make)
        _routes(comm, a2a, make)
        _algorithm_refuses(comm, a2a, make)


# ---- rows that say where they come from ----------------------------------------------------------------------------


def count_matrices(size: int) -> Iterator[Counts]:
    """[size, size] rows from each source (first axis) to each destination: the hard cases."""
    shape = (size, size)
    rng = np.random.default_rng(size)
    yield np.zeros(shape, np.int64)
    yield np.ones(shape, np.int64)
    yield rng.integers(0, 5, shape)
    # Few pairs of ranks have rows: an algorithm that leaves empty messages out takes other paths.
    is_used = rng.random(shape) < 0.2
    yield rng.integers(0, 9, shape) * is_used
    # A popular expert: one rank gets nearly all rows.
    skewed = rng.integers(0, 2, shape)
    skewed[:, 0] += 37
    yield skewed
    # A rank that sends nothing, and one that gets nothing, still have to come to the call.
    silent = rng.integers(0, 4, shape)
    silent[-1] = 0
    silent[:, size // 2] = 0
    yield silent


def sent_rows(counts: Counts, source: int) -> np.ndarray:
    """[N, 3] what `source` sends, ordered by destination."""
    rows = []
    for destination in range(len(counts)):
        for place in range(counts[source, destination]):
            rows.append((source, destination, place))
    return np.array(rows, np.int64).reshape(-1, 3)


def received_rows(counts: Counts, destination: int) -> np.ndarray:
    """[M, 3] what `destination` must get, ordered by source."""
    rows = []
    for source in range(len(counts)):
        for place in range(counts[source, destination]):
            rows.append((source, destination, place))
    return np.array(rows, np.int64).reshape(-1, 3)


def _blocks(size: int, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    """[size, size, *shape] a block from each source to each destination, filled with the number of the pair."""
    # Below 251, so that uint8 holds it, and a prime, so that two pairs a power of two apart differ.
    numbers = np.arange(size * size) % 251
    blocks = np.empty((size, size, *shape), dtype)
    blocks[...] = numbers.reshape(size, size, *(1,) * len(shape))
    return blocks


# ---- checks of a Comm: each is called on every rank ----------------------------------------------------------------


def _equal_blocks(comm: Comm, make: Make) -> None:
    for num_rows in (0, 1, 3):
        counts = np.full((comm.size, comm.size), num_rows)
        sent = sent_rows(counts, comm.rank)
        expected = received_rows(counts, comm.rank)
        # Fresh copies: an array that numpy shares with `sent` could be changed without being noticed.
        result = comm.all_to_all(make(sent.copy()))
        check_rows(result, expected, "all_to_all of equal blocks")
        out = make(np.full_like(expected, -1))
        result = comm.all_to_all(make(sent.copy()), out=out)
        assert result is out, "all_to_all: out is not what was returned"
        check_rows(out, expected, "all_to_all into out")


def _uneven_rows(comm: Comm, make: Make) -> None:
    for counts in count_matrices(comm.size):
        send_counts = counts[comm.rank]
        # A column of a matrix: counts need not be contiguous.
        recv_counts = counts[:, comm.rank]
        expected = received_rows(counts, comm.rank)
        rows = make(sent_rows(counts, comm.rank))
        result = comm.all_to_all(rows, send_counts, recv_counts)
        check_rows(result, expected, "all_to_all with counts")
        check_rows(rows, sent_rows(counts, comm.rank), "all_to_all changed its input")
        result = comm.all_to_all(rows, send_counts.tolist(), recv_counts.tolist())
        check_rows(result, expected, "all_to_all with counts in lists")


def _started(comm: Comm, make: Make) -> None:
    """Two at a time, while other ranks wait elsewhere."""
    under_way = []
    for counts in itertools.islice(count_matrices(comm.size), 2):
        rows = make(sent_rows(counts, comm.rank))
        expected = received_rows(counts, comm.rank)
        out = make(np.empty_like(expected))
        # The transport may read the counts until the collective is done, and the matrix goes out of scope before.
        send_counts = counts[comm.rank].copy()
        recv_counts = counts[:, comm.rank].copy()
        started = comm.start(rows, out, send_counts, recv_counts)
        # Rows are listed too, to keep them alive: the caller must not free them earlier.
        under_way.append((started, rows, out, expected))
    for started, _, out, expected in under_way:
        while not started.done():
            comm.progress()
            comm.waiting("check_comm", 0.0)
        check_rows(out, expected, "a started all_to_all")


def _dtypes(comm: Comm, make: Make) -> None:
    for dtype in DTYPES:
        for shape in ((), (3,), (2, 5), (0,), (1, 1, 1)):
            # Of bool only 0 and 1 can be told apart.
            blocks = (_blocks(comm.size, "int64", shape) % 2).astype(dtype)
            result = comm.all_to_all(make(blocks[comm.rank]))
            check_rows(result, blocks[:, comm.rank], f"all_to_all of {dtype} {shape}")


def _strided_rows(comm: Comm, make: Make) -> None:
    # Transposed and with gaps: neither axis can be read in the order of memory.
    def strided(rank: int, make: Make) -> Array:
        table = np.arange(comm.size * 6).reshape(3, 2 * comm.size)
        return make(table + 100 * rank).T[::2]

    expected = [strided(source, np.asarray)[comm.rank] for source in range(comm.size)]
    result = comm.all_to_all(strided(comm.rank, make))
    check_rows(result, np.stack(expected), "all_to_all of a non-contiguous array")


def _gathers(comm: Comm, make: Make) -> None:
    equal = [2] * comm.size
    empty = [0] * comm.size
    growing = list(range(comm.size))
    one_rank_alone = [5] + [0] * (comm.size - 1)
    for counts in (equal, empty, growing, one_rank_alone):
        rank_of_row = np.repeat(np.arange(comm.size), counts)
        # Two columns, so that rows counted as numbers would be noticed.
        expected = np.stack([rank_of_row, rank_of_row], axis=1).astype(np.float32)
        rows = make(expected[rank_of_row == comm.rank])
        check_rows(comm.all_gather(rows, counts), expected, f"all_gather {counts}")
        if len(set(counts)) == 1:
            check_rows(comm.all_gather(rows), expected, "all_gather of equal parts")


def _reduces(comm: Comm, make: Make) -> None:
    total = comm.size * (comm.size + 1) // 2
    for dtype in ("float32", "float64", "float16", "int64", "int32"):
        for shape in ((), (3,), (2, 0), (4, 5)):
            summand = np.full(shape, comm.rank + 1, dtype)
            array = make(summand.copy())
            result = comm.all_reduce(array)
            check_rows(result, np.full(shape, total, dtype), f"all_reduce of {dtype} {shape}")
            check_rows(array, summand, "all_reduce changed its input")
    # Numbers of different size, whose sum depends on the order of additions: the ranks may not differ in it.
    summand = np.array([0.1 * 3**comm.rank], np.float32)
    sums = comm.all_gather(comm.all_reduce(make(summand)))
    assert len(set(sums.tolist())) == 1, f"all_reduce: the ranks got different sums {sums}"


def _splits(comm: Comm, make: Make) -> None:
    color = comm.rank % 2
    members = np.arange(color, comm.size, 2)
    half = comm.split(color)
    expected = (comm.rank // 2, len(members))
    assert (half.rank, half.size) == expected, "split: wrong rank or size"
    gathered = half.all_gather(make(np.array([comm.rank])))
    check_rows(gathered, members, "all_gather after split")
    single = half.split(half.rank)
    assert (single.rank, single.size) == (0, 1), "split of a split: wrong rank or size"
    seven = np.array([7])
    check_rows(single.all_to_all(make(seven.copy())), seven, "all_to_all with oneself")
    single.free()
    half.free()
    # The groups are gone, the Comm that they were split from is not.
    comm.barrier()


def _node_keys(comm: Comm, make: Make) -> None:
    key = comm.node_key()
    assert 0 <= key < 2**63, f"node_key: {key} is out of range"
    assert key == comm.node_key(), "node_key: it changes"


def _refuses(comm: Comm, make: Make) -> None:
    """The same bad call on every rank: an error before anything is sent, and the Comm works afterwards."""
    size = comm.size
    zeros = np.zeros((size, 2), np.float32)
    rows = make(zeros.copy())
    _refuses_counts(comm, rows)
    _refuses_rows(comm, make)
    _refuses_out(comm, comm.all_to_all, rows, make)
    flags = make(np.zeros(2, bool))
    _check_error(comm, TypeError, "one that is summed", comm.all_reduce, flags)
    _check_error(comm, ValueError, "color", comm.split, -1)
    result = comm.all_to_all(rows)
    check_rows(result, zeros, "all_to_all after a refused call")


def _refuses_counts(comm: Comm, rows: Array) -> None:
    """Of rows [size, 2]."""
    size = comm.size
    ones = [1] * size
    twos = [2] * size
    negative = [-1] * size
    fractions = [1.0] * size
    too_long = [1] * (size + 1)
    call = comm.all_to_all
    _check_error(comm, ValueError, "sums to", call, rows, twos, ones)
    _check_error(comm, ValueError, "expected >= 0", call, rows, ones, negative)
    _check_error(comm, TypeError, "whole numbers", call, rows, fractions, ones)
    _check_error(comm, ValueError, "shape", call, rows, too_long, ones)
    # One kind of counts without the other would be an uneven call here and an even one there.
    _check_error(comm, ValueError, "both", call, rows, ones)
    too_large = [size + 1] * size
    _check_error(comm, ValueError, "recv_counts", comm.all_gather, rows, too_large)


def _refuses_rows(comm: Comm, make: Make) -> None:
    size = comm.size
    call = comm.all_to_all
    number = make(np.array(1.0))
    numbers = [1.0] * size
    objects = np.array([None] * size)
    _check_error(comm, ValueError, "no rows", call, number)
    _check_error(comm, TypeError, "numpy array", call, numbers)
    _check_error(comm, TypeError, "Python objects", call, objects)
    # A single rank can share any number of rows with itself.
    if size > 1:
        uneven = make(np.zeros(size + 1))
        _check_error(comm, ValueError, "equal blocks", call, uneven)


def _refuses_out(comm: Comm, call: Callable[..., object], rows: Array, make: Make) -> None:
    """What a result cannot be written to, of a call whose rows are float32 [size, 2]."""
    size = comm.size
    too_wide = make(np.zeros((size, 3), np.float32))
    doubles = make(np.zeros((size, 2), np.float64))
    strided = make(np.zeros((size, 4), np.float32))[:, ::2]
    _check_error(comm, ValueError, "shape", call, rows, out=too_wide)
    _check_error(comm, TypeError, "dtype", call, rows, out=doubles)
    _check_error(comm, ValueError, "contiguous", call, rows, out=strided)
    _check_error(comm, ValueError, "shares memory", call, rows, out=rows)


def _is_freed(comm: Comm, make: Make) -> None:
    # The same ranks several times: a library that names its groups by their members must not mix them up.
    for _ in range(4):
        group = comm.split(0)
        group.barrier()
        group.free()
        # Twice: freeing is allowed to be repeated.
        group.free()
        _check_error(comm, CommError, "freed", group.barrier)


# ---- checks of an AllToAll -----------------------------------------------------------------------------------------


def _even_form(comm: Comm, a2a: AllToAll, make: Make) -> None:
    # The last shape makes blocks that are larger than what libraries send with their first message.
    for dtype, shape in (
        ("int64", ()),
        ("uint8", (3,)),
        ("float32", (2, 5)),
        ("float32", (0,)),
        ("float64", (700,)),
    ):
        label = f"{dtype} blocks of shape {shape}"
        blocks = _blocks(comm.size, dtype, shape)
        expected = blocks[:, comm.rank]
        x = make(blocks[comm.rank].copy())
        check_rows(a2a(x), expected, label)
        out = make(np.ones_like(expected))
        assert a2a(x, out=out) is out, "out is not what was returned"
        check_rows(out, expected, f"{label} into out")
        check_rows(x, blocks[comm.rank], "the input was changed")


def _uneven_form(comm: Comm, a2a: AllToAll, make: Make) -> None:
    for counts in count_matrices(comm.size):
        send_counts = counts[comm.rank]
        sent = sent_rows(counts, comm.rank)
        expected = received_rows(counts, comm.rank)
        rows = make(sent.copy())
        result, recv_counts = a2a.rows(rows, send_counts)
        check_rows(result, expected, "rows")
        check_rows(recv_counts, counts[:, comm.rank], "counts")
        check_rows(rows, sent, "the input was changed")
        back, back_counts = a2a.rows(result, recv_counts)
        check_rows(back, sent, "rows sent back by the same exchange")
        check_rows(back_counts, send_counts, "counts sent back")


def _routes(comm: Comm, a2a: AllToAll, make: Make) -> None:
    for counts in count_matrices(comm.size):
        sent = sent_rows(counts, comm.rank)
        rows = make(sent.copy())
        route = a2a.route(counts[comm.rank])
        check_rows(route.recv_counts, counts[:, comm.rank], "counts of the route")
        # Twice: the first use of a route must leave nothing in it.
        for _ in range(2):
            result = a2a.send(rows, route)
            check_rows(result, received_rows(counts, comm.rank), "rows sent along a route")
            check_rows(a2a.send_back(result, route), sent, "rows sent back along a route")


def _algorithm_refuses(comm: Comm, a2a: AllToAll, make: Make) -> None:
    size = comm.size
    zeros = np.zeros((size, 2), np.float32)
    x = make(zeros.copy())
    too_long = make(np.zeros((size + 1, 2), np.float32))
    _check_error(comm, ValueError, "one block per rank", a2a, too_long)
    _refuses_out(comm, a2a, x, make)
    twos = [2] * size
    negative = [-1] * size
    fractions = [1.0] * size
    _check_error(comm, ValueError, "sums to", a2a.rows, x, twos)
    _check_error(comm, TypeError, "whole numbers", a2a.rows, x, fractions)
    _check_error(comm, ValueError, "expected >= 0", a2a.rows, x, negative)
    _check_error(comm, ValueError, "expected >= 0", a2a.route, negative)
    # A route made by hand: of other rows than these.
    route = Route(np.array(twos), np.array(twos))
    _check_error(comm, ValueError, "sums to", a2a.send, x, route)
    _check_error(comm, ValueError, "sums to", a2a.send_back, x, route)
    check_rows(a2a(x), zeros, "after a refused call")


# ---- what a result must be -----------------------------------------------------------------------------------------


@contextmanager
def naming_rank(comm: Comm) -> Iterator[None]:
    """Adds the rank to what an assertion says: the ranks write to one log."""
    try:
        yield
    except AssertionError as error:
        raise AssertionError(f"{error}{comm.where()}") from error


def as_numpy(array: Array) -> np.ndarray:
    """The numbers of an array of any kind, on the host."""
    if is_torch(array):
        array = array.detach().cpu().numpy()
    elif is_cupy(array):
        array = array.get()
    return np.asarray(array)


def check_rows(result: Array, expected: np.ndarray, label: str) -> None:
    array = as_numpy(result)
    # Bit for bit: rows are moved, never computed with.
    is_equal = array.dtype == expected.dtype and array.shape == expected.shape and (array == expected).all()
    assert is_equal, f"{label}: got {_shown(array)}, wanted {_shown(expected)}"


def _shown(array: np.ndarray) -> str:
    """The beginning of an array, for an error."""
    return f"{array.dtype}{list(array.shape)} {array.reshape(-1)[:24]}"


def _check_error(
    comm: Comm,
    kind: type[Exception],
    words: str,
    call: Callable[..., object],
    *arguments: Any,
    **options: Any,
) -> None:
    """call(*arguments, **options) must raise an error of that kind, with the words and the rank in its text."""
    try:
        call(*arguments, **options)
    except kind as error:
        text = str(error)
    else:
        raise AssertionError(f"expected a {kind.__name__} with {words!r}")
    assert words in text, f"the error says {text!r}, without {words!r}"
    # A CommError of a group names the rank in the group.
    names_rank = kind is CommError or f"rank {comm.rank} of {comm.size}" in text
    assert names_rank, f"no rank in {text!r}"
