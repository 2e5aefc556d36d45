"""Asking Redis and Postgres so that no request hangs, and none counts twice, whatever happens to them."""

import logging
import select
import ssl
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, unquote, urlsplit

import pg8000.native
import redis.connection

TIMEOUT = 0.35  # seconds to reach a server, and for each of its answers: four in a row stay below 1.5
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


class Backend:
    """A server that each thread asks over a connection of its own, kept from one request to the next.

    While it fails, one thread at a time finds out whether it is back; the others take the last reason at once.
    """

    name: str
    host: str  # where it is, for people to read

    def __init__(self) -> None:
        self.reason = ""  # why it can't be asked; empty while it can
        self.lock, self.probe, self.thread = threading.Lock(), threading.Lock(), threading.local()

    def connect(self) -> tuple[Any, Any, Callable[[], None]]:
        """Open a connection; return it, its socket and the way to close it."""
        raise NotImplementedError

    def ping(self, connection: Any) -> None:
        """Ask for any answer at all."""
        raise NotImplementedError

    def ask(self, question: Callable[[Any], Any]) -> Any:
        """Return ``question(connection)``. It is asked once: asking again could count a visit twice.

        Raises UnavailableError, or redis.ResponseError where the server is there but answers with an error.
        """
        failing = self.reason
        if failing and not self.probe.acquire(blocking=False):
            raise UnavailableError(failing)
        try:
            answer = question(self.connection())
        except redis.ResponseError:
            self.note("")
            raise
        except Exception as error:  # what isn't a Redis or a Postgres at all can raise anything
            self.disconnect()
            reason = reason_for(error)
            self.note(reason)
            raise UnavailableError(reason) from error
        finally:
            if failing:
                self.probe.release()
        self.note("")
        return answer

    def state(self) -> str:
        """Return the line, with its end, that says whether the server answers now."""
        try:
            self.ask(self.ping)
        except (UnavailableError, redis.ResponseError) as error:
            return f"{self.name}: indisponível ({reason_for(error)})\n"
        return f"{self.name}: conectado\n"

    def connection(self) -> Any:
        """Return this thread's connection, a new one where the server closed it; raise what connecting raises."""
        link: Future[Link] | None = getattr(self.thread, "link", None)
        # No answer is due on an idle connection: something to read there means its end.
        if not link or (link.done() and (link.exception() or link.result().watch.poll(0))):
            self.disconnect()
            link = self.thread.link = Future()
            # A slow name or handshake outlasts every time-out of a socket, so a helper connects. Nobody waits for it
            # longer than TIMEOUT; the thread's next request takes what has become of it.
            threading.Thread(target=self.fulfil, args=[link], daemon=True).start()
        return link.result(TIMEOUT).connection

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
        link: Future[Link] | None = getattr(self.thread, "link", None)
        if link and link.done():
            self.thread.link = None
            with suppress(Exception):  # it may be broken, or never have been opened
                link.result().close()

    def note(self, reason: str) -> None:
        """Keep what was found out last, and log it where the server went away or came back."""
        if reason != self.reason:
            with self.lock:
                before, self.reason = self.reason, reason
            if not (before and reason):
                log.info("%s: %s", self.name, f"indisponível ({reason})" if reason else "conectado de novo")


class Redis(Backend):
    """The Redis at ``url``, in redis-py's form: redis://, rediss:// or unix://. A bad one: ValueError or TypeError."""

    name = "Redis"

    def __init__(self, url: str) -> None:
        super().__init__()
        options = redis.connection.parse_url(url)
        self.host = options.get("path") or options.get("host", "localhost")
        for unwanted in ("max_connections", "retry_on_timeout", "retry_on_error"):
            options.pop(unwanted, None)
        options |= {"socket_timeout": TIMEOUT, "socket_connect_timeout": TIMEOUT, "driver_info": None}
        self.make = partial(options.pop("connection_class", redis.Connection), **options)
        self.make()  # not open yet, but an unknown option shows

    def connect(self) -> tuple[redis.Connection, Any, Callable[[], None]]:
        connection = self.make()
        connection.connect()
        return connection, connection._sock, connection.disconnect

    def command(self, *words: str | int) -> Any:
        """Return Redis's answer to a command; raise as ``ask`` does."""

        def question(connection: redis.Connection) -> Any:
            connection.send_command(*words)
            return connection.read_response()

        return self.ask(question)

    def ping(self, connection: redis.Connection) -> None:
        connection.send_command("PING")
        connection.read_response()


class Postgres(Backend):
    """The Postgres at ``url``, in libpq's form (PostgreSQL manual, 32.1.1.2), with ``password`` where it has none.

    Its options are host (with "/" in front, the folder of a Unix socket), port, sslmode (disable, which is the default
    here, require or verify-full, as in 32.19.1) and sslrootcert (a file). A bad URL: ValueError or KeyError.
    """

    name = "Postgres"

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

    def ping(self, connection: pg8000.native.Connection) -> None:
        connection.run("")  # an empty query: the cheapest round trip (protocol, 54.2.2)
