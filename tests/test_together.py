"""together: what fails on one rank ends on all."""

import pytest

from moecomm import Comm, CommError
from moecomm.together import gather, together
from moecomm.transports import threads


@pytest.mark.parametrize(
    ("raised", "expected"),
    [(FileNotFoundError(2, "nö"), OSError), (MemoryError("nö"), ValueError), (NotImplementedError("nö"), RuntimeError)],
)
def test_all_ranks_raise_what_one_raised(raised: Exception, expected: type[Exception]) -> None:
    def body(comm: Comm) -> None:
        def call() -> int:
            if comm.rank == 1:
                raise raised
            return comm.rank

        with pytest.raises(expected, match=r"^counting: .*nö  \(rank 1 of 3\)$") as caught:
            together(comm, "counting", call)
        assert (caught.value.__cause__ is raised) == (comm.rank == 1)
        assert together(comm, "counting", lambda: comm.rank) == comm.rank  # and it goes on

    threads.run(3, body)


def test_one_rank() -> None:
    assert together(None, "counting", lambda: 7) == 7
    with pytest.raises(ValueError, match=r"^counting: no$"):
        together(None, "counting", lambda: raise_(ValueError("no")))


def test_a_comm_that_failed_is_not_asked() -> None:
    with pytest.raises(CommError, match="gone"):
        together(None, "counting", lambda: raise_(CommError("gone")))


def test_texts_of_any_length() -> None:
    def body(comm: Comm) -> None:
        assert gather(comm, "ü" * comm.rank) == ["", "ü", "üü"]
        assert gather(comm, "a\udcff" * comm.rank) == ["", "a\\udcff", "a\\udcffa\\udcff"]  # as in names of files

    threads.run(3, body)


def raise_(error: Exception) -> None:
    raise error
