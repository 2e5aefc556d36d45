"""What the service bears: servers that stop, freeze or are not found, and a computer's limits."""

import os
import resource
import select
import signal
import socket
import sys
import threading
import time
import unittest
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest import mock

import psutil
import redis

from contador import front
from tools.harness import (
    CONNECTED,
    LIMIT,
    SECONDS,
    VISIT,
    Load,
    Service,
    eventually,
    full_backlog,
    read_all,
    revive,
    servers,
    service,
    slow_to_find,
    store,
    stored,
)
from tools.servers import Redis


def setUpModule() -> None:
    servers.start()
    idle.start()


def readable(connections: list[socket.socket]) -> list[socket.socket]:
    """Return the connections on which something has come."""
    return select.select(connections, [], [], 0)[0]


def cpu_seconds(web: Service) -> float:
    """Return how long the program computes while a second goes by."""
    process = psutil.Process(web.process.pid)
    before = process.cpu_times()
    time.sleep(1)
    after = process.cpu_times()
    return float(after.user + after.system - before.user - before.system)


def announcing(method: str) -> list[str]:
    """Return the program, which prints the name of a method of Front each time it is called."""
    program = (
        "import server\n"
        f"method = server.Front.{method}\n"
        "def announced(*words):\n"
        f"    print('{method}', flush=True)\n"
        "    return method(*words)\n"
        f"server.Front.{method} = announced\n"
        "server.main()\n"
    )
    return [sys.executable, "-c", program]


