"""A visit counter: Redis counts, Postgres proves that it is there, waitress serves.

One idea makes it fast: visits that came in together are counted together, with one command. ``app`` is the WSGI
callable (PEP 3333), ``main`` the program. From top to bottom: what it answers, how it counts, how it keeps in touch
with Redis and Postgres, its settings, how it serves and stops.
"""

import errno
import logging
import os
import resource
import signal
import socket
import ssl
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import suppress
from functools import cached_property, partial
from http.client import responses
from operator import methodcaller
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit
from wsgiref.types import StartResponse, WSGIEnvironment

import pg8000.native
import redis.connection
import waitress
from waitress import wasyncore
from waitress.channel import HTTPChannel
from waitress.parser import HTTPRequestParser, ParsingError

KEY = "contador_visitas"
log = logging.getLogger("contador")


# --- What it answers --------------------------------------------------------------------------------------------------
class UnavailableError(Exception):
    """A server can't be asked; the message says why, in a short phrase."""


class CounterError(Exception):
    """The key holds no number, or the last one that fits."""


def visit(batch: "Batch", head: bool) -> tuple[int, str]:
    """Answer ``/``: the number of this visit, and whether Postgres is there. HEAD tells the number, but takes none."""
    reason = ""
    try:
        number = batch.next_number() if head else batch.take_number()
    except UnavailableError as error:
        reason = str(error)
    if reason:  # outside of "except", where an error of Postgres's would get Redis's as its context
        return 503, state("Contador", reason) + state("Postgres", batch.postgres_reason)
    return 200, f"Contador: {number}\n" + state("Postgres", batch.postgres_reason)


def reset(batch: "Batch", head: bool) -> tuple[int, str]:
    """Answer ``/reset``: set the counter to 0, whatever the key held. HEAD finds out whether that could be done."""
    try:
        cache.ask("PING") if head else cache.ask("SET", KEY, 0)
    except UnavailableError as error:
        return 503, state("Contador", str(error))
    return 200, "Contador: 0\n"


def health(batch: "Batch", head: bool) -> tuple[int, str]:
    """Answer ``/health``: whether both servers are there. It counts nothing."""
    status = 503 if batch.redis_reason or batch.postgres_reason else 200
    return status, state("Redis", batch.redis_reason) + state("Postgres", batch.postgres_reason)


def state(name: str, reason: str) -> str:
    """Return the line that tells why something can't be had, or, without a reason, that it is there."""
    return f"{name}: indisponível ({reason})\n" if reason else f"{name}: conectado\n"


ROUTES = {"/": visit, "/reset": reset, "/health": health}
HEADERS = [
    ("Content-Type", "text/plain; charset=utf-8"),
    ("Cache-Control", "no-store"),
    ("X-Content-Type-Options", "nosniff"),
]
MORE_HEADERS = {503: [("Retry-After", "1")], 405: [("Allow", "GET, HEAD")]}


def is_visit(method: str, path: str) -> bool:
    """Tell whether a request counts."""
    return method == "GET" and ROUTES.get(path or "/") is visit


def answer(environ: WSGIEnvironment, batch: "Batch") -> tuple[int, str]:
    """Return the status and the text for a request."""
    method, route = environ["REQUEST_METHOD"], ROUTES.get(environ.get("PATH_INFO") or "/")
    if not route:
        return 404, "Não encontrado. Use / (conta uma visita), /reset (volta a 0) ou /health\n"
    if method not in ("GET", "HEAD"):
        return 405, "Método não permitido: use GET\n"
    try:
        return route(batch, method == "HEAD")
    except CounterError:
        return 500, "Contador: o valor guardado não é um número ou chegou ao limite; acesse /reset\n"


def respond(status: int, text: str, environ: WSGIEnvironment, start_response: StartResponse) -> list[bytes]:
    """Start the response and return its body, which HEAD does not get."""
    body = text.encode()
    headers = [*HEADERS, ("Content-Length", str(len(body))), *MORE_HEADERS.get(status, [])]
    start_response(f"{status} {responses[status]}", headers)
    return [] if environ["REQUEST_METHOD"] == "HEAD" else [body]


