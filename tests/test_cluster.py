"""The emulated cluster of bench/cluster.py. It needs root and Linux; where it cannot be made, the reason is shown."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "bench"))

import cluster_hosts

NAME = f"test-{os.getpid()}"
"""Another cluster than the user's, who may be measuring."""
SLOW = cluster_hosts.Settings(NAME, hosts=2, rate="200mbit", delay_us=1000)
FAST = cluster_hosts.Settings(NAME, hosts=2, rate="200mbit", delay_us=0)
LACKING = cluster_hosts.lacking(FAST) if sys.platform == "linux" else ["Linux"]
LACKING_DELAY = LACKING or cluster_hosts.lacking(SLOW)

pytestmark = pytest.mark.skipif(bool(LACKING), reason=f"no emulated cluster here, lacking {'; '.join(LACKING)}")

HELLO = """
import socket
import numpy as np
from mpi4py import MPI
from moecomm import HierarchicalAllToAll, Nodes
from moecomm.transports.mpi import MpiComm

comm = MpiComm(MPI.COMM_WORLD)
nodes = Nodes.discover(comm)
assert nodes.ranks == ((0, 1), (2, 3)), nodes.ranks
x = np.arange(comm.size) + 10 * comm.rank
assert (HierarchicalAllToAll(comm, nodes)(x) == 10 * np.arange(comm.size) + comm.rank).all()
names = MPI.COMM_WORLD.gather(socket.gethostname())
if comm.rank == 0:
    print("hosts:", *names)
"""

SEND = """
import sys
import numpy as np
from mpi4py import MPI

world, far = MPI.COMM_WORLD, int(sys.argv[1])
x = np.zeros(8 << 20, np.uint8)
world.Sendrecv(x, world.rank ^ far, recvbuf=np.empty_like(x), source=world.rank ^ far)
"""

STAY = """
import time
from mpi4py import MPI

MPI.COMM_WORLD.barrier()
print("started", flush=True)
time.sleep(1000)
"""


def cluster(*arguments: str, name: str = NAME) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*arguments, name=name), capture_output=True, text=True, timeout=60, env=environment())


def command(verb: str, *arguments: str, name: str = NAME) -> list[str]:
    return [sys.executable, str(ROOT / "bench" / "cluster.py"), verb, "--name", name, *arguments]


