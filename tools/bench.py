"""Measure the service beside the description's own version (Flask) and waitress with no backend, in turn.

A well-known load generator, wrk, asks each for a few seconds, in three rounds; the figures are medians.
"""

import os
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from tools.servers import HERE, Postgres, Redis, free_port

WAITRESS = """
import logging, os, waitress
logging.getLogger("waitress.queue").disabled = True
if hasattr(os, "sched_setaffinity"):  # on one core its threads are several times faster
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
def app(environ, start_response):
    start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", "32")])
    return [b"Contador: 1\\nPostgres: conectado\\n"]
waitress.serve(app, host="127.0.0.1", port=int(os.environ["PORT"]))
"""
COMMANDS: dict[str, list[str | Path]] = {
    "server.py": [HERE / "server.py"],
    "flask_counter.py": [HERE / "tools/flask_counter.py"],
    "waitress puro": ["-c", WAITRESS],
}
CONNECTIONS, ROUNDS, SECONDS = (1, 8, 64), 3, 2
UNITS = {"us": 1e-3, "ms": 1.0, "s": 1e3}
MAXRSS_UNIT = 1 if sys.platform == "darwin" else 1024  # in bytes


class Figures(NamedTuple):
    """What one measurement gives: per second, milliseconds, seconds of CPU in all, bytes, and the number of answers."""

    rate: float
    p99: float
    cpu: float
    memory: float
    answers: int


def ask(port: int, connections: int) -> tuple[float, float, int]:
    """Return the requests per second, the 99th percentile of the answers' time in milliseconds, and their number."""
    wrk = [
        "wrk",
        "-t1",
        f"-c{connections}",
        f"-d{SECONDS}s",
        "--latency",
        f"http://127.0.0.1:{port}/",
    ]
    printed = subprocess.run(wrk, capture_output=True, text=True, check=True).stdout
    rate = re.search(r"Requests/sec:\s+([\d.]+)", printed)
    p99 = re.search(r"99%\s+([\d.]+)(us|ms|s)", printed)
    count = re.search(r"(\d+) requests in", printed)
    if not (rate and p99 and count) or "Non-2xx" in printed:
        raise RuntimeError(printed)
    return float(rate[1]), float(p99[1]) * UNITS[p99[2]], int(count[1])


def measure(command: list[str | Path], environment: dict[str, str], connections: int) -> Figures:
    """Start a server, ask it unless ``connections`` is 0, and end it."""
    port = free_port()
    server = subprocess.Popen(
        [sys.executable, *map(str, command)],
        env=environment | {"PORT": str(port)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        end = time.monotonic() + 10
        while time.monotonic() < end:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.02)
        rate, p99, answers = ask(port, connections) if connections else (0.0, 0.0, 0)
    finally:
        server.send_signal(signal.SIGTERM)
        # Not server.wait(), which does not tell what this one process used.
        _, status, used = os.wait4(server.pid, 0)
        server.returncode = os.waitstatus_to_exitcode(status)
    return Figures(rate, p99, used.ru_utime + used.ru_stime, used.ru_maxrss * MAXRSS_UNIT, answers)


def main() -> int:
    """Print the table; return the exit status."""
    if not shutil.which("wrk"):
        print("Falta o wrk. No Debian ou Ubuntu: sudo apt install wrk. No macOS: brew install wrk.")
        return 1
    idle: dict[str, float] = {}
    found: dict[tuple[str, int], list[Figures]] = {
        (name, count): [] for name in COMMANDS for count in CONNECTIONS
    }
    with tempfile.TemporaryDirectory(prefix="contador-") as folder:
        os.chmod(folder, 0o711)
        servers = Redis(Path(folder, "redis")), Postgres(Path(folder, "postgres"))
        try:
            for server in servers:
                server.start()
            environment = os.environ | {"REDIS_URL": servers[0].url, "DATABASE_URL": servers[1].url}
            environment |= {"HOST": "127.0.0.1"}
            for name, command in COMMANDS.items():
                idle[name] = measure(command, environment, 0).cpu
            for turn in range(ROUNDS):
                print(f"Rodada {turn + 1} de {ROUNDS} ", end="", flush=True)
                for (name, count), figures in found.items():
                    figures.append(measure(COMMANDS[name], environment, count))
                    print(".", end="", flush=True)
                print()
        finally:
            for server in servers:
                server.stop()
    print("\nservidor          conexões  visitas/s  p99 (ms)  CPU por visita (µs)  memória (MB)")
    for (name, count), figures in found.items():
        rate = statistics.median(each.rate for each in figures)
        p99 = statistics.median(each.p99 for each in figures)
        cpu = statistics.median((each.cpu - idle[name]) / each.answers * 1e6 for each in figures)
        memory = statistics.median(each.memory for each in figures) / 1e6
        print(f"{name:16}  {count:8}  {rate:9.0f}  {p99:8.1f}  {cpu:19.0f}  {memory:12.0f}")
    print("CPU e memória são do servidor só, sem Redis, Postgres e wrk.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
