"""What the tests stand on: two real servers, and the program in a process of its own."""

import http.client
import os
import re
import signal
import socket
import socketserver
import subprocess
import sys
import tempfile
import threading
import time
import unittest
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import redis

from tools.servers import HERE, Postgres, Redis

PASSWORD = "p@ss:/w%rd#ç\"'\\"
SECONDS = 10  # for what should come about at once, on the slowest machine


class Servers:
    """The Redis and the Postgres of all tests, and a client of that Redis."""

    def start(self) -> None:
        """Start both, until the module's tests have ended."""
        folder = tempfile.TemporaryDirectory(prefix="contador-")
        unittest.addModuleCleanup(folder.cleanup)
        os.chmod(folder.name, 0o711)  # where root runs the tests, Postgres is another user
        # Not in that folder, which may be a deep one: the path of a socket has a limit.
        sockets = tempfile.TemporaryDirectory(prefix="contador-", dir="/tmp")
        unittest.addModuleCleanup(sockets.cleanup)
        self.sockets = Path(sockets.name)
        self.cache = Redis(Path(folder.name, "redis"))
        self.db = Postgres(Path(folder.name, "postgres"), PASSWORD, socket_folder=self.sockets)
        self.both = (self.cache, self.db)
        for server in self.both:
            unittest.addModuleCleanup(server.kill)
            server.start()
        self.client = redis.Redis(port=self.cache.port, socket_timeout=SECONDS)
        unittest.addModuleCleanup(self.client.close)


servers = Servers()


def settings(**changes: str) -> dict[str, str]:
    """Return the environment in which the program finds both servers; any warning ends it."""
    urls = {"REDIS_URL": servers.cache.url, "DATABASE_URL": servers.db.url}
    place = {"HOST": "127.0.0.1", "PORT": "0", "PYTHONPATH": str(HERE)}
    python = {"PYTHONUNBUFFERED": "", "PYTHONWARNINGS": "error,ignore::ResourceWarning"}
    return os.environ | urls | place | python | changes


class Answer(NamedTuple):
    status: int
    text: str
    headers: http.client.HTTPMessage
    seconds: float

    @property
    def number(self) -> int:
        return int(self.text.removeprefix("Contador: ").splitlines()[0])


class Service:
    """The program, or ``code`` that can import it; ``lines`` is what it has printed so far."""

    def __init__(self, code: str = "", **environment: str) -> None:
        program = ["-c", code] if code else [str(HERE / "server.py")]
        pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        command = [sys.executable, *program]
        self.process = subprocess.Popen(command, env=settings(**environment), **pipes)
        self.lines: list[str] = []
        self.reader = threading.Thread(target=self.read_lines, daemon=True)
        self.reader.start()
        eventually(lambda: self.lines or not self.reader.is_alive())
        self.port = int(re.findall(r"Escutando em http://\S*:(\d+)", "".join(self.lines))[0])

    def read_lines(self) -> None:
        assert self.process.stdout
        with self.process.stdout as output:
            self.lines.extend(iter(output.readline, ""))

    def get(self, path: str = "/", method: str = "GET", host: str = "127.0.0.1") -> Answer:
        started = time.monotonic()
        with closing(http.client.HTTPConnection(host, self.port, timeout=SECONDS)) as connection:
            connection.request(method, path)
            response = connection.getresponse()
            text = response.read().decode()
        return Answer(response.status, text, response.headers, time.monotonic() - started)

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), SECONDS)

    def end(self, number: int = signal.SIGTERM) -> int:
        """Stop the program, if it still runs, and return its exit status."""
        self.process.send_signal(signal.SIGCONT)
        self.process.send_signal(number)
        try:
            return self.process.wait(SECONDS)
        finally:
            self.process.kill()
            self.reader.join(SECONDS)

    def log(self) -> str:
        """Stop the program and return all that it has printed."""
        self.end()
        return "".join(self.lines)


def eventually(condition: Callable[[], Any], seconds: float = SECONDS) -> None:
    """Wait until a condition holds; fail after so many seconds."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise AssertionError(f"not within {seconds} s")
        time.sleep(0.01)


class Relay(socketserver.ThreadingTCPServer):
    """Stands before a server; notes what it is ``asked``, drops the answers to what is ``lost``."""

    daemon_threads = True
    asked = b""
    lost = b"asked by nobody"

    def __init__(self, server: Redis | Postgres) -> None:
        super().__init__(("127.0.0.1", 0), socketserver.BaseRequestHandler)
        self.target = server.port
        self.url = server.url.replace(f":{server.port}/", f":{self.server_address[1]}/")
        threading.Thread(target=self.serve_forever, args=[0.02], daemon=True).start()

    def server_close(self) -> None:
        self.shutdown()
        super().server_close()

    def finish_request(self, request: Any, client_address: Any) -> None:
        with socket.create_connection(("127.0.0.1", self.target), SECONDS) as server:
            while data := request.recv(65536):
                self.asked += data
                server.sendall(data)
                answer = server.recv(65536)
                request.sendall(b"" if self.lost in data else answer)
