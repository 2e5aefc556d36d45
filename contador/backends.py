"""Uma conexão mantida com o Redis e outra com o Postgres; nenhuma espera passa do limite."""

import logging
import threading
import time
from contextlib import suppress
from typing import Any

import pg8000.native
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

TIMEOUT = 1.0  # segundos: o limite de cada espera
RETRY_TIMEOUT = 0.1  # segundos de espera por um servidor que já estava fora do ar
RETRY_PAUSE = 0.5  # segundos entre uma tentativa que falhou e a próxima

# A chave é o código que o servidor deu ao erro (no Postgres, o SQLSTATE: apêndice A do manual), a
# mensagem, ou a classe da exceção ou de uma das que a causaram.
REASONS = {
    "gaierror": "host não encontrado",
    "ConnectionRefusedError": "conexão recusada",
    "ConnectionResetError": "conexão interrompida",
    "Connection closed by server.": "conexão interrompida",  # redis-py
    "network error": "conexão interrompida",  # pg8000
    "TimeoutError": "tempo esgotado",
    "AuthenticationError": "senha recusada",
    "28P01": "senha recusada",
    "3D000": "banco inexistente",
    "57P03": "o Postgres ainda não está pronto",
    "LOADING": "o Redis ainda está carregando os dados",
    "MISCONF": "o Redis não grava em disco",
    "READONLY": "este Redis é só de leitura",
    "OOM": "memória do Redis esgotada",
}


class BackendError(Exception):
    """O servidor de nome ``server`` não fez o que foi pedido; ``reason`` diz por quê."""

    def __init__(self, server: str, reason: str) -> None:
        super().__init__(f"{server}: {reason}")
        self.server, self.reason = server, reason


class Unavailable(BackendError):
    """O servidor não respondeu, ou não pode atender ninguém agora."""


class Rejected(BackendError):
    """O servidor está bem, mas recusou este comando."""


def code_and_message(error: BaseException) -> tuple[str, str]:
    if isinstance(error, pg8000.native.DatabaseError):
        return error.args[0]["C"], error.args[0]["M"]  # manual do PostgreSQL, 54.8
    code = error.status_code if isinstance(error, redis.RedisError) else None
    return code or str(error).partition(" ")[0], str(error)


def reason_for(error: BaseException) -> str:
    """Devolve o motivo de um erro: um de REASONS, ou a primeira linha da mensagem da causa."""
    causes = [error]
    while cause := causes[-1].__context__:
        causes.append(cause)
    for sign in [*code_and_message(error), *(type(each).__name__ for each in causes)]:
        if sign in REASONS:
            return REASONS[sign]
    return code_and_message(causes[-1])[1].partition("\n")[0] or type(error).__name__


class Backend:
    """Um servidor e a conexão com ele, usada por uma thread de cada vez."""

    def __init__(self, name: str, host: str) -> None:
        self.name, self.host = name, host
        self.lock = threading.Lock()
        self.connection: Any = None  # preenchida pela thread que conecta, a qualquer momento
        self.reason = ""  # por que está fora do ar; vazio enquanto responde
        self.attempt = threading.Thread()  # a última tentativa de conectar
        self.failure: Exception = TimeoutError()  # por que ela não deu certo
        self.next_attempt = 0.0  # não antes deste time.monotonic()

    def connect(self) -> Any:
        """Devolve uma conexão nova, em que o servidor já respondeu; lança qualquer exceção."""
        raise NotImplementedError

    def is_stale(self) -> bool:
        """Diz se o servidor fechou a conexão enquanto ninguém perguntava."""
        raise NotImplementedError

    def connected(self) -> Any:
        """Devolve a conexão, outra se preciso; lança Unavailable se nenhuma abre a tempo."""
        if self.connection and self.is_stale():
            self.close()
        if not (self.connection or self.attempt.is_alive() or time.monotonic() < self.next_attempt):
            # Em outra thread: procurar o nome de um contêiner parado pode demorar muito. A conexão
            # que chega depois do limite fica para a próxima pergunta.
            self.failure = TimeoutError()
            self.attempt = threading.Thread(target=self.try_to_connect, daemon=True)
            self.attempt.start()
            self.attempt.join(RETRY_TIMEOUT if self.reason else TIMEOUT)
        if not self.connection:
            raise self.mark_down(self.failure)
        return self.connection

    def try_to_connect(self) -> None:
        try:
            self.connection = self.connect()
        except Exception as error:  # quem atende no endereço pode nem ser um Redis ou um Postgres
            self.failure = error
            self.next_attempt = time.monotonic() + RETRY_PAUSE

    def close(self) -> None:
        """Fecha a conexão; a próxima pergunta abre outra."""
        with suppress(Exception):  # fechar uma conexão quebrada também falha
            self.connection.close()
        self.connection = None

    def mark_up(self) -> None:
        if self.reason:
            logging.info("%s: conectado de novo", self.name)
        self.reason = ""

    def mark_down(self, error: Exception) -> Unavailable:
        """Fecha a conexão, avisa no log e devolve a exceção para quem perguntou."""
        self.close()
        reason = reason_for(error)
        if not self.reason:
            logging.info("%s: indisponível (%s)", self.name, reason)
        self.reason = reason
        return Unavailable(self.name, reason)


