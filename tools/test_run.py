"""What ``make run`` promises, whatever people do to it: with real processes, in new folders."""

import atexit
import itertools
import json
import os
import pty
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import unittest
from contextlib import suppress
from functools import partial
from pathlib import Path
from select import select
from typing import Any
from unittest.mock import patch
from urllib.request import urlopen

import psutil

from tools import pins, processes, servers
from tools.processes import Process, Record
from tools.servers import HERE, Postgres, Redis, free_port
from tools.signals import end_on_signals
from tools.waiting import eventually

LAUNCHER = [sys.executable, "-m", "tools", "run"]
MAKE = ["make", "-o", ".venv/.run", "run"]  # -o: it must not make anew what the tests run in
PARTS = ("server.py", "contador", "tools", "Makefile", "requirements.txt", "pyproject.toml")
STOPS_SECONDS = 3 * processes.STOP_SECONDS + 5  # for three servers, as slow as they may be
UNSET = ("REDIS_URL", "DATABASE_URL", "MAKEFLAGS", "MAKELEVEL", "MFLAGS")
DEEP = "Área de Trabalho/" + "uma pasta dentro de outra/" * 5 + "copia"  # over 120 characters


def setUpModule() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup, of the tests themselves
    unittest.addModuleCleanup(signal.signal, signal.SIGHUP, before)
    end_on_signals()


def running_in(folder: Path) -> list[psutil.Process]:
    """Return the processes that stand in a folder or have it in their arguments."""
    found = []
    for process in psutil.process_iter():
        words: list[str] = []
        try:
            words += process.cmdline()
            words.append(process.cwd())
        except psutil.Error:
            pass  # it has just ended, or it is somebody else's
        if any(str(folder) in word for word in words):
            found.append(process)
    return found


class Checkout:
    """A copy of the project in a deep new folder, which goes with all that runs in it."""

    def __init__(self, test: unittest.TestCase) -> None:
        self.base = Path(tempfile.mkdtemp(prefix="contador-test-")).resolve()
        test.addCleanup(self.remove)
        atexit.register(self.remove)  # where the tests are interrupted
        self.folder, self.output = self.base / DEEP, self.base / "output"
        for part in PARTS:
            source, copy = HERE / part, self.folder / part
            if source.is_dir():
                shutil.copytree(source, copy, ignore=shutil.ignore_patterns("__pycache__"))
            elif source.exists():
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(source, copy)
        (self.folder / ".venv").symlink_to(sys.prefix)
        self.base.chmod(0o711)  # for Postgres, which root runs as somebody else
        self.temporary = self.base / "temporary"
        self.temporary.mkdir(mode=0o711)
        self.port = free_port()
        self.environment = {name: text for name, text in os.environ.items() if name not in UNSET}
        self.environment |= {"PORT": str(self.port), "TMPDIR": str(self.temporary)}

    def launch(self, command: list[str] = LAUNCHER) -> subprocess.Popen[bytes]:
        """Start a launcher; what it prints is in ``output``."""
        with self.output.open("wb") as output:
            return subprocess.Popen(
                command,
                cwd=self.folder,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )

    def start(self, command: list[str] = LAUNCHER) -> subprocess.Popen[bytes]:
        """Start a launcher; return when the service is there."""
        launcher = self.launch(command)
        eventually(lambda: "Escutando em" in self.printed() or launcher.poll() is not None)
        assert f"Escutando em http://127.0.0.1:{self.port}" in self.printed(), self.printed()
        return launcher

    def printed(self) -> str:
        """Return what the last launcher and its service have printed."""
        return self.output.read_text()

    def visit(self) -> str:
        """Visit the service; return its answer."""
        with urlopen(f"http://127.0.0.1:{self.port}/", timeout=5) as answer:
            return str(answer.read().decode())

    def recorded(self) -> list[dict[str, Any]]:
        """Return what the launcher has noted of the processes that it started."""
        try:
            record = json.loads((self.folder / ".dados/processos").read_text())
        except FileNotFoundError:
            return []
        return list(record["processes"])

    def has_started(self, count: int) -> bool:
        """Tell whether so many processes have been started."""
        return len(self.recorded()) >= count

    def running(self) -> list[psutil.Process]:
        """Return the processes that stand in the folder or have it in their arguments."""
        return running_in(self.base)

    def has_ended(self) -> bool:
        """Tell whether nothing runs in the folder."""
        return not self.running()

    def initializing(self) -> list[Path]:
        """Return the database that is being made, if one is; root has it elsewhere."""
        database = "postgres/data.new/PG_VERSION"
        return [*self.folder.glob(f".dados/{database}"), *self.temporary.glob(f"*/{database}")]

    def remove(self) -> None:
        """End all that runs in the folder, and remove it."""
        atexit.unregister(self.remove)
        for process in self.running():
            with suppress(psutil.NoSuchProcess):
                process.kill()
        eventually(self.has_ended)
        shutil.rmtree(self.base)


