"""The promises of the service, each kept before real servers."""

import http.client
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
import unittest
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pg8000.native
from redis.connection import parse_url

from contador import backends
from contador.settings import parse_postgres_url
from tools.harness import PASSWORD, SECONDS, Relay, Service, eventually, servers, settings
from tools.servers import HERE, free_port, listens

KEY = "contador_visitas"
QUESTION = b"Q\0\0\0\5\0"  # to Postgres: an empty query
VISIT = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"
LAST_VISIT = b"GET / HTTP/1.0\r\n\r\n"  # its answer ends with the connection
POST = b"POST / HTTP/1.0\r\nContent-Length: %d\r\n\r\n"
CONNECTED = "Postgres: conectado\n"
LATE = "indisponível (tempo esgotado)"
MAXIMUM = 2**63 - 1  # of what Redis counts


def setUpModule() -> None:
    servers.start()


def numbers_in(*received: bytes) -> list[int]:
    return sorted(int(found) for found in re.findall(rb"Contador: (\d+)", b"".join(received)))


def read_all(connection: socket.socket) -> bytes:
    return b"".join(iter(lambda: connection.recv(65536), b""))


class Case(unittest.TestCase):
    def setUp(self) -> None:
        servers.client.flushdb()

    def tearDown(self) -> None:
        for server in servers.both:
            server.signal(signal.SIGCONT)
            if server.process and server.process.poll() is not None:
                server.start()

    def start(self, code: str = "", **environment: str) -> Service:
        web = Service(code, **environment)
        self.addCleanup(web.end)
        return web

    def change_redis(self, command: str, undo: str) -> None:
        self.addCleanup(servers.client.execute_command, *undo.split(" "))
        servers.client.execute_command(*command.split(" "))

    def connect(self, web: Service, count: int) -> list[socket.socket]:
        clients = [self.enterContext(web.connect()) for _ in range(count)]
        web.get("/health")  # this one was accepted after them
        return clients


class TestAnswers(Case):
    def setUp(self) -> None:
        super().setUp()
        self.web = self.start()

    def check(self, path: str, status: int, text: str, method: str = "GET", **more: str) -> None:
        answer = self.web.get(path, method)
        self.assertEqual((answer.status, answer.text), (status, text))
        headers = {
            "Content-Type": "text/plain; charset=utf-8",
            "Content-Length": str(len(text.encode())),
            "Cache-Control": "no-store",
            "X-Content-Type-Options": "nosniff",
            **more,
        }
        self.assertEqual({name: answer.headers[name] for name in headers}, headers)

    def test_each_visit_counts_one(self) -> None:
        for number, path in enumerate(("/", "/?utm=x", "//", "http://a", "http://a//?b"), 1):
            self.check("/health", 200, f"Redis: conectado\n{CONNECTED}")  # counts nothing
            self.check(path, 200, f"Contador: {number}\n{CONNECTED}")

    def test_reset_makes_the_next_visit_the_first(self) -> None:
        servers.client.rpush(KEY, "lista")
        self.assertEqual((self.web.get().status, self.web.get("//reset").status), (500, 200))
        for value in ("41", "abc", str(MAXIMUM)):
            servers.client.set(KEY, value)
            self.check("/reset", 200, "Contador: 0\n")
            self.check("/", 200, f"Contador: 1\n{CONNECTED}")

    def test_a_value_that_cannot_be_counted_on_is_500_and_names_reset(self) -> None:
        servers.client.set(KEY, MAXIMUM - 1)
        self.check("/", 200, f"Contador: {MAXIMUM}\n{CONNECTED}")  # the last number
        for value in (MAXIMUM, MAXIMUM + 1, "abc", "", "1.5", " 5"):
            servers.client.set(KEY, value)
            answer, head = self.web.get(), self.web.get(method="HEAD")
            self.assertRegex(answer.text, rf"\AContador: [^\n]*use /reset[^\n]*\n{CONNECTED}\Z")
            self.assertEqual((answer.status, head.status), (500, 500))
            self.assertEqual(head.headers["Content-Length"], answer.headers["Content-Length"])
            self.check("/health", 503, answer.text)
            self.assertEqual(self.web.get("/reset", "HEAD").status, 200)

    def test_head_is_get_without_body_and_changes_nothing(self) -> None:
        for value in ("0", "9", "99"):
            for path in ("/", "/reset", "/health", "/nada"):
                servers.client.set(KEY, value)
                head = self.web.get(path, "HEAD")
                self.assertEqual((head.text, servers.client.get(KEY)), ("", value.encode()))
                get = self.web.get(path)
                self.assertEqual(head.status, get.status)
                self.assertEqual(head.headers["Content-Length"], get.headers["Content-Length"])

    def test_other_methods_and_paths_are_refused_in_one_line(self) -> None:
        for path in ("/", "/reset", "/health"):
            for method in ("POST", "DELETE", "OPTIONS"):
                text = "Método não permitido: use GET\n"
                self.check(path, 405, text, method, Allow="GET, HEAD")
        text = "Não encontrado. Use / (conta uma visita), /reset (volta a 0) ou /health\n"
        for path in ("/nada", "/reset/", "/RESET", "/%2e", "/%00", "/a%0d%0ab", "*", "reset"):
            self.check(path, 404, text)
        self.assertIsNone(servers.client.get(KEY))


