"""One kept connection to Redis and one to Postgres, with a limit to every wait.

A batch sends, pings and receives. One question alone, as in the exercises, is
``cache.run("INCR", key)`` or ``database.run(sql)``.
"""

import errno
import logging
import ssl
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, unquote, urlsplit

import pg8000.native
import redis
from redis.connection import parse_url

# Seconds to connect, and for the answers to what was sent together. What asks both servers can meet
# four such waits, and a connection that breaks at once: it stays below 1.5 s.
TIMEOUT = 0.35
AT_ONCE = 0.05  # seconds: what breaks sooner was broken before, and nobody has waited yet
RETRY_TIMEOUT = 0.1  # seconds to connect to a server that is known to be away
RETRY_PAUSE = 5  # after an attempt in vain, none for this many times its wait: visits go first

# By class of error, name of errno, SQLSTATE (PostgreSQL manual, Appendix A), Redis's error code,
# or the libraries' own words.
REASONS = {
    "gaierror": "host não encontrado",
    "TimeoutError": "tempo esgotado",
    "ECONNREFUSED": "conexão recusada",
    "ECONNRESET": "conexão interrompida",
    "EPIPE": "conexão interrompida",
    "Connection closed by server.": "conexão interrompida",
    "network error": "conexão interrompida",
    "EHOSTUNREACH": "sem rota até o host",
    "ENETUNREACH": "sem rota até o host",
    "ENOENT": "socket não encontrado",
    "InvalidResponse": "a resposta não é de um Redis",
    "KeyError": "a resposta não é de um Postgres",  # pg8000 knows no such message
    "SSLCertVerificationError": "certificado TLS recusado",
    "SSLError": "falha de TLS",
    "SSLEOFError": "falha de TLS",
    "SSLZeroReturnError": "falha de TLS",
    "Server refuses SSL": "o Postgres não aceita TLS",
    "NOAUTH": "o Redis exige uma senha",
    "AuthenticationError": "senha recusada",
    "NOPERM": "sem permissão no Redis",
    "DENIED": "o Redis está em modo protegido",
    "OOM": "memória do Redis esgotada",
    "MISCONF": "o Redis não consegue gravar em disco",
    "READONLY": "este Redis é só de leitura",
    "LOADING": "o Redis ainda está carregando os dados",
    "max number of clients reached": "o Redis não aceita mais conexões",
    "28P01": "senha recusada",
    "28000": "acesso recusado",
    "3D000": "banco inexistente",
    "53300": "o Postgres não aceita mais conexões",
    "57P03": "o Postgres ainda não está pronto",
}
# What Redis says of a key that can't be counted in (its source, t_string.c), after "ERR".
NOT_COUNTABLE = (
    "value is not an integer or out of range",
    "increment or decrement would overflow",
)


Command = tuple[str | int, ...]  # to Redis


class Unavailable(Exception):
    """A server could not be asked, or could not do what it was asked; the text says why."""


class BadValue(Exception):
    """Redis answered that the key holds no number, or that the number would become too large."""


class Reply(NamedTuple):
    """What came of one question: a value, or the reason why there is none."""

    value: Any = None
    reason: str = ""  # empty where there is a value
    bad_value: bool = False  # the key is at fault, not the server

    def result(self) -> Any:
        """Return the value; raise Unavailable or BadValue where there is none."""
        if self.bad_value:
            raise BadValue(self.reason)
        if self.reason:
            raise Unavailable(self.reason)
        return self.value


def reason_for(error: BaseException) -> str:
    """Return why ``error`` came about: a phrase in Portuguese, or the first line of its message."""
    for sign in signs(error):
        if sign in REASONS:
            return REASONS[sign]
    return message_of(error).partition("\n")[0] or type(error).__name__


def message_of(error: BaseException) -> str:
    """Return an error's text; Postgres sends several fields, of which M is the message."""
    if isinstance(error, pg8000.native.DatabaseError):
        return str(error.args[0].get("M", error))
    return str(error)


def signs(error: BaseException) -> Iterator[str]:
    """Yield what may tell the kind of an error, of those that caused it too, best first."""
    if isinstance(error, pg8000.native.DatabaseError):
        yield error.args[0].get("C", "")
    if isinstance(error, redis.RedisError):
        yield error.status_code or ""
    yield message_of(error)
    yield message_of(error).partition(" ")[0]
    cause: BaseException | None = error
    while cause:
        yield type(cause).__name__
        if isinstance(cause, OSError):
            yield errno.errorcode.get(cause.errno or 0, "")
        cause = cause.__context__


