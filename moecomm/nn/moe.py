"""MoE: a gate, an exchange and a bank of experts in the place of a feed-forward layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from moecomm.all_to_all import AllToAll, FlatAllToAll
from moecomm.comm import Comm
from moecomm.exchange import Exchange, RoutedExchange, TensorParallelExchange
from moecomm.failures import collective
from moecomm.gating import Generator, Routing, expert_capacity, route
from moecomm.groups import Groups
from moecomm.nn.ddp import check_wrapping
from moecomm.nn.experts import Experts
from moecomm.nn.linear import Activation
from moecomm.nn.local import LocalExchange
from moecomm.nn.seeds import draw, number, parameter
from moecomm.topology import Topology


def exchange_over(
    groups: Groups | None,
    num_experts: int,
    all_to_all: Callable[[Comm], AllToAll] = FlatAllToAll,
    **options: Any,
) -> Exchange:
    """The exchange that fits the groups of a layer. Collective over the tensor group.

    groups      None, or groups without expert and tensor parallelism: LocalExchange. With tensor parallelism:
                TensorParallelExchange. Otherwise RoutedExchange
    all_to_all  made over the ranks that the exchange sends to
    options     of RoutedExchange

    Raises ValueError if the experts cannot be divided evenly, or expert slices not be held by a tensor group.
    """
    if groups is None:
        return LocalExchange(num_experts)
    topology, rank = groups.topology, groups.world.rank
    if num_experts % topology.expert:
        raise ValueError(f"MoE: num_experts is {num_experts}, which expert={topology.expert} ranks cannot share")
    each = num_experts // topology.expert
    if topology.tensor == topology.expert_tensor == 1:
        if topology.expert == 1:
            return LocalExchange(num_experts)
        return RoutedExchange(all_to_all(groups.expert), each, **options)
    inner = RoutedExchange(all_to_all(groups.expert_lane), _held(topology, rank, "expert_lane", each), **options)
    part = (topology.coords(rank)["expert_tensor"], topology.expert_tensor)
    return TensorParallelExchange(inner, groups.tensor, part=part)


def _held(topology: Topology, rank: int, axis: str, each: int) -> list[list[int]]:
    """The global ids that the ranks of rank's group along an axis hold: `each` of them on each."""
    places = [topology.coords(member)["expert"] for member in topology.group_of(rank, axis)]
    return [list(range(place * each, (place + 1) * each)) for place in places]


class ExpertLayer(nn.Module):
    """What layers with experts have in common: the experts of this rank, and what brings tokens to them."""

    exchange: Exchange
    experts: Experts
    groups: Groups | None
    """Who holds which experts."""

    def answers(self, tokens: Tensor, routing: Routing) -> Tensor:
        """tokens [T, hidden] -> [T, hidden], of each the weighted sum of its experts' answers. Collective."""
        if self.groups is not None:
            check_wrapping(self.experts, self.groups.data)
        rows, plan = self.exchange.dispatch(tokens, routing)
        with collective(type(self).__name__, *self.exchange.comms):  # the other ranks go on to combine
            rows = self.experts(rows, plan.rows_per_expert)
        answers: Tensor = self.exchange.combine(rows, plan)
        return answers


