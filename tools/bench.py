"""``make bench``: the service beside the same application in waitress's threads, and beside Flask.

A well-known load generator, wrk, visits each for a few seconds, in rounds; figures are medians.
"""

import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from tools.harness import eventually
from tools.servers import HERE, Postgres, Redis, free_port, listens

THREADS = (
    "import logging, os, waitress, server\n"
    "logging.disable()\n"
    "waitress.serve(server.app, host='127.0.0.1', port=int(os.environ['PORT']), threads=4)\n"
)
COMMANDS: dict[str, list[str]] = {
    "server.py": ["server.py"],
    "em threads": ["-c", THREADS],
    "Flask": ["tools/flask_counter.py"],
}
CONNECTIONS = (1, 8, 64)
ROUNDS = 3
SECONDS = 2  # of visits, for each figure of a round


def ask(port: int, connections: int) -> float:
    """Return the answers per second that wrk gets; raise RuntimeError if not all were good."""
    command = ["wrk", "-t1", f"-c{connections}", f"-d{SECONDS}s", f"http://127.0.0.1:{port}/"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    rate = re.search(r"Requests/sec:\s+([\d.]+)", done.stdout)
    if not rate or re.search("Non-2xx|Socket errors", done.stdout):
        raise RuntimeError(f"A medição não vale; o wrk mostrou:\n{done.stdout}{done.stderr}")
    return float(rate[1])


def measure(name: str, connections: int, environment: dict[str, str]) -> float:
    """Start a server, measure its answers per second, and end it."""
    port = free_port()
    with subprocess.Popen(
        [sys.executable, *COMMANDS[name]],
        cwd=HERE,
        env=environment | {"PORT": str(port)},
        stdout=subprocess.DEVNULL,
    ) as server:
        try:
            eventually(lambda: listens(port) or server.poll() is not None)
            return ask(port, connections)
        finally:
            server.terminate()


def measure_all(environment: dict[str, str]) -> dict[tuple[str, int], float]:
    """Return the median rate of each server with each number of connections."""
    loads = [(name, connections) for name in COMMANDS for connections in CONNECTIONS]
    found: dict[tuple[str, int], list[float]] = {load: [] for load in loads}
    for number in range(ROUNDS):
        print(f"Rodada {number + 1} de {ROUNDS}...", file=sys.stderr)
        for name, connections in loads:
            found[name, connections].append(measure(name, connections, environment))
    return {load: statistics.median(rates) for load, rates in found.items()}


def print_table(rates: dict[tuple[str, int], float]) -> None:
    """Print the visits per second, and how many times as many as each other server's are ours."""
    print("Visitas por segundo (quantas vezes mais o server.py atende)")
    print("conexões  " + "".join(f"{name:>20}" for name in COMMANDS))
    for connections in CONNECTIONS:
        ours = rates["server.py", connections]
        cells = [f"{ours:.0f}"]
        for name in list(COMMANDS)[1:]:
            rate = rates[name, connections]
            cells.append(f"{rate:.0f} ({ours / rate:.1f})")
        print(f"{connections:<10}" + "".join(f"{cell:>20}" for cell in cells))


def main() -> None:
    """Print the table; exit with a line where that can't be."""
    if not shutil.which("wrk"):
        sys.exit("Falta o wrk: sudo apt install wrk; no macOS, brew install wrk")
    with tempfile.TemporaryDirectory(prefix="contador-") as folder:
        os.chmod(folder, 0o711)  # for Postgres, which root runs as nobody
        servers = Redis(Path(folder, "redis")), Postgres(Path(folder, "postgres"))
        try:
            for server in servers:
                server.start()
            urls = {"REDIS_URL": servers[0].url, "DATABASE_URL": servers[1].url}
            print_table(measure_all(os.environ | urls | {"HOST": "127.0.0.1"}))
        except (RuntimeError, KeyboardInterrupt) as error:
            sys.exit(str(error))
        finally:
            for server in servers:
                server.stop()


if __name__ == "__main__":
    main()
