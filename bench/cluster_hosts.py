"""The hosts of an emulated cluster: what they need, making them, finding them, removing them. See cluster.py.

A cluster leaves no file on the machine and changes none of its interfaces, routes and tables: it consists of processes,
which are found by their arguments. All of them live in one PID namespace. Its first process, the "head", also holds the
switches. When the head ends, for whatever reason, the kernel kills all the others, and the namespaces go with them.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

DATA, CONTROL = "eth0", "ctl0"
"""A host's interfaces. What the ranks send goes through the first, which is shaped; mpirun's own messages through the
second, so that neither disturbs the other and the counters of the first show the ranks' traffic alone."""
DATA_NET, CONTROL_NET = "10.77.0", "10.78.0"
HEAD, HEAD_NUMBER = "head", 254
MTU = 9000
SETTINGS, DELAY = "/dev/shm/settings", "/dev/shm/delay"
PACKAGES = dict.fromkeys(("ip", "tc"), "iproute2") | {
    **dict.fromkeys(("unshare", "nsenter", "setpriv"), "util-linux"),
    "mount": "mount",
}


class ClusterError(Exception):
    """What the user is told instead of a traceback."""


class Settings(NamedTuple):
    """What the user asked for."""

    name: str
    hosts: int
    rate: str  # as tc writes it, or none
    delay_us: float

    @property
    def bits_per_second(self) -> float | None:
        match = re.fullmatch(r"(.+)([kmg])bit", self.rate)
        return float(match[1]) * {"k": 1e3, "m": 1e6, "g": 1e9}[match[2]] if match else None


class Cluster(NamedTuple):
    settings: Settings
    delay_by: str  # netem, NFQUEUE, or nothing
    head: int  # process id
    hosts: dict[str, int]  # name -> process id of the process that keeps the host


# ---- what the machine must have ------------------------------------------------------------------------------------


def lacking(settings: Settings) -> list[str]:
    """What this machine lacks, each with what to do about it. All is tried in namespaces that vanish at once."""
    if os.geteuid():
        return ["root: only root may make network namespaces and interfaces (sudo)"]
    problems = [f"the program {tool}: apt install {PACKAGES[tool]}" for tool in PACKAGES if not shutil.which(tool)]
    if problems:
        return problems
    if not works("true", "--pid", "--uts", "--ipc", "--mount", "--mount-proc", "--fork"):
        command = "unshare --net --pid --uts --ipc --mount --mount-proc --fork true"
        return [f"namespaces: `{command}` must work; a container needs --privileged for it"]
    if not works("ip link add try0 type veth peer name try1"):
        problems.append("virtual Ethernet: modprobe veth, or a kernel with CONFIG_VETH")
    if not works("ip link add try0 type bridge"):
        problems.append("bridges: modprobe bridge, or a kernel with CONFIG_BRIDGE")
    if settings.rate != "none" and not works("tc qdisc add dev lo root tbf rate 1gbit burst 18000 limit 100000"):
        problems.append("the rate: modprobe sch_tbf, or a kernel with CONFIG_NET_SCH_TBF; or do without: --rate none")
    if settings.delay_us and not has_netem():
        problems += lacking_for_queue()
    return problems


def lacking_for_queue() -> list[str]:
    lacks = "the delay: there is no netem (modprobe sch_netem), and the stand-in for it needs"
    problems = []
    if not shutil.which("cc"):
        problems.append(f"{lacks} a C compiler: apt install gcc libc6-dev; or do without: --delay 0us")
    if not iptables():
        problems.append(f"{lacks} iptables: apt install iptables; or do without: --delay 0us")
    elif not works(queue_rule("lo")):
        problems.append(f"{lacks} a kernel with CONFIG_NETFILTER_XT_TARGET_NFQUEUE; or do without: --delay 0us")
    return problems


def works(command: str, *namespaces: str) -> bool:
    return subprocess.run(["unshare", "--net", *namespaces, *command.split()], capture_output=True).returncode == 0


def has_netem() -> bool:
    return works("tc qdisc add dev lo root netem delay 1us")


def iptables() -> str | None:
    """The legacy one if it is there: the other needs a kernel module more."""
    return shutil.which("iptables-legacy") or shutil.which("iptables")


def queue_rule(interface: str) -> str:
    return f"{iptables()} -A INPUT -i {interface} -j NFQUEUE --queue-num 0"


# ---- finding a cluster ---------------------------------------------------------------------------------------------