class MoE(ExpertLayer):
    """x [..., hidden] -> (y [..., hidden], routing). Each token goes to the top_k experts that its gate chooses.

    hidden, ffn      width of the tokens, and inside an expert
    num_experts      E, of all ranks of the expert group
    top_k            K
    groups           who holds which experts: rank i of the expert group holds the i-th E / expert of them. None: this
                     rank alone holds all
    exchange         moves the tokens; None: `exchange_over(groups, num_experts)`
    capacity_factor  while training, an expert takes at most so many times its even share of this call's tokens; None:
                     nothing is dropped
    eval_capacity_factor  the same in evaluation. DeepSpeed-MoE's scripts have 1.0 for both
    activation       of the experts, see Experts
    key              seed and name of the layer: its first weights depend on these alone, not on the groups.
                     Layers with the same key start with the same weights: give (seed, layer)
    choices          of `route`, such as score="sigmoid" or normalize="selected"; noise is for training alone. Noise
                     and drop="random" are drawn anew in each forward pass, see below
    like             device, dtype

    `routing` has what the gate decided: add a little of routing.aux_loss and routing.z_loss to the loss of the model.
    The buffer `bias` [E] is added to the scores for the selection alone; see `balance`. It is float32 whatever the
    layer is cast to. Tokens in float64 go through gate and experts in float32.

    Where the gate is random, a forward pass in training takes one number from torch's generator of x's device, so that
    torch.manual_seed repeats it and activation checkpointing draws again what it drew. Layers and data ranks make
    different draws of the same number; tensor ranks have those of tensor rank 0. In evaluation drop="random" has the
    same draw in every pass.

    x must be the same on all tensor ranks. Collective, as the exchange is. Gradients are this rank's:
    `reduce_gradients` adds up those of the others. Raises ValueError for sizes that do not divide, for an exchange
    that has the experts in other places than the groups, and for a generator in choices. NaN or +inf in a gate's
    logits raise ValueError on all ranks of the exchange; on a GPU only where the exchange asks it, which LocalExchange
    and DirectExchange do not: `routing.check()` does.
    Source: Shazeer et al. 2017 (arXiv 1701.06538); DeepSpeed-MoE (arXiv 2201.05596), section 4.
    """

    bias: Tensor

    def __init__(
        self, hidden: int, ffn: int, num_experts: int, top_k: int = 1, *, groups: Groups | None = None,
        exchange: Exchange | None = None, capacity_factor: float | None = None,
        eval_capacity_factor: float | None = None, activation: Activation = "gelu", std: float = 0.02,
        key: tuple[object, ...] = (0,), choices: dict[str, Any] | None = None, **like: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        self.exchange = exchange_over(groups, num_experts) if exchange is None else exchange
        if not isinstance(self.exchange, Exchange):
            raise TypeError(f"MoE: exchange is a {type(self.exchange).__name__}, expected an Exchange")
        if self.exchange.num_experts != num_experts:
            raise ValueError(f"MoE: num_experts is {num_experts}, but the exchange has {self.exchange.num_experts}")
        if groups is None and self.exchange.num_local_experts != num_experts:
            raise ValueError("MoE: give the groups too: an exchange alone does not say which experts are here")
        self.num_experts, self.top_k, self.groups = num_experts, top_k, groups
        self.capacity_factor, self.eval_capacity_factor = capacity_factor, eval_capacity_factor
        self.choices = choices or {}
        if "generator" in self.choices:
            raise ValueError("MoE: choices has a generator, expected none: each forward pass draws from torch's")
        self._seed = number(*key, "draws", 0 if groups is None else groups.data.rank)
        here, part = held_experts(groups, self.exchange)
        self.gate = parameter(draw((num_experts, hidden), std, *key, "gate"), like | {"dtype": torch.float32})
        self.experts = Experts(
            hidden, ffn, here, activation=activation, part=part, num_experts=num_experts, std=std, key=key, **like
        )
        self.register_buffer("bias", torch.zeros(num_experts, dtype=torch.float32, device=like.get("device")))

    def forward(self, x: Tensor) -> tuple[Tensor, Routing]:
        """Collective over the exchange's ranks, and so is the backward pass."""
        tokens = x.reshape(-1, x.shape[-1])
        with torch.autocast(x.device.type, enabled=False):  # the gate decides in float32
            logits = F.linear(tokens.float(), self.gate.float())
        mixed = torch.is_autocast_enabled(x.device.type)
        dtype = torch.get_autocast_dtype(x.device.type) if mixed else x.dtype
        tokens = tokens.to(torch.float32 if dtype == torch.float64 else dtype)  # before anything travels
        routing = route(
            logits, self.top_k, bias=self.bias.float(), capacity=self._capacity(len(tokens)), **self._choices(x.device)
        )
        return self.answers(tokens, routing).to(dtype).reshape(x.shape), routing

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MoE:
        """The way of to(), half(), cuda() ...: the bias moves, but stays float32, which its small steps need."""
        before = self.bias
        super()._apply(fn, recurse)
        if self.bias.dtype != torch.float32:
            self.bias = before.to(self.bias.device, torch.float32)
        return self

    def _load_from_state_dict(self, *arguments: Any) -> None:
        super()._load_from_state_dict(*arguments)
        self.bias = self.bias.float()  # load_state_dict(assign=True) takes the dtype of the file

    def _capacity(self, num_tokens: int) -> int | None:
        factor = self.capacity_factor if self.training else self.eval_capacity_factor
        if factor is None:
            return None
        return expert_capacity(num_tokens, self.num_experts, self.top_k, factor=factor)

    def _choices(self, device: torch.device) -> dict[str, Any]:
        """Of `route`, for one forward pass. Collective over the tensor group where the gate is random."""
        choices = {name: value for name, value in self.choices.items() if self.training or name != "noise"}
        if self.exchange.tells_unusable:
            choices["unusable"] = "note"
        if choices.get("noise") is not None or choices.get("drop") == "random":
            choices["generator"] = Generator(self._seed, self._draw(device) if self.training else 0)
        return choices

    def _draw(self, device: torch.device) -> Tensor:
        """[1] int64 from torch's generator, on the device: no host waits for it. The same on all tensor ranks."""
        drawn = torch.randint(2**63 - 1, (1,), device=device)
        if self.groups is None or self.groups.tensor.size == 1:
            return drawn
        every: Tensor = self.groups.tensor.all_gather(drawn)
        return every[:1]


def held_experts(groups: Groups | None, exchange: Exchange) -> tuple[range, tuple[int, int]]:
    """The global ids of the experts here, and which slice of them. ValueError where the exchange has others here."""
    each = exchange.num_local_experts
    if groups is None:
        return range(each), (0, 1)
    topology, rank = groups.topology, groups.world.rank
    if each * topology.expert != exchange.num_experts:
        raise ValueError(
            f"MoE: the exchange has {each} of {exchange.num_experts} experts here, expected one of "
            f"expert={topology.expert} equal parts"
        )
    wanted = _held(topology, rank, "expert_lane" if exchange.on_lanes else "expert", each)
    if exchange.experts != wanted:
        raise ValueError(
            f"MoE: the exchange's ranks hold experts {exchange.experts}, expected {wanted} as the groups have them"
        )
    place = topology.coords(rank)
    first = place["expert"] * each
    return range(first, first + each), (place["expert_tensor"], topology.expert_tensor)
