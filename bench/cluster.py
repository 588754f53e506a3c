"""Rehearse a cluster on one Linux machine: hosts with a network between them, for programs that mpirun starts.

    python bench/cluster.py up --hosts 4 --rate 1gbit --delay 100us
    python bench/cluster.py run -n 64 --counters python bench/alltoall.py
    python bench/cluster.py status --measure
    python bench/cluster.py down

A host is a set of Linux namespaces: it has a network, a host name, shared memory and an /etc/hosts of its own, and
shares the machine's cores, memory and files. Needs root. docs/cluster.md says what is emulated, and what is not.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import cluster_hosts
import cluster_probe
from cluster_hosts import CONTROL, DATA, DATA_NET, Cluster, ClusterError, Settings

MAX_HOSTS = 64
EXIT_LACKING, EXIT_TIMEOUT = 3, 124

LAUNCHER = "/dev/shm/launcher"  # as mpirun sees it; what it takes for ssh

MPI_ENVIRONMENT = {
    # UCX and libfabric would take all hosts for one machine, which they are, and choose the interface themselves.
    "mpich": {
        "UCX_TLS": "tcp,self",
        "UCX_NET_DEVICES": DATA,
        "UCX_WARN_UNUSED_ENV_VARS": "n",
        "FI_PROVIDER": "tcp",
        "FI_TCP_IFACE": DATA,
    },
    "openmpi": {
        "OMPI_MCA_pml": "ob1",
        "OMPI_MCA_btl": "^ofi,uct,openib",  # leaves tcp and shared memory, whose name depends on the version
        "OMPI_MCA_osc": "^ucx",
        "OMPI_MCA_btl_tcp_if_include": DATA,
        "OMPI_MCA_oob_tcp_if_include": CONTROL,
        "PRTE_MCA_prte_if_include": CONTROL,
        "PRTE_MCA_prte_tmpdir_base": "/dev/shm",  # process ids repeat from run to run, and name the files there
        "OMPI_MCA_orte_tmpdir_base": "/dev/shm",
        "PRTE_MCA_plm_ssh_agent": LAUNCHER,
        "OMPI_MCA_plm_rsh_agent": LAUNCHER,
        "PRTE_MCA_plm_ssh_no_tree_spawn": "1",  # only the head has the launcher
        "OMPI_MCA_plm_rsh_no_tree_spawn": "1",
        # A host does not know that the others use its cores: a rank that waits would keep them from working.
        "OMPI_MCA_mpi_yield_when_idle": "1",
    },
}
"""Where the caller has set one of these, that counts."""


EMPTY_SHM = "mount -t tmpfs -o mode=1777 shm /dev/shm"  # or a run would find what a killed one has left
START = f"""{EMPTY_SHM} && printf %s "$1" > {LAUNCHER} && chmod +x {LAUNCHER} && cd "$2" || exit
shift 2; "$@"; exit $?"""
"""How mpirun is started, by sh: with the text of the launcher, the working directory, mpirun's arguments."""


# ---- run -----------------------------------------------------------------------------------------------------------


def run(options: argparse.Namespace) -> int:
    cluster = cluster_hosts.find(options.name)
    family, arguments = mpirun(cluster, options)
    if count := cluster_hosts.num_running(cluster):
        raise ClusterError(f"cluster {options.name!r} is busy: another run has {count} processes in it")
    if options.counters_out:
        Path(options.counters_out).touch()  # rather now than after an hour
    environment = MPI_ENVIRONMENT[family] | os.environ
    before, start = nic_counters(cluster), time.monotonic()
    exit_status = run_inside(cluster, [*arguments, *options.command], environment, options.timeout)
    seconds, after = time.monotonic() - start, nic_counters(cluster)
    if options.counters or options.counters_out:
        sent = {host: {key: after[host][key] - before[host][key] for key in after[host]} for host in after}
        about = {"command": options.command, "mpi": family, "ranks": options.n, **cluster.settings._asdict()}
        report(about | {"seconds": round(seconds, 3), "exit_status": exit_status}, sent, options)
    return exit_status


def mpirun(cluster: Cluster, options: argparse.Namespace) -> tuple[str, list[str]]:
    """The MPI family, and mpirun's command line up to the program."""
    program, hosts, n = shutil.which("mpirun"), list(cluster.hosts), options.n
    if not program:
        raise ClusterError('no mpirun on PATH: activate its environment, or under sudo: sudo env PATH="$PATH" ...')
    if n % len(hosts):
        raise ClusterError(f"-n {n} does not go evenly on {len(hosts)} hosts")
    per_host = n // len(hosts)
    family = options.mpi or mpi_family(program)
    if family == "mpich":
        launch = ["-launcher", "ssh", "-launcher-exec", LAUNCHER]
        return family, [program, *launch, "-hosts", ",".join(hosts), "-ppn", str(per_host), "-n", str(n)]
    slots = ",".join(f"{host}:{per_host}" for host in hosts)
    return family, [program, "--allow-run-as-root", "--bind-to", "none", "-H", slots, "-n", str(n)]


