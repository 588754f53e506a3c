"""moecomm moves Mixture-of-Experts tokens to their experts and back.

    rows, counts -> AllToAll -> rows     which hops    all_to_all/   FlatAllToAll, HierarchicalAllToAll
    rows, counts -> Comm     -> rows     which wires   transports/   threads, mpi, torch

A layer knows only those below it. Importing this module loads numpy and nothing heavier: mpi4py and torch are loaded
by the transport that needs them.
"""

from moecomm.all_to_all import AllToAll, FlatAllToAll, HierarchicalAllToAll
from moecomm.comm import Comm
from moecomm.errors import CommError
from moecomm.nodes import Nodes

__all__ = ["AllToAll", "Comm", "CommError", "FlatAllToAll", "HierarchicalAllToAll", "Nodes"]