one_at_a_time = threading.Lock()


def app(environ: WSGIEnvironment, start_response: StartResponse) -> list[bytes]:
    """Answer one request (PEP 3333), under any WSGI server, as a batch of its own; threads take turns."""
    with one_at_a_time:
        visits = int(is_visit(environ["REQUEST_METHOD"], environ.get("PATH_INFO", "")))
        status, text = answer(environ, Batch(visits))
    return respond(status, text, environ, start_response)


# --- How it counts ----------------------------------------------------------------------------------------------------
class Batch:
    """Requests that came in together: one INCRBY counts all their visits, one query asks Postgres for all of them.

    Both are asked before either is waited for. Each visit gets a number of its own, or all get the same error.
    """

    def __init__(self, visits: int = 0) -> None:
        self.numbers: Iterator[int] = iter(())
        self.error: Exception | None = None
        if not visits:
            return
        try:
            database.open()
            cache.send("INCRBY", KEY, visits)
            self.postgres_reason = database.ping()  # while Redis counts
            last = cache.receive()
            self.numbers = iter(range(last - visits + 1, last + 1))
        except (UnavailableError, CounterError) as error:
            self.error = error

    def take_number(self) -> int:
        """Return a number that no other visit gets; raise UnavailableError or CounterError where none was counted."""
        if self.error:
            raise self.error
        return next(self.numbers)

    def next_number(self) -> int:
        """Return the number that a visit would get now; raise CounterError where the value is unfit."""
        value = cache.ask("GET", KEY)
        try:
            number = 1 if value is None else int(value) + 1
        except ValueError as error:
            raise CounterError from error
        if not -(2**63) < number < 2**63:  # Redis counts with 64 bits, one of them for the sign (its manual, INCR)
            raise CounterError
        return number

    @cached_property
    def postgres_reason(self) -> str:
        """Why Postgres is away, or nothing."""
        return database.ping()

    @cached_property
    def redis_reason(self) -> str:
        """Why Redis is away, or nothing."""
        try:
            cache.ask("PING")
        except (UnavailableError, CounterError) as error:
            return str(error)
        return ""


# --- How it keeps in touch with Redis and Postgres --------------------------------------------------------------------
TIMEOUT = 0.35  # seconds to connect, and for each answer: the four that one visit can meet stay below 1.5
RETRY_TIMEOUT = 0.1  # seconds to connect to a server known to be away: the handshake alone takes pg8000 0.02 of CPU
RETRY_PAUSE = 0.02  # seconds from one attempt to connect to the next: to begin one for each batch would halve the rate
TIMED_OUT = "tempo esgotado"
REASONS = {  # by class of error, SQLSTATE (PostgreSQL manual, Appendix A) or error code of Redis
    "ConnectionRefusedError": "conexão recusada",
    "gaierror": "host não encontrado",
    "TimeoutError": TIMED_OUT,
    "AuthenticationError": "senha recusada",
    "28P01": "senha recusada",
    "3D000": "banco inexistente",
    "OOM": "memória do Redis esgotada",
    "MISCONF": "o Redis não consegue gravar em disco",
}


def reason_for(error: BaseException) -> str:
    """Return why ``error`` came about: a short phrase in Portuguese, or else the first line of its message."""
    code, message = redis_code(error), str(error)
    if isinstance(error, pg8000.native.DatabaseError):
        code, message = str(error.args[0].get("C")), str(error.args[0].get("M"))
    codes, cause = [code], error
    while cause:
        codes.append(type(cause).__name__)
        cause = cause.__cause__ or cause.__context__  # type: ignore[assignment]
    known = [REASONS[code] for code in codes if code in REASONS]
    return known[0] if known else message.partition("\n")[0] or codes[1]


def redis_code(error: BaseException) -> str:
    """Return the first word of an error reply (Redis manual, RESP); redis-py cuts off those that it knows."""
    return str(getattr(error, "status_code", None) or error).partition(" ")[0]


