"""The promises of the README, each kept before real servers."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
import unittest
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from functools import partial
from urllib.parse import quote

from hypothesis import given, settings
from hypothesis import strategies as st

from contador import backends
from contador.settings import contents_of, port_number, yes_or_no
from tools.fakes import FakeRedis
from tools.harness import (
    CONNECTED,
    LIMIT,
    PASSWORD,
    SECONDS,
    VISIT,
    Load,
    Service,
    commands,
    eventually,
    listens,
    numbers_in,
    read_all,
    refusing_port,
    run_python,
    run_server,
    servers,
    service,
    slow_redis,
    slow_to_find,
    store,
    stored,
    with_limits,
)
from tools.servers import HERE, Redis, free_port


def setUpModule() -> None:
    servers.start()


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
        numbers = ("1_000", " 5", "+5", "007", "1.5", str(2**63 - 1), str(2**63))
        for value in ("abc", "", *numbers, ["lista"]):
            with self.subTest(value=value):
                store(value)
                answer = self.web.get()
                self.assertEqual(answer.status, 500)
                self.assertRegex(answer.text, r"\A[^\n]*/reset[^\n]*\n\Z")
                head = self.web.get(method="HEAD")
                self.assertEqual(head.status, 500)
                self.assertEqual(head.headers["Content-Length"], answer.headers["Content-Length"])

    def test_the_last_number_can_be_reached(self) -> None:
        store(str(2**63 - 2))
        self.check("/", 200, f"Contador: {2**63 - 1}\n{CONNECTED}")

    def test_health_counts_nothing(self) -> None:
        self.check("/health", 200, f"Redis: conectado\n{CONNECTED}")
        self.assertEqual(stored(), None)

    def test_head_is_get_without_body_and_counts_nothing(self) -> None:
        for value in ("0", "9", "99"):
            store(value)
            for path in ("/", "/reset", "/health", "/nada"):
                head = self.web.get(path, "HEAD")
                self.assertEqual((head.text, stored()), ("", value.encode()))
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
            self.check(
                path,
                404,
                "Não encontrado. Use / (conta uma visita), /reset (volta a 0) ou /health\n",
            )
        self.assertEqual(stored(), None)

    def test_a_request_may_name_the_whole_address(self) -> None:  # RFC 9112, 3.2.2
        for number, address in enumerate((b"http://a", b"http://a/", b"http://a?utm=x"), 1):
            received = self.web.raw(b"GET " + address + b" HTTP/1.1\r\nHost: a\r\n\r\n")
            self.assertIn(b"Contador: %d\n" % number, received)

    def test_a_thousand_visits_from_16_threads_give_1_to_1000(self) -> None:
        with ThreadPoolExecutor(16) as pool:
            numbers = list(pool.map(lambda _: self.web.get().number, range(1000)))
        self.assertEqual(sorted(numbers), list(range(1, 1001)))

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
            (self.web.connect(), request, status)
            for request, (count, status) in requests.items()
            for _ in range(count)
        ]
        for connection, _, _ in clients:
            self.addCleanup(connection.close)
        self.web.get("/health")  # after all connections were accepted
        before = commands("incrby")
        self.web.freeze()
        for connection, request, _ in clients:
            connection.sendall(request)
        gone.sendall(VISIT)
        # Its end is a reset. It may be counted, as nothing tells that it has gone.
        gone.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        gone.close()
        self.web.thaw()
        numbers = []
        for connection, request, status in clients:
            received = connection.recv(65536)
            self.assertEqual(int(received.split(b" ")[1]), status, request[:60])
            numbers += numbers_in(received)
        self.assertEqual((len(set(numbers)), len(numbers)), (15, 15))
        self.assertEqual(commands("incrby") - before, 1)
        self.assertIn(stored(), (b"15", b"16"))
        self.assertTrue(set(numbers) <= set(range(1, int(stored() or 0) + 1)))
        self.web.get()
        self.assertEqual(commands("incrby") - before, 2)

    def test_a_batch_in_which_redis_fails_answers_503_to_each(self) -> None:
        self.addCleanup(servers.cache.signal, signal.SIGCONT)
        clients = [self.web.connect() for _ in range(9)]
        for connection in clients:
            self.addCleanup(connection.close)
        self.web.get("/health")
        servers.cache.signal(signal.SIGSTOP)
        self.web.freeze()
        for connection in clients:
            connection.sendall(VISIT)
        self.web.thaw()
        for connection in clients:
            self.assertIn(
                "indisponível (tempo esgotado)\n" + CONNECTED, connection.recv(65536).decode()
            )
        servers.cache.signal(signal.SIGCONT)
        eventually(lambda: self.web.get("/health").status == 200)
        self.assertIn(stored(), (None, b"9"))  # sent once: Redis may carry it out when it goes on


OTHER_SERVERS = {
    "waitress, 8 threads": (
        "import waitress\nwaitress.serve(app, listen=f'127.0.0.1:{port}', threads=8)"
    ),
    "wsgiref, threaded and validated": (
        "from socketserver import ThreadingMixIn\n"
        "from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server\n"
        "from wsgiref.validate import validator\n"
        "WSGIRequestHandler.log_message = lambda *_: None\n"
        "class Server(ThreadingMixIn, WSGIServer): request_queue_size = 100\n"
        "make_server('127.0.0.1', port, validator(app), Server).serve_forever()"
    ),
}


class TestOtherServers(unittest.TestCase):
    """``server.app`` is a WSGI application (PEP 3333), which others can serve."""

    def test_under_other_servers_it_keeps_to_wsgi_and_the_count_is_exact(self) -> None:
        for name, program in OTHER_SERVERS.items():
            with self.subTest(name):
                self.check_under(program)

    def check_under(self, program: str) -> None:
        store(None)
        port = free_port()
        line = f"Escutando em http://:{port} (Redis: , Postgres: )"
        start = f"from server import app; port = {port}; print({line!r}, flush=True)\n"
        command = [sys.executable, "-c", start + program]
        with service() as ours, service(program=command) as other:
            eventually(partial(listens, port))
            with ThreadPoolExecutor(16) as pool:
                answers = list(pool.map(lambda _: other.get(), range(400)))
            self.assertEqual(sorted(answer.number for answer in answers), list(range(1, 401)))
            states = {answer.text.splitlines()[1] for answer in answers}
            self.assertEqual(states, {CONNECTED.strip()})
            for method in ("GET", "HEAD", "POST"):
                for path in ("/", "/reset", "/health", "/nada"):
                    answer, usual = other.get(path, method), ours.get(path, method)
                    self.assertEqual(
                        (answer.status, bool(answer.text)), (usual.status, method != "HEAD")
                    )
                    self.assertEqual(answer.headers["Content-Type"], usual.headers["Content-Type"])
            other.end(signal.SIGKILL)

    def test_it_asks_for_nothing_that_wsgi_does_not_promise(self) -> None:
        store(None)
        done = run_python(
            "from wsgiref.util import setup_testing_defaults\n"
            "from server import app\n"
            "environ = {}\n"
            "setup_testing_defaults(environ)\n"
            "del environ['PATH_INFO']\n"
            "print(b''.join(app(environ, lambda status, headers: None)).decode(), end='')"
        )
        self.assertEqual((done.stdout, done.stderr), (f"Contador: 1\n{CONNECTED}", ""))

    def test_front_serves_other_applications_in_parts_too(self) -> None:
        program = (
            "from signal import SIGTERM, signal\n"
            "from contador.front import Front\n"
            "def app(environ, start_response):\n"
            "    start_response('200 OK', [('Content-Length', '6')])\n"
            "    return [b'uma', b'', b'dez']\n"
            "front = Front('127.0.0.1', 0, app, list, False)\n"
            "signal(SIGTERM, front.stop)\n"
            "print(f'Escutando em {front.url} (Redis: , Postgres: )', flush=True)\n"
            "front.serve()\n"
        )
        with service(program=[sys.executable, "-c", program]) as web:
            self.assertEqual([web.get().text for _ in range(2)], ["umadez"] * 2)


BAD_VALUES: dict[str, tuple[Callable[[str], object], list[str]]] = {
    "REDIS_URL": (
        backends.Redis,
        [
            "redis://:segredo@cache:port/0",
            "redis://cache/0?segredo=1",
            "redis://:12#segredo@cache:6379/0",
            "redis://cache/1x",
            "http://cache",
            "cache:6379",
        ],
    ),
    "DATABASE_URL": (
        partial(backends.Postgres, password="segredo"),
        [
            "postgresql://u:segredo@db:x/y",
            "postgresql://u:p@segredo#x/w@db/y",
            "postgresql://db/x?sslmode=segredo",
            "postgresql://db/x?segredo=1",
            "postgresql://db/x?segredo",
            "postgresql://db/x?sslmode=verify-full&sslrootcert=/nada",
            "postgresql://db/x?sslrootcert=/nada",
            "mysql://db/x",
            "db",
        ],
    ),
    "PORT": (port_number, ["x", "-1", "65536", "5e3"]),
    "ACCESS_LOG": (yes_or_no, ["sim", "2"]),
    "POSTGRES_PASSWORD_FILE": (contents_of, ["/nada/segredo", os.devnull]),
}


class TestSettings(unittest.TestCase):
    """The variables: what they mean, and how a bad one is told."""

    def refused(self, pattern: str, **environment: str) -> None:
        done = run_server(**environment)
        self.assertEqual(done.returncode, 2, environment)
        self.assertRegex(done.stderr, rf"\A{pattern}\n\Z")
        self.assertNotIn("segredo", done.stderr + done.stdout)

    def test_a_bad_value_is_one_line_and_status_2(self) -> None:
        for name, (parse, values) in BAD_VALUES.items():
            pattern = rf"{name}: valor inválido; esperado: [^\n]+"
            self.refused(pattern, **{name: values[0]})
            for value in values[1:]:
                errors = (ValueError, TypeError, OSError)
                with self.subTest(name=name, value=value), self.assertRaises(errors):
                    parse(value)

    def test_a_port_in_use_is_told(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = str(taken.getsockname()[1])
            self.refused(r"HOST, PORT: [^\n]+ já está em uso", PORT=port)

    def test_a_host_that_is_none_is_told(self) -> None:
        for host, reason in (
            ("..", "host não encontrado"),
            ("a" * 64, "host não encontrado"),
            ("192.0.2.1", "o endereço não é deste computador"),  # nobody's (RFC 5737)
        ):
            place = rf"{re.escape(host)}, porta \d+"
            self.refused(rf"HOST, PORT: não foi possível escutar em {place}: {reason}", HOST=host)

    def test_who_imports_it_gets_an_exception_that_says_which_setting_is_bad(self) -> None:
        program = (
            "from contador.settings import BadSetting\n"
            "try:\n"
            "    import server\n"
            "except BadSetting as error:\n"
            "    print(error)\n"
        )
        done = run_python(program, DATABASE_URL="segredo")
        self.assertRegex(done.stdout, r"\ADATABASE_URL: valor inválido; esperado: .+\n\Z")
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        done = run_python("import server", PORT="segredo")
        self.assertIn("BadSetting: PORT: valor inválido", done.stderr)
        self.assertNotIn("segredo", done.stderr)

    def test_python_has_nothing_to_warn_of(self) -> None:
        with service(program=[sys.executable, "-W", "error", HERE / "server.py"]) as web:
            self.assertEqual(web.get().status, 200)

    def test_an_empty_variable_is_an_absent_one(self) -> None:
        with service(ACCESS_LOG="", POSTGRES_PASSWORD="") as web:
            self.assertEqual(web.get().status, 200)
            web.end()
        self.assertIn('"GET / HTTP/1.1" 200', web.lines[-1])

    def test_any_password_works_as_it_is(self) -> None:
        url = f"postgresql://postgres@127.0.0.1:{servers.db.port}/postgres"
        with service(DATABASE_URL=url, POSTGRES_PASSWORD=PASSWORD) as web:
            self.assertIn(CONNECTED, web.get().text)

    def test_the_password_of_the_url_comes_first(self) -> None:
        with service(POSTGRES_PASSWORD="errada") as web:
            self.assertIn(CONNECTED, web.get().text)

    def test_a_unix_socket_serves_as_well(self) -> None:
        path = servers.folder / "redis.sock"
        other = Redis(servers.folder / "unix", "--unixsocket", str(path))
        other.start()
        self.addCleanup(other.kill)
        password = quote(PASSWORD, safe="")
        sockets = servers.db.socket_folder
        place = f"host={sockets}&port={servers.db.port}"
        url = f"postgresql://postgres:{password}@/postgres?{place}"
        with service(REDIS_URL=f"unix://{path}", DATABASE_URL=url) as web:
            self.assertEqual(web.get().text, f"Contador: 1\n{CONNECTED}")
            self.assertIn(f"(Redis: {path}, Postgres: {sockets})", web.lines[0])

    def test_sslmode_require_does_without_nothing_less(self) -> None:
        with service(DATABASE_URL=servers.db.url + "?sslmode=require") as web:
            self.assertIn("Postgres: indisponível (o Postgres não aceita TLS)\n", web.get().text)

    def test_ipv6(self) -> None:
        with service(HOST="::1") as web:
            self.assertIn("http://[::1]:", web.lines[0])
            self.assertEqual(web.get(host="::1").status, 200)

    def test_a_password_is_never_said(self) -> None:
        refused = f"127.0.0.1:{self.enterContext(refusing_port())}"
        for redis_url, database_url, reason in (
            (
                f"redis://:segredo@{refused}/0",
                f"postgresql://postgres:segredo@{refused}/postgres",
                "conexão recusada",
            ),
            (
                f"redis://u:segredo@127.0.0.1:{servers.cache.port}/0",
                f"postgresql://postgres:segredo@127.0.0.1:{servers.db.port}/postgres",
                "senha recusada",
            ),
        ):
            with service(REDIS_URL=redis_url, DATABASE_URL=database_url) as web:
                visit, health = web.get(), web.get("/health")
                web.end()
            lines = f"indisponível ({reason})\nPostgres: indisponível ({reason})\n"
            self.assertEqual((visit.status, visit.text), (503, f"Contador: {lines}"))
            self.assertEqual((health.status, health.text), (503, f"Redis: {lines}"))
            self.assertEqual(
                (visit.headers["Retry-After"], health.headers["Retry-After"]), ("1", "1")
            )
            self.assertNotIn("segredo", "".join(web.lines))

    def test_each_server_has_a_reason_of_its_own(self) -> None:
        refused = f"127.0.0.1:{self.enterContext(refusing_port())}"
        urls = {
            "REDIS_URL": "redis://nada/0",
            "DATABASE_URL": f"postgresql://postgres@{refused}/postgres",
        }
        with service(program=slow_to_find("nada", 0, address=""), **urls) as web:
            for name, path in (("Contador", "/"), ("Redis", "/health")):
                self.assertEqual(
                    web.get(path).text,
                    f"{name}: indisponível (host não encontrado)\n"
                    "Postgres: indisponível (conexão recusada)\n",
                )

    def test_what_speaks_another_protocol_is_unavailable(self) -> None:
        swapped = {
            "REDIS_URL": f"redis://127.0.0.1:{servers.db.port}/0",
            "DATABASE_URL": f"postgresql://u:p@127.0.0.1:{servers.cache.port}/x",
        }
        with service(**swapped) as web:
            answer = web.get()
            self.assertEqual(answer.status, 503)
            self.assertRegex(
                answer.text, r"\AContador: indisponível \(.+\)\nPostgres: indisponível \(.+\)\n\Z"
            )
            self.assertLess(answer.seconds, LIMIT)


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
                self.assertNotRegex(
                    (head + body).decode(), "(?i)python|waitress|traceback|sys\\.|int\\("
                )
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
            connection.sendall(
                b"PUT / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\nExpect: 100-continue\r\n\r\n"
            )
            self.assertTrue(connection.recv(1000).startswith(b"HTTP/1.1 100 Continue\r\n"))
            connection.sendall(b"abc")
            self.assertTrue(connection.recv(1000).startswith(b"HTTP/1.1 405 "))

    def test_generated_requests_leave_it_well(self) -> None:
        store(None)
        words = st.sampled_from(
            b"GET|POST|HEAD| |/|/reset|//|http://[|HTTP/1.1|HTTP/9|\r\n|\n|\r|\0|%|:|\xff|5|"
            b"Host: a|Content-Length: |Transfer-Encoding: chunked|Expect: 100-continue".split(b"|")
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
        self.assertFalse(
            [
                line
                for line in self.web.lines
                if "Traceback" in line or "Error" in line.split('"')[0]
            ]
        )

    def test_beside_a_thousand_idle_and_half_sent_connections_others_are_served(self) -> None:
        held = []
        for number in range(1000):
            connection = self.web.connect()
            self.addCleanup(connection.close)
            connection.sendall(
                b"GET / HTT" if number % 2 else b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n"
            )
            held.append(connection)
        for connection in held[::2]:
            self.assertIn(b"200 OK", connection.recv(1000))
        self.assertEqual(self.web.get().status, 200)

    def test_pipelined_requests_are_all_answered_in_order(self) -> None:
        store(None)
        self.assertEqual(numbers_in(self.web.raw(VISIT * 20)), list(range(1, 21)))

    def test_a_pipelined_request_gets_its_answer_before_the_next_has_one(self) -> None:
        with slow_redis(0.2) as url, service(program=with_limits(), REDIS_URL=url) as web:
            with web.connect() as connection:
                connection.sendall(VISIT * 3)
                first = connection.recv(65536)
            self.assertEqual((first.count(b"HTTP/1.1 200 OK"), first[-1:]), (1, b"\n"))

    def test_a_path_without_a_slash_is_no_path_of_ours(self) -> None:
        store("7")
        for path in (b"reset", b"*", b"health"):
            self.assertEqual(self.status_of(b"GET", path), 404)
        self.assertEqual(stored(), b"7")
        for path in (b"//reset", b"http://a/reset", b"http:/reset"):
            store("7")
            self.assertEqual((self.status_of(b"GET", path), stored()), (200, b"0"))

    def test_a_body_has_a_limit(self) -> None:
        body = b"a" * 65535
        self.assertEqual(self.status_of(b"POST", b"/", b"Content-Length: 65535", body), 405)
        self.assertEqual(self.status_of(b"POST", b"/", b"Content-Length: 65536"), 413)
        chunks = b"f000\r\n" + body[:0xF000] + b"\r\n"
        header = b"Transfer-Encoding: chunked"
        self.assertEqual(self.status_of(b"POST", b"/", header, chunks + b"0\r\n\r\n"), 405)
        # So little too much that all is read: a close before that could take the answer with it.
        more = b"1001\r\n" + body[:0x1001] + b"\r\n"
        self.assertEqual(self.status_of(b"POST", b"/", header, chunks + more), 413)

    def status_of(
        self, method: bytes, path: bytes, header: bytes = b"A: b", body: bytes = b""
    ) -> int:
        """Return the status of the answer to a request."""
        head = method + b" " + path + b" HTTP/1.1\r\nHost: a\r\n" + header + b"\r\n\r\n"
        return int(self.web.raw(head + body).split(b" ")[1])


class TestLog(unittest.TestCase):
    """What it prints."""

    def test_a_line_per_request(self) -> None:
        store(None)
        with service() as web:
            web.get()
            size = str(len(web.get("/nada").text.encode()))
            web.get("/health")
            web.get(method="HEAD")
            web.raw(b'GET /"\\ HTTP/1.1\r\nHost: a\r\n\r\n')
            web.raw(b"GET /\x1b[2J HTTP/1.1\r\nHost: a\r\n\r\n")
            web.raw(b"GET /\r127.0.0.1 HTTP/1.1\r\nHost: a\r\n\r\n")  # malformed: no line
            web.end()
        found = [
            re.fullmatch(r'127\.0\.0\.1 - - \[(.+)\] "(.*)" (\d+) (\d+|-) \d+\.\d ms\n', line)
            for line in web.lines[1:]
        ]
        self.assertTrue(all(found), web.lines)
        self.assertEqual(
            [match.group(2, 3, 4) for match in found if match],
            [
                ("GET / HTTP/1.1", "200", "32"),
                ("GET /nada HTTP/1.1", "404", size),
                ("HEAD / HTTP/1.1", "200", "-"),
                ('GET /\\"\\\\ HTTP/1.1', "404", size),
                (r"GET /\x1b[2J HTTP/1.1", "404", size),
            ],
        )
        for match in found:
            told = datetime.strptime(match[1] if match else "", "%d/%b/%Y:%H:%M:%S %z")
            self.assertLess(abs((datetime.now(UTC) - told).total_seconds()), SECONDS)

    def test_each_line_has_the_time_of_its_request(self) -> None:
        with service() as web:
            web.get()
            time.sleep(1.1)
            web.get()
            web.end()
        times = [re.findall(r"\[(.+)\]", line) for line in web.lines[1:]]
        self.assertEqual(len(times), 2)
        self.assertNotEqual(times[0], times[1])

    def test_a_long_line_is_whole(self) -> None:
        path = "/" + "a" * 10000  # more than is written at once
        with service() as web:
            web.get(path)
            web.end()
        self.assertIn(f'"GET {path} HTTP/1.1" 404', web.lines[-1])

    def test_a_defect_is_told_to_the_log_and_not_to_the_client(self) -> None:
        program = (
            "import server\nserver.ROUTES['/defeito'] = lambda batch, head: 1 / 0\nserver.main()\n"
        )
        with service(program=[sys.executable, "-c", program]) as web:
            for _ in range(2):
                answer = web.get("/defeito")
                self.assertEqual(answer.status, 500)
                self.assertNotRegex(answer.text, "(?i)python|waitress|traceback|ZeroDivision")
            self.assertEqual(web.get().status, 200)
            web.end()
        self.assertEqual(sum("ZeroDivisionError" in line for line in web.lines), 2)

    def test_a_defect_in_the_batch_is_told_likewise(self) -> None:
        program = (
            "import server\n"
            "class Batch(server.Batch):\n"
            "    def __init__(self, requests):\n"
            "        if ('GET', '/defeito') in requests: 1 / 0\n"
            "        super().__init__(requests)\n"
            "server.Batch = Batch\n"
            "server.main()\n"
        )
        with service(program=[sys.executable, "-c", program]) as web:
            self.assertEqual(web.get("/defeito").status, 500)
            self.assertEqual(web.get().status, 200)
            web.end()
        self.assertEqual(sum("ZeroDivisionError" in line for line in web.lines), 1)

    def test_a_failing_health_check_is_logged(self) -> None:
        with refusing_port() as port, service(REDIS_URL=f"redis://127.0.0.1:{port}/0") as web:
            web.get("/health")
            web.end()
        self.assertIn('"GET /health HTTP/1.1" 503', web.lines[-1])

    def test_the_access_log_can_be_left_out(self) -> None:
        with service(ACCESS_LOG="0") as web:
            web.get()
            web.end()
        self.assertEqual(len(web.lines), 1)

    def test_a_log_that_cannot_be_written_stops_nothing(self) -> None:
        closed = os.pipe()
        os.close(closed[0])
        unread = os.pipe()
        self.addCleanup(os.close, unread[0])
        terminal = os.openpty()
        self.addCleanup(os.close, terminal[0])
        logs = {
            "closed pipe": closed[1],
            "a reader who has stopped": unread[1],
            "a terminal that nobody reads": terminal[1],
        }
        if os.path.exists("/dev/full"):
            logs["full disk"] = os.open("/dev/full", os.O_WRONLY)
        for name, log in logs.items():
            self.addCleanup(os.close, log)
            with self.subTest(name):
                self.check_with_log(log)
                self.assertTrue(os.get_blocking(log))  # as it was: others write to it too

    def check_with_log(self, log: int) -> None:
        port = free_port()
        program = subprocess.Popen(
            [sys.executable, HERE / "server.py"],
            env=os.environ | servers.urls() | {"HOST": "127.0.0.1", "PORT": str(port)},
            stdout=log,
            stderr=subprocess.DEVNULL,
        )
        self.addCleanup(program.kill)
        eventually(partial(listens, port))
        with socket.create_connection(("127.0.0.1", port), SECONDS) as connection:
            connection.sendall(VISIT * 1500)  # their lines fit into no pipe and no terminal
            connection.shutdown(socket.SHUT_WR)
            self.assertEqual(len(numbers_in(read_all(connection))), 1500)
        program.send_signal(signal.SIGTERM)
        self.assertEqual(program.wait(SECONDS), 0)


class TestStop(unittest.TestCase):
    """How it ends."""

    def setUp(self) -> None:
        store(None)
        self.fake = FakeRedis()
        self.addCleanup(self.fake.end)

    def test_it_ends_at_once_when_idle(self) -> None:
        program = (
            "import server, time\n"
            "serve = server.Front.serve\n"
            "def timed(front):\n"
            "    serve(front)\n"
            "    print('seconds', time.monotonic() - front.stopped_at, flush=True)\n"
            "server.Front.serve = timed\n"
            "server.main()\n"
        )
        command = [sys.executable, "-c", program]
        for number in (signal.SIGTERM, signal.SIGINT):
            with service(program=command, PYTHONPATH=str(HERE)) as web, web.connect() as idle:
                web.get()
                web.end(number)
                self.assertEqual(idle.recv(10), b"")
            self.assertLess(float(web.lines[-1].removeprefix("seconds ")), 1)
            self.assertNotIn("Traceback", "".join(web.lines))

    def test_a_request_in_progress_gets_its_answer(self) -> None:
        with service(program=with_limits(), REDIS_URL=self.fake.url) as web:
            self.fake.before["INCRBY"] = partial(web.process.send_signal, signal.SIGTERM)
            answer = web.get()
            web.end(0)  # SIGTERM has been sent
        self.assertEqual((answer.number, answer.headers["Connection"]), (1, "close"))

    def test_a_last_request_is_answered_though_another_takes_all_the_time(self) -> None:
        with service(program=with_limits(), REDIS_URL=self.fake.url) as web:
            first, second, third = clients = [web.connect() for _ in range(3)]
            web.get("/health")  # after all connections were accepted

            def stop() -> None:
                web.process.send_signal(signal.SIGTERM)
                second.sendall(VISIT)
                self.fake.before["INCRBY"] = take_all_the_time

            def take_all_the_time() -> None:
                third.sendall(VISIT)
                time.sleep(1)  # longer than it waits for a last request

            self.fake.before["INCRBY"] = stop
            first.sendall(VISIT)
            received = [read_all(each) for each in clients]
            for each in clients:
                each.close()
            web.end(0)  # SIGTERM has been sent
        self.assertEqual([numbers_in(text) for text in received], [[1], [2], [3]])

    def test_what_was_read_and_what_waits_in_the_backlog_is_answered(self) -> None:
        with service(program=with_limits(), REDIS_URL=self.fake.url) as web:
            pipelined = web.connect()
            idle = web.connect()
            web.get("/health")
            web.freeze()
            pipelined.sendall(VISIT * 5)
            backlog = [web.connect() for _ in range(20)]
            for connection in backlog:
                connection.sendall(VISIT)
            self.fake.before["INCRBY"] = partial(idle.sendall, VISIT)  # a last request
            web.process.send_signal(signal.SIGTERM)
            web.thaw()
            received = [read_all(connection) for connection in [pipelined, idle, *backlog]]
            for connection in [pipelined, idle, *backlog]:
                connection.close()
            web.end(0)  # SIGTERM has been sent
        self.assertEqual([text.count(b"Contador: ") for text in received], [5] + [1] * 21)
        self.assertEqual([text.count(b"Connection: close\r\n") for text in received], [1] * 22)
        self.assertEqual(self.fake.number, 26)

    def test_the_stop_has_a_deadline_and_what_was_counted_is_answered(self) -> None:
        with slow_redis(0.2) as url, service(program=with_limits(), REDIS_URL=url) as web:
            with web.connect() as connection:
                connection.sendall(VISIT * 100)
                received = connection.recv(65536)
                web.process.send_signal(signal.SIGTERM)
                started = time.monotonic()
                eventually(lambda: not listens(web.port), seconds=2)  # while it finishes
                self.assertIsNone(web.process.poll())
                received += read_all(connection)
            web.end(0)  # SIGTERM has been sent
            elapsed = time.monotonic() - started
        self.assertLess(elapsed, 8)
        self.assertGreater(elapsed, 5)  # it does not give up early
        numbers = numbers_in(received)
        self.assertEqual(numbers, list(range(1, len(numbers) + 1)))
        self.assertEqual(int(stored() or 0), len(numbers))

    def test_under_load_every_accepted_request_gets_a_whole_answer(self) -> None:
        with service() as web:
            load = Load(web.port)
            self.addCleanup(load.stop)
            load.more(200)
            started = time.monotonic()
            web.end()
            self.assertLess(time.monotonic() - started, 2)
            answers = load.stop()
        # Reset, once a client, if it came between the last accepted and the end of the listener.
        resets = [error for error in load.lost if isinstance(error, ConnectionResetError)]
        self.assertLessEqual(len(resets), 8)
        self.assertLessEqual(
            {type(error) for error in load.lost}, {ConnectionRefusedError, ConnectionResetError}
        )
        self.assertEqual(
            sorted(answer.number for answer in answers), list(range(1, int(stored() or 0) + 1))
        )


if __name__ == "__main__":
    unittest.main()
