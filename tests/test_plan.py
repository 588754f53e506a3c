"""python -m moecomm plan: what it prints and refuses, its choice against every legal layout. Model: test_cost.py."""

from __future__ import annotations

import itertools
import json
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moecomm import Nodes, Topology
from moecomm.cli import main
from moecomm.cli.tables import WIDTH, rounded, scaled
from moecomm.cost import (
    GPU_NODES,
    Machine,
    RankMemory,
    Sizes,
    Tokens,
    Workload,
    candidates,
    layers_memory,
    pareto_front,
    predict,
    predict_groups,
    predict_lanes,
    predict_relayed,
)

Printed = pytest.CaptureFixture[str]

SMALL = "--ranks 16 --ranks-per-node 4 --experts 16 --tokens 32 --hidden 10"


def plan(options: str) -> int:
    return main(["plan", *shlex.split(options)])


def layouts_of(printed: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(printed)
    return found


def printed_by(capsys: Printed, options: str) -> str:
    assert plan(options) == 0
    return capsys.readouterr().out


def layouts(capsys: Printed, options: str) -> list[dict[str, Any]]:
    return layouts_of(printed_by(capsys, f"{options} --json"))


def error_of(capsys: Printed, options: str) -> str:
    """The one line that is printed."""
    with pytest.raises(SystemExit) as end:
        plan(options)
    assert end.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1
    return printed.err


def in_short(layout: dict[str, Any]) -> tuple[Any, ...]:
    """Sizes, placement and algorithm of a layout with one kind of layers."""
    (layer,) = layout["layers"]
    sizes = layer["topology"]
    names = ("tensor", "expert", "expert_tensor")
    return (*(sizes.get(name, 1) for name in names), sizes["inner"], layer["all_to_all"])


@pytest.fixture
def links(tmp_path: Path) -> str:
    """Figures that are not GPU_NODES, so that SharedAllToAll is tried too."""
    file = tmp_path / "links.json"
    file.write_text(replace(GPU_NODES, wake=4e-6).to_json())
    return f"--links {file}"


# ---- the choice against all layouts ----------------------------------------------------------------------------------


def legal_topologies(p: int, num_experts: int, tensor: int) -> list[Topology]:
    """Whatever Topology takes, whose experts can be shared and whose tensor ranks reach all of them, by its lists."""
    legal = []
    for expert, expert_tensor, inner in itertools.product(
        range(1, num_experts + 1), range(1, p + 1), ("expert", "expert_data")
    ):
        try:
            topology = Topology(p, tensor=tensor, expert=expert, expert_tensor=expert_tensor, inner=inner)
        except ValueError:
            continue
        shard = {rank: i for group in topology.groups("expert", "expert_tensor") for i, rank in enumerate(group)}
        lane_of = {rank: lane for lane in topology.groups("expert_lane") for rank in lane}
        complete = all(
            len({shard[peer] for rank in group for peer in lane_of[rank]}) == expert * expert_tensor
            for group in topology.groups("tensor")
        )
        if num_experts % expert == 0 and complete:
            legal.append(topology)
    return legal


def seconds_by_hand(machine: Machine, work: Workload, num_experts: int, topology: Topology) -> dict[str, float]:
    """Algorithm -> seconds of a layer for the tokens of all ranks, from the docstrings and the rank lists alone."""
    L, K, T, h = topology.tensor, work.top_k, work.tokens, work.hidden  # noqa: N806
    lanes = topology.groups("expert_lane")
    size = len(lanes[0])
    lane_of = {rank: lane for lane in lanes for rank in lane}
    shard = {rank: i for group in topology.groups("expert", "expert_tensor") for i, rank in enumerate(group)}
    to_each = {}  # rows that a rank has for each rank of its lane: the lanes that reach a shard take turns
    for group in topology.groups("tensor"):
        reached = [shard[peer] for rank in group for peer in lane_of[rank]]
        to_each.update({rank: T * K / topology.expert / reached.count(shard[rank]) for rank in group})
    node_of = machine.nodes.node_of
    costs = predict_groups(machine.links, node_of, np.array(lanes), max(to_each.values()) * h * work.dtype_bytes)
    answers = min(max(to_each.values()) * size, T, 2 * T / L)
    answers *= h * (4 if K * topology.expert_tensor > 1 else work.dtype_bytes)
    gather = predict_groups(machine.links, node_of, np.array(topology.groups("tensor")), answers)["flat"].seconds
    rows = max(sum(to_each[peer] for peer in lane) for lane in lanes)
    rounds = {"training": 2, "inference": 1}[work.mode]
    numbers = work.matrices * h * work.ffn / topology.expert_tensor
    used = min(num_experts / topology.expert, rows)
    compute = max(2 * rows * numbers / machine.flops, used * numbers * work.dtype_bytes / machine.bandwidth)
    compute *= {"training": 3, "inference": 1}[work.mode]
    if L == 1 and K > 1:
        tokens = Tokens(T, h * work.dtype_bytes, K, num_experts)
        costs["relayed"] = predict_relayed(machine.links, node_of, np.array(lanes), tokens)
    # Two hops are what one hop is where a group has one node, or one rank on each.
    spread = {len(set(node_of[lane])) for lane in lanes}
    one_hop = spread == {1} or spread == {size}
    seconds = {}
    for name in ("flat", "hierarchical", "relayed"):
        if name not in costs or (one_hop and name != "flat"):
            continue
        exchange = rounds * (2 * costs[name].seconds + (gather if L > 1 else 0))
        seconds[name] = L * (exchange + compute - machine.overlap * min(exchange, compute))
    return seconds


CASES = [
    (Machine(Nodes.of_size(4, 16)), Workload((8,), 256, 1024, 2, 512), (1, 2, 4)),
    (Machine(Nodes.of_size(8, 32)), Workload((32,), 1024, 4096, 4, 64), (1, 2, 4, 8)),
    (Machine(Nodes.of_size(8, 32), overlap=0.7, flops=1e15), Workload((16,), 64, 256, 1, 4096), (1, 4)),
    (Machine(Nodes.of_size(5, 12)), Workload((24,), 512, 1024, 2, 100, matrices=3), (1, 2, 3)),
    (Machine(Nodes.of_size(8, 64)), Workload((64,), 2048, 8192, 8, 8, mode="inference"), (1, 2)),
    (Machine(Nodes.of_size(7, 60)), Workload((60,), 768, 3072, 2, 512), (1,)),
    (Machine(Nodes.of_size(1, 8)), Workload((8,), 4096, 64, 1, 4096), (1, 2)),
]


@pytest.mark.parametrize(("machine", "work", "tensor"), CASES)
def test_the_choice_is_the_least_of_all_legal_layouts(
    machine: Machine, work: Workload, tensor: tuple[int, ...]
) -> None:
    p, (num_experts,) = machine.nodes.world_size, work.experts
    every = {}
    for size in tensor:
        for topology in legal_topologies(p, num_experts, size):
            for name, seconds in seconds_by_hand(machine, work, num_experts, topology).items():
                every[topology, name] = seconds
    slices = range(1, p + 1)
    legal_slices = [size for size in slices if p % size == 0]
    found = candidates(machine, work, Sizes(tensor=tensor, expert_tensor=legal_slices))
    assert found[0].seconds == pytest.approx(min(every.values()))
    assert [c.sizes for c in found] == sorted(c.sizes for c in found)
    for candidate in found:
        (option,) = candidate.options.values()
        lanes = option.topology.groups("expert_lane")
        assert option.num_nodes == max(len(set(machine.nodes.node_of[lane])) for lane in lanes)
        assert candidate.seconds == pytest.approx(every[option.topology, option.all_to_all]), option
    tried = {option.topology for candidate in found for option in candidate.options.values()}
    # A spread group of one rank or of all ranks is the group of neighbours again.
    assert tried == {
        topology
        for topology, _ in every
        if topology.inner == "expert" or 1 < topology.expert < p // topology.expert_tensor
    }


def test_the_choice_within_a_limit_is_the_least_of_those_that_fit() -> None:
    machine, work, tensor = CASES[0]
    found = candidates(machine, work, Sizes(tensor=tensor))
    for limit in sorted(candidate.memory.total for candidate in found):
        fitting = [candidate for candidate in found if candidate.memory.total <= limit]
        assert fitting[0].seconds == min(candidate.seconds for candidate in fitting)
    front = pareto_front(found)
    for candidate in found:
        beaten = any(
            other.seconds <= candidate.seconds
            and other.memory.total <= candidate.memory.total
            and other.sizes != candidate.sizes
            for other in found
        )
        assert (candidate.sizes in [one.sizes for one in front]) == (not beaten)


def test_a_pyramid_has_the_best_of_all_combinations() -> None:
    """Also where memory is short: its layers have topologies of their own."""
    machine, work = Machine(Nodes.of_size(4, 16)), Workload((8, 8, 8, 16), 512, 2048, 2, 64)
    found = candidates(machine, work, Sizes(tensor=(1, 2)))
    every = []
    for tensor in (1, 2):
        by_layer = [
            [
                (topology, seconds)
                for topology in legal_topologies(16, experts, tensor)
                if topology.expert_tensor == 1
                for seconds in seconds_by_hand(machine, work, experts, topology).values()
            ]
            for experts in (8, 16)
        ]
        for (few, few_seconds), (many, many_seconds) in itertools.product(*by_layer):
            every.append((3 * few_seconds + many_seconds, layers_memory(work, {8: few, 16: many}).total))
    assert found[0].seconds == pytest.approx(min(every)[0])
    assert found[0].layers == {8: 3, 16: 1}
    for limit in sorted({memory for _, memory in every}):
        # Staging is on top of what layers_memory knows.
        fitting = [c.seconds for c in found if c.memory.total - c.memory.staging <= limit]
        assert min(fitting) == pytest.approx(min(seconds for seconds, memory in every if memory <= limit))


def test_the_issue_of_the_far_group_is_gone(capsys: Printed) -> None:
    """128 experts on 1,024 ranks: groups inside a node are many times as fast as one of 128 ranks."""
    found = layouts(capsys, "--ranks 1024 --experts 128 --top-k 2 --tensor 1,2,4,8")
    assert {in_short(layout)[1] for layout in found} == {1, 2, 4, 8, 16, 32, 64, 128}
    exchange = {}
    for layout in found:
        seconds = sum(layout["terms"][name] for name in ("inside", "between", "copy", "call", "sharing"))
        exchange.setdefault(in_short(layout)[:4], seconds)
    assert exchange[1, 8, 1, "expert"] < exchange[1, 128, 1, "expert"] / 10


# ---- messages --------------------------------------------------------------------------------------------------------


def messages_by_pairs(p: int, ranks_per_node: int, group_size: int) -> int:
    """The most messages that leave a node from one rank, dispatch and combine: every pair of ranks is looked at."""
    most = 0
    for rank in range(p):
        group = range(rank // group_size * group_size, (rank // group_size + 1) * group_size)
        most = max(most, sum(peer // ranks_per_node != rank // ranks_per_node for peer in group))
    return 2 * most


@pytest.mark.parametrize(
    ("p", "size", "expert", "messages"), [(48, 6, 16, 28), (60, 7, 15, None), (60, 7, 10, None), (60, 7, 12, None)]
)
def test_messages_are_those_of_the_worst_group(
    capsys: Printed, p: int, size: int, expert: int, messages: int | None
) -> None:
    wanted = messages_by_pairs(p, size, expert)
    assert messages in (None, wanted)
    arguments = f"--ranks {p} --ranks-per-node {size} --experts {expert} --top-k 2 --tokens 512 --hidden 768"
    found = [layout for layout in layouts(capsys, arguments) if in_short(layout) == (1, expert, 1, "expert", "flat")]
    assert found[0]["layers"][0]["messages"][1] == wanted
    printed = printed_by(capsys, arguments)
    assert re.search(rf"EP {expert}(, spread)?  +flat  +(\d+  +)?{wanted} ", printed)
    assert "in the group that send most" in " ".join(printed.split())


def test_plan_and_topology_count_alike(capsys: Printed) -> None:
    found = layouts(capsys, "--ranks 48 --ranks-per-node 6 --experts 16 --top-k 2 --tokens 512 --hidden 768")
    for layout in found:
        (layer,) = layout["layers"]
        sizes = layer["topology"]
        main(
            f"topology --ranks 48 --ranks-per-node 6 --expert {sizes.get('expert', 1)} --inner {sizes['inner']}".split()
        )
        printed = capsys.readouterr().out
        if layer["all_to_all"] == "relayed":
            continue  # no all-to-all that topology knows
        (line,) = [line for line in printed.splitlines() if line.startswith(f"{layer['all_to_all']} ")]
        assert [2 * int(word) for word in line.split()[1:3]] == layer["messages"]


# ---- what is printed -------------------------------------------------------------------------------------------------


def test_each_layout_and_all_to_all_has_a_line(capsys: Printed, links: str) -> None:
    printed = printed_by(capsys, f"{SMALL} --expert 16 --tensor 1,4 {links} --wide")
    lines = printed.splitlines()
    assert lines[0] == "16 ranks on 4 nodes of 4; 32 tokens on a rank, hidden 10, 16 experts, top-1;"
    assert lines[1] == "training"
    table = sorted(line[3:].split()[:8] for line in lines if " EP 16" in line[:9])
    # 4 nodes; 32 rows for 16 ranks, there and back; 2 for each rank of the lane, then 8 tokens for each tensor rank
    assert [row[:6] for row in table if row[2] != "TP"] == [
        ["EP", "16", "flat", "4", "6", "24"],
        ["EP", "16", "hierarchical", "4", "6", "6"],
        ["EP", "16", "shared", "4", "0", "6"],
    ]
    assert [row for row in table if row[2] == "TP"] == [
        ["EP", "16,", "TP", "4", "flat", "4", "3", "6"],
        ["EP", "16,", "TP", "4", "shared", "4", "3", "6"],
    ]


def test_seconds_and_memory_are_those_of_the_model(capsys: Printed, links: str) -> None:
    options = f"{SMALL} --expert 16 --tensor 1,4 --top-k 2 {links} --inference --flops 1e15 --bandwidth 1e15"
    machine = replace(GPU_NODES, wake=4e-6)
    found = {in_short(layout)[0:1] + in_short(layout)[4:]: layout for layout in layouts(capsys, options)}
    row, tokens, top_k, p = 20, 32, 2, 16
    for name in ("flat", "hierarchical", "shared"):
        cost = predict(machine, (p, 4), tokens * top_k * row / p)[name]
        layer, layout = found[1, name]["layers"][0], found[1, name]
        assert sum(layer["terms"][part] for part in cost.parts) == pytest.approx(2 * cost.seconds)
        assert layout["memory"]["staging"] == pytest.approx(cost.staging)
        assert layout["tokens_per_second"] == pytest.approx(p * tokens / layout["seconds"])
        weights = 2 * ((2 * 10 + 1) * 40 + 10) + 4 * 16 * 11  # an expert in bfloat16, the gate in float32
        assert layout["memory"]["weights"] == weights
        assert layout["memory"]["gradients"] == layout["memory"]["optimizer"] == 0
    answers = tokens / 2 * row * 2  # of 32 tokens each lane has answers for 16, in float32
    way_there = predict_lanes(machine, (p, 4), 4, tokens * top_k * row / p, 0)["flat"]
    way_back = predict_lanes(machine, (p, 4), 4, tokens * top_k * row / p, answers)["flat"]
    lanes = found[4, "flat"]
    exchange = way_there.seconds + way_back.seconds
    assert lanes["layers"][0]["seconds"] == pytest.approx(exchange + lanes["layers"][0]["terms"]["experts"])
    assert lanes["seconds"] == pytest.approx(4 * lanes["layers"][0]["seconds"])
    assert lanes["memory"]["staging"] == pytest.approx(4 * answers)


def test_a_backward_pass_doubles_the_exchange_and_computes_twice_as_much(capsys: Printed) -> None:
    (once, *_), (training, *_) = (layouts(capsys, f"{SMALL} --expert 4 {mode}") for mode in ("--inference", ""))
    for name, factor in {"inside": 2, "between": 2, "copy": 2, "call": 2, "experts": 3}.items():
        assert training["terms"][name] == pytest.approx(factor * once["terms"][name])
    assert training["layers"][0]["messages"] == once["layers"][0]["messages"]


def test_decoding_is_as_fast_as_weights_are_read(capsys: Printed) -> None:
    """8 tokens on a rank: 8 x 2 rows for the 4 experts of a rank, whose weights all come from memory."""
    options = "--ranks 16 --experts 64 --expert 16 --top-k 2 --tokens 8 --hidden 512 --inference --bandwidth 1T"
    best = layouts(capsys, options)[0]
    assert best["terms"]["experts"] == pytest.approx(4 * 2 * 512 * 2048 * 2 / 1e12)
    assert best["memory"]["optimizer"] == 0
    training = layouts(capsys, "--ranks 16 --experts 64 --expert 16 --top-k 2 --tokens 4096 --hidden 512 --flops 100T")
    assert training[0]["terms"]["experts"] == pytest.approx(3 * 2 * 8192 * 2 * 512 * 2048 / 100e12)


def test_overlap_hides_a_share_of_the_shorter(capsys: Printed) -> None:
    for layout in layouts(capsys, f"{SMALL} --overlap 0.5"):
        terms = layout["terms"]
        exchange = sum(terms[name] for name in ("inside", "between", "copy", "call", "sharing"))
        assert terms["hidden"] == pytest.approx(-min(exchange, terms["experts"]) / 2)
        assert layout["seconds"] == pytest.approx(sum(terms.values()))
    assert "50% of the shorter of exchange and experts is hidden" in " ".join(
        printed_by(capsys, f"{SMALL} --overlap 0.5").split()
    )
    assert "Exchange and experts do not overlap." in " ".join(printed_by(capsys, SMALL).split())


def test_hops_that_overlap(capsys: Printed) -> None:
    options = "--ranks 128 --experts 128 --expert 128 --top-k 8 --hidden 7168"
    whole, pieces = (layouts(capsys, f"{options} {chunks}") for chunks in ("", "--chunks 4"))
    of = [
        {in_short(layout)[4]: layout["seconds"] for layout in found if in_short(layout)[3] == "expert"}
        for found in (whole, pieces)
    ]
    assert of[0]["flat"] == of[1]["flat"]
    assert "send in 4 pieces, of which the hops of two overlap: a prediction" in " ".join(
        printed_by(capsys, f"{options} --chunks 4").split()
    )
    assert of[1]["hierarchical"] < of[0]["hierarchical"]


def test_many_choices_call_for_one_row_a_node(capsys: Printed) -> None:
    options = "--ranks 16 --experts 256 --expert 16 --top-k 8 --hidden 7168"
    found = layouts(capsys, options)
    assert in_short(found[0])[4] == "relayed"
    text = " ".join(printed_by(capsys, options).split())
    assert "with HierarchicalExchange: " in text
    assert "relayed: HierarchicalExchange, a row for each token and node" in text
    # one choice is one row, and tensor ranks have lanes
    for other in ("--ranks 16 --experts 256 --expert 16", f"{options} --tensor 2"):
        assert "relayed" not in {in_short(layout)[4] for layout in layouts(capsys, other)}


def test_a_layout_given_twice_is_printed_once(capsys: Printed) -> None:
    assert layouts(capsys, f"{SMALL} --tensor 2,4,2") == layouts(capsys, f"{SMALL} --tensor 2,4")


WIDE_CASES = [
    SMALL,
    "--ranks 65536 --experts 65536 --tensor 1,8",
    "--ranks 128 --experts 32x10,64x2 --tensor 1,2 --memory 141GiB",
    "--ranks 64 --experts 64 --expert-tensor 1,2,4 --tensor 4",
]


@pytest.mark.parametrize("options", WIDE_CASES)
def test_it_fits_the_terminal_and_says_what_is_best(capsys: Printed, options: str) -> None:
    found = layouts(capsys, options)
    printed = printed_by(capsys, options)
    assert max(map(len, printed.splitlines())) <= WIDTH
    assert printed.count("\n>  EP") == 1
    text = " ".join(printed.split())
    assert f": {rounded(found[0]['seconds'] * 1e3)} ms for " in text
    speeds = [layout["tokens_per_second"] for layout in found]
    assert speeds == sorted(speeds, reverse=True)
    wide = printed_by(capsys, f"{options} --wide")
    table = [line for line in wide.splitlines() if line[3:6] == "EP "]
    assert len(table) == len(found)
    assert [line[0] for line in table].count("*") == sum(layout["front"] for layout in found) - 1
    assert table[0][0] == ">" and found[0]["front"]


def test_the_reason_is_what_the_next_layout_spends_more_on(capsys: Printed) -> None:
    for options in (SMALL, f"{SMALL} --tensor 1,2,4 --top-k 2 --overlap 0.5", "--ranks 256 --experts 64 --tokens 16"):
        found = layouts(capsys, options)
        text = " ".join(printed_by(capsys, options).split())
        best = found[0]
        (second, *_) = [one for one in found if one["layers"][0]["topology"] != best["layers"][0]["topology"]]
        gains = {name: second["terms"][name] - best["terms"][name] for name in best["terms"]}
        longer = second["seconds"] / best["seconds"]
        much = f"{rounded(longer)} times as long" if longer >= 2 else f"{rounded(100 * (longer - 1))} % longer"
        assert f"takes {much}, as it spends {rounded(1e3 * max(gains.values()))} ms more on " in text
        assert longer >= 1 and max(gains.values()) > 0


def test_one_layout_alone_has_a_reason_too(capsys: Printed) -> None:
    text = " ".join(printed_by(capsys, "--ranks 8 --experts 8 --expert 8").split())
    assert re.search(r"with the flat all-to-all: [\d.]+ ms for 32,768 tokens, \d+% of them for experts\.", text)


def test_many_messages_call_for_two_hops_and_long_ones_for_one(capsys: Printed, tmp_path: Path) -> None:
    file = tmp_path / "links.json"
    for between, best in (
        (replace(GPU_NODES.between, message=1e-3), "hierarchical"),
        (replace(GPU_NODES.between, message=1e-9), "flat"),
    ):
        slow_copies = replace(GPU_NODES, between=between, copy_bandwidth=1e9, wake=1)
        file.write_text(slow_copies.to_json())
        found = layouts(capsys, f"--ranks 64 --experts 64 --expert 64 --tokens 64 --links {file}")
        assert in_short(found[0])[4] == best


def test_without_links_the_assumption_is_said_and_nothing_needs_host_memory(capsys: Printed) -> None:
    printed = printed_by(capsys, SMALL)
    assert "The machine is assumed, not measured" in printed
    assert "shared" not in printed


def test_experts_that_several_ranks_hold_are_near_or_spread(capsys: Printed) -> None:
    found = layouts(capsys, "--ranks 64 --experts 8 --expert 8")
    # on one node, or one on each: two hops would be one
    assert [in_short(layout)[3:] for layout in found] == [("expert", "flat"), ("expert_data", "flat")]


@pytest.mark.parametrize(
    ("options", "sizes"),
    [
        ("--ranks 36 --ranks-per-node 8 --experts 24", {1, 2, 3, 4, 6, 12}),
        ("--ranks 1024 --experts 100", {1, 2, 4}),
        ("--ranks 16 --experts 16 --expert 8,16", {8, 16}),
        ("--ranks 16 --experts 16 --expert-tensor 4 --tensor 4", {1, 2, 4}),
    ],
)
def test_every_size_that_divides_is_tried_and_said(capsys: Printed, options: str, sizes: set[int]) -> None:
    assert {in_short(layout)[1] for layout in layouts(capsys, options)} == sizes
    text = " ".join(printed_by(capsys, options).split())
    experts = re.search(r"--experts (\d+)", options)
    listed = ", ".join(map(str, sorted(sizes)))
    assert experts and f"Expert-parallel sizes: {listed} for {experts[1]} experts." in text
    assert ("No others are possible." in text) == ("--expert " not in options)


def test_a_layout_whose_lanes_do_not_reach_all_experts_is_left_out(capsys: Printed) -> None:
    kept = {in_short(layout)[:4] for layout in layouts(capsys, "--ranks 6 --experts 3 --tensor 1,2")}
    assert (2, 3, 1, "expert") not in kept
    assert (1, 3, 1, "expert") in kept


# ---- memory ----------------------------------------------------------------------------------------------------------


def test_a_limit_rules_layouts_out(capsys: Printed) -> None:
    options = "--ranks 64 --experts 64 --hidden 1024"
    found = layouts(capsys, options)
    middle = sorted(layout["memory"]["total"] for layout in found)[len(found) // 2]
    fitting = layouts(capsys, f"{options} --memory {middle / 2**20:.3f}MiB")
    assert 0 < len(fitting) < len(found)
    assert max(layout["memory"]["total"] for layout in fitting) <= middle * 1.001
    printed = printed_by(capsys, f"{options} --memory {middle / 2**20:.3f}MiB")
    assert f"{len(found) - len(fitting)} layouts of {len(found)} would need more than" in " ".join(printed.split())
    least = min(layout["memory"]["total"] for layout in found)
    error = error_of(capsys, f"{options} --memory 1MiB")
    assert f"--memory: no layout fits into 1.00 MiB; the least is {scaled(least, 'B', 1024)}, with Topology(64" in error


def test_memory_of_layers_counted_by_hand() -> None:
    work = Workload((8, 8, 16), 10, 40, 2, 100, optimizer_bytes=8, dense=1000)
    topologies = {8: Topology(16, tensor=2, expert=4), 16: Topology(16, tensor=2, expert=16)}
    experts = (2 + 2 + 1) * (10 * 40 + 40 + 40 * 10 + 10)
    gates = (8 + 8 + 16) * 10
    rows = 100 * 2 / 2
    assert layers_memory(work, topologies) == RankMemory(
        weights=2 * (experts + 500) + 4 * (gates + 32),
        gradients=2 * (experts + 500) + 4 * gates,
        optimizer=8 * (experts + 500 + gates),
        activations=3 * 2 * rows * (10 + 2 * 40 + 10),
    )
    assert layers_memory(replace(work, mode="inference"), topologies)[1:3] == (0, 0)
    assert layers_memory(replace(work, optimizer_bytes=0), topologies).optimizer == 0


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize(
    "sizes", [{"expert": 1}, {"expert": 4}, {"expert": 2, "tensor": 4, "expert_tensor": 2}], ids=str
)
def test_memory_is_that_of_memory_estimate(activation: Any, sizes: dict[str, int]) -> None:
    """Two models that differ in their experts alone differ by what layers_memory says, to the byte."""
    torch = pytest.importorskip("torch")
    from moecomm.nn import Config, memory_estimate

    topology = Topology(8, **sizes)
    both = []
    for experts in (4, 12):
        config = Config(2, 32, 4, (experts,), vocabulary=64, context=16, activation=activation)
        estimate = memory_estimate(config, topology, sequences=1, dtype=torch.bfloat16, states=6)
        work = Workload((experts,), 32, 128, 1, 16, matrices=3 if activation == "swiglu" else 2)
        both.append((estimate, layers_memory(work, {experts: topology})))
    (few, few_layers), (many, many_layers) = both
    assert many.weights - few.weights == many_layers.weights - few_layers.weights
    assert many.gradients - few.gradients == many_layers.gradients - few_layers.gradients


def test_a_model_by_name(capsys: Printed) -> None:
    torch = pytest.importorskip("torch")
    from moecomm.nn import CONFIGS, memory_estimate

    config = CONFIGS["350m-pr-moe-32-64"]
    found = layouts(capsys, "--ranks 16 --experts 350m-pr-moe-32-64 --expert 8,16 --tokens 1024")
    for layout in found:
        layers = {layer["experts"]: layer for layer in layout["layers"]}
        assert {count: layer["layers"] for count, layer in layers.items()} == {32: 10, 64: 2}
        topologies = {count: Topology(16, **_sizes(layer)) for count, layer in layers.items()}
        estimate = memory_estimate(
            config, [topologies[count] for count in config.experts], sequences=1, length=1024, dtype=torch.bfloat16
        )
        assert layout["memory"]["weights"] == estimate.weights
        assert layout["memory"]["optimizer"] == 6 * estimate.gradients
        assert layout["memory"]["activations"] == estimate.activations + estimate.buffers
    decoding = layouts(capsys, "--ranks 16 --experts small-top-2 --inference --tokens 8")
    assert decoding[0]["memory"]["optimizer"] == 0 < decoding[0]["memory"]["activations"]


def _sizes(layer: dict[str, Any]) -> dict[str, Any]:
    return {name: size for name, size in layer["topology"].items() if name != "world_size"}


def test_a_model_by_name_needs_torch() -> None:
    program = """if True:
        import sys
        sys.modules["torch"] = None
        from moecomm.cli import main
        main(["plan", "--ranks", "8", "--experts", "8"])
        main(["plan", "--ranks", "8", "--experts", "small"])
    """
    job = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert job.returncode == 2 and "Take Topology" in job.stdout
    assert job.stderr == ("python -m moecomm plan: error: --experts small: needs torch: pip install 'moecomm[torch]'\n")


# ---- the picture -----------------------------------------------------------------------------------------------------


def test_the_picture_has_a_dot_for_each_layout(capsys: Printed, tmp_path: Path) -> None:
    file = tmp_path / "plan.svg"
    options = "--ranks 64 --experts 64 --tensor 1,2 --hidden 1024"
    found = layouts(capsys, f"{options} --svg {file}")
    svg = file.read_text()
    assert svg.count(" GiB</title>") == len(found)
    assert svg.count('fill="#0072b2" stroke="#ffffff"') == sum(layout["front"] for layout in found) - 1
    assert svg.count('fill="#d55e00" stroke="#ffffff"') == 1
    limit = sorted(layout["memory"]["total"] for layout in found)[len(found) // 2] / 2**20
    fitting = layouts(capsys, f"{options} --memory {limit:.2f}MiB --svg {file}")
    svg = file.read_text()
    assert svg.count(" GiB</title>") == len(found)
    # the key and the layouts that need more
    assert svg.count('fill="#ffffff" stroke="#8c959f"') == len(found) - len(fitting) + 1


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ("--ranks 16", "the following arguments are required: --experts"),
        ("--ranks 16 --experts 0", "'0' is no whole number >= 1"),
        ("--ranks 16 --experts 64,", "'' is no whole number >= 1"),
        ("--ranks 16 --experts 64x", "'' is no whole number >= 1"),
        ("--ranks 16 --experts big-moe", "config is 'big-moe', expected one of 350m-moe-128"),
        ("--ranks 16 --experts small --hidden 8", "--hidden: small has its own; give numbers to --experts"),
        ("--ranks 16 --experts 4 --tensor 1,", "argument --tensor: '' is no whole number >= 1"),
        ("--ranks 16 --experts 4 --tensor 3", "Topology: tensor=3 does not divide 16"),
        ("--ranks 16 --experts 4 --expert-tensor 3", "Topology: expert_tensor=3 does not divide 16"),
        ("--ranks 1024 --experts 100 --expert 8", "expert=8 does not divide the 100 experts; valid: 1, 2, 4"),
        ("--ranks 16 --experts 24 --expert 3", "Topology: expert=3 does not divide 16"),
        ("--ranks 16 --experts 16 --expert-tensor 4", "in none of the layouts do tensor ranks together reach all"),
        ("--ranks 16 --experts 4 --links /no/such/file", "[Errno 2] No such file or directory: '/no/such/file'"),
        ("--ranks 16 --experts 4 --svg /no/such/file", "[Errno 2] No such file or directory: '/no/such/file'"),
        ("--ranks 65537 --experts 1", "argument --ranks: '65537' is too many, expected at most 65536"),
        ("--ranks 20000000 --experts 1", "argument --ranks: '20000000' is too many"),
        ("--ranks 8 --experts 4 --top-k 9", "--top-k: 9 is more than the 4 experts of a layer"),
        ("--ranks 8 --experts 8,4 --top-k 5", "--top-k: 5 is more than the 4 experts of a layer"),
        ("--ranks 8 --experts 4 --memory 0B", "--memory: no layout fits into 0 B; the least is "),
        ("--ranks 8 --experts 4 --memory 141", "argument --memory: '141' is no size, such as 141GiB or 80GB"),
        ("--ranks 8 --experts 4 --memory GiB", "argument --memory: 'Gi' is no number >= 0"),
        ("--ranks 8 --experts 4 --flops 0", "Machine: flops is 0.0, expected a number > 0"),
        ("--ranks 8 --experts 4 --flops 1.2.3", "argument --flops: '1.2.3' is no number >= 0"),
        ("--ranks 8 --experts 4 --flops 1e400", "argument --flops: '1e400' is no number >= 0"),
        ("--ranks 8 --experts 4 --overlap 1.5", "argument --overlap: '1.5' is no number in 0 .. 1"),
        ("--ranks 8 --experts 4 --overlap nan", "argument --overlap: 'nan' is no number in 0 .. 1"),
        ("--ranks 4096 --experts 256,512,1024,2048,4096", "combinations of layouts, expected at most 200,000"),
    ],
)
def test_bad_values(capsys: Printed, options: str, error: str) -> None:
    if "small" in options or "big" in options:
        pytest.importorskip("torch")
    line = error_of(capsys, options)
    assert line.startswith("python -m moecomm plan: error: ") and error in line


def test_bad_links(capsys: Printed, tmp_path: Path) -> None:
    file = tmp_path / "links.json"
    file.write_text("{}")
    assert "plan: error: Links.from_json: the text has []" in error_of(capsys, f"{SMALL} --links {file}")


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda: Machine(Nodes.of_size(1, 1), flops=0), "Machine: flops is 0, expected a number > 0"),
        (lambda: Machine(Nodes.of_size(1, 1), bandwidth=float("nan")), "Machine: bandwidth is nan"),
        (lambda: Machine(Nodes.of_size(1, 1), overlap=2), "Machine: overlap is 2, expected 0 .. 1"),
        (lambda: Workload((4,), 1, 1, 5, 1), r"Workload: top_k is 5, with layers of \[4\] experts"),
        (lambda: Workload((4,), 1, 1, 1, 1, mode="decode"), "Workload: mode is 'decode', expected one of training"),
        (lambda: Workload((4,), 1, 1, 1, 1, matrices=4), "Workload: matrices is 4, expected 2 or 3"),
    ],
)
def test_impossible_machines_and_workloads(change: Any, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        change()


@pytest.mark.parametrize(
    ("value", "words"),
    [(0, "0"), (1234567, "1,230,000"), (12.34, "12.3"), (0.0012345, "0.00123"), (999.9, "1,000"), (1, "1.00")],
)
def test_three_significant_digits(value: float, words: str) -> None:
    assert rounded(value) == words


@pytest.mark.parametrize(
    ("value", "base", "words"),
    [
        (0, 1024, "0 B"),
        (1536, 1024, "1.50 KiB"),
        (2**30, 1024, "1.00 GiB"),
        (999.9, 1000, "1.00 kB"),
        (12, 1000, "12.0 B"),
    ],
)
def test_prefixes(value: float, base: int, words: str) -> None:
    assert scaled(value, "B", base) == words


def test_help_has_the_example(capsys: Printed) -> None:
    with pytest.raises(SystemExit) as end:
        plan("--help")
    assert end.value.code == 0
    assert "python -m moecomm plan --ranks 1024 --experts 128 --top-k 2 --tensor 1,2,4,8" in capsys.readouterr().out
