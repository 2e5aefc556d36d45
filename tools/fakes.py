"""A Redis and a Postgres that do what real ones won't, and count what they are sent; TLS for both.

What they send is a list of steps: bytes to send, seconds to wait, a function to call, or CLOSE
(in good order) and RESET (as a crash would), after which the connection is gone.
"""

import socket
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from enum import Enum
from struct import pack, unpack


class End(Enum):
    """How a connection ends."""

    CLOSE = 1
    RESET = 2


CLOSE = End.CLOSE
RESET = End.RESET
Step = bytes | float | Callable[[], object] | End
Steps = Sequence[Step]
LONGEST = 60  # seconds that nobody waits for more: no test takes so long


class Fake:
    """A server on 127.0.0.1 at ``port``, until ``end``; each connection has a thread of its own."""

    def __init__(self, port: int = 0) -> None:
        self.listener = socket.create_server(("127.0.0.1", port))
        self.port: int = self.listener.getsockname()[1]
        self.connections: list[socket.socket] = []  # since the last drop
        self.rest()
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self) -> None:
        with suppress(OSError):  # the end
            while True:
                connection, _ = self.listener.accept()
                self.connections.append(connection)
                threading.Thread(target=self.serve, args=[connection], daemon=True).start()

    def rest(self) -> None:
        """Be as at the beginning, with no connection and nothing unusual to do."""
        self.drop()

    def serve(self, connection: socket.socket) -> None:
        """Speak with a client, until either side ends."""
        connection.settimeout(LONGEST)
        with suppress(OSError, ValueError), connection:  # ValueError: another protocol
            self.converse(connection)

    def converse(self, connection: socket.socket) -> None:
        raise NotImplementedError

    def play(self, connection: socket.socket, steps: Steps) -> None:
        """Do what a list says."""
        for step in steps:
            if isinstance(step, bytes):
                connection.sendall(step)
            elif isinstance(step, float):
                time.sleep(step)
            elif isinstance(step, End):
                hang_up(connection, step)
            else:
                step()

    def drop(self) -> None:
        """End all connections, as a server that stops does, and forget them."""
        if not self.connections:
            return
        for connection in self.connections:
            with suppress(OSError):  # it has gone already
                connection.shutdown(socket.SHUT_RDWR)
        self.connections.clear()
        time.sleep(0.02)  # until the other side has surely been told: nothing shows it

    def end(self) -> None:
        """Refuse new connections, end the others."""
        with suppress(OSError):  # macOS: the close is enough
            self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        self.drop()


def hang_up(connection: socket.socket, how: End) -> None:
    """End a connection; whoever serves it gets an OSError at its next use."""
    if how is RESET:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, pack("ii", 1, 0))
    connection.close()


def read(connection: socket.socket, size: int) -> bytes:
    """Return so many bytes; raise ConnectionError where the client ends before."""
    data = b""
    while len(data) < size:
        more = connection.recv(size - len(data))
        if not more:
            raise ConnectionError
        data += more
    return data


def read_line(connection: socket.socket) -> bytes:
    """Return what comes until the end of a line, without it."""
    data = b""
    while not data.endswith(b"\r\n"):
        data += read(connection, 1)
    return data[:-2]


class FakeRedis(Fake):
    """A Redis (its protocol, RESP2, is in the manual) that counts, if nothing else is wanted.

    ``answers`` has the steps for each command, ``greeting`` those for a new connection, before any
    command; ``before``, what to call when a command comes the next time, before its answer.
    ``received`` has the commands of all connections.
    """

    def __init__(self, port: int = 0) -> None:
        super().__init__(port)
        self.url = f"redis://127.0.0.1:{self.port}/0"

    def rest(self) -> None:
        super().rest()
        self.answers: dict[str, Steps] = {}
        self.before: dict[str, Callable[[], object]] = {}
        self.greeting: Steps = []
        self.received: list[str] = []
        self.number = 0

    def converse(self, connection: socket.socket) -> None:
        self.play(connection, self.greeting)
        while True:
            count = int(read_line(connection)[1:])
            words = [self.read_word(connection) for _ in range(count)]
            self.received.append(" ".join(words))
            if words[0] in self.before:
                self.before.pop(words[0])()
            self.play(connection, self.answer(words))

    def read_word(self, connection: socket.socket) -> str:
        size = int(read_line(connection)[1:])
        return read(connection, size + 2)[:-2].decode()

    def answer(self, words: list[str]) -> Steps:
        if words[0] in self.answers:
            return self.answers[words[0]]
        if words[0] == "INCRBY":
            self.number += int(words[2])
            return [b":%d\r\n" % self.number]
        return [b"+PONG\r\n" if words[0] == "PING" else b"+OK\r\n"]

    def count(self, name: str) -> int:
        """Return how often a command has come."""
        return sum(command.split()[0] == name for command in self.received)


def message(kind: bytes, data: bytes = b"") -> bytes:
    """Return a message of Postgres's protocol (its manual, 54.7)."""
    return kind + pack("!i", len(data) + 4) + data


READY = message(b"Z", b"I")
WELCOME = message(b"R", pack("!i", 0)) + READY
NOTHING = message(b"I") + READY  # the answer to an empty query


def refusal(code: str, text: str) -> bytes:
    """Return Postgres's error that ends a connection."""
    fields = {"S": "FATAL", "V": "FATAL", "C": code, "M": text}
    return message(b"E", b"".join(f"{k}{v}\0".encode() for k, v in fields.items()) + b"\0")


class FakePostgres(Fake):
    """A Postgres that lets everybody in and takes each query for an empty one.

    ``greeting`` has the steps for a new connection, when it has said who it is, and ``answer``
    those for a query. ``received`` has the queries of all connections.
    """

    def __init__(self, port: int = 0) -> None:
        super().__init__(port)
        self.url = f"postgresql://postgres:senha@127.0.0.1:{self.port}/postgres"

    def rest(self) -> None:
        super().rest()
        self.greeting: Steps = [WELCOME]
        self.answer: Steps = [NOTHING]
        self.received: list[str] = []

    def converse(self, connection: socket.socket) -> None:
        (size,) = unpack("!i", read(connection, 4))
        read(connection, size - 4)
        self.play(connection, self.greeting)
        while True:
            kind, size = unpack("!ci", read(connection, 5))
            data = read(connection, size - 4)
            if kind != b"Q":
                return
            self.received.append(data.rstrip(b"\0").decode())
            self.play(connection, self.answer)


class TlsRelay(Fake):
    """Speaks TLS with the client, and hands all on to the real server at ``target``, a port.

    Where that is a Postgres, the client first asks for TLS (its manual, 54.2.11).
    """

    def __init__(self, context: ssl.SSLContext, target: int, is_postgres: bool = False) -> None:
        self.context = context
        self.target = target
        self.is_postgres = is_postgres
        super().__init__()

    def converse(self, connection: socket.socket) -> None:
        if self.is_postgres:
            read(connection, 8)
            connection.sendall(b"S")
        with (
            self.context.wrap_socket(connection, server_side=True) as client,
            socket.create_connection(("127.0.0.1", self.target), LONGEST) as server,
        ):
            back = threading.Thread(target=hand_on, args=[server, client], daemon=True)
            back.start()
            hand_on(client, server)
            back.join(LONGEST)


def hand_on(source: socket.socket, target: socket.socket) -> None:
    """Copy all that comes, until it ends."""
    with suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)
    with suppress(OSError):
        target.shutdown(socket.SHUT_RDWR)