class TestTogether(Case):
    def visit_at_once(self, web: Service, clients: list[socket.socket]) -> list[bytes]:
        web.process.send_signal(signal.SIGSTOP)
        os.waitpid(web.process.pid, os.WUNTRACED)  # until it stands still
        clients[0].sendall(POST % 0)
        clients[1].sendall(LAST_VISIT.replace(b"/", b"/nada", 1))
        for client in clients[2:]:
            client.sendall(LAST_VISIT)
        web.process.send_signal(signal.SIGCONT)
        return [read_all(client) for client in clients]

    def test_one_command_and_one_question_serve_all(self) -> None:
        cache, db = (self.enterContext(Relay(each)) for each in servers.both)
        web = self.start(REDIS_URL=cache.url, DATABASE_URL=db.url)
        clients = self.connect(web, 22)
        cache.asked = db.asked = b""
        self.assertEqual(numbers_in(*self.visit_at_once(web, clients)), list(range(1, 21)))
        self.assertEqual(servers.client.get(KEY), b"20")
        self.assertEqual(cache.asked.count(b"INCRBY"), 1)
        self.assertEqual(db.asked, QUESTION)

    def test_what_may_have_reached_redis_is_not_sent_again(self) -> None:
        relay = self.enterContext(Relay(servers.cache))
        web = self.start(REDIS_URL=f"{relay.url}?retry_on_timeout=yes")
        clients = self.connect(web, 10)
        relay.lost = b"INCRBY"
        for answer in self.visit_at_once(web, clients)[2:]:
            self.assertIn(b" 503 Service Unavailable", answer)
            self.assertIn(f"\nRedis: {LATE}\n{CONNECTED}".encode(), answer)
        self.assertEqual(servers.client.get(KEY), b"8")


WAITRESS = """
import waitress
from server import app
server = waitress.create_server(app, host="127.0.0.1", port=0, threads=8)
print(f"Escutando em http://:{server.effective_port}", flush=True)
server.run()
"""
WSGIREF = """
from socketserver import ThreadingMixIn
from wsgiref import simple_server, validate
from server import app
class Server(ThreadingMixIn, simple_server.WSGIServer): request_queue_size = 100
server = simple_server.make_server("127.0.0.1", 0, validate.validator(app), Server)
print(f"Escutando em http://:{server.server_port}", flush=True)
server.serve_forever()
"""


