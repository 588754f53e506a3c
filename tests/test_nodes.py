import numpy as np
import pytest

from moecomm import Nodes
from moecomm.transports import threads


def test_of_size_cuts_blocks_and_leaves_the_rest_to_the_last_node() -> None:
    assert Nodes.of_size(4, 10).ranks == ((0, 1, 2, 3), (4, 5, 6, 7), (8, 9))
    assert Nodes.of_size(1, 3).ranks == ((0,), (1,), (2,))
    assert Nodes.of_size(99, 3).ranks == ((0, 1, 2),)


def test_any_order_gives_the_same_nodes() -> None:
    nodes = Nodes([[5, 1, 3], [4, 0, 2]])
    assert nodes.ranks == ((0, 2, 4), (1, 3, 5))
    assert nodes == Nodes([(0, 2, 4), (1, 3, 5)])
    assert hash(nodes) == hash(Nodes([(0, 2, 4), (1, 3, 5)]))
    assert nodes.node_of.tolist() == [0, 1, 0, 1, 0, 1]
    assert nodes.local_rank.tolist() == [0, 0, 1, 1, 2, 2]
    assert nodes.same_node(1).tolist() == [False, True, False, True, False, True]
    assert nodes.sizes().tolist() == [3, 3]
    assert (len(nodes), nodes.world_size) == (2, 6)
    assert eval(repr(nodes)) == nodes


def test_nodes_are_frozen() -> None:
    with pytest.raises(ValueError, match="read-only"):
        Nodes.of_size(2, 4).node_of[0] = 1


@pytest.mark.parametrize(
    ("ranks", "match"),
    [
        ([], "at least one rank"),
        ([[]], "at least one rank"),
        ([[0, 1], []], "at least one rank"),
        ([[0, 1], [1, 2]], r"\[1, 1\] twice"),
        ([[0, 1], [3]], r"\[2\] on no node"),
        ([[0, -1]], r"\[-1\] twice or out of range, \[1\] on no node"),
    ],
)
def test_no_partition(ranks: list[list[int]], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Nodes(ranks)


@pytest.mark.parametrize(("ranks_per_node", "world_size"), [(0, 4), (4, 0), (2.0, 4), (-1, 4)])
def test_bad_sizes(ranks_per_node: int, world_size: int) -> None:
    with pytest.raises(ValueError, match="expected a whole number >= 1"):
        Nodes.of_size(ranks_per_node, world_size)


def test_discover_groups_ranks_with_the_same_key() -> None:
    class Host(threads.ThreadComm):
        def _node_key(self) -> int:
            return 2**62 + self.rank % 3

    def body(comm: threads.ThreadComm) -> Nodes:
        return Nodes.discover(Host(comm._group, comm.rank, None))

    wanted = Nodes([[0, 3, 6], [1, 4], [2, 5]])
    assert threads.run(7, body) == [wanted] * 7  # type: ignore[arg-type]
    assert threads.run(3, Nodes.discover) == [Nodes([[0, 1, 2]])] * 3


def test_numpy_numbers_are_fine() -> None:
    assert Nodes.of_size(np.int64(2), np.int64(4)) == Nodes([np.arange(2), np.arange(2, 4)])
