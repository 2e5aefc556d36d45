"""Asking Redis and Postgres so that no request hangs, and none counts twice, whatever happens to them."""

import logging
import select
import ssl
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from functools import lru_cache, partial
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, unquote, urlsplit

import pg8000.native
import redis.connection
from pg8000.core import Context

TIMEOUT = 0.35  # seconds to reach a server, and for each of its answers: the few that one visit can meet stay below 1.5
SPIN = 0.00005  # seconds to look for what is about to come before sleeping: about what sleeping and waking up takes
REASONS = {  # by class of error, SQLSTATE, or first word of Redis's message
    "ConnectionRefusedError": "conexão recusada",
    "gaierror": "host não encontrado",
    "TimeoutError": "tempo esgotado",
    "AuthenticationError": "senha recusada",
    "28P01": "senha recusada",
    "3D000": "banco inexistente",
    "OutOfMemoryError": "memória do Redis esgotada",
    "MISCONF": "o Redis não consegue gravar em disco",
}
log = logging.getLogger("contador")


class UnavailableError(Exception):
    """A server can't be asked; the message says why."""


def reason_for(error: BaseException) -> str:
    """Return why ``error`` came about: a short phrase in Portuguese, or else the first line of its message."""
    fields = error.args[0] if isinstance(error, pg8000.native.DatabaseError) else {"M": str(error)}
    codes = [fields.get("C", ""), fields["M"].split(" ")[0]]
    cause: BaseException | None = error
    while cause:
        codes.append(type(cause).__name__)
        cause = cause.__cause__ or cause.__context__
    return next((REASONS[code] for code in codes if code in REASONS), fields["M"].partition("\n")[0] or codes[-1])


class Link(NamedTuple):
    """An open connection, a poll object that watches its socket, and the way to close it."""

    connection: Any
    watch: select.poll
    close: Callable[[], None]


class Pending:
    """A question that was asked: calling it, in the same thread, waits for the answer and returns it.

    It raises UnavailableError where there is none, and redis.ResponseError where it is an error.
    """

    def __init__(self, backend: "Backend") -> None:
        self.backend, self.done = backend, False

    def settle(self, answer: Any, error: Exception | None) -> None:
        """Set what calling it returns or raises."""
        self.answer, self.error, self.done = answer, error, True

    def __call__(self) -> Any:
        if not self.done:
            self.backend.receive(self)
        if self.error:
            raise self.error
        return self.answer


class Line(threading.local):
    """A thread's connection to a server, and what was asked over it."""

    def __init__(self) -> None:
        self.link: Any = None  # a Link, once there is one
        self.opening: Any = None  # a Future of one
        self.pending, self.unsent = deque[Pending](), list[Any]()  # what has no answer yet; the last of it, not sent
        self.due = 0.0  # when it has to be open for these
        self.silent = False  # nothing has come back since the last packet went
        self.patient = True  # may wait for a server that fails


class Backend:
    """A server that each thread asks over a connection of its own, kept from one request to the next.

    Any number of questions may be asked before the first answer is waited for: the first goes at once, and the others
    in one packet (as in RFC 896). While the server fails, one thread at a time finds out whether it is back; the
    others take the last reason at once.
    """

    name: str
    host: str  # where it is, for people to read
    nothing: Any  # the question that only finds out whether the server is there
    pause = 0.0  # seconds that it is left alone after it failed

    def __init__(self) -> None:
        self.reason = ""  # why it can't be asked; empty while it can
        self.next_trial = 0.0  # when a thread may find out whether it is back
        self.lock, self.line = threading.Lock(), Line()

    def connect(self) -> tuple[Any, Any, Callable[[], None]]:
        """Open a connection; return it, its socket and the way to close it."""
        raise NotImplementedError

    def write(self, connection: Any, questions: list[Any]) -> None:
        """Send questions, in one packet."""
        raise NotImplementedError

    def read(self, connection: Any) -> Any:
        """Wait for the next answer and return it; raise redis.ResponseError where it is an error."""
        raise NotImplementedError

    def untried(self) -> bool:
        """Tell whether it fails, and no thread finds out just now whether it is back."""
        return bool(self.reason) and time.monotonic() > self.next_trial

    def ask(self, question: Any) -> Pending:
        """Ask, without waiting, and once: asking again could count a visit twice."""
        line, pending = self.line, Pending(self)
        if self.reason:
            if not (line.patient and self.untried()):
                pending.settle(None, UnavailableError(self.reason))
                return pending
            self.next_trial = time.monotonic() + 2 * TIMEOUT  # enough for this one
        line.pending.append(pending)
        line.unsent.append(question)
        if len(line.pending) == 1:
            line.due = time.monotonic() + TIMEOUT
            try:
                if self.connected():
                    self.send()
            except Exception as error:  # what isn't a Redis or a Postgres at all can raise anything
                self.fail(error)
        return pending

    def send(self) -> None:
        """Send what has not been sent, in one packet."""
        line = self.line
        questions, line.unsent, line.silent = line.unsent, [], True
        self.write(line.link.connection, questions)

    def receive(self, pending: Pending) -> None:
        """Settle what this thread asked, in order, as far as ``pending``; or all of it, where the server fails."""
        line = self.line
        try:
            if not line.link:
                line.link = line.opening.result(max(0, line.due - time.monotonic()))
                line.opening = None
            if line.unsent:
                self.send()
            if line.silent:
                line.silent, end = False, time.monotonic() + SPIN
                while not line.link.watch.poll(0) and time.monotonic() < end:
                    pass
            while not pending.done:
                try:
                    answer, error = self.read(line.link.connection), None
                except redis.ResponseError as refusal:
                    answer, error = None, refusal
                line.pending.popleft().settle(answer, error)
        except Exception as error:
            self.fail(error)
        else:
            self.note("")

    def fail(self, error: Exception) -> None:
        """Close this thread's connection; whatever was asked over it has no answer."""
        line, reason = self.line, reason_for(error)
        while line.pending:
            line.pending.popleft().settle(None, UnavailableError(reason))
        line.unsent.clear()
        self.disconnect()
        self.note(reason)
        self.next_trial = time.monotonic() + self.pause

    def state(self) -> Callable[[], str]:
        """Ask whether the server is there; return a function that waits, and returns the line, with its end, on it."""
        pending = self.ask(self.nothing)

        def line() -> str:
            try:
                pending()
            except (UnavailableError, redis.ResponseError) as error:
                return f"{self.name}: indisponível ({reason_for(error)})\n"
            return f"{self.name}: conectado\n"

        return line

    def connected(self) -> bool:
        """Tell whether this thread's connection is open; where it isn't, or the server closed it, open a new one."""
        line = self.line
        if line.opening and line.opening.done():
            with suppress(Exception):
                line.link = line.opening.result()
            line.opening = None
        # No answer is due on an idle connection: something to read there means its end.
        if line.link and line.link.watch.poll(0):
            self.disconnect()
        if not line.link and not line.opening:
            line.opening = Future()
            # A slow name or handshake outlasts every time-out of a socket, so a helper connects. Nobody waits for it
            # longer than TIMEOUT; the thread's next question takes what has become of it.
            threading.Thread(target=self.fulfil, args=[line.opening], daemon=True).start()
        return bool(line.link)

    def fulfil(self, link: "Future[Link]") -> None:
        """Set ``link`` to an open connection, or to the error that there was."""
        try:
            connection, sock, close = self.connect()
            watch = select.poll()
            watch.register(sock, select.POLLIN)
            link.set_result(Link(connection, watch, close))
        except BaseException as error:
            link.set_exception(error)

    def disconnect(self) -> None:
        """Close this thread's connection and forget it; one that is still being opened stays."""
        link, self.line.link = self.line.link, None
        if link:
            with suppress(Exception):  # it may be broken
                link.close()

    def note(self, reason: str) -> None:
        """Keep what was found out last, and log it where the server went away or came back."""
        if reason != self.reason:
            with self.lock:
                before, self.reason = self.reason, reason
            if not (before and reason):
                log.info("%s: %s", self.name, f"indisponível ({reason})" if reason else "conectado de novo")


