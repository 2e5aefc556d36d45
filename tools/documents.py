"""Run the console blocks of the documents, in order, and compare what they print: the lessons are tests, and a demo.

    python3 tools/documents.py test [local|docker|swarm]    fails where a command fails, or prints something else
    python3 tools/documents.py demo [1|2]                   shows a lesson's commands, and runs each on Enter

A block fenced as ``console`` needs Docker; ``console local`` does not; ``console swarm`` makes a Swarm of this machine,
and ``console swarm2`` adds that of the Docker context ``maquina2``, with the address of this one in ``MAQUINA1``: it is
left out where there is no such context or variable. In a block "$ " starts a command, "> " continues it, and the rest
is what it prints: "..." stands for any text in a line or, alone in one, for any lines. "^C" ends a command that stays
in the foreground, once the lines above it have been printed. Between blocks, out of the reader's sight,
``<!-- run KIND: COMMAND -->`` runs a command, and ``background`` in the place of ``run`` starts one that ends with the
document. ``<!-- from FILE -->`` says where the next block is from.

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
from typing import NamedTuple

HERE = Path(__file__).resolve().parent.parent
DOCUMENTS = [HERE / "README.md", *sorted(HERE.glob("aula/*.md")), *sorted(HERE.glob("swarm/*.md"))]
KINDS = ("local", "docker", "swarm", "swarm2")
PROJECT, SHOWN_PROJECT, STACK, SHOWN_PORT = "contador-aula", "contador", "visitas", "5000"
NAMES = re.compile(rf"\b{SHOWN_PROJECT}(?=[-_](web|cache|db|app-network|front|default)\b)")
SECONDS = 180  # for one command
QUIET_SECONDS = 3  # without more output, before ^C
STOP_SECONDS = 15
UNTOUCHED = {".git", ".venv", ".dados", ".env", ".hypothesis", ".mypy_cache", ".ruff_cache", "__pycache__"}
SECOND = "docker --context maquina2"
# With 0 and 1 for what ends well on Ctrl-C; else the shell's status, or the signal's.
INTERRUPTED = {0, 1, 130, -signal.SIGINT}


class Step(NamedTuple):
    """A command of a document, where it is, what it should print, and the headings and text above its block."""

    where: str
    kind: str
    command: str
    expected: list[str]
    section: str
    title: str
    text: str
    hidden: str  # "run" or "background", for one in a comment
    interrupt: int | None  # after how many expected lines Ctrl-C is pressed


def name(document: Path) -> str:
    """Return a document's name in messages."""
    return document.relative_to(HERE).as_posix()


def steps(document: Path) -> list[Step]:
    """Return a document's commands, of all kinds; raise ValueError for a kind that does not exist."""
    found: list[Step] = []
    section = title = text = fence = ""
    paragraph: list[str] = []
    for number, line in enumerate(document.read_text(encoding="utf-8").splitlines(), 1):
        where = f"{name(document)}:{number}"
        kind = (fence.removeprefix("```console").strip() or "docker") if fence.startswith("```console") else ""
        comment = re.fullmatch(r"<!-- (run|background) (\w+): (.*) -->", line)
        if line.startswith("```"):
            text = "\n".join(paragraph).strip().rpartition("\n\n")[2]
            fence, paragraph = ("" if fence else line), []
        elif comment and not fence:
            hidden, kind, command = comment.groups()
            found.append(Step(where, kind, command, [], section, title, "", hidden, None))
        elif line.startswith("#") and not fence:
            title, paragraph = line, []
            section = line if line.startswith("## ") else section
        elif not fence:
            paragraph += [] if line.startswith("<!--") else [line]
        elif kind and line.startswith("$ "):
            found.append(Step(where, kind, line[2:], [], section, title, text, "", None))
            text = ""
        elif kind and not found[-1].expected and line.startswith("> "):
            found[-1] = found[-1]._replace(command=f"{found[-1].command}\n{line[2:]}")
        elif kind and line == "^C":
            found[-1] = found[-1]._replace(interrupt=len(found[-1].expected))
        elif kind:
            found[-1].expected.append(line)
    for step in found:
        if step.kind not in KINDS:
            raise ValueError(f"{step.where}: {step.kind}?")
    return found


def matches(expected: list[str], printed: str) -> bool:
    """Tell whether ``printed`` is what the document says."""
    lines = ["(.*\n)*" if line == "..." else re.escape(line).replace(r"\.\.\.", ".*") + "\n" for line in expected]
    return re.fullmatch("".join(lines), printed) is not None