class TestRun(unittest.TestCase):
    """Three servers with one command, and the counter kept."""

    def check_end(self, checkout: Checkout, launcher: subprocess.Popen[bytes], status: int) -> None:
        """A launcher has to end with this exit status, and all that it has started with it."""
        self.assertEqual(launcher.wait(STOPS_SECONDS), status, checkout.printed())
        self.assertEqual(checkout.running(), [])
        self.assertNotIn("Traceback", checkout.printed())
        self.assertEqual(list(checkout.temporary.iterdir()), [])

    def test_it_serves_ends_on_each_signal_and_counts_on(self) -> None:
        checkout = Checkout(self)
        checkout.folder.chmod(0o700)  # so that whom root runs Postgres as can't enter
        for count, number in enumerate((signal.SIGHUP, signal.SIGINT, signal.SIGTERM), 1):
            nohup = ["nohup"] if number == signal.SIGTERM else []
            launcher = checkout.start(nohup + LAUNCHER)
            if nohup:
                launcher.send_signal(signal.SIGHUP)
                time.sleep(0.5)  # by when it would have ended
            self.assertEqual(checkout.visit(), f"Contador: {count}\nPostgres: conectado\n")
            launcher.send_signal(number)
            self.check_end(checkout, launcher, 0)

    def test_it_ends_when_the_terminal_is_closed(self) -> None:
        # A shell gets the SIGHUP, or make itself, which passes none on.
        for command in (["sh", "-c", f"{' '.join(MAKE)}; exit"], MAKE):
            with self.subTest(command=command):
                checkout = Checkout(self)
                pid, terminal = pty.fork()
                if pid == 0:
                    try:
                        os.chdir(checkout.folder)
                        os.execvpe(command[0], command, checkout.environment)
                    finally:
                        os._exit(127)
                printed = b""
                while b"Escutando em" not in printed:
                    self.assertTrue(select([terminal], [], [], 30)[0], printed)
                    printed += os.read(terminal, 1000)  # raises OSError when the command has ended
                self.assertEqual(len(checkout.recorded()), 4)  # Redis, initdb, Postgres, service
                checkout.visit()
                os.close(terminal)
                eventually(checkout.has_ended, STOPS_SECONDS)
                self.assertNotEqual(psutil.Process(pid).wait(STOPS_SECONDS), 0)

    def test_a_signal_at_any_moment_of_the_start_leaves_nothing(self) -> None:
        signals = (signal.SIGHUP, signal.SIGTERM, signal.SIGINT)
        # Before anything is started; then Redis is, initdb, Postgres, the service.
        for started, number in enumerate((*signals, *signals[:2])):
            with self.subTest(started=started):
                checkout = Checkout(self)
                launcher = checkout.launch()
                eventually((checkout.folder / ".dados/lock").exists)
                eventually(partial(checkout.has_started, started))
                launcher.send_signal(number)
                # If the service was there, the status is its own: it may not know SIGTERM yet.
                expected = {128 + number, 0, 128 + signal.SIGTERM}
                self.assertIn(launcher.wait(STOPS_SECONDS), expected, checkout.printed())
                self.assertEqual(checkout.running(), [])

    def test_a_signal_in_the_first_moments_shows_no_traceback(self) -> None:
        checkout = Checkout(self)
        numbers = itertools.cycle((signal.SIGINT, signal.SIGTERM, signal.SIGINT, signal.SIGHUP))
        for moment, number in zip(range(10), numbers, strict=False):
            launcher = checkout.launch()
            time.sleep(moment * 0.03)
            launcher.send_signal(number)
            # Before our first line it is for Python, which may show where it was in its own files.
            self.assertNotEqual(launcher.wait(STOPS_SECONDS), 0)
            self.assertNotIn(str(checkout.folder), checkout.printed())
            self.assertEqual(checkout.running(), [])
            self.assertEqual(list(checkout.temporary.iterdir()), [])

    def test_a_first_start_that_was_interrupted_spoils_nothing(self) -> None:
        checkout = Checkout(self)
        for number in (signal.SIGTERM, signal.SIGKILL):
            launcher = checkout.launch()
            eventually(checkout.initializing)
            launcher.send_signal(number)
            launcher.wait(STOPS_SECONDS)
        launcher = checkout.start()
        self.assertEqual(checkout.visit(), "Contador: 1\nPostgres: conectado\n")
        launcher.send_signal(signal.SIGTERM)
        self.check_end(checkout, launcher, 0)

    def test_a_second_start_is_refused_until_the_first_is_killed_and_then_counts_on(self) -> None:
        checkout = Checkout(self)
        launcher = checkout.start()
        self.assertIn("Contador: 1\n", checkout.visit())
        first, recorded = checkout.running(), checkout.recorded()
        second = subprocess.run(
            LAUNCHER,
            cwd=checkout.folder,
            env=checkout.environment | {"PORT": str(free_port())},
            capture_output=True,
            text=True,
            timeout=10,
        )
        url = f"http://127.0.0.1:{checkout.port}/"
        message = f"O contador desta pasta já está em execução, ou iniciando: {url}\n"
        self.assertEqual(
            (second.returncode, second.stdout + second.stderr),
            (1, message),
        )
        self.assertEqual((checkout.running(), checkout.recorded()), (first, recorded))
        self.assertIn("Contador: 2\n", checkout.visit())
        launcher.kill()
        launcher.wait(15)
        self.assertGreaterEqual(len(checkout.running()), 3)  # Redis, Postgres, the service
        launcher = checkout.start()
        self.assertEqual(checkout.visit(), "Contador: 3\nPostgres: conectado\n")
        self.assertEqual([process for process in first if processes.is_alive(process)], [])
        launcher.send_signal(signal.SIGTERM)
        self.check_end(checkout, launcher, 0)

    def test_a_server_that_does_not_end_is_killed_and_the_others_are_stopped(self) -> None:
        checkout = Checkout(self)
        program = (
            "from tools import __main__, processes\n"
            "processes.STOP_SECONDS = 5  # long enough for the others\n"
            "__main__.main('run')\n"
        )
        launcher = checkout.start([sys.executable, "-c", program])
        command = checkout.recorded()[0]["command"]
        port = int(command[command.index("--port") + 1])
        with socket.create_connection(("127.0.0.1", port)) as client:
            client.sendall(b"EVAL 'while true do end' 0\r\n")
            launcher.send_signal(signal.SIGTERM)
            self.check_end(checkout, launcher, 0)
        self.assertIn(
            "valkey-server não se encerrou em 5 s e foi encerrado à força\n", checkout.printed()
        )

    def test_a_server_that_a_url_leads_to_is_not_started(self) -> None:
        for name, url, programs in (
            ("REDIS_URL", "redis://127.0.0.1:1/0", ["initdb", "postgres", "server.py"]),
            ("DATABASE_URL", "postgresql://a:b@127.0.0.1:1/c", ["valkey-server", "server.py"]),
        ):
            with self.subTest(name):
                checkout = Checkout(self)
                checkout.environment[name] = url
                launcher = checkout.start()
                commands = [" ".join(each["command"]) for each in checkout.recorded()]
                for program, command in zip(programs, commands, strict=True):
                    self.assertIn(program, command)
                launcher.send_signal(signal.SIGTERM)
                self.check_end(checkout, launcher, 0)

    def test_a_port_that_is_taken_or_none_is_told_before_anything_starts(self) -> None:
        checkout = Checkout(self)
        with socket.create_server(("127.0.0.1", checkout.port)):
            self.assertEqual(checkout.launch().wait(10), 1)
            self.assertIn(f"A porta {checkout.port} não está livre", checkout.printed())
        for port in ("x", "-1", "65536"):
            checkout.environment["PORT"] = port
            self.assertEqual(checkout.launch().wait(10), 2)
            self.assertEqual(
                checkout.printed(),
                "PORT: valor inválido; esperado: um número de 0 a 65535\n",
            )
        self.assertEqual(checkout.recorded(), [])

    def test_a_folder_that_cannot_be_used_is_told_in_a_line(self) -> None:
        checkout = Checkout(self)
        data = checkout.folder / ".dados"
        data.touch()
        self.assertEqual(checkout.launch().wait(10), 1)
        self.assertRegex(checkout.printed(), rf"\A{data}: .*\n\Z")
        data.unlink()
        checkout.environment["TMPDIR"] = "/nowhere"
        program = (
            "import sys, tempfile\n"
            "from unittest.mock import Mock\n"
            "from tools import __main__\n"
            "tempfile.gettempdir = Mock(side_effect=FileNotFoundError(2, 'No usable folder'))\n"
            "sys.exit(__main__.main('run'))\n"
        )
        self.assertEqual(checkout.launch([sys.executable, "-c", program]).wait(10), 1)
        self.assertRegex(checkout.printed(), r"\A/nowhere: não serve de pasta temporária.*\n\Z")


