"""The conformance suites under any mpirun, where pytest-mpi is not at hand: mpirun -n 4 python tests/programs/mpi.py"""

from mpi4py import MPI

from moecomm import Comm, FlatAllToAll, HierarchicalAllToAll, Nodes, testing
from moecomm.transports.mpi import MpiComm
from moecomm.transports.wrappers import Checked


def check(comm: Comm) -> None:
    testing.check_comm(lambda size, body: body(comm), sizes=[comm.size])
    testing.check_all_to_all_on(comm, FlatAllToAll(comm))
    for ranks_per_node in (1, 2, 3, comm.size):
        testing.check_all_to_all_on(comm, HierarchicalAllToAll(comm, Nodes.of_size(ranks_per_node, comm.size)))
        testing.check_all_to_all_on(comm, HierarchicalAllToAll(Checked(comm), Nodes.of_size(ranks_per_node, comm.size)))


check(MpiComm(MPI.COMM_WORLD))
check(MpiComm(MPI.COMM_WORLD, limit=60))
if MPI.COMM_WORLD.rank == 0:
    library = MPI.Get_library_version().split(",")[0].splitlines()[0]
    print(f"{library}, {MPI.COMM_WORLD.size} ranks: conformance holds")
