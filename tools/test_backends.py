"""What the service promises of Redis and Postgres, also of what real ones seldom do: see fakes."""

import errno
import os
import runpy
import socket
import ssl
import time
import unittest
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from threading import Event
from typing import Any
from unittest import mock
from urllib.parse import quote

import pg8000.native
import trustme

from contador import backends
from contador.backends import AT_ONCE, TIMEOUT, BadValue, Postgres, Redis, Unavailable
from tools import servers as real
from tools.fakes import (
    CLOSE,
    NOTHING,
    RESET,
    WELCOME,
    Fake,
    FakePostgres,
    FakeRedis,
    Step,
    TlsRelay,
    refusal,
)
from tools.harness import (
    CONNECTED,
    KEY,
    LIMIT,
    PASSWORD,
    SECONDS,
    Service,
    eventually,
    full_backlog,
    read_all,
    servers,
    service,
    slow_to_find,
    store,
    stored,
    with_limits,
)

OURS_WIN = "?socket_timeout=60&socket_connect_timeout=60&protocol=3&health_check_interval=1"
OUT_OF_MEMORY = b"-OOM command not allowed when used memory > 'maxmemory'.\r\n"


def setUpModule() -> None:
    servers.start()


class Case(unittest.TestCase):
    """A fake Redis and a fake Postgres, both at rest when a test begins, and who asks them."""

    cache: FakeRedis
    db: FakePostgres

    @classmethod
    def setUpClass(cls) -> None:
        cls.cache = FakeRedis()
        cls.addClassCleanup(cls.cache.end)
        cls.db = FakePostgres()
        cls.addClassCleanup(cls.db.end)

    def setUp(self) -> None:
        for fake in (self.cache, self.db):
            fake.rest()

    def redis(self, url: str = "") -> Redis:
        backend = Redis(url or self.cache.url)
        self.addCleanup(backend.close)
        return backend

    def postgres(self, url: str = "", password: str = PASSWORD) -> Postgres:
        backend = Postgres(url or self.db.url, password)
        self.addCleanup(backend.close)
        return backend

    def away(self, backend: Redis | Postgres, phrase: str) -> None:
        """Ask a server that should be away for a reason: who asks and the log are told the same."""
        with self.subTest(phrase), self.assertLogs() as log:
            self.refuses(partial(backend.run, "PING"), phrase)
        self.assertEqual(log.output, [f"INFO:root:{backend.name}: indisponível ({phrase})"])

    def refuses(self, question: Callable[[], object], phrase: str) -> None:
        with self.assertRaises(Unavailable) as caught:
            question()
        self.assertEqual(str(caught.exception), phrase)


class LongTimeoutCase(Case):
    """For promises that are not about time, on machines of any speed."""

    def setUp(self) -> None:
        super().setUp()
        self.enterContext(mock.patch.object(backends, "TIMEOUT", SECONDS))


class WebCase(LongTimeoutCase):
    """The program too, with limits as long, which has asked both."""

    web: Service

    @classmethod
    def setUpClass(cls) -> None:
        super().setUpClass()
        urls = {"REDIS_URL": cls.cache.url, "DATABASE_URL": cls.db.url}
        cls.web = Service(program=with_limits(), **urls)
        cls.addClassCleanup(cls.web.end_once)

    def setUp(self) -> None:
        super().setUp()
        eventually(self.is_well)
        self.cache.received.clear()
        self.db.received.clear()

    def is_well(self) -> bool:
        return self.web.get("/health").status == 200

    def together(self, *requests: str) -> list[tuple[int, str]]:
        """Send requests ("GET /") that come in together; return the statuses and the bodies."""
        clients = [self.web.connect() for _ in requests]
        self.web.get("/nada")  # now all connections have been accepted
        self.web.freeze()
        for client, request in zip(clients, requests, strict=True):
            client.sendall(f"{request} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n".encode())
        self.web.thaw()
        answers = []
        for client in clients:
            with client:
                head, _, body = read_all(client).decode().partition("\r\n\r\n")
            answers.append((int(head.split()[1]), body))
        return answers


