"""A configuração, que vem do ambiente; um valor ruim encerra o programa com uma linha."""

import os
import ssl
import sys
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import parse_qsl, unquote, urlsplit

import redis
from redis.connection import parse_url

# O sslmode da libpq (manual do PostgreSQL, 32.19) em termos do pg8000; None é TLS, se houver.
SSL_CONTEXTS = {"disable": False, "allow": None, "prefer": None, "require": True}


def exit_on_bad_setting(name: str, problem: str, expected: str) -> NoReturn:
    """Encerra o programa com status 2 e uma linha, sem o valor, que pode ser uma senha."""
    print(f"{name}: {problem}; esperado: {expected}", file=sys.stderr)
    sys.exit(2)


def address() -> tuple[str, str]:
    """Devolve HOST e PORT, onde escutar."""
    host, port = os.environ.get("HOST") or "0.0.0.0", os.environ.get("PORT") or "5000"
    if not (port.isdecimal() and int(port) <= 65535):
        exit_on_bad_setting("PORT", "valor inválido", "um número de 0 a 65535")
    return host, port


def redis_options() -> dict[str, Any]:
    """Devolve as opções de REDIS_URL para ``redis.ConnectionPool``."""
    url = os.environ.get("REDIS_URL") or "redis://cache:6379/0"
    try:
        options: dict[str, Any] = parse_url(url)
        redis.ConnectionPool(**options).make_connection()  # não conecta; recusa opção desconhecida
    except Exception:  # cada opção inválida lança uma diferente
        exit_on_bad_setting("REDIS_URL", "valor inválido", "redis://:SENHA@HOST:PORTA/0")
    return options


def postgres_options() -> dict[str, Any]:
    """Devolve as opções de DATABASE_URL para ``pg8000.native.Connection``."""
    url = os.environ.get("DATABASE_URL") or "postgresql://postgres@db"
    try:
        return parse_postgres_url(url)
    except ValueError:
        expected = "postgresql://USUÁRIO:SENHA@HOST:PORTA/BANCO?sslmode=require"
        exit_on_bad_setting("DATABASE_URL", "valor inválido", expected)


def parse_postgres_url(url: str) -> dict[str, Any]:
    """Lê uma URL no formato da libpq (manual do PostgreSQL, 32.1.1.2)."""
    parts = urlsplit(url)
    if parts.scheme not in ("postgresql", "postgres") or parts.fragment:  # um # na senha é %23
        raise ValueError(parts.scheme)
    query = dict(parse_qsl(parts.query, strict_parsing=True))
    for ignored in ("application_name", "channel_binding", "connect_timeout"):  # de URLs prontas
        query.pop(ignored, None)
    host = query.pop("host", "") or unquote(parts.hostname or "localhost")
    port = int(query.pop("port", 0) or parts.port or 5432)
    ssl_mode = query.pop("sslmode", "prefer")
    if ssl_mode == "verify-full":
        ssl_context: object = ssl.create_default_context()  # confere com os certificados do sistema
    elif ssl_mode in SSL_CONTEXTS:
        ssl_context = SSL_CONTEXTS[ssl_mode]
    else:
        expected = ", ".join([*SSL_CONTEXTS, "verify-full"])
        exit_on_bad_setting("DATABASE_URL", "sslmode desconhecido", expected)
    if query:
        problem = f"opção desconhecida: {', '.join(query)}"
        exit_on_bad_setting("DATABASE_URL", problem, "host, port ou sslmode")
    return {
        "user": unquote(parts.username or "postgres"),
        "password": unquote(parts.password or "") or postgres_password(),
        "host": host,
        "port": port,
        "unix_sock": f"{host}/.s.PGSQL.{port}" if host.startswith("/") else None,
        "database": unquote(parts.path[1:] or parts.username or "postgres"),
        "ssl_context": ssl_context,
    }


def postgres_password() -> str:
    """Devolve a senha para uma URL sem senha; ``senha123`` serve só para a aula."""
    password = os.environ.get("POSTGRES_PASSWORD", "").rstrip("\r\n")
    path = os.environ.get("POSTGRES_PASSWORD_FILE")
    if password or not path:
        return password or "senha123"
    problem = "o arquivo está vazio"  # se nenhum erro disser outra coisa
    try:
        password = Path(path).read_text(encoding="utf-8").rstrip("\r\n")
    except FileNotFoundError:
        problem = "o arquivo não existe"
    except PermissionError:
        problem = "sem permissão para ler o arquivo"
    except OSError:
        problem = "não dá para ler o arquivo"
    except UnicodeDecodeError:
        problem = "o arquivo não está em UTF-8"
    if not password:
        exit_on_bad_setting("POSTGRES_PASSWORD_FILE", problem, "um arquivo com a senha")
    return password
