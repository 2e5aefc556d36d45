"""Visitas que chegaram juntas são contadas juntas: um INCRBY e uma pergunta ao Postgres."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from contador.backends import BackendError, Postgres, Redis, Rejected


class Visits:
    """Os números das visitas, contadas na chave ``key`` do Redis."""

    def __init__(self, cache: Redis, database: Postgres, key: str) -> None:
        self.cache, self.database, self.key = cache, database, key
        self.lock = threading.Lock()
        self.expected = 0  # visitas desta rodada que ainda não têm número
        self.outcome: int | BackendError | None = None  # o último número delas, ou o erro de todas

    @contextmanager
    def together(self, count: int) -> Iterator[None]:
        """Dentro do bloco, ``count`` visitas chamam ``take()``; a que não chama perde o número."""
        self.expected, self.outcome = count, None
        self.database.answer_for_all = self.database.problem() if count else None
        yield
        self.expected, self.database.answer_for_all = 0, None

    def take(self) -> int:
        """Conta uma visita e devolve o número dela; lança Unavailable ou Rejected."""
        with self.lock:
            if self.expected == 0:  # o servidor não avisou, ou veio uma a mais
                return self.add(1)
            if self.outcome is None:
                try:
                    self.outcome = self.add(self.expected)
                except BackendError as error:
                    self.outcome = error
            self.expected -= 1
            if isinstance(self.outcome, BackendError):
                raise self.outcome
            return self.outcome - self.expected  # 3 visitas, a última é a 12: 10, 11 e 12

    def peek(self) -> int:
        """Devolve o número que a próxima visita teria; lança Unavailable ou Rejected."""
        last = self.add(0)
        if last == 2**63 - 1:  # o Redis conta com 64 bits, um deles para o sinal (manual, INCR)
            raise Rejected(self.cache.name, "o contador chegou ao limite")
        return last + 1

    def problem(self) -> str:
        """Devolve por que uma visita não seria contada agora, ou um texto vazio."""
        try:
            self.peek()
        except BackendError as error:
            return error.reason
        return ""

    def add(self, count: int) -> int:
        return int(self.cache.run("INCRBY", self.key, count))