class TestOnce(WebCase):
    """A visit is sent to Redis once, whatever becomes of it."""

    def test_a_visit_of_unknown_fate_is_503_and_never_sent_again(self) -> None:
        fates: list[tuple[str, list[Step]]] = [
            ("conexão interrompida", [CLOSE]),
            ("conexão interrompida", [RESET]),
            ("conexão interrompida", [b":9", CLOSE]),
        ]
        self.check_fates(self.web, fates)

    def test_a_visit_whose_answer_takes_too_long_is_503_and_never_sent_again(self) -> None:
        fates: list[tuple[str, list[Step]]] = [
            ("tempo esgotado", [b":9"]),
            ("tempo esgotado", [1.5, b":9\r\n"]),
        ]
        urls = {"REDIS_URL": self.cache.url, "DATABASE_URL": self.db.url}
        with service(program=with_limits(timeout=1), **urls) as web:
            self.check_fates(web, fates)

    def check_fates(self, web: Service, fates: list[tuple[str, list[Step]]]) -> None:
        for sent, (reason, fate) in enumerate(fates, 1):
            self.cache.answers["INCRBY"] = fate
            answer = web.get()
            self.assertEqual(answer.text, f"Contador: indisponível ({reason})\n{CONNECTED}")
            self.assertEqual((answer.status, self.cache.count("INCRBY")), (503, 2 * sent - 1))
            del self.cache.answers["INCRBY"]
            self.assertEqual(web.get().number, sent)

    def test_a_visit_that_could_not_be_written_is_never_written_again(self) -> None:
        cache = self.redis()
        cache.run("PING")
        failed: list[bytes] = []
        send = socket.socket.sendall

        def fail_once(connection: socket.socket, data: bytes) -> None:
            if b"INCRBY" in data and not failed:
                failed.append(data)
                raise BrokenPipeError(errno.EPIPE, "broken")
            send(connection, data)

        with mock.patch.object(socket.socket, "sendall", fail_once):
            self.refuses(partial(cache.run, "INCRBY", KEY, 1), "conexão interrompida")
        self.assertEqual((len(failed), self.cache.count("INCRBY")), (1, 0))
        self.assertEqual(cache.run("INCRBY", KEY, 1), 1)

    def test_a_connection_that_broke_while_idle_costs_no_visit(self) -> None:
        for number in (1, 2, 3):
            self.assertEqual(self.web.get().text, f"Contador: {number}\n{CONNECTED}")
            self.cache.drop()
            self.db.drop()
        self.assertEqual(self.cache.count("INCRBY"), 3)

    def test_an_answer_that_nobody_asked_for_is_nobodys_number(self) -> None:
        cache = self.redis()
        cache.run("INCRBY", KEY, 1)
        self.cache.connections[-1].sendall(b":41\r\n")
        time.sleep(0.05)  # until it is surely there: nothing outside shows it
        self.assertEqual(cache.run("INCRBY", KEY, 1), 2)
        self.cache.answers["INCRBY"] = [b":3\r\n:42\r\n"]
        self.assertEqual(cache.run("INCRBY", KEY, 1), 3)
        self.cache.answers["INCRBY"] = [b":4\r\n"]
        self.assertEqual(cache.run("INCRBY", KEY, 1), 4)

    def test_nothing_but_what_is_wanted_is_sent_to_redis(self) -> None:
        cache = self.redis(self.cache.url + OURS_WIN)
        cache.run("INCRBY", KEY, 1)
        cache.run("INCRBY", KEY, 1)
        self.assertEqual(self.cache.received, ["PING", *[f"INCRBY {KEY} 1"] * 2])

    def test_an_empty_query_is_sent_again_only_where_the_connection_broke_at_once(self) -> None:
        fates: list[tuple[int, float, list[Step]]] = [
            (2, SECONDS, [CLOSE]),
            (1, AT_ONCE, [AT_ONCE + 0.05, CLOSE]),
        ]
        for sent, at_once, fate in fates:
            database = self.postgres()
            self.assertEqual(database.ping().reason, "")
            self.db.received.clear()
            self.db.answer = fate
            with mock.patch.object(backends, "AT_ONCE", at_once):
                self.assertEqual(database.ping().reason, "conexão interrompida")
            self.assertEqual(self.db.received, [""] * sent)
            self.db.answer = [NOTHING]

    def test_a_students_query_is_never_sent_again(self) -> None:
        database = self.postgres()
        database.run("SELECT 1")
        self.db.answer = [CLOSE]
        self.away(database, "conexão interrompida")
        self.assertEqual(self.db.received, ["SELECT 1", "PING"])


