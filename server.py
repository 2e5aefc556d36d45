"""A visit counter: Redis counts, Postgres proves that it is there, waitress serves.

One idea makes it fast: visits that came in together are counted together, with one command.
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
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from http.client import responses
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit
from wsgiref.types import StartResponse, WSGIEnvironment

import pg8000.native
import redis
from waitress import create_server, wasyncore
from waitress.channel import HTTPChannel
from waitress.parser import HTTPRequestParser, ParsingError

KEY = "contador_visitas"


# --- What it answers --------------------------------------------------------------------------------------------------
def visit(batch: "Batch", head: bool) -> tuple[int, str]:
    """Answer ``/``: the number of this visit, and whether Postgres is there. HEAD tells the number, but takes none."""
    postgres = state("Postgres", batch.ask_postgres())
    try:
        number = batch.next_number() if head else batch.take_number()
    except ConnectionError as error:
        return 503, state("Contador", str(error)) + postgres
    return 200, f"Contador: {number}\n" + postgres


def reset(batch: "Batch", head: bool) -> tuple[int, str]:
    """Answer ``/reset``: set the counter to 0, whatever the key held. HEAD asks whether Redis is there."""
    command = ("PING",) if head else ("SET", KEY, 0)
    cache.ask(*command)
    return 200, "Contador: 0\n"


def health(batch: "Batch", head: bool) -> tuple[int, str]:
    """Answer ``/health``: whether both servers are there. It counts nothing."""
    redis_reason, postgres_reason = "", batch.ask_postgres()
    try:
        cache.ask("PING")
    except ConnectionError as error:
        redis_reason = str(error)
    status = 503 if redis_reason or postgres_reason else 200
    return status, state("Redis", redis_reason) + state("Postgres", postgres_reason)


def state(name: str, reason: str) -> str:
    """Return the line that says why something can't be had, or, without a reason, that it is there."""
    return f"{name}: indisponível ({reason})\n" if reason else f"{name}: conectado\n"


ROUTES = {"/": visit, "/reset": reset, "/health": health}
HEADERS = [
    ("Content-Type", "text/plain; charset=utf-8"),
    ("Cache-Control", "no-store"),
    ("X-Content-Type-Options", "nosniff"),
]
MORE_HEADERS = {503: [("Retry-After", "1")], 405: [("Allow", "GET, HEAD")]}
one_at_a_time = threading.Lock()  # for servers that answer in threads


def app(environ: WSGIEnvironment, start_response: StartResponse) -> list[bytes]:
    """Answer one request (PEP 3333), under any WSGI server, as a batch of its own."""
    with one_at_a_time:
        batch = Batch([(environ["REQUEST_METHOD"], environ.get("PATH_INFO") or "/")])
        return [respond(environ, start_response, batch)[1]]


def respond(environ: WSGIEnvironment, start_response: StartResponse, batch: "Batch") -> tuple[int, bytes]:
    """Start the response to a request of ``batch``; return its status and its body, which HEAD does not get."""
    method, path = environ["REQUEST_METHOD"], environ.get("PATH_INFO") or "/"
    status, text = answer(method, path, batch)
    body = text.encode()
    headers = [*HEADERS, ("Content-Length", str(len(body))), *MORE_HEADERS.get(status, [])]
    start_response(f"{status} {responses[status]}", headers)
    return status, b"" if method == "HEAD" else body


def answer(method: str, path: str, batch: "Batch") -> tuple[int, str]:
    """Return the status and the text for a request."""
    if path not in ROUTES:
        return 404, "Não encontrado. Use / (conta uma visita), /reset (volta a 0) ou /health\n"
    if method not in ("GET", "HEAD"):
        return 405, "Método não permitido: use GET\n"
    try:
        return ROUTES[path](batch, method == "HEAD")
    except ConnectionError as error:
        return 503, state("Contador", str(error))
    except ValueError:
        return 500, "Contador: o valor guardado não é um número ou chegou ao limite; acesse /reset\n"


# --- How it counts ----------------------------------------------------------------------------------------------------
class Batch:
    """Requests that came in together, each a method and a path: one INCRBY counts all visits among them."""

    def __init__(self, requests: list[tuple[str, str]]) -> None:
        self.postgres_reason: str | None = None  # until it is known
        self.error: Exception | None = None
        visits = sum(method == "GET" and ROUTES.get(path) is visit for method, path in requests)
        if visits:
            try:
                self.number: int = cache.ask("INCRBY", KEY, visits, meanwhile=self.ask_postgres) - visits
            except Exception as error:  # for each of the visits
                self.error = error

    def take_number(self) -> int:
        """Return a number that no other visit gets; raise ConnectionError or ValueError where none was counted."""
        if self.error:
            raise self.error
        self.number += 1
        return self.number

    def next_number(self) -> int:
        """Return the number that a visit would get now; raise ConnectionError or ValueError."""
        value = cache.ask("GET", KEY)
        number = 1 if value is None else int(value) + 1
        if abs(number) >= 2**63:  # Redis counts with 64 bits, one of them for the sign (its manual, INCR)
            raise ValueError(number)
        return number

    def ask_postgres(self) -> str:
        """Return why Postgres is away, or nothing; for the whole batch it is asked once."""
        if self.postgres_reason is None:
            self.postgres_reason = database.ping()
        return self.postgres_reason


