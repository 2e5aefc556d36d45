"""Run the commands of the documents in a copy of the project, and compare what they print.

Each document gets a copy of the project, a Compose project and a port of its own, and has to leave
the copy as it was, and no container, network or volume. Relatives of this, for other documents than
lessons that build on each other: byexample, scrut and tesh.
"""

import difflib
import fcntl
import functools
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path
from types import FrameType
from typing import IO

from tools.reading import DOCUMENTS, HERE, SHOWN_PORT, Document, Edit, Step, faults

PROJECT, SHOWN_PROJECT, STACK = "contador-aula", "contador", "visitas"
NAMES = re.compile(rf"\b{SHOWN_PROJECT}(?=[-_](web|cache|db|app-network|front|default)\b)")
SECONDS = 180  # for one command
DOCKER_SECONDS = 30  # for an answer from Docker, before and after
QUIET_SECONDS = 3  # without more output, before ^C
STOP_SECONDS = 15
SECOND = "docker --context maquina2"
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# With 0 and 1 for what ends well on Ctrl-C; else the shell's status, or the signal's.
INTERRUPTED = {0, 1, 130, -signal.SIGINT}
# What the reader of a document would not have set.
UNSET = ("POSTGRES_PASSWORD", "POSTGRES_PASSWORD_FILE", "REDIS_URL", "DATABASE_URL", "COMPOSE_FILE")
UNSET_BY_MAKE = ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")
NO_SECOND = "não há o contexto maquina2, ou a variável MAQUINA1"


class CannotRunError(Exception):
    """Nothing can be run here; the text says why, in one line."""


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
    before = {each: signal.signal(each, lambda number, _: came.append(number)) for each in ENDING}
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


def difference(step: Step, status: int, printed: str) -> str:
    """Return what is wrong with what a step printed, as a diff, or nothing."""
    expected = step.expected
    if step.hidden or step.interrupt == len(expected):  # what comes after the end is not shown
        expected = [*expected, "..."]
    good = {0} if step.interrupt is None else INTERRUPTED
    if status in good and matches(expected, printed):
        return ""
    shown = printed.splitlines()
    diff = difflib.unified_diff(expected, shown, step.where, "impresso", lineterm="")
    what = step.edit.told() if step.edit else step.command
    return "\n".join([f"{step.where}: {what}", f"(código {status})", *diff])


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
        if self.process:
            self.process.wait()
        self.leader.communicate()
        os.close(self.last_ended)


class Console:
    """Commands run in a copy of the project, ``folder``, as if typed by a reader.

    ``port`` stands for the one that the documents show, and the Compose project for theirs.
    """

    def __init__(self, home: Path, port: str) -> None:
        self.folder, self.port = home / SHOWN_PROJECT, port
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
        text = printed.replace(PROJECT, SHOWN_PROJECT).replace(self.port, SHOWN_PORT)
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
        with tempfile.NamedTemporaryFile() as output:
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
                process.wait()
            return process.returncode, text_of(output.name)

    def wait_for(self, expected: list[str], output: str, process: subprocess.Popen[bytes]) -> None:
        """Wait until a process has printed what is expected and then nothing for a while."""
        end = time.monotonic() + SECONDS
        size, since, done = 0, time.monotonic(), False
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
    with tempfile.TemporaryDirectory(prefix="contador-") as temporary:
        os.chmod(temporary, 0o711)
        shown = Console(Path(temporary), port)
        try:
            yield shown
        finally:
            with uninterrupted():
                shown.end_commands()
                clean_up(kind, shown)
                shown.end_commands()


def text_of(file: str) -> str:
    """Return the text in a file, whatever its bytes are."""
    return Path(file).read_text(encoding="utf-8", errors="replace")


def copy_project(folder: Path) -> dict[str, bytes]:
    """Copy the project, without what git ignores, and return its files; link its packages."""
    start = {name: (HERE / name).read_bytes() for name in project_files()}
    for name, data in start.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
        shutil.copystat(HERE / name, folder / name)  # make looks at the times
    if (HERE / ".venv").exists():
        (folder / ".venv").symlink_to(HERE / ".venv")
    return start


