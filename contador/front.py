"""What stands before the application: waitress, answering what came in together as one batch.

All that knows waitress from inside is here. It gives each request's ``environ`` one more entry,
``contador.batch``: what ``make_batch`` made of all requests that were complete at that moment.
"""

import errno
import logging
import resource
import selectors
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any
from wsgiref.types import WSGIApplication, WSGIEnvironment

from waitress import create_server, wasyncore
from waitress.channel import HTTPChannel
from waitress.parser import HTTPRequestParser, ParsingError
from waitress.task import WSGITask

from contador import log
from contador.settings import BadSetting

IDLE = 20  # seconds without a byte until a connection is closed
IDLE_CHECK = 1  # seconds between two looks for such
LONGEST_SLEEP = IDLE_CHECK  # seconds, or the next look would come late
LINGER = 0.3  # seconds that open connections have for a last request when the program stops
LAST_BATCH = 5.5  # no batch begins later than this after the signal: Docker kills at 10
MAX_FILES = 4096  # open at once, most of them connections
MIN_FILES = 64
SPARE_FILES = 32  # of these, for the program, its libraries and what it was started with

CANNOT_LISTEN = {
    errno.EADDRINUSE: "a porta já está em uso",
    errno.EADDRNOTAVAIL: "o endereço não é deste computador",
    errno.EACCES: "sem permissão para usar esta porta",
}

MakeBatch = Callable[[list[tuple[str, str]]], Any]


class Parser(HTTPRequestParser):
    """Refuses also what RFC 9112 (2.3, 3.2) forbids, and versions other than 1.0 and 1.1."""

    def parse_header(self, header_plus: bytes) -> None:
        try:
            super().parse_header(header_plus)
        except ValueError as error:  # "http://[", or a length of 5,000 digits
            raise ParsingError("Invalid request") from error
        if self.version not in ("1.0", "1.1"):
            raise ParsingError("HTTP/1.0 or HTTP/1.1 is required")
        host = self.headers.get("HOST")
        several = host is not None and ", " in host  # as waitress joins them
        if self.version == "1.1" and (host is None or several):
            raise ParsingError("HTTP/1.1 requires one Host")


class Task(WSGITask):
    """Answers one request of the batch, with one packet, and writes its line of the log."""

    wrote_header: bool  # waitress's, which has no types

    def get_environment(self) -> WSGIEnvironment:
        if self.front.defect:
            raise self.front.defect
        environ: WSGIEnvironment = super().get_environment()
        environ["contador.batch"] = self.front.batch
        return environ

    @property
    def front(self) -> "Front":
        """Return where the batch and the log are; waitress calls it a dispatcher of tasks."""
        front: Front = self.channel.server.task_dispatcher
        return front

    def service(self) -> None:
        is_last = len(self.channel.requests) == 1
        if is_last and self.front.stopped_at is not None:
            self.request.headers["CONNECTION"] = "close"  # waitress then says so, in HTTP/1.0 too
        try:
            super().service()
        finally:
            if self.complete:  # the application has answered, whether or not the client is there
                self.front.log_answer(self)

    def write(self, data: bytes) -> None:
        """Send the header and the body, whose length the application has told, at once.

        waitress's own method sends them one after the other: each would be a packet.
        """
        self.content_bytes_written += len(data)
        if not self.wrote_header:
            data = self.build_response_header() + data
            self.wrote_header = True
        self.channel.write_soon(data)


class Channel(HTTPChannel):
    """A connection; it reads requests with Parser, and answers each with a Task."""

    parser_class = Parser
    task_class = Task

    def send_continue(self) -> None:
        if not self.request.completed:  # or waitress would wait for more, and never answer
            super().send_continue()


