"""DirectExchange: dispatch and combine between the GPUs of a node, without the host.

A call goes one way through these files: exchange (checks) -> autograd, where a gradient is wanted -> launch -> kernels.
"""

from moecomm.exchange.direct.exchange import DirectExchange
from moecomm.exchange.direct.plan import DirectPlan

__all__ = ["DirectExchange", "DirectPlan"]