def difference(step: Step, status: int, printed: str) -> str:
    """Return what is wrong with what a step printed, as a diff, or nothing."""
    expected = step.expected
    if step.hidden or step.interrupt == len(expected):  # what comes after the end is not shown
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
        unset = ("POSTGRES_PASSWORD", "REDIS_URL", "DATABASE_URL", "MAKEFLAGS", "MAKELEVEL", "MFLAGS")
        self.environment = {name: value for name, value in os.environ.items() if name not in unset}
        (home / ".curlrc").write_text("silent\nshow-error\n")  # as on a terminal: without a progress meter
        self.environment |= {
            "CURL_HOME": str(home),
            "COMPOSE_PROJECT_NAME": PROJECT,
            "IMAGE": f"{PROJECT}-web",
            "PORT": port,
            "PYTHONDONTWRITEBYTECODE": "1",
        }

    def command(self, shown: str) -> list[str]:
        """Return what to execute for a command of a document."""
        return ["bash", "-c", NAMES.sub(PROJECT, shown.replace(f"localhost:{SHOWN_PORT}", f"localhost:{self.port}"))]

    def printed(self, output: Path) -> str:
        """Return what a command has printed, with the documents' names, without spaces at the ends of lines."""
        text = output.read_text(encoding="utf-8", errors="replace")
        text = text.replace(PROJECT, SHOWN_PROJECT).replace(self.port, SHOWN_PORT)
        return "".join(line.rstrip() + "\n" for line in text.splitlines())

    def run(self, step: Step) -> tuple[int, str]:
        """Return the exit status of a step and what it prints; 0 and nothing for one in the background."""
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
                    self.wait_for([*step.expected[: step.interrupt], "..."], Path(output.name), process)
                    os.killpg(process.pid, signal.SIGINT)
                process.wait(SECONDS)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            except ProcessLookupError:  # it ended before Ctrl-C
                return process.wait() or 255, self.printed(Path(output.name))
            return process.returncode, self.printed(Path(output.name))

    def wait_for(self, expected: list[str], output: Path, process: subprocess.Popen[bytes]) -> None:
        """Wait until a process has printed what is expected and then nothing for a while."""
        end = time.monotonic() + SECONDS
        size, since = 0, time.monotonic()
        while process.poll() is None and time.monotonic() < end:
            if output.stat().st_size != size:
                size, since = output.stat().st_size, time.monotonic()
            elif size and time.monotonic() > since + QUIET_SECONDS and matches(expected, self.printed(output)):
                return
            time.sleep(0.1)

    def silently(self, command: str) -> None:
        """Run a command of our own: whatever it prints, and whether it fails, does not matter."""
        self.run(Step("", "", command, [], "", "", "", "run", None))

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
                except (ProcessLookupError, PermissionError):  # the group is gone (on macOS: a zombie)
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
    label = f"com.docker.stack.namespace={STACK}" if kind == "swarm" else f"com.docker.compose.project={PROJECT}"
    listings = (
        f"ps -a --filter label={label} --format '{{{{.Names}}}}'",
        f"network ls --filter label={label} --format '{{{{.Name}}}}'",
        f"volume ls -q --filter label={label}",
        "volume ls -q --filter label=com.docker.volume.anonymous",
    )
    return {
        each for docker in machines(kind) for listing in listings for each in output_of(f"{docker} {listing}").split()
    }


def clean_up(kind: str, shown: Console) -> None:
    """Remove what the commands of a kind make, whatever became of them."""
    if kind == "swarm":
        shown.silently(f"docker stack rm {STACK}")
        for docker in reversed(machines(kind)):
            volumes = f"{docker} volume ls -q --filter label=com.docker.stack.namespace={STACK}"
            shown.silently(f"{docker} swarm leave --force")
            shown.silently(f'while [ "$({volumes})" ]; do {docker} volume rm $({volumes}) || sleep 1; done')
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


def check_document(document: Path, kind: str) -> str:
    """Run a document's steps of a kind; return what is wrong with the first that fails, or with what they leave."""
    kinds = {kind, "swarm2"} if len(machines(kind)) > 1 else {kind}
    todo = [step for step in steps(document) if step.kind in kinds]
    if not todo:
        return ""
    with console(kind, free_port()) as shown:
        before, others = contents(shown.folder), left(kind)
        for step in todo:
            wrong = difference(step, *shown.run(step))
            if wrong:
                return wrong
        shown.end_background()
        after = contents(shown.folder)
        changed = [path for path in sorted(before.keys() | after.keys()) if before.get(path) != after.get(path)]
        remains = [*sorted(left(kind) - others), *changed]
    return f"{name(document)}: não ficou como antes: {', '.join(remains)}" if remains else ""


