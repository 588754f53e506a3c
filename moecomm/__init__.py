"""moecomm moves Mixture-of-Experts tokens to their experts and back.

    logits       -> route    -> Routing   which expert, what weight     gating/      route, ...
    x, Routing   -> exchange -> rows      tokens to experts and back    exchange/    RoutedExchange, ...
    rows, counts -> AllToAll -> rows      which hops                    all_to_all/  AutoAllToAll, ...
    rows, counts -> Comm     -> rows      which wires                   transports/  threads, mpi, torch, nccl

    Topology, Nodes: who is where, as plain arithmetic; build_groups makes the Comms of a Topology

A layer knows only those below it. Importing this module loads numpy and nothing heavier: mpi4py, torch and cupy are
loaded by the transport that needs them.
"""

from moecomm.all_to_all import AllToAll, AutoAllToAll, FlatAllToAll, HierarchicalAllToAll, SharedAllToAll
from moecomm.comm import Comm
from moecomm.errors import CommError
from moecomm.exchange import Plan, RoutedExchange, TensorParallelExchange
from moecomm.gating import Routing, expert_capacity, route
from moecomm.groups import Groups, build_groups, reduce_expert_gradient
from moecomm.nodes import Nodes
from moecomm.topology import Topology

__version__ = "0.1.0"
__all__ = [
    "AllToAll",
    "AutoAllToAll",
    "Comm",
    "CommError",
    "FlatAllToAll",
    "Groups",
    "HierarchicalAllToAll",
    "Nodes",
    "Plan",
    "RoutedExchange",
    "Routing",
    "SharedAllToAll",
    "TensorParallelExchange",
    "Topology",
    "build_groups",
    "expert_capacity",
    "reduce_expert_gradient",
    "route",
]