# --- How it keeps in touch with Redis and Postgres --------------------------------------------------------------------
TIMEOUT = 0.35  # seconds to connect, and for each answer: a visit that meets all four, at two servers, stays below 1.5
RETRY_TIMEOUT = 0.1  # seconds to connect to a server known to be away: pg8000's handshake alone takes 0.02 of CPU
RETRY_PAUSE = 5  # no new attempt for this many times the wait for one in vain: most of the time goes to visits
REASONS = {  # by class of error, SQLSTATE (PostgreSQL manual, Appendix A) or Redis's error code
    "ConnectionRefusedError": "conexão recusada",
    "gaierror": "host não encontrado",
    "TimeoutError": "tempo esgotado",
    "AuthenticationError": "senha recusada",
    "28P01": "senha recusada",
    "3D000": "banco inexistente",
    "OutOfMemoryError": "memória do Redis esgotada",
    "MISCONF": "o Redis não consegue gravar em disco",
}


def reason_for(error: BaseException) -> str:
    """Return why ``error`` came about: a short phrase in Portuguese, or else the first line of its message."""
    fields = error.args[0] if isinstance(error, pg8000.native.DatabaseError) else {}
    message = str(fields.get("M", error))
    codes, cause = [fields.get("C"), message.partition(" ")[0]], error
    while cause:
        codes.append(type(cause).__name__)
        cause = cause.__cause__ or cause.__context__  # type: ignore[assignment]
    return next(
        (REASONS[code] for code in codes if code in REASONS), message.partition("\n")[0] or type(error).__name__
    )


class Backend:
    """A server that is asked over one connection, kept from batch to batch, by one thread at a time.

    Another thread connects, because looking up a name can outlast any time-out. Whoever starts it waits a limited time.
    """

    def __init__(self, name: str, host: str, connect: Callable[[], Any]) -> None:
        self.name, self.host, self.connect = name, host, connect
        self.client: Any = None  # with an open connection
        self.attempt, self.next_attempt = threading.Thread(), 0.0  # the last one; the time.monotonic() of the next
        self.failure = self.reason = ""  # why the last attempt failed; why the server is away, empty while it is there

    def open(self) -> Any:
        """Return the connection; raise ConnectionError where there is none in time."""
        started = time.monotonic()
        if not self.attempt.is_alive() and not self.client and started > self.next_attempt:
            self.failure = REASONS["TimeoutError"]
            self.attempt = threading.Thread(target=self.try_to_connect, daemon=True)
            self.attempt.start()
            self.attempt.join(RETRY_TIMEOUT if self.reason else TIMEOUT)
            if not self.client:
                self.next_attempt = time.monotonic() + RETRY_PAUSE * (time.monotonic() - started)
        if not self.client:
            raise ConnectionError(self.failure)
        return self.client

    def try_to_connect(self) -> None:
        try:
            self.client = self.connect()
        except Exception as error:  # what isn't a Redis or a Postgres at all can raise anything
            self.failure = reason_for(error)

    def close(self) -> None:
        """Close the connection, broken or not; an attempt that is under way goes on."""
        client, self.client = self.client, None
        if client:
            with suppress(Exception):
                client.close()

    def note(self, error: Exception | None = None) -> str:
        """Take note that the server is there or, after ``error``, away; log a change; return why, or nothing."""
        reason = reason_for(error) if error else ""
        if error:
            self.close()
        if bool(reason) != bool(self.reason):
            logging.info("%s: %s", self.name, f"indisponível ({reason})" if reason else "conectado de novo")
        self.reason = reason
        return reason