class Backend:
    """A server that is asked over one kept connection, by one thread at a time.

    Another thread connects, because looking up a name can outlast any time-out. Whoever starts it
    waits for a limited time; a connection that comes later serves the next batch.
    """

    def __init__(self, name: str, host: str) -> None:
        self.name = name
        self.host = host
        self.connection: Any = None  # open; the attempt's thread may fill this in at any moment
        self.reason = ""  # why the server is away; empty while it is there
        self.attempt: threading.Thread | None = None  # the last one
        self.failure = ""  # why it failed
        self.next_attempt = 0.0  # not before this time.monotonic()

    def connect(self) -> Any:
        """Return a new connection, on which the server has answered; raise any exception."""
        raise NotImplementedError

    def disconnect(self, connection: Any) -> None:
        """Close a connection, broken or not; raise any exception."""
        raise NotImplementedError

    def open(self) -> Any:
        """Return the connection; raise Unavailable where there is none in time."""
        trying = self.attempt is not None and self.attempt.is_alive()
        if not self.connection and not trying and time.monotonic() > self.next_attempt:
            self.start_attempt()
        connection = self.connection
        if not connection:
            raise Unavailable(self.failure)
        return connection

    def start_attempt(self) -> None:
        """Connect in another thread; return when that is done, or has taken too long."""
        started = time.monotonic()
        self.failure = REASONS["TimeoutError"]
        self.attempt = threading.Thread(target=self.try_to_connect, daemon=True)
        self.attempt.start()
        self.attempt.join(RETRY_TIMEOUT if self.reason else TIMEOUT)
        waited = time.monotonic() - started
        self.next_attempt = time.monotonic() + RETRY_PAUSE * waited  # unless the server answers

    def try_to_connect(self) -> None:
        """Fill in the connection, or why there is none."""
        try:
            self.connection = self.connect()
        except Exception as error:  # what isn't a Redis or a Postgres at all can raise anything
            self.failure = reason_for(error)

    def close(self) -> None:
        """Close the connection, broken or not; an attempt that is under way goes on."""
        connection, self.connection = self.connection, None
        if connection:
            with suppress(Exception):
                self.disconnect(connection)

    def note_there(self) -> None:
        """Take note that the server has answered; log it if it was away."""
        if self.reason:
            logging.info("%s: conectado de novo", self.name)
        self.reason = ""
        self.next_attempt = 0.0

    def note_away(self, error: Exception) -> str:
        """Take note that the server is away, log it if it was there, and return why."""
        if isinstance(error, Unavailable):  # there was no connection; one may just have come
            reason = str(error)
        else:
            self.close()
            reason = reason_for(error)
        if not self.reason:
            logging.info("%s: indisponível (%s)", self.name, reason)
        self.reason = reason
        return reason


class Redis(Backend):
    """The Redis at ``url``, in redis-py's form: redis://, rediss:// or unix://.

    Time-outs and protocol are ours, whatever the URL says. A bad URL: ValueError or TypeError.
    """

    def __init__(self, url: str) -> None:
        options = parse_url(url)
        parts = urlsplit(url)
        is_number = "db" in options or not parts.path.strip("/")  # otherwise it is passed over
        if parts.fragment or not (is_number or parts.scheme == "unix"):
            raise ValueError(url)
        self.connection_class = options.pop("connection_class", redis.Connection)
        self.options = {
            **options,
            "socket_timeout": TIMEOUT,
            "socket_connect_timeout": TIMEOUT,
            "protocol": 2,  # 3 adds notices that nobody asked for
            "health_check_interval": 0,  # PINGs of its own
            "driver_info": None,  # CLIENT SETINFO
        }
        self.connection_class(**self.options)  # opens nothing, refuses an unknown option
        host = options.get("path") if url.startswith("unix:") else options.get("host")
        super().__init__("Redis", host or "localhost")
        self.expected = 0  # replies to what was sent
        self.error: Exception | None = None  # why it could not be sent

    def connect(self) -> Any:
        connection = self.connection_class(**self.options)
        connection.connect()
        try:
            connection.send_command("PING")  # a frozen server accepts connections all the same
            connection.read_response()
        except Exception:
            connection.disconnect()
            raise
        return connection

    def disconnect(self, connection: Any) -> None:
        connection.disconnect()

    def run(self, *command: str | int) -> Any:
        """Send one command and return the answer; raise Unavailable or BadValue.

        It is never sent twice: without an answer it may have been carried out all the same.
        """
        self.send([command])
        return self.receive()[0].result()

    def send(self, commands: Sequence[Command]) -> None:
        """Send commands as one packet; what goes wrong is told by ``receive``."""
        self.expected = len(commands)
        self.error = None
        if not commands:
            return
        try:
            if self.connection and self.is_stale():
                self.close()
            connection = self.open()
            connection.send_packed_command(connection.pack_commands(commands))
        except Exception as error:
            self.error = error

    def is_stale(self) -> bool:
        """Tell whether Redis has closed the connection, or has sent what nobody asked for."""
        try:
            return bool(self.connection.can_read(timeout=0))
        except redis.ConnectionError:
            return True

    def receive(self) -> list[Reply]:
        """Return a reply to each command that was sent."""
        deadline = time.monotonic() + TIMEOUT
        return [self.receive_one(deadline) for _ in range(self.expected)]

    def receive_one(self, deadline: float) -> Reply:
        """Return the next reply; after one in vain, none of the others can be had."""
        if self.error:
            return Reply(reason=self.note_away(self.error))
        try:
            timeout = max(deadline - time.monotonic(), 0.001)
            value = self.connection.read_response(timeout=timeout)
        except redis.ResponseError as error:
            self.note_there()
            return Reply(reason=reason_for(error), bad_value=is_about_the_key(error))
        except Exception as error:
            self.error = error
            return Reply(reason=self.note_away(error))
        self.note_there()
        return Reply(value)


