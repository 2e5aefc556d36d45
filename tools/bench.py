"""Measure the service beside the description's own version (Flask) and waitress without backends.

A well-known load generator, wrk, asks each for a few seconds, in rounds; the figures are medians.
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

import psutil
from rich.bar import Bar
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from tools.processes import STOP_SECONDS, Process, is_alive, wait_for_end
from tools.servers import HERE, Postgres, Redis, free_port
from tools.signals import signals_held
from tools.temporary import temporary_folder

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
START_SECONDS = 10
WRK_SECONDS = 30  # for wrk to end after the time for which it asks
BAR_WIDTH = 20
UNITS = {"us": 1e-3, "ms": 1.0, "s": 1e3}
MAXRSS_UNIT = 1 if sys.platform == "darwin" else 1024  # in bytes


class Answers(NamedTuple):
    """What wrk saw: answers a second, the 99th percentile of their time in ms, their number."""

    rate: float
    p99: float
    total: int


class Figures(NamedTuple):
    """What one measurement gives: with the CPU in seconds and the memory in bytes of the server."""

    answers: Answers
    cpu: float
    memory: float


def ask(port: int, connections: int) -> str:
    """Return what wrk prints of so many connections to ``port``.

    Raise RuntimeError where it does not end in time.
    """
    wrk = ["wrk", "-t1", f"-c{connections}", f"-d{SECONDS}s", "--latency"]
    try:
        done = subprocess.run(
            [*wrk, f"http://127.0.0.1:{port}/"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=SECONDS + WRK_SECONDS,
        )
    except subprocess.TimeoutExpired:
        late = f"A medição não vale; o wrk não terminou {WRK_SECONDS} segundos depois do fim"
        raise RuntimeError(late) from None
    return done.stdout


def read(printed: str) -> Answers:
    """Return what wrk has printed; raise RuntimeError with it where not all answers were good."""
    rate = re.search(r"Requests/sec:\s+([\d.]+)", printed)
    p99 = re.search(r"99%\s+([\d.]+)(us|ms|s)", printed)
    count = re.search(r"(\d+) requests in", printed)
    if re.search("Non-2xx|Socket errors", printed) or not (rate and p99 and count):
        raise RuntimeError(f"A medição não vale; o wrk mostrou:\n{printed}")
    return Answers(float(rate[1]), float(p99[1]) * UNITS[p99[2]], int(count[1]))


def wait_until_ready(server: psutil.Process, port: int) -> None:
    """Wait until something listens on ``port``, at most as long as the server lives."""
    end = time.monotonic() + START_SECONDS
    while is_alive(server) and time.monotonic() < end:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.02)


def end(server: subprocess.Popen[bytes]) -> tuple[float, int]:
    """End a server; return the seconds of CPU and the bytes of memory that it has used."""
    # Past the methods of Popen: they forget what a server that has ended had used.
    os.kill(server.pid, signal.SIGTERM)
    if not wait_for_end(psutil.Process(server.pid), STOP_SECONDS):
        os.kill(server.pid, signal.SIGKILL)
    _, status, used = os.wait4(server.pid, 0)
    server.returncode = os.waitstatus_to_exitcode(status)
    return used.ru_utime + used.ru_stime, used.ru_maxrss * MAXRSS_UNIT


def measure(name: str, environment: dict[str, str], connections: int) -> Figures:
    """Start a server, ask it if ``connections`` is not 0, and end it.

    Raise RuntimeError, with what the server has said, where it died meanwhile.
    """
    port = free_port()
    printed = ""
    with tempfile.TemporaryFile() as said:
        command = [sys.executable, *map(str, COMMANDS[name])]
        started = Process(command, env=environment | {"PORT": str(port)})
        started.launch(stdout=subprocess.DEVNULL, stderr=said)
        server = started.process
        assert server
        process = psutil.Process(server.pid)
        try:
            wait_until_ready(process, port)
            printed = ask(port, connections) if connections else ""
        finally:
            died = not is_alive(process)
            cpu, memory = end(server)
        if died:
            said.seek(0)
            words = said.read().decode(errors="replace")[-2000:].strip()
            raise RuntimeError(f"{name} terminou sozinho (código {server.returncode}):\n{words}")
    return Figures(read(printed) if connections else Answers(0, 0, 0), cpu, memory)


def measure_all(environment: dict[str, str], progress: Progress) -> Table:
    """Measure each server under each load in turn; return the table of the medians."""
    loads = [(name, connections) for name in COMMANDS for connections in CONNECTIONS]
    task = progress.add_task("", total=len(COMMANDS) + ROUNDS * len(loads))

    def measured(name: str, connections: int) -> Figures:
        progress.update(task, description=f"{name}, {connections} conexões")
        figures = measure(name, environment, connections)
        progress.advance(task)
        return figures

    idle = {name: measured(name, 0).cpu for name in COMMANDS}
    found: dict[tuple[str, int], list[Figures]] = {load: [] for load in loads}
    for _ in range(ROUNDS):
        for load in loads:
            found[load].append(measured(*load))
    return table(found, idle)


def table(found: dict[tuple[str, int], list[Figures]], idle: dict[str, float]) -> Table:
    """Return the medians as a table, with bars for the rates; ``idle`` is the CPU of a start."""
    rates = {
        load: statistics.median(each.answers.rate for each in figures)
        for load, figures in found.items()
    }
    shown = Table("servidor", box=None, padding=(0, 1, 0, 0))
    for column in ("conexões", "visitas/s", "", "p99 (ms)", "CPU (µs)", "MB"):
        shown.add_column(column, justify="right")
    for (name, connections), figures in found.items():
        rate = rates[name, connections]
        p99 = statistics.median(each.answers.p99 for each in figures)
        cpu = statistics.median(
            (each.cpu - idle[name]) / each.answers.total * 1e6 for each in figures
        )
        memory = statistics.median(each.memory for each in figures) / 1e6
        shown.add_row(
            name,
            str(connections),
            f"{rate:.0f}",
            Bar(max(rates.values()), 0, rate, width=BAR_WIDTH),
            f"{p99:.1f}",
            f"{cpu:.0f}",
            f"{memory:.0f}",
        )
    return shown


def main() -> int:
    """Print the table; return the exit status."""
    console = Console()
    if not shutil.which("wrk"):
        print("Falta o wrk. No Debian ou Ubuntu: sudo apt install wrk. No macOS: brew install wrk.")
        return 1
    with temporary_folder() as folder:
        cache, db = Redis(Path(folder, "redis")), Postgres(Path(folder, "postgres"))
        try:
            cache.start()
            db.start()
            environment = os.environ | {"REDIS_URL": cache.url, "DATABASE_URL": db.url}
            with Progress(console=console, transient=True) as progress:
                shown = measure_all(environment | {"HOST": "127.0.0.1"}, progress)
        except RuntimeError as error:
            print(error, file=sys.stderr)
            return 1
        finally:
            with signals_held():
                db.stop()
                cache.stop()
    console.print(shown)
    console.print("CPU por visita e memória: só as do servidor, sem Redis, Postgres e wrk.")
    return 0
