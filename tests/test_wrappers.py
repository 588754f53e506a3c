import numpy as np
import pytest

from moecomm import Comm, CommError, HierarchicalAllToAll, Nodes, SharedAllToAll, testing
from moecomm.transports import threads
from moecomm.transports.wrappers import Checked, Timed


@pytest.mark.parametrize("wrap", [Checked, Timed, lambda comm: Timed(Checked(comm)), lambda comm: Checked(Timed(comm))])
def test_conformance(wrap) -> None:  # type: ignore[no-untyped-def]
    testing.check_comm(lambda size, body: threads.run(size, lambda comm: body(wrap(comm))))


def refused_by_all(size: int, match: str, call) -> None:  # type: ignore[no-untyped-def]
    """call(checked) raises ValueError on every rank, and the Comm works afterwards."""

    def body(comm: Comm) -> str:
        checked = Checked(comm)
        with pytest.raises((ValueError, TypeError), match=match) as caught:
            call(checked)
        checked.barrier()
        return str(caught.value)

    assert len(threads.run(size, body)) == size


def test_counts_that_do_not_match_name_both_ranks_and_values() -> None:
    def call(comm: Comm) -> None:
        send, recv = [1, 1, 1], [1, 1, 1]
        if comm.rank == 2:
            recv[0] = 4
        comm.all_to_all(np.zeros((3, 2)), send, recv)

    refused_by_all(3, "rank 0 sends 1 rows to rank 2, which expects 4", call)


@pytest.mark.parametrize(
    ("rows", "match"),
    [
        (
            np.zeros((3, 2), np.float32),
            "rank 0 called all_to_all with float64 .*, rank 1 called all_to_all with float32",
        ),
        (np.zeros((3, 4)), r"\(3, 2\) in equal parts, rank 1 called all_to_all with float64 \(3, 4\)"),
        (np.zeros((6, 2)), r"\(3, 2\) in equal parts, rank 1 called all_to_all with float64 \(6, 2\)"),
        (np.zeros((4, 2)), "rows has 4 rows, which 3 ranks cannot share"),
    ],
)
def test_rows_that_differ(rows: np.ndarray, match: str) -> None:
    refused_by_all(3, match, lambda comm: comm.all_to_all(rows if comm.rank == 1 else np.zeros((3, 2))))


def test_equal_blocks_on_one_rank_and_counts_on_another() -> None:
    def call(comm: Comm) -> None:
        counts = [1, 1] if comm.rank else None
        comm.all_to_all(np.zeros((2, 2)), counts, counts)

    refused_by_all(2, "in equal parts, rank 1 .* and counts", call)


def test_different_calls() -> None:
    def call(comm: Comm) -> None:
        comm.barrier() if comm.rank == 0 else comm.all_reduce(np.zeros(2))

    refused_by_all(3, "rank 0 called barrier, rank 1 called all_reduce", call)


def test_a_refusal_on_one_rank_is_raised_on_all() -> None:
    def call(comm: Comm) -> None:
        counts = [1, 1, 1] if comm.rank != 1 else [1, -1, 1]
        comm.all_to_all(np.zeros((3, 2)), counts, counts)

    refused_by_all(3, r"send_counts\[1\] is -1, expected >= 0", call)


def test_any_error_on_one_rank_is_raised_on_all() -> None:
    class Odd:
        def __array__(self, *args: object, **kwargs: object) -> np.ndarray:
            raise RuntimeError("no counts today")

    def body(comm: Comm) -> None:
        counts = Odd() if comm.rank == 1 else [1, 1]
        with pytest.raises(RuntimeError if comm.rank == 1 else ValueError, match="no counts today"):
            Checked(comm).all_to_all(np.zeros((2, 1)), counts, [1, 1])  # type: ignore[arg-type]
        comm.barrier()

    threads.run(2, body)


def test_all_gather_counts_that_differ() -> None:
    def call(comm: Comm) -> None:
        counts = [1, 1, 1] if comm.rank != 2 else [1, 2, 1]
        comm.all_gather(np.zeros((1, 2)), counts)

    refused_by_all(3, r"rank 0 has \[1, 1, 1\], rank 2 has \[1, 2, 1\]", call)


def test_checked_wants_a_comm() -> None:
    with pytest.raises(TypeError, match="Checked: comm is a str, expected a moecomm Comm"):
        Checked("comm")  # type: ignore[arg-type]


def test_timed_counts_messages_to_each_rank_of_the_outermost_comm() -> None:
    def body(comm: Comm) -> None:
        timed = Timed(comm)
        odd_even = timed.split(comm.rank % 2)
        odd_even.all_to_all(np.zeros((9, 4), np.float32), [2, 3, 4], [2 + odd_even.rank] * 3)
        entry = timed.record["all_to_allv"]
        wanted = np.zeros(6, np.int64)
        wanted[comm.rank % 2 :: 2] = [2, 3, 4]
        wanted[comm.rank] = 0  # what stays here is no message
        assert (entry.messages == (wanted > 0)).all()
        assert (entry.bytes == wanted * 16).all()
        assert entry.calls == 1
        assert entry.seconds > 0
        assert timed.record["split"].calls == 1

    threads.run(6, body)


def test_a_failed_call_is_not_counted() -> None:
    def body(comm: Comm) -> None:
        timed = Timed(comm)
        if comm.rank:
            with pytest.raises(CommError):
                timed.barrier()
            assert timed.record["barrier"].calls == 0
            assert timed.failure == comm.failure is not None

    threads.run(2, body)


@pytest.mark.parametrize("algorithm", [HierarchicalAllToAll, SharedAllToAll])
def test_a_bad_block_on_one_rank_raises_on_all(algorithm) -> None:  # type: ignore[no-untyped-def]
    def body(comm: Comm) -> None:
        a2a = algorithm(Checked(comm), Nodes.of_size(2, 4))
        with pytest.raises(ValueError, match=r"x has shape \(5, 1\), expected \(4, \.\.\.\)"):
            a2a(np.zeros((5 if comm.rank == 2 else 4, 1)))
        with pytest.raises(ValueError, match=r"the ranks differ: rank 0 .* float64 .*, rank 1 .* float32"):
            a2a(np.zeros((4, 1), np.float32 if comm.rank == 1 else np.float64))
        with pytest.raises(ValueError, match=r"the ranks differ: rank 0 .*rows of shape"):
            a2a.rows(np.zeros((4, 2 + (comm.rank == 3))), [1] * 4)
        assert (a2a(np.full((4, 1), comm.rank))[:, 0] == np.arange(4)).all()
        testing.check_all_to_all_on(comm, a2a)

    threads.run(4, body)


def test_repr_says_what_is_wrapped_and_how_often_it_was_called() -> None:
    def body(comm: Comm) -> None:
        assert repr(Checked(comm)) == f"Checked({comm!r})"
        timed = Timed(comm)
        assert repr(timed) == f"Timed({comm!r}, calls: none)"
        timed.all_to_all(np.zeros(2))
        timed.all_to_all(np.zeros(2))
        timed.barrier()
        assert repr(timed) == f"Timed({comm!r}, calls: all_to_all 2, barrier 1)"
        assert f"rank {comm.rank} of 2" in repr(timed)

    threads.run(2, body)


def test_repr_of_an_all_to_all_names_its_comm() -> None:
    def body(comm: Comm) -> None:
        a2a = HierarchicalAllToAll(comm, Nodes.of_size(1, 2))
        assert repr(a2a) == f"HierarchicalAllToAll({comm!r})"
        a2a.free()
        assert repr(a2a) == f"HierarchicalAllToAll({comm!r}, freed)"

    threads.run(2, body)
