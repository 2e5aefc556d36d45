"""Run the console blocks of the documents, in order, and compare what they print: the lessons are tests, and a demo.

    python3 tools/documents.py test [local|docker|swarm]    fails where a command fails, or prints something else
    python3 tools/documents.py demo [1|2]                   shows a lesson's commands, and runs each on Enter

What stands in the documents: see reading.py.

Each document runs in a copy of the project, in a Compose project and on a port of its own, and has to leave the copy as
it was, and no container, network or volume. Known tools for this, byexample and tesh, pass over a command that fails.
"""

import difflib
import hashlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]
from tools.reading import DOCUMENTS, HERE, Document, Edit, Prose, Step, dead_links, wrong_blocks  # noqa: E402

PROJECT, SHOWN_PROJECT, STACK, SHOWN_PORT = "contador-aula", "contador", "visitas", "5000"
NAMES = re.compile(rf"\b{SHOWN_PROJECT}(?=[-_](web|cache|db|app-network|front|default)\b)")
SECONDS = 180  # for one command
QUIET_SECONDS = 3  # without more output, before ^C
STOP_SECONDS = 15
UNTOUCHED = {
    ".git",
    ".venv",
    ".dados",
    ".env",
    ".hypothesis",
    ".mypy_cache",
    ".ruff_cache",
    "__pycache__",
}
SECOND = "docker --context maquina2"
# With 0 and 1 for what ends well on Ctrl-C; else the shell's status, or the signal's.
INTERRUPTED = {0, 1, 130, -signal.SIGINT}


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
    if (
        step.hidden or step.edit or step.interrupt == len(expected)
    ):  # what comes after the end is not shown
        expected = [*expected, "..."]
    if status in ({0} if step.interrupt is None else INTERRUPTED) and matches(expected, printed):
        return ""
    diff = difflib.unified_diff(expected, printed.splitlines(), step.where, "impresso", lineterm="")
    return "\n".join([f"{step.where}: {step.command}", f"(código {status})", *diff])


