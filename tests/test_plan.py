"""python -m moecomm plan: what it prints and what it refuses. The model behind it is in test_cost.py."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from moecomm.cli import main
from moecomm.cost import GPU_NODES, predict, predict_lanes

Printed = pytest.CaptureFixture[str]

SMALL = "--ranks 16 --ranks-per-node 4 --experts 16 --tokens 32 --hidden 10"


def plan(options: str) -> int:
    return main(["plan", *shlex.split(options)])


def options_of(printed: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(printed)
    return found


@pytest.fixture
def links(tmp_path: Path) -> str:
    file = tmp_path / "links.json"
    file.write_text(GPU_NODES.to_json())
    return f"--links {file}"


def test_each_layout_and_all_to_all_has_a_line(capsys: Printed, links: str) -> None:
    assert plan(f"{SMALL} --tensor 1,4 {links}") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "16 ranks on 4 nodes of 4; 32 tokens on a rank, top-1 of 16"
    table = [line.split() for line in lines[4:9]]
    # 32 rows for 16 ranks, there and back; 2 for each rank of the lane, then 8 tokens for each tensor rank
    assert [row[:5] for row in table[:3]] == [
        ["expert=16", "flat", "6", "24", "0.0"],
        ["hierarchical", "6", "6", "0.0", "0.0"],
        ["shared", "0", "6", "0.0", "0.0"],
    ]
    assert [row[:5] for row in table[3:]] == [
        ["tensor=4,", "expert=16", "flat", "3", "6"],
        ["shared", "3", "6", "0.0", "0.0"],
    ]


def test_seconds_and_memory_are_those_of_the_model(capsys: Printed, links: str) -> None:
    plan(f"{SMALL} --tensor 1,4 --top-k 2 {links} --json")
    found = {(o["topology"].get("tensor", 1), o["all_to_all"]): o for o in options_of(capsys.readouterr().out)}
    row, tokens, top_k, p = 20, 32, 2, 16
    for name in ("flat", "hierarchical", "shared"):
        cost = predict(GPU_NODES, (p, 4), tokens * top_k * row / p)[name]
        assert found[1, name]["seconds"] == pytest.approx(2 * cost.seconds)
        assert found[1, name]["memory"] == pytest.approx(2 * tokens * top_k * row + cost.staging)
        assert found[1, name]["tokens_per_second"] == pytest.approx(p * tokens / (2 * cost.seconds))
    answers = tokens / 2 * row * 2  # of 32 tokens each lane has answers for 16, in float32
    way_there = predict_lanes(GPU_NODES, (p, 4), 4, tokens * top_k * row / p, 0)["flat"]
    way_back = predict_lanes(GPU_NODES, (p, 4), 4, tokens * top_k * row / p, answers)["flat"]
    lanes = found[4, "flat"]
    assert lanes["seconds"] == pytest.approx(way_there.seconds + way_back.seconds)
    assert lanes["memory"] == pytest.approx(2 * tokens * top_k / 4 * row + 4 * answers)
    assert lanes["tokens_per_second"] == pytest.approx(p / 4 * tokens / lanes["seconds"])


def test_a_layout_given_twice_is_printed_once(capsys: Printed) -> None:
    plan(f"{SMALL} --tensor 2,4,2 --json")
    twice = capsys.readouterr().out
    plan(f"{SMALL} --tensor 2,4 --json")
    assert twice == capsys.readouterr().out


def test_the_best_is_first_and_said(capsys: Printed, links: str) -> None:
    arguments = f"{SMALL} --tensor 1,2,4 {links}"
    plan(f"{arguments} --json")
    found = options_of(capsys.readouterr().out)
    speeds = [option["tokens_per_second"] for option in found]
    assert speeds == sorted(speeds, reverse=True)
    plan(arguments)
    printed = capsys.readouterr().out
    assert f"with the {found[0]['all_to_all']} all-to-all:" in printed
    assert printed.count("<-- best") == 1
    (best,) = [line for line in printed.splitlines() if "<-- best" in line]
    assert f"{speeds[0]:,.0f}" in best


def test_many_messages_call_for_two_hops_and_long_ones_for_one(capsys: Printed, tmp_path: Path) -> None:
    file = tmp_path / "links.json"
    for between, best in (
        (replace(GPU_NODES.between, message=1e-3), "hierarchical"),
        (replace(GPU_NODES.between, message=1e-9), "flat"),
    ):
        slow_copies = replace(GPU_NODES, between=between, copy_bandwidth=1e9, wake=1)
        file.write_text(slow_copies.to_json())
        plan(f"--ranks 64 --experts 64 --tokens 64 --links {file} --json")
        assert options_of(capsys.readouterr().out)[0]["all_to_all"] == best


def test_without_links_the_assumption_is_said_and_nothing_needs_host_memory(capsys: Printed) -> None:
    plan(SMALL)
    printed = capsys.readouterr().out
    assert "The machine is assumed, not measured" in printed
    assert "shared" not in printed


def test_experts_that_several_ranks_hold_are_near_or_spread(capsys: Printed) -> None:
    plan("--ranks 64 --experts 8 --json")
    found = [(o["topology"]["expert"], o["topology"]["inner"]) for o in options_of(capsys.readouterr().out)]
    assert found == [(8, "expert"), (8, "expert_data")]  # on one node, or one on each: two hops would be one


def test_ragged_nodes_and_experts_that_do_not_divide(capsys: Printed) -> None:
    assert plan("--ranks 36 --ranks-per-node 8 --experts 24") == 0
    printed = capsys.readouterr().out
    assert "36 ranks on 5 nodes of 8 and 4" in printed
    assert "expert=12" in printed


def test_a_layout_whose_lanes_do_not_reach_all_experts_is_left_out(capsys: Printed) -> None:
    plan("--ranks 6 --experts 3 --tensor 1,2 --json")
    kept = {(o["topology"].get("tensor", 1), o["topology"]["inner"]) for o in options_of(capsys.readouterr().out)}
    assert (2, "expert") not in kept
    assert (1, "expert") in kept


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ("--ranks 16", "the following arguments are required: --experts"),
        ("--ranks 16 --experts 0", "argument --experts: '0' is no whole number >= 1"),
        ("--ranks 16 --experts 4 --tensor 1,", "argument --tensor: '' is no whole number >= 1"),
        ("--ranks 16 --experts 4 --tensor 3", "Topology: tensor=3 does not divide 16"),
        ("--ranks 16 --experts 4 --links /no/such/file", "[Errno 2] No such file or directory: '/no/such/file'"),
        ("--ranks 65537 --experts 1", "argument --ranks: '65537' is too many, expected at most 65536"),
        ("--ranks 20000000 --experts 1", "argument --ranks: '20000000' is too many"),
        ("--ranks 8 --experts 4 --top-k 9", "argument --top-k: 9 is more than the 4 experts there are"),
    ],
)
def test_bad_values(capsys: Printed, options: str, error: str) -> None:
    with pytest.raises(SystemExit) as end:
        plan(options)
    assert end.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert f"python -m moecomm plan: error: {error}" in printed.err


def test_bad_links(capsys: Printed, tmp_path: Path) -> None:
    file = tmp_path / "links.json"
    file.write_text("{}")
    with pytest.raises(SystemExit):
        plan(f"{SMALL} --links {file}")
    assert "plan: error: Links.from_json: the text has []" in capsys.readouterr().err


def test_help_has_the_example(capsys: Printed) -> None:
    with pytest.raises(SystemExit) as end:
        plan("--help")
    assert end.value.code == 0
    assert "python -m moecomm plan --ranks 4096 --ranks-per-node 8 --tokens 4096" in capsys.readouterr().out
