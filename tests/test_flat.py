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


def test_unusual_arrays() -> None:
    torch = pytest.importorskip("torch")
    numbers = np.arange(8, dtype=np.float32).reshape(2, 4)
    view = torch.arange(9.0)[1:].view(2, 4)  # starts at an odd place
    parameter = torch.nn.Parameter(torch.from_numpy(numbers.copy()))
    read_only = numbers.copy()
    read_only.flags.writeable = False

    def body(comm: Comm) -> None:
        flat = FlatAllToAll(comm)
        wanted = np.stack([numbers[comm.rank]] * 2)
        for x in (numbers.view(np.recarray), numbers.astype(">f4"), np.asfortranarray(numbers), read_only):
            assert (np.asarray(flat(x)) == wanted).all()
        assert (flat(view) == torch.from_numpy(wanted) + 1).all()
        assert (flat(torch.from_numpy(numbers).to(torch.complex64).conj()) == torch.from_numpy(wanted)).all()
        with torch.no_grad():
            assert (flat(parameter, out=torch.empty(2, 4)) == torch.from_numpy(wanted)).all()
        with pytest.raises(TypeError, match="masked array"):
            flat(np.ma.masked_array(numbers))
        with pytest.raises(ValueError, match="out requires grad"):
            flat(torch.from_numpy(numbers), out=torch.empty(2, 4, requires_grad=True))

    threads.run(2, body)


def test_writing_to_out_is_seen_by_autograd() -> None:
    torch = pytest.importorskip("torch")

    def body(comm: Comm) -> None:
        x, factor = torch.ones(1, 2), torch.ones(1, 2, requires_grad=True)
        out = torch.full((1, 2), 5.0)
        y = (out * factor).sum()  # saves out
        FlatAllToAll(comm)(x, out=out)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.backward()

    threads.run(1, body)


def test_gradients_are_not_lost_in_silence() -> None:
    torch = pytest.importorskip("torch")
    x = torch.zeros(2, 3, requires_grad=True)
    with pytest.raises(ValueError, match="requires grad"):
        threads.run(2, lambda comm: FlatAllToAll(comm)(x))
    threads.run(2, lambda comm: FlatAllToAll(comm)(x.detach()))
