"""One rank under mpirun. Arguments: the case, its limit, the folder for reports."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from case import Case
from launch import run_mpi

run_mpi(Case.parse(sys.argv[1])._replace(limit=float(sys.argv[2])), Path(sys.argv[3]))