def is_about_the_key(error: redis.ResponseError) -> bool:
    """Tell whether Redis refused a command because of what the key holds."""
    text = str(error)
    return text.startswith("WRONGTYPE ") or text in NOT_COUNTABLE


class Postgres(Backend):
    """The Postgres at ``url``, in libpq's form (its manual, 32.1.1.2).

    ``password`` is for a URL without one. Options: host, port, sslmode (disable, require,
    verify-full), sslrootcert. A bad URL: ValueError or OSError.
    """

    def __init__(self, url: str, password: str) -> None:
        parts = urlsplit(url)
        options = dict(parse_qsl(parts.query, strict_parsing=True))
        host = options.pop("host", None) or unquote(parts.hostname or "localhost")
        port = int(options.pop("port", None) or parts.port or 5432)
        tls = tls_context(options.pop("sslmode", "disable"), options.pop("sslrootcert", None))
        if parts.scheme not in ("postgresql", "postgres") or parts.fragment or options:
            raise ValueError(url)
        self.options = {
            "user": unquote(parts.username or "postgres"),
            "password": unquote(parts.password or "") or password,
            "host": host,
            "port": port,
            "unix_sock": f"{host}/.s.PGSQL.{port}" if host.startswith("/") else None,
            "database": unquote(parts.path[1:] or parts.username or "postgres"),
            "ssl_context": tls,
            "timeout": TIMEOUT,
        }
        super().__init__("Postgres", host)

    def connect(self) -> Any:
        return pg8000.native.Connection(**self.options)

    def disconnect(self, connection: Any) -> None:
        connection.close()

    def run(self, sql: str) -> Any:
        """Run SQL once; return the rows, or None where it gives none. Raise Unavailable."""
        return self.ask(sql).result()

    def ping(self) -> Reply:
        """Send an empty query, the cheapest round trip (manual, 54.2.2).

        A connection that broke while it was idle shows that only when it is asked. Then, and then
        alone, the query is sent again, on a new one.
        """
        if self.connection:
            started = time.monotonic()
            try:
                self.connection.run("")
            except Exception as error:
                if time.monotonic() > started + AT_ONCE:
                    return Reply(reason=self.note_away(error))
                self.close()
            else:
                self.note_there()
                return Reply()
        return self.ask("")

    def ask(self, sql: str) -> Reply:
        """Run SQL once and return what came of it."""
        try:
            rows = self.open().run(sql)
        except pg8000.native.DatabaseError as error:  # one that leaves the connection as it was
            self.note_there()
            return Reply(reason=reason_for(error))
        except Exception as error:
            return Reply(reason=self.note_away(error))
        self.note_there()
        return Reply(rows)


def tls_context(mode: str, certificates: str | None) -> ssl.SSLContext | bool:
    """Return what pg8000 takes for a mode of libpq's; raise ValueError for one that is not ours.

    ``certificates`` is a file with those that are trusted, instead of the system's.
    """
    if mode == "verify-full":
        return ssl.create_default_context(cafile=certificates)
    if certificates or mode not in ("disable", "require"):
        raise ValueError(mode)
    return mode == "require"