def git(*arguments: str, given: str = "") -> list[str] | None:
    """Return the names that git prints about the project, or None where it knows nothing of it."""
    if not (HERE / ".git").exists() or not shutil.which("git"):
        return None
    command = ["git", "-C", str(HERE), *arguments, "-z"]
    done = subprocess.run(command, input=given, capture_output=True, text=True, timeout=60)
    failed = done.stderr or done.returncode > 1  # check-ignore: 1 if none is ignored
    return None if failed else [name for name in done.stdout.split("\0") if name]


def project_files() -> list[str]:
    """Return the names of the project's files, from its folder, without what git ignores."""
    names = git("ls-files", "--cached", "--others", "--exclude-standard")
    if names is None:
        return list(unpacked_files())
    return [name for name in names if (HERE / name).is_file()]


def unpacked_files() -> Iterator[str]:
    """Yield the project's files where there is no git, or no repository."""
    for root, folders, names in os.walk(HERE):
        inside = Path(root).relative_to(HERE)
        folders[:] = [name for name in folders if not names_ignored((inside / name).as_posix())]
        yield from (
            (inside / name).as_posix()
            for name in names
            if not names_ignored((inside / name).as_posix())
        )


def names_ignored(path: str) -> bool:
    """Tell whether .gitignore names a path or a folder on it, by the simple patterns of ours."""
    lines = (HERE / ".gitignore").read_text(encoding="utf-8").splitlines()
    patterns = [".git", *(line for line in lines if line and not line.startswith("#"))]
    parents = [path, *(each.as_posix() for each in Path(path).parents)]
    return any(
        fnmatch(each if pattern.startswith("/") else Path(each).name, pattern.strip("/"))
        for pattern in patterns
        for each in parents
    )


def without_ignored(names: Iterable[str]) -> list[str]:
    """Return the names without those that git ignores."""
    names = list(names)
    if not names:
        return []
    ignored = git("check-ignore", "--stdin", given="".join(f"{name}\0" for name in names))
    if ignored is None:
        return [name for name in names if not names_ignored(name)]
    return [name for name in names if name not in ignored]


def answer(command: str) -> str:
    """Return what a command of Docker's prints; raise CannotRunError where there is no answer."""
    docker = command.partition(" ")[0] if SECOND not in command else SECOND
    try:
        done = subprocess.run(
            ["bash", "-c", command], capture_output=True, text=True, timeout=DOCKER_SECONDS
        )
    except subprocess.TimeoutExpired:
        raise CannotRunError(f"{docker} não responde há {DOCKER_SECONDS} segundos") from None
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"código {done.returncode}"])[-1]
        raise CannotRunError(f"{docker} não responde: {reason}")
    return done.stdout.strip()


@functools.cache
def second_machine() -> bool:
    """Tell whether there is a second machine for a Swarm."""
    if not os.environ.get("MAQUINA1"):
        return False
    try:
        return answer(f"{SECOND} info --format '{{{{.ID}}}}'") != ""
    except CannotRunError:
        return False


def machines(kind: str) -> list[str]:
    """Return the Docker command of each machine that a kind works on."""
    if kind == "swarm":
        return ["docker", SECOND] if second_machine() else ["docker"]
    return ["docker"] if kind == "docker" else []


def ours(kind: str) -> set[str]:
    """Return the names of the containers, networks and volumes of a kind's that exist."""
    label = "com.docker.stack.namespace" if kind == "swarm" else "com.docker.compose.project"
    label += f"={STACK if kind == 'swarm' else PROJECT}"
    return listed(
        kind,
        f"ps -a --filter label={label} --format '{{{{.Names}}}}'",
        f"network ls --filter label={label} --format '{{{{.Name}}}}'",
        f"volume ls -q --filter label={label}",
    )


def nameless(kind: str) -> set[str]:
    """Return the volumes without a name that exist."""
    return listed(kind, "volume ls -q --filter label=com.docker.volume.anonymous")


def listed(kind: str, *listings: str) -> set[str]:
    """Return the names that Docker lists on all machines of a kind."""
    commands = [f"{docker} {listing}" for docker in machines(kind) for listing in listings]
    return {name for command in commands for name in answer(command).split()}