def check(kind: str) -> str:
    """Run all documents' steps of a kind; return what is wrong in the first that fails, or nothing."""
    return next(filter(None, (check_document(document, kind) for document in DOCUMENTS)), "")


def blocks(document: Path) -> Iterator[tuple[int, str, str]]:
    """Yield the number of the first line, the line above and the text of each fenced block."""
    text = document.read_text(encoding="utf-8")
    for found in re.finditer(r"^(.*)\n```.*\n((?:.*\n)*?)```$", text, re.M):
        yield text.count("\n", 0, found.start(2)) + 1, found[1], found[2]


def pieces() -> list[str]:
    """Return where a block that is said to be from a file is not in it: same lines, however far indented."""
    wrong = []
    for document in DOCUMENTS:
        checked = 0
        for number, above, block in blocks(document):
            source = re.fullmatch(r"<!-- from (\S+) -->", above)
            if source:
                checked += 1
                lines = (HERE / source[1]).read_text(encoding="utf-8").splitlines()
                size = block.count("\n")
                windows = ("\n".join(lines[start : start + size]) + "\n" for start in range(len(lines) - size + 1))
                if textwrap.dedent(block) not in map(textwrap.dedent, windows):
                    wrong.append(f"{name(document)}:{number}: não está em {source[1]}")
        if checked != document.read_text(encoding="utf-8").count("<!-- from "):
            wrong.append(f"{name(document)}: um <!-- from ... --> sem bloco logo abaixo")
    return wrong


def prose(document: Path) -> str:
    """Return a document without its fenced blocks."""
    return re.sub(r"^```.*\n(?:.*\n)*?```$", "", document.read_text(encoding="utf-8"), flags=re.M)


def anchors(document: Path) -> set[str]:
    """Return the names that GitHub gives the headings."""
    headings = re.findall(r"^#+ (.*)$", prose(document), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in headings}


def links() -> list[str]:
    """Return the relative links that lead nowhere."""
    wrong = []
    for document in DOCUMENTS:
        for link in re.findall(r"\]\((?!\w+:)([^)\s]+)\)", prose(document)):
            path, _, anchor = link.partition("#")
            target = (document.parent / path) if path else document
            if not target.exists() or (anchor and anchor not in anchors(target)):
                wrong.append(f"{name(document)}: {link} não existe")
    return wrong


def ignore(number: int, frame: FrameType | None) -> None:
    """Leave Ctrl-C to the command: it would not get it either if the signal were ignored."""


def demonstrate(lesson: str) -> None:
    """Show the commands of a lesson one by one, with the text above; run each when Enter is pressed."""
    document, title = HERE / "aula/README.md", ""
    signal.signal(signal.SIGINT, ignore)  # but at the prompt
    with console("docker", os.environ.get("PORT") or SHOWN_PORT) as shown:
        clean_up("docker", shown)
        print(f"A aula usa uma cópia do projeto, em {shown.folder}")
        print(f"Um segundo terminal vê os mesmos contêineres: docker compose -p {PROJECT} ps")
        print("Cada Enter executa o próximo comando. Ctrl+C, antes do Enter, encerra a aula.")
        try:
            for step in steps(document):
                if step.kind != "docker" or not step.section.startswith(f"## Aula {lesson}"):
                    continue
                if step.title != title:
                    title = step.title
                    print(f"\n{title}")
                if step.hidden:
                    shown.run(step)
                    continue
                print(f"\n{step.text}\n" if step.text else "")
                command = shown.command(step.command)
                print("$", command[-1], "(Ctrl+C encerra) " * (step.interrupt is not None), end="", flush=True)
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
            print(f"{docker}: não responde, já faz parte de um Swarm ou tem volumes de um. Nada foi executado.")
            return 2
    if mode == "demo":
        demonstrate(what or "1")
        return 0
    wrong = "\n".join(pieces() + links()) or check(kind)
    count = sum(step.kind.startswith(kind) for document in DOCUMENTS for step in steps(document))
    print(wrong or f"{count} comandos mostram o que está escrito")
    return 1 if wrong or not count else 0


if __name__ == "__main__":
    try:
        sys.exit(main(*sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
