"""All-to-all algorithms: which hops the rows take. One algorithm, one file."""

from moecomm.all_to_all.auto import AutoAllToAll, Table
from moecomm.all_to_all.base import AllToAll, Route
from moecomm.all_to_all.flat import FlatAllToAll
from moecomm.all_to_all.hierarchical import HierarchicalAllToAll
from moecomm.all_to_all.shared import SharedAllToAll

__all__ = ["AllToAll", "AutoAllToAll", "FlatAllToAll", "HierarchicalAllToAll", "Route", "SharedAllToAll", "Table"]
