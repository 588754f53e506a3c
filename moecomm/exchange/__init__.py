"""Exchanges: tokens to the ranks of their experts, and the answers home."""

from moecomm.exchange.balanced import BalancedExchange, BalancedPlan
from moecomm.exchange.contract import Exchange
from moecomm.exchange.direct import DirectExchange
from moecomm.exchange.direct.plan import DirectPlan
from moecomm.exchange.hierarchical import HierarchicalExchange, RelayPlan
from moecomm.exchange.placement import Placement, balance
from moecomm.exchange.plan import Plan
from moecomm.exchange.routed import RoutedExchange
from moecomm.exchange.static import StaticExchange, StaticHierarchicalExchange
from moecomm.exchange.tensor_parallel import LanePlan, TensorParallelExchange

__all__ = [
    "BalancedExchange",
    "BalancedPlan",
    "DirectExchange",
    "DirectPlan",
    "Exchange",
    "HierarchicalExchange",
    "LanePlan",
    "Placement",
    "Plan",
    "RelayPlan",
    "RoutedExchange",
    "StaticExchange",
    "StaticHierarchicalExchange",
    "TensorParallelExchange",
    "balance",
]