class Watched(dict[int, Any]):
    """waitress's map from file numbers to what handles them; what is in it is watched.

    waitress's own loop asks all of them, at each turn, what they wait for. Here only those are
    asked again that something has happened to.
    """

    def __init__(self) -> None:
        super().__init__()
        self.selector = selectors.DefaultSelector()
        self.events: dict[int, int] = {}  # that each is watched for

    def __setitem__(self, number: int, handler: Any) -> None:
        super().__setitem__(number, handler)
        self.selector.register(number, selectors.EVENT_READ, handler)
        self.events[number] = selectors.EVENT_READ

    def __delitem__(self, number: int) -> None:
        super().__delitem__(number)
        if self.events.pop(number):
            self.selector.unregister(number)

    def watch(self, handler: Any) -> None:
        """Watch for what a handler waits for now, if it is open; this may be nothing."""
        if not handler.socket:
            return
        number = handler.socket.fileno()
        events = selectors.EVENT_READ if handler.readable() else 0
        if handler.writable():
            events |= selectors.EVENT_WRITE
        if events == self.events[number]:
            return
        if self.events[number]:
            self.selector.unregister(number)
        if events:
            self.selector.register(number, events, handler)
        self.events[number] = events


class Front:
    """Listens at ``host`` and ``port``, and answers with ``app`` what comes, in one thread.

    ``make_batch`` gets the method and the path of each request that came in together. ``app`` has
    to tell Content-Length. ``access_log`` tells whether its answers are lines on standard output.
    A host, a port or a number of files that can't be used: BadSetting.
    """

    def __init__(
        self, host: str, port: int, app: WSGIApplication, make_batch: MakeBatch, access_log: bool
    ) -> None:
        self.make_batch = make_batch
        self.access_log = access_log
        self.limit = allow_files() - SPARE_FILES  # of the connections, and two files of waitress's
        self.connections = Watched()
        self.waiting: list[Channel] = []  # connections with a complete request
        self.batch: Any = None  # that is being answered
        self.defect: Exception | None = None  # why there is none
        self.started = 0.0  # time.monotonic() of the batch
        self.clock = ""  # its time, as the log has it
        self.lines: list[str] = []  # its lines of the log
        self.stopped_at: float | None = None  # time.monotonic() of the signal
        logging.getLogger("waitress").setLevel(logging.ERROR)
        listener = listen(host, port)
        shown_host = f"[{host}]" if ":" in host else host
        self.url = f"http://{shown_host}:{listener.getsockname()[1]}"
        self.server: Any = create_server(
            app,
            map=self.connections,
            threads=0,
            sockets=[listener],
            connection_limit=self.limit,
            channel_timeout=IDLE,
            ident="",  # no Server header
            recv_bytes=65536,  # a header that is too long is read, or the answer would be lost
            max_request_header_size=16384,
            max_request_body_size=65536,
            clear_untrusted_proxy_headers=False,  # nothing reads them
            log_socket_errors=False,  # a client that goes away is nothing to report
        )
        self.server.channel_class = Channel
        self.server.task_dispatcher = self  # which would be a pool of threads

    def add_task(self, channel: Channel) -> None:
        """Take note that a connection has a complete request; waitress calls this."""
        self.waiting.append(channel)

    def serve(self) -> None:
        """Answer what comes until ``stop`` is called, then finish what was accepted."""
        next_cleanup = 0.0
        while self.stopped_at is None:
            self.turn(LONGEST_SLEEP)
            if time.monotonic() > next_cleanup:
                next_cleanup = time.monotonic() + IDLE_CHECK
                self.close_idle()
        self.finish()

    def stop(self, *_: object) -> None:
        """Begin to stop; a signal may call it at any moment."""
        if self.stopped_at is None:
            self.stopped_at = time.monotonic()
        self.server.pull_trigger()  # ends the wait, also one that is just about to begin

    def finish(self) -> None:
        """Accept nothing more, and answer what was accepted, for a limited time."""
        assert self.stopped_at is not None
        self.accept_waiting()
        wasyncore.dispatcher.close(self.server)  # server.close() closes the trigger as well
        end_of_linger = time.monotonic() + LINGER
        while self.server.active_channels and time.monotonic() < self.stopped_at + LAST_BATCH:
            # Before the turn, which may take long: what came meanwhile gets one more.
            lingering = time.monotonic() < end_of_linger
            self.turn(0.02)
            if not (lingering or self.waiting):
                break

    def turn(self, timeout: float) -> None:
        """Read what arrives within ``timeout`` seconds; answer one request of each connection."""
        if self.server.accepting:
            self.connections.watch(self.server)  # at the limit of connections it waits for nothing
        ready = self.connections.selector.select(0 if self.waiting else timeout)
        for key, events in ready:
            self.handle(key, events)
        channels = [channel for channel in self.waiting if channel.connected]
        self.waiting = []
        if channels:
            self.answer(channels)
        for handler in {*channels, *(key.data for key, _ in ready)}:
            self.connections.watch(handler)

    def handle(self, key: selectors.SelectorKey, events: int) -> None:
        """Read or write what can be read or written; accept all connections that wait."""
        if key.data is self.server:
            self.accept_waiting()
        elif events & selectors.EVENT_READ:
            wasyncore.read(key.data)
        else:
            wasyncore.write(key.data)

    def accept_waiting(self) -> None:
        """Accept all connections that wait: waitress takes one a call."""
        before = 0
        while before < len(self.connections) < self.limit:
            before = len(self.connections)
            with suppress(OSError):  # the client has gone
                self.server.handle_accept()

    def close_idle(self) -> None:
        """Close what has been idle for too long: waitress marks it, and leaves it to its loop."""
        self.server.maintenance(time.time())
        for channel in list(self.server.active_channels.values()):
            if channel.will_close:
                channel.handle_close()

    def answer(self, channels: list[Channel]) -> None:
        """Answer the first request of each connection, all as one batch."""
        self.started = time.monotonic()
        self.clock = time.strftime("%d/%b/%Y:%H:%M:%S %z")
        requests = [channel.requests[0] for channel in channels]
        wanted = [(each.command, path_of(each)) for each in requests if not each.error]
        try:
            self.batch = self.make_batch(wanted)
            self.defect = None
        except Exception as error:  # for each of them, as one in the application would be
            self.defect = error
        for channel in channels:
            with suppress(OSError):  # a "100 Continue" that can't be sent: the client has gone
                channel.service()
        # Each answer writes a byte to the trigger's pipe; without this the next select would return
        # at once.
        self.server.trigger.handle_read()
        log.write("".join(self.lines))
        self.lines.clear()

    def log_answer(self, task: Task) -> None:
        """Add an answer's line, in the Common Log Format (Apache's manual, mod_log_config)."""
        environ = task.environ
        status = task.status.partition(" ")[0]
        is_no_news = status == "200" and environ["PATH_INFO"] == "/health"
        if not self.access_log or is_no_news:
            return
        method = environ["REQUEST_METHOD"]
        request = f"{method} {environ['REQUEST_URI']} {environ['SERVER_PROTOCOL']}"
        request = request.encode("unicode_escape").decode()  # or it could forge lines
        request = request.replace('"', '\\"')
        size = "-" if method == "HEAD" else task.content_length
        elapsed = (time.monotonic() - self.started) * 1000
        self.lines.append(
            f'{environ["REMOTE_ADDR"]} - - [{self.clock}] "{request}" {status} {size}'
            f" {elapsed:.1f} ms\n"
        )