class TestOtherServers(Case):
    def test_the_count_is_exact_and_the_answers_are_the_same(self) -> None:
        for code in (WAITRESS, WSGIREF):
            servers.client.delete(KEY)
            self.check(self.start(code))

    def check(self, web: Service) -> None:
        with ThreadPoolExecutor(16) as pool:
            answers = list(pool.map(lambda _: web.get(), range(400)))
        self.assertEqual(sorted(each.number for each in answers), list(range(1, 401)))
        self.assertEqual({each.text.partition("\n")[2] for each in answers}, {CONNECTED})
        for method, path, status in (("HEAD", "/", 200), ("POST", "/", 405), ("GET", "/x", 404)):
            self.assertEqual(web.get(path, method).status, status)
        servers.db.kill()
        self.assertIn("Postgres: indisponível (conexão", web.get().text)
        servers.db.start()
        eventually(lambda: web.get().text.endswith(CONNECTED), 1.5)


STUDENT = """
from server import *

def route(path, work):
    ROUTES["GET", path] = lambda: (200, f"{work()}\\n")

route("/aula", lambda: cache.run("INCR", "aula"))
route("/soma", lambda: database.run("SELECT CAST(:n AS int) + 1", n=41))
route("/dois", lambda: [visits.expect(2), *(visits.take().result for _ in range(4))])
route("/tres", lambda: [visits.expect(3), visits.take().result])
route("/olá", lambda: print("Oi!"))
route("/comando", lambda: cache.run("INCRI", "aula"))
route("/tabela", lambda: [database.run("INSERT INTO visitas VALUES (1)"), visits.take()])
route("/begin", lambda: [database.run("BEGIN"), database.run("SELEC 1")])
route("/fim", lambda: database.run("SELECT pg_terminate_backend(pg_backend_pid())"))
route("/none", lambda: cache.run("SET", "aula", None))
route("/bytes", lambda: cache.run("GET", "bytes"))
route("/notify", lambda: [database.run("LISTEN aula"), database.run("NOTIFY aula, 'olá'")])
route("/open", lambda: open("/nada"))
route("/lenta", lambda: database.run("SELECT pg_sleep(3)"))
route("/falta", lambda: database.run("SELECT :n", m=1))
route("/multi", lambda: cache.run("MULTI"))
route("/sair", exit)
main()
"""


class TestStudents(Case):
    def setUp(self) -> None:
        super().setUp()
        servers.client.set("bytes", b"\xff")
        self.web = self.start(STUDENT)

    def test_routes_use_both_servers(self) -> None:
        for path, text in (("/aula", "1"), ("/aula", "2"), ("/soma", "[[42]]")):
            self.assertEqual(self.web.get(path).text, f"{text}\n")
        self.assertEqual(self.web.get("/aula", "HEAD").status, 405)
        answer = self.web.get("/fim")
        self.assertEqual(answer.text, "Postgres: indisponível (conexão interrompida)\n")
        self.assertEqual(answer.status, 503)
        self.assertEqual(self.web.get("/lenta").text, f"Postgres: {LATE}\n")
        self.web.get("/ol%C3%A1")
        eventually(lambda: "Oi!\n" in self.web.lines)  # seen at once

    def test_numbers_are_given_once_whoever_takes_them(self) -> None:
        self.assertEqual(self.web.get("/dois").text, "[None, 1, 2, 3, 4]\n")  # two more
        self.assertEqual(self.web.get("/tres").text, "[None, 5]\n")  # two of the three do not come
        self.assertEqual(self.web.get().number, 8)

    def test_mistakes_are_told_as_what_they_are_and_change_no_other_answer(self) -> None:
        for path, text in (
            ("/comando", "Redis: unknown command 'INCRI'"),
            ("/tabela", 'Postgres: relation "visitas" does not exist\n'),
            ("/begin", 'Postgres: syntax error at or near "SELEC"\n'),
            *[(path, "Internal Server Error") for path in ("/none", "/bytes", "/falta", "/open")],
        ):
            answer = self.web.get(path)
            self.assertEqual((answer.status, answer.text[: len(text)]), (500, text))
            self.assertNotIn("Traceback", answer.text)
            other = (self.web.get("/soma").text, self.web.get("/aula").status)
            self.assertEqual(other, ("[[42]]\n", 200), path)
        self.assertEqual(self.web.get().number, 1)  # /tabela has counted nothing
        log = self.web.log()
        self.assertEqual(log.count("Exception while serving"), 4)
        self.assertIn("redis.exceptions.DataError", log)
        self.assertIn('"GET /none HTTP/1.1" 500', log)
        self.assertNotIn("indisponível", log)

    def test_what_a_library_cannot_read_spoils_no_later_answer(self) -> None:
        self.assertEqual(self.web.get("/notify").status, 500)
        self.assertEqual(self.web.get().text, f"Contador: 1\n{CONNECTED}")
        self.assertEqual(self.web.get("/bytes").status, 500)
        servers.cache.signal(signal.SIGSTOP)
        answers = [self.web.get() for _ in range(2)]
        self.assertEqual({each.text for each in answers}, {f"Redis: {LATE}\n{CONNECTED}"})
        self.assertLess(sum(each.seconds for each in answers), 1.5)

    def test_only_exit_ends_the_program(self) -> None:
        self.assertEqual(self.web.get("/multi").status, 200)
        self.assertEqual(self.web.get().status, 500)  # Redis has answered QUEUED
        with self.assertRaises(http.client.RemoteDisconnected):
            self.web.get("/sair")


