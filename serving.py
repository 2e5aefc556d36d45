"""waitress, made ready for hostile requests, frozen backends, many visits at once and a quick end."""

import ctypes
import logging
import resource
import signal
import socket
import struct
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from functools import lru_cache
from http.client import responses
from typing import Any
from wsgiref.types import WSGIApplication

import waitress
from waitress import channel, parser, task, wasyncore

from backends import SPIN

LINGER = 0.4  # seconds that open connections have for a last request when the server stops
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

    def write(self, data: bytes) -> None:
        if self.channel.server.task_dispatcher.stopping:
            self.set_close_on_finish()
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
    """An answer of the application, in one piece."""

    body: Iterable[bytes] = ()
    error: Exception | None = None

    def call(self) -> None:
        """Call the application; its answer is waited for later."""
        self.start_time = time.time()
        try:
            self.body = self.channel.server.application(self.get_environment(), self.start_response)
        except Exception as error:
            self.error = error

    def start_response(self, status: str, headers: list[tuple[str, str]], exc_info: object = None) -> None:
        self.status, self.complete = status, True
        self.response_headers += headers

    def start(self) -> None:  # call() was the start
        pass

    def execute(self) -> None:
        if self.error:  # raised here, it gets a line in the log and the answer 500
            raise self.error
        try:
            self.write(b"".join(self.body))
        finally:
            getattr(self.body, "close", bool)()


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
    """A connection, whose next request can be on its way to the backends before its turn has come."""

    error_task_class, parser_class = ErrorTask, Parser
    called: WSGITask | None = None

    def call(self) -> None:
        """Call the application for the next request, if it is one and somebody waits for its answer."""
        if self.connected and not self.requests[0].error:
            self.called = WSGITask(self, self.requests[0])
            self.called.call()

    def task_class(self, _: object, request: Parser) -> WSGITask:  # what service() takes for the task's class
        called, self.called = self.called, None
        return called or WSGITask(self, request)

    def service(self) -> None:
        if not self.called:
            self.call()
        super().service()


class Dispatcher(task.ThreadedTaskDispatcher):
    """Answers in the main loop itself, and leaves to threads only requests that may have to wait for a failing backend.

    Threads that take turns under the GIL spend longer on handing it over than on answering. What has come in together
    is put to the backends together: the application is called for every request before the first answer is waited for.
    """

    stopping, last = False, 0.0

    def __init__(self, threads: int, failing: Callable[[], bool]) -> None:
        super().__init__()
        self.failing, self.ready = failing, deque[Channel]()
        self.set_thread_count(threads)

    def add_task(self, task: Channel) -> None:
        self.ready.append(task)

    def run(self) -> None:
        """Answer one request of each connection that has sent any."""
        called = list[Channel]()
        for each in [self.ready.popleft() for _ in range(len(self.ready))]:
            if self.failing() and self.active_count + len(self.queue) < len(self.threads):
                super().add_task(each)
            else:
                each.call()
                called.append(each)
        for each in called:
            each.service()
        if called:
            self.last = time.monotonic()


def serve(
    app: WSGIApplication, listener: socket.socket, threads: int, failing: Callable[[], bool], access_log: bool
) -> None:
    """Answer the requests that come to ``listener``, until SIGTERM or SIGINT; then finish those that were accepted.

    ``threads`` take the requests that may have to wait for a backend, while ``failing()`` says that one should find out
    whether it is back; ``access_log``: a line per request.
    """
    logging.getLogger("waitress").setLevel(logging.ERROR)
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
    while not dispatcher.stopping:  # a short wait, because a signal that comes just before it does not end it
        turn(0 if dispatcher.ready or time.monotonic() < dispatcher.last + SPIN else 0.25)
    if sys.platform == "linux":  # SO_ATTACH_FILTER with "ret 0" drops what knocks now, which close() would reset
        drop = ctypes.create_string_buffer(struct.pack("HBBI", 6, 0, 0, 0))
        listener.setsockopt(socket.SOL_SOCKET, 26, struct.pack("HP", 1, ctypes.addressof(drop)))
    server.handle_accept()
    wasyncore.dispatcher.close(server)
    stopped = time.monotonic()
    while server.active_channels and time.monotonic() < stopped + 1.7:
        turn(0.02)
        if time.monotonic() > stopped + LINGER:
            for each in list(server.active_channels.values()):
                if not each.requests and not each.total_outbufs_len:
                    each.handle_close()
