"""Run the console blocks of README.md, in order, and compare what they print: the lesson is the test, and the demo.

    python3 readme.py test [KIND]    fails where a command fails, or prints something else than the README says
    python3 readme.py demo [KIND]    shows each command, waits for Enter, and runs it

A block is fenced as ``console``, which is KIND docker, or as ``console local`` (no Docker needed) or ``console swarm``.
In it "$ " starts a command, "> " continues it, and the rest is what it prints: "..." stands for any text in a line or,
alone in one, for any lines. All runs in a copy of this folder, in a Compose project and on a port of its own (demo:
PORT, or 5000), and is cleared away afterwards, whatever happens.
"""

import difflib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent.parent
PROJECT, SHOWN_PROJECT, SHOWN_PORT = "contador-aula", "contador", "5000"
SECONDS = 180  # for one command
CLEAN_UP = {
    "docker": ["docker compose down -v --remove-orphans --rmi local"],
    "local": [],
    "swarm": [
        "docker stack rm visitas",
        "docker swarm leave --force",
        "until docker volume rm visitas_cache-data visitas_db-data; do sleep 1; done",
        "docker compose down -v --rmi local",
    ],
}


class Step(NamedTuple):
    """A command of the README, the heading above it, the number of its line, and what it should print."""

    title: str
    line: int
    command: str
    expected: list[str]


def steps(text: str, kind: str) -> list[Step]:
    """Return the commands in all blocks of a kind."""
    wanted = "```console" if kind == "docker" else f"```console {kind}"
    found: list[Step] = []
    title, fence = "", ""
    for number, line in enumerate(text.splitlines(), 1):
        if line.startswith("```"):
            fence = "" if fence else line
        elif line.startswith("#") and not fence:
            title = line.lstrip("# ")
        elif fence == wanted:
            if line.startswith("$ "):
                found.append(Step(title, number, line[2:], []))
            elif line.startswith("> ") and not found[-1].expected:
                found[-1] = found[-1]._replace(command=f"{found[-1].command}\n{line[2:]}")
            else:
                found[-1].expected.append(line)
    return found


def matches(expected: list[str], printed: str) -> bool:
    """Tell whether ``printed`` is what the README says."""
    lines = ["(.*\n)*" if line == "..." else re.escape(line).replace(r"\.\.\.", ".*") + "\n" for line in expected]
    return re.fullmatch("".join(lines), printed) is not None


class Console:
    """Commands run here as if typed by somebody with the port and the project that the README shows."""

    def __init__(self, folder: Path, port: int) -> None:
        self.folder, self.port, self.groups = folder, str(port), list[int]()
        unset = ("POSTGRES_PASSWORD", "REDIS_URL", "DATABASE_URL", "MAKEFLAGS", "MAKELEVEL", "MFLAGS")
        self.environment = {name: value for name, value in os.environ.items() if name not in unset}
        (folder / ".curlrc").write_text("silent\nshow-error\n")  # as on a terminal: without a progress meter
        self.environment |= {
            "CURL_HOME": str(folder),
            "IMAGE": f"{PROJECT}-web",
            "COMPOSE_PROJECT_NAME": PROJECT,
            "PORT": self.port,
        }

    def run(self, command: str) -> tuple[int, str]:
        """Return the exit status of a command and what it prints, without spaces at the ends of lines."""
        command = command.replace(f"localhost:{SHOWN_PORT}", f"localhost:{self.port}")
        command = re.sub(rf"\b{SHOWN_PROJECT}-web\b", f"{PROJECT}-web", command)
        # To a file: what a command leaves running in the background would keep a pipe open.
        with tempfile.TemporaryFile() as output:
            process = subprocess.Popen(
                ["bash", "-c", command],
                cwd=self.folder,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            self.groups.append(process.pid)
            try:
                process.wait(SECONDS)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            output.seek(0)
            printed = output.read().decode(errors="replace")
        printed = printed.replace(PROJECT, SHOWN_PROJECT).replace(self.port, SHOWN_PORT)
        return process.returncode, "".join(line.rstrip() + "\n" for line in printed.splitlines())

    def end_background(self) -> None:
        """End what commands left running: in good order if that takes no longer than 5 seconds."""
        end = time.monotonic() + 5
        for number in (signal.SIGTERM, signal.SIGKILL):
            for group in self.groups:
                with suppress(ProcessLookupError):
                    os.killpg(group, number)
                    while number == signal.SIGTERM and time.monotonic() < end:
                        os.killpg(group, 0)
                        time.sleep(0.02)


def difference(step: Step, status: int, printed: str) -> str:
    """Return what is wrong with what a step printed, as a diff, or nothing."""
    if status == 0 and matches(step.expected, printed):
        return ""
    diff = difflib.unified_diff(step.expected, printed.splitlines(), "README.md", "impresso", lineterm="")
    return "\n".join([f"README.md:{step.line}: {step.command}", f"(código {status})", *diff])


@contextmanager
def console(kind: str, port: int) -> Iterator[Console]:
    """Yield a console in a copy of this folder, and leave nothing behind."""
    with tempfile.TemporaryDirectory(prefix="contador-") as folder:
        ignored = shutil.ignore_patterns(".git", ".venv", ".dados", ".env", "*cache*")
        shutil.copytree(HERE, folder, ignore=ignored, dirs_exist_ok=True)
        if (HERE / ".venv").exists():
            (Path(folder) / ".venv").symlink_to(HERE / ".venv")
        shown = Console(Path(folder), port)
        try:
            yield shown
        finally:
            shown.end_background()
            for command in CLEAN_UP[kind]:
                shown.run(command)


def check(kind: str) -> str:
    """Run the steps of a kind; return what is wrong with the first that fails, or nothing."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with console(kind, port) as shown:
        for step in steps((HERE / "README.md").read_text(), kind):
            wrong = difference(step, *shown.run(step.command))
            if wrong:
                return wrong
    return ""


def demonstrate(kind: str) -> None:
    """Show the steps of a kind one by one, each when Enter is pressed."""
    with console(kind, int(os.environ.get("PORT") or SHOWN_PORT)) as shown:
        for step in steps((HERE / "README.md").read_text(), kind):
            print(f"\n{step.title}\n$ {step.command}", end=" ", flush=True)
            sys.stdin.readline()
            print(shown.run(step.command)[1], end="", flush=True)


def main(mode: str, kind: str = "docker") -> int:
    """Test or demonstrate; return the exit status."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if kind == "swarm":
        state = subprocess.run(
            ["docker", "info", "--format", "{{.Swarm.LocalNodeState}}"], capture_output=True, text=True
        )
        if state.stdout.strip() != "inactive":  # it would be left at the end
            print("Este Docker não responde, ou já faz parte de um Swarm: nada foi executado")
            return 2
    if mode == "demo":
        demonstrate(kind)
        return 0
    count, wrong = len(steps((HERE / "README.md").read_text(), kind)), check(kind)
    print(wrong or f"README.md: {count} comandos mostram o que está escrito")
    return 1 if wrong or not count else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
