"""The promises of the README, each kept before real servers: nothing is mocked, and no port is fixed."""

import http.client
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import unittest
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any
from urllib.parse import quote

import redis
from hypothesis import given, settings
from hypothesis import strategies as st

from tools.servers import HERE, Postgres, Redis, free_port

KEY = "contador_visitas"
PASSWORD = "p@ss:/w%rd#ç\"'\\"
LIMIT = 1.5  # seconds for any answer, whatever happens
VISIT = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"
CONNECTED = "Postgres: conectado\n"
FOLDER = Path(tempfile.mkdtemp(prefix="contador-test-"))
FOLDER.chmod(0o711)
unittest.addModuleCleanup(shutil.rmtree, FOLDER)

cache = Redis(FOLDER / "redis")
db = Postgres(FOLDER / "postgres", PASSWORD)


def setUpModule() -> None:
    for server in (cache, db):
        unittest.addModuleCleanup(server.kill)
        server.start()


class Answer:
    """What came back: ``status``, ``text``, ``headers`` and the ``seconds`` that it took."""

    def __init__(
        self, port: int, path: str = "/", method: str = "GET", timeout: float = 5, host: str = "127.0.0.1"
    ) -> None:
        started = time.monotonic()
        connection = http.client.HTTPConnection(host, port, timeout=timeout)
        connection.request(method, path)
        response = connection.getresponse()
        self.status, self.headers, self.text = response.status, response.headers, response.read().decode()
        connection.close()
        self.seconds = time.monotonic() - started

    @property
    def number(self) -> int:
        return int(self.text.removeprefix("Contador: ").splitlines()[0])


