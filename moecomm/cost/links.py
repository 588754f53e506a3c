"""Links: the figures of a machine that the cost model is made of."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, fields
from typing import Any


@dataclass(frozen=True)
class Link:
    """One class of links. Times in seconds.

    latency    from the end of a rank's work for a message to its arrival
    message    work of a core for each message, sender and receiver together
    bandwidth  bytes a second that one core, or a GPU's own link, can move
    """

    latency: float
    message: float
    bandwidth: float


@dataclass(frozen=True)
class Links:
    """A machine: its two classes of links, and what the ranks of a node share. Times in seconds.

    inside, between   the links inside a node, and between nodes
    node_bandwidth    bytes a second that can leave a node, while as many come in
    copy_bandwidth    bytes a second that a core, or a GPU, copies in memory, while its neighbours do so too
    call              work of a core for one collective call, beside its messages
    wake              work of a core to wake a rank that sleeps
    cores_per_node    cores that the ranks of a node share; less than 1 where nodes are emulated on few cores
    combine_below     the library's all-to-all combines blocks of fewer bytes (Bruck's algorithm); inf: it always does

    The work of the ranks of a node adds up on its cores, and no rank's own work is shared. Immutable.
    Raises ValueError for a figure that is not positive (latencies, calls, wake-ups and combine_below may be 0).
    """

    inside: Link
    between: Link
    node_bandwidth: float
    copy_bandwidth: float
    call: float
    wake: float
    cores_per_node: float
    combine_below: float = 257

    def __post_init__(self) -> None:
        figures = {field.name: getattr(self, field.name) for field in fields(self)}
        for name in ("inside", "between"):
            figures |= {f"{name}.{key}": value for key, value in asdict(figures.pop(name)).items()}
        for name, value in figures.items():
            least = "> 0" if "bandwidth" in name or "cores" in name else ">= 0"
            if not isinstance(value, int | float) or math.isnan(value) or value < 0 or (value == 0 and least == "> 0"):
                raise ValueError(f"Links: {name} is {value!r}, expected a number {least}")

    def to_json(self) -> str:
        """The figures as stable text."""
        return json.dumps(asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str) -> Links:
        """The Links that `to_json` wrote. ValueError if the text is something else."""
        try:
            read = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"Links.from_json: not JSON: {error}") from None
        _check_keys(read, cls, "the text")
        for name in ("inside", "between"):
            _check_keys(read[name], Link, name)
        return cls(**{**read, "inside": Link(**read["inside"]), "between": Link(**read["between"])})


def _check_keys(read: Any, kind: type[Link] | type[Links], name: str) -> None:
    expected = sorted(field.name for field in fields(kind))
    found = sorted(read) if isinstance(read, dict) else f"a {type(read).__name__}"
    if found != expected:
        raise ValueError(f"Links.from_json: {name} has {found}, expected an object with {expected}")


GPU_NODES = Links(
    inside=Link(latency=5e-6, message=1e-6, bandwidth=370e9),
    between=Link(latency=12e-6, message=3e-6, bandwidth=45e9),
    node_bandwidth=360e9,
    copy_bandwidth=1.2e12,
    call=15e-6,
    wake=5e-6,
    cores_per_node=8,
    combine_below=0,
)
"""Assumed, not measured: nodes of 8 GPUs with NVLink (450 GB/s each) and a 400 Gbit/s network card each."""
