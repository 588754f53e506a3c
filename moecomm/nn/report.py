"""The routing report: what each MoE layer did with some tokens."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moecomm.arrays import row_bytes
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
    """An exchange that remembers its last routing, counts rows and takes the time."""

    def __init__(self, exchange: Exchange) -> None:
        self.exchange = exchange
        self.num_experts = exchange.num_experts
        self.num_local_experts = exchange.num_local_experts
        self.experts, self.local_experts = exchange.experts, exchange.local_experts
        self.tells_unusable = exchange.tells_unusable
        self.rows = self.bytes = 0
        self.seconds = 0.0

    @property
    def comms(self) -> tuple[Failing, ...]:
        """Those of the exchange."""
        return self.exchange.comms

    def dispatch(self, x: Tensor, routing: Routing) -> tuple[Tensor, Any]:
        self.routing = routing
        rows, plan = self._timed(x, self.exchange.dispatch, x, routing)
        self.rows += self.exchange.rows_sent(plan)
        self.bytes = self.rows * row_bytes(x)
        return rows, plan

    def combine(self, rows: Tensor, plan: Any) -> Tensor:
        return self._timed(rows, self.exchange.combine, rows, plan)

    def _timed(self, like: Tensor, call: Any, *arguments: Any) -> Any:
        if like.is_cuda:
            torch.cuda.synchronize(like.device)
        start = time.perf_counter()
        result = call(*arguments)
        if like.is_cuda:
            torch.cuda.synchronize(like.device)
        self.seconds += time.perf_counter() - start
        return result


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
        model(tokens)
    finally:
        for layer, exchange in zip(layers, measured, strict=True):
            layer.exchange = exchange.exchange
    return [_report(number, *pair, model) for number, pair in enumerate(zip(layers, measured, strict=True))]


def _report(number: int, layer: Any, measured: _Measured, model: TransformerLM) -> LayerReport:
    routing = measured.routing
    load = routing.load.float() if model.groups is None else model.groups.data.all_reduce(routing.load.float())
    share = load / load.sum().clamp(min=1)
    entropy = torch.special.entr(share).sum() / torch.log(torch.tensor(max(2.0, layer.num_experts)))
    kept = int(routing.count.sum()) / max(1, int(routing.load.sum()))
    counts = [int(n) for n in load.tolist()]
    return LayerReport(number, counts, float(entropy), 1 - kept, measured.rows, measured.bytes, measured.seconds)


def plot_routing(reports: Sequence[LayerReport], path: str | Path) -> None:
    """Draw the load of each layer, expert by expert, as a picture. Needs matplotlib: pip install 'moecomm[train]'."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 1 + 1.8 * len(reports)), layout="constrained")
    for axes, report in zip(figure.subplots(len(reports), squeeze=False)[:, 0], reports, strict=True):
        axes.bar(range(len(report.load)), report.load)
        axes.axhline(sum(report.load) / len(report.load), color="black", linewidth=0.8)
        axes.set_title(
            f"MoE layer {report.layer}: entropy {report.entropy:.3f}, dropped {report.dropped:.1%}, "
            f"{report.rows} rows, {report.bytes} bytes, {report.seconds * 1e3:.2f} ms",
            fontsize=9,
        )
        axes.set_ylabel("tokens")
    figure.savefig(path)
