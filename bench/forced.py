"""Hold AutoAllToAll against everything that the MPI library can be made to do, on an emulated cluster that is up.

    python bench/cluster.py up --hosts 4 --rate 1gbit --delay 100us
    python bench/forced.py -n 64 --launches 3 --out cluster.jsonl

One launch of bench/alltoall.py after another: the library as it comes, `--launches` times, and each algorithm that its
settings can force, once. In every launch the library's MPI_Alltoall and auto take turns. What follows `--` goes to
bench/alltoall.py.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

from cluster import mpi_family
from cluster_hosts import ClusterError
from cluster_hosts import find as find_cluster
from harness import refused

from moecomm.train.progress import progress_of

BENCH = Path(__file__).parent

TUNED = {"OMPI_MCA_coll_tuned_use_dynamic_rules": "1"}
FORCED: dict[str, dict[str, dict[str, str]]] = {
    "mpich": {
        "bruck": {"MPIR_CVAR_ALLTOALL_INTRA_ALGORITHM": "brucks"},
        "scattered": {"MPIR_CVAR_ALLTOALL_INTRA_ALGORITHM": "scattered"},
        "pairwise": {"MPIR_CVAR_ALLTOALL_INTRA_ALGORITHM": "pairwise"},
        "two-level": {"MPIR_CVAR_ALLTOALL_COMPOSITION": "1"},
    },
    "openmpi": {
        "linear": TUNED | {"OMPI_MCA_coll_tuned_alltoall_algorithm": "1"},
        "pairwise": TUNED | {"OMPI_MCA_coll_tuned_alltoall_algorithm": "2"},
        "bruck": TUNED | {"OMPI_MCA_coll_tuned_alltoall_algorithm": "3"},
        "linear-sync": TUNED | {"OMPI_MCA_coll_tuned_alltoall_algorithm": "4"},
    },
}
"""What the two libraries call their algorithms, and the settings that force them."""


def launch(options: argparse.Namespace, name: str | None, settings: dict[str, str]) -> int:
    command = [sys.executable, str(BENCH / "cluster.py"), "run", "-n", str(options.n), sys.executable]
    command += [str(BENCH / "alltoall.py"), "--out", options.out, "--algorithms", "mpi,auto", *options.rest]
    if name:
        command += ["--forced", name]
    job = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True)
    if job.returncode:
        print(f"\n{name or 'as it comes'}: exit status {job.returncode}\n{job.stderr[-2000:]}", file=sys.stderr)
    return job.returncode


def main() -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("-n", type=int, required=True, metavar="RANKS", help="ranks of each launch")
    parser.add_argument("--launches", type=int, default=3, help="of the library as it comes (default: %(default)s)")
    parser.add_argument("--forced", default="all", help="names, comma-separated; none; all (default)")
    parser.add_argument("--out", required=True, metavar="FILE.jsonl", help="append the rows as JSON Lines")
    parser.add_argument("rest", nargs="*", help="after --: options of bench/alltoall.py")
    options = parser.parse_args()
    try:
        find_cluster("moecomm")
        known = FORCED[mpi_family("mpirun")]
    except (ClusterError, OSError) as error:
        return refused(f"{error}")
    names = {"all": list(known), "none": []}.get(options.forced, options.forced.split(","))
    if unknown := set(names) - set(known):
        parser.error(f"--forced {', '.join(sorted(unknown))}: this library can be made to do {', '.join(known)}")
    launches: list[tuple[str | None, dict[str, str]]] = [(None, {})] * options.launches
    launches += [(name, known[name]) for name in names]
    progress = progress_of(len(launches), "launches")
    statuses = []
    for name, settings in launches:
        statuses.append(launch(options, name, settings))
        progress.update()
    progress.close()
    return max(statuses)


if __name__ == "__main__":
    sys.exit(main())
