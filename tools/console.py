"""A console in a copy of the project: commands run as a reader would type them, and end with it."""

import os
import re
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import IO

from tools.engine import PROJECT, CannotRunError, clean_up
from tools.project import copy_project, without_ignored
from tools.reading import SHOWN_PORT, Edit, Step
from tools.temporary import temporary_folder

SHOWN_PROJECT = "contador"
NAMES = re.compile(rf"\b{SHOWN_PROJECT}(?=[-_](web|cache|db|app-network|front|default)\b)")
SECONDS = 180  # for one command
QUIET_SECONDS = 3  # without more output, before ^C
STOP_SECONDS = 40  # make run itself may take 10 for each of its three
GROUP_SECONDS = 10  # for a group that has been killed
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# What the reader of a document would not have set.
UNSET = ("POSTGRES_PASSWORD", "POSTGRES_PASSWORD_FILE", "REDIS_URL", "DATABASE_URL", "COMPOSE_FILE")
UNSET_BY_MAKE = ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")


def end(number: int, frame: FrameType | None) -> None:
    """End the program, once it has cleaned up, with the status that a shell gives a signal."""
    for each in ENDING:
        signal.signal(each, ignore)
    if number == signal.SIGHUP:
        forget_terminal()
    sys.exit(128 + number)


def forget_terminal() -> None:
    """Say nothing any more: nobody listens, and a message that fails would stop the clean-up."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nowhere, stream)


def end_on_signals() -> None:
    """Let the program clean up and end where the terminal, or somebody, asks for its end."""
    for each in ENDING:
        signal.signal(each, end)
    # A command that asks the terminal for something fails: its group is not the terminal's, and
    # would be stopped until it is.
    for each in (signal.SIGTTIN, signal.SIGTTOU):
        signal.signal(each, signal.SIG_IGN)


def ignore(number: int, frame: FrameType | None) -> None:
    """Do nothing on a signal; a command that is started does not inherit this, unlike SIG_IGN."""


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Put off the signals that end the program until the block is done."""
    came: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        came.append(number)

    before = {}
    for each in ENDING:
        before[each] = signal.signal(each, note)
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
    if came:
        signal.raise_signal(came[0])


def matches(expected: list[str], printed: str) -> bool:
    """Tell whether ``printed`` is what the document says."""
    lines = [
        "(.*\n)*" if line == "..." else re.escape(line).replace(r"\.\.\.", ".*") + "\n"
        for line in expected
    ]
    return re.fullmatch("".join(lines), printed) is not None


