"""A copy of the project in which the documents' commands run, and of which nothing stays."""

import fcntl
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

OLDEST = (3, 11)
if sys.version_info < OLDEST:
    sys.exit("É preciso Python 3.11 ou mais novo; se já tiver um, use make PYTHON=python3.12 ...")

HERE = Path(__file__).resolve().parent.parent
NOT_COPIED = shutil.ignore_patterns(".git", ".venv", ".dados", ".env", "__pycache__", ".*_cache")
# What a reader would not have set.
UNSET = re.compile("COMPOSE_|POSTGRES_|REDIS_URL|DATABASE_URL|(HOST|PORT|IMAGE)$|MAKE|MFLAGS")
ENVIRONMENT = {name: value for name, value in os.environ.items() if not UNSET.match(name)}
# A command after "$ ", and what it prints.
COMMAND = re.compile(r"^\$ (.+)\n((?:(?!\$ ).*\n)*)", re.M)
LOCK = os.open(__file__, os.O_RDONLY)  # one run has it, until it has cleaned up
ENDING = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
SECONDS = 180  # for one command
# For a run of each kind: the kinds of commands that run, and the Dockers where they do.
KINDS = {"local": ["local"], "docker": ["docker"], "swarm": ["swarm"]}
DOCKERS = {"local": [], "docker": ["docker"], "swarm": ["docker"]}
if "MAQUINA1" in os.environ:
    KINDS["swarm"].append("swarm2")
    DOCKERS["swarm"].insert(0, "docker --context maquina2")
PROJECTS = ["contador", "minha-aula"]  # README.md's, and the lessons'
LABEL = "label=com.docker.compose.project"
DOWN = [f"compose -p {name} down -v --remove-orphans" for name in PROJECTS]
# What that leaves, and how to remove it: images, and volumes without a name.
LEFT = {f"image ls -q --no-trunc --filter {LABEL}={name}": "image rm -f" for name in PROJECTS}
LEFT["volume ls -q --filter label=com.docker.volume.anonymous"] = "volume rm"
# What was there before has a second name, in a repository that no command of the documents saves.
KEEP = [f"tag {name}-web antes/{name}-web" for name in PROJECTS]
RESTORE = [f"tag antes/{name}-web {name}-web; $docker rmi antes/{name}-web" for name in PROJECTS]
STACK = "label=com.docker.stack.namespace=visitas"
STACK_VOLUMES = f"volume ls -q --filter {STACK}"
LEAVE_SWARM = f"""swarm leave --force
while [ "$($docker ps -aq --filter {STACK}; $docker {STACK_VOLUMES})" ]; do
    $docker volume rm $($docker {STACK_VOLUMES})
    sleep 1
done"""
CLEAN_UP = {"local": [], "docker": DOWN, "swarm": ["stack rm visitas", LEAVE_SWARM, *DOWN]}


def shell(command: str) -> "subprocess.CompletedProcess[str]":
    """Run a command of our own: out of reach of Ctrl+C, and where Compose finds no file."""
    return subprocess.run(
        ["bash", "-c", command],
        cwd="/",
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        process_group=0,
    )