class Redis(Backend):
    """O Redis; ``options`` são de ``settings.redis_options()``."""

    def __init__(self, options: dict[str, Any]) -> None:
        super().__init__("Redis", options.get("path") or options.get("host") or "localhost")
        self.options = options | {
            "socket_timeout": TIMEOUT,
            "socket_connect_timeout": TIMEOUT,
            "retry": Retry(NoBackoff(), 0),  # repetir um comando contaria uma visita duas vezes
            "decode_responses": True,
        }

    def run(self, *command: str | int) -> Any:
        """Envia um comando, uma vez só, e devolve a resposta; lança Unavailable ou Rejected."""
        with self.lock:
            client = self.connected()
            try:
                answer = client.execute_command(*command)
            except redis.DataError:  # o que não dá para enviar, como None, é erro de quem chamou
                raise
            except redis.RedisError as error:
                is_answer = isinstance(error, redis.ResponseError)
                if is_answer and code_and_message(error)[0] not in REASONS:
                    raise Rejected(self.name, reason_for(error)) from error
                raise self.mark_down(error) from error
            self.mark_up()
            return answer

    def connect(self) -> redis.Redis:
        pool = redis.ConnectionPool(**self.options)
        # Conecta já, e o Redis responde a um HELLO: um servidor congelado só aceitaria a conexão.
        client = redis.Redis(connection_pool=pool, single_connection_client=True)
        client.auto_close_connection_pool = True  # close() fecha também a conexão
        return client

    def is_stale(self) -> bool:
        try:
            return bool(self.connection.connection.can_read())
        except redis.ConnectionError:
            return True


class Postgres(Backend):
    """O Postgres; ``options`` são de ``settings.postgres_options()``."""

    def __init__(self, options: dict[str, Any]) -> None:
        super().__init__("Postgres", options["host"])
        self.answer_for_all: str | None = None  # a de problem(), durante Visits.together()
        self.options = options | {"timeout": TIMEOUT}

    def run(self, sql: str, **values: Any) -> Any:
        """Executa SQL, com ``n`` em ``:n``, e devolve as linhas; lança Unavailable ou Rejected."""
        with self.lock:
            connection = self.connected()
            try:
                rows = connection.run(sql, **values)
            except Exception as error:
                self.close()  # senão, depois de um BEGIN, recusaria também os comandos dos outros
                if isinstance(error, pg8000.native.DatabaseError):
                    raise Rejected(self.name, reason_for(error)) from error
                if isinstance(error, OSError) or str(error) == "network error":
                    raise self.mark_down(error) from error
                raise
            self.mark_up()
            return rows

    def problem(self) -> str:
        """Devolve por que o Postgres não responde, ou um texto vazio."""
        if self.answer_for_all is not None:
            return self.answer_for_all
        with self.lock:
            try:
                self.connected()
            except Unavailable as error:
                return error.reason
            self.mark_up()
            return ""

    def connect(self) -> pg8000.native.Connection:
        return pg8000.native.Connection(**self.options)

    def is_stale(self) -> bool:
        try:
            self.connection.run("")  # a pergunta mais barata (manual do PostgreSQL, 54.2.2)
        except TimeoutError as error:
            raise self.mark_down(error) from error
        except (OSError, pg8000.native.Error):
            return True
        return False
