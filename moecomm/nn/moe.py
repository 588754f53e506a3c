"""MoE: a gate, an exchange and a bank of experts in the place of a feed-forward layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from inspect import Parameter, signature
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.func import functional_call

from moecomm.all_to_all import AllToAll, FlatAllToAll
from moecomm.comm import Comm
from moecomm.exchange import BalancedExchange, Exchange, RoutedExchange, TensorParallelExchange
from moecomm.failures import collective
from moecomm.gating import Generator, Routing, expert_capacity, route
from moecomm.groups import Groups
from moecomm.nn.ddp import check_wrapping
from moecomm.nn.experts import ExpertBank, Experts, ModuleBank
from moecomm.nn.linear import Activation
from moecomm.nn.local import LocalExchange
from moecomm.nn.seeds import Key, Portion, check_keywords, draw, number, parameter


def exchange_over(
    groups: Groups | None,
    num_experts: int,
    all_to_all: Callable[[Comm], AllToAll] = FlatAllToAll,
    slots: int = 0,
    **options: Any,
) -> Exchange:
    """The exchange that fits the groups of a layer. Collective over the tensor group.

    groups      None, or groups without expert and tensor parallelism: LocalExchange. With tensor parallelism:
                TensorParallelExchange. Otherwise RoutedExchange
    all_to_all  made over the ranks that the exchange sends to
    slots       0, or room on each rank for so many copies of hot experts: BalancedExchange. Not with tensor parallelism
    options     of RoutedExchange

    Raises ValueError if the experts cannot be divided evenly, or expert slices not be held by a tensor group.
    """
    if groups is None:
        return LocalExchange(num_experts)
    topology = groups.topology
    if num_experts % topology.expert:
        raise ValueError(f"MoE: num_experts is {num_experts}, which expert={topology.expert} ranks cannot share")
    sliced = topology.tensor > 1 or topology.expert_tensor > 1
    if topology.expert == 1 and not sliced:
        return LocalExchange(num_experts)
    # Tensor ranks have the same tokens, so each sends over its own lane what its lane's experts need.
    axis = "expert_lane" if sliced else "expert"
    experts = _experts_along(groups, axis, num_experts // topology.expert)
    if slots and sliced:
        raise ValueError(f"MoE: slots is {slots}, expected 0: slices of experts cannot be copied")
    if slots:
        return BalancedExchange(all_to_all(groups.expert), experts, slots, **options)
    routed = RoutedExchange(all_to_all(getattr(groups, axis)), experts, **options)
    if not sliced:
        return routed
    return TensorParallelExchange(routed, groups.tensor, part=_slice_of_experts(groups))


def _experts_along(groups: Groups, axis: str, count: int) -> list[list[int]]:
    """The global ids of the `count` experts of each rank in this rank's group along an axis."""
    topology = groups.topology
    experts = []
    for rank in topology.group_of(groups.world.rank, axis):
        start = topology.coords(rank)["expert"] * count
        experts.append(list(range(start, start + count)))
    return experts


def _slice_of_experts(groups: Groups) -> Portion:
    topology = groups.topology
    return topology.coords(groups.world.rank)["expert_tensor"], topology.expert_tensor


SELECTING = ("num_groups", "top_groups", "best_in_group", "noise")
"""The choices of `route` that say which experts a token gets."""


CHOICES = {name for name, option in signature(route).parameters.items() if option.kind is Parameter.KEYWORD_ONLY}
CHOICES -= {"expert", "bias", "capacity", "generator", "unusable"}
"""The options of `route` that a layer does not set by itself."""


