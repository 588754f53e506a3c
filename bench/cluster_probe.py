"""What one TCP connection between two hosts of an emulated cluster really gets. See cluster.py, --measure."""

from __future__ import annotations

import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path

from cluster_hosts import DATA_NET, Cluster

PORT, ROUND_TRIPS, STREAM_SECONDS = 7777, 300, 1.0


def measure(cluster: Cluster) -> list[str]:
    """Lines for the user: the round trip and the throughput from the first host to the second."""
    me = [sys.executable, str(Path(__file__).resolve())]
    first, second = (["nsenter", f"--target={pid}", "--net", "--", *me] for pid in [*cluster.hosts.values()][:2])
    with subprocess.Popen(second, stdout=subprocess.PIPE, text=True) as answer:
        assert answer.stdout
        answer.stdout.readline()  # it listens
        ask = subprocess.run([*first, f"{DATA_NET}.2"], stdout=subprocess.PIPE, text=True, check=True)
        rate = answer.stdout.read()
    return [
        "  measured with one TCP connection from h0 to h1, with whatever else the machine is doing now:",
        f"  round trip of 16 bytes: {ask.stdout.strip()}; asked for {2 * cluster.settings.delay_us:g} us",
        f"  throughput: {rate.strip()}; asked for {cluster.settings.rate}",
    ]


def answer() -> None:
    """Send 16 bytes back as often as they come, then count what comes."""
    listener = socket.create_server(("", PORT))
    listener.settimeout(10)
    print("listening", flush=True)
    connection, _ = listener.accept()
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for _ in range(ROUND_TRIPS):
        connection.sendall(connection.recv(16, socket.MSG_WAITALL))
    num_bytes = len(connection.recv(1 << 20))
    start, first = time.perf_counter(), num_bytes
    while chunk := connection.recv(1 << 20):
        num_bytes += len(chunk)
    print(f"{(num_bytes - first) * 8 / (time.perf_counter() - start) / 1e6:.0f} Mbit/s")


def ask(address: str) -> None:
    connection = socket.create_connection((address, PORT), 10)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    times = []
    for _ in range(ROUND_TRIPS):
        start = time.perf_counter()
        connection.sendall(b"x" * 16)
        connection.recv(16, socket.MSG_WAITALL)
        times.append((time.perf_counter() - start) * 1e6)
    print(f"median {statistics.median(times):.0f} us, p95 {statistics.quantiles(times, n=20)[18]:.0f} us")
    end = time.perf_counter() + STREAM_SECONDS
    while time.perf_counter() < end:
        connection.sendall(bytes(1 << 16))
    connection.close()


if __name__ == "__main__":
    ask(sys.argv[1]) if sys.argv[1:] else answer()