class TestSettings(Case):
    def check_refusal(self, problem: str, **environment: str) -> None:
        options: Any = {"capture_output": True, "text": True, "timeout": SECONDS}
        command = [sys.executable, str(HERE / "server.py")]
        done = subprocess.run(command, env=settings(**environment), **options)
        self.assertRegex(done.stderr, rf"\A{problem}; esperado: [^\n]+\n\Z")
        self.assertNotIn("segredo", done.stderr)
        self.assertEqual((done.returncode, done.stdout), (2, ""))

    def test_a_bad_one_is_a_line_that_names_it_and_status_2(self) -> None:
        invalid = "valor inválido"
        for name, value, problem in (
            ("REDIS_URL", "redis://:segredo@cache:x/0", invalid),
            ("REDIS_URL", "redis://cache/0?segredo=1", invalid),
            ("REDIS_URL", "redis://cache/0?protocol=1", invalid),
            ("REDIS_URL", "rediss://cache/0?ssl_cert_reqs=segredo", invalid),
            ("DATABASE_URL", "postgresql://u:segredo@db:x/y", invalid),
            ("DATABASE_URL", "postgresql://u:1#segredo@db/y", invalid),
            ("DATABASE_URL", "postgresql://db/x?segredo", invalid),
            ("DATABASE_URL", "mysql://u:segredo@db/x", invalid),
            ("DATABASE_URL", "postgresql://db/x?sslmode=segredo", "sslmode desconhecido"),
            ("DATABASE_URL", "postgresql://db/x?a=segredo&b=1", "opção desconhecida: a, b"),
            ("PORT", "segredo", invalid),
            ("PORT", "65536", invalid),
        ):
            self.check_refusal(f"{name}: {problem}", **{name: value})

    def test_a_password_file_that_cannot_be_read_says_why(self) -> None:
        folder = Path(self.enterContext(tempfile.TemporaryDirectory()))
        empty, by_powershell = folder / "vazio", folder / "PowerShell"
        empty.write_text("\n")
        by_powershell.write_text("segredo\n", encoding="utf-16")
        reasons = {
            folder: "não dá para ler o arquivo",
            folder / "segredo": "o arquivo não existe",
            empty: "o arquivo está vazio",
            by_powershell: "o arquivo não está em UTF-8",
        }
        if os.geteuid() != 0:  # root may read any file
            empty.chmod(0)
            reasons[empty] = "sem permissão para ler o arquivo"
        for path, reason in reasons.items():
            problem = f"POSTGRES_PASSWORD_FILE: {reason}"
            self.check_refusal(problem, DATABASE_URL="", POSTGRES_PASSWORD_FILE=str(path))

    def test_a_place_where_it_cannot_listen_is_told(self) -> None:
        problem = "HOST, PORT: não dá para escutar em .*, porta .*"
        self.check_refusal(problem, HOST="..")
        with socket.create_server(("127.0.0.1", 0)) as taken:
            self.check_refusal(problem, PORT=str(taken.getsockname()[1]))

    def test_it_listens_at_names_with_two_addresses_and_at_ipv6(self) -> None:
        for host in ("localhost", "::1"):
            self.assertEqual(self.start(HOST=host).get(host=host).status, 200)

    def test_where_postgres_is_and_its_password(self) -> None:
        port, quoted = servers.db.port, quote(PASSWORD, safe="")
        place = f"postgresql://127.0.0.1:{port}"
        options = "sslmode=disable&channel_binding=prefer&connect_timeout=9&application_name=a"
        file = Path(self.enterContext(tempfile.TemporaryDirectory()), "senha")
        file.write_text(PASSWORD + "\r\n", encoding="utf-8")
        for variables in (
            {"DATABASE_URL": f"postgres://postgres:{quoted}@127.0.0.1:{port}/postgres?{options}"},
            {"DATABASE_URL": f"postgresql://:{quoted}@x:1?host={servers.sockets}&port={port}"},
            {"DATABASE_URL": f"{place}?sslmode=allow", "POSTGRES_PASSWORD": PASSWORD + "\n"},
            {"DATABASE_URL": f"{place}?sslmode=prefer", "POSTGRES_PASSWORD_FILE": str(file)},
        ):
            web = self.start(REDIS_URL=f"{servers.cache.url}?max_connections=1", **variables)
            self.assertEqual(web.get("/health").text, f"Redis: conectado\n{CONNECTED}")