class Group:
    """A process group, whose number stays ours until ``close``.

    The system may give the number of a group to another once its last process has ended and been
    reaped; a signal would then reach a stranger. So each group is led by a process that only
    waits, and that is reaped after the last signal.
    """

    def __init__(self) -> None:
        self.leader = subprocess.Popen(
            ["cat"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, process_group=0
        )
        self.process: subprocess.Popen[bytes] | None = None
        # All of the group inherit the pipe's other end: it is at its end when the last has ended.
        self.last_ended, self.held = os.pipe()

    def start(
        self, command: list[str], folder: Path, environment: dict[str, str], output: IO[bytes]
    ) -> subprocess.Popen[bytes]:
        """Start a command in the group, in a folder, with no input."""
        try:
            self.process = subprocess.Popen(
                command,
                cwd=folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                pass_fds=[self.held],
                process_group=self.leader.pid,
            )
        finally:
            os.close(self.held)
        return self.process

    def signal(self, number: int) -> None:
        """Send a signal to all processes of the group, the leader too."""
        with suppress(PermissionError):  # macOS: all have ended
            os.killpg(self.leader.pid, number)

    def wait(self, seconds: float) -> None:
        """Wait until all but the leader have ended, or closed the pipe."""
        select.select([self.last_ended], [], [], max(seconds, 0))

    def close(self) -> None:
        """Kill what is left, and give the number back."""
        self.signal(signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):
            if self.process:
                self.process.wait(GROUP_SECONDS)
            self.leader.communicate(timeout=GROUP_SECONDS)
        os.close(self.last_ended)


class Console:
    """Commands run in a copy of the project, ``folder``, as if typed by a reader.

    ``port`` stands for the one that the documents show, and the Compose project for theirs.
    """

    def __init__(self, home: Path, port: str) -> None:
        self.home = home
        self.folder = home / SHOWN_PROJECT
        self.port = port
        self.groups: list[Group] = []
        self.start = copy_project(self.folder)
        # As on a terminal: curl without a progress meter.
        (home / ".curlrc").write_text("silent\nshow-error\n")
        unset = {*UNSET, *UNSET_BY_MAKE}
        self.environment = {name: each for name, each in os.environ.items() if name not in unset}
        self.environment |= {
            "CURL_HOME": str(home),
            "COMPOSE_PROJECT_NAME": PROJECT,
            "IMAGE": f"{PROJECT}-web",
            "PORT": port,
            "PYTHONDONTWRITEBYTECODE": "1",
        }

    def command(self, shown: str) -> list[str]:
        """Return what to execute for a command of a document."""
        here = shown.replace(f"localhost:{SHOWN_PORT}", f"localhost:{self.port}")
        return ["bash", "-c", NAMES.sub(PROJECT, here)]

    def as_documented(self, printed: str) -> str:
        """Return what has been printed as the documents show it: names, and ends of lines."""
        text = printed.replace(PROJECT, SHOWN_PROJECT)
        text = re.sub(rf"\b{self.port}\b", SHOWN_PORT, text)  # not within a larger number
        return "".join(line.rstrip() + "\n" for line in text.splitlines())

    def do(self, step: Step) -> tuple[int, str]:
        """Do what a step says; return the exit status and what is printed."""
        return self.edit(step.edit) if step.edit else self.run(step)

    def edit(self, edit: Edit) -> tuple[int, str]:
        """Change a file; return 0 and nothing, or 1 and why it could not be."""
        file = self.folder / edit.file
        try:
            if edit.action == "restore":
                file.write_bytes(self.start[edit.file])
            else:
                file.write_text(edit.edited(file.read_text(encoding="utf-8")), encoding="utf-8")
        except (OSError, KeyError):
            return 1, f"{edit.file}: não há esse arquivo\n"
        except ValueError as error:
            return 1, f"{error}\n"
        return 0, ""

    def run(self, step: Step) -> tuple[int, str]:
        """Return a command's exit status and what it prints; in the background, 0 and nothing."""
        group = Group()
        self.groups.append(group)
        # To a file: what a command leaves running would keep a pipe open.
        with tempfile.NamedTemporaryFile(dir=self.home) as output:
            command = self.command(step.command)
            process = group.start(command, self.folder, self.environment, output.file)
            if step.hidden == "background":
                return 0, ""
            if step.interrupt is not None:
                self.wait_for([*step.expected[: step.interrupt], "..."], output.name, process)
                if process.poll() is not None:  # it ended before Ctrl-C
                    return process.returncode or 255, text_of(output.name)
                group.signal(signal.SIGINT)
            try:
                process.wait(SECONDS)
            except subprocess.TimeoutExpired:
                group.signal(signal.SIGKILL)
                with suppress(subprocess.TimeoutExpired):
                    process.wait(GROUP_SECONDS)
                return -signal.SIGKILL, text_of(output.name)
            return process.returncode, text_of(output.name)

    def wait_for(self, expected: list[str], output: str, process: subprocess.Popen[bytes]) -> None:
        """Wait until a process has printed what is expected and then nothing for a while."""
        end = time.monotonic() + SECONDS
        size = 0
        since = time.monotonic()
        done = False
        while not done and process.poll() is None and time.monotonic() < end:
            if os.path.getsize(output) != size:
                size, since = os.path.getsize(output), time.monotonic()
            elif size and time.monotonic() > since + QUIET_SECONDS:
                done = matches(expected, self.as_documented(text_of(output)))
            time.sleep(0.1)

    def silently(self, command: str) -> None:
        """Run a command of our own: whatever it prints, and whether it fails, does not matter."""
        self.run(Step("", "", "", command, hidden="run"))

    def end_commands(self) -> None:
        """End what commands left running: in good order if that does not take too long."""
        end = time.monotonic() + STOP_SECONDS
        for group in self.groups:
            group.signal(signal.SIGTERM)
        for group in self.groups:
            group.wait(end - time.monotonic())
            group.close()
        self.groups.clear()

    def changed(self) -> list[str]:
        """Return the names of files that are not as they were, but for what git ignores."""
        paths = [Path(root, name) for root, _, names in os.walk(self.folder) for name in names]
        now = {path.relative_to(self.folder).as_posix(): path for path in paths if path.is_file()}
        return without_ignored(
            name
            for name in sorted(self.start.keys() | now.keys())
            if name not in now or self.start.get(name) != now[name].read_bytes()
        )


@contextmanager
def opened(kind: str, port: str) -> Iterator[Console]:
    """Yield a console in a copy of the project; leave nothing behind."""
    with temporary_folder() as temporary:
        shown = Console(Path(temporary), port)
        try:
            yield shown
        finally:
            with uninterrupted():
                shown.end_commands()
                clean_up(kind, shown.silently)
                shown.end_commands()


def text_of(file: str) -> str:
    """Return the text in a file, whatever its bytes are."""
    return Path(file).read_text(encoding="utf-8", errors="replace")


def free_port() -> str:
    """Return a TCP port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def refuse_taken(port: str) -> None:
    """Raise CannotRunError where something listens on a port."""
    try:
        socket.create_server(("", int(port))).close()
    except OSError:
        raise CannotRunError(f"A porta {port} não está livre") from None