class Redis(Backend):
    """The Redis at ``url``, in redis-py's form: redis://, rediss:// or unix://. A bad one: ValueError or TypeError."""

    def __init__(self, url: str) -> None:
        link: Any = redis.ConnectionPool.from_url(url).make_connection()  # opens nothing, refuses an unknown option
        host = link.path if url.startswith("unix:") else link.host
        options = {"socket_timeout": TIMEOUT, "socket_connect_timeout": TIMEOUT, "protocol": 2}  # 3 adds notices
        super().__init__("Redis", host, partial(redis.Redis.from_url, url, single_connection_client=True, **options))

    def ask(self, *command: str | int, meanwhile: Callable[[], object] = lambda: None) -> Any:
        """Send a command, call ``meanwhile``, return the answer; raise ConnectionError, or ValueError if it is bad."""
        try:
            stale = bool(self.client)
            with suppress(redis.ConnectionError):  # Redis has closed the connection
                stale = stale and self.client.connection.can_read(timeout=0)  # data that nobody asked for
            if stale:
                self.close()
            # Never sent twice: without an answer it may have been carried out all the same, and would count again.
            connection = self.open().connection
            connection.send_command(*command)
            meanwhile()
            value = connection.read_response()
            self.note()
            return value
        except redis.ResponseError as error:
            self.note()
            if error.status_code == "ERR" or str(error).startswith("WRONGTYPE "):
                raise ValueError from error
            raise ConnectionError(reason_for(error)) from error
        except Exception as error:
            raise ConnectionError(self.note(error)) from error


class Postgres(Backend):
    """The Postgres at ``url``, in libpq's form (its manual, 32.1.1.2), with ``password`` where it has none. Options:
    host, port, sslmode (disable, require, verify-full), sslrootcert. A bad URL: ValueError, KeyError or OSError."""

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
        super().__init__("Postgres", host, connect)

    def ping(self) -> str:
        """Send an empty query, the cheapest round trip (manual, 54.2.2); return why there is no answer, or nothing."""
        was_open = self.client
        try:
            self.open().run("")
            return self.note()
        except Exception as error:
            if not was_open or isinstance(error, TimeoutError):
                return self.note(error)
        self.close()  # it broke while it was idle, which only asking shows: then, and then alone, a query is sent again
        return self.ping()


# --- Settings, from the environment, read once ------------------------------------------------------------------------
def setting(name: str, default: str, parse: Callable[[str], Any], expected: str) -> Any:
    """Return ``parse`` of the variable or of ``default``. A bad one ends the program, not shown: it may be secret."""
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
make_db = partial(Postgres, password=os.environ.get("POSTGRES_PASSWORD") or SECRET.rstrip("\r\n") or "senha123")
database = setting("DATABASE_URL", "postgresql://postgres@db", make_db, "postgresql://USUÁRIO:SENHA@HOST:PORTA/BANCO")
cache = setting("REDIS_URL", "redis://cache:6379/0", Redis, "redis://:SENHA@HOST:PORTA/0")
HOST = setting("HOST", "0.0.0.0", str, "um endereço")
PORT = setting("PORT", "5000", port_number, "um número de 0 a 65535")  # 0: any free one
ACCESS_LOG = setting("ACCESS_LOG", "1", {"0": False, "1": True}.__getitem__, "0 ou 1")  # 0: no line per request

# --- How it serves and stops ------------------------------------------------------------------------------------------
LINGER = 0.3  # seconds that open connections have for a last request when the program stops
MAX_FILES = 4096  # open at once, most of them connections
SPARE_FILES = 100  # of these, for the program itself and its libraries


class Parser(HTTPRequestParser):
    """waitress's parser, which also refuses what RFC 9112 (2.3, 3.2) forbids, and versions other than 1.0 and 1.1."""

    def parse_header(self, header_plus: bytes) -> None:
        try:
            super().parse_header(header_plus)
        except ValueError as error:  # "http://[", or a length of 5,000 digits
            raise ParsingError("Invalid request") from error
        host = self.headers.get("HOST", ", ")  # none is refused like two, which waitress joins with ", "
        if self.version not in ("1.0", "1.1") or (self.version == "1.1" and ", " in host):
            raise ParsingError("HTTP/1.0, or HTTP/1.1 with one Host, is required")


class Channel(HTTPChannel):
    parser_class = Parser

    def send_continue(self) -> None:
        if not self.request.completed:  # or waitress would wait for more, and never answer
            super().send_continue()


