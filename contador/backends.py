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
RETRY_PAUSE = 0.5  # segundos entre uma tentativa que falhou e a próxima

# O código que o servidor dá ao erro (no Postgres, o SQLSTATE: apêndice A do manual). Com um destes,
# ele não vai nos atender agora.
REASONS_BY_CODE = {
    "28P01": "senha recusada",
    "3D000": "banco inexistente",
    "57P03": "o Postgres ainda não está pronto",
    "NOAUTH": "senha recusada",
    "WRONGPASS": "senha recusada",
    "LOADING": "o Redis ainda está carregando os dados",
    "MISCONF": "o Redis não consegue gravar em disco",
    "READONLY": "este Redis é só de leitura",
    "OOM": "memória do Redis esgotada",
}
# A classe da exceção, ou de uma das que a causaram.
REASONS_BY_CLASS = {
    "gaierror": "host não encontrado",
    "ConnectionRefusedError": "conexão recusada",
    "ConnectionResetError": "conexão interrompida",
    "TimeoutError": "tempo esgotado",
}
# O que o redis-py e o pg8000 dizem quando a conexão é fechada no meio de uma resposta.
CLOSED_MESSAGES = ("Connection closed by server.", "network error")


class BackendError(Exception):
    """O motivo de uma falha: o texto é o que a pessoa lê, e ``status``, o código HTTP."""

    status = 500
    template = "{who}: {reason}"

    def __init__(self, who: str, reason: str) -> None:
        super().__init__(self.template.format(who=who, reason=reason))
        self.reason = reason


class Unavailable(BackendError):
    """O servidor não respondeu, ou não pode atender ninguém agora."""

    status = 503
    template = "{who}: indisponível ({reason})"


class Rejected(BackendError):
    """O servidor está bem, mas recusou este comando; ``reason`` é o que ele disse."""


def code_and_message(error: BaseException) -> tuple[str, str]:
    """Devolve o código que o servidor deu ao erro e a primeira linha da mensagem."""
    message = str(error)
    code = message.partition(" ")[0]  # o redis-py deixa ali o que não conhece, como MISCONF
    if isinstance(error, pg8000.native.DatabaseError):
        code, message = error.args[0]["C"], error.args[0]["M"]  # manual do PostgreSQL, 54.8
    elif isinstance(error, redis.RedisError) and error.status_code not in (None, "ERR"):
        code = error.status_code
        message = f"{code} {message}"  # o redis-py tira o código da mensagem
    return code, message.partition("\n")[0]


def reason_for(error: BaseException) -> str:
    """Devolve o motivo de um erro: a nossa tradução ou, se não houver, a mensagem da causa."""
    while True:
        code, message = code_and_message(error)
        class_name = type(error).__name__
        reason = REASONS_BY_CODE.get(code) or REASONS_BY_CLASS.get(class_name)
        if reason or not error.__context__:
            break
        error = error.__context__
    if message in CLOSED_MESSAGES:  # só agora: uma causa, como TimeoutError, diz mais
        reason = "conexão interrompida"
    return reason or message or class_name