def mpi_family(program: str) -> str:
    version = subprocess.run([program, "--version"], capture_output=True, text=True)
    says = version.stdout + version.stderr
    for family, word in {"openmpi": r"Open MPI|OpenRTE|PRRTE", "mpich": "HYDRA|Intel"}.items():
        if re.search(word, says):
            return family
    raise ClusterError(f"{program} is neither MPICH's nor Open MPI's; if it works like one of them: --mpi")


def run_inside(cluster: Cluster, command: list[str], environment: dict[str, str], timeout: float | None) -> int:
    """Run it on the head. All that it starts, on any host, is in one PID namespace, and ends with its first process.

    That is a shell, which ends with the command; or with this process, however that ends: each process from here to
    there is killed when its parent ends.
    """
    me = shlex.join([sys.executable, str(Path(__file__).resolve()), "_launch", cluster.settings.name])
    die = ["setpriv", "--pdeathsig", "KILL"]
    enter = ["nsenter", f"--target={cluster.head}", "--pid", "--net", "--uts", "--ipc", "--mount", "--"]
    new = ["unshare", "--pid", "--fork", "--kill-child", "--mount", "--"]
    shell = ["sh", "-c", START, "sh", f'#!/bin/sh\nexec {me} "$@"\n', str(Path.cwd())]
    process = subprocess.Popen(
        [*die, *enter, *die, *new, *shell, *command],
        env=environment,
        start_new_session=True,  # Ctrl-C is for this process alone
    )
    try:
        exit_status = process.wait(timeout)
        return exit_status if exit_status >= 0 else 128 - exit_status
    except subprocess.TimeoutExpired:
        print(f"cluster: not finished after {timeout:g} s: killed", file=sys.stderr)
        return EXIT_TIMEOUT
    finally:
        process.kill()
        process.wait()
        cluster_hosts.wait_until(lambda: not cluster_hosts.num_running(cluster), "the run's processes have ended")


def launch(name: str, arguments: list[str]) -> NoReturn:
    """Be what mpirun takes for ssh: [-options] HOST COMMAND..., where HOST has a new /proc and an empty /dev/shm."""
    while arguments[0].startswith("-"):
        arguments = arguments[1:]
    host, *command = arguments
    pid = cluster_hosts.keepers(name)[host]
    kinds = {"net": "net", "uts": "uts", "ipc": "ipc", "mount": "mnt"}
    spaces = [f"--{kind}=/proc/{pid}/ns/{file}" for kind, file in kinds.items()]
    enter = ["nsenter", *spaces, "--", "unshare", "--mount-proc", "--"]
    script = f'{EMPTY_SHM} && cd "$1" && exec sh -c "$2"'
    os.execvp("nsenter", [*enter, "sh", "-c", script, "sh", str(Path.cwd()), " ".join(command)])


# ---- counters ------------------------------------------------------------------------------------------------------


def nic_counters(cluster: Cluster) -> dict[str, dict[str, int]]:
    """host -> what its interface has sent so far"""
    counters = {}
    for host, pid in cluster.hosts.items():
        try:
            text = Path(f"/proc/{pid}/net/dev").read_text()
        except OSError:
            raise ClusterError(f"cluster {cluster.settings.name!r} was removed") from None
        fields = text.partition(f"{DATA}:")[2].split()
        counters[host] = {"nic_bytes": int(fields[8]), "nic_packets": int(fields[9])}
    return counters


def report(record: dict[str, Any], sent: dict[str, dict[str, int]], options: argparse.Namespace) -> None:
    total = {key: sum(counters[key] for counters in sent.values()) for key in ("nic_bytes", "nic_packets")}
    if options.counters:
        print(
            f"cluster: {record['ranks']} ranks on {len(sent)} hosts, {record['mpi']}, {record['seconds']:.1f} s, exit "
            f"status {record['exit_status']}; sent through the hosts' NICs: {total['nic_bytes']} bytes in "
            f"{total['nic_packets']} packets",
            file=sys.stderr,
        )
    if options.counters_out:
        Path(options.counters_out).write_text(json.dumps(record | total | {"by_host": sent}) + "\n")


# ---- up, down, status ----------------------------------------------------------------------------------------------


def up(options: argparse.Namespace) -> int:
    settings = Settings(options.name, options.hosts, options.rate, options.delay)
    if problems := cluster_hosts.lacking(settings):
        print("cluster: nothing was changed; this machine lacks", *problems, sep="\n  ", file=sys.stderr)
        return EXIT_LACKING
    cluster_hosts.make(settings)
    return status(options)


def down(options: argparse.Namespace) -> int:
    removed = cluster_hosts.remove(options.name)
    print(f"cluster {options.name!r} " + ("removed" if removed else "is not up: nothing to remove"))
    return 0