class Dispatcher:
    """Answers what came in together as one batch; for waitress, it stands where a pool of threads would."""

    def __init__(self) -> None:
        self.connections: dict[int, Any] = {}  # by file number, and the listener
        self.waiting: list[Channel] = []  # connections with a complete request
        self.add_task = self.waiting.append  # waitress calls this, so the list stays the same
        self.stopping = False

    def turn(self, timeout: float) -> None:
        """Read what arrives within ``timeout`` seconds; answer one request of each connection, as one batch."""
        wasyncore.loop(0 if self.waiting else timeout, use_poll=True, map=self.connections, count=1)
        channels = [channel for channel in self.waiting if channel.connected]
        self.waiting.clear()
        if not channels:
            return
        self.started, self.clock, self.lines = time.monotonic(), time.strftime("%d/%b/%Y:%H:%M:%S %z"), list[str]()
        requests = [channel.requests[0] for channel in channels]  # below, paths are made as waitress makes PATH_INFO
        self.batch = Batch([(each.command, "/" + each.path.lstrip("/")) for each in requests if not each.error])
        for channel in channels:
            self.channel = channel
            with suppress(OSError):  # a "100 Continue" that can't be sent: the client has gone
                channel.service()
            if channel.connected:
                channel.handle_write()
        with suppress(OSError):  # a full disk or a closed pipe is no reason to stop counting
            print("".join(self.lines), end="", flush=True)

    def app(self, environ: WSGIEnvironment, start_response: StartResponse) -> list[bytes]:
        """Answer one request of the batch (waitress calls this), the connection's last one if the program stops."""
        status, body = respond(environ, start_response, self.batch)
        if self.stopping and len(self.channel.requests) == 1:
            self.channel.requests[0].headers["CONNECTION"] = "close"
        if ACCESS_LOG and (status, environ["PATH_INFO"]) != (200, "/health"):  # Common Log Format: Apache's manual
            request = f"{environ['REQUEST_METHOD']} {environ['REQUEST_URI']} {environ['SERVER_PROTOCOL']}"
            request = request.encode("unicode_escape").decode().replace('"', '\\"')  # or it could forge lines
            client, size, elapsed = environ["REMOTE_ADDR"], len(body) or "-", (time.monotonic() - self.started) * 1000
            self.lines.append(f'{client} - - [{self.clock}] "{request}" {status} {size} {elapsed:.1f} ms\n')
        return [body]


def serve(listener: socket.socket) -> None:
    """Answer the requests that come to ``listener``, until SIGTERM or SIGINT; then finish those that were accepted."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    files = MAX_FILES if hard == resource.RLIM_INFINITY else min(MAX_FILES, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, files), hard))
    limit, dispatcher = files - SPARE_FILES, Dispatcher()
    server: Any = create_server(
        dispatcher.app,
        map=dispatcher.connections,
        _dispatcher=dispatcher,
        sockets=[listener],
        connection_limit=limit,
        channel_timeout=20,  # seconds without a byte
        ident="",  # no Server header
        send_bytes=16384,  # above the size of an answer: it goes in one packet, when it is complete
        recv_bytes=65536,  # what is too long is read all the same: closing on unread data would lose the answer
        max_request_header_size=16384,
        max_request_body_size=65536,
        clear_untrusted_proxy_headers=False,  # nothing reads them
        log_socket_errors=False,  # a client that goes away is nothing to report
    )
    server.channel_class = Channel

    def stop(*_: object) -> None:
        dispatcher.stopping = True
        server.pull_trigger()  # ends the wait for requests, also one that is just about to begin

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    host, port = f"[{HOST}]" if ":" in HOST else HOST, listener.getsockname()[1]
    logging.info("Escutando em http://%s:%s (Redis: %s, Postgres: %s)", host, port, cache.host, database.host)
    while not dispatcher.stopping:
        dispatcher.turn(timeout=1)
        server.trigger.handle_read()  # each answer pulls it, to wake a loop that is awake
        before = 0
        while before < len(dispatcher.connections) < limit:  # accept all that wait: waitress alone takes one a turn
            before = len(dispatcher.connections)
            server.handle_accept()
    wasyncore.dispatcher.close(server)  # not server.close(): answers still pull the trigger, which that closes too
    end = time.monotonic() + LINGER
    while server.active_channels and (dispatcher.waiting or time.monotonic() < end):
        dispatcher.turn(timeout=0.02)
    dispatcher.turn(timeout=0)  # for what came in time, but while a turn took long


def main() -> None:
    """Serve until SIGTERM or SIGINT; the exit status is 0, or 2 where HOST and PORT can't be had."""
    logging.basicConfig(stream=sys.stdout, format="%(message)s", level=logging.INFO)
    logging.getLogger("waitress").setLevel(logging.ERROR)
    try:
        listener = socket.create_server((HOST, PORT), family=socket.AF_INET6 if ":" in HOST else socket.AF_INET)
    except OSError as error:
        reason = "a porta já está em uso" if error.errno == errno.EADDRINUSE else error.strerror
        print(f"HOST, PORT: não foi possível escutar em {HOST}, porta {PORT}: {reason}", file=sys.stderr)
        sys.exit(2)
    serve(listener)


if __name__ == "__main__":
    main()
