"""Hugging Face transformers: moecomm brings the tokens of its Mixture-of-Experts models to their experts.

    moecomm.integrations.transformers.register()
    config = DistributedConfig(fsdp_size=4, ep_size=4, ep_implementation="moecomm")
    model = AutoModelForCausalLM.from_pretrained(name, distributed_config=config)

transformers divides the experts among the ranks, loads, trains and saves them, and runs their layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias
from weakref import WeakKeyDictionary

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from moecomm.all_to_all import AllToAll, FlatAllToAll
from moecomm.arrays import Counts
from moecomm.comm import Comm
from moecomm.exchange import DirectExchange, Exchange, RoutedExchange, TensorParallelExchange
from moecomm.failures import collective
from moecomm.gating import Routing
from moecomm.nodes import Nodes
from moecomm.together import together
from moecomm.transports.torch import TorchComm

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

TESTED = ("5.23", "5.24")
"""The versions of transformers with which the tests pass."""
DIRECT_RANKS = (1, 2, 4, 8)
ExchangeOf: TypeAlias = Callable[[Tensor, int], "Exchange[Any]"]
"""(x [T, H], K) -> the exchange for such tokens."""
Exchanges: TypeAlias = "dict[tuple[Any, ...], Exchange[Any]]"
"""Those over a group of ranks that share experts, by what else they were made for."""


def register(
    name: str = "moecomm",
    *,
    all_to_all: Callable[[Comm], AllToAll] = FlatAllToAll,
    max_tokens: int | None = None,
    limit: float | None = None,
) -> None:
    """Make moecomm known to transformers, as the `ep_implementation` of that name.

    all_to_all  made over the ranks that tokens are sent to, such as HierarchicalAllToAll where they are several nodes
    max_tokens  the most tokens that a rank brings to a layer at once. Where it is given, 1, 2, 4 or 8 GPUs of a node
                that share the experts, each with a batch of its own, use `DirectExchange`; all others `RoutedExchange`
    limit       seconds that a rank waits for the others; None: as long as the process group does

    To be called on every rank, before the models are made; not collective. Another call concerns later models alone.
    Raises ImportError without transformers, or for a version that moecomm was not tested with.
    """
    try:
        import transformers
    except ImportError as error:
        raise ImportError(f"register: needs transformers ({error}): pip install 'moecomm[transformers]'") from error
    version = transformers.__version__
    if ".".join(version.split(".")[:2]) not in TESTED:
        raise ImportError(
            f"register: transformers is {version}, expected {' or '.join(TESTED)}, with which moecomm was tested: "
            "pip install 'moecomm[transformers]'"
        )
    # Of the version that was just found to be known.
    from transformers.distributed.expert_parallel import EPImplementationInterface

    EPImplementationInterface.register(name, ExpertParallel(all_to_all, max_tokens, limit))


class ExpertParallel:
    """What transformers calls when it divides a model, once for each module of experts.

    Modules with the same groups share an exchange: its groups and its memory are needed once, not for each layer.
    """

    def __init__(
        self,
        all_to_all: Callable[[Comm], AllToAll],
        max_tokens: int | None = None,
        limit: float | None = None,
    ) -> None:
        self.all_to_all = all_to_all
        self.max_tokens = max_tokens
        self.limit = limit
        # By the groups, not by their names, which torch uses again after destroy_process_group.
        self._exchanges: WeakKeyDictionary[dist.ProcessGroup, Exchanges] = WeakKeyDictionary()

    def __call__(self, experts: Any, ep_mesh: DeviceMesh, tp_mesh: DeviceMesh) -> DispatchedExperts:
        """transformers' EPImplementation for a module. Collective over ep_mesh.

        experts  already divided: num_experts of this rank, and forward for their local ids
        ep_mesh  the ranks that share the experts
        tp_mesh  those that hold the same batch as this rank

        Raises ValueError, on all ranks, if tp_mesh has ranks that are not in ep_mesh.
        """
        expert_group = ep_mesh.get_group()
        tensor_group = tp_mesh.get_group()
        comm = TorchComm(expert_group, limit=self.limit)
        tensor = TorchComm(tensor_group, limit=self.limit)
        num_local = int(experts.num_experts)
        exchanges = self._exchanges.setdefault(expert_group, {})

        same_batch = tuple(dist.get_process_group_ranks(tensor_group))
        routed = exchanges.get((same_batch, num_local))
        if routed is None:
            expert_ranks = dist.get_process_group_ranks(expert_group)
            together(comm, "moecomm", lambda: _check_ranks(same_batch, expert_ranks))
            routed = self._routed(comm, tensor, num_local)
            exchanges[same_batch, num_local] = routed

        # TensorParallelExchange needs RoutedExchange; DirectExchange has kernels for these numbers of ranks.
        is_direct = (
            self.max_tokens is not None
            and ep_mesh.device_type == "cuda"
            and tensor.size == 1
            and comm.size in DIRECT_RANKS
            and len(Nodes.discover(comm)) == 1
        )
        if not is_direct:
            return DispatchedExperts(experts, lambda x, top_k: routed)
        num_experts = num_local * comm.size
        return DispatchedExperts(experts, self._direct(comm, num_experts, exchanges))

    def _routed(self, comm: TorchComm, tensor: TorchComm, num_local: int) -> Exchange[Any]:
        """For ranks with a batch each, or with the same batch in a tensor group. Collective over comm."""
        if tensor.size == 1:
            return RoutedExchange(self.all_to_all(comm), num_local)
        lane = comm.split(tensor.rank)
        # transformers numbers the experts in the order of the expert group's ranks.
        expert_ranks = lane.all_gather(np.array([comm.rank])).tolist()
        experts = []
        for rank in expert_ranks:
            start = rank * num_local
            experts.append(range(start, start + num_local))
        inner = RoutedExchange(self.all_to_all(lane), experts)
        return TensorParallelExchange(inner, tensor)

    def _direct(self, comm: TorchComm, num_experts: int, exchanges: Exchanges) -> ExchangeOf:
        """DirectExchange of the width and K of the tokens that come. Collective where they are new, as dispatch is."""
        max_tokens = self.max_tokens
        assert max_tokens is not None
        options: dict[str, Any] = {} if self.limit is None else {"limit": self.limit}

        def exchange_of(x: Tensor, top_k: int) -> Exchange[Any]:
            shape = (x.shape[1], num_experts, top_k, x.dtype)
            if shape not in exchanges:
                exchanges[shape] = DirectExchange(comm, max_tokens, *shape, **options)
            return exchanges[shape]

        return exchange_of


def _check_ranks(same_batch: Sequence[int], expert_ranks: Sequence[int]) -> None:
    """Raise ValueError unless the ranks with the same batch are among those that share the experts."""
    if not set(same_batch) <= set(expert_ranks):
        raise ValueError(
            f"ranks {list(same_batch)} hold the same batch, expected them among the ranks {list(expert_ranks)}, which "
            "share the experts"
        )


class DispatchedExperts:
    """The tokens of all ranks to the experts of a module, and their answers back."""

    def __init__(self, experts: Any, exchange_of: ExchangeOf) -> None:
        # Taken now: transformers replaces the module's forward by a function that calls this object.
        self.experts_forward = experts.forward
        self.num_local_experts = int(experts.num_experts)
        self.exchange_of = exchange_of

    def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """[T, H] of this rank, global ids and weights [T, K] -> [T, H]. Collective, and so is the backward pass."""
        exchange = self.exchange_of(hidden_states, top_k_index.shape[1])
        routing = Routing(top_k_index, top_k_weights)
        rows, plan = exchange.dispatch(hidden_states, routing)
        # A rank that fails in its experts does not come to combine, where the other ranks wait.
        with collective("moecomm: the experts", *exchange.comms):
            answers = self._answers(rows, plan.rows_per_expert)
        y: Tensor = exchange.combine(answers, plan)
        return y

    def _answers(self, rows: Tensor, rows_per_expert: Counts | Tensor) -> Tensor:
        """rows [N, H], ordered by expert -> [N, H], of each its expert's answer."""
        if len(rows) == 0:
            # FSDP's backward pass has collectives, so the weights of a rank without rows must be part of the graph.
            no_row = rows.sum(0, keepdim=True)
            local_id = torch.zeros(1, 1, dtype=torch.int64, device=rows.device)
            weight = rows.new_ones(1, 1)
            return self.experts_forward(no_row, local_id, weight)[:0]

        local_id = local_ids(rows_per_expert, len(rows), rows.device)
        # The weights are applied in combine.
        if isinstance(rows_per_expert, np.ndarray):
            weight = rows.new_ones(len(rows), 1)
            return self.experts_forward(rows, local_id, weight)
        # Rows behind those of the last expert were not written, and neither will their gradients be.
        unused = local_id == self.num_local_experts
        weight = (~unused).to(rows.dtype)
        answers = self.experts_forward(rows.masked_fill(unused, 0), local_id, weight)
        return answers.masked_fill(unused, 0)


def local_ids(rows_per_expert: Counts | Tensor, num_rows: int, device: torch.device) -> Tensor:
    """[num_rows, 1] the local id of each row's expert; the number of local experts for rows behind the last one's.

    rows_per_expert  [local experts], on the host, or on the device, where nothing waits for it
    """
    counts = torch.as_tensor(rows_per_expert, device=device).long()
    num_unused = num_rows - counts.sum(0, keepdim=True)
    counts = torch.cat([counts, num_unused])
    ids = torch.arange(len(counts), device=device)
    # With the size of the result given nothing waits for the device.
    local_id = ids.repeat_interleave(counts, output_size=num_rows)
    return local_id[:, None]