class Backend:
    """A server that is asked over one connection, kept from batch to batch. One thread at a time may ask.

    Looking up a name can outlast every time-out of a socket, so another thread connects. It is waited for until
    ``deadline``; an attempt that takes longer goes on, and a later batch finds what became of it.
    """

    rest_until = 0.0  # after a wait in vain, for either server, one known to be away is not waited for

    def __init__(self, name: str, host: str, connect: Callable[[], Any], disconnect: Callable[[Any], object]) -> None:
        self.name, self.host, self.connect, self.disconnect = name, host, connect, disconnect
        self.link: Any = None  # the connection, while there is one
        self.attempt: Future[Any] | None = None  # to make one
        self.deadline = self.next_attempt = 0.0  # by time.monotonic()
        self.reason = ""  # why it is away; empty while it is there

    def open(self) -> bool:
        """Begin to connect, unless that is done or under way; tell whether it is done."""
        if self.attempt and self.attempt.done() and not self.attempt.exception():
            self.link, self.attempt = self.attempt.result(), None
        now = time.monotonic()
        if not self.link and (not self.attempt or (self.attempt.done() and now > self.next_attempt)):
            patience = TIMEOUT if not self.reason else RETRY_TIMEOUT if now > Backend.rest_until else 0
            self.attempt, self.deadline, self.next_attempt = Future(), now + patience, now + RETRY_PAUSE
            try:
                threading.Thread(target=self.fulfil, args=[self.attempt], daemon=True).start()
            except RuntimeError as error:  # no thread is to be had now
                self.attempt.set_exception(error)
        return self.link is not None

    def fulfil(self, attempt: "Future[Any]") -> None:
        """Connect, and give ``attempt`` the connection, or the error that there was."""
        try:
            attempt.set_result(self.connect())
        except Exception as error:  # what isn't a Redis or a Postgres at all can raise anything
            attempt.set_exception(error)

    def connection(self) -> Any:
        """Return the open connection, or raise why there is none."""
        self.open()
        if self.attempt:
            patience = max(0, self.deadline - time.monotonic())
            try:
                self.link = self.attempt.result(patience)
            except TimeoutError as error:
                if self.attempt.done():
                    raise
                if patience:
                    Backend.rest_until = time.monotonic() + TIMEOUT
                raise UnavailableError(self.reason or TIMED_OUT) from error
            self.attempt = None
        return self.link

    def close(self) -> None:
        """Close the connection, broken or not; an attempt that is under way goes on."""
        link, self.link = self.link, None
        if link:
            with suppress(Exception):
                self.disconnect(link)

    def note(self, reason: str) -> str:
        """Keep why the server is away, or nothing while it is there; log a change; return the reason."""
        if bool(reason) != bool(self.reason):
            log.info("%s: %s", self.name, f"indisponível ({reason})" if reason else "conectado de novo")
        self.reason = reason
        return reason

    def fail(self, error: Exception) -> str:
        """Give the connection up after ``error``; return the reason."""
        self.close()
        return self.note(str(error) if isinstance(error, UnavailableError) else reason_for(error))


class Redis(Backend):
    """The Redis at ``url``, in redis-py's form: redis://, rediss:// or unix://. A bad one: ValueError or TypeError.

    No command is sent twice: one without an answer may have been carried out, and would count a visit again.
    """

    def __init__(self, url: str) -> None:
        options = redis.connection.parse_url(url)
        host = options.get("path") or options.get("host", "localhost")
        for pool_option in ("max_connections", "retry_on_timeout", "retry_on_error"):
            options.pop(pool_option, None)
        options |= {"socket_timeout": TIMEOUT, "socket_connect_timeout": TIMEOUT, "driver_info": None}
        make = partial(options.pop("connection_class", redis.Connection), **options)
        make()  # does not connect, but raises TypeError for an unknown option

        def connect() -> Any:
            connection = make()
            connection.connect()
            return connection

        super().__init__("Redis", host, connect, methodcaller("disconnect"))

    def send(self, *command: str | int) -> None:
        """Send a command, whose answer must then be waited for with ``receive``; raise UnavailableError."""
        try:
            stale = self.open()
            with suppress(redis.ConnectionError):  # Redis has closed the connection
                stale = stale and self.link.can_read(timeout=0)  # or bytes wait that nobody asked for
            if stale:
                self.close()
            self.connection().send_command(*command)
        except Exception as error:
            raise UnavailableError(self.fail(error)) from error

    def receive(self) -> Any:
        """Wait for the answer and return it; raise UnavailableError, or CounterError if the key's value is unfit."""
        try:
            value = self.link.read_response()
        except redis.ResponseError as error:
            self.note("")
            if redis_code(error) in ("ERR", "WRONGTYPE"):
                raise CounterError(str(error)) from error
            raise UnavailableError(reason_for(error)) from error
        except Exception as error:
            raise UnavailableError(self.fail(error)) from error
        self.note("")
        return value

    def ask(self, *command: str | int) -> Any:
        """Send a command and return its answer; raise UnavailableError or CounterError."""
        self.send(*command)
        return self.receive()


