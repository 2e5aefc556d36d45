"""Um contador de visitas: o Redis conta, o Postgres só mostra que está no ar, o waitress atende.

Aqui ficam as rotas. Em ``contador/``: as conexões com os dois (``backends.py``), a contagem das
visitas que chegam juntas (``visits.py``), o waitress (``front.py``) e a configuração.
"""

import logging
from contextlib import suppress
from http import HTTPStatus
from wsgiref.types import StartResponse, WSGIEnvironment

from contador import settings
from contador.backends import BackendError, Postgres, Redis
from contador.front import Front, Output
from contador.visits import BadValue, Visit, Visits

KEY = "contador_visitas"
cache = Redis(settings.redis_options())
database = Postgres(settings.postgres_options())
visits = Visits(cache, database, KEY)


# --- As rotas: cada uma devolve o status HTTP e o texto -------------------------------------------
# Uma rota sua é uma função aqui e uma linha em ROUTES. Ela pode usar cache.run("INCR", "aula"),
# que devolve a resposta do Redis, e database.run("INSERT INTO alunos VALUES (:nome)", nome="Ana"),
# que devolve as linhas. Só uma thread atende: se uma rota dormir 10 s, todas as visitas esperam.
def visit() -> tuple[int, str]:
    """Conta uma visita e diz se o Postgres responde."""
    return page(visits.take())


def visit_head() -> tuple[int, str]:
    """Responde como ``visit``, mas não conta: mostra o número da próxima visita."""
    return page(visits.peek())


def page(this_visit: Visit) -> tuple[int, str]:
    """Mostra o número de uma visita, ou por que ela não tem um, e se o Postgres responde."""
    number, postgres_error = this_visit
    second_line = postgres_error or "Postgres: conectado"
    if isinstance(number, BackendError):
        return number.status, f"{number}\n{second_line}\n"
    return 200, f"Contador: {number}\n{second_line}\n"


def reset() -> tuple[int, str]:
    """Zera o contador, seja qual for o valor dele."""
    cache.run("SET", KEY, 0)
    return 200, "Contador: 0\n"


def reset_head() -> tuple[int, str]:
    """Responde como ``reset``, mas não zera: somar 0 falha quando zerar falharia."""
    with suppress(BadValue):  # menos por um valor ruim, que não impede o reset
        visits.add(0)
    return 200, "Contador: 0\n"


def health() -> tuple[int, str]:
    """Diz se uma visita seria contada e se o Postgres responde; não conta nada."""
    number, postgres_error = visits.peek()
    redis_error = number if isinstance(number, BackendError) else None
    status = 503 if redis_error or postgres_error else 200
    first_line = redis_error or "Redis: conectado"
    return status, f"{first_line}\n{postgres_error or 'Postgres: conectado'}\n"


ROUTES = {
    ("GET", "/"): visit,
    ("HEAD", "/"): visit_head,
    ("GET", "/reset"): reset,
    ("HEAD", "/reset"): reset_head,
    ("GET", "/health"): health,
    ("HEAD", "/health"): health,
}


# --- A aplicação: o que o servidor WSGI chama, a cada requisição (PEP 3333) -----------------------
def app(environ: WSGIEnvironment, start_response: StartResponse) -> list[bytes]:
    method = environ["REQUEST_METHOD"]
    path = environ.get("PATH_INFO", "").encode("latin-1").decode(errors="replace") or "/"
    allowed = [known for known, its_path in ROUTES if its_path == path]
    status, text = answer(method, path, allowed)
    body = text.encode()
    headers = [
        ("Content-Type", "text/plain; charset=utf-8"),
        ("Content-Length", str(len(body))),
        ("Cache-Control", "no-store"),
        ("X-Content-Type-Options", "nosniff"),
    ]
    if status == 503:
        headers.append(("Retry-After", "1"))
    if status == 405:
        headers.append(("Allow", ", ".join(allowed)))
    start_response(f"{status} {HTTPStatus(status).phrase}", headers)
    return [b"" if method == "HEAD" else body]


def answer(method: str, path: str, allowed: list[str]) -> tuple[int, str]:
    """Chama a rota, ou diz por que não pode; ``allowed`` são os métodos que o caminho aceita."""
    if not allowed:
        return 404, "Não encontrado. Use / (conta uma visita), /reset (volta a 0) ou /health\n"
    if method not in allowed:
        return 405, f"Método não permitido: use {allowed[0]}\n"
    try:
        return ROUTES[method, path]()
    except BackendError as error:
        return error.status, f"{error}\n"


def main() -> None:
    """Atende até SIGTERM ou SIGINT."""
    logging.basicConfig(stream=Output(), format="%(message)s", level=logging.INFO)
    front = Front(app, visits, *settings.address())
    logging.info(
        "Escutando em %s (Redis: %s, Postgres: %s)", front.url(), cache.host, database.host
    )
    front.run()


if __name__ == "__main__":
    main()
