"""The counter as the description asks for it: Flask's own server, INCR, a connection per visit.

It is here to be measured beside ``server.py`` (``make bench``), and takes the same PORT, REDIS_URL
and DATABASE_URL.
"""

import logging
import os

import psycopg2
import redis
from flask import Flask

app = Flask(__name__)
redis_client = redis.Redis.from_url(os.environ.get("REDIS_URL", "redis://cache:6379"))


def postgres_status() -> str:
    """Tell whether Postgres takes a connection."""
    try:
        psycopg2.connect(
            os.environ.get("DATABASE_URL", "postgresql://postgres:senha123@db:5432/postgres")
        ).close()
    except psycopg2.OperationalError:
        return "desconectado"
    return "conectado"


@app.get("/")
def visit() -> str:
    """Count a visit."""
    return f"Contador: {redis_client.incr('contador_visitas')}\nPostgres: {postgres_status()}\n"


@app.get("/reset")
def reset() -> str:
    """Set the counter to 0."""
    redis_client.set("contador_visitas", 0)
    return "Contador: 0\n"


if __name__ == "__main__":
    logging.getLogger("werkzeug").setLevel(
        logging.WARNING
    )  # no line per visit, to its advantage: server.py writes one
    app.run("127.0.0.1", int(os.environ.get("PORT", "5000")))