class MoE(nn.Module):
    """x [..., hidden] -> (y [..., hidden], routing). Each token goes to the top_k experts that its gate chooses.

    hidden, ffn      width of the tokens, and inside an expert; ffn is None where experts is a module
    num_experts      E, of all ranks of the expert group
    top_k            K
    groups           who holds which experts: rank i of the expert group holds the i-th E / expert of them. None: this
                     rank alone holds all
    exchange         moves the tokens; None: `exchange_over(groups, num_experts, slots=slots)`
    slots            room on each rank for copies of hot experts, which are placed anew for each batch
    capacity_factor  while training, an expert takes at most so many times its even share of this call's tokens; None:
                     nothing is dropped
    eval_capacity_factor  the same in evaluation. DeepSpeed-MoE's scripts have 1.0 for both
    experts          a module in the place of `Experts`: (rows [N, hidden], rows_per_expert [E']) -> [N, hidden], with
                     the weights of this rank's E' experts, exchange.local_experts, one entry for each along the first
                     dimension of each weight. `moe.experts.module` is the module; see ModuleBank
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
    `reduce_gradients` adds up those of the others. Raises ValueError for sizes that do not divide, for top_k >
    num_experts, for an exchange that has the experts in other places than the groups, and for a module of experts that
    has not E' of each weight or is to be sliced; TypeError for a keyword or a choice that does not exist. NaN or +inf
    in a gate's logits raise ValueError on all ranks of the exchange; on a GPU only where the exchange asks it, which
    LocalExchange and DirectExchange do not: `routing.check()` does.
    Source: Shazeer et al. 2017 (arXiv 1701.06538); DeepSpeed-MoE (arXiv 2201.05596), section 4.
    """

    bias: Tensor

    def __init__(
        self,
        hidden: int,
        ffn: int | None,
        num_experts: int,
        top_k: int = 1,
        *,
        groups: Groups | None = None,
        exchange: Exchange | None = None,
        slots: int = 0,
        capacity_factor: float | None = None,
        eval_capacity_factor: float | None = None,
        experts: nn.Module | None = None,
        activation: Activation = "gelu",
        std: float = 0.02,
        key: Key = (0,),
        choices: dict[str, Any] | None = None,
        **like: Any,
    ) -> None:
        super().__init__()
        _check_options(num_experts, top_k, choices or {}, like)
        self.exchange = exchange_over(groups, num_experts, slots=slots) if exchange is None else exchange
        local, portion = _check_exchange(self.exchange, num_experts, groups)
        self.groups = groups
        self.num_experts = num_experts
        self.top_k = top_k
        self.capacity_factor = capacity_factor
        self.eval_capacity_factor = eval_capacity_factor
        self.choices = choices or {}
        # Data ranks have other tokens and draw other numbers. Tensor ranks have the same tokens and draw the same.
        self._seed = number(*key, "draws", 0 if groups is None else groups.data.rank)
        # The gate chooses by small differences between scores, which 16 bits would make ties.
        gate = draw((num_experts, hidden), std, *key, "gate")
        self.gate = parameter(gate, like | {"dtype": torch.float32})
        self.experts: ExpertBank
        if experts is None:
            if ffn is None:
                raise ValueError("MoE: ffn is None, expected the width of the experts, or a module of experts")
            weights = {"activation": activation, "std": std, "key": key, **like}
            self.experts = Experts(hidden, ffn, local, part=portion, num_experts=num_experts, **weights)
        else:
            self.experts = _bank_of(experts, ffn, local, portion, num_experts)
        bias = torch.zeros(num_experts, dtype=torch.float32, device=like.get("device"))
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor, expert: Tensor | None = None) -> tuple[Tensor, Routing]:
        """Collective over the exchange's ranks, and so is the backward pass.

        expert  [T, K] for the T tokens of x, what they are sent to in place of the gate's choices: routing.expert of an
                earlier pass. Weights and losses are the gate's of now
        """
        hidden = self.gate.shape[1]
        if x.dim() == 0 or x.shape[-1] != hidden:
            where = "" if self.groups is None else self.groups.world.where()
            raise ValueError(f"MoE: x has shape {tuple(x.shape)}, expected (..., hidden={hidden}){where}")
        tokens = x.reshape(-1, hidden)
        device = x.device.type
        # The gate decides in float32 under autocast too.
        with torch.autocast(device, enabled=False):
            logits = F.linear(tokens.float(), self.gate.float())
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        # Cast here and not by the experts, so that rows travel in the narrow dtype.
        tokens = tokens.to(torch.float32 if dtype == torch.float64 else dtype)
        factor = self.capacity_factor if self.training else self.eval_capacity_factor
        capacity = None
        if factor is not None:
            capacity = expert_capacity(len(tokens), self.num_experts, self.top_k, factor=factor)
        choices = self._choices(x.device)
        if expert is None:
            choices["bias"] = self.bias.float()
        else:
            # Route refuses them: nothing is selected.
            choices = {name: choice for name, choice in choices.items() if name not in SELECTING}
        routing = route(logits, self.top_k, expert=expert, capacity=capacity, **choices)
        answers = self._exchange(tokens, routing)
        return answers.to(dtype).reshape(x.shape), routing

    def _answers(self, rows: Tensor, plan: Any) -> Tensor:
        """Of this rank's experts, and of the copies of others that a BalancedExchange has here. Then collective."""
        if not isinstance(self.exchange, BalancedExchange):
            answers: Tensor = self.experts(rows, plan.rows_per_expert)
            return answers
        count = self.exchange.num_local_experts
        num_rows = int(plan.rows_per_expert[:count].sum())
        copies = {}
        for name, weight in self.experts.named_parameters():
            copies[name] = self.exchange.copied(weight, plan)
        own = self.experts(rows[:num_rows], plan.rows_per_expert[:count])
        of_copies = functional_call(self.experts, copies, (rows[num_rows:], plan.rows_per_expert[count:]))
        return torch.cat([own, of_copies])

    # Not traced by torch.compile: sizes depend on the counts that the ranks tell each other.
    @torch.compiler.disable
    def _exchange(self, tokens: Tensor, routing: Routing) -> Tensor:
        """tokens [T, hidden] -> [T, hidden], what their experts answer. Collective, and so is the backward pass."""
        if self.groups is not None:
            check_wrapping(self.experts, self.groups.data)
        rows, plan = self.exchange.dispatch(tokens, routing)
        # Experts that fail on this rank must not leave the other ranks waiting in combine.
        with collective("MoE", *self.exchange.comms):
            rows = self._answers(rows, plan)
        answers: Tensor = self.exchange.combine(rows, plan)
        return answers

    def extra_repr(self) -> str:
        """Sizes, the experts of this rank and the exchange, for `repr`."""
        exchange = type(self.exchange).__name__
        hidden = self.gate.shape[1]
        return f"hidden={hidden}, num_experts={self.num_experts}, top_k={self.top_k}, exchange={exchange}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MoE:
        """What to(), half(), cuda() and the like call: the bias moves, but stays float32, which its steps need."""
        bias = self.bias
        super()._apply(fn, recurse)
        if self.bias.dtype != torch.float32:
            # From the buffer before the cast: its bits beyond those of the other dtype are not lost.
            self.bias = bias.to(self.bias.device, torch.float32)
        return self

    def _load_from_state_dict(self, *arguments: Any) -> None:
        super()._load_from_state_dict(*arguments)
        # load_state_dict(assign=True) takes the dtype of the file.
        self.bias = self.bias.float()

    def _choices(self, device: torch.device) -> dict[str, Any]:
        """Of `route`, for one forward pass. Collective over the tensor group where the gate is random."""
        choices = dict(self.choices)
        if not self.training:
            choices.pop("noise", None)
        # An exchange that tells all ranks raises on all of them; a gate that raises alone leaves the others waiting.
        if self.exchange.tells_unusable:
            choices["unusable"] = "note"
        if choices.get("noise") is not None or choices.get("drop") == "random":
            choices["generator"] = Generator(self._seed, self._draw(device) if self.training else 0)
        return choices

    @torch.compiler.disable
    def _draw(self, device: torch.device) -> Tensor:
        """[1] int64 from torch's generator, on the device: no host waits for it. The same on all tensor ranks."""
        drawn = torch.randint(2**63 - 1, (1,), device=device)
        if self.groups is not None and self.groups.tensor.size > 1:
            drawn = self.groups.tensor.all_gather(drawn)[:1]
        return drawn