class Postgres(Backend):
    """The Postgres at ``url``, in libpq's form (PostgreSQL manual, 32.1.1.2), with ``password`` where it has none.

    Its options are host (with "/" in front, the folder of a Unix socket), port, sslmode (disable, which is the default
    here, require or verify-full, as in 32.19.1) and sslrootcert (a file). A bad URL: ValueError or KeyError.
    """

    def __init__(self, url: str, password: str) -> None:
        parts = urlsplit(url)
        options: dict[str, Any] = dict(parse_qsl(parts.query, strict_parsing=True)) if parts.query else {}
        host = options.pop("host", None) or unquote(parts.hostname or "localhost")
        port = int(options.pop("port", None) or parts.port or 5432)
        tls: Any = {"disable": False, "require": True, "verify-full": True}[mode := options.pop("sslmode", "disable")]
        if mode == "verify-full":
            tls = ssl.create_default_context(cafile=options.pop("sslrootcert", None))
        if parts.scheme not in ("postgresql", "postgres") or parts.fragment or options:
            raise ValueError(url)
        connect = partial(
            pg8000.native.Connection,
            user=unquote(parts.username or "postgres"),
            host=host,
            port=port,
            unix_sock=f"{host}/.s.PGSQL.{port}" if host.startswith("/") else None,
            database=unquote(parts.path[1:] or parts.username or "postgres"),
            password=unquote(parts.password or "") or password,
            ssl_context=tls,
            timeout=TIMEOUT,
        )
        super().__init__("Postgres", host, connect, methodcaller("close"))

    def ping(self) -> str:
        """Send an empty query, the cheapest round trip (manual, 54.2.2); return why there is no answer, or nothing.

        Only this shows whether the connection broke while it was idle: then, and then alone, it is sent once more.
        """
        was_open = self.open()
        try:
            self.connection().run("")
        except Exception as error:
            if was_open and not isinstance(error, TimeoutError):
                self.close()
                return self.ping()
            return self.fail(error)
        return self.note("")


# --- Settings, from the environment, read once ------------------------------------------------------------------------
def setting(name: str, default: str, parse: Callable[[str], Any], expected: str) -> Any:
    """Return ``parse`` of the variable, or of ``default`` where it is unset or empty.

    A bad value ends the program with status 2 and one line that does not show it: it may hold a password.
    """
    try:
        return parse(os.environ.get(name) or default)
    except Exception:
        print(f"{name}: valor inválido; esperado: {expected}", file=sys.stderr)
        sys.exit(2)


def port_number(text: str) -> int:
    """Return the number in ``text``; raise ValueError where it is none from 0 to 65535."""
    if not 0 <= int(text) <= 65535:
        raise ValueError(text)
    return int(text)


# For a DATABASE_URL without a password: any character, as it is. A file is how Docker hands a secret over.
SECRET = setting("POSTGRES_PASSWORD_FILE", os.devnull, lambda path: Path(path).read_text(), "um arquivo legível")
PASSWORD = os.environ.get("POSTGRES_PASSWORD") or SECRET.rstrip("\r\n")
POSTGRES_FORM = "postgresql://USUÁRIO:SENHA@HOST:PORTA/BANCO"
database: Postgres = setting(
    "DATABASE_URL", "postgresql://postgres@db:5432/postgres", partial(Postgres, password=PASSWORD), POSTGRES_FORM
)
cache: Redis = setting("REDIS_URL", "redis://cache:6379/0", Redis, "redis://:SENHA@HOST:PORTA/0")
HOST = setting("HOST", "0.0.0.0", str, "um endereço")
PORT = setting("PORT", "5000", port_number, "um número de 0 a 65535")  # 0: any free one
ACCESS_LOG = setting("ACCESS_LOG", "1", {"0": False, "1": True}.__getitem__, "0 ou 1")  # 0: no line per request