class Backend:
    """Um servidor e a conexão com ele, usada por uma thread de cada vez."""

    def __init__(self, name: str, host: str, retry_timeout: float) -> None:
        self.name, self.host = name, host
        self.retry_timeout = retry_timeout  # segundos de espera, se já estava fora do ar
        self.lock = threading.Lock()  # outro servidor WSGI pode ter threads
        self.connection: Any = None  # preenchida pela thread que conecta, a qualquer momento
        self.reason = ""  # por que está fora do ar; vazio enquanto responde
        self.attempt: threading.Thread | None = None  # a última tentativa de conectar
        self.attempt_error: Exception = TimeoutError()  # o dela, depois que ela falha
        self.next_attempt = 0.0  # não antes deste time.monotonic()

    def connect(self) -> Any:
        """Devolve uma conexão nova, em que o servidor já respondeu; lança qualquer exceção."""
        raise NotImplementedError

    def check(self, connection: Any) -> None:
        """Lança TimeoutError se o servidor travou; outra exceção se a conexão não serve mais."""
        raise NotImplementedError

    def connected(self) -> Any:
        """Devolve a conexão; abre outra, se preciso; lança Unavailable se não conseguir a tempo."""
        if self.connection:
            try:
                self.check(self.connection)
            except TimeoutError as error:  # outra conexão só esperaria de novo
                raise self.mark_down(error) from error
            except Exception:  # fechada enquanto ninguém perguntava: a próxima pode servir
                self.close()
        is_trying = self.attempt is not None and self.attempt.is_alive()
        may_try = not is_trying and time.monotonic() >= self.next_attempt
        if not self.connection and may_try:
            # Em outra thread: procurar o nome de um contêiner parado pode demorar muito. A conexão
            # que chega depois do limite fica para a próxima pergunta.
            self.attempt = threading.Thread(target=self.try_to_connect, daemon=True)
            self.attempt.start()
            self.attempt.join(self.retry_timeout if self.reason else TIMEOUT)
        if not self.connection:
            raise self.mark_down(self.attempt_error)
        return self.connection

    def try_to_connect(self) -> None:
        try:
            self.connection = self.connect()
            self.attempt_error = TimeoutError()  # o da próxima, enquanto ela não acaba
        except Exception as error:  # quem atende no endereço pode nem ser um Redis ou um Postgres
            self.attempt_error = error
            self.next_attempt = time.monotonic() + RETRY_PAUSE

    def close(self) -> None:
        """Fecha a conexão, se houver uma; a próxima pergunta abre outra."""
        with suppress(Exception):  # fechar uma conexão quebrada também falha
            self.connection.close()
        self.connection = None

    def mark_up(self) -> None:
        if self.reason:
            logging.info("%s: conectado de novo", self.name)
        self.reason = ""

    def mark_down(self, error: Exception) -> Unavailable:
        """Fecha a conexão e devolve a exceção a lançar; só avisa no log se antes respondia."""
        self.close()
        unavailable = Unavailable(self.name, reason_for(error))
        if not self.reason:
            logging.info("%s", unavailable)
        self.reason = unavailable.reason
        return unavailable


class Redis(Backend):
    """O Redis; ``options`` são de ``settings.redis_options()``."""

    def __init__(self, options: dict[str, Any]) -> None:
        host = options.get("path") or options.get("host") or "localhost"
        super().__init__("Redis", host, retry_timeout=0.05)
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
            except redis.ResponseError as error:
                code, message = code_and_message(error)
                if code in REASONS_BY_CODE:  # ele não vai atender ninguém agora
                    raise self.mark_down(error) from error
                self.mark_up()
                raise Rejected(self.name, message) from error
            except (redis.ConnectionError, redis.TimeoutError) as error:
                raise self.mark_down(error) from error
            except Exception:  # um erro de quem chamou, ou uma resposta que não se entende
                self.close()
                raise
            self.mark_up()
            return answer

    def connect(self) -> redis.Redis:
        pool = redis.ConnectionPool(**self.options)
        # Conecta já, e o Redis responde a um HELLO: um servidor congelado só aceitaria a conexão.
        client = redis.Redis(connection_pool=pool, single_connection_client=True)
        client.auto_close_connection_pool = True  # close() fecha também a conexão
        return client

    def check(self, connection: redis.Redis) -> None:
        # Não há pergunta pendente: se há o que ler, é o fim da conexão ou um dado inesperado.
        if connection.connection and connection.connection.can_read():
            raise ConnectionError


class Postgres(Backend):
    """O Postgres; ``options`` são de ``settings.postgres_options()``."""

    def __init__(self, options: dict[str, Any]) -> None:
        super().__init__("Postgres", options["host"], retry_timeout=0.15)  # a senha e o TLS demoram
        self.options = options | {"timeout": TIMEOUT}

    def run(self, sql: str, **values: Any) -> Any:
        """Roda SQL, com ``nome`` em ``:nome``; devolve as linhas; lança Unavailable ou Rejected."""
        with self.lock:
            connection = self.connected()
            self.mark_up()  # ele acabou de responder a check()
            try:
                return connection.run(sql, **values)
            except Exception as error:
                self.close()  # senão, depois de um BEGIN, recusaria os comandos das outras rotas
                if isinstance(error, pg8000.native.DatabaseError):
                    raise Rejected(self.name, code_and_message(error)[1]) from error
                if isinstance(error, OSError) or str(error) in CLOSED_MESSAGES:
                    raise self.mark_down(error) from error
                raise

    def problem(self) -> Unavailable | None:
        """Pergunta ao Postgres se ele responde; devolve o erro, se houver."""
        with self.lock:
            try:
                self.connected()
            except Unavailable as error:
                return error
            self.mark_up()
            return None

    def connect(self) -> pg8000.native.Connection:
        connection = pg8000.native.Connection(**self.options)
        try:
            self.check(connection)  # um intermediário, como o PgBouncer, aceita o login sozinho
        except Exception:
            connection.close()
            raise
        return connection

    def check(self, connection: pg8000.native.Connection) -> None:
        connection.run("")  # a pergunta mais barata (manual do PostgreSQL, 54.2.2)