@contextmanager
def reserved(kind: str) -> Iterator[None]:
    """Keep Docker for one run; raise CannotRunError where what is there would be lost."""
    if kind == "local":
        yield
        return
    with Path(tempfile.gettempdir(), f"{PROJECT}-{os.getuid()}.lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CannotRunError(
                "Já há um make demo, test-docker ou test-swarm em execução neste computador"
            ) from None
        for docker in machines(kind):
            refuse_swarm(docker, kind)
        there = ours("docker")
        if there:
            remove = f"docker compose -p {PROJECT} down -v"
            raise CannotRunError(
                f"O projeto {PROJECT} já existe no Docker; para removê-lo: {remove}"
            )
        yield


def refuse_swarm(docker: str, kind: str) -> None:
    """Raise CannotRunError where a Docker is silent, or has a Swarm, which would be removed."""
    state = answer(f"{docker} info --format '{{{{.Swarm.LocalNodeState}}}}'")
    if kind != "swarm":
        return
    if state != "inactive":
        raise CannotRunError(f"{docker} já faz parte de um Swarm, que seria desfeito no fim")
    there = sorted(ours(kind))
    if there:
        raise CannotRunError(f"{docker} ainda tem o que é de um Swarm anterior: {', '.join(there)}")


def clean_up(kind: str, shown: Console) -> None:
    """Remove what the commands of a kind make, whatever became of them."""
    if kind == "swarm":
        leave_swarm(shown)
    if kind != "local":
        shown.silently("docker compose down -v --remove-orphans --rmi local")
        label = f"label=com.docker.compose.project={PROJECT}"
        shown.silently(f"docker image prune -f --filter {label}")


def leave_swarm(shown: Console) -> None:
    """Take all machines out of the Swarm, with what it made."""
    shown.silently(f"docker stack rm {STACK}")
    for docker in reversed(machines("swarm")):
        volumes = f"{docker} volume ls -q --filter label=com.docker.stack.namespace={STACK}"
        shown.silently(f"{docker} swarm leave --force")
        remove = f"{docker} volume rm $({volumes}) || sleep 1"
        shown.silently(f'while [ "$({volumes})" ]; do {remove}; done')
    for docker in machines("swarm")[1:]:
        shown.silently(f"{docker} image rm {PROJECT}-web")


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


def todo(document: Document, kind: str) -> list[Step]:
    """Return a document's steps of a kind that can be run here."""
    kinds = {kind, "swarm2"} if kind == "swarm" and second_machine() else {kind}
    return [step for step in document.steps if step.kind in kinds]


def check_document(document: Document, kind: str) -> str:
    """Run a document's steps of a kind.

    Return what is wrong with the first that fails, or with what they leave, or nothing.
    """
    steps = todo(document, kind)
    if not steps:
        return ""
    port = SHOWN_PORT if document.port_as_written else free_port()
    with opened(kind, port) as shown:
        others = nameless(kind)
        for step in steps:
            status, printed = shown.do(step)
            wrong = difference(step, status, shown.as_documented(printed))
            if wrong:
                return wrong
        shown.end_commands()
        remains = sorted(ours(kind) | (nameless(kind) - others)) + shown.changed()
    return f"{document.name}: não ficou como antes: {', '.join(remains)}" if remains else ""


def check(documents: list[Document], kind: str) -> str:
    """Run the documents' steps of a kind; return what is wrong with the first that fails.

    Raises CannotRunError where they can't be run here.
    """
    with reserved(kind):
        if any(document.port_as_written and todo(document, kind) for document in documents):
            refuse_taken(SHOWN_PORT)
        return next(filter(None, (check_document(each, kind) for each in documents)), "")


def count(documents: list[Document], kind: str) -> str:
    """Return how many of the documents' commands have been run, in a sentence."""
    run = sum(step.shown for document in documents for step in todo(document, kind))
    second = sum(step.shown and step.kind == "swarm2" for each in documents for step in each.steps)
    if kind == "swarm" and not second_machine():
        return (
            f"{run} comandos mostram o que está escrito; {second} não foram executados: {NO_SECOND}"
        )
    return f"{run} comandos mostram o que está escrito"


def test(kind: str) -> int:
    """Check the documents, and run their commands of a kind; return the exit status."""
    documents = [Document(path) for path in DOCUMENTS]
    wrong = "\n".join(fault for each in documents for fault in faults(each))
    if not any(todo(document, kind) for document in documents):
        wrong = wrong or f"Nenhum comando é do tipo {kind}"
    wrong = wrong or check(documents, kind)
    print(wrong or count(documents, kind))
    return 1 if wrong else 0