class TestBatch(WebCase):
    """What came in together is asked together."""

    def test_each_server_is_asked_once_for_all(self) -> None:
        for requests, commands, queries in (
            (["GET /"] * 3, [f"INCRBY {KEY} 3"], [""]),
            (["HEAD /"] * 2, [f"INCRBY {KEY} 0"], [""]),
            (["GET /reset"] * 2, [f"SET {KEY} 0"], []),
            (["HEAD /reset"] * 2, ["PING"], []),
            (["GET /health", "HEAD /health"], ["PING"], [""]),
            (
                ["GET /health", "GET /reset", "HEAD /", "GET /", "HEAD /reset", "GET /"],
                [f"INCRBY {KEY} 2", f"SET {KEY} 0", "PING"],
                [""],
            ),
            (["GET /nada", "POST /", "POST /reset", "POST /x"], [], None),
        ):
            with self.subTest(requests=requests):
                self.cache.received.clear()
                self.db.received.clear()
                self.together(*requests)
                self.assertEqual(self.cache.received, commands)
                if queries is not None:
                    self.assertEqual(self.db.received, queries)
        self.assertEqual([len(fake.connections) for fake in (self.cache, self.db)], [1, 1])

    def test_what_needs_no_server_asks_none(self) -> None:
        for fake in (self.cache, self.db):
            fake.drop()
        self.assertEqual(self.web.get("/nada").status, 404)
        self.assertEqual([fake.connections for fake in (self.cache, self.db)], [[], []])

    def test_commands_go_as_one_packet(self) -> None:
        cache = self.redis()
        cache.run("PING")
        packets = []
        send = socket.socket.sendall

        def watched(connection: socket.socket, data: bytes) -> None:
            if data.startswith(b"*"):  # a command: the fake sends its answers in the same way
                packets.append(data)
            send(connection, data)

        with mock.patch.object(socket.socket, "sendall", watched):
            cache.send([("INCRBY", KEY, 1), ("SET", KEY, 0), ("PING",)])
            self.assertEqual([reply.result() for reply in cache.receive()], [1, b"OK", b"PONG"])
        self.assertEqual(len(packets), 1)
        self.assertRegex(packets[0], b"(?s)INCRBY.*SET.*PING")

    def test_both_servers_work_at_the_same_time(self) -> None:
        cache_was_asked = Event()
        db_was_asked = Event()
        together = []  # whether each was asked before the other had answered

        def wait_for(event: Event) -> None:
            together.append(event.wait(SECONDS / 3))  # sooner than the program's limit

        self.cache.answers["INCRBY"] = [
            cache_was_asked.set,
            partial(wait_for, db_was_asked),
            b":7\r\n",
        ]
        self.db.answer = [db_was_asked.set, partial(wait_for, cache_was_asked), NOTHING]
        self.assertEqual(self.web.get().text, f"Contador: 7\n{CONNECTED}")
        self.assertEqual(together, [True, True])

    def test_twenty_questions_to_a_slow_redis_wait_together(self) -> None:
        self.cache.answers["PING"] = [0.25, b"+PONG\r\n"]
        answers = self.together(*["GET /health"] * 20)
        self.assertEqual(answers, [(200, f"Redis: conectado\n{CONNECTED}")] * 20)
        self.assertEqual((self.cache.received, self.db.received), (["PING"], [""]))

    def test_each_answer_stands_for_itself(self) -> None:
        visit = (200, f"Contador: 1\n{CONNECTED}")
        reset = (200, "Contador: 0\n")
        health = (200, f"Redis: conectado\n{CONNECTED}")
        full = "indisponível (memória do Redis esgotada)\n"
        lost = "indisponível (conexão interrompida)\n"
        bad = "Contador: o valor guardado não é um número ou chegou ao limite; acesse /reset\n"

        def check(expected: list[tuple[int, str]], **answers: Step) -> None:
            eventually(self.is_well)
            self.cache.number = 0
            self.cache.received.clear()
            self.cache.answers = {name: [answer] for name, answer in answers.items()}
            with self.subTest(answers=answers):
                self.assertEqual(self.together("GET /", "GET /reset", "GET /health"), expected)
                self.assertEqual((self.cache.count("INCRBY"), self.cache.count("SET")), (1, 1))
            self.cache.answers = {}

        check([visit, reset, health])
        check([(503, f"Contador: {full}{CONNECTED}"), reset, health], INCRBY=OUT_OF_MEMORY)
        check([(500, bad), reset, health], INCRBY=b"-WRONGTYPE Operation against a key\r\n")
        check([visit, (503, f"Contador: {full}"), health], SET=OUT_OF_MEMORY)
        check([visit, reset, (503, f"Redis: {full}{CONNECTED}")], PING=OUT_OF_MEMORY)
        gone = [(503, f"Contador: {lost}"), (503, f"Redis: {lost}{CONNECTED}")]
        check([visit, *gone], SET=CLOSE)


class TestWhatTheySay(WebCase):
    """Why a server can't be had is a phrase in Portuguese, at the client and in the log."""

    def test_what_a_server_says(self) -> None:
        log = []

        def check(fake: FakeRedis | FakePostgres, phrase: str, *greeting: Step) -> None:
            eventually(self.is_well)
            usual = fake.greeting
            fake.greeting = greeting
            fake.drop()
            name = "Redis" if fake is self.cache else "Postgres"
            line = f"{name}: indisponível ({phrase})\n"
            self.assertIn(line, self.web.get("/health").text)
            fake.greeting = usual
            log.extend([line, f"{name}: conectado de novo\n"])

        redis = partial(check, self.cache)
        redis("o Redis está em modo protegido", b"-DENIED Redis is in protected mode\r\n", CLOSE)
        redis("o Redis não aceita mais conexões", b"-ERR max number of clients reached\r\n", CLOSE)
        redis("o Redis ainda está carregando os dados", b"-LOADING Redis is loading\r\n")
        redis("este Redis é só de leitura", b"-READONLY You can't write\r\n")
        redis("o Redis exige uma senha", b"-NOAUTH Authentication required.\r\n")
        redis("conexão interrompida", CLOSE)
        redis("conexão interrompida", RESET)
        redis("a resposta não é de um Redis", b"HTTP/1.1 400 Bad Request\r\n\r\n")
        postgres = partial(check, self.db)
        postgres("o Postgres ainda não está pronto", refusal("57P03", "starting up"), CLOSE)
        postgres("o Postgres não aceita mais conexões", refusal("53300", "too many"), CLOSE)
        postgres("acesso recusado", refusal("28000", "no entry"), CLOSE)
        postgres("conexão interrompida", CLOSE)
        postgres("conexão interrompida", RESET)
        postgres("conexão interrompida", WELCOME[:7], CLOSE)
        postgres("a resposta não é de um Postgres", b"-ERR unknown command\r\n")
        eventually(self.is_well)
        self.web.end()
        news = [line for line in self.web.lines if line.startswith(("Redis:", "Postgres:"))]
        self.assertEqual(news, log)


