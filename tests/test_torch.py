"""The torch transport over gloo, with forked processes."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from subprocess import PIPE

import numpy as np
import pytest
from conftest import PROGRAMS, check_group_of_a_library, check_limits, gloo_run

from moecomm import Comm, CommError, FlatAllToAll, HierarchicalAllToAll, Nodes, testing
from moecomm.transports.wrappers import Checked, Timed

torch = pytest.importorskip("torch")


@pytest.mark.parametrize("make", [np.asarray, torch.from_numpy], ids=["numpy", "torch"])
def test_conformance(make: testing.Make) -> None:
    testing.check_comm(gloo_run, sizes=(1, 2, 3, 4), make=make)


@pytest.mark.slow
def test_all_to_all_conformance() -> None:
    def body(comm: Comm) -> None:
        for wrapped in (comm, Checked(comm), Timed(comm)):
            testing.check_all_to_all_on(wrapped, FlatAllToAll(wrapped), make=torch.from_numpy)
            for ranks_per_node in (1, 2, 3, 4):
                nodes = Nodes.of_size(ranks_per_node, comm.size)
                testing.check_all_to_all_on(wrapped, HierarchicalAllToAll(wrapped, nodes), make=torch.from_numpy)

    gloo_run(4, body)


def test_all_that_takes_a_comm_takes_a_process_group() -> None:
    def body(comm: Comm) -> None:
        import torch.distributed as dist

        check_group_of_a_library(dist.group.WORLD)

    gloo_run(4, body)


def test_a_process_group_may_be_passed_directly() -> None:
    def body(comm: Comm) -> None:
        import torch.distributed as dist

        for a2a in (FlatAllToAll(dist.group.WORLD), HierarchicalAllToAll(dist.group.WORLD)):
            x = torch.full((3, 2), comm.rank).bfloat16()
            assert a2a(x).tolist() == [[0, 0], [1, 1], [2, 2]]
            assert a2a(x).dtype == torch.bfloat16
            a2a.free()

    gloo_run(3, body)


def test_all_ranks_of_one_host_are_one_node() -> None:
    def body(comm: Comm) -> None:
        assert Nodes.discover(comm) == Nodes([[0, 1, 2]])

    gloo_run(3, body)


def test_bfloat16_is_summed_in_float32() -> None:
    """256 + 1 is 256 in bfloat16, and 256 + 3 is 260 when rounded once."""

    def body(comm: Comm) -> None:
        mine = torch.tensor([256.0 if comm.rank == 0 else 1.0], dtype=torch.bfloat16)
        total = comm.all_reduce(mine)
        assert total.dtype == torch.bfloat16
        assert total.item() == torch.tensor(259.0).bfloat16().item() != 256

    gloo_run(4, body)


def test_groups_of_ranks_that_have_made_different_numbers_of_groups() -> None:
    """torch's own names for groups depend on that number."""

    def body(comm: Comm) -> None:
        for round in range(3):
            if comm.rank < 2:
                pair = comm.split(0)
            else:
                pair = comm.split(1)
                pair.split(0).split(pair.rank).free()  # ranks 2 and 3 alone make more groups
            everybody = comm.split(0)
            assert everybody.all_gather(np.array([comm.rank])).tolist() == [0, 1, 2, 3]
            assert pair.all_reduce(np.ones(1)).tolist() == [2]
            (pair if round else everybody).free()

    gloo_run(4, body)


def test_split_in_reverse_order() -> None:
    def body(comm: Comm) -> None:
        try:
            backwards = comm.split(0, key=-comm.rank)
        except ValueError as error:
            assert "which torch >= 2.12 can do, and this is" in str(error)
            assert comm.all_reduce(np.ones(1)).tolist() == [3]
        else:
            assert backwards.rank == comm.size - 1 - comm.rank
            assert backwards.all_gather(np.array([comm.rank])).tolist() == [2, 1, 0]

    gloo_run(3, body)


