"""waitress, made ready for hostile requests, frozen backends, a busy core and a quick end."""

import logging
import os
import random
import resource
import signal
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from functools import lru_cache
from http.client import responses
from typing import Any
from wsgiref.types import WSGIApplication

import waitress
from waitress import channel, parser, task, wasyncore

SLOW = 0.002  # seconds for one request, from which on the others should not have to wait for it
LINGER = 0.2  # seconds that open connections have for a last request when the server stops
MAX_CONNECTIONS = 4000
HEADERS = [
    ("Content-Type", "text/plain; charset=utf-8"),
    ("Cache-Control", "no-store"),
    ("X-Content-Type-Options", "nosniff"),
]
ERROR_TEXTS = {
    400: "Requisição malformada\n",
    413: "Corpo grande demais\n",
    431: "Cabeçalhos grandes demais\n",
    500: "Erro interno\n",
    501: "Transfer-Encoding sem suporte\n",
}


@lru_cache(maxsize=1)
def clf_time(second: int) -> str:
    """Return a time, in seconds since 1970, as the Common Log Format has it."""
    return time.strftime("%d/%b/%Y:%H:%M:%S %z", time.localtime(second))


class Task(task.Task):
    """An answer: sent in one piece, logged, and the last of its connection when the server stops."""

    def start(self) -> None:
        super().start()
        if self.channel.server.task_dispatcher.stopping:
            self.set_close_on_finish()

    def write(self, data: bytes) -> None:
        self.wrote_header, headers = True, self.build_response_header()
        self.content_bytes_written = len(data)
        self.channel.write_soon(headers + data)  # waitress would send two packets

    def service(self) -> None:
        try:
            super().service()
        finally:
            if (
                self.complete
                and self.channel.server.access_log
                and (self.status, self.request.path) != ("200 OK", "/health")
            ):
                self.log_access()

    def log_access(self) -> None:
        """Print a line in Common Log Format (Apache's manual, "Log Files"), and the milliseconds that it took."""
        line = "-" if self.request.error else self.request.first_line.decode("latin-1")
        if not (line.isascii() and line.isprintable()) or '"' in line or "\\" in line:  # or a request could forge lines
            line = line.encode("unicode_escape").decode().replace('"', '\\"')
        size, elapsed = self.content_bytes_written or "-", (time.time() - self.start_time) * 1000
        where, when = self.channel.addr[0], clf_time(int(self.start_time))
        sys.stdout.write(f'{where} - - [{when}] "{line}" {self.status[:3]} {size} {elapsed:.1f} ms\n')


class WSGITask(Task, task.WSGITask):
    """An answer of the application."""


class ErrorTask(Task, task.ErrorTask):
    """An answer to what never gets to the application, in the form of the others."""

    def execute(self) -> None:
        code = self.request.error.code
        body = ERROR_TEXTS[code].encode()
        self.status, self.content_length = f"{code} {responses[code]}", len(body)
        self.response_headers += HEADERS
        self.set_close_on_finish()
        self.write(body)


class Parser(parser.HTTPRequestParser):
    """A parser that calls ``http://[`` and a length of 5,000 digits malformed, where waitress's own would raise."""

    path = ""

    def parse_header(self, header_plus: bytes) -> None:
        try:
            super().parse_header(header_plus)
        except ValueError as error:
            raise parser.ParsingError(str(error)) from error


class Channel(channel.HTTPChannel):
    """A connection; its requests tell the dispatcher how long they took."""

    task_class, error_task_class, parser_class = WSGITask, ErrorTask, Parser

    def service(self) -> None:
        started = time.monotonic()
        super().service()
        self.server.task_dispatcher.slow = time.monotonic() - started > SLOW


class Dispatcher(task.ThreadedTaskDispatcher):
    """Answers in the main loop itself, and leaves it to threads only while a backend is slow or failing.

    Threads that take turns under the GIL spend longer on handing it over than on answering.
    """

    slow = stopping = False

    def __init__(self, threads: int, failing: Callable[[], bool]) -> None:
        super().__init__()
        self.failing, self.ready = failing, deque[Channel]()
        self.set_thread_count(max(threads, 2))  # one may have to wait for a frozen backend

    def add_task(self, task: Channel) -> None:
        self.ready.append(task)

    def run(self) -> None:
        while self.ready:
            each = self.ready.popleft()
            if self.slow or self.failing():
                super().add_task(each)
            else:
                each.service()


def serve(
    app: WSGIApplication, listener: socket.socket, threads: int, failing: Callable[[], bool], access_log: bool
) -> None:
    """Answer the requests that come to ``listener``, until SIGTERM or SIGINT; then finish those that were accepted.

    ``threads`` wait for backends while ``failing()`` says that one is away; ``access_log``: a line per request.
    """
    logging.getLogger("waitress").setLevel(logging.ERROR)
    if hasattr(os, "sched_setaffinity"):  # one core is all that the GIL lets a process use; moving about costs time
        os.sched_setaffinity(0, {random.choice(list(os.sched_getaffinity(0)))})
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    files = MAX_CONNECTIONS + 100 if most == resource.RLIM_INFINITY else min(MAX_CONNECTIONS + 100, most)
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, most))
    dispatcher = Dispatcher(threads, failing)
    server: Any = waitress.create_server(
        app,
        map={},
        _dispatcher=dispatcher,
        sockets=[listener],
        connection_limit=files - 100,
        channel_timeout=20,
        cleanup_interval=5,
        recv_bytes=65536,  # what is too long is read all the same: closing on unread data would lose the answer
        max_request_header_size=16384,
        max_request_body_size=65536,
        asyncore_use_poll=True,
        clear_untrusted_proxy_headers=False,
        log_socket_errors=False,
    )
    server.channel_class, server.access_log = Channel, access_log
    wake, main = server.pull_trigger, threading.get_ident()
    server.pull_trigger = lambda: threading.get_ident() == main or wake()  # the main loop is awake when it answers

    accept = server.handle_accept

    def accept_waiting() -> None:  # waitress alone would take one connection a turn
        before = 0
        while before < len(server._map) < files:
            before = len(server._map)
            accept()

    server.handle_accept = accept_waiting

    def turn(timeout: float) -> None:
        wasyncore.loop(timeout, use_poll=True, map=server._map, count=1)
        dispatcher.run()

    def stop(*_: object) -> None:
        dispatcher.stopping = True
        wake()

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    while not dispatcher.stopping:
        turn(1)
    server.handle_accept()
    wasyncore.dispatcher.close(server)
    stopped = time.monotonic()
    while server.active_channels and time.monotonic() < stopped + 1.7:
        turn(0.02)
        if time.monotonic() > stopped + LINGER:
            for each in list(server.active_channels.values()):
                if not each.requests and not each.total_outbufs_len:
                    each.handle_close()
