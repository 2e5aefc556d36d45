"""A visit counter: Redis counts, Postgres only shows that it is there, waitress serves.

One idea makes it fast: visits that came in together are counted together, with one command.
How it keeps in touch with the two is in ``contador/backends.py``; waitress, in ``front.py``.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from functools import partial
from http.client import responses
from wsgiref.types import StartResponse, WSGIEnvironment

from contador import log
from contador.backends import BadValue, Command, Postgres, Redis, Reply, Unavailable
from contador.front import Front
from contador.settings import password, port_number, setting, told_in_one_line, yes_or_no

KEY = "contador_visitas"


# --- What it answers ------------------------------------------------------------------------------
def visit(batch: Batch, head: bool) -> tuple[int, str]:
    """Answer ``/``: the number of this visit, and whether Postgres is there.

    HEAD tells the number that a visit would get, and takes none.
    """
    postgres = state_line("Postgres", batch.postgres.reason)
    try:
        number = batch.peek_number() if head else batch.take_number()
    except Unavailable as error:
        return 503, state_line("Contador", str(error)) + postgres
    return 200, f"Contador: {number}\n" + postgres


def reset(batch: Batch, head: bool) -> tuple[int, str]:
    """Answer ``/reset``: the counter is 0 again, whatever the key held. HEAD changes nothing."""
    command = "PING" if head else "SET"
    batch.replies[command].result()  # raises, if Redis did not do it
    return 200, "Contador: 0\n"


def health(batch: Batch, head: bool) -> tuple[int, str]:
    """Answer ``/health``: whether both servers are there. It counts nothing."""
    redis_reason = batch.replies["PING"].reason
    postgres_reason = batch.postgres.reason
    status = 503 if redis_reason or postgres_reason else 200
    return status, state_line("Redis", redis_reason) + state_line("Postgres", postgres_reason)


def state_line(name: str, reason: str) -> str:
    """Return the line that says why something can't be had or, without a reason, that it can."""
    if reason:
        return f"{name}: indisponível ({reason})\n"
    return f"{name}: conectado\n"


ROUTES = {"/": visit, "/reset": reset, "/health": health}
HEADERS = [
    ("Content-Type", "text/plain; charset=utf-8"),
    ("Cache-Control", "no-store"),
    ("X-Content-Type-Options", "nosniff"),
]
MORE_HEADERS = {503: [("Retry-After", "1")], 405: [("Allow", "GET, HEAD")]}
one_at_a_time = threading.Lock()  # other servers may answer in threads; ours has only one


def app(environ: WSGIEnvironment, start_response: StartResponse) -> list[bytes]:
    """Answer one request (PEP 3333), under any WSGI server.

    Front hands over the batch that the request belongs to. Other servers know of no such thing:
    then the request is a batch of its own.
    """
    method = environ["REQUEST_METHOD"]
    path = environ.get("PATH_INFO") or "/"
    with one_at_a_time:
        batch = environ.get("contador.batch") or Batch([(method, path)])
        status, text = answer(method, path, batch)
    body = text.encode()
    headers = [*HEADERS, ("Content-Length", str(len(body))), *MORE_HEADERS.get(status, [])]
    start_response(f"{status} {responses[status]}", headers)
    return [b"" if method == "HEAD" else body]


def answer(method: str, path: str, batch: Batch) -> tuple[int, str]:
    """Return the status and the text for a request."""
    if path not in ROUTES:
        return 404, "Não encontrado. Use / (conta uma visita), /reset (volta a 0) ou /health\n"
    if method not in ("GET", "HEAD"):
        return 405, "Método não permitido: use GET\n"
    try:
        return ROUTES[path](batch, method == "HEAD")
    except Unavailable as error:
        return 503, state_line("Contador", str(error))
    except BadValue:
        text = "Contador: o valor guardado não é um número ou chegou ao limite; acesse /reset\n"
        return 500, text


# --- How it counts --------------------------------------------------------------------------------
class Batch:
    """Requests that came in together, each a method and a path: each server is asked once for all.

    ``replies`` holds what Redis answered, by command; ``postgres``, the reply to an empty query.
    """

    def __init__(self, requests: list[tuple[str, str]]) -> None:
        self.visits = requests.count(("GET", "/"))
        self.taken = 0  # numbers given to visits
        wanted = set(requests)
        commands: list[Command] = []
        if wanted & {("GET", "/"), ("HEAD", "/")}:  # one of these, or both
            # By 0 where there are only HEADs: that counts nothing, and Redis judges the value.
            commands.append(("INCRBY", KEY, self.visits))
        if ("GET", "/reset") in wanted:
            commands.append(("SET", KEY, 0))
        if wanted & {("HEAD", "/reset"), ("GET", "/health"), ("HEAD", "/health")}:
            commands.append(("PING",))
        cache.send(commands)  # Redis works on them while Postgres is asked
        self.postgres = Reply(reason="não consultado")
        if wanted & {("GET", "/"), ("HEAD", "/"), ("GET", "/health"), ("HEAD", "/health")}:
            self.postgres = database.ping()
        names = [command[0] for command in commands]
        self.replies = dict(zip(names, cache.receive(), strict=True))

    def take_number(self) -> int:
        """Return a number that no other visit gets; raise Unavailable or BadValue."""
        last: int = self.replies["INCRBY"].result()
        self.taken += 1
        return last - self.visits + self.taken  # of 3 visits, where the last is 12: 10, 11, 12

    def peek_number(self) -> int:
        """Return the number that a visit would get now; raise Unavailable or BadValue."""
        last: int = self.replies["INCRBY"].result()
        if last == 2**63 - 1:  # Redis counts with 64 bits, one of them for the sign (manual, INCR)
            raise BadValue
        return last + 1


# --- Settings, from the environment, read once ----------------------------------------------------
# If this is the program that was started, a bad one ends it, with one line and status 2.
with told_in_one_line(is_program=__name__ == "__main__"):
    cache = setting("REDIS_URL", "redis://cache:6379/0", Redis, "redis://:SENHA@HOST:PORTA/0")
    database = setting(
        "DATABASE_URL",
        "postgresql://postgres@db",
        # For a URL without a password. This one is the class's, and for nothing else.
        partial(Postgres, password=password(default="senha123")),
        "postgresql://USUÁRIO:SENHA@HOST:PORTA/BANCO",
    )
    HOST = os.environ.get("HOST") or "0.0.0.0"
    PORT = setting("PORT", "5000", port_number, "um número de 0 a 65535")  # 0: any free one
    ACCESS_LOG = setting("ACCESS_LOG", "1", yes_or_no, "0 ou 1")  # 0: no line per request


# --- How it starts --------------------------------------------------------------------------------
def main() -> None:
    """Serve until SIGTERM or SIGINT; the exit status is 0, or 2 where it can't begin."""
    logging.basicConfig(handlers=[log.Handler()], format="%(message)s", level=logging.INFO)
    with told_in_one_line(is_program=True):
        front = Front(HOST, PORT, app, Batch, ACCESS_LOG)
    signal.signal(signal.SIGTERM, front.stop)  # docker stop
    signal.signal(signal.SIGINT, front.stop)  # Ctrl+C
    logging.info("Escutando em %s (Redis: %s, Postgres: %s)", front.url, cache.host, database.host)
    front.serve()


if __name__ == "__main__":
    main()