def environment() -> dict[str, str]:
    return {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


def program(folder: Path, text: str) -> list[str]:
    path = folder / "program.py"
    path.write_text(text)
    return [sys.executable, str(path)]


@pytest.fixture(scope="module", params=["rate", "rate and delay"])
def up(request: pytest.FixtureRequest) -> Iterator[str]:
    delay = ["--delay", "1ms"] if request.param == "rate and delay" else []
    if delay and LACKING_DELAY:
        pytest.skip(f"no delay here, lacking {'; '.join(LACKING_DELAY)}")
    made = cluster("up", "--hosts", "2", "--rate", "200mbit", *delay)
    assert made.returncode == 0, made.stderr
    yield request.param
    removed = cluster("down")
    assert removed.returncode == 0, removed.stderr
    assert leftovers() == []


def leftovers(name: str = NAME) -> list[str]:
    """Processes that were started for this cluster."""
    return [" ".join(arguments) for _, arguments in cluster_hosts.processes() if name in arguments]


# ---- running -------------------------------------------------------------------------------------------------------


def test_ranks_find_their_hosts(up: str, tmp_path: Path) -> None:
    job = cluster("run", "-n", "4", *program(tmp_path, HELLO))
    assert job.returncode == 0, job.stderr
    assert job.stdout == "hosts: h0 h0 h1 h1\n"


def test_only_what_goes_between_hosts_crosses_the_nics(up: str, tmp_path: Path) -> None:
    sent = {}
    for distance in (1, 2):
        out = tmp_path / "nic.json"
        options = ["-n", "4", "--counters", "--counters-out", str(out)]
        job = cluster("run", *options, *program(tmp_path, SEND), str(distance))
        assert job.returncode == 0, job.stderr
        record = json.loads(out.read_text())
        sent[distance] = record["nic_bytes"]
        assert f"NICs: {record['nic_bytes']} bytes in {record['nic_packets']} packets" in job.stderr
        assert record["nic_packets"] == sum(host["nic_packets"] for host in record["by_host"].values())
    data = 4 * (8 << 20)
    assert sent[1] < 0.05 * data
    assert data < sent[2] < 1.1 * data


def test_rate_and_delay_are_as_asked(up: str) -> None:
    status = cluster("status", "--measure")
    assert status.returncode == 0, status.stderr
    round_trip = float(re.findall(r"round trip of 16 bytes: median (\d+) us", status.stdout)[0])
    rate = float(re.findall(r"throughput: (\d+) Mbit/s", status.stdout)[0])
    assert (round_trip > 2000) == (up == "rate and delay")
    assert 100 < rate < 210


def test_exit_status_is_passed_on(up: str, tmp_path: Path) -> None:
    job = cluster("run", "-n", "2", *program(tmp_path, "import mpi4py.MPI, sys; sys.exit(7)"))
    assert job.returncode == 7, job.stderr


# ---- ending --------------------------------------------------------------------------------------------------------


def test_timeout_kills_all_ranks(up: str, tmp_path: Path) -> None:
    job = cluster("run", "-n", "4", "--timeout", "2.5", *program(tmp_path, STAY))
    assert job.returncode == 124, job.stderr
    assert job.stdout.count("started") == 4
    assert "not finished after 2.5 s: killed" in job.stderr
    assert cluster_hosts.num_running(cluster_hosts.find(NAME)) == 0


def test_a_killed_runner_leaves_nothing_running(up: str, tmp_path: Path) -> None:
    start = command("run", "-n", "4", *program(tmp_path, STAY))
    with subprocess.Popen(start, stdout=subprocess.PIPE, text=True, env=environment()) as runner:
        assert runner.stdout
        assert "started" in runner.stdout.readline()
        second = cluster("run", "-n", "2", "hostname")
        assert second.returncode == 1
        assert "busy: another run has" in second.stderr
        runner.send_signal(signal.SIGKILL)
    found = cluster_hosts.find(NAME)
    cluster_hosts.wait_until(lambda: cluster_hosts.num_running(found) == 0, "the ranks have ended", seconds=5)
    assert cluster("run", "-n", "4", *program(tmp_path, HELLO)).stdout == "hosts: h0 h0 h1 h1\n"


def test_down_under_a_killed_runner(tmp_path: Path) -> None:
    interfaces = sorted(Path("/sys/class/net").iterdir())
    name = f"{NAME}-killed"
    delay = [] if LACKING_DELAY else ["--delay", "100us"]
    assert cluster("up", "--hosts", "2", *delay, name=name).returncode == 0
    networks = {cluster_hosts.namespace(pid, "net") for pid in cluster_hosts.keepers(name).values()}
    start = command("run", "-n", "4", *program(tmp_path, STAY), name=name)
    with subprocess.Popen(start, stdout=subprocess.PIPE, text=True, env=environment()) as runner:
        assert runner.stdout
        runner.stdout.readline()
        runner.send_signal(signal.SIGKILL)
    assert "removed" in cluster("down", name=name).stdout
    assert leftovers(name) == []
    assert networks.isdisjoint(cluster_hosts.namespace(pid, "net") for pid, _ in cluster_hosts.processes())
    assert sorted(Path("/sys/class/net").iterdir()) == interfaces
    assert "nothing to remove" in cluster("down", name=name).stdout


def test_a_killed_up_leaves_nothing() -> None:
    name = f"{NAME}-half"
    with subprocess.Popen(command("up", "--hosts", "16", name=name)) as maker:
        cluster_hosts.wait_until(lambda: len(cluster_hosts.keepers(name)) > 2, "some hosts are there")
        maker.send_signal(signal.SIGKILL)
    cluster_hosts.wait_until(lambda: not leftovers(name), "the hosts have ended", seconds=5)


def test_a_dead_host_is_noticed() -> None:
    name = f"{NAME}-dead"
    assert cluster("up", "--hosts", "2", name=name).returncode == 0
    os.kill(cluster_hosts.keepers(name)["h1"], signal.SIGKILL)
    time.sleep(0.1)
    assert "is damaged" in cluster("status", name=name).stderr
    assert cluster("down", name=name).returncode == 0


# ---- what is refused -----------------------------------------------------------------------------------------------


def test_up_twice(up: str) -> None:
    again = cluster("up")
    assert again.returncode == 1
    assert again.stderr == f"cluster: cluster '{NAME}' is up already: `cluster.py down` first, or another --name\n"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["run", "-n", "2", "hostname"], "is not up: `cluster.py up`"),
        (["status"], "is not up: `cluster.py up`"),
        (["up", "--delay", "fast"], "'fast' is no time such as 100us or 1ms"),
        (["up", "--rate", "1GB"], "'1GB' is no rate such as 500mbit or 10gbit, nor none"),
        (["up", "--hosts", "65"], "--hosts: at most 64"),
        (["run"], "what is to be run?"),
    ],
)
def test_mistakes(arguments: list[str], says: str) -> None:
    job = cluster(*arguments, name=f"{NAME}-none")
    assert job.returncode in (1, 2)
    assert says in job.stderr


def test_what_is_lacking_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    problems = cluster_hosts.lacking(SLOW)
    assert "the program ip: apt install iproute2" in problems
    assert "the program unshare: apt install util-linux" in problems
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert cluster_hosts.lacking(SLOW)[0].startswith("root: ")
