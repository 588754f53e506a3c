"""How many processes a launcher says that it has started.

The numbers are compared with the ranks that a library sees, to warn of ranks that are alone. Nothing else uses them.
"""

from __future__ import annotations

from collections.abc import Mapping

STARTED = {
    "MPICH's or Intel's mpirun": "PMI_SIZE",
    "Open MPI's mpirun": "OMPI_COMM_WORLD_SIZE",
    "torchrun": "WORLD_SIZE",
    "srun": "SLURM_STEP_NUM_TASKS",
}
"""Launcher -> the variable of the environment in which it tells its processes their number."""


def started_by(environ: Mapping[str, str], *launchers: str) -> tuple[str, int]:
    """The first of the launchers that has started several processes, and their number; else ("", 1).

    launchers  names of STARTED
    """
    for launcher in launchers:
        started = environ.get(STARTED[launcher], "")
        if started.isdecimal() and int(started) > 1:
            return launcher, int(started)
    return "", 1
