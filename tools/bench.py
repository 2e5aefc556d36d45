"""Measure the service on this machine against its own server: waitress as it comes, with no backend at all.

A well-known load generator, wrk, asks both in turn, three times; the figures are medians.
"""

import os
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from local import HERE, Postgres, Redis, free_port

CEILING = """
import logging, os, sys, waitress
logging.getLogger("waitress.queue").disabled = True
if hasattr(os, "sched_setaffinity"):  # on one core its threads are several times faster
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
def app(environ, start_response):
    start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", "32")])
    return [b"Contador: 1\\nPostgres: conectado\\n"]
waitress.serve(app, host="127.0.0.1", port=int(sys.argv[1]))
"""
CONNECTIONS, ROUNDS, SECONDS = (1, 8, 64), 3, 2


def measure(command: list[str | Path], environment: dict[str, str], port: int) -> list[float]:
    """Return the requests per second that a server answers, for each number of connections."""
    with subprocess.Popen(list(map(str, command)), env=environment, stdout=subprocess.DEVNULL) as server:
        try:
            for _ in range(500):
                with socket.socket() as probe:
                    if probe.connect_ex(("127.0.0.1", port)) == 0:
                        break
                time.sleep(0.02)
            rates = []
            for count in CONNECTIONS:
                wrk = ["wrk", "-t1", f"-c{count}", f"-d{SECONDS}s", f"http://127.0.0.1:{port}/"]
                printed = subprocess.run(wrk, capture_output=True, text=True, check=True).stdout
                found = re.search(r"Requests/sec:\s+([\d.]+)", printed)
                if not found or "Non-2xx" in printed:
                    raise RuntimeError(printed)
                rates.append(float(found[1]))
            return rates
        finally:
            server.terminate()


def main() -> int:
    """Print the table; return the exit status."""
    if not shutil.which("wrk"):
        print("Falta o wrk. No Debian ou Ubuntu: sudo apt install wrk. No macOS: brew install wrk.")
        return 1
    rounds: list[tuple[list[float], list[float]]] = []
    with tempfile.TemporaryDirectory(prefix="contador-") as folder:
        os.chmod(folder, 0o711)
        servers = Redis(Path(folder, "redis")), Postgres(Path(folder, "postgres"))
        try:
            for server in servers:
                server.start()
            for _ in range(ROUNDS):
                port = free_port()
                environment = os.environ | {"REDIS_URL": servers[0].url, "DATABASE_URL": servers[1].url}
                environment |= {"HOST": "127.0.0.1", "PORT": str(port)}
                counter = measure([sys.executable, HERE / "server.py"], environment, port)
                rounds.append((counter, measure([sys.executable, "-c", CEILING, str(port)], dict(os.environ), port)))
        finally:
            for server in servers:
                server.stop()
    print("conexões  contador/s  waitress só/s  razão")
    for number, count in enumerate(CONNECTIONS):
        ours, alone = (statistics.median(each[side][number] for each in rounds) for side in (0, 1))
        ratio = statistics.median(each[0][number] / each[1][number] for each in rounds)
        print(f"{count:8}  {ours:10.0f}  {alone:13.0f}  {ratio:5.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
