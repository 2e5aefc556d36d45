"""What the tests stand on: two servers, the program in a process of its own, and its clients."""

import atexit
import http.client
import os
import re
import resource
import shutil
import signal
import socket
import socketserver
import subprocess
import sys
import tempfile
import threading
import time
import unittest
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import redis

from tools import waiting
from tools.fakes import LONGEST
from tools.servers import HERE, Postgres, Redis
from tools.signals import end_on_signals

KEY = "contador_visitas"
PASSWORD = "p@ss:/w%rd#ç\"'\\"
LIMIT = 1.5  # seconds for any answer, whatever happens
SECONDS = 10  # for what should come about at once, on the slowest machine
VISIT = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"
CONNECTED = "Postgres: conectado\n"
FILES = 2048  # that a test may have open: it holds a thousand connections

eventually = partial(waiting.eventually, seconds=SECONDS)


class Servers:
    """The Redis and the Postgres of all tests, with a folder for what they keep."""

    folder: Path
    cache: Redis
    db: Postgres

    def start(self) -> None:
        """Start both, until the module's tests have ended; a signal ends them too."""
        end_on_signals()
        allow_files()
        self.folder = Path(tempfile.mkdtemp(prefix="contador-test-"))
        self.folder.chmod(0o711)
        atexit.register(shutil.rmtree, self.folder, ignore_errors=True)  # after a signal, too
        self.cache = Redis(self.folder / "redis")
        sockets = self.folder / "s"  # a short name: the path of a Unix socket has a limit
        sockets.mkdir()
        self.db = Postgres(self.folder / "postgres", PASSWORD, socket_folder=sockets)
        unittest.addModuleCleanup(self.end)
        for server in (self.cache, self.db):
            server.start()

    def end(self) -> None:
        for server in (self.cache, self.db):
            server.kill()
        shutil.rmtree(self.folder)

    def urls(self) -> dict[str, str]:
        """Return the settings that lead to the two."""
        return {"REDIS_URL": self.cache.url, "DATABASE_URL": self.db.url}

    def client(self) -> redis.Redis:
        """Return a client of the Redis; to be closed."""
        return redis.Redis(port=self.cache.port, socket_timeout=SECONDS)


servers = Servers()