def test_a_rank_that_never_comes_ends_the_others(tmp_path: Path) -> None:
    program = [sys.executable, str(PROGRAMS / "late_torch_rank.py")]
    ranks = [
        subprocess.Popen([*program, str(rank), str(tmp_path / "store"), "all_to_all"], stdout=PIPE, text=True)
        for rank in (0, 1)
    ]
    try:
        output, _ = ranks[0].communicate(timeout=60)
        assert "all_to_all waited 1 s for the other 1 rank(s) to come and send  (rank 0 of 2)" in output
        assert ranks[0].returncode == 1
    finally:
        ranks[1].kill()
        ranks[1].communicate()


@pytest.mark.slow
def test_a_rank_that_connects_to_its_new_group_too_late(tmp_path: Path) -> None:
    program = [sys.executable, str(PROGRAMS / "late_torch_rank.py")]
    ranks = [
        subprocess.Popen([*program, str(rank), str(tmp_path / "store"), "split"], stdout=PIPE, text=True)
        for rank in (0, 1)
    ]
    for rank, process in enumerate(ranks):
        first, second = process.communicate(timeout=60)[0].splitlines()
        assert re.fullmatch(rf"split: the new group could not be made: .*\(rank {rank} of 2\)", first)
        assert "then: barrier: this Comm cannot be used: split" in second


def test_groups_that_are_freed_at_once() -> None:
    """Nobody may have to connect to a rank that has freed the group already."""

    def body(comm: Comm) -> None:
        for round in range(40):
            comm.split(round % 3 * comm.rank).free()
        part = comm.split(comm.rank % 2)
        for _ in range(10):
            part.split(0).free()
        assert comm.all_reduce(np.ones(1)).tolist() == [4]

    gloo_run(4, body)


def test_groups_made_by_several_threads() -> None:
    """Each thread's have their own names, and torch gets back what it names its own by."""

    def body(comm: Comm) -> None:
        from concurrent.futures import ThreadPoolExecutor

        import torch.distributed.distributed_c10d as c10d

        torch_name = c10d._hash_ranks_to_str

        def work(part: Comm) -> None:
            for round in range(10):
                pair = part.split((comm.rank + round) // 2 % 2)
                assert pair.all_reduce(np.ones(1)).tolist() == [2]
                pair.free()

        parts = [comm.split(0) for _ in range(3)]
        with ThreadPoolExecutor(3) as pool:
            list(pool.map(work, parts))
        assert c10d._hash_ranks_to_str is torch_name

    gloo_run(4, body)


@pytest.mark.parametrize("change", ["renamed", "unused"])
def test_a_torch_that_names_groups_in_another_way(change: str) -> None:
    why = f"RuntimeError: torch {torch.__version__} names groups in a way that moecomm does not know"

    def body(comm: Comm) -> None:
        import torch.distributed.distributed_c10d as c10d

        if change == "renamed":
            del c10d._hash_ranks_to_str
        else:
            c10d._process_group_name = lambda ranks, use_hashed_name: "a name"
        with pytest.raises(CommError, match=re.escape(f"split: the new group could not be made: {why}")):
            comm.split(0)

    gloo_run(2, body)


def test_a_rank_that_dies_raises_commerror_on_the_others() -> None:
    def body(comm: Comm) -> None:
        import os

        if comm.rank == 1:
            os._exit(0)
        with pytest.raises(CommError):
            comm.all_to_all(np.zeros((2, 3)))
        os._exit(0)

    gloo_run(2, body)


def test_what_is_no_group() -> None:
    from moecomm.transports.torch import TorchComm

    with pytest.raises(TypeError, match="expected an initialised torch ProcessGroup"):
        TorchComm(None)


def test_limits() -> None:
    def body(comm: Comm) -> None:
        import torch.distributed as dist

        from moecomm.transports.torch import TorchComm

        check_limits(
            "TorchComm", lambda limit: TorchComm(dist.group.WORLD, limit=limit).split(0).all_reduce(np.ones(1))
        )

    gloo_run(2, body)
