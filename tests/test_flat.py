import numpy as np
import pytest

from moecomm import AllToAll, Comm, FlatAllToAll, testing
from moecomm.transports import threads
from moecomm.transports.wrappers import Timed


def test_conformance() -> None:
    testing.check_all_to_all(threads.run, FlatAllToAll, sizes=(1, 2, 3, 8))


def test_two_ranks_by_hand() -> None:
    """rank 0 has [a b], rank 1 has [c d]; block 0 goes to rank 0: [a c] and [b d]."""
    blocks = [np.array(["a", "b"]), np.array(["c", "d"])]
    results = threads.run(2, lambda comm: FlatAllToAll(comm)(blocks[comm.rank]).tolist())
    assert results == [["a", "c"], ["b", "d"]]


def test_messages_of_one_call() -> None:
    def body(comm: Comm) -> None:
        timed = Timed(comm)
        FlatAllToAll(timed)(np.zeros((comm.size, 5), np.float32))
        assert timed.record["all_to_all"].messages.sum() == comm.size - 1
        assert timed.record["all_to_all"].bytes.sum() == (comm.size - 1) * 20

    threads.run(7, body)


def test_a_wrong_algorithm_does_not_pass_the_conformance_suite() -> None:
    class Shifted(FlatAllToAll):
        def _even(self, x: np.ndarray, out: np.ndarray) -> None:
            super()._even(np.roll(x, 1, axis=0), out)

    with pytest.raises(AssertionError, match="got int64"):
        testing.check_all_to_all(threads.run, Shifted, sizes=(3,))


def test_what_is_no_communicator() -> None:
    with pytest.raises(TypeError, match="expected an mpi4py communicator, a torch ProcessGroup or a moecomm Comm"):
        FlatAllToAll("world")
    assert issubclass(FlatAllToAll, AllToAll)


def test_gradients_are_not_lost_in_silence() -> None:
    torch = pytest.importorskip("torch")
    x = torch.zeros(2, 3, requires_grad=True)
    with pytest.raises(ValueError, match="requires grad"):
        threads.run(2, lambda comm: FlatAllToAll(comm)(x))
    threads.run(2, lambda comm: FlatAllToAll(comm)(x.detach()))
