"""``make run``: Redis, Postgres and the service without Docker, started and ended together.

What they keep is in ``.dados``, for one launcher at a time. PORT, REDIS_URL and DATABASE_URL are as
for the service; the server that a URL leads to is not started. The service listens on 127.0.0.1.
"""

import fcntl
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import TextIO

import psutil

from contador.settings import address
from tools.servers import HERE, STOP_SECONDS, Postgres, Redis, Server, free_port

DATA = HERE / ".dados"
LOCK = DATA / "lock"  # held until the last process ends that has it open; it tells the address
HAS_TERMINAL = os.isatty(0)
received: list[int] = []  # signals


def must_end() -> bool:
    """Tell whether a signal has come or the terminal was closed: make keeps that SIGHUP."""
    return bool(received) or (HAS_TERMINAL and not os.isatty(0))


def check_free(port: int) -> None:
    """Exit where nothing can listen on ``port``."""
    try:
        socket.create_server(("127.0.0.1", port)).close()
    except PermissionError:
        sys.exit(f"Só o administrador pode usar a porta {port}. Escolha outra: make run PORT=8000")
    except OSError:
        airplay = " (no macOS, o AirPlay a usa)" if port == 5000 else ""
        sys.exit(f"A porta {port} não está livre{airplay}. Escolha outra: make run PORT={port + 1}")


def lock_data(port: int) -> TextIO:
    """Take ``.dados`` for this process and those that inherit the file, or exit: others have it."""
    DATA.mkdir(exist_ok=True)
    lock = LOCK.open("a+")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        text = f"O contador desta pasta já está rodando em {lock.read()}"
        lock.close()
        numbers = " ".join(map(str, holders()))
        sys.exit(f"{text} (para encerrar: kill {numbers})")
    lock.truncate(0)
    lock.write(f"http://127.0.0.1:{port}/")
    lock.flush()
    return lock


def holders() -> list[int]:
    """Return the numbers of the processes that hold the lock, without those that they started."""
    parents: dict[int, int] = {}
    for process in psutil.process_iter():
        with suppress(psutil.Error):  # it has ended, or it is somebody else's
            if str(LOCK) in [file.path for file in process.open_files()]:
                parents[process.pid] = process.ppid()
    return [number for number, parent in parents.items() if parent not in parents]


def serve(port: int, lock: int, temporary: Path) -> int:
    """Run the three until the service ends or a signal comes; return the exit status."""
    environment = os.environ | {"HOST": "127.0.0.1", "PORT": str(port)}
    # Root's Postgres runs as nobody, who may not be able to enter here. It keeps nothing for us.
    folder = temporary if os.geteuid() == 0 else DATA / "postgres"
    servers: dict[str, Server] = {
        "REDIS_URL": Redis(DATA / "redis", pass_fds=(lock,)),
        "DATABASE_URL": Postgres(folder, pass_fds=(lock,)),
    }
    try:
        for name, server in servers.items():
            if not os.environ.get(name) and not must_end():
                server.start()
                environment[name] = server.url
        return 0 if must_end() else run_service(environment, lock)
    finally:
        for server in servers.values():
            server.stop()


def run_service(environment: dict[str, str], lock: int) -> int:
    """Run the service; return its exit status if it ends by itself, or else 0."""
    service = subprocess.Popen(
        [sys.executable, HERE / "server.py"],
        env=environment,
        pass_fds=[lock],
        start_new_session=True,  # Ctrl+C is for this process
    )
    while not must_end():
        if service.poll() is not None:
            return service.returncode
        time.sleep(0.1)
    service.terminate()
    try:
        service.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        service.kill()
    return 0


def main() -> int:
    """Run the service; return its exit status."""
    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(each) != signal.SIG_IGN:  # as nohup sets SIGHUP
            signal.signal(each, lambda number, frame: received.append(number))
    port = int(address()[1]) or free_port()
    try:
        with lock_data(port) as lock, tempfile.TemporaryDirectory(prefix="contador-") as temporary:
            check_free(port)
            return serve(port, lock.fileno(), Path(temporary))
    except PermissionError as error:
        text = f"Sem permissão para usar {error.filename}."
        sys.exit(f"{text} Se foi criado com sudo make run: sudo chown -R $USER .dados .venv")
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    sys.exit(main())