class TestReasons(Case):
    def check(self, reason: str, url: str) -> None:
        is_postgres = url.startswith("postgresql")
        make: Any = backends.Postgres if is_postgres else backends.Redis
        backend = make(parse_postgres_url(url) if is_postgres else parse_url(url))
        self.addCleanup(backend.close)
        with self.assertRaises(backends.Unavailable) as caught:
            backend.run(*["SELECT 1"] if is_postgres else ["INCRBY", KEY, 0])
        self.assertEqual(caught.exception.reason, reason)

    def test_what_the_network_says(self) -> None:
        self.check("conexão recusada", "redis://127.0.0.1:1")
        self.check("conexão recusada", "postgresql://127.0.0.1:1")
        self.check("host não encontrado", "redis://nada.invalid")
        self.check("[Errno 2] No such file or directory", "unix:///nada")

    def test_what_postgres_says(self) -> None:
        url = servers.db.url
        self.check("senha recusada", f"postgresql://:x@127.0.0.1:{servers.db.port}")
        self.check("banco inexistente", url.removesuffix("postgres") + "nada")
        for mode in ("require", "verify-full"):
            self.check("Server refuses SSL", f"{url}?sslmode={mode}")
        assert servers.db.process
        with pg8000.native.Connection(**parse_postgres_url(url)):
            servers.db.process.terminate()  # it waits for this connection's end
            self.check("o Postgres ainda não está pronto", url)
        servers.db.process.wait(SECONDS)

    def test_what_redis_says(self) -> None:
        self.change_redis("CONFIG SET requirepass x", "CONFIG SET requirepass ")
        self.check("senha recusada", servers.cache.url)
        self.doCleanups()
        self.change_redis("CONFIG SET maxmemory 1", "CONFIG SET maxmemory 0")
        self.check("memória do Redis esgotada", servers.cache.url)
        self.doCleanups()
        dump = servers.cache.folder / "dump.rdb"
        dump.mkdir()  # so that Redis can't save a file of this name
        self.addCleanup(dump.rmdir)
        self.addCleanup(servers.client.config_set, "save", "")
        servers.client.config_set("save", "3600 1")
        servers.client.bgsave()
        eventually(lambda: servers.client.info("persistence")["rdb_last_bgsave_status"] == "err")
        self.check("o Redis não consegue gravar em disco", servers.cache.url)


