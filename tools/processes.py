"""Processes that end with the program that started them, whatever ends that."""

import atexit
import json
import shutil
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from tools.signals import signals_held

STOP_SECONDS = 10  # for a process to end in good order, before it is killed
CLOCK_SECONDS = 2  # by which two readings of one start time may differ


def write_private(path: Path, text: str) -> None:
    """Make ``path`` a file with ``text`` that others can't read: whole, or not at all."""
    new = path.with_name(path.name + ".new")
    new.unlink(missing_ok=True)
    new.touch(0o600, exist_ok=False)
    new.write_text(text, encoding="utf-8")
    new.replace(path)


def send(process: psutil.Process, number: int) -> None:
    """Send a signal to a process and its descendants, in whatever groups they are."""
    processes = [process]
    with suppress(psutil.NoSuchProcess):  # also a zombie, on macOS
        processes = [*process.children(recursive=True), process]
    for each in processes:
        with suppress(psutil.NoSuchProcess):
            each.send_signal(number)


def is_alive(process: psutil.Process) -> bool:
    """Tell whether a process still does something; its parent may leave it a zombie for long."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def wait_for_end(process: psutil.Process, seconds: float) -> bool:
    """Wait so long for another program's child to end; return whether it has."""
    end = time.monotonic() + seconds
    while is_alive(process) and time.monotonic() < end:
        time.sleep(0.02)
    return not is_alive(process)


class Record:
    """What a program has started in ``folder``, in a file: the next one ends what that left."""

    def __init__(self, path: Path, folder: Path) -> None:
        self.path, self.folder = path, folder
        self.processes: list[dict[str, Any]] = []
        self.temporary = ""  # a folder that goes when the processes have ended

    def write(self) -> None:
        """Put into the file what is known by now."""
        facts = {"folder": str(self.folder), "temporary": self.temporary}
        write_private(self.path, json.dumps({**facts, "processes": self.processes}))

    def add(self, pid: int, command: list[str]) -> None:
        """Note a process that has just been started."""
        started = psutil.Process(pid).create_time()
        after_boot = started - psutil.boot_time()
        self.processes.append(
            {"pid": pid, "started": started, "after_boot": after_boot, "command": command}
        )
        self.write()

    def end_leftovers(self) -> None:
        """End what the last program noted and left, the last started first; then forget it.

        A number may be another process's by now, and the file of another folder, if it was copied.
        """
        try:
            facts = json.loads(self.path.read_text(encoding="utf-8"))
            if facts["folder"] == str(self.folder):
                for noted in reversed(facts["processes"]):
                    end_if_same(**noted)
                if facts["temporary"]:
                    shutil.rmtree(facts["temporary"], ignore_errors=True)
        except (OSError, ValueError, LookupError, TypeError):
            pass  # there is no such file, or it is none of ours
        self.write()


def started_then(process: psutil.Process, started: float, after_boot: float) -> bool:
    """Tell whether a process was started at this time, or so many seconds after the machine.

    When the clock is set, one of the two moves: the time on Linux, on macOS the seconds.
    """
    time_of_start = process.create_time()
    seconds = time_of_start - psutil.boot_time()
    difference = min(abs(time_of_start - started), abs(seconds - after_boot))
    return bool(difference <= CLOCK_SECONDS)


def end_if_same(pid: int, started: float, after_boot: float, command: list[str]) -> None:
    """End a process if its start time and its arguments, with their folders, are these."""
    try:
        process = psutil.Process(pid)
        if not started_then(process, started, after_boot):
            return
        if process.cmdline()[1:] != command[1:]:  # macOS puts another path to Python before them
            return
        send(process, signal.SIGCONT)
        process.send_signal(signal.SIGINT)  # with which all that is noted ends in good order
        if not wait_for_end(process, STOP_SECONDS):
            send(process, signal.SIGKILL)
            wait_for_end(process, STOP_SECONDS)
    except psutil.Error:
        pass  # it has ended, or it is somebody else's


class Process:
    """A program, with ``options`` as for Popen, that is killed when this one exits.

    ``record`` is where it is noted for the case that this one is killed.
    """

    stop_signal = signal.SIGTERM

    def __init__(self, command: list[str], record: Record | None = None, **options: Any) -> None:
        self.command, self.record, self.options = command, record, options
        self.process: subprocess.Popen[bytes] | None = None
        atexit.register(self.kill)

    def launch(self, **streams: Any) -> None:
        """Start it, in a session of its own: Ctrl-C is for this program, which ends it in time."""
        options = {**self.options, **streams, "start_new_session": True}
        with signals_held():  # or it could be running, and nobody know of it
            self.process = subprocess.Popen(self.command, **options)
            if self.record:
                self.record.add(self.process.pid, self.command)

    def is_running(self) -> bool:
        """Tell whether it has been started and has not ended."""
        return self.process is not None and self.process.poll() is None

    def wait(self, seconds: float | None = None) -> int | None:
        """Return its exit status, negative for a signal's; None if it is still running then."""
        if not self.process:
            return None
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(seconds)
        return self.process.returncode

    def signal(self, number: int) -> None:
        """Send it a signal, and its children."""
        if self.process and self.is_running():
            send(psutil.Process(self.process.pid), number)

    def stop(self) -> bool:
        """End it in good order, frozen or not; return whether that took less than STOP_SECONDS.

        If not, it is killed.
        """
        if self.process and self.is_running():
            self.signal(signal.SIGCONT)
            self.process.send_signal(self.stop_signal)
            if self.wait(STOP_SECONDS) is None:
                self.kill()
                return False
        return True

    def kill(self) -> None:
        """End it as a crash would."""
        if self.process:
            self.signal(signal.SIGKILL)
            self.wait(STOP_SECONDS)
