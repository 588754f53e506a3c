"""PR-MoE layers and a language model, on top of the exchanges. Needs torch: pip install 'moecomm[torch]'."""

import moecomm.nn.requirements  # noqa: F401 - first: it says what to install where torch is missing
from moecomm.nn.balance import loss_carried, update_bias
from moecomm.nn.configs import CONFIGS, Config, config_named
from moecomm.nn.ddp import exclude_experts
from moecomm.nn.experts import Experts, ModuleBank
from moecomm.nn.gradients import agree_on_overflow, gradient_norm, parameter_groups, reduce_gradients
from moecomm.nn.linear import MLP, ColumnLinear, RowLinear
from moecomm.nn.local import LocalExchange
from moecomm.nn.memory import Memory, memory_estimate
from moecomm.nn.moe import MoE, exchange_over
from moecomm.nn.pyramid import layer_groups, layer_topologies, pyramid
from moecomm.nn.report import LayerReport, plot_routing, routing_report
from moecomm.nn.residual import ResidualMoE
from moecomm.nn.transformer import Output, TransformerLM, next_token_loss
from moecomm.nn.weights import agree_on_weights

__all__ = [
    "CONFIGS",
    "MLP",
    "ColumnLinear",
    "Config",
    "Experts",
    "LayerReport",
    "LocalExchange",
    "Memory",
    "MoE",
    "ModuleBank",
    "Output",
    "ResidualMoE",
    "RowLinear",
    "TransformerLM",
    "agree_on_overflow",
    "agree_on_weights",
    "config_named",
    "exchange_over",
    "exclude_experts",
    "gradient_norm",
    "layer_groups",
    "layer_topologies",
    "loss_carried",
    "memory_estimate",
    "next_token_loss",
    "parameter_groups",
    "plot_routing",
    "pyramid",
    "reduce_gradients",
    "routing_report",
    "update_bias",
]
