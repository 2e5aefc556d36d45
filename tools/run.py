"""``make run``: Redis, Postgres and the service without Docker, started and stopped together.

What they keep is in ``.dados``, one launcher at a time. PORT, REDIS_URL and DATABASE_URL are as for
the service; the server that a URL leads to is not started. The service's host is 127.0.0.1.
"""

import errno
import fcntl
import os
import signal
import socket
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from tools import processes
from tools.processes import Process, Record
from tools.servers import HERE, Postgres, Redis, free_port
from tools.signals import interrupt, signals_held
from tools.temporary import temporary_folder

DATA = HERE / ".dados"
ADDRESS_SECONDS = 0.2  # for one that has just got the lock to put its address there


def say(text: str) -> None:
    """Tell the person at the terminal, if that is still open."""
    with suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def wanted_port() -> int:
    """Return the port to serve on, a free one for 0; raise ValueError where PORT is no port."""
    port = int(os.environ.get("PORT") or "5000")
    if not 0 <= port <= 65535:
        raise ValueError
    return port or free_port()


def check_free(port: int) -> None:
    """Raise RuntimeError where nothing can listen on ``port``."""
    try:
        socket.create_server(("127.0.0.1", port)).close()
    except OSError as error:
        reason = "não está livre (no macOS, o AirPlay usa a 5000)"
        if error.errno != errno.EADDRINUSE:
            reason = f"não pode ser usada ({error.strerror})"
        text = f"A porta {port} {reason}. Escolha outra: make run PORT=8000"
        raise RuntimeError(text) from error


def end_with_terminal() -> None:
    """Take the end of the terminal for a SIGHUP, which make keeps to itself; not under nohup."""
    if os.isatty(0) and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        signal.signal(signal.SIGALRM, look_at_terminal)
        signal.setitimer(signal.ITIMER_REAL, 1, 1)


def look_at_terminal(number: int, frame: FrameType | None) -> None:
    """Handle the alarm: a closed terminal has no attributes any more."""
    try:
        termios.tcgetattr(0)
    except termios.error:
        interrupt(signal.SIGHUP, frame)


@contextmanager
def locked(port: int) -> Iterator[None]:
    """Keep ``.dados`` to this launcher; raise RuntimeError where another has it.

    The kernel drops the lock when this process ends, however: its children don't inherit the file.
    """
    DATA.mkdir(exist_ok=True)
    with (DATA / "lock").open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(ADDRESS_SECONDS)
            lock.seek(0)
            text = f"O contador desta pasta já está em execução, ou iniciando: {lock.read()}"
            raise RuntimeError(text) from None
        lock.truncate(0)
        lock.write(f"http://127.0.0.1:{port}/")
        lock.flush()
        yield


def start(started: list[Process], record: Record, port: int) -> Process:
    """Start all that is needed, noting it in ``started``; return the service."""
    environment = os.environ | {"HOST": "127.0.0.1", "PORT": str(port)}
    if not os.environ.get("REDIS_URL"):
        cache = Redis(DATA / "redis", record=record)
        started.append(cache)
        cache.start()
        environment["REDIS_URL"] = cache.url
    if not os.environ.get("DATABASE_URL"):
        folder = DATA / "postgres"
        if os.geteuid() == 0:  # then Postgres runs as somebody who may not be able to enter here
            folder = Path(record.temporary, "postgres")
        db = Postgres(folder, record=record)
        started.append(db)
        db.start()
        environment["DATABASE_URL"] = db.url
    command = [sys.executable, str(HERE / "server.py")]
    service = Process(command, record, env=environment)
    started.append(service)
    service.launch()
    return service


def serve(port: int) -> int:
    """Run the service until it ends or a signal comes; return its exit status."""
    record = Record(DATA / "processos", HERE)
    record.end_leftovers()
    check_free(port)
    started: list[Process] = []
    service: Process | None = None
    with temporary_folder() as temporary:
        record.temporary = temporary
        try:
            service = start(started, record, port)
            service.wait()
        except KeyboardInterrupt:
            if not service:
                raise
        finally:
            with signals_held():
                stop(started)
    status = service.wait() or 0
    return status if status >= 0 else 128 - status  # as a shell tells a signal


def stop(started: list[Process]) -> None:
    """End processes, the last one first: the service before what it needs."""
    for process in reversed(started):
        if not process.stop():
            name = Path(process.command[0]).name
            say(f"{name} não se encerrou em {processes.STOP_SECONDS} s e foi encerrado à força")


def main() -> int:
    """Run the service; return its exit status, or 1 or 2 if it can't start.

    Raise KeyboardInterrupt where a signal came before it was there.
    """
    end_with_terminal()
    try:
        port = wanted_port()
    except ValueError:
        say("PORT: valor inválido; esperado: um número de 0 a 65535")
        return 2
    try:
        with locked(port):
            return serve(port)
    except RuntimeError as error:
        say(str(error))
    except OSError as error:
        say(f"{error.filename or DATA}: {error.strerror}")
    return 1