class TestRecord(unittest.TestCase):
    """A process is ended only if it is surely one that was left: its number may be another's."""

    def setUp(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="contador-test-"))
        self.addCleanup(shutil.rmtree, self.folder)
        self.record = Record(self.folder / "processos", self.folder)
        self.enterContext(patch.object(processes, "STOP_SECONDS", 0.5))

    def started(self, *command: str) -> Process:
        process = Process(list(command), self.record)
        self.addCleanup(process.kill)
        process.launch()
        return process

    def change(self, **values: Any) -> None:
        """Change what is noted of the first process."""
        self.record.processes[0] |= values
        self.record.write()

    def test_what_was_left_is_ended_in_good_order_or_else_killed(self) -> None:
        process = self.started("sleep", "60")
        stubborn = self.started("sh", "-c", "trap '' INT; sleep 60 & wait; sleep 60")
        shell = psutil.Process(self.record.processes[1]["pid"])
        eventually(shell.children)
        children = shell.children()
        stubborn.signal(signal.SIGSTOP)
        Record(self.record.path, self.folder).end_leftovers()
        self.assertEqual(process.wait(5), -signal.SIGINT)
        self.assertEqual(stubborn.wait(5), -signal.SIGKILL)
        eventually(lambda: not any(processes.is_alive(child) for child in children))
        self.assertEqual(json.loads(self.record.path.read_text())["processes"], [])

    def test_another_start_time_command_or_folder_is_left_alone(self) -> None:
        process = self.started("sleep", "60")
        noted = dict(self.record.processes[0])
        earlier = {"started": noted["started"] - 10, "after_boot": noted["after_boot"] - 10}
        for values in (earlier, {"command": ["sleep", "61"]}):
            self.change(**noted | values)
            Record(self.record.path, self.folder).end_leftovers()
            self.assertTrue(process.is_running())
        self.change(**noted)
        Record(self.record.path, self.folder / "elsewhere").end_leftovers()
        self.assertTrue(process.is_running())

    def test_a_clock_that_was_set_since_then_hides_nothing(self) -> None:
        # On Linux, the boot time moves with the clock, and what psutil derives from it.
        for name in ("started", "after_boot"):
            with self.subTest(moved=name):
                process = self.started("sleep", "60")
                noted = self.record.processes[0]
                self.change(**{name: noted[name] - 3600})
                Record(self.record.path, self.folder).end_leftovers()
                self.assertEqual(process.wait(5), -signal.SIGINT)
                self.record.processes.clear()

    def test_a_record_that_cannot_be_read_is_passed_over(self) -> None:
        for text in ("", "{", "[]", "null", '{"folder": 1}', '{"processes": 1}'):
            self.record.path.write_text(text)
            self.record.end_leftovers()
            self.assertEqual(json.loads(self.record.path.read_text())["processes"], [])


