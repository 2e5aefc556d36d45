"""The counter as the class was asked for it: Flask's own server, INCR, a connection per visit.

It is here to be measured beside ``server.py`` (``make bench``), and takes the same PORT, REDIS_URL
and DATABASE_URL.
"""

import logging
import os

import psycopg2
import redis
from flask import Flask

app = Flask(__name__)
redis_client = redis.Redis.from_url(os.environ["REDIS_URL"])


def postgres_status() -> str:
    try:
        psycopg2.connect(os.environ["DATABASE_URL"]).close()
    except psycopg2.OperationalError:
        return "indisponível"
    return "conectado"


@app.get("/")
def visit() -> str:
    return f"Contador: {redis_client.incr('contador_visitas')}\nPostgres: {postgres_status()}\n"


@app.get("/reset")
def reset() -> str:
    redis_client.set("contador_visitas", 0)
    return "Contador: 0\n"


if __name__ == "__main__":
    logging.disable()  # no line per visit, to its advantage: server.py writes one
    app.run("127.0.0.1", int(os.environ["PORT"]))
