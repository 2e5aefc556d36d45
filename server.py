"""A visit counter: Redis counts, Postgres proves that it is there, waitress serves.

``app`` is the WSGI callable (PEP 3333) and ``main`` the program.
"""

import errno
import logging
import os
import socket
import sys
from collections.abc import Callable, Iterator
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
# A route puts its questions on their way and returns a function that waits for the answers: meanwhile, those of other
# requests can go too.
Answer = Callable[[], tuple[int, str]]  # returns a status and a text
MORE_HEADERS = {503: [("Retry-After", "1")], 405: [("Allow", "GET, HEAD")]}


def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterator[bytes]:
    """Answer one request (PEP 3333); HEAD gets the headers of GET, and has no effect.

    When it returns, Redis and Postgres have been asked; the first iteration waits for them.
    """
    method, route = environ["REQUEST_METHOD"], ROUTES.get(environ.get("PATH_INFO") or "/", not_found)
    if method not in ("GET", "HEAD") and route != not_found:
        route = not_allowed
    return respond(route(method == "HEAD"), method, start_response)


def respond(answer: Answer, method: str, start_response: StartResponse) -> Iterator[bytes]:
    """Wait for an answer, start the response, and yield its body."""
    status, text = answer()
    body = text.encode()
    headers = [*HEADERS, ("Content-Length", str(len(body))), *MORE_HEADERS.get(status, [])]
    start_response(f"{status} {responses[status]}", headers)
    if method != "HEAD":
        yield body


def visit(head: bool) -> Answer:
    """Count a visit, for ``/``. With ``head``, find out what the answer would be."""
    # Of the two, Postgres takes longer: by the time it has answered, Redis mostly has too.
    state, count = database.state(), cache.ask(("GET", KEY) if head else ("INCR", KEY))

    def answer() -> tuple[int, str]:
        postgres = state()
        try:
            number = count()
            visits = int(0 if number is None else number) + head
            if visits >= 2**63:  # more than INCR can count
                raise ValueError
            return 200, f"Contador: {visits}\n{postgres}"
        except (UnavailableError, redis.ResponseError, ValueError) as error:
            status, text = refusal(error)
            return status, text if status == 500 else text + postgres

    return answer


def reset(head: bool) -> Answer:
    """Put the counter back to 0, for ``/reset``. With ``head``, only find out whether that could be done."""
    done = cache.ask(("PING",) if head else ("SET", KEY, 0))

    def answer() -> tuple[int, str]:
        try:
            done()
        except (UnavailableError, redis.ResponseError) as error:
            return refusal(error)
        return 200, "Contador: 0\n"

    return answer


def refusal(error: Exception) -> tuple[int, str]:
    """Return the status and the text for a counter that can't be had."""
    if isinstance(error, ValueError) or any(word in str(error) for word in ("not an integer", "overflow", "WRONGTYPE")):
        return 500, f"Contador: {KEY} não guarda um número ou chegou ao limite; /reset volta a 0\n"
    return 503, f"Contador: indisponível ({reason_for(error)})\n"


def health(head: bool) -> Answer:
    """Tell whether both are there, for ``/health``; it counts nothing."""
    states = cache.state(), database.state()

    def answer() -> tuple[int, str]:
        text = "".join(state() for state in states)
        return 503 if "indisponível" in text else 200, text

    return answer


def not_found(head: bool) -> Answer:
    """Say which paths there are."""
    return lambda: (404, "Não encontrado: há / (conta uma visita) e /reset (volta a 0)\n")


def not_allowed(head: bool) -> Answer:
    """Say which methods there are."""
    return lambda: (405, "Método não permitido: use GET\n")


ROUTES = {"/": visit, "/reset": reset, "/health": health}


# --- Program ----------------------------------------------------------------------------------------------------------
def failing() -> bool:
    """Tell whether the next request should find out if a backend that failed is back."""
    return bool(cache.untried() or database.untried())


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
    cache.line.patient = database.line.patient = False  # the main loop waits for nothing that a thread can find out
    serve(app, listener, THREADS, failing, access_log=ACCESS_LOG)
    return 0


if __name__ == "__main__":
    sys.exit(main())
