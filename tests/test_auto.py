"""AutoAllToAll: the right bytes whatever it chooses, the same choice on every rank, and a table that can be kept."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from conftest import mpi_run

from moecomm import AutoAllToAll, Comm, FlatAllToAll, Nodes, cost, testing
from moecomm.all_to_all import Table, shared
from moecomm.transports import threads
from moecomm.transports.wrappers import Checked, Timed

NODES = [Nodes.of_size(5, 5), Nodes.of_size(1, 5), Nodes.of_size(2, 5), Nodes([[0, 3], [1], [2, 4]])]
NAMES = ("flat", "hierarchical", "shared")


def always(name: str, nodes: Nodes) -> Table:
    """A table in which `name` is the fastest."""
    seconds = {other: 0.5 if other == name else 1.0 for other in NAMES}
    return Table(tuple(nodes.sizes().tolist()), {"even": {64: seconds}, "uneven": {64: seconds}})


@pytest.mark.parametrize("nodes", NODES, ids=str)
@pytest.mark.parametrize("name", [None, *NAMES])
def test_conformance(nodes: Nodes, name: str | None) -> None:
    table = always(name, nodes) if name else None
    testing.check_all_to_all(threads.run, lambda comm: AutoAllToAll(comm, nodes, table=table), sizes=(5,))


@pytest.mark.mpi(min_size=4)
def test_conformance_on_mpi() -> None:
    testing.check_all_to_all(mpi_run, lambda comm: AutoAllToAll(comm, Nodes.of_size(2, comm.size)), sizes=(4,))


def test_conformance_after_tuning() -> None:
    def body(comm: Comm) -> None:
        auto = AutoAllToAll(comm, Nodes.of_size(3, comm.size))
        table = auto.tune((16, 4096), seconds=0)
        assert auto.table is table
        for form, names in (("even", {*NAMES}), ("uneven", {"flat", "shared"})):
            assert set(table.seconds[form]) == {16, 4096}
            assert all(set(times) == names and min(times.values()) > 0 for times in table.seconds[form].values())
        testing.check_all_to_all_on(comm, auto)

    threads.run(7, body)


def test_without_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared, "shared_memory", lambda comm, num_bytes: None)

    def body(comm: Comm) -> None:
        auto = AutoAllToAll(comm, Nodes.of_size(2, comm.size))
        assert set(auto.algorithms) == {"flat", "hierarchical"}
        auto.tune((64,), seconds=0)
        testing.check_all_to_all_on(comm, auto)

    threads.run(5, body)


@pytest.mark.parametrize("name", NAMES)
def test_it_does_what_the_table_says(name: str) -> None:
    """Told by the messages of rank 1, which leads no node: 5, those of two hops, none."""

    def body(comm: Comm) -> int:
        nodes = Nodes.of_size(3, comm.size)
        timed = Timed(comm)
        auto = AutoAllToAll(timed, nodes, table=always(name, nodes))
        assert auto.choose("even", 16) == name
        timed.clear()
        auto(np.zeros((comm.size, 16), np.uint8))
        return sum(int(entry.messages.sum()) for entry in timed.record.values())

    assert threads.run(6, body)[1] == {"flat": 5, "hierarchical": 2 + 1, "shared": 0}[name]


def test_all_ranks_choose_the_same_for_skewed_counts() -> None:
    """Each rank has another number of rows: the mean over all pairs decides, 25 bytes here, nearer to 16 than to 64."""
    p = 4

    def body(comm: Comm) -> list[str]:
        nodes = Nodes.of_size(2, p)
        times: dict[Any, Any] = {16: {"flat": 1.0, "shared": 2.0}, 64: {"flat": 2.0, "shared": 1.0}}
        auto = AutoAllToAll(comm, nodes, table=Table((2, 2), {"uneven": times}))
        chosen = []
        choose = auto._choose
        auto._choose = lambda *key: chosen.append(choose(*key)) or chosen[-1]  # type: ignore[method-assign]
        for rows_of_first in (50, 400):
            counts = np.zeros(p, np.int64)
            counts[0] = rows_of_first if comm.rank == 0 else 0
            rows = np.arange(counts.sum() * 8, dtype=np.uint8).reshape(-1, 8)
            got, recv_counts = auto.rows(rows, counts)
            wanted, wanted_counts = FlatAllToAll(comm).rows(rows, counts)
            assert (got == wanted).all()
            assert (recv_counts == wanted_counts).all()
        return chosen

    assert threads.run(p, body) == [["flat", "shared"]] * p


# ---- the table -----------------------------------------------------------------------------------------------------


def test_the_nearest_size_decides() -> None:
    table = Table((1,), {"even": {16: {"a": 1.0, "b": 2.0}, 1024: {"a": 2.0, "b": 1.0}}})
    chosen = {size: table.fastest("even", size, ("a", "b")) for size in (0, 1, 16, 127, 129, 1024, 10**9)}
    assert chosen == {0: "a", 1: "a", 16: "a", 127: "a", 129: "b", 1024: "b", 10**9: "b"}
    assert table.fastest("even", 1024, ("a",)) == "a"
    assert table.fastest("even", 1024, ("c",)) is None
    assert table.fastest("uneven", 16, ("a",)) is None


def test_flat_need_not_be_quite_the_fastest() -> None:
    for other, chosen in ((1.0, "flat"), (0.9, "flat"), (0.85, "shared")):
        assert Table((1,), {"even": {16: {"flat": 1.0, "shared": other}}}).fastest("even", 16, NAMES) == chosen


def test_json_gives_the_table_back() -> None:
    table = always("shared", Nodes.of_size(2, 5))
    assert Table.from_json(table.to_json()) == table


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"node_sizes": [2]}',
        '{"node_sizes": 2, "seconds": {}}',
        '{"node_sizes": [2], "seconds": {"odd": {}}}',
        '{"node_sizes": [2], "seconds": {"even": {"x": {}}}}',
        '{"node_sizes": [2], "seconds": {"even": {"0": {}}}}',
        '{"node_sizes": [2], "seconds": {"even": {"16": {"flat": "fast"}}}}',
    ],
)
def test_other_text_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"Table\.from_json"):
        Table.from_json(text)


def test_a_table_of_other_nodes_is_refused() -> None:
    def body(comm: Comm) -> None:
        with pytest.raises(ValueError, match=r"table is of nodes of \[1, 1, 1, 1\] ranks, expected \[2, 2\]"):
            AutoAllToAll(comm, Nodes.of_size(2, 4), table=always("flat", Nodes.of_size(1, 4)))

    threads.run(4, body)


@pytest.mark.parametrize("wrong", [{"table": "x"}, {"links": None}])
def test_arguments_of_another_kind(wrong: dict[str, Any]) -> None:
    def body(comm: Comm) -> None:
        with pytest.raises(ValueError, match=next(iter(wrong))):
            AutoAllToAll(comm, Nodes.of_size(2, 4), **(wrong if comm.rank == 0 else {}))
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} is a .*, expected"):
            AutoAllToAll(comm, Nodes.of_size(2, 4), **wrong)

    threads.run(4, body)


@pytest.mark.parametrize("what", ["table", "links", "sizes", "seconds", "nodes"])
def test_ranks_that_differ_are_told(what: str) -> None:
    def body(comm: Comm) -> None:
        odd = comm.rank == 2
        nodes = Nodes.of_size(2, 4)
        with pytest.raises(ValueError, match=what):
            if what == "nodes":
                AutoAllToAll(comm, Nodes.of_size(1, 4) if odd else nodes)
            elif what == "table":
                AutoAllToAll(comm, nodes, table=always("flat", nodes) if odd else None)
            elif what == "links":
                AutoAllToAll(comm, nodes, links=cost.GPU_NODES if odd else cost.CPU_NODES)
            else:
                auto = AutoAllToAll(comm, nodes)
                auto.tune((16, 32) if what == "sizes" and odd else (16,), seconds=1 if what == "seconds" and odd else 0)

    threads.run(4, body)


@pytest.mark.parametrize(("sizes", "seconds"), [((), 1), ((0,), 1), ((16,), -1), ((16,), float("nan"))])
def test_what_cannot_be_tuned(sizes: tuple[int, ...], seconds: float) -> None:
    def body(comm: Comm) -> None:
        with pytest.raises(ValueError, match="expected whole numbers >= 1, seconds >= 0"):
            AutoAllToAll(comm).tune(sizes, seconds=seconds)

    threads.run(2, body)


def test_sizes_that_take_too_much_memory_are_left_out() -> None:
    def body(comm: Comm) -> None:
        table = AutoAllToAll(comm).tune((16, 1 << 40), seconds=0)
        assert set(table.seconds["even"]) == {16}

    threads.run(2, body)


def test_checked() -> None:
    def body(comm: Comm) -> None:
        auto = AutoAllToAll(Checked(comm), Nodes.of_size(2, 4))
        with pytest.raises(ValueError, match="differ"):
            auto(np.zeros((4, 1 + (comm.rank == 1)), np.uint8))

    threads.run(4, body)