class TestReasons(Case):
    """The other reasons, at whoever asks and in the log."""

    def test_what_the_network_says(self) -> None:
        for number, phrase in (
            (errno.EHOSTUNREACH, "sem rota até o host"),
            (errno.ENETUNREACH, "sem rota até o host"),
            (errno.ETIMEDOUT, "tempo esgotado"),
            (errno.ECONNREFUSED, "conexão recusada"),
        ):
            error = OSError(number, os.strerror(number))
            with mock.patch.object(socket.socket, "connect", side_effect=error):
                self.away(self.redis(), phrase)
                self.away(self.postgres(), phrase)

    def test_what_the_resolver_says(self) -> None:
        error = socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        with mock.patch("socket.getaddrinfo", side_effect=error):
            self.away(self.redis(), "host não encontrado")
            self.away(self.postgres(), "host não encontrado")

    def test_what_breaks_while_it_is_written(self) -> None:
        for number in (errno.EPIPE, errno.ECONNRESET):
            cache = self.redis()
            cache.run("PING")
            error = OSError(number, os.strerror(number))
            with mock.patch.object(socket.socket, "sendall", side_effect=error):
                self.away(cache, "conexão interrompida")

    def test_what_stops_in_the_middle_of_an_answer_takes_too_long(self) -> None:
        self.db.answer = [NOTHING[:3]]
        self.away(self.postgres(), "tempo esgotado")
        self.cache.answers["PING"] = [b"+PO"]
        self.away(self.redis(), "tempo esgotado")

    def test_a_socket_that_is_not_there(self) -> None:
        self.away(self.redis("unix:///nada"), "socket não encontrado")
        self.away(self.postgres("postgresql:///x?host=/nada"), "socket não encontrado")


class TestRefusals(LongTimeoutCase):
    """A real Redis with a password, with users of few rights, and without INCRBY."""

    server: real.Redis

    @classmethod
    def setUpClass(cls) -> None:
        super().setUpClass()
        options = ("--requirepass", "senha", "--rename-command", "INCRBY", "")
        cls.server = real.Redis(servers.folder / "strict", *options)
        cls.server.start()
        cls.addClassCleanup(cls.server.kill)

    def url(self, user: str) -> str:
        return f"redis://{user}127.0.0.1:{self.server.port}/0"

    def test_a_password(self) -> None:
        self.assertEqual(self.redis(self.url(":senha@")).run("PING"), b"PONG")
        self.away(self.redis(self.url(":errada@")), "senha recusada")
        self.away(self.redis(self.url("")), "o Redis exige uma senha")

    def test_a_user_of_few_rights(self) -> None:
        admin = self.redis(self.url(":senha@"))
        admin.run("ACL", "SETUSER", "leitora", "on", ">livro", "+ping", "+get", "~outra")
        reader = self.redis(self.url("leitora:livro@"))
        for command in (("SET", KEY, 0), ("GET", KEY)):
            self.refuses(partial(reader.run, *command), "sem permissão no Redis")
        self.assertEqual(reader.run("PING"), b"PONG")

    def test_a_missing_command_is_not_the_keys_fault(self) -> None:
        with service(REDIS_URL=self.url(":senha@")) as web:
            answers = [web.get(), web.get(method="HEAD")]
        self.assertEqual([answer.status for answer in answers], [503, 503])
        text = answers[0].text
        self.assertRegex(text, rf"\AContador: indisponível \(.*INCRBY.*\)\n{CONNECTED}\Z")
        self.assertNotIn("/reset", text)


def configure(name: str, value: str) -> None:
    """Change a setting of the real Redis."""
    with servers.client() as client:
        client.config_set(name, value)


def save(outcome: str) -> None:
    """Let the real Redis write a snapshot, and wait until it tells this outcome."""
    with servers.client() as client:
        client.bgsave()
        eventually(lambda: client.info("persistence")["rdb_last_bgsave_status"] == outcome)


class TestFullRedis(unittest.TestCase):
    """A real Redis that can't write, for want of memory or of a disk, until it can again."""

    def setUp(self) -> None:
        self.web = Service(program=with_limits())
        self.addCleanup(self.web.end_once)
        # Connected from now on: an attempt in vain would be followed by a pause.
        self.assertEqual(self.web.get("/health").status, 200)

    def check(self, reason: str, reset: int, health: int) -> None:
        for path, status in (("/", 503), ("/reset", reset), ("/health", health)):
            answer = self.web.get(path)
            self.assertEqual(answer.status, status, path)
            if status == 503:
                self.assertIn(f"indisponível ({reason})\n", answer.text)
        self.assertEqual(self.web.get(method="HEAD").status, 503)

    def test_without_memory_it_is_there_and_takes_no_reset(self) -> None:
        store("1")
        self.addCleanup(configure, "maxmemory", "0")
        configure("maxmemory", "1")
        self.check("memória do Redis esgotada", reset=503, health=200)
        configure("maxmemory", "0")
        self.assertEqual(self.web.get().number, 2)

    def test_without_a_disk_it_is_unhealthy(self) -> None:
        store("1")
        place = servers.cache.folder / "dump.rdb"
        place.mkdir()  # where the snapshot should go
        self.addCleanup(configure, "save", "")
        configure("save", "3600 1")
        try:
            save("err")
            self.check("o Redis não consegue gravar em disco", reset=503, health=503)
        finally:
            place.rmdir()
        save("ok")
        self.assertEqual(self.web.get().number, 2)