def path_of(request: HTTPRequestParser) -> str:
    """Return PATH_INFO as waitress makes it: with one slash for all those it begins with."""
    path: str = request.path or "/"
    return "/" + path.lstrip("/") if path.startswith("/") else path


def allow_files() -> int:
    """Let this program open as many files as it may, up to MAX_FILES, and return how many."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    files = MAX_FILES if hard == resource.RLIM_INFINITY else min(MAX_FILES, hard)
    if files < MIN_FILES:
        raise BadSetting(f"ulimit -n: são {files} arquivos; o mínimo é {MIN_FILES}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, files), hard))
    return files


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens; raise BadSetting."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        # create_server looks the host up too, but does not tell that there is none.
        address = socket.getaddrinfo(host, port, family, socket.SOCK_STREAM)[0][4]
        return socket.create_server(address, family=family)
    except (OSError, UnicodeError) as error:
        raise BadSetting(
            f"HOST, PORT: não foi possível escutar em {host}, porta {port}: {why_not(error)}"
        ) from None


def why_not(error: OSError | UnicodeError) -> str:
    """Return why a program can't listen."""
    if isinstance(error, UnicodeError | socket.gaierror):
        return "host não encontrado"
    return CANNOT_LISTEN.get(error.errno or 0) or str(error.strerror)