def _check_options(
    num_experts: int,
    top_k: int,
    choices: dict[str, Any],
    like: dict[str, Any],
) -> None:
    """Raises TypeError for a keyword or a choice that does not exist, ValueError for one that does not fit."""
    check_keywords("MoE", like)
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"MoE: top_k is {top_k}, expected 1 .. num_experts={num_experts}")
    if "generator" in choices:
        raise ValueError("MoE: choices has a generator, expected none: each forward pass draws from torch's")
    unknown = [name for name in choices if name not in CHOICES]
    if unknown:
        raise TypeError(f"MoE: unknown choice {', '.join(unknown)}, expected some of {', '.join(sorted(CHOICES))}")


def _bank_of(
    experts: nn.Module,
    ffn: int | None,
    local: Sequence[int],
    portion: Portion,
    num_experts: int,
) -> ModuleBank:
    """A module as the experts of a layer. Raises ValueError where it cannot be."""
    if ffn is not None:
        raise ValueError(f"MoE: ffn is {ffn}, expected None beside a module of experts, which has its own width")
    if portion != (0, 1):
        raise ValueError(f"MoE: experts is a module, which {portion[1]} tensor ranks cannot slice")
    return ModuleBank(experts, local, split=len(local) != num_experts)


def _check_exchange(exchange: Exchange, num_experts: int, groups: Groups | None) -> tuple[Sequence[int], Portion]:
    """The global ids of this rank's experts, and which slice of them.

    Raises ValueError where the exchange has other experts on this rank than the groups, or TypeError if it is none.
    """
    if not isinstance(exchange, Exchange):
        raise TypeError(f"MoE: exchange is a {type(exchange).__name__}, expected an Exchange")
    if exchange.fp8 is not None:
        raise ValueError(f"MoE: the exchange's rows are {exchange.fp8}, expected those of the tokens: fp8=None")
    if exchange.num_experts != num_experts:
        raise ValueError(f"MoE: num_experts is {num_experts}, but the exchange has {exchange.num_experts}")
    count = exchange.num_local_experts
    if groups is None:
        if count != num_experts:
            raise ValueError("MoE: give the groups too: an exchange alone does not say which experts are here")
        return exchange.local_experts, (0, 1)
    ranks = groups.topology.expert
    if count * ranks != num_experts:
        raise ValueError(
            f"MoE: the exchange has {count} of {num_experts} experts here, expected one of expert={ranks} equal parts"
        )
    axis = "expert_lane" if exchange.on_lanes else "expert"
    expected = _experts_along(groups, axis, count)
    # In other places the weights would be those of other experts, and differ from one split to another.
    if exchange.experts != expected:
        raise ValueError(
            f"MoE: the exchange's ranks hold experts {exchange.experts}, expected {expected} as the groups have them"
        )
    return exchange.local_experts, _slice_of_experts(groups)