class HangsUp(Fake):
    """Reads what the client says first, and ends."""

    def converse(self, connection: socket.socket) -> None:
        connection.recv(65536)


class TestTls(LongTimeoutCase):
    """Through a relay that speaks TLS, to the real servers, which don't."""

    trusted: Path  # the certificate of the authority that issued the right one
    right: trustme.LeafCert
    wrong: list[trustme.LeafCert]

    @classmethod
    def setUpClass(cls) -> None:
        super().setUpClass()
        ours = trustme.CA()
        cls.trusted = servers.folder / "ca.pem"
        ours.cert_pem.write_to_path(str(cls.trusted))
        cls.right = ours.issue_cert("127.0.0.1")
        of_another_host = ours.issue_cert("outro.example")
        of_another_authority = trustme.CA().issue_cert("127.0.0.1")
        cls.wrong = [of_another_host, of_another_authority]

    def relay(self, certificate: trustme.LeafCert, server: real.Redis | real.Postgres) -> int:
        """Return the port of a relay."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        certificate.configure_cert(context)
        relay = TlsRelay(context, server.port, isinstance(server, real.Postgres))
        self.addCleanup(relay.end)
        return relay.port

    def over_tls(self, certificate: trustme.LeafCert, options: str) -> Postgres:
        port = self.relay(certificate, servers.db)
        return self.postgres(f"postgresql://postgres@127.0.0.1:{port}/postgres?{options}")

    def test_verify_full_verifies(self) -> None:
        options = f"sslmode=verify-full&sslrootcert={self.trusted}"
        self.assertEqual(self.over_tls(self.right, options).run("SELECT 1"), [[1]])
        for certificate in self.wrong:
            self.away(self.over_tls(certificate, options), "certificado TLS recusado")

    def test_verify_full_trusts_the_systems_authorities_if_none_are_given(self) -> None:
        self.away(self.over_tls(self.right, "sslmode=verify-full"), "certificado TLS recusado")

    def test_require_encrypts_without_verifying(self) -> None:
        for certificate in (self.right, *self.wrong):
            database = self.over_tls(certificate, "sslmode=require")
            self.assertEqual(database.run("SELECT 1"), [[1]])

    def test_a_postgres_without_tls(self) -> None:
        for mode in ("require", "verify-full"):
            url = f"{servers.db.url}?sslmode={mode}"
            self.away(self.postgres(url), "o Postgres não aceita TLS")
        self.assertEqual(self.postgres(f"{servers.db.url}?sslmode=disable").run("SELECT 1"), [[1]])

    def test_other_modes_are_refused(self) -> None:
        for options in ("sslmode=prefer", f"sslrootcert={self.trusted}", "sslmode=verify-ca"):
            with self.assertRaises(ValueError):
                self.postgres(f"{servers.db.url}?{options}")

    def test_rediss_verifies(self) -> None:
        options = f"?ssl_ca_certs={self.trusted}"
        good = self.relay(self.right, servers.cache)
        self.assertEqual(self.redis(f"rediss://127.0.0.1:{good}/0{options}").run("PING"), b"PONG")
        self.away(self.redis(f"rediss://127.0.0.1:{good}/0"), "certificado TLS recusado")
        for certificate in self.wrong:
            port = self.relay(certificate, servers.cache)
            url = f"rediss://127.0.0.1:{port}/0{options}"
            self.away(self.redis(url), "certificado TLS recusado")

    def test_what_speaks_no_tls(self) -> None:
        self.cache.greeting = [b"-ERR unknown command\r\n"]
        self.away(self.redis(f"rediss://127.0.0.1:{self.cache.port}/0"), "falha de TLS")
        hangs_up = HangsUp()
        self.addCleanup(hangs_up.end)
        self.away(self.redis(f"rediss://127.0.0.1:{hangs_up.port}/0"), "falha de TLS")


class TestNames(LongTimeoutCase):
    """Who the service is for Postgres: password, user and database."""

    def reason(self, url: str, **environment: str) -> str:
        """Return why Postgres can't be had with settings; "" where it can."""
        place = f"@127.0.0.1:{servers.db.port}/postgres"
        with mock.patch.dict(os.environ, environment | {"DATABASE_URL": url + place}):
            database = runpy.run_path(str(real.HERE / "server.py"))["database"]
        self.addCleanup(database.close)
        return str(database.ping().reason)

    def admin(self, *statements: str) -> None:
        with pg8000.native.Connection(
            "postgres", port=servers.db.port, host="127.0.0.1", password=PASSWORD, timeout=SECONDS
        ) as connection:
            for statement in statements:
                connection.run(statement)

    def test_the_password_is_the_urls_the_variables_the_files_or_senha123(self) -> None:
        self.admin("CREATE ROLE aluna LOGIN PASSWORD 'senha123'")
        right = servers.folder / "right"
        wrong = servers.folder / "wrong"
        right.write_text(PASSWORD + "\n", encoding="utf-8")
        wrong.write_text("errada\n", encoding="utf-8")
        me = "postgresql://postgres"
        refused = "senha recusada"
        for expected, url, variable, file in (
            ("", f"{me}:{quote(PASSWORD, safe='')}", "errada", wrong),
            (refused, f"{me}:errada", PASSWORD, right),
            ("", me, PASSWORD, wrong),
            (refused, me, "errada", right),
            ("", me, "", right),
            (refused, me, "", wrong),
            (refused, "postgresql://aluna", "", wrong),
            ("", "postgresql://aluna", "", ""),
            (refused, me, "", ""),
        ):
            with self.subTest(url=url, variable=variable, file=file):
                settings = {"POSTGRES_PASSWORD": variable, "POSTGRES_PASSWORD_FILE": str(file)}
                self.assertEqual(self.reason(url, **settings), expected)

    def test_where_it_connects_to(self) -> None:
        for url, place in (
            ("postgresql://", ("localhost", 5432)),
            ("postgresql://db", ("db", 5432)),
            ("postgresql://db:5433/x", ("db", 5433)),
            ("postgresql:///x?host=db&port=5433", ("db", 5433)),
            ("postgresql://outro:1/x?host=db&port=5433", ("db", 5433)),
            ("postgresql://d%62", ("db", 5432)),
        ):
            error = ConnectionRefusedError(errno.ECONNREFUSED, "no")
            with mock.patch("socket.create_connection", side_effect=error) as connect:
                self.away(self.postgres(url), "conexão recusada")
            self.assertEqual(connect.call_args.args[0], place)

    def test_the_hosts_that_are_told(self) -> None:
        for url, host in (
            ("redis://cache:6380/0", "cache"),
            ("redis:///1", "localhost"),
            ("unix:///pasta/redis.sock", "/pasta/redis.sock"),
        ):
            self.assertEqual(self.redis(url).host, host)
        self.assertEqual(self.postgres("postgresql://").host, "localhost")

    def test_names_of_odd_characters(self) -> None:
        name = "joão @:/?#%41"
        role = pg8000.native.identifier(name)
        database = pg8000.native.identifier(name + " db")
        self.admin(f"CREATE ROLE {role} LOGIN PASSWORD 'senha123'", f"CREATE DATABASE {database}")
        user = f"postgresql://{quote(name, safe='')}@127.0.0.1:{servers.db.port}"
        here = self.postgres(f"{user}/{quote(name + ' db', safe='')}", "senha123")
        found = here.run("SELECT current_user, current_database()")
        self.assertEqual(found, [[name, name + " db"]])

    def test_a_database_that_is_not_there(self) -> None:
        self.away(self.postgres(servers.db.url + "x"), "banco inexistente")

    def test_without_a_name_it_is_postgres_and_without_a_database_the_users(self) -> None:
        place = f"127.0.0.1:{servers.db.port}"
        self.admin("CREATE ROLE bruna LOGIN PASSWORD 'senha123'", "CREATE DATABASE bruna")
        for url, password, expected in (
            (f"postgresql://{place}", PASSWORD, ["postgres", "postgres"]),
            (f"postgres://bruna@{place}/", "senha123", ["bruna", "bruna"]),
        ):
            found = self.postgres(url, password).run("SELECT current_user, current_database()")
            self.assertEqual(found, [expected])


