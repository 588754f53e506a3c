"""The gate: which expert, what weight."""

from moecomm.gating.routing import Routing

__all__ = ["Routing"]
