"""What belongs to a rank is never copied: a copied model shares its groups, and a model with groups is not pickled."""

from __future__ import annotations

import copy
import gc
import io
import pickle
from typing import Any

import numpy as np
import pytest
from conftest import gloo_run, mpi_run

from moecomm import (
    AutoAllToAll,
    Comm,
    FlatAllToAll,
    HierarchicalAllToAll,
    Nodes,
    SharedAllToAll,
    Topology,
    build_groups,
)
from moecomm._core import NodeRing, RingLayout, Transfer
from moecomm.exchange.direct import DirectExchange
from moecomm.transports import threads
from moecomm.transports.wrappers import Checked, Timed

REFUSED = "belongs to this rank of this job. Save a model with moecomm.nn.checkpoint.save or its state_dict"


def check_identity(thing: Any) -> None:
    assert copy.copy(thing) is thing
    assert copy.deepcopy({"inside": [thing]})["inside"][0] is thing
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        with pytest.raises(TypeError, match=f"cannot pickle {type(thing).__name__}: it {REFUSED}"):
            pickle.dumps([thing], protocol)


def check_identities(comm: Comm) -> None:
    nodes = Nodes.of_size(2, comm.size)
    groups = build_groups(comm, Topology(comm.size, expert=comm.size), nodes)
    x = np.full(comm.size, comm.rank)
    for wrapped in (comm, Checked(Timed(comm))):
        several = [make(wrapped, nodes) for make in (HierarchicalAllToAll, SharedAllToAll, AutoAllToAll)]
        for thing in (wrapped, FlatAllToAll(wrapped), *several):
            check_identity(thing)
        for a2a in several:
            copied = copy.deepcopy({"a2a": a2a, "route": a2a.route([1] * comm.size)})
            rows = copied["a2a"].send(x, copied["route"])
            assert rows.tolist() == list(range(comm.size))
            del copied
            gc.collect()
            assert a2a(x).tolist() == list(range(comm.size))
            a2a.free()
    for thing in (groups, groups.expert):
        check_identity(thing)
    groups.free()


def check_models(comm: Comm) -> None:
    """A copy of a model, and torch's moving average of it, answer through the groups of the first one."""
    torch = pytest.importorskip("torch")

    from moecomm.nn import MoE

    groups = build_groups(comm, Topology(comm.size, tensor=2, expert=comm.size), Nodes.of_size(2, comm.size))
    for tensor_groups in (groups, build_groups(Checked(comm), Topology(comm.size, expert=comm.size))):
        model = MoE(8, 16, comm.size, 2, groups=tensor_groups)
        x = torch.linspace(-1, 1, 5 * 8).reshape(5, 8)
        wanted = model(x)[0]
        averaged = torch.optim.swa_utils.AveragedModel(model)
        averaged.update_parameters(model)
        copied = copy.deepcopy(model)
        assert copied.groups is model.groups
        assert copied.gate is not model.gate
        with torch.no_grad():
            copied.gate.zero_()
        assert torch.equal(averaged(x)[0], wanted)
        copied(x)[0].sum().backward()
        del copied, averaged
        gc.collect()
        assert torch.equal(model(x)[0], wanted)
        with pytest.raises(TypeError, match=f"cannot pickle [A-Za-z]+: it {REFUSED}"):
            torch.save(model, io.BytesIO())
        weights = io.BytesIO()
        torch.save(model.state_dict(), weights)
        weights.seek(0)
        again = MoE(8, 16, comm.size, 2, groups=tensor_groups, key=("other",))
        again.load_state_dict(torch.load(weights))
        assert torch.equal(again(x)[0], wanted)
        tensor_groups.free()


CHECKS = pytest.mark.parametrize("check", [check_identities, check_models])


@CHECKS
def test_over_threads(check: Any) -> None:
    threads.run(4, check)


@CHECKS
@pytest.mark.slow
def test_over_gloo(check: Any) -> None:
    pytest.importorskip("torch")
    gloo_run(4, check)


@CHECKS
@pytest.mark.mpi(min_size=4)
def test_over_mpi(check: Any) -> None:
    mpi_run(4, check)


def test_what_holds_memory_of_the_system() -> None:
    layout = RingLayout(num_ranks=1, num_nodes=1, num_slots=4, num_leaders=1, window=64)
    check_identity(NodeRing(np.zeros(layout.num_bytes, np.uint8), layout, local_rank=0, node=0, spin_us=0))
    none = np.zeros(1, np.int64)
    side = none, none, np.zeros((0, 3), np.int64), 0
    check_identity(Transfer(*side, *side, 1, 64, 0))
    check_identity(object.__new__(DirectExchange))  # made without a GPU