class TestTime(Case):
    """No wait without an end, and no end that holds up anybody else."""

    def test_a_visit_that_meets_all_waits_stays_below_the_limit(self) -> None:
        all_waits = 4 * TIMEOUT + AT_ONCE
        self.assertLess(all_waits, LIMIT)
        slower = 4  # times, so that what the computer takes besides matters less
        late = slower * (TIMEOUT - 0.08)
        urls = {"REDIS_URL": self.cache.url, "DATABASE_URL": self.db.url}
        with service(program=with_limits(slower * TIMEOUT, slower * AT_ONCE), **urls) as web:
            self.assertEqual(web.get().number, 1)
            self.cache.answers = {"PING": [late, b"+PONG\r\n"], "INCRBY": []}
            self.cache.drop()
            self.db.greeting = [late, WELCOME]
            soon = slower * (AT_ONCE - 0.03)
            self.db.answer = [soon, partial(setattr, self.db, "answer", []), CLOSE]
            answer = web.get()
        silent = "indisponível (tempo esgotado)\n"
        self.assertEqual(answer.text, f"Contador: {silent}Postgres: {silent}")
        self.assertEqual((self.cache.count("INCRBY"), self.db.received), (2, [""] * 3))
        self.assertGreater(answer.seconds, slower * 1.2)
        self.assertLess(answer.seconds, slower * all_waits)

    def test_the_log_tells_the_milliseconds_of_an_answer(self) -> None:
        self.cache.answers["INCRBY"] = [0.2, b":1\r\n"]
        with service(REDIS_URL=self.cache.url, DATABASE_URL=self.db.url) as web:
            web.get()
            web.end()
        milliseconds = float(web.lines[-1].split()[-2])
        self.assertGreaterEqual(milliseconds, 200)
        self.assertLess(milliseconds, 1000)

    def test_all_answers_to_one_packet_share_the_time(self) -> None:
        limit = 2.0
        self.enterContext(mock.patch.object(backends, "TIMEOUT", limit))
        cache = self.redis()
        cache.run("PING")
        self.cache.answers = {"INCRBY": [limit * 0.6, b":1\r\n"], "SET": [limit, b"+OK\r\n"]}
        cache.send([("INCRBY", KEY, 1), ("SET", KEY, 0), ("PING",)])
        started = time.monotonic()
        reasons = [reply.reason for reply in cache.receive()]
        self.assertEqual(reasons, ["", "tempo esgotado", "tempo esgotado"])
        self.assertLess(time.monotonic() - started, limit * 1.5)

    def test_a_resolver_that_takes_a_minute_does_not_hold_up_the_end(self) -> None:
        urls = {"REDIS_URL": "redis://lento/0", "DATABASE_URL": "postgresql://lento/x"}
        with service(program=slow_to_find("lento", 60), **urls) as web:
            self.assertEqual(web.get().status, 503)
            web.end(seconds=2)

    def test_connecting_has_our_time_out_whatever_the_url_wants(self) -> None:
        time_outs = []

        def refuse(connection: socket.socket, address: object) -> None:
            time_outs.append(connection.gettimeout())
            raise ConnectionRefusedError(errno.ECONNREFUSED, "no")

        with mock.patch.object(socket.socket, "connect", refuse):
            self.away(self.redis(self.cache.url + OURS_WIN), "conexão recusada")
            self.away(self.postgres(), "conexão recusada")
        self.assertEqual(time_outs, [TIMEOUT, TIMEOUT])

    def test_it_recovers_whatever_time_outs_the_url_wants(self) -> None:
        self.cache.answers["PING"] = []
        silent = self.redis(self.cache.url + OURS_WIN)
        with full_backlog() as port:
            dropped = self.redis(f"redis://127.0.0.1:{port}/0{OURS_WIN}")
            for cache in (silent, dropped):
                started = time.monotonic()
                self.away(cache, "tempo esgotado")
                self.assertLess(time.monotonic() - started, LIMIT)
        other = FakeRedis(port)
        self.addCleanup(other.end)
        self.cache.answers = {}
        for cache in (silent, dropped):
            with self.assertLogs() as log:
                eventually(partial(answers, cache), seconds=3)
            self.assertEqual(log.output, ["INFO:root:Redis: conectado de novo"])

    def test_a_server_that_is_away_is_asked_now_and_then(self) -> None:
        database = self.postgres()
        self.db.greeting = [0.04, CLOSE]
        attempts: list[tuple[float, float]] = []  # when each began and ended
        connect = database.connect

        def watched() -> Any:
            began = time.monotonic()
            try:
                return connect()
            finally:
                attempts.append((began, time.monotonic()))

        asked = 0
        end = time.monotonic() + SECONDS
        with (
            mock.patch.object(backends, "TIMEOUT", SECONDS),
            mock.patch.object(backends, "RETRY_TIMEOUT", SECONDS),
            mock.patch.object(database, "connect", watched),
        ):
            while len(attempts) < 5 and time.monotonic() < end:
                self.assertTrue(database.ping().reason)
                asked += 1
        pauses = [
            (next_began - ended) / (ended - began)
            for (began, ended), (next_began, _) in pairwise(attempts)
        ]
        self.assertEqual(len(pauses), 4)
        self.assertGreaterEqual(min(pauses), 5)  # times what the attempt took
        self.assertLess(min(pauses), 10)  # and no longer, where nothing else held it up
        self.assertGreater(asked, 20 * len(attempts))
        self.db.greeting = [WELCOME]
        eventually(lambda: database.ping().reason == "")

    def test_a_connection_that_is_given_up_is_closed(self) -> None:
        for backend, fake in ((self.redis(), self.cache), (self.postgres(), self.db)):
            fake.drop()
            connection = backend.open()  # held on to: the end of it would close it too
            (other_side,) = fake.connections
            backend.close()
            eventually(partial(is_closed, other_side))
            del connection

    def test_the_pause_ends_when_a_late_connection_serves(self) -> None:
        self.enterContext(mock.patch.object(backends, "TIMEOUT", 1.0))
        database = self.postgres()
        self.db.greeting = [0.7, WELCOME[:5], 0.7, WELCOME[5:]]  # each read is in time
        self.assertEqual(database.ping().reason, "tempo esgotado")
        eventually(lambda: database.ping().reason == "")
        self.db.greeting = [WELCOME]
        self.db.drop()
        self.assertEqual(database.ping().reason, "")

    def test_there_is_one_attempt_at_a_time(self) -> None:
        database = self.postgres()
        found = Event()
        resolve = socket.getaddrinfo
        attempts = []

        def slow(*words: Any, **options: Any) -> Any:
            attempts.append(words)
            found.wait(SECONDS)
            return resolve(*words, **options)

        with (
            mock.patch.object(backends, "RETRY_PAUSE", 0),
            mock.patch("socket.getaddrinfo", slow),
        ):
            for _ in range(3):
                self.assertEqual(database.ping().reason, "tempo esgotado")
            found.set()
            eventually(lambda: database.ping().reason == "")
        self.assertEqual(len(attempts), 1)

    def test_who_waits_for_a_server_known_to_be_away_waits_less(self) -> None:
        self.enterContext(mock.patch.object(backends, "TIMEOUT", SECONDS))
        database = self.postgres()
        self.db.greeting = [CLOSE]
        self.away(database, "conexão interrompida")
        self.db.greeting = []
        waits = []

        def takes_time() -> bool:
            started = time.monotonic()
            reason = database.ping().reason
            waits.append(time.monotonic() - started)
            return reason == "tempo esgotado"

        eventually(takes_time)  # after the pause that follows the first attempt
        self.assertGreater(waits[-1], backends.RETRY_TIMEOUT * 0.9)
        self.assertLess(waits[-1], (backends.RETRY_TIMEOUT + SECONDS) / 2)

    def test_two_silent_servers_hold_up_the_first_visit_most(self) -> None:
        self.cache.answers["PING"] = []
        self.db.greeting = []
        with service(REDIS_URL=self.cache.url, DATABASE_URL=self.db.url) as web:
            first = web.get().seconds
            end = time.monotonic() + 4  # in which both are tried again
            later = [0.0]
            while time.monotonic() < end:
                later.append(web.get().seconds)
                time.sleep(0.05)
        self.assertLess(first, LIMIT)
        self.assertGreater(max(later), backends.RETRY_TIMEOUT)
        self.assertLess(max(later), 2 * TIMEOUT)


