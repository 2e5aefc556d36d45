"""O waitress, sem threads: o que chegou junto é respondido junto, em uma rodada do laço dele."""

import logging
import os
import resource
import select
import signal
import sys
import time
from contextlib import suppress
from io import TextIOWrapper
from typing import Any
from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

from waitress import create_server, wasyncore
from waitress.server import BaseWSGIServer

from contador.settings import exit_on_bad_setting
from contador.visits import Visits

CONNECTIONS = 1000  # abertas ao mesmo tempo
OTHER_FILES = 30  # os que o programa abre além das conexões
REQUEST_BYTES = 16384  # o limite do cabeçalho, e outro igual do corpo: mil conexões são 32 MB
LOGGED_CHARACTERS = 500  # da primeira linha de uma requisição


class Front:
    """Atende com ``app``, em uma thread só; anuncia a ``visits`` quantas chegaram juntas."""

    def __init__(self, app: WSGIApplication, visits: Visits, host: str, port: str) -> None:
        logging.getLogger("waitress").setLevel(logging.WARNING)  # INFO copia texto do cliente
        self.app, self.visits = app, visits
        self.ready: list[Any] = []  # conexões com uma requisição completa
        self.started = 0.0  # o time.monotonic() do começo da rodada
        self.lines: list[str] = []  # da rodada, para o log
        self.must_stop = False
        self.map: dict[int, Any] = {}
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        files = min(CONNECTIONS + OTHER_FILES, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (files, hard))  # sem isto, no macOS seriam 256
        try:
            create_server(
                self.answer,
                map=self.map,
                host=host,
                port=port,
                threads=0,
                connection_limit=files - OTHER_FILES,
                max_request_header_size=REQUEST_BYTES,
                max_request_body_size=REQUEST_BYTES,
            )
        except (OSError, ValueError) as error:
            problem = f"não dá para escutar em {host}, porta {port} ({error})"
            exit_on_bad_setting("HOST, PORT", problem, "endereço deste computador e porta livre")
        # Um nome, como localhost, pode ter dois endereços. Cada um é um servidor, que está no map.
        self.servers = [each for each in self.map.values() if isinstance(each, BaseWSGIServer)]
        for server in self.servers:
            server.task_dispatcher = self  # no lugar das threads: é quem recebe add_task

    def url(self) -> str:
        """Devolve o primeiro endereço em que atende."""
        host, port = self.servers[0].effective_host, self.servers[0].effective_port
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def add_task(self, channel: Any) -> None:
        """Anota que uma conexão tem uma requisição completa; quem chama é o waitress."""
        self.ready.append(channel)

    def run(self) -> None:
        """Atende até SIGTERM (docker stop) ou SIGINT (Ctrl+C), e responde ao que já chegou."""
        signal.signal(signal.SIGTERM, self.stop)
        signal.signal(signal.SIGINT, self.stop)
        while not self.must_stop:
            self.turn(seconds=1)
        deadline = time.monotonic() + 1
        is_busy = True
        while is_busy and time.monotonic() < deadline:
            self.turn(seconds=0.02)
            is_busy = any(server.active_channels for server in self.servers)

    def stop(self, *_: object) -> None:
        self.must_stop = True
        self.servers[0].pull_trigger()  # acorda o laço

    def turn(self, seconds: float) -> None:
        """Lê o que chega em até ``seconds``; responde a uma requisição de cada conexão."""
        wasyncore.loop(seconds, use_poll=True, map=self.map, count=1)
        channels = [channel for channel in self.ready if channel.connected]
        self.ready = []
        self.started = time.monotonic()
        self.visits.expect(sum(is_visit(channel.requests[0]) for channel in channels))
        for channel in channels:
            if self.must_stop and len(channel.requests) == 1:
                channel.requests[0].headers["CONNECTION"] = "close"  # é a última: o waitress fecha
            channel.service()  # se há outra requisição na conexão, o waitress chama add_task
        if self.lines:
            logging.info("\n".join(self.lines))
            self.lines.clear()

    def answer(self, environ: WSGIEnvironment, start_response: StartResponse) -> list[bytes]:
        """Chama ``app`` e põe uma linha no log, menos para um /health que deu certo."""
        status, body = "500", [b""]

        def start(status_line: str, *rest: Any) -> Any:
            nonlocal status
            status = status_line.partition(" ")[0]
            return start_response(status_line, *rest)

        try:
            body = list(self.app(environ, start))
            return body
        finally:
            is_healthy = environ["PATH_INFO"] == "/health" and status == "200"
            if not is_healthy:
                self.lines.append(self.log_line(environ, status, sum(map(len, body))))

    def log_line(self, environ: WSGIEnvironment, status: str, size: int) -> str:
        """Devolve uma linha do Common Log Format (manual do Apache) e os ms desde ``started``."""
        host, now = environ["REMOTE_ADDR"], time.strftime("%d/%b/%Y:%H:%M:%S %z")
        request = "{REQUEST_METHOD} {REQUEST_URI} {SERVER_PROTOCOL}".format_map(environ)
        request = request[:LOGGED_CHARACTERS].encode("unicode_escape").decode()
        request = request.replace('"', '\\"')
        ms = (time.monotonic() - self.started) * 1000
        return f'{host} - - [{now}] "{request}" {status} {size or "-"} {ms:.1f} ms'


def is_visit(request: Any) -> bool:
    """Diz se ``app`` vai ver GET /: o waitress faz / de //, e ``app``, de um caminho vazio."""
    return not request.error and request.command == "GET" and not request.path.strip("/")


class Output:
    """A saída padrão, para o log: o que não dá para escrever agora se perde, e ninguém espera."""

    def __init__(self) -> None:
        if isinstance(sys.stdout, TextIOWrapper):  # é None se já começou fechada
            sys.stdout.reconfigure(line_buffering=True)  # o print de uma rota aparece na hora

    def write(self, text: str) -> None:
        with suppress(OSError, AttributeError):  # a saída pode estar fechada, ou o disco, cheio
            output = sys.stdout.fileno()
            for line in text.encode(errors="backslashreplace").splitlines(keepends=True):
                for start in range(0, len(line), select.PIPE_BUF):  # select só garante isto
                    _, writable, _ = select.select([], [output], [], 0)
                    if not writable:
                        return
                    os.write(output, line[start : start + select.PIPE_BUF])