class TestServers(unittest.TestCase):
    """The classes, as the tests use them."""

    def setUp(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="contador-test-")).resolve()
        self.folder.chmod(0o711)
        self.addCleanup(shutil.rmtree, self.folder)

    def test_somebody_else_on_the_port_is_not_taken_for_the_server(self) -> None:
        for server in (Redis(self.folder / "redis"), Postgres(self.folder / "postgres")):
            with (
                socket.create_server(("127.0.0.1", server.port)),
                self.assertRaisesRegex(RuntimeError, "(?s)não iniciou:.*ddress already in use"),
            ):
                server.start()
            self.assertFalse(server.is_running())

    def test_they_start_again_after_a_stop_and_after_a_crash_with_their_password(self) -> None:
        for server in (Redis(self.folder / "redis"), Postgres(self.folder / "postgres", "senha")):
            for end in (server.stop, server.kill, server.stop):
                server.start()
                with socket.create_connection(("127.0.0.1", server.port), 5):
                    end()
                self.assertFalse(server.is_running())
        self.assertEqual(Postgres(self.folder / "postgres", "outra").password, "senha")

    def test_programs_out_of_others_reach_start_all_the_same(self) -> None:
        private = self.folder / "private"  # root runs Postgres as somebody else
        private.mkdir(mode=0o700)
        packages, package, programs = servers.POSTGRES.parts[-3:]
        (private / packages).symlink_to(servers.POSTGRES.parent.parent)
        with patch.object(servers, "POSTGRES", private / packages / package / programs):
            server = Postgres(self.folder / "postgres")
            server.start()
        server.stop()

    def test_what_initdb_says_is_told(self) -> None:
        (self.folder / "password").touch()
        with self.assertRaisesRegex(RuntimeError, "(?s)^initdb não iniciou:.*password"):
            Postgres(self.folder).start()

    def test_they_end_with_the_tests_that_started_them(self) -> None:
        program = (
            "import time, unittest\n"
            "from pathlib import Path\n"
            "from tools.servers import Redis\n"
            "from tools.signals import end_on_signals\n"
            "class Test(unittest.TestCase):\n"
            "    def test(self):\n"
            f"        Redis(Path('{self.folder}/redis')).start()\n"
            "        print('started', flush=True)\n"
            "        time.sleep(60)\n"
            "end_on_signals()\n"
            "unittest.main()\n"
        )
        output = self.folder / "output"
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
            with output.open("wb") as file:
                tests = subprocess.Popen(
                    [sys.executable, "-c", program], cwd=HERE, stdout=file, stderr=file
                )
            self.addCleanup(tests.kill)
            eventually(output.read_text)
            self.assertEqual(output.read_text(), "started\n")
            started = [each for each in running_in(self.folder) if each.pid != tests.pid]
            self.assertEqual(len(started), 1)
            tests.send_signal(number)
            self.assertEqual(tests.wait(10), -signal.SIGINT, output.read_text())
            self.assertFalse(started[0].is_running())