class TestFaults(Case):
    def check_times(self, web: Service) -> None:
        first, *others = [web.get() for _ in range(40)]
        self.assertEqual(first.text, f"Redis: {LATE}\nPostgres: {LATE}\n")
        self.assertEqual((first.status, first.headers["Retry-After"]), (503, "1"))
        self.assertTrue(1.8 < first.seconds < 2.2)
        self.assertLess(max(each.seconds for each in others), 0.25)
        self.assertLess(sorted(each.seconds for each in others)[20], 0.05)

    def test_frozen_servers_hold_up_the_first_visit_for_two_seconds_and_no_other(self) -> None:
        patient = "socket_timeout=60&socket_connect_timeout=60"
        web = self.start(REDIS_URL=f"{servers.cache.url}?{patient}")
        web.get()
        for server in servers.both:
            server.signal(signal.SIGSTOP)
        self.check_times(web)
        for method in ("GET", "HEAD"):
            self.assertEqual(web.get("/reset", method).status, 503)
        for server in servers.both:
            server.signal(signal.SIGCONT)
        eventually(lambda: web.get("/health").status == 200, 1.5)

    def test_slow_names_do_the_same_and_serve_once_they_are_found(self) -> None:
        web = self.start(
            "import server, socket, time\n"
            "resolve = socket.getaddrinfo\n"
            "def slow(host, *rest, **more):\n"
            "    if host == 'localhost':\n"
            "        time.sleep(3)\n"
            "    return resolve(host, *rest, **more)\n"
            "socket.getaddrinfo = slow\n"
            "server.main()",
            REDIS_URL=servers.cache.url.replace("127.0.0.1", "localhost"),
            DATABASE_URL=servers.db.url.replace("127.0.0.1", "localhost"),
        )
        self.check_times(web)
        eventually(lambda: web.get().status == 200, 4)

    def test_killed_servers_are_told_and_used_again(self) -> None:
        web = self.start()
        web.get()
        for server in servers.both:
            server.kill()
        refused = "indisponível (conexão recusada)\n"
        self.assertEqual(web.get("/health").text, f"Redis: {refused}Postgres: {refused}")
        servers.cache.start()
        eventually(lambda: web.get().text == f"Contador: 2\nPostgres: {refused}", 1.5)
        servers.db.start()
        eventually(lambda: web.get("/health").status == 200, 1.5)
        log = web.log()
        for name in ("Redis", "Postgres"):
            told = [f"{name}: {refused}", f"{name}: conectado de novo\n"]
            self.assertEqual(re.findall(rf"^{name}.*\n", log, re.M), told)

    def test_a_restart_while_nobody_asks_costs_no_visit(self) -> None:
        web = self.start()
        web.get()
        for server in servers.both:
            server.stop()
            server.start()
        self.assertEqual(web.get().text, f"Contador: 2\n{CONNECTED}")
        self.assertNotIn("indisponível", web.log())

    def test_the_first_visit_counts_when_the_servers_came_back_long_ago(self) -> None:
        for server in servers.both:
            server.stop()
        web = self.start()
        self.assertEqual(web.get().status, 503)
        for server in servers.both:
            server.start()
        time.sleep(backends.RETRY_PAUSE)  # in which no attempt is made
        self.assertEqual(web.get().text, f"Contador: 1\n{CONNECTED}")

    def test_a_redis_that_became_read_only_is_left_for_the_one_at_its_address(self) -> None:
        web = self.start()
        self.assertEqual(web.get().number, 1)
        before = {each["id"] for each in servers.client.client_list()}
        self.change_redis("REPLICAOF 127.0.0.1 1", "REPLICAOF NO ONE")
        text = "Redis: indisponível (este Redis é só de leitura)\n"
        self.assertEqual(web.get().text, text + CONNECTED)
        self.assertEqual([web.get(path).status for path in ("/health", "/reset")], [503, 503])
        after = {each["id"] for each in servers.client.client_list()}
        self.assertEqual(len(before & after), 1)  # the test's own
        servers.client.execute_command("REPLICAOF", "NO", "ONE")
        self.assertEqual(web.get().number, 2)

    def test_a_redis_that_refuses_is_told_in_its_own_words_and_keeps_the_count(self) -> None:
        web = self.start()
        self.assertEqual(web.get().number, 1)
        replicas = "CONFIG SET min-replicas-to-write"
        self.change_redis(f"{replicas} 1", f"{replicas} 0")
        self.check_words(web, "NOREPLICAS .*")
        self.change_redis("ACL SETUSER default -incrby -set", "ACL SETUSER default +@all")
        self.check_words(web, "NOPERM .*")
        self.assertEqual(servers.client.get(KEY), b"1")

    def check_words(self, web: Service, words: str) -> None:
        for path, status, text in (
            ("/", 503, rf"Redis: indisponível \({words}\)\n{CONNECTED}"),
            ("/health", 503, rf"Redis: indisponível \({words}\)\n{CONNECTED}"),
            ("/reset", 500, f"Redis: {words}\n"),
        ):
            answer = web.get(path)
            self.assertRegex(answer.text, rf"\A{text}\Z")
            self.assertEqual((answer.status, web.get(path, "HEAD").status), (status, status))

    def test_a_redis_that_is_back_with_a_bad_value_is_back(self) -> None:
        web = self.start()
        servers.cache.kill()
        web.get()
        servers.cache.start()
        servers.client.set(KEY, "abc")
        eventually(lambda: web.get().status == 500, 1.5)
        self.assertIn("Redis: conectado de novo\n", web.log())

    def test_a_login_is_not_an_answer(self) -> None:
        relay = self.enterContext(Relay(servers.db))
        relay.lost = QUESTION
        web = self.start(DATABASE_URL=relay.url)
        for _ in range(3):
            self.assertEqual(web.get("/health").text, f"Redis: conectado\nPostgres: {LATE}\n")


