"""The gate: which expert, what weight."""

from moecomm.gating.routing import Generator, Noise, Routing

__all__ = ["Generator", "Noise", "Routing"]
