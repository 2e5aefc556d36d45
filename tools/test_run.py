"""What ``make run`` promises, as a person would try it: at a real terminal, with real servers."""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import unittest
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import psutil

from tools.servers import HERE, Postgres, free_port

SECONDS = 60  # for what should come about much sooner, on the slowest machine
DEEP = "Área de Trabalho/" + "uma pasta dentro de outra/" * 5 + "contador"  # over 120 characters
TERMINAL = [sys.executable, "-c", "import pty, sys; pty.spawn(sys.argv[1:])"]
MAKE_RUN = ["make", "-o", ".venv/.run", "run"]  # -o: it must not make anew what the tests run in


def eventually(check: Callable[[], object]) -> None:
    end = time.monotonic() + SECONDS
    while not check():
        if time.monotonic() > end:
            raise AssertionError(f"it did not come about within {SECONDS} seconds")
        time.sleep(0.02)


class TestRun(unittest.TestCase):
    """In a new copy of the project."""

    def setUp(self) -> None:
        self.base = Path(tempfile.mkdtemp(prefix="contador-")).resolve()
        self.base.chmod(0o711)  # for Postgres, which root runs as nobody
        folder = self.base / DEEP
        shutil.copytree(HERE, folder, ignore=shutil.ignore_patterns(".*", "__pycache__"))
        (folder / ".venv").symlink_to(sys.prefix)
        self.port = free_port()
        environment = os.environ | {"PORT": str(self.port), "TMPDIR": str(self.base)}
        self.options: dict[str, Any] = {"cwd": folder, "env": environment}

    def tearDown(self) -> None:
        for process in self.running():
            process.kill()
        self.wait_for_end()
        shutil.rmtree(self.base)

    def running(self) -> list[psutil.Process]:
        """Return the processes that stand in a folder of the copy, as all that it starts do."""
        processes = psutil.process_iter(["cwd"])
        return [each for each in processes if str(self.base) in (each.info["cwd"] or "")]

    def wait_for_end(self) -> None:
        eventually(lambda: not self.running())

    def make_run(self) -> None:
        """Type it at a new terminal."""
        self.terminal = subprocess.Popen(
            TERMINAL + MAKE_RUN, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, **self.options
        )
        self.addCleanup(self.terminal.communicate, timeout=SECONDS)

    def press_ctrl_c(self) -> None:
        assert self.terminal.stdin
        self.terminal.stdin.write(b"\x03")
        self.terminal.stdin.flush()

    def launcher(self) -> psutil.Process:
        (make,) = psutil.Process(self.terminal.pid).children()
        return make.children()[0]

    def start_again(self, port: str = "0") -> str:
        """Start it where it should not; return what it prints, and its exit status."""
        command = ["env", f"PORT={port}", sys.executable, "-m", "tools.run"]
        done = subprocess.run(command, capture_output=True, timeout=SECONDS, **self.options)
        return f"{done.stderr.decode()}{done.returncode}"

    def visit(self) -> str:
        """Visit the service when it is there; return its answer."""
        with socket.socket() as probe:
            eventually(lambda: probe.connect_ex(("127.0.0.1", self.port)) == 0)
        with urlopen(f"http://127.0.0.1:{self.port}/", timeout=5) as answer:
            return str(answer.read().decode())

    def test_it_ends_in_good_order_and_counts_on(self) -> None:
        ends: list[Callable[[], None]] = [
            self.press_ctrl_c,
            lambda: self.launcher().terminate(),
            lambda: self.terminal.kill(),  # as a window is closed
        ]
        for count, end in enumerate(ends, 1):
            self.make_run()
            self.assertEqual(self.visit(), f"Contador: {count}\nPostgres: conectado\n")
            end()
            self.wait_for_end()
            self.assertEqual(len([*self.base.iterdir()]), 1)  # no temporary folder

    def test_ctrl_c_in_the_first_start_spoils_nothing(self) -> None:
        self.make_run()
        eventually(lambda: [*self.base.rglob("data.new")])
        self.press_ctrl_c()
        self.wait_for_end()
        self.make_run()
        self.assertEqual(self.visit(), "Contador: 1\nPostgres: conectado\n")

    def test_a_second_start_says_what_runs_and_how_to_end_it(self) -> None:
        self.make_run()
        self.assertIn("Contador: 1\n", self.visit())
        launcher = self.launcher()
        running = f"O contador desta pasta já roda em http://127.0.0.1:{self.port}/"
        message = f"{running} (para encerrar: kill {launcher.pid})\n1"
        self.assertEqual(self.start_again(), message)
        launcher.kill()
        launcher.wait(SECONDS)
        message = self.start_again()
        self.assertIn(running, message)
        command = message.split("encerrar: ")[1].split(")")[0]
        subprocess.run(command.split(), check=True, timeout=SECONDS)
        self.wait_for_end()
        self.make_run()
        self.assertIn("Contador: 2\n", self.visit())

    def test_a_port_that_is_taken_or_none_is_told_in_a_line(self) -> None:
        with socket.create_server(("127.0.0.1", self.port)):
            self.assertRegex(
                self.start_again(str(self.port)), r"\AA porta .* não está livre.*\n1\Z"
            )
        for port in ("x", "-1", "65536"):
            message = "PORT: valor inválido; esperado: um número de 0 a 65535\n2"
            self.assertEqual(self.start_again(port), message)

    def test_a_postmaster_pid_from_before_a_power_cut_is_no_hindrance(self) -> None:
        db = Postgres(self.base / "postgres")
        self.addCleanup(db.stop)
        db.start()
        db.stop()
        other = subprocess.Popen(["sleep", "60"], user=db.options.get("user"), cwd=self.base)
        self.addCleanup(other.wait, SECONDS)
        (db.data / "postmaster.pid").write_text(f"{other.pid}\n")
        db.start()