class TestPins(unittest.TestCase):
    """``make lint`` notices where the requirement files don't fit."""

    def problems(self, file: str, old: str, new: str) -> list[str]:
        """Return what is found where a text of a file has been replaced."""
        folder = Path(tempfile.mkdtemp(prefix="contador-test-"))
        self.addCleanup(shutil.rmtree, folder)
        (folder / "tools").mkdir()
        for name in ("pyproject.toml", "requirements.txt", pins.RUN, pins.DEV):
            text = (HERE / name).read_text()
            if name == file:
                self.assertIn(old, text)
                text = text.replace(old, new)
            (folder / name).write_text(text)
        return pins.problems(folder)

    def test_they_fit_pyproject_and_one_another(self) -> None:
        dev = "tools/requirements-dev.txt"
        for file, old, new, message in (
            ("pyproject.toml", "redis>=8.1,<9", "redis>=9,<10", "requirements.txt: redis<10,>=9 "),
            ("pyproject.toml", '"psutil', '"other", "psutil', "requirements-run.txt: other não"),
            ("pyproject.toml", '    "rich>=15,<16",\n', "", f"{dev}: pyproject.toml pede"),
            (dev, "\npsutil==", "\npsutil==7.2.99", f"{dev}: psutil 7.2.99"),
        ):
            with self.subTest(new=new):
                self.assertIn(message, "\n".join(self.problems(file, old, new)))
        self.assertEqual(self.problems("pyproject.toml", "", ""), [])


if __name__ == "__main__":
    unittest.main()
