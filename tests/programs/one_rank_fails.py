"""A test that fails on one rank before a collective that the other one waits in. Run by test_mpi.py."""

import pytest
from conftest import mpi_run

from moecomm import Comm


@pytest.mark.mpi(min_size=2)
def test_one_rank_fails() -> None:
    def body(comm: Comm) -> None:
        if comm.rank == 1:
            raise KeyError("before the collective")
        comm.barrier()

    mpi_run(2, body, limit=1.0)