class Redis(Backend):
    """The Redis at ``url``, in redis-py's form: redis://, rediss:// or unix://. A bad one: ValueError or TypeError."""

    name, nothing = "Redis", ("PING",)

    def __init__(self, url: str) -> None:
        super().__init__()
        options = redis.connection.parse_url(url)
        self.host = options.get("path") or options.get("host", "localhost")
        for unwanted in ("max_connections", "retry_on_timeout", "retry_on_error"):
            options.pop(unwanted, None)
        options |= {"socket_timeout": TIMEOUT, "socket_connect_timeout": TIMEOUT, "driver_info": None}
        self.make = partial(options.pop("connection_class", redis.Connection), **options)
        self.pack = lru_cache(self.make().pack_command)  # not open yet, but an unknown option shows

    def connect(self) -> tuple[redis.Connection, Any, Callable[[], None]]:
        connection = self.make()
        connection.connect()
        return connection, connection._sock, connection.disconnect

    def write(self, connection: redis.Connection, questions: list[tuple[str | int, ...]]) -> None:
        connection.send_packed_command([b"".join([part for question in questions for part in self.pack(*question)])])

    def read(self, connection: redis.Connection) -> Any:
        return connection.read_response()


class Postgres(Backend):
    """The Postgres at ``url``, in libpq's form (PostgreSQL manual, 32.1.1.2), with ``password`` where it has none.

    Its options are host (with "/" in front, the folder of a Unix socket), port, sslmode (disable, which is the default
    here, require or verify-full, as in 32.19.1) and sslrootcert (a file). A bad URL: ValueError or KeyError.
    """

    name, nothing = "Postgres", ""  # an empty query: the cheapest round trip (protocol, 54.2.2)
    pause = 0.02  # no visit depends on it, and so none has to be slowed down by asking all the time

    def __init__(self, url: str, password: str) -> None:
        super().__init__()
        parts = urlsplit(url)
        options: dict[str, Any] = dict(parse_qsl(parts.query, strict_parsing=True)) if parts.query else {}
        self.host = options.pop("host", None) or unquote(parts.hostname or "localhost")
        port = int(options.pop("port", None) or parts.port or 5432)
        tls: Any = {"disable": False, "require": True, "verify-full": True}[mode := options.pop("sslmode", "disable")]
        if mode == "verify-full":
            tls = ssl.create_default_context(cafile=options.pop("sslrootcert", None))
        if parts.scheme not in ("postgresql", "postgres") or parts.fragment or options:
            raise ValueError(url)
        self.make = partial(
            pg8000.native.Connection,
            user=unquote(parts.username or "postgres"),
            host=self.host,
            port=port,
            unix_sock=f"{self.host}/.s.PGSQL.{port}" if self.host.startswith("/") else None,
            database=unquote(parts.path[1:] or parts.username or "postgres"),
            password=unquote(parts.password or "") or password,
            ssl_context=tls,
            timeout=TIMEOUT,
        )

    def connect(self) -> tuple[pg8000.native.Connection, Any, Callable[[], None]]:
        connection = self.make()
        return connection, connection._usock, connection.close

    def write(self, connection: pg8000.native.Connection, questions: list[str]) -> None:
        for question in questions:
            connection.send_QUERY(question)
        connection._sock.flush()

    def read(self, connection: pg8000.native.Connection) -> None:
        connection.handle_messages(Context(""))