class Idle:
    """Connections that send nothing more; it is measured, while other tests run, for how long."""

    requests = (b"", b"GET / HT", b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n")

    def start(self) -> None:
        self.web = Service()
        unittest.addModuleCleanup(self.web.end_once)  # which ends the connections too
        self.kept: list[float] = []  # how long, in seconds, each was
        for request in self.requests:
            arguments = [self.web.connect(), request]
            threading.Thread(target=self.wait, args=arguments, daemon=True).start()

    def wait(self, connection: socket.socket, request: bytes) -> None:
        started = time.monotonic()
        with connection:
            connection.settimeout(40)
            connection.sendall(request)
            read_all(connection)
        self.kept.append(time.monotonic() - started)

    def have_ended(self) -> bool:
        return len(self.kept) == len(self.requests)


idle = Idle()


class TestFaults(unittest.TestCase):
    """Backends that stop, freeze, refuse or can't be found."""

    def setUp(self) -> None:
        store(None)
        self.web = Service()
        self.addCleanup(self.web.end_once)
        for server in (servers.cache, servers.db):
            self.addCleanup(revive, server)
        self.web.get()

    def test_after_a_restart_the_first_request_succeeds(self) -> None:
        with ThreadPoolExecutor(8) as pool:  # so that there are connections that go stale
            list(pool.map(lambda _: self.web.get(), range(100)))
        for server in (servers.cache, servers.db):
            server.stop()
            server.start()
            before = int(stored() or 0)
            for number in range(before + 1, before + 9):
                self.assertEqual(self.web.get().text, f"Contador: {number}\n{CONNECTED}")

    def test_without_postgres_visits_still_count(self) -> None:
        servers.db.stop()
        for number in (2, 3):
            answer = self.web.get()
            self.assertEqual(
                (answer.status, answer.text),
                (200, f"Contador: {number}\nPostgres: indisponível (conexão recusada)\n"),
            )
        self.assertEqual(
            self.web.get("/health").text,
            "Redis: conectado\nPostgres: indisponível (conexão recusada)\n",
        )
        self.assertEqual(self.web.get("/health").status, 503)
        servers.db.start()
        eventually(lambda: self.web.get("/health").status == 200)
        self.assertEqual(self.web.get().text, f"Contador: 4\n{CONNECTED}")
        self.web.end()
        news = [line for line in self.web.lines if line.startswith("Postgres")]
        self.assertEqual(
            news, ["Postgres: indisponível (conexão recusada)\n", "Postgres: conectado de novo\n"]
        )

    def test_under_load_postgres_can_go_and_come(self) -> None:
        load = Load(self.web.port)
        self.addCleanup(load.stop)
        load.more(100)
        servers.db.stop()
        load.more(100, r"Contador: \d+\nPostgres: indisponível")
        servers.db.start()
        load.more(100, CONNECTED)
        answers = load.stop()
        self.assertEqual(({answer.status for answer in answers}, load.lost), ({200}, []))
        self.assertLess(max(answer.seconds for answer in answers), LIMIT)

    def test_without_redis_it_says_so_at_once_and_counts_on_afterwards(self) -> None:
        servers.cache.stop()
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda _: self.web.get(), range(64)))
        for answer in answers:
            self.assertEqual(
                (answer.status, answer.text),
                (503, f"Contador: indisponível (conexão recusada)\n{CONNECTED}"),
            )
            self.assertTrue(answer.headers["Retry-After"])
        self.assertEqual(self.web.get("/reset").status, 503)
        self.assertEqual(self.web.get("/reset", "HEAD").status, 503)
        servers.cache.start()
        eventually(lambda: self.web.get("/health").status == 200)
        self.assertEqual(self.web.get().text, f"Contador: 2\n{CONNECTED}")
        self.web.end()
        self.assertEqual(sum(line.startswith("Redis") for line in self.web.lines), 2)

    def test_frozen_backends_hold_nobody_up_and_no_number_is_given_twice(self) -> None:
        cache, db = servers.cache, servers.db
        names = (("Contador", cache), ("Postgres", db))
        for frozen in ([db], [cache], [cache, db]):
            with self.subTest(frozen=[type(server).__name__ for server in frozen]):
                before = int(stored() or 0)
                load = Load(self.web.port)
                self.addCleanup(load.stop)
                load.more(100)
                for server in frozen:
                    server.signal(signal.SIGSTOP)
                lines = [
                    f"{name}: indisponível .tempo esgotado.\n"
                    for name, server in names
                    if server in frozen
                ]
                load.more(50, "".join(lines))
                for server in frozen:
                    server.signal(signal.SIGCONT)
                load.more(50, rf"Contador: \d+\n{CONNECTED}")
                answers = load.stop()
                self.assertEqual(load.lost, [])
                self.assertLess(max(answer.seconds for answer in answers), LIMIT)
                numbers = [answer.number for answer in answers if answer.status == 200]
                self.assertEqual(len(set(numbers)), len(numbers))
                for name, server in names:
                    noticed = any(
                        f"{name}: indisponível (tempo esgotado)\n" in answer.text
                        for answer in answers
                    )
                    self.assertEqual(noticed, server in frozen)
                self.assertEqual(
                    {answer.status for answer in answers}, {200, 503} if cache in frozen else {200}
                )
                if cache not in frozen:  # no visit's fate is unknown: each has counted once
                    self.assertEqual(int(stored() or 0) - before, len(numbers))

    def test_addresses_that_swallow_packets_hold_nobody_up(self) -> None:
        with full_backlog() as port:
            self.check_held_up_by_none(
                REDIS_URL=f"redis://127.0.0.1:{port}/0",
                DATABASE_URL=f"postgresql://u:p@127.0.0.1:{port}/x",
            )

    def test_a_slow_resolver_holds_nobody_up(self) -> None:
        self.check_held_up_by_none(
            program=slow_to_find("lento", 5),
            REDIS_URL="redis://lento:1/0",
            DATABASE_URL="postgresql://u:p@lento:1/x",
        )

    def check_held_up_by_none(self, **options: Any) -> None:
        with service(**options) as web:
            with ThreadPoolExecutor(8) as pool:
                answers = list(pool.map(lambda _: web.get(), range(64)))
            if sys.platform == "linux":  # no thread is left behind for each attempt
                self.assertLess(len(os.listdir(f"/proc/{web.process.pid}/task")), 20)
        self.assertLess(max(answer.seconds for answer in answers), LIMIT)
        text = "Contador: indisponível (tempo esgotado)\nPostgres: indisponível (tempo esgotado)\n"
        self.assertEqual({(answer.status, answer.text) for answer in answers}, {(503, text)})

    def test_a_connection_that_comes_late_serves_later(self) -> None:
        url = f"redis://localhost:{servers.cache.port}/0"
        with service(program=slow_to_find("localhost", 0.7), REDIS_URL=url) as web:
            self.assertEqual(
                web.get().text, f"Contador: indisponível (tempo esgotado)\n{CONNECTED}"
            )
            with servers.client() as client:  # until it is there: its first command is PING
                eventually(lambda: any(each["cmd"] == "ping" for each in client.client_list()))
            servers.cache.stop()  # and has gone again, unused
            servers.cache.start()
            self.assertEqual(web.get().status, 503)  # the next one takes as long
            eventually(lambda: web.get().text == f"Contador: 2\n{CONNECTED}")

    @unittest.skipUnless(
        hasattr(resource, "prlimit"), "only Linux can take a running server's disk away"
    )
    def test_a_full_disk_is_told_and_passes(self) -> None:
        other = Redis(servers.folder / "full")
        other.command = ["sh", "-c", 'trap "" XFSZ; exec "$@"', "sh", *other.command]
        other.start()
        self.addCleanup(other.kill)
        assert other.process
        with service(REDIS_URL=other.url) as web:
            self.assertEqual(web.get().number, 1)
            # Or a write that met the fsync of each second would be put off, and fail later.
            with redis.Redis(port=other.port, socket_timeout=SECONDS) as client:
                client.config_set("appendfsync", "no")
            resource.prlimit(other.process.pid, resource.RLIMIT_FSIZE, (1, resource.RLIM_INFINITY))
            # Redis notices only when it has to write this one, and refuses what comes next.
            self.assertEqual(web.get().number, 2)
            answer = web.get()
            reason = "o Redis não consegue gravar em disco"
            self.assertEqual(
                (answer.status, answer.text),
                (503, f"Contador: indisponível ({reason})\n{CONNECTED}"),
            )
            unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
            resource.prlimit(other.process.pid, resource.RLIMIT_FSIZE, unlimited)
            eventually(lambda: web.get().status == 200)
            self.assertEqual(web.get().number, 4)

    def test_kill_9_of_redis_loses_no_answered_visit(self) -> None:
        load = Load(self.web.port)
        self.addCleanup(load.stop)
        load.more(300)
        servers.cache.kill()
        load.more(1, "indisponível")
        servers.cache.start()
        numbers = [answer.number for answer in load.stop() if answer.status == 200]
        self.assertEqual((len(set(numbers)), load.lost), (len(numbers), []))
        self.assertGreaterEqual(int(stored() or 0), max(numbers))