def allow_files() -> None:
    """Let the tests open FILES files, or as many as they may; macOS begins with 256."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = FILES if hard == resource.RLIM_INFINITY else min(FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


class Answer:
    """What came back: ``status``, ``text``, ``headers`` and the ``seconds`` that it took."""

    def __init__(
        self, port: int, path: str = "/", method: str = "GET", host: str = "127.0.0.1"
    ) -> None:
        started = time.monotonic()
        connection = http.client.HTTPConnection(host, port, timeout=SECONDS)
        connection.request(method, path)
        response = connection.getresponse()
        self.status = response.status
        self.headers = response.headers
        self.text = response.read().decode()
        connection.close()
        self.seconds = time.monotonic() - started

    @property
    def number(self) -> int:
        return int(self.text.removeprefix("Contador: ").splitlines()[0])


class Service:
    """The program in a process of its own, on a free port.

    ``program`` takes the place of ``server.py``, which it can import; ``environment`` adds to or
    changes its settings; ``files`` is how many files it may open, as ``ulimit -n`` takes it.
    """

    def __init__(
        self,
        program: Sequence[str | Path] | None = None,
        files: int | str | None = None,
        **environment: str,
    ) -> None:
        place = {"HOST": "127.0.0.1", "PORT": "0", "PYTHONPATH": str(HERE)}
        variables = {**place, **servers.urls(), **environment}
        command = [str(part) for part in program or [sys.executable, HERE / "server.py"]]
        if files:
            command = ["sh", "-c", f'ulimit -n {files} && exec "$@"', "sh", *command]
        self.process = subprocess.Popen(
            command,
            env=os.environ | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        atexit.register(self.process.kill)  # a signal that ends the tests skips their clean-ups
        self.lines: list[str] = []
        self.reader = threading.Thread(target=self.read_lines, daemon=True)
        self.reader.start()
        try:
            self.port = self.wait_for_port()
        except AssertionError:
            self.process.kill()
            self.process.wait(SECONDS)
            self.reader.join(SECONDS)
            self.close_output()
            raise

    def read_lines(self) -> None:
        """Keep what the program prints, until it ends."""
        assert self.process.stdout
        for line in self.process.stdout:
            self.lines.append(line)

    def wait_for_port(self) -> int:
        """Return the port that the program's first line names."""
        eventually(lambda: bool(self.lines) or not self.reader.is_alive())
        first = "".join(self.lines[:1])
        pattern = r"Escutando em http://.*:(\d+) \(Redis: (.*), Postgres: (.*)\)\n"
        started = re.fullmatch(pattern, first)
        if not started:
            self.reader.join(SECONDS)
            raise AssertionError("".join(self.lines))
        return int(started[1])

    def get(self, path: str = "/", method: str = "GET", **options: Any) -> Answer:
        return Answer(self.port, path, method, **options)

    def connect(self) -> socket.socket:
        """Return an open connection to the program."""
        return socket.create_connection(("127.0.0.1", self.port), SECONDS)

    def raw(self, data: bytes) -> bytes:
        """Send bytes, then nothing more, and return all that comes back."""
        with self.connect() as connection:
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
            return read_all(connection)

    def freeze(self) -> None:
        """Stop the program until SIGCONT; return when it stands still."""
        self.process.send_signal(signal.SIGSTOP)
        eventually(lambda: os.waitpid(self.process.pid, os.WUNTRACED | os.WNOHANG)[0] != 0)

    def thaw(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def end(self, number: int = signal.SIGTERM, seconds: float = SECONDS) -> None:
        """Stop the program with a signal, or 0 if it has got one; its exit status must be right.

        ``lines`` then is all that it printed.
        """
        self.process.send_signal(number)
        try:
            status = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            status = self.process.wait(SECONDS)
        self.reader.join(SECONDS)
        self.close_output()
        if status != (-number if number == signal.SIGKILL else 0):
            raise AssertionError(f"exit status {status}: {''.join(self.lines)[-2000:]}")

    def close_output(self) -> None:
        if self.process.stdout:
            self.process.stdout.close()

    def end_once(self) -> None:
        """Stop the program, unless that is done."""
        if self.process.poll() is None:
            self.thaw()
            self.end()


@contextmanager
def service(**options: Any) -> Iterator[Service]:
    running = Service(**options)
    try:
        yield running
    finally:
        running.end_once()


def run_server(**environment: str) -> subprocess.CompletedProcess[str]:
    """Run the program, which should end by itself, and return what it printed and its status."""
    return subprocess.run(
        [sys.executable, HERE / "server.py"],
        env=os.environ | servers.urls() | {"HOST": "127.0.0.1", "PORT": "0"} | environment,
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )


def run_python(program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a few lines of Python that import ``server``."""
    return subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | servers.urls() | {"PYTHONPATH": str(HERE)} | environment,
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )


def read_all(connection: socket.socket) -> bytes:
    """Return what comes until the other side ends; fail if it goes on for too long."""
    end = time.monotonic() + LONGEST
    received = b""
    while more := connection.recv(65536):
        received += more
        if time.monotonic() > end:
            raise AssertionError(f"it does not end: {len(received)} bytes by now")
    return received


def numbers_in(received: bytes) -> list[int]:
    """Return the numbers that visits got, in the order of the answers."""
    return [int(found) for found in re.findall(rb"Contador: (\d+)", received)]


def listens(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(SECONDS)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def store(value: str | list[str] | None) -> None:
    """Put the counter's key in a state that the test chooses."""
    with servers.client() as client:
        client.delete(KEY)
        if isinstance(value, list):
            client.rpush(KEY, *value)
        elif value is not None:
            client.set(KEY, value)


def stored() -> bytes | None:
    with servers.client() as client:
        value: bytes | None = client.get(KEY)
        return value


def commands(name: str) -> int:
    """Return how often Redis has carried out a command."""
    with servers.client() as client:
        statistics = client.info("commandstats")
        return int(statistics.get(f"cmdstat_{name}", {"calls": 0})["calls"])


def revive(server: Redis | Postgres) -> None:
    """Leave a server running, whatever a test did to it."""
    server.signal(signal.SIGCONT)
    if not server.process or server.process.poll() is not None:
        server.start()


class Load:
    """Clients that ask all the time, until ``stop``; ``answers`` has all that they got."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.answers: list[Answer] = []
        self.lost: list[Exception] = []
        self.end = time.monotonic() + 30  # at the latest
        self.threads = [threading.Thread(target=self.run, daemon=True) for _ in range(8)]
        for thread in self.threads:
            thread.start()

    def run(self) -> None:
        while time.monotonic() < self.end:
            try:
                self.answers.append(Answer(self.port))
            except Exception as error:
                self.lost.append(error)

    def more(self, count: int, pattern: str = "") -> None:
        """Wait for so many more answers with ``pattern`` in them."""
        seen = len(self.answers)

        def enough() -> bool:
            found = [each for each in self.answers[seen:] if re.search(pattern, each.text)]
            return len(found) >= count

        eventually(enough)

    def stop(self) -> list[Answer]:
        self.end = 0
        for thread in self.threads:
            thread.join(SECONDS)
        return self.answers


class Relay(socketserver.StreamRequestHandler):
    """Passes on what a client asks, and each answer after a while."""

    timeout = LONGEST
    target = 0
    delay = 0.0

    def handle(self) -> None:
        with socket.create_connection(("127.0.0.1", self.target), SECONDS) as server:
            while data := self.request.recv(65536):
                server.sendall(data)
                answer = server.recv(65536)
                time.sleep(self.delay)
                self.request.sendall(answer)


@contextmanager
def slow_redis(seconds: float) -> Iterator[str]:
    """Yield a URL at which the Redis seems to take so long for each answer."""
    handler = type("SlowRelay", (Relay,), {"target": servers.cache.port, "delay": seconds})
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), handler) as relay:
        relay.daemon_threads = True
        thread = threading.Thread(target=relay.serve_forever, args=[0.05], daemon=True)
        thread.start()
        try:
            yield f"redis://127.0.0.1:{relay.server_address[1]}/0"
        finally:
            relay.shutdown()
            thread.join(SECONDS)


@contextmanager
def refusing_port() -> Iterator[int]:
    """Yield a port at which nobody listens, and which nobody else gets meanwhile."""
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        yield holder.getsockname()[1]


@contextmanager
def full_backlog() -> Iterator[int]:
    """Yield a port that never answers, and from some time on not even accepts."""
    with socket.create_server(("127.0.0.1", 0), backlog=1) as listener:
        waiting = [socket.socket() for _ in range(4)]
        for connection in waiting:
            connection.setblocking(False)
            connection.connect_ex(listener.getsockname())
        try:
            yield listener.getsockname()[1]
        finally:
            for connection in waiting:
                connection.close()


def with_limits(timeout: float = SECONDS, at_once: float = SECONDS / 2) -> list[str]:
    """Return the program, with other limits to its waits for Redis and Postgres, in seconds.

    The defaults are longer than any machine takes: for promises that are not about time. A server
    that is known to be away is waited for as long as any other.
    """
    program = (
        "from contador import backends\n"
        f"backends.TIMEOUT = backends.RETRY_TIMEOUT = {timeout}\n"
        f"backends.AT_ONCE = {at_once}\n"
        "import server\n"
        "server.main()\n"
    )
    return [sys.executable, "-c", program]


def slow_to_find(host: str, seconds: float, address: str = "127.0.0.1") -> list[str]:
    """Return the program, with a resolver that takes so long for the name of one host.

    Without an ``address`` it then says that there is no such name.
    """
    program = (
        "import socket, time\n"
        "resolve = socket.getaddrinfo\n"
        "def slow(host, *words, **options):\n"
        f"    if host != '{host}': return resolve(host, *words, **options)\n"
        f"    time.sleep({seconds})\n"
        f"    if not '{address}': raise socket.gaierror(socket.EAI_NONAME, 'no such name')\n"
        f"    return resolve('{address}', *words, **options)\n"
        "socket.getaddrinfo = slow\n"
        "import server\n"
        "server.main()\n"
    )
    return [sys.executable, "-c", program]
