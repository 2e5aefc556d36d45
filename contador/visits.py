"""Visitas que chegaram juntas são contadas juntas: um INCRBY e uma pergunta ao Postgres."""

from typing import NamedTuple

from contador.backends import BackendError, Postgres, Redis, Rejected, Unavailable

MAXIMUM = 2**63 - 1  # o Redis conta com 64 bits, um deles para o sinal (manual, INCR)
# O começo da mensagem do Redis quando a culpa é do valor guardado.
VALUE_FAULTS = ("WRONGTYPE", "value is not an integer", "increment or decrement would overflow")


class BadValue(BackendError):
    """O Redis está bem, mas não dá para somar ao valor que ele guarda."""

    def __init__(self) -> None:
        reason = "o valor guardado não é um número ou chegou ao limite"
        super().__init__("Contador", f"{reason}; use /reset, que o apaga e volta a 0")


class Visit(NamedTuple):
    """O número da visita, ou o erro que a impediu; e o erro do Postgres (None: ele responde)."""

    result: int | BackendError
    postgres_error: Unavailable | None


class Visits:
    """As visitas, contadas na chave ``key`` do Redis."""

    def __init__(self, cache: Redis, database: Postgres, key: str) -> None:
        self.cache, self.database, self.key = cache, database, key
        self.expected = 0  # anunciadas e ainda não contadas
        self.undelivered: list[Visit] = []  # contadas junto com outra, e ainda não entregues

    def expect(self, count: int) -> None:
        """Anuncia ``count`` visitas juntas; descarta os números que ninguém veio buscar."""
        self.expected, self.undelivered = count, []

    def take(self) -> Visit:
        """Conta uma visita; se ela é a primeira das anunciadas, conta todas."""
        if self.undelivered:
            return self.undelivered.pop(0)
        count = max(self.expected, 1)  # 0: ninguém a anunciou, como em outro servidor WSGI
        self.expected = 0
        last, postgres_error = self.add_and_check(count)
        if isinstance(last, BackendError):
            counted = [Visit(last, postgres_error)] * count
        else:
            numbers = range(last - count + 1, last + 1)
            counted = [Visit(number, postgres_error) for number in numbers]
        self.undelivered = counted[1:]
        return counted[0]

    def peek(self) -> Visit:
        """Devolve a próxima visita, sem contá-la."""
        # Somar 0 falha quando uma visita falharia; um GET não, em um Redis só de leitura.
        last, postgres_error = self.add_and_check(0)
        if isinstance(last, BackendError):
            return Visit(last, postgres_error)
        return Visit(BadValue() if last == MAXIMUM else last + 1, postgres_error)

    def add_and_check(self, count: int) -> tuple[int | BackendError, Unavailable | None]:
        """Soma ``count``; devolve a soma, ou por que não deu, e o erro do Postgres, se houver."""
        postgres_error = self.database.problem()
        try:
            return self.add(count), postgres_error
        except Rejected as error:  # o comando está certo: se a culpa não é do valor, é do Redis
            return Unavailable(self.cache.name, error.reason), postgres_error
        except BackendError as error:
            return error, postgres_error

    def add(self, count: int) -> int:
        """Soma ``count`` e devolve a soma; lança BadValue, Rejected ou Unavailable."""
        try:
            return int(self.cache.run("INCRBY", self.key, count))
        except Rejected as error:
            if error.reason.startswith(VALUE_FAULTS):
                raise BadValue from error
            raise