def find(name: str) -> Cluster:
    """ClusterError if it is not up, or damaged."""
    found = keepers(name)
    if HEAD not in found:
        raise ClusterError(f"cluster {name!r} is not up: `cluster.py up`")
    head = found.pop(HEAD)
    try:
        settings, delay_by = json.loads(private(head, SETTINGS).read_text())
    except FileNotFoundError:
        raise ClusterError(f"cluster {name!r} is just being set up") from None
    cluster = Cluster(
        Settings(*settings), delay_by, head, dict(sorted(found.items(), key=lambda item: int(item[0][1:])))
    )
    if len(found) != cluster.settings.hosts or (delay_by == "NFQUEUE" and not delay_daemons(head)):
        raise ClusterError(
            f"cluster {name!r} is damaged, some of its processes have ended: `cluster.py down`, then `up`"
        )
    return cluster


def keepers(name: str) -> dict[str, int]:
    """host or head -> id of the process that keeps it, in the numbering of the caller's /proc."""
    own = namespace("self", "uts")
    return {
        arguments[3]: pid
        for pid, arguments in processes()
        if len(arguments) > 3 and Path(arguments[1]).name == Path(__file__).name and arguments[2] == name
        if namespace(pid, "uts") not in ("", own)  # so it is no editor with that file
    }


def processes() -> Iterator[tuple[int, list[str]]]:
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError, UnicodeDecodeError):  # it has ended, or is none of ours
                yield int(folder.name), (folder / "cmdline").read_text().split("\0")


def delay_daemons(head: int) -> list[int]:
    pids = namespace(head, "pid")
    return [pid for pid, arguments in processes() if arguments[0] == DELAY and namespace(pid, "pid") == pids]


def namespace(pid: int | str, kind: str) -> str:
    try:
        return str(Path(f"/proc/{pid}/ns/{kind}").readlink())
    except OSError:
        return ""  # it has ended


def private(head: int, path: str) -> Path:
    """A file below the head's own /dev/shm: only the cluster sees it, and it goes with the cluster."""
    return Path(f"/proc/{head}/root{path}")


def num_running(cluster: Cluster) -> int:
    """How many processes `run` has in the cluster now: a run has a PID namespace of its own inside the head's."""
    networks = {namespace(pid, "net") for pid in (cluster.head, *cluster.hosts.values())}
    others = {"", namespace(cluster.head, "pid"), namespace("self", "pid")}
    return sum(namespace(pid, "net") in networks and namespace(pid, "pid") not in others for pid, _ in processes())


def wait_until(condition: Callable[[], bool], what: str, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise ClusterError(f"waited {seconds:g} s in vain until {what}")
        time.sleep(0.02)


# ---- making and removing -------------------------------------------------------------------------------------------


def make(settings: Settings) -> None:
    if keepers(settings.name):
        raise ClusterError(f"cluster {settings.name!r} is up already: `cluster.py down` first, or another --name")
    delay_by = "nothing" if not settings.delay_us else "netem" if has_netem() else "NFQUEUE"
    start = start_keeper(settings, HEAD, ["unshare", "--pid", "--fork", "--kill-child"])
    try:
        head = keepers(settings.name)[HEAD]
        names = [f"h{i}" for i in range(settings.hosts)]
        for name in names:
            start_keeper(settings, name, ["nsenter", f"--target={head}", "--pid", "unshare"])
        found = keepers(settings.name)
        hosts = [found[name] for name in names]
        connect(head, hosts)
        shape(head, hosts, settings, netem=delay_by == "netem")
        if delay_by == "NFQUEUE":
            start_delay(head, hosts, settings.delay_us)
        private(head, SETTINGS).write_text(json.dumps([settings, delay_by]))
        assert start.stdin
        start.stdin.write("keep\n")  # if this process is killed before, the head sees its stdin end, and ends as well
        start.stdin.close()
    except BaseException:
        remove(settings.name)
        raise


def remove(name: str) -> bool:
    """Whether there was something to remove. The hosts go with their head; they are killed here in case it is gone."""
    found = keepers(name)
    for pid in found.values():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    gone = f"the processes of cluster {name!r} have ended"
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in found.values()), gone)
    return bool(found)


def start_keeper(settings: Settings, host: str, starter: list[str]) -> subprocess.Popen[str]:
    unshare = ["--net", "--uts", "--ipc", "--mount", "--propagation=slave", "--mount-proc", "--"]
    keep = [sys.executable, str(Path(__file__).resolve()), settings.name, host, str(settings.hosts)]
    return start_and_wait([*starter, *unshare, *keep])


def start_and_wait(command: list[str], fds: Sequence[int] = ()) -> subprocess.Popen[str]:
    """Start what outlives this process, and return when it has said that it is ready."""
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # a Ctrl-C in this terminal is not for it
        pass_fds=fds,
    )
    assert process.stdout
    said = ""
    for line in process.stdout:
        if line == "ready\n":
            print(said, end="", file=sys.stderr)
            return process
        said += line
    raise ClusterError(f"{shlex.join(command)} has ended: {said or process.wait()}")


