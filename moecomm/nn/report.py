"""The routing report: what each MoE layer did with some tokens."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moecomm.arrays import row_bytes
from moecomm.comm import Comm
from moecomm.exchange import Exchange
from moecomm.failures import Failing
from moecomm.gating import Routing
from moecomm.nn.transformer import TransformerLM


@dataclass(frozen=True)
class LayerReport:
    """One MoE layer in one forward pass."""

    layer: int
    """Number among the MoE layers of this rank."""
    load: list[int]
    """[E] tokens of all data ranks that chose each expert, before drops."""
    entropy: float
    """Of the load, as a share of log E: 1 is balanced, 0 all to one expert."""
    dropped: float
    """Share of this rank's assignments."""
    rows: int
    """That this rank sent to other ranks, there and back."""
    bytes: int
    """Of these rows, as wide as the tokens."""
    seconds: float
    """In dispatch and combine, on this rank, waiting for others included."""


class _Measured(Exchange[Any]):
    """An exchange that counts the rows sent and takes the time."""

    def __init__(self, exchange: Exchange) -> None:
        self.exchange = exchange
        self.num_experts = exchange.num_experts
        self.num_local_experts = exchange.num_local_experts
        self.experts = exchange.experts
        self.local_experts = exchange.local_experts
        # A gate that notes its status instead of raising does so for an exchange that compares it.
        self.tells_unusable = exchange.tells_unusable
        self.rows = self.bytes = 0
        self.seconds = 0.0

    @property
    def comms(self) -> tuple[Failing, ...]:
        """Those of the exchange."""
        return self.exchange.comms

    def dispatch(self, x: Tensor, routing: Routing) -> tuple[Tensor, Any]:
        with self._timed(x):
            rows, plan = self.exchange.dispatch(x, routing)
        self.rows += self.exchange.rows_sent(plan)
        self.bytes = self.rows * row_bytes(x)
        return rows, plan

    def combine(self, rows: Tensor, plan: Any) -> Tensor:
        with self._timed(rows):
            tokens: Tensor = self.exchange.combine(rows, plan)
        return tokens

    @contextmanager
    def _timed(self, rows: Tensor) -> Iterator[None]:
        # A GPU works on after the host: its queue is empty at both ends of the time.
        if rows.is_cuda:
            torch.cuda.synchronize(rows.device)
        start = time.perf_counter()
        yield
        if rows.is_cuda:
            torch.cuda.synchronize(rows.device)
        self.seconds += time.perf_counter() - start


@torch.no_grad()
def routing_report(model: TransformerLM, tokens: Tensor) -> list[LayerReport]:
    """Run the model on tokens [B, S] and report on each of its MoE layers. Collective as the model is.

    The model must have all layers (no pipeline stage). Rows and bytes are 0 for an exchange that has its counts on the
    device, as DirectExchange.
    """
    layers = model.moe_layers()
    measured = [_Measured(layer.exchange) for layer in layers]
    for layer, exchange in zip(layers, measured, strict=True):
        layer.exchange = exchange
    try:
        routings = model(tokens).routings
    finally:
        # Also when the model fails: it must not keep exchanges that measure.
        for layer, exchange in zip(layers, measured, strict=True):
            layer.exchange = exchange.exchange
    data = None if model.groups is None else model.groups.data
    reports = []
    for number, (routing, exchange) in enumerate(zip(routings, measured, strict=True)):
        reports.append(_report(number, routing, exchange, data))
    return reports


def _report(number: int, routing: Routing, measured: _Measured, data: Comm | None) -> LayerReport:
    """The report of MoE layer `number`. Collective over the data ranks."""
    load = routing.load.float()
    if data is not None:
        load = data.all_reduce(load)
    share = load / load.sum().clamp(min=1)
    # A layer of one expert is balanced whatever it gets: the logarithm of 1 would divide by 0.
    entropy = torch.special.entr(share).sum() / math.log(max(2, len(load)))
    served = int(routing.count.sum()) / max(1, int(routing.load.sum()))
    return LayerReport(
        layer=number,
        load=[int(tokens) for tokens in load.tolist()],
        entropy=float(entropy),
        dropped=1 - served,
        rows=measured.rows,
        bytes=measured.bytes,
        seconds=measured.seconds,
    )


def plot_routing(reports: Sequence[LayerReport], path: str | Path) -> None:
    """Draw the load of each layer, expert by expert, as a picture. Needs matplotlib: pip install 'moecomm[train]'."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    # Figure and not pyplot: it needs no display and keeps no figures open.
    figure = Figure(figsize=(8, 1 + 1.8 * len(reports)), layout="constrained")
    plots = figure.subplots(len(reports), squeeze=False)
    for (axes,), report in zip(plots, reports, strict=True):
        axes.bar(range(len(report.load)), report.load)
        axes.axhline(sum(report.load) / len(report.load), color="black", linewidth=0.8)
        axes.set_title(
            f"MoE layer {report.layer}: entropy {report.entropy:.3f}, dropped {report.dropped:.1%}, "
            f"{report.rows} rows, {report.bytes} bytes, {report.seconds * 1e3:.2f} ms",
            fontsize=9,
        )
        axes.set_ylabel("tokens")
        axes.set_xlabel("expert")
        # No mark between two experts, nor before the first.
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlim(-0.6, len(report.load) - 0.4)
    figure.savefig(path)