# --- How it serves and stops ------------------------------------------------------------------------------------------
LINGER = 0.3  # seconds that open connections have for a last request when the program stops
LAST_ANSWERS = 0.5  # seconds more for answers that a slow client has not taken yet
MAX_CONNECTIONS = 4000  # each is an open file; waitress's own limit is 100
SPARE_FILES = 100  # open files that are not connections: the program's own, and those of its libraries


class Parser(HTTPRequestParser):
    """waitress's parser, which also refuses what RFC 9112 (2.3, 3.2) calls malformed, and versions but 1.0 and 1.1."""

    path = ""  # where the first line can't be read

    def parse_header(self, header_plus: bytes) -> None:
        try:
            super().parse_header(header_plus)
        except ValueError as error:  # "http://[", or a length of 5,000 digits
            raise ParsingError("Invalid request") from error
        if self.version not in ("1.0", "1.1"):
            raise ParsingError("Unknown HTTP version")
        host = self.headers.get("HOST")
        if self.version == "1.1" and (host is None or ", " in host):  # so waitress joins those that came twice
            raise ParsingError("One Host header is required")


class Channel(HTTPChannel):
    """A connection that uses this parser, and tells the dispatcher that it came."""

    parser_class = Parser

    def __init__(self, server: Any, *arguments: Any, **options: Any) -> None:
        super().__init__(server, *arguments, **options)
        server.task_dispatcher.accepted += 1


class Dispatcher:
    """Answers what came in together as one batch; for waitress, it stands where a pool of threads would."""

    def __init__(self) -> None:
        self.waiting: list[Channel] = []  # connections with a request to answer
        self.channel: Channel  # the one that is being answered
        self.batch, self.lines = Batch(), list[str]()  # of the log, written once all are answered
        self.started, self.clock = 0.0, ""  # when the batch began: by time.monotonic(), and for people to read
        self.accepted, self.stopping = 0, False

    def add_task(self, channel: Channel) -> None:
        """Take a connection whose next request is complete (waitress calls this)."""
        self.waiting.append(channel)

    def answer_waiting(self) -> None:
        """Answer one request of each connection; all their visits are counted before the first answer goes."""
        channels, self.waiting = [channel for channel in self.waiting if channel.connected], []
        self.started, self.clock = time.monotonic(), time.strftime("%d/%b/%Y:%H:%M:%S %z")
        self.batch = Batch(sum(map(self.counts, channels)))
        for channel in channels:
            self.channel = channel
            try:
                channel.service()
            except OSError:  # a "100 Continue" that can't be sent: the client has gone
                channel.handle_close()
            if channel.connected:
                channel.handle_write()
        with suppress(OSError):  # a full disk or a closed pipe is no reason to stop counting
            sys.stdout.write("".join(self.lines))
        self.lines.clear()

    @staticmethod
    def counts(channel: Channel) -> bool:
        """Tell whether the next request of a connection is a visit; its path is made PATH_INFO as waitress does it."""
        request = channel.requests[0]
        return not request.error and is_visit(request.command, "/" + request.path.lstrip("/"))

    def app(self, environ: WSGIEnvironment, start_response: StartResponse) -> list[bytes]:
        """Answer one request of the batch (waitress calls this); while the program stops, the connection's last."""
        status, text = answer(environ, self.batch)
        if self.stopping and len(self.channel.requests) == 1:
            self.channel.requests[0].headers["CONNECTION"] = "close"
        body = respond(status, text, environ, start_response)
        if ACCESS_LOG and (status, environ["PATH_INFO"]) != (200, "/health"):
            self.lines.append(self.access_line(environ, status, sum(map(len, body))))
        return body

    def access_line(self, environ: WSGIEnvironment, status: int, size: int) -> str:
        """Return a line in Common Log Format (Apache's manual, "Log Files"), and the milliseconds until the answer."""
        request = f"{environ['REQUEST_METHOD']} {environ['REQUEST_URI']} {environ['SERVER_PROTOCOL']}"
        request = request.encode("unicode_escape").decode().replace('"', '\\"')  # or it could forge lines
        elapsed = (time.monotonic() - self.started) * 1000
        return f'{environ["REMOTE_ADDR"]} - - [{self.clock}] "{request}" {status} {size or "-"} {elapsed:.1f} ms\n'