def keep(name: str, host: str, num_hosts: str) -> None:
    """Furnish the namespaces that this process was started in, and keep them as long as it lives."""
    socket.sethostname(host)
    table = f"127.0.0.1 localhost\n{CONTROL_NET}.{HEAD_NUMBER} {HEAD}\n"
    table += "".join(f"{DATA_NET}.{i + 1} h{i}\n" for i in range(int(num_hosts)))
    tool("mount -t tmpfs -o mode=1777 shm /dev/shm")
    own_hosts = Path("/dev/shm/hosts")
    own_hosts.write_text(table)
    tool(f"mount --bind {own_hosts} /etc/hosts")
    own_hosts.unlink()  # what is mounted stays
    tool("ip link set lo up")
    for key, value in {
        "ipv4/tcp_congestion_control": "cubic",  # the same on all machines
        "ipv4/tcp_slow_start_after_idle": "0",  # or a call would depend on the pause before it,
        "ipv4/tcp_no_metrics_save": "1",  # and a run on the one before it
        "core/somaxconn": "8192",  # all ranks may connect at the same time
        "ipv6/conf/default/disable_ipv6": "1",  # it talks unasked, and that would be counted
    }.items():
        with contextlib.suppress(OSError):  # a kernel without it
            Path("/proc/sys/net", key).write_text(value)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the head is handed all orphans: none becomes a zombie
    print("ready", flush=True)
    if host == HEAD and sys.stdin.readline() != "keep\n":
        return
    while True:
        signal.pause()


def connect(head: int, hosts: list[int]) -> None:
    """Two bridges in the head's network, and from each a pair of virtual interfaces to each host."""
    lines = [f"link add {bridge} mtu {MTU} type bridge" for bridge in (DATA, CONTROL)]
    for bridge in (DATA, CONTROL):
        for i, host in enumerate(hosts):
            lines.append(f"link add {bridge}-{i} mtu {MTU} type veth peer name {bridge} mtu {MTU} netns {host}")
            lines.append(f"link set {bridge}-{i} master {bridge} up")
        lines.append(f"link set {bridge} up")
    in_network(head, "ip -batch -", *lines, f"addr add {CONTROL_NET}.{HEAD_NUMBER}/24 dev {CONTROL}")
    for i, host in enumerate(hosts):
        for interface, net in ((DATA, DATA_NET), (CONTROL, CONTROL_NET)):
            in_network(host, "ip -batch -", f"addr add {net}.{i + 1}/24 dev {interface}", f"link set {interface} up")


def shape(head: int, hosts: list[int], settings: Settings, netem: bool) -> None:
    """The rate at both ends of each link, and so in both directions; netem's delay where packets leave a host."""
    delay = f"netem delay {settings.delay_us}us limit 1000000"
    rate = settings.bits_per_second
    # The bucket holds two packets, or what passes in the 100 us that a timer may be late. The queue never overflows.
    burst = max(2 * MTU, int((rate or 0) / 8 * 100e-6))
    tbf = f"tbf rate {settings.rate} burst {burst} limit {1 << 30}"
    if rate:
        in_network(head, "tc -batch -", *(f"qdisc add dev {DATA}-{i} root {tbf}" for i in range(len(hosts))))
    for host in hosts:
        if rate:
            in_network(host, "tc -batch -", f"qdisc add dev {DATA} root handle 1: {tbf}")
        if netem:
            in_network(host, "tc -batch -", f"qdisc add dev {DATA} {'parent 1:1' if rate else 'root'} {delay}")


def start_delay(head: int, hosts: list[int], delay_us: float) -> None:
    """Without netem: what arrives at a host is queued, and cluster_delay.c lets it go in time."""
    source = Path(__file__).with_name("cluster_delay.c")
    program = private(head, DELAY)
    tool(f"cc -O2 -o {program} {shlex.quote(str(source))}")
    for host in hosts:
        in_network(host, queue_rule(DATA))
    networks = [os.open(f"/proc/{host}/ns/net", os.O_RDONLY) for host in hosts]
    enter = ["nsenter", f"--target={head}", "--pid", "--mount", "--"]
    start_and_wait([*enter, DELAY, str(delay_us), *map(str, networks)], networks)
    for network in networks:
        os.close(network)


def in_network(pid: int, command: str, *lines: str) -> None:
    tool(f"nsenter --target={pid} --net -- {command}", "\n".join(lines))


def tool(command: str, stdin: str = "") -> None:
    done = subprocess.run(shlex.split(command), input=stdin, capture_output=True, text=True)
    if done.returncode:
        raise ClusterError(f"{command}: {(done.stderr or done.stdout).strip()} {stdin}")


if __name__ == "__main__":
    keep(*sys.argv[1:])
