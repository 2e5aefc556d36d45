"""A visit counter: Redis counts, Postgres proves that it is there, waitress serves.

``app`` is the WSGI callable (PEP 3333) and ``main`` the program.
"""

import errno
import logging
import os
import socket
import sys
from collections.abc import Callable, Iterable
from functools import partial
from http.client import responses
from pathlib import Path
from typing import Any
from wsgiref.types import StartResponse, WSGIEnvironment

import redis

from backends import Postgres, Redis, UnavailableError, log, reason_for
from serving import HEADERS, serve

KEY = "contador_visitas"


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


def number(text: str, low: int, high: int) -> int:
    """Return the integer in ``text``; raise ValueError where it isn't one from ``low`` to ``high``."""
    return range(low, high + 1).index(int(text)) + low


def read_file(path: str) -> str:
    """Return the text of a file without the end of its last line; no path, no text."""
    return Path(path).read_text().rstrip("\r\n") if path else ""


# For a DATABASE_URL without a password: any character, as it is. A file is how Docker hands a secret over.
PASSWORD = os.environ.get("POSTGRES_PASSWORD") or setting("POSTGRES_PASSWORD_FILE", "", read_file, "um arquivo legível")
cache = setting("REDIS_URL", "redis://cache:6379/0", Redis, "redis://:SENHA@HOST:PORTA/0")
database = setting(
    "DATABASE_URL",
    "postgresql://postgres@db:5432/postgres",
    partial(Postgres, password=PASSWORD),
    "postgresql://USUÁRIO:SENHA@HOST:PORTA/BANCO",
)
HOST = setting("HOST", "0.0.0.0", str, "um endereço")
PORT = setting("PORT", "5000", partial(number, low=0, high=65535), "um número de 0 a 65535")  # 0: any free one
THREADS = setting("THREADS", "4", partial(number, low=1, high=100), "um número de 1 a 100")
ACCESS_LOG = setting("ACCESS_LOG", "1", partial(number, low=0, high=1), "0 ou 1")  # 0: no line per request

# --- Application ------------------------------------------------------------------------------------------------------
MORE_HEADERS = {503: [("Retry-After", "1")], 405: [("Allow", "GET, HEAD")]}


def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
    """Answer one request (PEP 3333); HEAD gets the headers of GET, and has no effect."""
    method, route = environ["REQUEST_METHOD"], ROUTES.get(environ.get("PATH_INFO") or "/")
    if not route:
        status, text = 404, "Não encontrado: há / (conta uma visita) e /reset (volta a 0)\n"
    elif method not in ("GET", "HEAD"):
        status, text = 405, "Método não permitido: use GET\n"
    else:
        status, text = route(method == "HEAD")
    body = text.encode()
    headers = [*HEADERS, ("Content-Length", str(len(body))), *MORE_HEADERS.get(status, [])]
    start_response(f"{status} {responses[status]}", headers)
    return [] if method == "HEAD" else [body]


def visit(head: bool) -> tuple[int, str]:
    """Count a visit; return the status and the text of ``/``. With ``head``, what they would be."""
    postgres = ""

    def count(connection: redis.Connection) -> Any:
        nonlocal postgres
        connection.send_command("GET" if head else "INCR", KEY)
        postgres = database.state()  # while Redis is at it: one wait instead of two
        return connection.read_response()

    try:
        answer = cache.ask(count)
        visits = int(0 if answer is None else answer) + head
        status, text = 200, f"Contador: {visits}\n"
        if visits >= 2**63:  # more than INCR can count
            raise ValueError
    except (UnavailableError, redis.ResponseError, ValueError) as error:
        status, text = refusal(error)
    return status, text if status == 500 else text + (postgres or database.state())


def reset(head: bool) -> tuple[int, str]:
    """Put the counter back to 0; return the status and the text of ``/reset``. With ``head``, what they would be."""
    try:
        cache.command("PING") if head else cache.command("SET", KEY, 0)
    except (UnavailableError, redis.ResponseError) as error:
        return refusal(error)
    return 200, "Contador: 0\n"


def refusal(error: Exception) -> tuple[int, str]:
    """Return the status and the text for a counter that can't be had."""
    if isinstance(error, ValueError) or any(word in str(error) for word in ("not an integer", "overflow", "WRONGTYPE")):
        return 500, f"Contador: {KEY} não guarda um número ou chegou ao limite; /reset volta a 0\n"
    return 503, f"Contador: indisponível ({reason_for(error)})\n"


def health(head: bool) -> tuple[int, str]:
    """Return the status and the text of ``/health``; it counts nothing."""
    text = cache.state() + database.state()
    return 503 if "indisponível" in text else 200, text


ROUTES = {"/": visit, "/reset": reset, "/health": health}


# --- Program ----------------------------------------------------------------------------------------------------------
def failing() -> bool:
    """Tell whether a backend did not answer when it was last asked."""
    return bool(cache.reason or database.reason)


def main() -> int:
    """Serve until SIGTERM or SIGINT; return the exit status: 0, or 2 where HOST and PORT can't be had."""
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    logging.basicConfig(stream=sys.stdout, format="%(message)s", level=logging.INFO)
    try:
        listener = socket.create_server((HOST, PORT), family=socket.AF_INET6 if ":" in HOST else socket.AF_INET)
    except OSError as error:
        reason = "a porta já está em uso" if error.errno == errno.EADDRINUSE else error.strerror
        print(f"HOST, PORT: não dá para escutar em {HOST}, porta {PORT}: {reason}", file=sys.stderr)
        return 2
    host, port = f"[{HOST}]" if ":" in HOST else HOST, listener.getsockname()[1]
    log.info("Contador em http://%s:%s (Redis: %s, Postgres: %s)", host, port, cache.host, database.host)
    serve(app, listener, THREADS, failing, access_log=ACCESS_LOG)
    return 0


if __name__ == "__main__":
    sys.exit(main())