def serve(listener: socket.socket) -> None:
    """Answer the requests that come to ``listener``, until SIGTERM or SIGINT; then finish those that were accepted."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    files = (
        MAX_CONNECTIONS + SPARE_FILES if hard == resource.RLIM_INFINITY else min(MAX_CONNECTIONS + SPARE_FILES, hard)
    )
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, files), hard))
    limit, connections, dispatcher = files - SPARE_FILES, dict[int, Any](), Dispatcher()
    server: Any = waitress.create_server(
        dispatcher.app,
        map=connections,
        _dispatcher=dispatcher,
        sockets=[listener],
        connection_limit=limit,
        channel_timeout=20,  # seconds without a request
        cleanup_interval=5,  # seconds between looks for these
        ident="",  # no Server header
        send_bytes=16384,  # above the size of an answer: it goes in one packet, when it is complete
        recv_bytes=65536,  # what is too long is read all the same: closing on unread data would lose the answer
        max_request_header_size=16384,
        max_request_body_size=65536,
        clear_untrusted_proxy_headers=False,  # nothing reads them
        log_socket_errors=False,  # a client that goes away is nothing to report
    )
    server.channel_class = Channel

    def turn(timeout: float) -> None:
        """Read what has arrived, waiting for it up to ``timeout`` seconds, and answer it."""
        wasyncore.loop(0 if dispatcher.waiting else timeout, use_poll=True, map=connections, count=1)
        if dispatcher.waiting:
            dispatcher.answer_waiting()

    def accept_more(before: int) -> None:
        """If any came since there were ``before``, accept all that wait: waitress alone takes one connection a turn."""
        while before < dispatcher.accepted and len(connections) < limit:
            before = dispatcher.accepted
            server.handle_accept()

    def stop(*_: object) -> None:
        dispatcher.stopping = True
        server.pull_trigger()  # ends the wait for requests, also one that is just about to begin

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    host, port = f"[{HOST}]" if ":" in HOST else HOST, listener.getsockname()[1]
    log.info("Escutando em http://%s:%s (Redis: %s, Postgres: %s)", host, port, cache.host, database.host)
    while not dispatcher.stopping:
        before = dispatcher.accepted
        turn(timeout=1)
        accept_more(before)
    accept_more(before=-1)
    wasyncore.dispatcher.close(server)  # the listener alone: answers still need what server.close() closes, too
    end = time.monotonic() + LINGER
    while server.active_channels and time.monotonic() < end + LAST_ANSWERS:
        turn(timeout=0.02)
        if time.monotonic() > end:
            for channel in list(server.active_channels.values()):
                if not channel.total_outbufs_len:
                    channel.handle_close()


def main() -> int:
    """Serve until SIGTERM or SIGINT; return the exit status: 0, or 2 where HOST and PORT can't be had."""
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    logging.basicConfig(stream=sys.stdout, format="%(message)s", level=logging.INFO)
    logging.getLogger("waitress").setLevel(logging.ERROR)
    try:
        listener = socket.create_server((HOST, PORT), family=socket.AF_INET6 if ":" in HOST else socket.AF_INET)
    except OSError as error:
        reason = "a porta já está em uso" if error.errno == errno.EADDRINUSE else error.strerror
        print(f"HOST, PORT: não foi possível escutar em {HOST}, porta {PORT}: {reason}", file=sys.stderr)
        return 2
    serve(listener)
    return 0


if __name__ == "__main__":
    sys.exit(main())
