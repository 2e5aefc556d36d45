"""Docker, as the documents' commands use it: is it free for them, and what have they left?"""

import fcntl
import functools
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tools.temporary import place

PROJECT, STACK = "contador-aula", "visitas"
SECOND = "docker --context maquina2"
SECONDS = 30  # for an answer


class CannotRunError(Exception):
    """Nothing can be run here; the text says why, in one line."""


def answer(docker: str, arguments: str) -> str:
    """Return what a command of Docker's prints; raise CannotRunError where there is no answer."""
    command = f"{docker} {arguments}"
    try:
        done = subprocess.run(
            ["bash", "-c", command], capture_output=True, text=True, timeout=SECONDS
        )
    except subprocess.TimeoutExpired:
        raise CannotRunError(f"{docker} não responde há {SECONDS} segundos") from None
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
        return answer(SECOND, "info --format '{{.ID}}'") != ""
    except CannotRunError:
        return False


def machines(kind: str) -> list[str]:
    """Return the Docker command of each machine that a kind works on."""
    if kind == "swarm":
        return ["docker", SECOND] if second_machine() else ["docker"]
    return ["docker"] if kind == "docker" else []


def ours(kind: str) -> set[str]:
    """Return the names of what exists in Docker of the documents' own, on a kind's machines.

    That is the containers, networks and volumes of their Compose project, or of their stack.
    """
    label = "com.docker.stack.namespace" if kind == "swarm" else "com.docker.compose.project"
    label += f"={STACK if kind == 'swarm' else PROJECT}"
    return listed(
        kind,
        f"ps -a --filter label={label} --format '{{{{.Names}}}}'",
        f"network ls --filter label={label} --format '{{{{.Name}}}}'",
        f"volume ls -q --filter label={label}",
    )


def nameless(kind: str) -> set[str]:
    """Return the anonymous volumes that exist on a kind's machines, whoever made them."""
    return listed(kind, "volume ls -q --filter label=com.docker.volume.anonymous")


def listed(kind: str, *listings: str) -> set[str]:
    """Return the names that Docker lists on all machines of a kind."""
    answers = [answer(docker, listing) for docker in machines(kind) for listing in listings]
    return {name for each in answers for name in each.split()}


@contextmanager
def reserved(kind: str) -> Iterator[None]:
    """Keep Docker for one run; raise CannotRunError where what is there would be lost."""
    if kind == "local":
        yield
        return
    with Path(place(), f"{PROJECT}-{os.getuid()}.lock").open("a") as lock:
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
    state = answer(docker, "info --format '{{.Swarm.LocalNodeState}}'")
    if kind != "swarm":
        return
    if state != "inactive":
        raise CannotRunError(f"{docker} já faz parte de um Swarm, que seria desfeito no fim")
    there = sorted(ours(kind))
    if there:
        raise CannotRunError(f"{docker} ainda tem o que é de um Swarm anterior: {', '.join(there)}")


def clean_up(kind: str, run: Callable[[str], None]) -> None:
    """Remove what the commands of a kind make, whatever became of them, by commands for ``run``."""
    if kind == "swarm":
        leave_swarm(run)
    if kind != "local":
        run("docker compose down -v --remove-orphans --rmi local")
        label = f"label=com.docker.compose.project={PROJECT}"
        run(f"docker image prune -f --filter {label}")


def leave_swarm(run: Callable[[str], None]) -> None:
    """Take all machines out of the Swarm, with what it made."""
    run(f"docker stack rm {STACK}")
    for docker in reversed(machines("swarm")):
        volumes = f"{docker} volume ls -q --filter label=com.docker.stack.namespace={STACK}"
        run(f"{docker} swarm leave --force")
        remove = f"{docker} volume rm $({volumes}) || sleep 1"
        run(f'while [ "$({volumes})" ]; do {remove}; done')
    for docker in machines("swarm")[1:]:
        run(f"{docker} image rm {PROJECT}-web")