class TestLimits(unittest.TestCase):
    """What it uses of the computer: open files, time."""

    def test_with_fewer_files_than_it_needs_it_says_so(self) -> None:
        with self.assertRaisesRegex(AssertionError, r"\Aulimit -n: são 63 arquivos; .* 64\n\Z"):
            Service(files=63)

    def test_at_its_limit_of_connections_the_others_wait_and_are_served(self) -> None:
        for files in (64, 100):
            with self.subTest(files=files):
                self.check_limit(files)

    def check_limit(self, files: int) -> None:
        with service(files=files) as web:
            web.freeze()  # so that all wait to be accepted at once
            held = [web.connect() for _ in range(files)]
            for connection in held:
                self.addCleanup(connection.close)
                connection.sendall(VISIT)
            web.thaw()
            # Redis and Postgres are asked for the first time now, which takes files too.
            self.assertIn(b"Postgres: conectado", held[0].recv(65536))
            eventually(lambda: len(readable(held[1:])) > files - 40)
            self.assertLess(cpu_seconds(web), 0.1)  # it sleeps, though others wait
            self.assertNotIn(held[-1], readable(held))
            for connection in held[:-1]:
                connection.close()
            self.assertIn(b"Postgres: conectado", held[-1].recv(65536))

    def test_at_its_limit_of_connections_it_stops_in_order(self) -> None:
        with service(files=64) as web:
            held = [web.connect() for _ in range(64)]
            for connection in held:
                self.addCleanup(connection.close)
                connection.sendall(VISIT)
            eventually(lambda: len(readable(held)) > 24)
            web.end()
        self.assertNotIn("Traceback", "".join(web.lines))

    def test_it_takes_as_many_files_as_it_may(self) -> None:
        with service(files="-S 64") as web:
            held = [web.connect() for _ in range(300)]
            for connection in held:
                self.addCleanup(connection.close)
                connection.sendall(VISIT)
            for connection in held:
                self.assertIn(b"Postgres: conectado", connection.recv(65536))

    def test_of_a_limit_without_end_it_takes_a_part(self) -> None:
        limits = (256, resource.RLIM_INFINITY)  # as on macOS
        with (
            mock.patch("resource.getrlimit", return_value=limits),
            mock.patch("resource.setrlimit") as set_to,
        ):
            files = front.allow_files()
        set_to.assert_called_once_with(resource.RLIMIT_NOFILE, (files, resource.RLIM_INFINITY))
        self.assertIn(files, range(1000, 10_000))  # each connection takes memory, too

    def test_it_sleeps_while_nobody_asks(self) -> None:
        with service() as web, web.connect():
            web.get()
            self.assertLess(cpu_seconds(web), 0.1)

    def test_it_looks_for_idle_connections_once_a_second_however_busy_it_is(self) -> None:
        started = time.monotonic()
        with service(program=announcing("close_idle")) as web:
            for _ in range(100):
                web.get("/health")
            eventually(lambda: web.lines.count("close_idle\n") >= 3, seconds=8)
            web.end()
        seconds = time.monotonic() - started
        self.assertLess(web.lines.count("close_idle\n"), int(seconds) + 2)

    def test_it_wakes_once_for_each_of_the_visits_that_come_one_by_one(self) -> None:
        with service(program=announcing("turn")) as web:
            with web.connect() as connection:
                for _ in range(100):
                    connection.sendall(VISIT)
                    self.assertIn(b"Contador", connection.recv(65536))
                    time.sleep(0.01)  # or the next visit would come before it can sleep again
            web.end()
        # Besides: one a second, some as it begins and ends.
        self.assertIn(web.lines.count("turn\n"), range(100, 150))

    def test_it_sleeps_while_it_waits_for_a_last_request(self) -> None:
        with service(program=announcing("turn")) as web, web.connect():
            web.get()
            web.end()
        self.assertLess(web.lines.count("turn\n"), 50)

    def test_it_waits_for_no_last_request_where_nobody_is_connected(self) -> None:
        with service(program=announcing("turn")) as web:
            web.end()
        self.assertLess(web.lines.count("turn\n"), 5)

    def test_an_idle_connection_is_closed_after_20_seconds(self) -> None:
        eventually(idle.have_ended, seconds=40)
        for seconds in idle.kept:
            self.assertTrue(19 < seconds < 27, seconds)