class Console:
    """Commands run in a folder as if typed by somebody with the port and the project that the documents show."""

    def __init__(self, folder: Path, home: Path, port: str) -> None:
        self.folder, self.port = folder, port
        self.processes: list[subprocess.Popen[bytes]] = []
        unset = (
            "POSTGRES_PASSWORD",
            "REDIS_URL",
            "DATABASE_URL",
            "MAKEFLAGS",
            "MAKELEVEL",
            "MFLAGS",
        )
        self.environment = {name: value for name, value in os.environ.items() if name not in unset}
        (home / ".curlrc").write_text(
            "silent\nshow-error\n"
        )  # as on a terminal: without a progress meter
        self.environment |= {
            "CURL_HOME": str(home),
            "COMPOSE_PROJECT_NAME": PROJECT,
            "IMAGE": f"{PROJECT}-web",
            "PORT": port,
            "PYTHONDONTWRITEBYTECODE": "1",
        }

    def command(self, shown: str) -> list[str]:
        """Return what to execute for a command of a document."""
        return [
            "bash",
            "-c",
            NAMES.sub(PROJECT, shown.replace(f"localhost:{SHOWN_PORT}", f"localhost:{self.port}")),
        ]

    def printed(self, output: Path) -> str:
        """Return what a command has printed, with the documents' names, without spaces at the ends of lines."""
        text = output.read_text(encoding="utf-8", errors="replace")
        text = text.replace(PROJECT, SHOWN_PROJECT).replace(self.port, SHOWN_PORT)
        return "".join(line.rstrip() + "\n" for line in text.splitlines())

    def run(self, step: Step) -> tuple[int, str]:
        """Return the exit status of a step and what it prints; 0 and nothing for one in the background."""
        if step.edit:
            return self.do(step.edit)
        # To a file: what a command leaves running would keep a pipe open.
        with tempfile.NamedTemporaryFile() as output:
            process = subprocess.Popen(
                self.command(step.command),
                cwd=self.folder,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            self.processes.append(process)
            if step.hidden == "background":
                return 0, ""
            try:
                if step.interrupt is not None:
                    self.wait_for(
                        [*step.expected[: step.interrupt], "..."], Path(output.name), process
                    )
                    os.killpg(process.pid, signal.SIGINT)
                process.wait(SECONDS)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            except ProcessLookupError:  # it ended before Ctrl-C
                return process.wait() or 255, self.printed(Path(output.name))
            return process.returncode, self.printed(Path(output.name))

    def do(self, edit: Edit) -> tuple[int, str]:
        """Change a file of the copy; return 0 and nothing, or 1 and why it could not be."""
        file = self.folder / edit.file
        try:
            original = (HERE if edit.action == "restore" else self.folder) / edit.file
            text = original.read_text(encoding="utf-8")
            file.write_text(
                text if edit.action == "restore" else edit.edited(text), encoding="utf-8"
            )
        except (OSError, ValueError) as error:
            return 1, f"{error}\n"
        return 0, ""

    def wait_for(self, expected: list[str], output: Path, process: subprocess.Popen[bytes]) -> None:
        """Wait until a process has printed what is expected and then nothing for a while."""
        end = time.monotonic() + SECONDS
        size, since = 0, time.monotonic()
        while process.poll() is None and time.monotonic() < end:
            if output.stat().st_size != size:
                size, since = output.stat().st_size, time.monotonic()
            elif (
                size
                and time.monotonic() > since + QUIET_SECONDS
                and matches(expected, self.printed(output))
            ):
                return
            time.sleep(0.1)

    def silently(self, command: str) -> None:
        """Run a command of our own: whatever it prints, and whether it fails, does not matter."""
        self.run(Step("", "", "", command, hidden="run"))

    def end_background(self) -> None:
        """End what commands left running: in good order if that does not take too long."""
        end = time.monotonic() + STOP_SECONDS
        for number in (signal.SIGTERM, signal.SIGKILL):
            for process in self.processes:
                try:
                    os.killpg(process.pid, number)
                    while number == signal.SIGTERM and time.monotonic() < end:
                        process.poll()
                        os.killpg(process.pid, 0)
                        time.sleep(0.02)
                except (
                    ProcessLookupError,
                    PermissionError,
                ):  # the group is gone (on macOS: a zombie)
                    process.poll()


def output_of(command: str) -> str:
    """Return what a command prints on standard output, or nothing where it fails."""
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else ""


def machines(kind: str) -> list[str]:
    """Return the Docker command of each machine that a kind works on."""
    if kind == "swarm":
        there = os.environ.get("MAQUINA1") and output_of(f"{SECOND} info --format '{{{{.ID}}}}'")
        return ["docker", SECOND] if there else ["docker"]
    return ["docker"] if kind == "docker" else []


def left(kind: str) -> set[str]:
    """Return the names of the containers, networks and volumes of a kind's that exist, and of all nameless volumes."""
    label = (
        f"com.docker.stack.namespace={STACK}"
        if kind == "swarm"
        else f"com.docker.compose.project={PROJECT}"
    )
    listings = (
        f"ps -a --filter label={label} --format '{{{{.Names}}}}'",
        f"network ls --filter label={label} --format '{{{{.Name}}}}'",
        f"volume ls -q --filter label={label}",
        "volume ls -q --filter label=com.docker.volume.anonymous",
    )
    return {
        each
        for docker in machines(kind)
        for listing in listings
        for each in output_of(f"{docker} {listing}").split()
    }


def clean_up(kind: str, shown: Console) -> None:
    """Remove what the commands of a kind make, whatever became of them."""
    if kind == "swarm":
        shown.silently(f"docker stack rm {STACK}")
        for docker in reversed(machines(kind)):
            volumes = f"{docker} volume ls -q --filter label=com.docker.stack.namespace={STACK}"
            shown.silently(f"{docker} swarm leave --force")
            shown.silently(
                f'while [ "$({volumes})" ]; do {docker} volume rm $({volumes}) || sleep 1; done'
            )
        for docker in machines(kind)[1:]:
            shown.silently(f"{docker} image rm {PROJECT}-web")
    if kind != "local":
        shown.silently("docker compose down -v --remove-orphans --rmi local")
        shown.silently(f"docker image prune -f --filter label=com.docker.compose.project={PROJECT}")


def contents(folder: Path) -> dict[str, str]:
    """Return the files in a folder with what they hold: a link's is where it points."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file() and path.relative_to(folder).parts[0] not in {".git", ".venv", ".dados"}
    }


@contextmanager
def console(kind: str, port: str) -> Iterator[Console]:
    """Yield a console in a copy of the project, a repository of its own, and leave nothing behind."""
    with tempfile.TemporaryDirectory(prefix="contador-") as temporary:
        os.chmod(temporary, 0o711)
        folder = Path(temporary, "contador")
        shutil.copytree(HERE, folder, ignore=shutil.ignore_patterns(*UNTOUCHED, "*.pyc"))
        if (HERE / ".venv").exists():
            (folder / ".venv").symlink_to(HERE / ".venv")
        shown = Console(folder, Path(temporary), port)
        try:
            yield shown
        finally:
            shown.end_background()
            clean_up(kind, shown)


def free_port() -> str:
    """Return a TCP port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def check_document(document: Document, kind: str) -> str:
    """Run a document's steps of a kind; return what is wrong with the first that fails, or with what they leave."""
    kinds = {kind, "swarm2"} if len(machines(kind)) > 1 else {kind}
    todo = [step for step in document.steps if step.kind in kinds]
    if not todo:
        return ""
    port = SHOWN_PORT if document.port_as_written else free_port()
    with console(kind, port) as shown:
        before, others = contents(shown.folder), left(kind)
        for step in todo:
            wrong = difference(step, *shown.run(step))
            if wrong:
                return wrong
        shown.end_background()
        after = contents(shown.folder)
        changed = [
            path
            for path in sorted(before.keys() | after.keys())
            if before.get(path) != after.get(path)
        ]
        remains = [*sorted(left(kind) - others), *changed]
    return f"{document.name}: não ficou como antes: {', '.join(remains)}" if remains else ""


def check(kind: str) -> str:
    """Run all documents' steps of a kind; return what is wrong in the first that fails, or nothing."""
    return next(filter(None, (check_document(Document(path), kind) for path in DOCUMENTS)), "")


def ignore(number: int, frame: FrameType | None) -> None:
    """Leave Ctrl-C to the command: it would not get it either if the signal were ignored."""


def demonstrate(lesson: str) -> None:
    """Show the commands of a lesson one by one, with the text above; run each when Enter is pressed."""
    document = HERE / "aula/README.md"
    signal.signal(signal.SIGINT, ignore)  # but at the prompt
    with console("docker", os.environ.get("PORT") or SHOWN_PORT) as shown:
        clean_up("docker", shown)
        print(f"A aula usa uma cópia do projeto, em {shown.folder}")
        print(f"Um segundo terminal vê os mesmos contêineres: docker compose -p {PROJECT} ps")
        print("Cada Enter executa o próximo comando. Ctrl+C, antes do Enter, encerra a aula.")
        try:
            for item in Document(document).items:
                if not item.section.startswith(f"## Aula {lesson}"):
                    continue
                if isinstance(item, Prose):
                    print(item.text)
                    continue
                step = item
                if step.hidden or step.edit:
                    shown.run(step)
                    continue
                command = shown.command(step.command)
                print(
                    "$",
                    command[-1],
                    "(Ctrl+C encerra) " * (step.interrupt is not None),
                    end="",
                    flush=True,
                )
                signal.signal(signal.SIGINT, signal.default_int_handler)
                if not sys.stdin.readline():
                    break
                signal.signal(signal.SIGINT, ignore)
                subprocess.run(command, cwd=shown.folder, env=shown.environment)
        except KeyboardInterrupt:
            signal.signal(signal.SIGINT, ignore)
        print("\nFim: removendo os contêineres, os volumes e a imagem desta aula.")


def main(mode: str = "", what: str = "") -> int:
    """Test or demonstrate; return the exit status."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    kind = "docker" if mode == "demo" else what or "docker"
    if mode not in ("test", "demo") or kind not in ("local", "docker", "swarm"):
        print(__doc__)
        return 2
    for docker in machines(kind):
        state = output_of(f"{docker} info --format '{{{{.Swarm.LocalNodeState}}}}'")
        in_use = state != "inactive" or any(each.startswith(STACK) for each in left(kind))
        if not state or (kind == "swarm" and in_use):  # it would be removed at the end
            print(
                f"{docker}: não responde, já faz parte de um Swarm ou tem volumes de um. Nada foi executado."
            )
            return 2
    if mode == "demo":
        demonstrate(what or "1")
        return 0
    try:
        documents = [Document(path) for path in DOCUMENTS]
    except ValueError as error:
        print(error)
        return 1
    faults = [fault for each in documents for fault in wrong_blocks(each) + dead_links(each.path)]
    wrong = "\n".join(faults) or check(kind)
    count = sum(step.kind.startswith(kind) for document in documents for step in document.steps)
    print(wrong or f"{count} comandos mostram o que está escrito")
    return 1 if wrong or not count else 0


if __name__ == "__main__":
    try:
        sys.exit(main(*sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