class Service:
    """The program in a process of its own, on a free port; ``environment`` adds to or changes its settings."""

    def __init__(self, program: list[str | Path] | None = None, **environment: str) -> None:
        variables = {"REDIS_URL": cache.url, "DATABASE_URL": db.url, "HOST": "127.0.0.1", "PORT": "0", **environment}
        self.process = subprocess.Popen(
            [str(part) for part in program or [sys.executable, HERE / "server.py"]],
            env=os.environ | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert self.process.stdout
        first = self.process.stdout.readline()
        self.lines = [first]
        started = re.match(r"Escutando em http://.*:(\d+) \(Redis: (.*), Postgres: (.*)\)\n", first)
        assert started, first + self.process.stdout.read()
        self.port = int(started[1])
        self.reader = threading.Thread(target=self.lines.extend, args=[self.process.stdout])
        self.reader.start()

    def get(self, path: str = "/", method: str = "GET", **options: Any) -> Answer:
        return Answer(self.port, path, method, **options)

    def connect(self) -> socket.socket:
        """Return an open connection to the program."""
        return socket.create_connection(("127.0.0.1", self.port), 5)

    def raw(self, data: bytes) -> bytes:
        """Send bytes, then nothing more, and return all that comes back."""
        with self.connect() as connection:
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
            return read_all(connection)

    def freeze(self) -> None:
        """Stop the program until SIGCONT; return when it stands still."""
        self.process.send_signal(signal.SIGSTOP)
        os.waitpid(self.process.pid, os.WUNTRACED)

    def end(self, number: int = signal.SIGTERM) -> None:
        """Stop the program with a signal; its exit status must be right. ``lines`` then is all that it printed."""
        self.process.send_signal(number)
        status = self.process.wait(5)
        self.reader.join(5)
        assert self.process.stdout
        self.process.stdout.close()
        if status != (-number if number == signal.SIGKILL else 0):
            raise AssertionError(f"exit status {status}: {''.join(self.lines)[-2000:]}")

    def end_once(self) -> None:
        """Stop the program, unless that is done."""
        if self.process.poll() is None:
            self.end()


@contextmanager
def service(**environment: Any) -> Iterator[Service]:
    running = Service(**environment)
    try:
        yield running
    finally:
        running.end_once()


def eventually(check: Callable[[], bool], seconds: float = 5) -> None:
    """Wait for a condition; fail if it does not come about."""
    end = time.monotonic() + seconds
    while not check():
        if time.monotonic() > end:
            raise AssertionError("it did not come about")
        time.sleep(0.01)


def read_all(connection: socket.socket) -> bytes:
    """Return what comes until the other side ends."""
    return b"".join(iter(partial(connection.recv, 65536), b""))


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def store(value: str | list[str] | None) -> None:
    """Put the counter's key in a state of its own choosing."""
    with redis.Redis(port=cache.port) as client:
        client.delete(KEY)
        if isinstance(value, list):
            client.rpush(KEY, *value)
        elif value is not None:
            client.set(KEY, value)


def stored() -> bytes | None:
    with redis.Redis(port=cache.port) as client:
        value: bytes | None = client.get(KEY)
        return value


def commands(name: str) -> int:
    """Return how often Redis has carried out a command."""
    with redis.Redis(port=cache.port) as client:
        return int(client.info("commandstats").get(f"cmdstat_{name}", {"calls": 0})["calls"])


def revive(server: Redis | Postgres) -> None:
    """Leave a server running, whatever a test did to it."""
    server.signal(signal.SIGCONT)
    if not server.process or server.process.poll() is not None:
        server.start()


class Load:
    """Clients that ask all the time, each on a connection of its own, until ``stop``; ``answers`` has them all."""

    def __init__(self, port: int, clients: int = 8) -> None:
        self.port, self.answers, self.sent, self.lost = port, list[Answer](), 0, list[Exception]()
        self.end = time.monotonic() + 30  # at the latest
        self.threads = [threading.Thread(target=self.run) for _ in range(clients)]
        for thread in self.threads:
            thread.start()

    def run(self) -> None:
        while time.monotonic() < self.end:
            self.sent += 1
            try:
                self.answers.append(Answer(self.port))
            except Exception as error:
                self.lost.append(error)

    def rate(self) -> float:
        """Return the answers per second, of a second from now."""
        seen = len(self.answers)
        time.sleep(1)
        return len(self.answers) - seen

    def more(self, count: int, pattern: str = "") -> None:
        """Wait for so many more answers with ``pattern`` in them."""
        seen = len(self.answers)
        eventually(lambda: sum(bool(re.search(pattern, each.text)) for each in self.answers[seen:]) >= count)

    def stop(self) -> list[Answer]:
        self.end = 0
        for thread in self.threads:
            thread.join(10)
        return self.answers


@contextmanager
def full_backlog() -> Iterator[int]:
    """Yield a port that never answers, and from some time on not even accepts."""
    with socket.create_server(("127.0.0.1", 0), backlog=1) as listener:
        waiting = [socket.socket() for _ in range(4)]
        for connection in waiting:
            connection.setblocking(False)
            connection.connect_ex(listener.getsockname())
        yield listener.getsockname()[1]
        for connection in waiting:
            connection.close()


def slow_to_find(host: str, seconds: float) -> list[str | Path]:
    """Return the program, with a resolver that takes so long for the name of one host, which is this machine."""
    program = (
        "import runpy, socket, sys, time\n"
        "resolve = socket.getaddrinfo\n"
        "def slow(host, *words, **options):\n"
        f"    if host != '{host}': return resolve(host, *words, **options)\n"
        f"    time.sleep({seconds})\n"
        "    return resolve('127.0.0.1', *words, **options)\n"
        "socket.getaddrinfo = slow\n"
        "runpy.run_path(sys.argv[1], run_name='__main__')\n"
    )
    return [sys.executable, "-c", program, HERE / "server.py"]


class TestAnswers(unittest.TestCase):
    """The table of requests."""

    web: Service

    @classmethod
    def setUpClass(cls) -> None:
        cls.web = Service()
        cls.addClassCleanup(cls.web.end)

    def setUp(self) -> None:
        store(None)

    def check(self, path: str, status: int, text: str, method: str = "GET", **headers: str) -> None:
        answer = self.web.get(path, method)
        self.assertEqual((answer.status, answer.text), (status, text))
        expected = {
            "Content-Type": "text/plain; charset=utf-8",
            "Cache-Control": "no-store",
            "X-Content-Type-Options": "nosniff",
            **headers,
        }
        self.assertEqual({name: answer.headers[name] for name in expected}, expected)
        if method != "HEAD":
            self.assertEqual(answer.headers["Content-Length"], str(len(text.encode())))

    def test_each_visit_counts_one(self) -> None:
        for number in (1, 2, 3):
            self.check("/", 200, f"Contador: {number}\n{CONNECTED}")
        self.check("/?utm=x", 200, f"Contador: 4\n{CONNECTED}")
        self.assertEqual(stored(), b"4")

    def test_reset_makes_the_next_visit_the_first(self) -> None:
        for value in (None, "41", "abc", "-7", str(2**63 - 1), ["lista"]):
            store(value)
            self.check("/reset", 200, "Contador: 0\n")
            self.check("/", 200, f"Contador: 1\n{CONNECTED}")

    def test_a_key_without_a_number_or_at_its_limit_is_told_apart(self) -> None:
        for value in ("abc", "", "1.5", str(2**63 - 1), str(2**63), ["lista"]):
            store(value)
            answer = self.web.get()
            self.assertEqual(answer.status, 500, value)
            self.assertRegex(answer.text, r"\A[^\n]*/reset[^\n]*\n\Z")
            self.assertEqual(self.web.get(method="HEAD").status, 500, value)

    def test_the_last_number_can_be_reached(self) -> None:
        store(str(2**63 - 2))
        self.check("/", 200, f"Contador: {2**63 - 1}\n{CONNECTED}")

    def test_health_counts_nothing(self) -> None:
        self.check("/health", 200, f"Redis: conectado\n{CONNECTED}")
        self.assertEqual(stored(), None)

    def test_head_is_get_without_body_and_effect(self) -> None:
        for value in (None, "9", "99"):
            store(value)
            for path in ("/", "/reset", "/health", "/nada"):
                head = self.web.get(path, "HEAD")
                self.assertEqual((head.text, stored()), ("", value.encode() if value else None))
                get = self.web.get(path)
                self.assertEqual(head.status, get.status)
                for name in ("Content-Length", "Content-Type", "Cache-Control"):
                    self.assertEqual(head.headers[name], get.headers[name])
                store(value)

    def test_other_methods_are_refused(self) -> None:
        for path in ("/", "/reset", "/health"):
            for method in ("POST", "PUT", "DELETE", "OPTIONS", "PATCH", "BREW"):
                self.check(path, 405, "Método não permitido: use GET\n", method, Allow="GET, HEAD")
        self.assertEqual(stored(), None)

    def test_other_paths_are_not_found(self) -> None:
        for path in ("/favicon.ico", "/reset/", "/RESET", "/..", "/%2e", "/%00", "/a%0d%0ab", "*"):
            self.check(path, 404, "Não encontrado. Use / (conta uma visita), /reset (volta a 0) ou /health\n")
        self.assertEqual(stored(), None)

    def test_a_thousand_visits_from_16_threads_give_1_to_1000(self) -> None:
        with ThreadPoolExecutor(16) as pool:
            numbers = list(pool.map(lambda _: self.web.get().number, range(1000)))
        self.assertEqual(sorted(numbers), list(range(1, 1001)))

    def test_under_other_servers_the_application_keeps_to_wsgi_and_the_count_is_exact(self) -> None:
        programs = {
            "waitress, 8 threads": "import waitress; waitress.serve(app, listen=f'127.0.0.1:{port}', threads=8)",
            "wsgiref, threaded and validated": (
                "from socketserver import ThreadingMixIn\n"
                "from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server\n"
                "from wsgiref.validate import validator\n"
                "WSGIRequestHandler.log_message = lambda *_: None\n"
                "class Server(ThreadingMixIn, WSGIServer): request_queue_size = 100\n"
                "make_server('127.0.0.1', port, validator(app), Server).serve_forever()"
            ),
        }
        for name, program in programs.items():
            with self.subTest(name):
                store(None)
                port = free_port()
                start = f"from server import app; port = {port}\n"
                start += f"print('Escutando em http://:{port} (Redis: , Postgres: )', flush=True)\n"
                with service(program=[sys.executable, "-c", start + program], PYTHONPATH=str(HERE)) as other:
                    eventually(partial(listens, port))
                    with ThreadPoolExecutor(16) as pool:
                        answers = list(pool.map(lambda _: other.get(), range(400)))
                    self.assertEqual(sorted(answer.number for answer in answers), list(range(1, 401)))
                    self.assertEqual({answer.text.splitlines()[1] for answer in answers}, {CONNECTED.strip()})
                    for method in ("GET", "HEAD", "POST"):
                        for path in ("/", "/reset", "/health", "/nada"):
                            answer, ours = other.get(path, method), self.web.get(path, method)
                            self.assertEqual((answer.status, bool(answer.text)), (ours.status, method != "HEAD"))
                            self.assertEqual(answer.headers["Content-Type"], "text/plain; charset=utf-8")
                    other.end(signal.SIGKILL)

    def test_the_application_asks_for_nothing_that_wsgi_does_not_promise(self) -> None:
        program = (
            "from wsgiref.util import setup_testing_defaults\n"
            "from server import app\n"
            "environ = {}\n"
            "setup_testing_defaults(environ)\n"
            "del environ['PATH_INFO']\n"
            "print(b''.join(app(environ, lambda status, headers: None)).decode(), end='')"
        )
        variables = {"REDIS_URL": cache.url, "DATABASE_URL": db.url, "PYTHONPATH": str(HERE)}
        done = subprocess.run(
            [sys.executable, "-c", program], env=os.environ | variables, capture_output=True, text=True, timeout=10
        )
        self.assertEqual((done.stdout, done.stderr), (f"Contador: 1\n{CONNECTED}", ""))

    def test_what_came_in_together_is_counted_together(self) -> None:
        requests = {
            VISIT: (12, 200),
            b"GET //?x HTTP/1.1\r\nHost: a\r\n\r\n": (3, 200),
            b"HEAD / HTTP/1.1\r\nHost: a\r\n\r\n": (3, 200),
            b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n": (3, 405),
            b"GET /nada HTTP/1.1\r\nHost: a\r\n\r\n": (3, 404),
            b"GET / HTTP/1.1\r\n\r\n": (3, 400),
            b"GET / HTTP/1.1\r\nA: " + b"a" * 20000 + b"\r\n\r\n": (3, 431),
        }
        gone = self.web.connect()
        clients = [
            (self.web.connect(), request, status) for request, (count, status) in requests.items() for _ in range(count)
        ]
        for connection, _, _ in clients:
            self.addCleanup(connection.close)
        self.web.get("/health")  # after all connections were accepted
        before = commands("incrby")
        self.web.freeze()
        for connection, request, _ in clients:
            connection.sendall(request)
        gone.sendall(VISIT)
        gone.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # its end is a reset
        gone.close()
        self.web.process.send_signal(signal.SIGCONT)
        numbers = []
        for connection, request, status in clients:
            received = connection.recv(65536)
            self.assertEqual(int(received.split(b" ")[1]), status, request[:60])
            numbers += [int(found) for found in re.findall(rb"Contador: (\d+)", received)]
        self.assertEqual(sorted(numbers), list(range(1, 16)))
        self.assertEqual((stored(), commands("incrby") - before), (b"15", 1))
        self.web.get()
        self.assertEqual(commands("incrby") - before, 2)

    def test_a_batch_in_which_redis_fails_answers_503_to_each(self) -> None:
        self.addCleanup(cache.signal, signal.SIGCONT)
        clients = [self.web.connect() for _ in range(9)]
        for connection in clients:
            self.addCleanup(connection.close)
        self.web.get("/health")
        cache.signal(signal.SIGSTOP)
        self.web.freeze()
        for connection in clients:
            connection.sendall(VISIT)
        self.web.process.send_signal(signal.SIGCONT)
        for connection in clients:
            self.assertIn("indisponível (tempo esgotado)\n" + CONNECTED, connection.recv(65536).decode())
        cache.signal(signal.SIGCONT)
        eventually(lambda: self.web.get("/health").status == 200)
        self.assertIn(stored(), (None, b"9"))  # sent once: Redis may carry it out when it goes on


class TestSettings(unittest.TestCase):
    """The variables: what they mean, and how a bad one is told."""

    def refused(self, name: str, value: str) -> None:
        environment = {"REDIS_URL": cache.url, "DATABASE_URL": db.url, "PORT": "0", name: value}
        done = subprocess.run(
            [sys.executable, HERE / "server.py"],
            env=os.environ | environment,
            capture_output=True,
            text=True,
            timeout=10,
        )
        self.assertEqual(done.returncode, 2, value)
        self.assertRegex(done.stderr, rf"\A{name}: [^\n]+\n\Z")
        self.assertNotIn("segredo", done.stderr + done.stdout)

    def test_a_bad_value_is_one_line_and_status_2(self) -> None:
        for name, values in {
            "REDIS_URL": ["http://cache", "cache:6379", "redis://:segredo@cache:port/0", "redis://cache/0?segredo=1"],
            "DATABASE_URL": [
                "mysql://db/x",
                "db",
                "postgresql://u:segredo@db:x/y",
                "postgresql://u:p@segredo#x/w@db/y",
                "postgresql://db/x?sslmode=segredo",
                "postgresql://db/x?segredo=1",
            ],
            "PORT": ["x", "-1", "65536", "5e3"],
            "ACCESS_LOG": ["sim", "2"],
        }.items():
            for value in values:
                with self.subTest(name=name, value=value):
                    self.refused(name, value)

    def test_a_port_in_use_is_told(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            environment = {"REDIS_URL": cache.url, "HOST": "127.0.0.1", "PORT": str(taken.getsockname()[1])}
            done = subprocess.run(
                [sys.executable, HERE / "server.py"], env=os.environ | environment, capture_output=True, text=True
            )
        self.assertEqual(done.returncode, 2)
        self.assertRegex(done.stderr, r"\AHOST, PORT: [^\n]+ já está em uso\n\Z")

    def test_an_empty_variable_is_an_absent_one(self) -> None:
        with service(ACCESS_LOG="", POSTGRES_PASSWORD="") as web:
            self.assertEqual(web.get().status, 200)

    def test_any_password_works_as_it_is(self) -> None:
        url = f"postgresql://postgres@127.0.0.1:{db.port}/postgres"
        with service(DATABASE_URL=url, POSTGRES_PASSWORD=PASSWORD) as web:
            self.assertIn(CONNECTED, web.get().text)

    def test_the_password_of_the_url_comes_first(self) -> None:
        with service(POSTGRES_PASSWORD="errada") as web:
            self.assertIn(CONNECTED, web.get().text)

    def test_a_unix_socket_serves_as_well(self) -> None:
        path = FOLDER / "redis.sock"
        other = Redis(FOLDER / "unix", "--unixsocket", str(path))
        other.start()
        self.addCleanup(other.kill)
        url = f"postgresql://postgres:{quote(PASSWORD, safe='')}@/postgres?host={db.folder}&port={db.port}"
        with service(REDIS_URL=f"unix://{path}", DATABASE_URL=url) as web:
            self.assertEqual(web.get().text, f"Contador: 1\n{CONNECTED}")
            self.assertIn(f"(Redis: {path}, Postgres: {db.folder})", web.lines[0])

    def test_sslmode_require_does_without_nothing_less(self) -> None:
        with service(DATABASE_URL=db.url + "?sslmode=require") as web:
            self.assertIn("Postgres: indisponível (", web.get().text)

    def test_ipv6(self) -> None:
        with service(HOST="::1") as web:
            self.assertIn("http://[::1]:", web.lines[0])
            self.assertEqual(web.get(host="::1").status, 200)

    def test_what_is_wrong_is_said_in_a_phrase(self) -> None:
        refused = f"127.0.0.1:{free_port()}"
        for reason, name, url in (
            ("conexão recusada", "DATABASE_URL", f"postgresql://postgres:segredo@{refused}/postgres"),
            ("host não encontrado", "DATABASE_URL", "postgresql://postgres:segredo@nada.invalid/postgres"),
            ("senha recusada", "DATABASE_URL", f"postgresql://postgres:segredo@127.0.0.1:{db.port}/postgres"),
            ("senha recusada", "DATABASE_URL", f"postgresql://postgres@127.0.0.1:{db.port}/postgres"),
            ("banco inexistente", "DATABASE_URL", db.url + "x"),
            ("conexão recusada", "REDIS_URL", f"redis://:segredo@{refused}/0"),
            ("host não encontrado", "REDIS_URL", "redis://:segredo@nada.invalid/0"),
            ("senha recusada", "REDIS_URL", f"redis://u:segredo@127.0.0.1:{cache.port}/0"),
        ):
            with self.subTest(reason=reason, url=url), service(**{name: url}) as web:
                answer = web.get()
                line = (
                    f"Postgres: indisponível ({reason})"
                    if name == "DATABASE_URL"
                    else f"Contador: indisponível ({reason})"
                )
                self.assertIn(line, answer.text.splitlines())
                self.assertEqual(answer.status, 200 if name == "DATABASE_URL" else 503)
                self.assertEqual(answer.headers["Retry-After"], None if name == "DATABASE_URL" else "1")
                self.assertEqual(web.get("/health").status, 503)
                web.end()
                self.assertNotIn("segredo", answer.text + "".join(web.lines))

    def test_each_server_has_a_reason_of_its_own(self) -> None:
        urls = {
            "REDIS_URL": "redis://nada.invalid/0",
            "DATABASE_URL": f"postgresql://postgres@127.0.0.1:{free_port()}/postgres",
        }
        with service(**urls) as web:
            for name in ("Contador", "Redis"):
                self.assertEqual(
                    web.get("/" if name == "Contador" else "/health").text,
                    f"{name}: indisponível (host não encontrado)\nPostgres: indisponível (conexão recusada)\n",
                )

    def test_what_speaks_another_protocol_is_unavailable(self) -> None:
        swapped = {
            "REDIS_URL": f"redis://127.0.0.1:{db.port}/0",
            "DATABASE_URL": f"postgresql://u:p@127.0.0.1:{cache.port}/x",
        }
        with service(**swapped) as web:
            answer = web.get()
            self.assertEqual(answer.status, 503)
            self.assertRegex(answer.text, r"\AContador: indisponível \(.+\)\nPostgres: indisponível \(.+\)\n\Z")
            self.assertLess(answer.seconds, LIMIT)


class TestFaults(unittest.TestCase):
    """Backends that stop, freeze, refuse or can't be found."""

    def setUp(self) -> None:
        store(None)
        self.web = Service()
        self.addCleanup(self.web.end_once)
        for server in (cache, db):
            self.addCleanup(revive, server)
        self.web.get()

    def test_after_a_restart_the_first_request_succeeds(self) -> None:
        with ThreadPoolExecutor(8) as pool:  # so that there are connections that go stale
            list(pool.map(lambda _: self.web.get(), range(100)))
        for server in (cache, db):
            server.stop()
            server.start()
            before = int(stored() or 0)
            for number in range(before + 1, before + 9):
                self.assertEqual(self.web.get().text, f"Contador: {number}\n{CONNECTED}")

    def test_without_postgres_visits_still_count(self) -> None:
        db.stop()
        for number in (2, 3):
            answer = self.web.get()
            self.assertEqual(
                (answer.status, answer.text), (200, f"Contador: {number}\nPostgres: indisponível (conexão recusada)\n")
            )
        self.assertEqual(self.web.get("/health").text, "Redis: conectado\nPostgres: indisponível (conexão recusada)\n")
        self.assertEqual(self.web.get("/health").status, 503)
        db.start()
        self.assertEqual(self.web.get().text, f"Contador: 4\n{CONNECTED}")
        self.web.end()
        news = [line for line in self.web.lines if line.startswith("Postgres")]
        self.assertEqual(news, ["Postgres: indisponível (conexão recusada)\n", "Postgres: conectado de novo\n"])

    def test_under_load_postgres_can_go_and_come(self) -> None:
        load = Load(self.web.port)
        self.addCleanup(load.stop)
        load.more(100)
        healthy = load.rate()
        db.stop()
        rate = load.rate()
        db.start()
        started = time.monotonic()
        load.more(1, CONNECTED)
        self.assertLess(time.monotonic() - started, 1)
        self.assertGreater(rate, min(healthy, load.rate()) / 2)  # of before and after: machines get slower, too
        answers = load.stop()
        self.assertEqual(({answer.status for answer in answers}, load.lost), ({200}, []))
        self.assertLess(max(answer.seconds for answer in answers), LIMIT)
        self.assertTrue(all(CONNECTED in answer.text for answer in answers[-50:]))

    def test_without_redis_it_says_so_at_once_and_counts_on_afterwards(self) -> None:
        cache.stop()
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda _: self.web.get(), range(64)))
        for answer in answers:
            self.assertEqual(
                (answer.status, answer.text), (503, f"Contador: indisponível (conexão recusada)\n{CONNECTED}")
            )
            self.assertTrue(answer.headers["Retry-After"])
        self.assertLess(median(answer.seconds for answer in answers), 0.05)
        self.assertEqual(self.web.get("/reset").status, 503)
        self.assertEqual(self.web.get("/reset", "HEAD").status, 503)
        cache.start()
        self.assertEqual(self.web.get().text, f"Contador: 2\n{CONNECTED}")
        self.web.end()
        self.assertEqual(sum(line.startswith("Redis") for line in self.web.lines), 2)

    def test_frozen_backends_hold_nobody_up_and_no_visit_counts_twice(self) -> None:
        names = (("Contador", cache), ("Postgres", db))
        for frozen in ([db], [cache], [cache, db]):
            with self.subTest(frozen=[type(server).__name__ for server in frozen]):
                before = int(stored() or 0)
                load = Load(self.web.port)
                self.addCleanup(load.stop)
                load.more(100)
                healthy = load.rate()
                for server in frozen:
                    server.signal(signal.SIGSTOP)
                lines = [f"{name}: indisponível .tempo esgotado.\n" for name, server in names if server in frozen]
                load.more(1, "".join(lines))  # all that is frozen has been noticed
                rate = load.rate()
                for server in frozen:
                    server.signal(signal.SIGCONT)
                load.more(50, rf"Contador: \d+\n{CONNECTED}")
                healthy = min(healthy, load.rate())
                answers = load.stop()
                self.assertEqual(load.lost, [])
                self.assertLess(max(answer.seconds for answer in answers), LIMIT)
                self.assertGreater(rate, healthy / 2)
                numbers = [answer.number for answer in answers if answer.status == 200]
                self.assertEqual(len(set(numbers)), len(numbers))
                for name, server in names:
                    noticed = any(f"{name}: indisponível (tempo esgotado)\n" in answer.text for answer in answers)
                    self.assertEqual(noticed, server in frozen)
                self.assertEqual({answer.status for answer in answers}, {200, 503} if cache in frozen else {200})
                self.assertLessEqual(len(numbers), int(stored() or 0) - before)
                self.assertLessEqual(int(stored() or 0) - before, load.sent)

    def test_addresses_that_swallow_packets_hold_nobody_up(self) -> None:
        with full_backlog() as port:
            nowhere = {
                "REDIS_URL": f"redis://127.0.0.1:{port}/0",
                "DATABASE_URL": f"postgresql://u:p@127.0.0.1:{port}/x",
            }
            for names in (["REDIS_URL"], ["DATABASE_URL"], ["REDIS_URL", "DATABASE_URL"]):
                with self.subTest(names=names), service(**{name: nowhere[name] for name in names}) as web:
                    with ThreadPoolExecutor(8) as pool:
                        answers = list(pool.map(lambda _: web.get(), range(64)))
                    self.assertLess(max(answer.seconds for answer in answers), LIMIT)
                    self.assertEqual({answer.status for answer in answers}, {503 if "REDIS_URL" in names else 200})
                    self.assertTrue(all("indisponível (tempo esgotado)" in answer.text for answer in answers))

    def test_a_slow_resolver_holds_nobody_up(self) -> None:
        urls = {"REDIS_URL": "redis://lento:1/0", "DATABASE_URL": "postgresql://u:p@lento:1/x"}
        for names in (["DATABASE_URL"], ["REDIS_URL", "DATABASE_URL"]):
            with service(program=slow_to_find("lento", 5), **{name: urls[name] for name in names}) as web:
                with ThreadPoolExecutor(8) as pool:
                    answers = list(pool.map(lambda _: web.get(), range(64)))
                self.assertLess(max(answer.seconds for answer in answers), LIMIT)
                self.assertTrue(all("indisponível (tempo esgotado)" in answer.text for answer in answers))
                self.assertLess(len(os.listdir(f"/proc/{web.process.pid}/task")) if sys.platform == "linux" else 0, 20)

    def test_a_connection_that_comes_late_serves_later(self) -> None:
        url = f"redis://localhost:{cache.port}/0"
        with service(program=slow_to_find("localhost", 0.7), REDIS_URL=url) as web:
            self.assertEqual(web.get().text, f"Contador: indisponível (tempo esgotado)\n{CONNECTED}")
            time.sleep(1)  # until it is surely there: nothing outside shows it
            cache.stop()  # and has gone again, unused
            cache.start()
            self.assertEqual(web.get().status, 503)  # the next one takes as long
            eventually(lambda: web.get().text == f"Contador: 2\n{CONNECTED}")

    def test_redis_out_of_memory_is_told_and_passes(self) -> None:
        with redis.Redis(port=cache.port) as client:
            client.config_set("maxmemory", "1")
            self.addCleanup(lambda: redis.Redis(port=cache.port).config_set("maxmemory", "0"))
            answer = self.web.get()
            self.assertEqual(
                (answer.status, answer.text), (503, f"Contador: indisponível (memória do Redis esgotada)\n{CONNECTED}")
            )
            self.assertTrue(answer.headers["Retry-After"])
            client.config_set("maxmemory", "0")
        self.assertEqual(self.web.get().number, 2)

    def test_redis_without_a_disk_is_told_and_passes(self) -> None:
        (cache.folder / "dump.rdb").mkdir()  # where the snapshot should go
        with redis.Redis(port=cache.port) as client:
            client.config_set("save", "3600 1")
            client.bgsave()
            eventually(lambda: client.info("persistence")["rdb_last_bgsave_status"] == "err")
            answer = self.web.get()
            self.assertEqual(
                (answer.status, answer.text.splitlines()[0]),
                (503, "Contador: indisponível (o Redis não consegue gravar em disco)"),
            )
            (cache.folder / "dump.rdb").rmdir()
            client.bgsave()
            eventually(lambda: client.info("persistence")["rdb_last_bgsave_status"] == "ok")
            client.config_set("save", "")
        self.assertEqual(self.web.get().number, 2)

    @unittest.skipUnless(hasattr(resource, "prlimit"), "only Linux can take a running server's disk away")
    def test_a_full_disk_is_told_and_passes(self) -> None:
        other = Redis(FOLDER / "full")
        other.command = ["sh", "-c", 'trap "" XFSZ; exec "$@"', "sh", *other.command]
        other.start()
        self.addCleanup(other.kill)
        assert other.process
        with service(REDIS_URL=other.url) as web:
            self.assertEqual(web.get().number, 1)
            time.sleep(1.1)  # a write that meets the fsync of each second is put off, and its failure comes later
            with redis.Redis(port=other.port) as client:
                eventually(lambda: client.info("persistence")["aof_pending_bio_fsync"] == 0)
            resource.prlimit(other.process.pid, resource.RLIMIT_FSIZE, (1, resource.RLIM_INFINITY))
            self.assertEqual(web.get().number, 2)  # the last that Redis takes: it can't write it yet
            answer = web.get()
            self.assertEqual(
                (answer.status, answer.text),
                (503, f"Contador: indisponível (o Redis não consegue gravar em disco)\n{CONNECTED}"),
            )
            resource.prlimit(other.process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            eventually(lambda: web.get().status == 200)
            self.assertEqual(web.get().number, 4)

    def test_kill_9_of_redis_loses_no_answered_visit(self) -> None:
        load = Load(self.web.port)
        self.addCleanup(load.stop)
        load.more(300)
        cache.kill()
        load.more(1, "indisponível")
        cache.start()
        numbers = [answer.number for answer in load.stop() if answer.status == 200]
        self.assertEqual((len(set(numbers)), load.lost), (len(numbers), []))
        self.assertGreaterEqual(int(stored() or 0), max(numbers))


class TestHostile(unittest.TestCase):
    """Requests that no client should send, and connections that send none."""

    web: Service

    @classmethod
    def setUpClass(cls) -> None:
        cls.web = Service()
        cls.addClassCleanup(cls.web.end_once)

    def test_malformed_requests_get_a_short_answer_and_count_nothing(self) -> None:
        store("7")
        host = b" HTTP/1.1\r\nHost: a\r\n"
        for status, data in (
            (400, b"GET\r\n\r\n"),
            (400, b"GET /\r\n\r\n"),
            (400, b"GET /\r\nHost: a\r\n\r\n"),
            (400, b"GET / HTTP/1.1\r\n\r\n"),
            (400, b"GET / HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n"),
            (400, b"GET / HTTP/1.1\r\nHost: \r\nHost: a\r\n\r\n"),
            (400, b"GET / HTTP/0.9\r\nHost: a\r\n\r\n"),
            (400, b"GET / HTTP/2.0\r\nHost: a\r\n\r\n"),
            (400, b"GET / HTTP/1.2\r\nHost: a\r\n\r\n"),
            (400, b"GET /\x00 HTTP/1.1\r\nHost\r\n\r\n"),
            (400, b"get /" + host + b"\r\n"),
            (400, b"GET http://[" + host + b"\r\n"),
            (400, b"GET /" + host + b"A: b\r\n c: d\nE\r\n\r\n"),
            (400, b"POST /" + host + b"Content-Length: -1\r\n\r\n"),
            (400, b"POST /" + host + b"Content-Length: " + b"9" * 5000 + b"\r\n\r\n"),
            (400, b"POST /" + host + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n"),
            (501, b"POST /" + host + b"Transfer-Encoding: gzip\r\n\r\n"),
            (431, b"GET /" + host + b"A: " + b"a" * 20000 + b"\r\n\r\n"),
            (413, b"POST /" + host + b"Content-Length: 99999999\r\n\r\n"),
            (413, b"POST /" + host + b"Content-Length: 99999999\r\nExpect: 100-continue\r\n\r\n"),
            (400, b"GET /\xff\xfe" + host + b"\r\n"),
        ):
            with self.subTest(data=data[:60]):
                head, _, body = self.web.raw(data).partition(b"\r\n\r\n")
                self.assertEqual(head.split(b" ")[1], b"%d" % status)
                self.assertLess(len(body), 200)
                self.assertNotRegex((head + body).decode(), "(?i)python|waitress|traceback|sys\\.|int\\(")
                self.assertIn(b"Content-Length: %d" % len(body), head.split(b"\r\n"))
        self.assertEqual(stored(), b"7")
        for data in (
            b"GET / HTTP/1.0\r\n\r\n",
            b"GET /" + host + b"\r\n",
            b"GET / HTTP/1.1\r\nHost:\r\n\r\n",
            b"GET /" + host + b"Expect: 100-continue\r\n\r\n",
        ):
            self.assertIn(b" 200 OK\r\n", self.web.raw(data))
        self.assertEqual(stored(), b"11")

    def test_a_body_that_waits_for_a_sign_gets_it(self) -> None:
        with self.web.connect() as connection:
            connection.sendall(b"PUT / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\nExpect: 100-continue\r\n\r\n")
            self.assertTrue(connection.recv(1000).startswith(b"HTTP/1.1 100 Continue\r\n"))
            connection.sendall(b"abc")
            self.assertTrue(connection.recv(1000).startswith(b"HTTP/1.1 405 "))

    def test_generated_requests_leave_it_well(self) -> None:
        store(None)
        words = st.sampled_from(
            b"GET|POST|HEAD| |/|/reset|//|http://[|HTTP/1.1|HTTP/9|\r\n|\n|\r|\0|%|:|\xff|Host: a|Content-Length: |5|"
            b"Transfer-Encoding: chunked|Expect: 100-continue".split(b"|")
        )
        requests = st.lists(words | st.binary(max_size=8), max_size=24).map(b"".join)

        @settings(max_examples=int(os.environ.get("HOSTILE", "400")), deadline=None, database=None)
        @given(requests)
        def send(data: bytes) -> None:
            answer = self.web.raw(data)
            self.assertNotIn(b"Traceback", answer)
            if answer:
                self.assertRegex(answer, rb"\AHTTP/1\.[01] [1-5]\d\d ")

        send()
        store(None)
        self.assertEqual([self.web.get().number for _ in range(3)], [1, 2, 3])
        self.assertFalse([line for line in self.web.lines if "Traceback" in line or "Error" in line.split('"')[0]])

    def test_idle_and_half_sent_connections_lock_nobody_out(self) -> None:
        held = []
        for number in range(1000):
            connection = self.web.connect()
            self.addCleanup(connection.close)
            connection.sendall(b"GET / HTT" if number % 2 else b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n")
            held.append(connection)
        for connection in held[::2]:
            self.assertIn(b"200 OK", connection.recv(1000))
        self.assertLess(median(self.web.get().seconds for _ in range(50)), 0.1)

    def test_pipelined_requests_are_all_answered_in_order(self) -> None:
        store(None)
        answer = self.web.raw(VISIT * 20)
        self.assertEqual(re.findall(rb"Contador: (\d+)", answer), [b"%d" % number for number in range(1, 21)])


class TestLogAndStop(unittest.TestCase):
    """What it prints, and how it ends."""

    def test_a_line_per_request(self) -> None:
        with service() as web:
            web.get()
            web.get("/nada")
            web.get("/health")
            web.get(method="HEAD")
            web.raw(b'GET /"\\ HTTP/1.1\r\nHost: a\r\n\r\n')
            web.raw(b"GET /\x1b[2J HTTP/1.1\r\nHost: a\r\n\r\n")
            web.raw(b"GET /\r127.0.0.1 HTTP/1.1\r\nHost: a\r\n\r\n")  # malformed: no line
            web.end()
        found = [
            re.fullmatch(r'127\.0\.0\.1 - - \[(.+)\] "(.*)" (\d+) (\d+|-) \d+\.\d ms\n', line) for line in web.lines[1:]
        ]
        self.assertTrue(all(found), web.lines)
        self.assertEqual(
            [match.group(2, 3) for match in found if match],
            [
                ("GET / HTTP/1.1", "200"),
                ("GET /nada HTTP/1.1", "404"),
                ("HEAD / HTTP/1.1", "200"),
                ('GET /\\"\\\\ HTTP/1.1', "404"),
                (r"GET /\x1b[2J HTTP/1.1", "404"),
            ],
        )
        for match in found:
            time.strptime(match[1] if match else "", "%d/%b/%Y:%H:%M:%S %z")

    def test_a_defect_is_told_to_the_log_and_not_to_the_client(self) -> None:
        program = "import server\nserver.ROUTES['/defeito'] = lambda batch, head: 1 / 0\nserver.main()\n"
        with service(program=[sys.executable, "-c", program], PYTHONPATH=str(HERE)) as web:
            for _ in range(2):
                answer = web.get("/defeito")
                self.assertEqual(answer.status, 500)
                self.assertNotRegex(answer.text, "(?i)python|waitress|traceback|ZeroDivision")
            self.assertEqual(web.get().status, 200)
            web.end()
        self.assertEqual(sum("ZeroDivisionError" in line for line in web.lines), 2)

    def test_a_failing_health_check_is_logged(self) -> None:
        with service(REDIS_URL=f"redis://127.0.0.1:{free_port()}/0") as web:
            web.get("/health")
            web.end()
        self.assertIn('"GET /health HTTP/1.1" 503', web.lines[-1])

    def test_the_access_log_can_be_left_out(self) -> None:
        with service(ACCESS_LOG="0") as web:
            web.get()
            web.end()
        self.assertEqual(len(web.lines), 1)

    def test_a_log_that_cannot_be_written_stops_nothing(self) -> None:
        read, write = os.pipe()
        os.close(read)
        logs = {"closed pipe": write}
        if os.path.exists("/dev/full"):
            logs["full disk"] = os.open("/dev/full", os.O_WRONLY)
        for name, log in logs.items():
            with self.subTest(name):
                port = free_port()
                program = subprocess.Popen(
                    [sys.executable, HERE / "server.py"],
                    env=os.environ | {"REDIS_URL": cache.url, "DATABASE_URL": db.url, "PORT": str(port)},
                    stdout=log,
                    stderr=subprocess.DEVNULL,
                )
                os.close(log)
                eventually(partial(listens, port))
                self.assertEqual([Answer(port).status for _ in range(3)], [200] * 3)
                program.send_signal(signal.SIGTERM)
                status = program.wait(5)
                self.assertIn(status, (0, 120))  # 120: Python tells that the last lines are lost (see its sys.exit)

    def test_it_ends_at_once_when_idle(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            with service() as web, web.connect() as idle:
                web.get()
                started = time.monotonic()
                web.end(number)
                self.assertLess(time.monotonic() - started, 1)
                self.assertEqual(idle.recv(10), b"")
            self.assertNotIn("Traceback", "".join(web.lines))

    def test_a_request_in_progress_gets_its_answer(self) -> None:
        self.addCleanup(cache.signal, signal.SIGCONT)
        with service() as web, ThreadPoolExecutor(1) as pool:
            web.get()
            cache.signal(signal.SIGSTOP)
            answer = pool.submit(web.get)
            time.sleep(0.1)  # until the request is surely there: nothing outside shows it
            web.end()
            self.assertEqual((answer.result().status, answer.result().headers["Connection"]), (503, "close"))

    def test_a_last_request_is_answered_though_another_takes_all_the_time(self) -> None:
        self.addCleanup(cache.signal, signal.SIGCONT)
        with service() as web:
            first, second = (web.connect() for _ in range(2))
            web.get()
            cache.signal(signal.SIGSTOP)
            web.process.send_signal(signal.SIGTERM)
            with first, second:
                time.sleep(0.05)  # until it has surely begun to stop
                first.sendall(VISIT)
                time.sleep(0.2)  # while the first is waited for, and within the time for a last request
                second.sendall(VISIT)
                received = [read_all(each) for each in (first, second)]
            web.end(0)  # SIGTERM has been sent
        self.assertEqual([text.split(b" ")[1] for text in received], [b"503"] * 2)

    def test_what_was_read_and_what_waits_in_the_backlog_is_answered(self) -> None:
        store(None)
        with service() as web:
            pipelined = web.connect()
            idle = web.connect()
            web.get("/health")
            web.freeze()
            pipelined.sendall(VISIT * 5)
            backlog = [web.connect() for _ in range(20)]
            for connection in backlog:
                connection.sendall(VISIT)
            web.process.send_signal(signal.SIGTERM)
            web.process.send_signal(signal.SIGCONT)
            time.sleep(0.1)  # a last request, within the time for one
            idle.sendall(VISIT)
            received = [read_all(connection) for connection in [pipelined, idle, *backlog]]
            for connection in [pipelined, idle, *backlog]:
                connection.close()
            web.end(0)  # SIGTERM has been sent
        self.assertEqual([text.count(b"Contador: ") for text in received], [5] + [1] * 21)
        self.assertEqual([text.count(b"Connection: close\r\n") for text in received], [1] * 22)
        self.assertEqual(stored(), b"26")

    def test_under_load_every_accepted_request_gets_a_whole_answer(self) -> None:
        store(None)
        with service() as web:
            load = Load(web.port)
            self.addCleanup(load.stop)
            load.more(200)
            started = time.monotonic()
            web.end()
            self.assertLess(time.monotonic() - started, 2)
            answers = load.stop()
        # Reset, if it came between the last that was accepted and the end of the listener.
        self.assertLessEqual({type(error) for error in load.lost}, {ConnectionRefusedError, ConnectionResetError})
        self.assertEqual(sorted(answer.number for answer in answers), list(range(1, int(stored() or 0) + 1)))


class TestRun(unittest.TestCase):
    """``make run``: three servers with one command, and the counter kept."""

    def test_it_serves_stops_together_and_counts_on(self) -> None:
        folder = FOLDER / "checkout"
        (folder / "tools").mkdir(parents=True)
        for module in ("server.py", "tools/servers.py"):
            shutil.copy(HERE / module, folder / module)
        folder.chmod(0o700)
        for number, stop in ((1, signal.SIGTERM), (2, signal.SIGINT)):
            environment = {
                name: value for name, value in os.environ.items() if name not in ("REDIS_URL", "DATABASE_URL")
            }
            port = free_port()
            program = subprocess.Popen(
                [sys.executable, folder / "tools/servers.py"],
                env=environment | {"PORT": str(port)},
                stdout=subprocess.PIPE,
                text=True,
            )
            with program:
                assert program.stdout
                self.assertIn(f"Escutando em http://127.0.0.1:{port}", program.stdout.readline())
                self.assertEqual(Answer(port).text, f"Contador: {number}\n{CONNECTED}")
                second = subprocess.run(
                    [sys.executable, folder / "tools/servers.py"],
                    env=environment | {"PORT": str(port)},
                    capture_output=True,
                    text=True,
                    timeout=10,
                )
                self.assertEqual(second.returncode, 2)
                self.assertIn(f"A porta {port} não está livre", second.stdout)
                program.send_signal(stop)
                self.assertEqual(program.wait(10), 0)
        running = subprocess.run(["ps", "-A", "-o", "args"], capture_output=True, text=True).stdout
        self.assertNotIn(str(folder), running)


if __name__ == "__main__":
    unittest.main()
