"""Prints the nodes found, and checks the hierarchical all-to-all over them."""

from mpi4py import MPI

from moecomm import HierarchicalAllToAll, testing
from moecomm.transports.mpi import MpiComm

comm = MpiComm(MPI.COMM_WORLD, limit=30)
a2a = HierarchicalAllToAll(comm)
testing.check_all_to_all_on(comm, a2a)
if comm.rank == 0:
    print([list(node) for node in a2a.nodes.ranks])