def refuse(kind: str) -> None:
    """Exit, in one line, where Docker's commands can't run, or the clean-up would do harm."""
    try:
        fcntl.flock(LOCK, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print("Esperando o fim do que já está rodando nesta pasta...", flush=True)
        fcntl.flock(LOCK, fcntl.LOCK_EX)
    for project in PROJECTS:
        its = f"--filter {LABEL}={project}"
        found = lines(f"docker ps -a {its} --format '{{{{.Names}}}}'; docker volume ls -q {its}")
        if found:
            text = f"O Docker já tem {', '.join(found)}, que seriam apagados."
            sys.exit(f"{text} docker compose -p {project} down guarda os dados; down -v os apaga")
    with suppress(OSError):
        socket.create_connection(("localhost", 5000), timeout=1).close()
        sys.exit("A porta 5000 já está em uso: encerre o programa que a usa")
    if kind != "swarm":
        return
    for docker in DOCKERS[kind]:
        state = lines(f"{docker} info -f '{{{{.Swarm.LocalNodeState}}}}'")
        if state != ["inactive"] or lines(f"{docker} {STACK_VOLUMES}"):
            sys.exit("O Docker já faz parte de um Swarm, ou tem volumes de um")


def lines(command: str) -> list[str]:
    """Return the lines that a command prints; exit, in one line, with why it fails."""
    done = shell(command)
    if done.returncode:
        sys.exit(done.stderr.splitlines()[-1])
    return done.stdout.splitlines()


class Copy:
    """A copy of the project; its commands find the name of the file ``block`` in BLOCK."""

    def __init__(self, temporary: Path) -> None:
        self.folder, self.block = temporary / "contador", temporary / "block"
        shutil.copytree(HERE, self.folder, ignore=NOT_COPIED)
        if (HERE / ".venv").exists():
            (self.folder / ".venv").symlink_to(HERE / ".venv")
        (temporary / ".curlrc").write_text("silent\nshow-error\n")  # as at a terminal: no meter
        (temporary / "place").write_text(str(self.folder), encoding="utf-8")
        places = {"CURL_HOME": temporary, "BLOCK": self.block, "PLACE": temporary / "place"}
        self.environment = ENVIRONMENT | {name: str(path) for name, path in places.items()}
        # It leads the group, which is ours until it is reaped, and ends when its input does: all
        # commands inherit the other end of that.
        reading, self.held = os.pipe()
        leader = ["bash", "-c", "trap '' TERM; cat"]
        self.leader = subprocess.Popen(leader, stdin=reading, process_group=0)
        os.close(reading)

    def bash(self, command: str) -> list[str]:
        """Return the arguments that run a command in the folder where the one before it ended."""
        return ["bash", "-c", f"""cd "$(cat "$PLACE")" && trap 'pwd > "$PLACE"' EXIT; {command}"""]

    def run(self, command: str) -> "tuple[int, str]":
        """Run a command with no input; return its status and what it prints.

        Raises subprocess.TimeoutExpired after 180 s; the command ends with the copy.
        """
        process = subprocess.Popen(
            self.bash(command),
            cwd=self.folder,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            pass_fds=[self.held],
            process_group=self.leader.pid,
        )
        printed, _ = process.communicate(timeout=SECONDS)
        return process.returncode, printed

    def end_commands(self) -> None:
        """End what commands left running, in good order if that takes less than 40 s."""
        os.killpg(self.leader.pid, signal.SIGTERM)
        os.close(self.held)
        try:
            self.leader.wait(40)
        except subprocess.TimeoutExpired:
            os.killpg(self.leader.pid, signal.SIGKILL)
            self.leader.wait(SECONDS)


def left(kind: str) -> set[str]:
    """Return the commands that would remove what the clean-up leaves."""
    return {
        f"{docker} {remove} {name}"
        for docker in DOCKERS[kind]
        for ls, remove in LEFT.items()
        for name in lines(f"{docker} {ls}")
    }


def run_each(kind: str, commands: list[str]) -> None:
    """Run commands in each Docker of a kind, whether they succeed or not."""
    for command in commands:
        for docker in DOCKERS[kind]:
            shell(f"docker='{docker}'; $docker {command}")


@contextmanager
def project_copy(kind: str) -> Iterator[Copy]:
    """Yield a copy for commands of a kind; at the end, also on a signal, remove what they made.

    Signals raise KeyboardInterrupt, those that come during the clean-up after it.
    """
    for number in ENDING:
        signal.signal(number, signal.default_int_handler)
    before = left(kind)
    with tempfile.TemporaryDirectory(prefix="contador-") as temporary:
        copy = Copy(Path(temporary))
        try:
            run_each(kind, KEEP)
            yield copy
        finally:
            signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
            copy.end_commands()
            run_each(kind, CLEAN_UP[kind])
            shell("\n".join(left(kind) - before))
            run_each(kind, RESTORE)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)
