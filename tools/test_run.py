"""What ``make run`` promises, as a person would try it: at a real terminal, with real servers."""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import unittest
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from tools import harness
from tools.servers import HERE, Postgres, free_port, listens

SECONDS = 60  # for what should come about much sooner, on the slowest machine
DEEP = "Área de Trabalho/" + "uma pasta dentro de outra/" * 5 + "contador"  # over 120 characters
CTRL_C = b"\x03"
TERMINAL = [sys.executable, "-c", "import pty, sys; pty.spawn(sys.argv[1:])"]
MAKE_RUN = ["make", "-o", ".venv/.run", "run"]  # -o: it must not make anew what the tests run in
eventually = partial(harness.eventually, seconds=SECONDS)


class TestRun(unittest.TestCase):
    def setUp(self) -> None:
        self.base = Path(tempfile.mkdtemp(prefix="contador-")).resolve()
        self.base.chmod(0o711)  # for Postgres, which root runs as nobody
        copy = self.base / DEEP
        shutil.copytree(HERE, copy, ignore=shutil.ignore_patterns(".*", "__pycache__"))
        (copy / ".venv").symlink_to(sys.prefix)
        self.port = free_port()
        (copy.parent / "redis.py").write_text("raise ImportError")  # a person's own
        environment = os.environ | {"PORT": str(self.port), "TMPDIR": str(self.base)}
        environment["PYTHONPATH"] = str(copy.parent)
        self.options: dict[str, Any] = {"cwd": copy, "env": environment}

    def tearDown(self) -> None:
        for process in self.running():
            with suppress(psutil.NoSuchProcess):
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
        self.terminal = subprocess.Popen(
            TERMINAL + MAKE_RUN, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, **self.options
        )
        self.addCleanup(self.terminal.communicate, timeout=SECONDS)

    def start_again(self, port: str = "0") -> str:
        """Start it where it should not; return what it prints, and its exit status."""
        command = ["env", "-uPYTHONPATH", f"PORT={port}", sys.executable, "-m", "tools.run"]
        done = subprocess.run(command, capture_output=True, timeout=SECONDS, **self.options)
        return f"{done.stderr.decode()}{done.returncode}"

    def kill(self, option: str) -> None:
        """Type the command that a second start tells, with an option."""
        where, numbers = self.start_again().removesuffix(")\n1").split(" (para encerrar: kill ")
        place = f"http://127.0.0.1:{self.port}/"
        self.assertEqual(where, f"O contador desta pasta já está rodando em {place}")
        subprocess.run(["kill", option, *numbers.split()], check=True, timeout=SECONDS)

    def check_visit(self, number: int) -> None:
        eventually(lambda: listens(self.port))
        with socket.create_connection(("127.0.0.1", self.port), timeout=5) as visitor:
            visitor.sendall(b"GET / HTTP/1.0\r\n\r\n")
            self.assertIn(f"\nContador: {number}\nPostgres: conectado\n", visitor.makefile().read())

    def test_it_ends_in_good_order_even_in_its_first_start_and_counts_on(self) -> None:
        self.make_run()
        eventually(lambda: [*self.base.rglob("data.new")])
        self.terminal.communicate(CTRL_C, timeout=SECONDS)
        self.wait_for_end()
        for number, way in enumerate(("Ctrl+C", "SIGTERM", "closed window"), 1):
            self.make_run()
            self.check_visit(number)
            if way == "Ctrl+C":
                self.terminal.communicate(CTRL_C, timeout=SECONDS)
            elif way == "SIGTERM":
                self.kill("-TERM")
            else:
                self.terminal.kill()
            self.wait_for_end()
            self.assertEqual(len([*self.base.iterdir()]), 1)  # no temporary folder

    def test_a_killed_launcher_leaves_what_a_second_start_says_how_to_end(self) -> None:
        self.make_run()
        self.check_visit(1)
        self.kill("-KILL")
        self.check_visit(2)
        self.kill("-TERM")
        self.wait_for_end()
        self.make_run()
        self.check_visit(3)

    def test_a_port_that_is_taken_or_none_is_told_in_a_line(self) -> None:
        with socket.create_server(("127.0.0.1", self.port)):
            told = self.start_again(str(self.port))
            self.assertRegex(told, r"\AA porta (\d+) não .*PORT=(?!\1)\d+\n1\Z")
        for port in ("x", "-1", "65536"):
            self.assertRegex(self.start_again(port), r"\APORT: valor inválido.*\n2\Z")

    def test_make_help_leaves_a_virtual_environment_that_is_not_ours(self) -> None:
        environment = Path(self.options["cwd"], ".venv")
        environment.unlink()
        environment.mkdir()
        subprocess.run(["make", "help"], check=True, stdout=subprocess.DEVNULL, **self.options)
        self.assertTrue(environment.exists())

    def test_a_postmaster_pid_from_before_a_power_cut_is_no_hindrance(self) -> None:
        db = Postgres(self.base / "postgres")
        self.addCleanup(db.stop)
        db.start()
        db.stop()
        other = subprocess.Popen(["sleep", "60"], user=db.options.get("user"), cwd=self.base)
        self.addCleanup(other.wait, SECONDS)
        (db.data / "postmaster.pid").write_text(f"{other.pid}\n")
        db.start()
