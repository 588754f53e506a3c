"""Links: the figures of a machine that the cost model is made of."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields

from moecomm.json_objects import check_object, read_object


@dataclass(frozen=True)
class Link:
    """One class of links. `work` is time of a core, in seconds: ranks that share cores do it one after the other.

    latency    seconds from the end of the sender's work to the start of the receiver's
    wait       work of a rank that waits for messages: it polls, or gives the core up and gets it back
    message    work for each message, sender and receiver together
    bandwidth  bytes a second that one core can send and receive
    buffered   bytes of each message that fit into buffers, and are moved with the work for the message
    """

    latency: float
    wait: float
    message: float
    bandwidth: float
    buffered: float = 0


@dataclass(frozen=True)
class Links:
    """The figures of a machine: its two classes of links, and what the ranks of a node share.

    inside, between   the links inside a node, and between nodes
    node_bandwidth    bytes a second that can leave a node while as many come in
    copy_bandwidth    bytes a second that a core copies in memory while the other cores copy too
    start             work of a rank to enter a call and to get its turn
    wake              work to wake a rank that sleeps
    cores_per_node    cores that the ranks of a node share; less than 1 where nodes are emulated on few cores. Ranks on
                      GPUs are counted as cores: the GPU does the work
    combine_below     the library's all-to-all combines blocks of fewer bytes (Bruck's algorithm); 0: it never does

    Immutable. Raises ValueError for a figure that is negative, or 0 for a bandwidth or for the cores.
    """

    inside: Link
    between: Link
    node_bandwidth: float
    copy_bandwidth: float
    start: float
    wake: float
    cores_per_node: float
    combine_below: float = 257

    def __post_init__(self) -> None:
        figures = asdict(self)
        for name in ("inside", "between"):
            for key, value in figures.pop(name).items():
                figures[f"{name}.{key}"] = value
        for name, value in figures.items():
            # The model divides by these.
            divisor = name.endswith(("bandwidth", "cores_per_node"))
            # Written so that nan, which is neither above nor equal to 0, is refused.
            if not isinstance(value, int | float) or not (value > 0 or (value == 0 and not divisor)):
                least = "> 0" if divisor else ">= 0"
                raise ValueError(f"Links: {name} is {value!r}, expected a number {least}")

    def to_json(self) -> str:
        """The figures as stable text."""
        return json.dumps(asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str) -> Links:
        """The Links that `to_json` wrote. ValueError if the text is something else."""
        call = "Links.from_json"
        figures = read_object(call, text, [field.name for field in fields(cls)])
        for name in ("inside", "between"):
            link = check_object(call, name, figures[name], [field.name for field in fields(Link)])
            figures[name] = Link(**link)
        return cls(**figures)


GPU_NODES = Links(
    inside=Link(latency=4e-6, wait=1e-6, message=1e-6, bandwidth=370e9),
    between=Link(latency=8e-6, wait=1e-6, message=3e-6, bandwidth=45e9),
    node_bandwidth=360e9,
    copy_bandwidth=1.2e12,
    start=10e-6,
    wake=5e-6,
    cores_per_node=8,
    # NCCL does not combine blocks
    combine_below=0,
)
"""Assumed, not measured: nodes of 8 GPUs with NVLink (450 GB/s a GPU) and a network of 400 Gbit/s a GPU."""

CPU_NODES = Links(
    inside=Link(latency=0.3e-6, wait=0.3e-6, message=0.3e-6, bandwidth=8e9),
    between=Link(latency=1.5e-6, wait=0.5e-6, message=0.5e-6, bandwidth=12e9),
    node_bandwidth=25e9,
    copy_bandwidth=8e9,
    start=1e-6,
    wake=5e-6,
    cores_per_node=64,
)
"""Assumed, not measured: nodes of 64 cores, a rank on each, and a network of 200 Gbit/s."""