def status(options: argparse.Namespace) -> int:
    cluster = cluster_hosts.find(options.name)
    name, num_hosts, rate, delay_us = cluster.settings
    running = cluster_hosts.num_running(cluster)
    print(
        f"cluster {name!r} is up: {num_hosts} hosts, rate {rate}, one-way delay {delay_us:g} us by {cluster.delay_by}"
    )
    for i, (host, pid) in enumerate(cluster.hosts.items()):
        print(f"  {host}  {DATA_NET}.{i + 1}  a shell there: nsenter --target={pid} --net --uts --ipc --mount")
    print(f"  {running} processes of a run" if running else "  nothing runs on it")
    if options.measure and num_hosts > 1:
        print(*cluster_probe.measure(cluster), sep="\n  ")
    return 0


# ---- starting ------------------------------------------------------------------------------------------------------

EXAMPLES = {
    "up": """examples:
  cluster.py up --hosts 4 --rate 1gbit --delay 100us     4 hosts on Gigabit Ethernet
  cluster.py up --hosts 8 --rate 10gbit --measure        8 hosts, no added delay; say what is reached
  cluster.py up --name other --hosts 2 --rate none       a second cluster, its network as fast as it can""",
    "run": """examples:
  cluster.py run -n 64 python bench/alltoall.py --out cluster.jsonl
  cluster.py run -n 4 --counters --timeout 60 python program.py
  cluster.py run -n 8 --counters-out nic.json python program.py""",
    "status": """examples:
  cluster.py status
  cluster.py status --measure      round trip and throughput between two hosts, as they are""",
    "down": """examples:
  cluster.py down
  cluster.py down --name other""",
}


def parse_options() -> argparse.Namespace:
    description, _, rest = (__doc__ or "").partition("\n\n")
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, epilog=rest, formatter_class=raw)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="up | run | status | down")
    about = {"up": "make the hosts", "run": "run mpirun over the hosts", "status": "show them", "down": "remove them"}
    subparsers = {
        verb: verbs.add_parser(verb, help=text, description=text, epilog=EXAMPLES[verb], formatter_class=raw)
        for verb, text in about.items()
    }
    for subparser in subparsers.values():
        subparser.add_argument("--name", type=word, default="moecomm", help="which cluster, where there are several")
    for verb in ("up", "status"):
        text = "measure the round trip and the throughput from one host to another"
        subparsers[verb].add_argument("--measure", action="store_true", help=text)
    add_up_options(subparsers["up"].add_argument)
    add_run_options(subparsers["run"].add_argument)
    options = parser.parse_args()
    if options.verb == "up" and options.hosts > MAX_HOSTS:
        subparsers["up"].error(f"argument --hosts: at most {MAX_HOSTS}")
    if options.verb == "run" and not options.command:
        subparsers["run"].error("what is to be run? cluster.py run -n 64 python program.py")
    return options


def add_up_options(add: Callable[..., Any]) -> None:
    add("--hosts", type=whole_number, default=4, help=f"1 to {MAX_HOSTS} (default: %(default)s)")
    add(
        "--rate", type=rate, default="1gbit", help="of each host's NIC, each way: 1gbit, 500mbit, none (default: 1gbit)"
    )
    add("--delay", type=microseconds, default="0us", help="one way, host to host: 100us, 1ms (default: none)")


def add_run_options(add: Callable[..., Any]) -> None:
    add(
        "-n",
        type=whole_number,
        default=64,
        metavar="RANKS",
        help="ranks in all, in equal blocks on the hosts (default: 64)",
    )
    add("--mpi", choices=tuple(MPI_ENVIRONMENT), help="whose mpirun is on PATH (default: ask it)")
    add("--timeout", type=float, metavar="SECONDS", help=f"then kill everything; exit status {EXIT_TIMEOUT}")
    add("--counters", action="store_true", help="say how many bytes and packets the hosts' NICs have sent")
    add("--counters-out", metavar="FILE", help="write these, and those of each host, as JSON")
    add("command", nargs=argparse.REMAINDER, metavar="COMMAND...", help="the program, and its arguments")


def word(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no name of letters, digits, dots and dashes")
    return text


def whole_number(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number >= 1")
    return int(text)


def rate(text: str) -> str:
    if not re.fullmatch(r"none|([0-9]*[.])?[0-9]+[kmg]bit", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no rate such as 500mbit or 10gbit, nor none")
    return text


def microseconds(text: str) -> float:
    match = re.fullmatch(r"(([0-9]*[.])?[0-9]+)(us|ms|s)", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is no time such as 100us or 1ms")
    return float(match[1]) * {"us": 1, "ms": 1e3, "s": 1e6}[match[3]]


def main() -> int:
    if sys.argv[1:2] == ["_launch"]:  # mpirun speaking
        launch(sys.argv[2], sys.argv[3:])
    options = parse_options()
    if os.geteuid():
        print("cluster: only root can do this (sudo)", file=sys.stderr)
        return EXIT_LACKING
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # and clean up on the way
    try:
        return VERBS[options.verb](options)
    except (ClusterError, OSError, subprocess.SubprocessError) as error:
        print(f"cluster: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


VERBS: dict[str, Callable[[argparse.Namespace], int]] = {"up": up, "run": run, "status": status, "down": down}

if __name__ == "__main__":
    sys.exit(main())