class TestFront(Case):
    def test_a_line_for_each_request_and_nothing_can_forge_one(self) -> None:
        web = self.start()
        for path in ("/", "/nada", "/health"):
            web.get(path)
        web.get(method="HEAD")
        malformed = b"/\r127.0.0.1"  # makes no line
        for target in (b'/"\\', b"/\x1b[2J", malformed, b"/" + b"a" * 9000):
            with web.connect() as client:
                client.sendall(b"GET " + target + b" HTTP/1.0\r\n\r\n")
                read_all(client)
        lines = web.log().splitlines()
        line = r"127\.0\.0\.1 - - \[\d\d/\w{3}/\d{4}:\d\d:\d\d:\d\d [+-]\d{4}\] (.*) \d{1,3}\.\d ms"
        self.assertEqual(
            [re.sub(line, r"\1", each) for each in lines[1:]],
            [
                '"GET / HTTP/1.1" 200 32',
                '"GET /nada HTTP/1.1" 404 73',
                '"HEAD / HTTP/1.1" 200 -',
                r'"GET /\"\\ HTTP/1.0" 404 73',
                r'"GET /\x1b[2J HTTP/1.0" 404 73',
                f'"GET /{"a" * 495}" 404 73',
            ],
        )

    def test_a_log_that_cannot_be_written_stops_nothing(self) -> None:
        long_line = VISIT.replace(b"/", b"/" + b"a" * 480, 1)
        nobody_reads, closed, nobody_is_there = "", ">&-", "> >(:)"
        full_disk = [">/dev/full"] if os.path.exists("/dev/full") else []
        env = settings(PORT=str(port := free_port()))
        for output in [nobody_reads, closed, nobody_is_there, *full_disk]:
            command = ["bash", "-c", f'exec "$0" server.py {output}', sys.executable]
            options: Any = {"cwd": HERE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
            with self.subTest(output), subprocess.Popen(command, env=env, **options) as program:
                self.addCleanup(program.kill)
                eventually(lambda: listens(port))
                with socket.create_connection(("127.0.0.1", port), SECONDS) as client:
                    client.sendall(long_line * 200 + LAST_VISIT)
                    self.assertIn(b"Contador: ", read_all(client))
                program.terminate()
                self.assertEqual(program.wait(SECONDS), 0)
                self.assertEqual(program.communicate()[1], b"")

    def test_beside_900_connections_with_half_a_request_visits_are_answered(self) -> None:
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
        web = self.start()
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(2000, hard), hard))
        clients = [self.enterContext(web.connect()) for _ in range(900)]
        for client in clients[:450]:
            client.sendall(LAST_VISIT[:8])
        for client in clients[450:]:
            client.sendall(POST % 16000 + b"a" * 15999)
        self.assertEqual(web.get().number, 1)
        clients[0].sendall(LAST_VISIT[8:])
        self.assertEqual(numbers_in(read_all(clients[0])), [2])

    def test_where_few_files_may_be_open_others_wait_their_turn(self) -> None:
        web = self.start(
            "import resource, server\n"
            "resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))\n"
            "server.main()"
        )
        idle = [web.connect() for _ in range(300)]
        late = self.enterContext(web.connect())
        late.sendall(LAST_VISIT)
        for client in idle:
            client.close()
        self.assertEqual(numbers_in(read_all(late)), [1])
        self.assertNotIn("Traceback", web.log())

    def test_large_requests_are_refused(self) -> None:
        web = self.start()
        chunked = b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n4000\r\n"
        for status, request in (
            (b"405", POST % 10000 + b"a" * 10000),
            (b"413", POST % 2**20),
            (b"413", chunked + b"a" * 0x4000),
            (b"431", VISIT[:-2] + b"A: " + b"a" * 16384),
        ):
            with web.connect() as client:
                client.sendall(request)
                self.assertEqual(client.recv(1000)[9:12], status)
        self.assertEqual(web.get().number, 1)

    def test_what_has_come_in_is_answered_before_the_end(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            servers.client.delete(KEY)
            web = self.start()
            idle, pipelined = self.connect(web, 2)
            web.process.send_signal(signal.SIGSTOP)
            os.waitpid(web.process.pid, os.WUNTRACED)  # until it stands still
            backlog = [self.enterContext(web.connect()) for _ in range(20)]
            for client in backlog:
                client.sendall(VISIT)
            pipelined.sendall(VISIT * 3)
            started = time.monotonic()
            web.process.send_signal(number)
            web.process.send_signal(signal.SIGCONT)
            received = [read_all(client) for client in (pipelined, *backlog)]
            self.assertLess(time.monotonic() - started, 1)
            self.assertEqual(numbers_in(*received), list(range(1, 24)))
            self.assertEqual({text.count(b"Connection: close") for text in received}, {1})
            self.assertEqual((web.end(0), read_all(idle)), (0, b""))

    def test_what_comes_while_both_servers_are_silent_is_answered_before_the_end(self) -> None:
        web = self.start()
        web.get()
        clients = [self.enterContext(web.connect()) for _ in range(3)]
        for server in servers.both:
            server.signal(signal.SIGSTOP)
        started = time.monotonic()
        for client in clients:
            client.sendall(LAST_VISIT)
            time.sleep(0.3)  # each comes while the first one waits
        web.process.send_signal(signal.SIGTERM)
        self.assertEqual({read_all(client)[9:12] for client in clients}, {b"503"})
        self.assertEqual(web.process.wait(SECONDS), 0)
        self.assertLess(time.monotonic() - started, 3.3)

    def test_under_load_it_ends_within_two_seconds_and_all_that_counted_is_answered(self) -> None:
        web = self.start()
        with ThreadPoolExecutor(8) as pool:
            visits = [pool.submit(web.get) for _ in range(4000)]
            visits[100].result(SECONDS)
            started = time.monotonic()
            self.assertEqual(web.end(), 0)
            self.assertLess(time.monotonic() - started, 2)
        counted = int(servers.client.get(KEY) or 0)
        answered = [each for each in visits if not isinstance(each.exception(), OSError)]
        numbers = sorted(each.result().number for each in answered)
        self.assertEqual(numbers, list(range(1, counted + 1)))
