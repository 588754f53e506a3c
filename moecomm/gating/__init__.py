"""The gate: which expert, what weight, and which row."""

from moecomm.gating.permute import permute, permute_fp8, route_permute, unpermute
from moecomm.gating.route import expert_capacity, route
from moecomm.gating.routing import Generator, Noise, Routing

__all__ = [
    "Generator",
    "Noise",
    "Routing",
    "expert_capacity",
    "permute",
    "permute_fp8",
    "route",
    "route_permute",
    "unpermute",
]
