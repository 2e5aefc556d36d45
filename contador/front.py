"""O waitress, sem threads: o que chegou junto é respondido junto, em uma rodada do laço dele."""

import logging
import os
import resource
import select
import signal
import sys
import time
from contextlib import suppress
from typing import Any
from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

from waitress import create_server, wasyncore
from waitress.server import BaseWSGIServer

from contador.settings import exit_on_bad_setting
from contador.visits import Visits

CONNECTIONS = 1000  # abertas ao mesmo tempo


class Front:
    """Atende com ``app`` em ``host`` e ``port``, em uma thread só."""

    def __init__(self, app: WSGIApplication, visits: Visits, host: str, port: str) -> None:
        logging.getLogger("waitress").setLevel(logging.WARNING)  # INFO copia texto do cliente
        self.app, self.visits = app, visits
        self.ready: list[Any] = []  # conexões com uma requisição completa
        self.started = 0.0  # o time.monotonic() do começo da rodada
        self.lines: list[str] = []  # da rodada, para o log
        self.deadline: float | None = None  # o time.monotonic() do fim de tudo
        self.map: dict[int, Any] = {}
        try:
            create_server(
                self.answer,
                map=self.map,
                host=host,
                port=port,
                threads=0,
                connection_limit=CONNECTIONS,
                send_bytes=65536,
            )
        except (OSError, OverflowError, ValueError) as error:
            problem = f"não dá para escutar em {host}, porta {port} ({error})"
            exit_on_bad_setting("HOST, PORT", problem, "um endereço daqui e uma porta livre")
        self.servers = [each for each in self.map.values() if isinstance(each, BaseWSGIServer)]
        for server in self.servers:  # um nome, como localhost, pode ter dois endereços
            server.task_dispatcher = self
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        files = CONNECTIONS + 50  # o programa abre alguns além das conexões
        files = files if hard == resource.RLIM_INFINITY else min(files, hard)
        if 0 <= soft < files:  # no macOS, soft é 256; negativo é sem limite
            resource.setrlimit(resource.RLIMIT_NOFILE, (files, hard))

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
        while self.deadline is None:
            self.turn(seconds=1)
        while self.is_busy() and time.monotonic() < self.deadline:
            self.turn(seconds=0.05)

    def stop(self, *_: object) -> None:
        self.deadline = self.deadline or time.monotonic() + 1  # segundo, para o que já chegou
        self.servers[0].pull_trigger()  # acorda o laço

    def is_busy(self) -> bool:
        """Diz se há uma conexão aberta, ou uma que espera para ser aceita."""
        listeners = [server.socket for server in self.servers]
        waiting, _, _ = select.select(listeners, [], [], 0)
        return bool(waiting) or any(server.active_channels for server in self.servers)

    def turn(self, seconds: float) -> None:
        """Lê o que chega em até ``seconds``; responde a uma requisição de cada conexão."""
        wasyncore.loop(0 if self.ready else seconds, use_poll=True, map=self.map, count=1)
        channels = [channel for channel in self.ready if channel.connected]
        self.ready = []
        self.started = time.monotonic()
        with self.visits.together(sum(is_visit(channel.requests[0]) for channel in channels)):
            for channel in channels:
                if self.deadline and len(channel.requests) == 1:
                    channel.requests[0].headers["CONNECTION"] = "close"  # o waitress obedece
                channel.service()
                channel.handle_write()  # já, e em um pacote só: send_bytes é maior que a resposta
        if self.lines:
            logging.info("\n".join(self.lines))
            self.lines.clear()

    def answer(self, environ: WSGIEnvironment, start_response: StartResponse) -> list[bytes]:
        """Chama ``app`` e põe uma linha no log, menos para um /health que deu certo.

        Common Log Format (manual do Apache, mod_log_config) e os ms desde o começo da rodada.
        """
        status, body = "500", [b""]

        def start(line: str, *rest: Any) -> Any:
            nonlocal status
            status = line.partition(" ")[0]
            return start_response(line, *rest)

        try:
            body = list(self.app(environ, start))
            return body
        finally:
            if status != "200" or environ["PATH_INFO"] != "/health":
                self.lines.append(self.line(environ, status, sum(map(len, body))))

    def line(self, environ: WSGIEnvironment, status: str, size: int) -> str:
        host, now = environ["REMOTE_ADDR"], time.strftime("%d/%b/%Y:%H:%M:%S %z")
        request = "{REQUEST_METHOD} {REQUEST_URI} {SERVER_PROTOCOL}".format_map(environ)
        request = request.encode("unicode_escape").decode().replace('"', '\\"')  # uma linha só
        ms = (time.monotonic() - self.started) * 1000
        return f'{host} - - [{now}] "{request}" {status} {size or "-"} {ms:.1f} ms'


def is_visit(request: Any) -> bool:
    """Diz se ``app`` vai ver GET /: o waitress junta as barras do começo."""
    return not request.error and request.command == "GET" and not request.path.strip("/")


class Output:
    """A saída padrão, sem buffer; se ela foi fechada ou o disco encheu, o texto se perde."""

    def write(self, text: str) -> None:
        with suppress(OSError, AttributeError):  # sys.stdout é None se já começou fechada
            os.write(sys.stdout.fileno(), text.encode(errors="backslashreplace"))