def is_closed(connection: socket.socket) -> bool:
    """Tell whether this side of a connection has been closed."""
    return connection.fileno() == -1


def answers(cache: Redis) -> bool:
    """Tell whether a Redis answers."""
    try:
        return bool(cache.run("PING") == b"PONG")
    except Unavailable:
        return False


def says(database: Postgres, sql: str, reason: str) -> bool:
    """Tell whether this is why SQL gives no rows; "" where it gives some."""
    return database.ask(sql).reason == reason


class TestForStudents(LongTimeoutCase):
    """``cache.run`` and ``database.run``, with the real servers."""

    def test_redis_gives_the_value(self) -> None:
        cache = self.redis(servers.cache.url)
        store("41")
        self.assertEqual((cache.run("INCR", KEY), cache.run("GET", "nada")), (42, None))
        self.assertEqual(stored(), b"42")

    def test_a_key_that_cannot_be_counted_in_is_told_apart(self) -> None:
        cache = self.redis(servers.cache.url)
        for value in ("abc", str(2**63 - 1), ["lista"]):
            store(value)
            with self.assertRaises(BadValue):
                cache.run("INCR", KEY)

    def test_an_error_of_redis_is_told_in_its_words_and_breaks_nothing(self) -> None:
        cache = self.redis(servers.cache.url)
        with self.assertNoLogs():
            self.refuses(partial(cache.run, "INCR"), "wrong number of arguments for 'incr' command")
            self.assertEqual(cache.run("PING"), b"PONG")

    def test_postgres_gives_the_rows(self) -> None:
        database = self.postgres(servers.db.url)
        self.assertEqual(database.run("VALUES (1, 'um'), (2, 'é')"), [[1, "um"], [2, "é"]])
        self.assertEqual(database.run("CREATE TABLE visitas (numero int)"), None)

    def test_an_error_of_sql_is_told_in_postgress_words_and_breaks_nothing(self) -> None:
        database = self.postgres(servers.db.url)
        with self.assertNoLogs():
            self.refuses(partial(database.run, "SELECT 1/0"), "division by zero")
            two_lines = "DO $$ BEGIN RAISE E'um\\ndois'; END $$"
            self.refuses(partial(database.run, two_lines), "um")
            self.assertEqual(database.ping().reason, "")

    def test_the_end_of_a_connection_is_noted_and_so_is_any_answer_after_it(self) -> None:
        database = self.postgres(servers.db.url)
        end_it = "SELECT pg_terminate_backend(pg_backend_pid())"
        states = ["indisponível (conexão interrompida)", "conectado de novo"]
        for sql, reason in (("", ""), ("SELECT 1/0", "division by zero")):
            with self.assertLogs() as log:
                self.refuses(partial(database.run, end_it), "conexão interrompida")
                eventually(partial(says, database, sql, reason))
            self.assertEqual(log.output, [f"INFO:root:Postgres: {state}" for state in states])


if __name__ == "__main__":
    unittest.main()
