"""A copy of the project in which the documents' commands run, and of which nothing stays."""

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
    sys.exit("É preciso Python 3.11 ou mais novo; se houver outro: make PYTHON=python3.12 ...")

HERE = Path(__file__).resolve().parent.parent
NOT_COPIED = shutil.ignore_patterns(".git", ".venv", ".dados", ".env", "__pycache__", ".*_cache")
# What a reader would not have set.
UNSET = re.compile("COMPOSE_|POSTGRES_|REDIS_URL|DATABASE_URL|(HOST|PORT|IMAGE)$|MAKE|MFLAGS")
ENVIRONMENT = {name: value for name, value in os.environ.items() if not UNSET.match(name)}
COMMAND = re.compile(r"^\$ (.+(?:\n> .*)*)\n((?:(?!\$ ).*\n)*)", re.M)
ENDING = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
SECONDS = 180  # for one command
# The kinds of commands that a run of one kind can run here.
KINDS = {"local": ["local"], "docker": ["docker"], "swarm": ["swarm"]}
MACHINES = "docker"
if "MAQUINA1" in os.environ:
    KINDS["swarm"].append("swarm2")
    MACHINES = "'docker --context maquina2' docker"
PROJECT = "label=com.docker.compose.project=contador"
PROJECT_EXISTS = f"docker ps -aq --filter {PROJECT}; docker volume ls -q --filter {PROJECT}"
STACK = "label=com.docker.stack.namespace=visitas"
STACK_VOLUMES = f"$docker volume ls -q --filter {STACK}"
SWARM_EXISTS = f"""for docker in {MACHINES}; do
    $docker info -f '{{{{.Swarm.LocalNodeState}}}}' | grep -v inactive
    {STACK_VOLUMES} || exit
done"""
DOWN = f"""docker compose -p contador down -v --remove-orphans
docker image prune -af --filter {PROJECT}"""
LEAVE_SWARM = f"""docker stack rm visitas
for docker in {MACHINES}; do
    $docker swarm leave --force
    while [ "$($docker ps -aq --filter {STACK}; {STACK_VOLUMES})" ]; do
        $docker volume rm $({STACK_VOLUMES})
        sleep 1
    done
    $docker image prune -af --filter {PROJECT}
done
{DOWN}"""
CLEAN_UP = {"local": "", "docker": DOWN, "swarm": LEAVE_SWARM}


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
    """Exit, in one line, where commands of a kind can't run, or the clean-up would do harm."""
    with suppress(OSError):
        socket.create_connection(("localhost", 5000), timeout=1).close()
        sys.exit("A porta 5000 já está em uso: encerre o programa que a usa")
    if kind != "local":
        expect_nothing(
            PROJECT_EXISTS, "O projeto contador já existe: docker compose -p contador down -v"
        )
    if kind == "swarm":
        expect_nothing(SWARM_EXISTS, "O Docker já faz parte de um Swarm, ou tem volumes de um")


def expect_nothing(command: str, reason: str) -> None:
    """Exit, in one line, with a reason if a command prints something, or with why it fails."""
    done = shell(command)
    if done.returncode:
        sys.exit(done.stderr.splitlines()[-1])
    if done.stdout:
        sys.exit(reason)


class Copy:
    """A copy of the project below a temporary folder, and a process group for its commands.

    A command finds the name of the file ``block`` in the variable BLOCK.
    """

    def __init__(self, temporary: Path) -> None:
        self.folder, self.block = temporary / "contador", temporary / "block"
        shutil.copytree(HERE, self.folder, ignore=NOT_COPIED)
        if (HERE / ".venv").exists():
            (self.folder / ".venv").symlink_to(HERE / ".venv")
        # As at a terminal: no progress meter.
        (temporary / ".curlrc").write_text("silent\nshow-error\n")
        places = {"CURL_HOME": str(temporary), "BLOCK": str(self.block)}
        self.environment = {**ENVIRONMENT, **places}
        # It leads the group, which is ours until it is reaped, and ends when its input does: all
        # commands inherit the other end of that.
        reading, self.held = os.pipe()
        leader = ["bash", "-c", "trap '' TERM; cat"]
        self.leader = subprocess.Popen(leader, stdin=reading, process_group=0)
        os.close(reading)

    def run(self, command: str) -> "tuple[int, str]":
        """Run a command with no input; return its status and what it prints.

        Raises subprocess.TimeoutExpired after 180 s; the command ends with the copy.
        """
        process = subprocess.Popen(
            ["bash", "-c", command],
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


@contextmanager
def project_copy(kind: str) -> Iterator[Copy]:
    """Yield a copy for commands of a kind; at the end, also on a signal, remove what they made.

    Signals raise KeyboardInterrupt, those that come during the clean-up after it.
    """
    for number in ENDING:
        signal.signal(number, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix="contador-") as temporary:
        copy = Copy(Path(temporary))
        try:
            yield copy
        finally:
            signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
            copy.end_commands()
            shell(CLEAN_UP[kind])
            signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)
