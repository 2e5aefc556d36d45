"""The documents: their own commands, and what the program that runs them promises."""

import ast
import dataclasses
import fcntl
import os
import pty
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import termios
import time
import unittest
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import psutil

from tools import check, console, picture, processes, reading
from tools.demo import plain
from tools.reading import DOCUMENTS, HERE, Document
from tools.signals import end_on_signals
from tools.waiting import SECONDS, eventually

# A Docker that has nothing but what $THERE says, and writes down what it is asked.
DOCKER = """#!/bin/sh
echo "$*" >> "$ASKED"
case "$*" in
*maquina2*) exit 1;;
*info*) echo "$STATE"; test "$STATE";;
"ps -a"*) echo "$THERE";;
"compose down"*) sleep "${SLOW-0}";;
esac
"""


def setUpModule() -> None:
    end_on_signals()


def has_gone(pid: int) -> bool:
    """Tell whether there is no such process any more, not even as a zombie."""
    return not psutil.pid_exists(pid)


class DocumentCase(unittest.TestCase):
    """Tests with documents of a few lines."""

    def setUp(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="contador-test-"))
        self.addCleanup(shutil.rmtree, self.folder)

    def document(self, *lines: str) -> Document:
        """Return a document that has been read."""
        path = self.folder / "texto.md"
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return Document(path)


class TestOwnDocuments(unittest.TestCase):
    """The documents of this project."""

    documents: list[Document]

    @classmethod
    def setUpClass(cls) -> None:
        cls.documents = [Document(path) for path in DOCUMENTS]

    def test_the_commands_that_need_no_docker_show_what_they_say(self) -> None:
        self.assertEqual(check.check(self.documents, "local"), "")

    def test_pieces_pictures_and_links_are_right(self) -> None:
        self.assertEqual([fault for each in self.documents for fault in reading.faults(each)], [])

    def test_any_other_output_would_be_noticed(self) -> None:
        found = [step for document in self.documents for step in document.steps]
        self.assertEqual({step.kind for step in found}, set(reading.KINDS))
        for step in found:
            printed = "".join(line + "\n" for line in step.expected)
            right, wrong = (2, 0) if step.fails else (0, 2)
            self.assertEqual(check.difference(step, right, printed), "")
            self.assertIn(f"{step.where}: ", check.difference(step, wrong, printed))
            for number, line in enumerate(step.expected):
                if line.strip(". "):
                    other = [*step.expected[:number], "x" + line, *step.expected[number + 1 :]]
                    changed = dataclasses.replace(step, expected=other)
                    self.assertTrue(check.difference(changed, right, printed), changed)

    def test_the_pictures_need_nothing_from_elsewhere(self) -> None:
        blocks = [block for document in self.documents for block in document.blocks]
        pictures = [HERE / block.file for block in blocks if block.action == "picture"]
        self.assertTrue(pictures)
        for file in pictures:
            self.assertNotRegex(file.read_text(encoding="utf-8"), r"url\((?!#)|href|@import|src")


class TestReading(DocumentCase):
    """What a document may say, and what is said of one that is almost right."""

    def test_what_is_almost_right_is_an_error_with_its_place(self) -> None:
        for number, lines in (
            (1, ["<!-- runs docker: true -->"]),
            (1, ["<!-- run docker:true -->"]),
            (1, ["<!--run docker: true-->"]),
            (1, ["text <!-- run docker: true -->"]),
            (1, ["<!-- run docker: true", "-->"]),
            (1, ["<!-- run Docker: true -->"]),
            (1, ["<!-- port 8000 -->"]),
            (1, ["<!-- picture terminal.png -->"]),
            (1, ["<!-- replace in server.py: old -> new -->"]),
            (2, ["<!-- run local: true -->", "<!-- port 5000 -->"]),
            (2, ["<!-- from Makefile -->", "", "```make", "```"]),
            (2, ["<!-- from Makefile -->", "<!-- run local: true -->"]),
            (1, ["<!-- insert into server.py before: x -->"]),
            (2, ["<!-- insert into server.py before: x -->", "```console", "```"]),
            (2, ["<!-- picture a.svg -->", "```yaml", "```"]),
            (2, ["<!-- fails -->", "```yaml", "```"]),
            (2, ["<!-- not run: why -->", "```console", "```"]),
            (3, ["", "```console", "output", "$ true", "```"]),
            (2, ["```console", "^C", "$ true", "```"]),
            (2, ["```console lokal", "$ true", "```"]),
            (1, ["```consol", "$ true", "```"]),
            (1, ["```sh", "true", "```"]),
            (1, ["   ```console", "   $ true", "   ```"]),
            (1, ["~~~console", "$ true", "~~~"]),
            (1, ["```console", "$ true"]),
        ):
            with (
                self.subTest(lines),
                self.assertRaisesRegex(reading.DocumentError, f"texto.md:{number}: "),
            ):
                self.document(*lines)

    def test_what_stands_in_code_is_no_comment(self) -> None:
        document = self.document("Write `<!-- run KIND: ... -->`.", "```html", "<!-- x -->", "```")
        self.assertEqual(document.steps, [])

    def test_commands_their_output_and_ctrl_c(self) -> None:
        document = self.document(
            "<!-- background local: sleep 9 -->",
            "```console swarm2",
            "$ echo a \\",
            "> b",
            "a b",
            "$ sleep 9",
            "^C",
            "```",
        )
        background, echo, sleep = document.steps
        self.assertEqual((background.hidden, background.kind), ("background", "local"))
        self.assertEqual((echo.command, echo.expected), ("echo a \\\nb", ["a b"]))
        self.assertEqual((sleep.interrupt, sleep.kind), (0, "swarm2"))
        self.assertTrue(sleep.where.endswith("texto.md:6"))

    def test_edits_find_one_place_or_are_wrong(self) -> None:
        text = "one\n    two\none and two\n"
        for lines, after in (
            (
                ["<!-- insert into f before: two -->", "```", "new", "```"],
                "one\nnew\n    two\none and two\n",
            ),
            (["<!-- insert into f before: tw -->", "```", "new", "```"], None),
            (["<!-- replace in f: one and => both: -->"], "one\n    two\nboth: two\n"),
            (["<!-- replace in f: one => both -->"], None),
            (["<!-- replace in f: three => both -->"], None),
            (["<!-- append to f: # new -->"], text + "# new\n"),
        ):
            with self.subTest(lines):
                edit = self.document(*lines).steps[0].edit
                assert edit
                if after is None:
                    self.assertRaises(ValueError, edit.edited, text)
                else:
                    self.assertEqual(edit.edited(text), after)

    def test_an_appended_line_is_new_each_time(self) -> None:
        edit = self.document("<!-- append to f: # {now} -->").steps[0].edit
        assert edit
        self.assertIn(time.strftime("%Y"), edit.edited(""))

    def test_a_wrong_piece_picture_or_link_is_noticed(self) -> None:
        folder = self.folder / "uma pasta"  # with a space, as the project's may have
        folder.mkdir()
        svg = folder / "a.svg"
        svg.write_text(picture.draw("title", [("echo a", "a\n"), ("ls <b>", "1 & 2\n")]))
        good = [
            "# Título: um `teste`",
            f"<!-- from {HERE}/Makefile -->",
            "```make",
            "  help:  ## Mostra esta ajuda",
            "```",
            f"<!-- picture {svg} -->",
            "```console",
            "$ echo a",
            "...",
            "$ ls <b>",
            "1 ... 2",
            "```",
            "[a](#título-um-teste) [b](texto.md) [c](https://example.org)",
        ]
        self.assertEqual(reading.faults(self.document(*good)), [])
        for old, new in (
            ("help:", "halp:"),
            ("$ ls <b>", "$ ls <c>"),
            ("1 ... 2", "1 ... 3"),
            ("#título-um", "#um"),
            ("(texto.md", "(texte.md"),
            ("Makefile", "Makefila"),
        ):
            with self.subTest(new):
                changed = [line.replace(old, new) for line in good]
                self.assertEqual(len(reading.faults(self.document(*changed))), 1)

    def test_a_long_output_is_cut_in_the_picture(self) -> None:
        svg = self.folder / "a.svg"
        svg.write_text(
            picture.draw("title", [("seq 20", "".join(f"line {n}.\n" for n in range(20)))])
        )
        self.assertEqual(
            [line.strip() for line in reading.picture_lines(svg)],
            ["$ seq 20", "title", "...", "line 17.", "line 18.", "line 19."],
        )


class TestConsole(DocumentCase):
    """Commands in a copy of this project."""

    def test_ctrl_c_ends_a_command_in_the_foreground(self) -> None:
        wait = "trap 'echo fim; exit 130' INT; echo pronto; while :; do sleep 0.1; done"
        for last, wrong in (("fim", False), ("outro", True)):
            lines = ["```console local", f"$ {wait}", "pronto", "^C", last, "```"]
            with mock.patch.object(console, "QUIET_SECONDS", 0.2):
                self.assertEqual(bool(self.check(*lines)), wrong)

    def test_only_the_last_command_of_a_block_that_fails_may_fail(self) -> None:
        for first, last, wrong in (
            ("true", "false", False),
            ("true", "true", True),
            ("false", "false", True),
        ):
            block = ["```console local", f"$ {first}", f"$ {last}", "```"]
            self.assertEqual(bool(self.check("<!-- fails -->", *block)), wrong)

    def test_a_command_that_does_not_end_is_ended(self) -> None:
        with mock.patch.object(console, "SECONDS", 0.5):
            self.assertIn("(código -9)", self.check("<!-- run local: sleep 60 & sleep 60 -->"))

    def test_the_port_is_a_free_one_or_the_one_that_is_written(self) -> None:
        free, written = 'test "$PORT" != 5000', 'test "$PORT" = 5000'
        self.assertEqual(self.check(f"<!-- run local: {free} -->"), "")
        self.assertEqual(self.check("<!-- port 5000 -->", f"<!-- run local: {written} -->"), "")

    def test_a_port_is_shown_as_in_the_documents_but_not_within_a_larger_number(self) -> None:
        shown = console.Console(self.folder, "6001")
        self.assertEqual(
            shown.as_documented("0.0.0.0:6001->5000/tcp http://0.0.0.0:6001/ 16001 60012"),
            "0.0.0.0:5000->5000/tcp http://0.0.0.0:5000/ 16001 60012\n",
        )

    def check(self, *lines: str) -> str:
        return check.check_document(self.document(*lines), "local")


class TestGroups(unittest.TestCase):
    """Signals reach the processes that they are for, and no others."""

    def start(self, command: str) -> tuple[console.Group, subprocess.Popen[bytes]]:
        group = console.Group()
        self.addCleanup(group.close)
        with open(os.devnull, "wb") as nowhere:
            return group, group.start(["sh", "-c", command], HERE, dict(os.environ), nowhere)

    def test_the_number_stays_ours_after_the_command_has_ended(self) -> None:
        group, process = self.start("true")
        self.assertEqual(process.wait(SECONDS), 0)
        group.wait(SECONDS)
        group.signal(signal.SIGTERM)
        time.sleep(0.1)
        self.assertEqual(os.getpgid(group.leader.pid), group.leader.pid)

    def test_waits_for_what_a_command_leaves_running(self) -> None:
        started = time.monotonic()
        group, process = self.start("sleep 0.5 & exit 3")
        self.assertEqual(process.wait(SECONDS), 3)
        group.wait(SECONDS)
        self.assertGreater(time.monotonic() - started, 0.5)

    def test_does_not_wait_longer_than_it_should(self) -> None:
        group, process = self.start("sleep 60")
        started = time.monotonic()
        group.wait(0.1)
        self.assertLess(time.monotonic() - started, 30)
        self.assertIsNone(process.poll())

    def test_make_run_has_the_time_to_stop_its_three_servers(self) -> None:
        self.assertGreater(console.STOP_SECONDS, 3 * processes.STOP_SECONDS)


def end(process: subprocess.Popen[str]) -> None:
    """End a program, if it has not ended, and close what leads to it."""
    process.kill()
    process.wait(SECONDS)
    for stream in (process.stdin, process.stdout):
        if stream:
            with suppress(OSError):
                stream.close()


class Project:
    """A project of a few lines in a folder of its own, with the program that runs its documents."""

    def __init__(self, test: unittest.TestCase, folder: Path, **files: str) -> None:
        self.test = test
        self.folder, self.temporary = folder / "projeto", folder / "tmp"
        self.asked = folder / "asked"
        self.temporary.mkdir()
        shutil.copytree(
            HERE / "tools", self.folder / "tools", ignore=shutil.ignore_patterns("__pycache__")
        )
        program = self.folder / "tools/console.py"
        text = program.read_text(encoding="utf-8")
        program.write_text(text.replace("QUIET_SECONDS = 3", "QUIET_SECONDS = 0.3"), "utf-8")
        for name, text in {"README.md": "", ".gitignore": "*.tar\n/meu.yml\n", **files}.items():
            self.write(name, text)
        self.write("bin/docker", DOCKER).chmod(0o755)
        self.environment = os.environ | {
            "PATH": f"{self.folder}/bin:{os.environ['PATH']}",
            "TMPDIR": str(self.temporary),
            "ASKED": str(self.asked),
            "STATE": "inactive",
            "HERE": str(folder),
            "THERE": "",
            "MAQUINA1": "",
            "PYTHONUNBUFFERED": "1",
        }

    def write(self, name: str, text: str) -> Path:
        """Write a file of the project."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    def make_repository(self) -> None:
        """Put the project under git."""
        command = ["git", "init", "-q", str(self.folder)]
        subprocess.run(command, check=True, timeout=SECONDS)

    def start(self, *arguments: str, **options: Any) -> subprocess.Popen[str]:
        """Start the program, which ends with the test."""
        command = [sys.executable, str(self.folder / "tools/documents.py"), *arguments]
        environment = self.environment | options.pop("environment", {})
        streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, **options}
        process = subprocess.Popen(
            command, stderr=subprocess.STDOUT, text=True, env=environment, **streams
        )
        self.test.addCleanup(end, process)
        return process

    def run(self, *arguments: str, typed: str = "", **environment: str) -> tuple[int, str]:
        """Run the program; return its exit status and what it prints."""
        process = self.start(*arguments, stdin=subprocess.PIPE, environment=environment)
        printed, _ = process.communicate(typed, SECONDS)
        return process.returncode, printed

    @property
    def left(self) -> list[str]:
        """What is in the temporary folder, but for the lock."""
        return [path.name for path in self.temporary.iterdir() if path.suffix != ".lock"]


class ProjectCase(unittest.TestCase):
    """Tests with a project."""

    def project(self, *lines: str, **files: str) -> Project:
        """Return a project with these lines as README.md."""
        folder = Path(tempfile.mkdtemp(prefix="contador-test-"))
        self.addCleanup(shutil.rmtree, folder)
        return Project(self, folder, **{"README.md": "\n".join(lines) + "\n", **files})


class TestRunning(ProjectCase):
    """What a test run says, does and leaves."""

    def test_counts_what_it_ran(self) -> None:
        commands = ["```console local", "$ echo a b", "a ...", "$ true", "```"]
        project = self.project(
            "<!-- run local: true -->", *commands, "```console", "$ false", "```"
        )
        self.assertEqual(
            project.run("test", "local"), (0, "2 comandos mostram o que está escrito\n")
        )
        self.assertEqual(project.left, [])

    def test_fails_where_a_command_fails_or_prints_something_else(self) -> None:
        for lines in (["$ false"], ["$ echo a", "b"], ["$ echo a"], ["$ true", "a"], ["$ no-such"]):
            status, printed = self.project("```console local", *lines, "```").run("test", "local")
            self.assertEqual(status, 1)
            self.assertIn(f"README.md:2: {lines[0][2:]}\n", printed)
            self.assertNotIn("Traceback", printed)

    def test_fails_where_there_is_nothing_to_run(self) -> None:
        status, printed = self.project("text").run("test", "local")
        self.assertEqual((status, printed), (1, "Nenhum comando é do tipo local\n"))

    def test_tells_how_to_use_it(self) -> None:
        for arguments in ([], ["tests"], ["test", "dockr"], ["demo", "1", "2"]):
            status, printed = self.project("text").run(*arguments)
            self.assertEqual((status, printed[:4]), (2, "Uso:"))

    def test_a_temporary_folder_that_is_none_is_told_in_one_line(self) -> None:
        project = self.project("<!-- run local: true -->", "```console", "$ true", "```")
        program = project.folder / "tools/documents.py"
        start = (
            "import runpy, sys, tempfile\n"
            "from unittest.mock import Mock\n"
            "tempfile.gettempdir = Mock(side_effect=FileNotFoundError(2, 'No usable folder'))\n"
            f"runpy.run_path({str(program)!r}, run_name='__main__')\n"
        )
        for kind in ("local", "docker"):
            done = subprocess.run(
                [sys.executable, "-c", start, "test", kind],
                env=project.environment | {"TMPDIR": "/nowhere"},
                capture_output=True,
                text=True,
                timeout=SECONDS,
            )
            self.assertEqual((done.returncode, done.stderr), (2, ""))
            self.assertRegex(done.stdout, r"\A/nowhere: não serve de pasta temporária.*\n\Z")

    def test_fails_where_an_edit_finds_no_place(self) -> None:
        for file in ("a.py", "no-such.py"):
            lines = ["", f"<!-- replace in {file}: old => new -->"]
            status, printed = self.project(*lines, **{"a.py": ""}).run("test", "docker")
            self.assertEqual(status, 1)
            self.assertIn(f"README.md:2: troca old por new em {file}\n", printed)

    def test_the_copy_has_to_be_left_as_it_was(self) -> None:
        for command, status in (
            ("true", 0),
            ("echo new > new", 1),
            ("rm README.md", 1),
            ("echo more >> README.md", 1),
            ("echo ignored > meu.yml; echo ignored > image.tar", 0),
            ("mkdir -p aula; echo not ignored > aula/meu.yml", 1),
        ):
            for repository in (True, False) if "ignored" in command else (True,):
                with self.subTest(command, repository=repository):
                    project = self.project(f"<!-- run local: {command} -->")
                    if repository:
                        project.make_repository()
                    self.assertEqual(project.run("test", "local")[0], status)

    def test_edits_are_made_in_the_copy_and_undone(self) -> None:
        project = self.project(
            "<!-- append to a.py: # new -->",
            "<!-- replace in a.py: old => young -->",
            "<!-- insert into a.py before: young -->",
            "```python",
            "between",
            "```",
            '<!-- run docker: test "$(tr "\\n" , < a.py)" = "one,between,young,# new," -->',
            "<!-- restore a.py -->",
            **{"a.py": "one\nold\n"},
        )
        self.assertEqual(project.run("test", "docker")[0], 0)
        self.assertEqual((project.folder / "a.py").read_text(), "one\nold\n")

    def test_a_copy_has_the_times_of_the_files_and_no_settings_of_the_reader(self) -> None:
        settings = "$REDIS_URL$DATABASE_URL$POSTGRES_PASSWORD$COMPOSE_FILE$MAKEFLAGS"
        project = self.project(
            f'<!-- run local: test -z "{settings}" -->',
            '<!-- run local: test "$(find . -name old -mtime +30)" -->',
            old="",
        )
        os.utime(project.folder / "old", (0, 0))
        environment = {name: "x" for name in settings.split("$") if name}
        self.assertEqual(project.run("test", "local", **environment)[0], 0)

    def test_what_git_ignores_is_not_copied(self) -> None:
        for repository in (True, False):
            with self.subTest(repository=repository):
                project = self.project(
                    "<!-- run local: test -e new && test ! -e big.tar -->", new=""
                )
                with project.write("big.tar", "").open("ab") as big:
                    big.truncate(1 << 40)  # a thousand times what could be read in this time
                if repository:
                    project.make_repository()
                self.assertEqual(project.run("test", "local")[0], 0)

    def test_what_runs_in_the_background_ends_in_good_order(self) -> None:
        server = (
            "trap 'touch $HERE/ended; exit' TERM; touch $HERE/started; while :; do sleep 0.1; done"
        )
        project = self.project(
            f"<!-- background local: {server} -->",
            "<!-- run local: until test -e $HERE/started; do sleep 0.1; done -->",
        )
        self.assertEqual(project.run("test", "local")[0], 0)
        self.assertTrue((project.folder.parent / "ended").exists())

    def test_a_signal_ends_it_and_all_that_it_started(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            with self.subTest(number):
                project = self.project(
                    "<!-- background local: echo $$ > $HERE/one; exec sleep 60 -->",
                    "<!-- run local: until test -s $HERE/one; do sleep 0.1; done -->",
                    "<!-- run local: echo $$ > $HERE/two; touch $HERE/both; exec sleep 60 -->",
                )
                process, here = project.start("test", "local"), project.folder.parent
                eventually((here / "both").exists)
                process.send_signal(number)
                printed, _ = process.communicate(timeout=SECONDS)
                self.assertEqual((process.returncode, printed), (128 + number, ""))
                self.assertEqual(project.left, [])
                for name in ("one", "two"):
                    # A child whose start was interrupted is reaped by init, a moment later.
                    eventually(partial(has_gone, int((here / name).read_text())))

    def test_a_second_signal_does_not_disturb_the_clean_up(self) -> None:
        trap = "trap 'sleep 1; touch $HERE/ended; exit' TERM"
        wait = "touch $HERE/started; while :; do sleep 0.1; done"
        project = self.project(f"<!-- run local: {trap}; {wait} -->")
        process, here = project.start("test", "local"), project.folder.parent
        eventually((here / "started").exists)
        process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=SECONDS)
        self.assertEqual((process.returncode, project.left), (128 + signal.SIGTERM, []))
        self.assertTrue((here / "ended").exists())

    def test_a_port_that_is_taken_is_told(self) -> None:
        project = self.project("<!-- port 5000 -->", "<!-- run local: true -->")
        with ExitStack() as stack:
            for _ in range(50):
                with suppress(OSError):  # it is taken, perhaps for a moment
                    stack.enter_context(socket.create_server(("", 5000)))
                    break
                time.sleep(0.1)
            self.assertEqual(project.run("test", "local"), (2, "A porta 5000 não está livre\n"))

    def test_an_older_python_is_told_in_one_line(self) -> None:
        program = HERE / "tools/documents.py"
        ast.parse(program.read_text(encoding="utf-8"), feature_version=(3, 9))
        start = "import runpy, sys; sys.version_info = (3, 9, 6, 'final', 0)"
        run = f"runpy.run_path({str(program)!r}, run_name='__main__')"
        done = subprocess.run(
            [sys.executable, "-c", f"{start}; {run}"],
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )
        self.assertEqual((done.returncode, done.stderr), (2, ""))
        self.assertRegex(done.stdout, r"^.*3\.11.*\n$")


class TestDocker(ProjectCase):
    """Docker is somebody's: nothing is removed that was there before, and only one run uses it."""

    slow = ("<!-- run docker: touch $HERE/started; until test -e $HERE/go; do sleep 0.1; done -->",)

    def test_a_second_run_is_refused(self) -> None:
        swarm = ["```console swarm", "$ true", "```"]
        project = self.project(*self.slow, "```console", "$ echo a", "a", "```", *swarm)
        first, here = project.start("test", "docker"), project.folder.parent
        eventually((here / "started").exists)
        before = project.asked.read_text()
        for arguments in (["test", "docker"], ["test", "swarm"], ["demo", "1"]):
            status, printed = self.with_lesson(project).run(*arguments)
            self.assertEqual((status, printed.count("\n")), (2, 1), printed)
            self.assertIn("em execução", printed)
        self.assertEqual(project.asked.read_text(), before)
        (here / "go").touch()
        printed, _ = first.communicate(timeout=SECONDS)
        self.assertEqual(
            (first.returncode, printed), (0, "1 comandos mostram o que está escrito\n")
        )

    def with_lesson(self, project: Project) -> Project:
        project.write("aula/README.md", "## Aula 1 — Um\n")
        return project

    def test_each_cause_has_a_message_of_its_own(self) -> None:
        swarm = ["```console swarm", "$ true", "```"]
        project = self.with_lesson(self.project("```console", "$ true", "```", *swarm))
        for arguments, environment, message in (
            (["test", "docker"], {"STATE": ""}, "docker não responde"),
            (["demo", "1"], {"STATE": ""}, "docker não responde"),
            (["test", "swarm"], {"STATE": "active"}, "docker já faz parte de um Swarm"),
            (["test", "swarm"], {"THERE": "visitas_web.1"}, "de um Swarm anterior: visitas_web.1"),
            (["test", "docker"], {"THERE": "web-1"}, "docker compose -p contador-aula down -v"),
            (["demo", "1"], {"THERE": "web-1"}, "docker compose -p contador-aula down -v"),
        ):
            with self.subTest(arguments, **environment):
                status, printed = project.run(*arguments, **environment)
                self.assertEqual((status, printed.count("\n")), (2, 1), printed)
                self.assertIn(message, printed)
        self.assertNotRegex(project.asked.read_text(), "(?m)^(compose|swarm|stack|.* rm )")

    def test_a_signal_does_not_disturb_the_clean_up(self) -> None:
        project = self.project("```console", "$ true", "```")
        project.asked.touch()
        process = project.start("test", "docker", environment={"SLOW": "1"})
        eventually(lambda: "compose down" in project.asked.read_text())
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=SECONDS)
        self.assertEqual((process.returncode, project.left), (128 + signal.SIGTERM, []))
        self.assertIn("image prune", project.asked.read_text())

    def test_says_what_a_missing_machine_leaves_out(self) -> None:
        swarm, both = ["```console swarm", "$ true", "```"], ["```console swarm2", "$ false", "```"]
        project = self.project(*swarm, *both, *both)
        for environment in ({"MAQUINA1": ""}, {"MAQUINA1": "192.0.2.1"}):
            status, printed = project.run("test", "swarm", **environment)
            self.assertEqual(status, 0)
            self.assertRegex(printed, "^1 comandos .*; 2 não foram executados: .*maquina2")

    def test_notices_what_is_left_in_docker(self) -> None:
        project = self.project(
            "<!-- run docker: sed -i.bak '/ps -a/s/.$THERE./left/' $HERE/projeto/bin/docker -->"
        )
        status, printed = project.run("test", "docker")
        self.assertEqual((status, printed), (1, "README.md: não ficou como antes: left\n"))
        self.assertIn("compose down -v --remove-orphans --rmi local", project.asked.read_text())


LESSONS = """# As aulas

## Aula 1 — Subir

Uma **imagem** é um pacote; veja `server.py`, e [o resto](resto.md).

```console
$ echo "porta $PORT" | tee $HERE/port; cat aula/minimo.yml
...
```

<!-- append to a.py: # fim -->
<!-- run docker: until test -e $HERE/go; do sleep 0.1; done -->

Depois do último bloco.

<!-- run docker: cp a.py $HERE/after -->

## Aula 2 — Parar

```console
$ trap 'touch $HERE/interrupted; exit 1' INT; echo pronto; while :; do sleep 0.1; done
pronto
^C
$ echo segundo
segundo
```

<!-- run docker: if read -r answer < /dev/tty; then touch $HERE/read; fi -->

Acabou.
"""


class TestPlain(unittest.TestCase):
    """Text as it is shown at a terminal."""

    def test_marks_are_not_shown(self) -> None:
        for text, shown in (
            ("Um **contêiner** é *isolado*.", "Um contêiner é isolado."),
            ("**`down`** e `a * b * c`", "down e a * b * c"),
            (
                "[o `arquivo`](../a.yml#b) e <http://localhost:5000/>",
                "o arquivo e http://localhost:5000/",
            ),
            ("<details><summary>Resposta</summary>", "Resposta"),
            ("### Título `a`", "Título a\n────────"),
            ("| a | b |\n|---|---|\n| `c` | d |\n", "a  b\nc  d"),
            ("| a | |\n|-|-|\n| long | `x \\| y` |\n\nz", "a\nlong  x | y\n\nz"),
            ("2 < 3 > 1; 2*3*4", "2 < 3 > 1; 2*3*4"),
        ):
            self.assertEqual(plain(text), shown)


class DemoCase(ProjectCase):
    """Tests with two short lessons."""

    def lessons(self, **files: str) -> Project:
        """Return a project with lessons, and no other document."""
        minimo = '    ports:\n      - "5000:5000"\n'
        texts = {"aula/README.md": LESSONS, "aula/minimo.yml": minimo, "a.py": "one\n"}
        project = self.project(**texts, **files)
        project.environment["PORT"] = ""
        (project.folder.parent / "go").touch()
        return project


class TestDemoFromAPipe(DemoCase):
    """A lesson without a terminal."""

    def test_a_lesson_from_its_first_word_to_its_last(self) -> None:
        port = console.free_port()
        project = self.lessons(**{".env": f"# macOS\nPORT={port}\n"})
        status, printed = project.run("demo", "1", typed="\n")
        self.assertEqual((status, project.left), (0, []))
        expected = [
            "A aula usa uma cópia do projeto, em ",
            f'A porta é {port}: nesta cópia, aula/minimo.yml tem "{port}:5000", e não "5000:5000"',
            "Aula 1 — Subir",
            "Uma imagem é um pacote; veja server.py, e o resto.",
            "$ echo ",
            f"\nporta {port}\n",
            f'"{port}:5000"\n',
            "(A demonstração acrescenta ao fim de a.py: # fim)",
            "(esperando…)",
            "Depois do último bloco.",
            "Fim: removendo os contêineres",
        ]
        rest = printed
        for each in expected:
            self.assertIn(each, rest)
            rest = rest.partition(each)[2]
        self.assertNotIn("Aula 2", printed)
        here = project.folder.parent
        self.assertEqual((here / "port").read_text(), f"porta {port}\n")
        self.assertEqual((here / "after").read_text(), "one\n# fim\n")
        self.assertIn("5000:5000", (project.folder / "aula/minimo.yml").read_text())

    def test_a_command_that_ctrl_c_ends(self) -> None:
        status, printed = self.lessons(**{".env": free()}).run("demo", "2", typed="\n\n")
        self.assertEqual(status, 0)
        self.assertIn("(Ctrl+C encerra)", printed)
        self.assertLess(printed.index("\npronto\n"), printed.index("\nsegundo\n"))

    def test_the_end_of_the_input_ends_it(self) -> None:
        project = self.lessons(**{".env": free()})
        self.assertEqual((project.run("demo", "1")[0], project.left), (0, []))
        self.assertFalse((project.folder.parent / "port").exists())

    def test_what_it_can_not_show_is_told_in_one_line(self) -> None:
        project = self.lessons()
        with socket.create_server(("", 0)) as listener:
            taken = str(listener.getsockname()[1])
            for lesson, port, message in (
                ("4", "", "LESSON=1: Subir; LESSON=2: Parar"),
                ("1", "abc", "PORT: abc não é uma porta"),
                ("1", "65536", "PORT: 65536 não é uma porta"),
                ("1", taken, f"A porta {taken} não está livre"),
            ):
                status, printed = project.run("demo", lesson, PORT=port)
                self.assertEqual((status, printed.count("\n")), (2, 1), printed)
                self.assertIn(message, printed)

    def test_nobody_reads_it(self) -> None:
        project = self.lessons(**{".env": free()})
        process = project.start("demo", "1", stdin=subprocess.PIPE)
        assert process.stdin and process.stdout
        self.assertTrue(select.select([process.stdout], [], [], SECONDS)[0])
        process.stdout.close()
        process.stdin.write("\n")
        process.stdin.close()
        process.wait(SECONDS)
        self.assertEqual((process.returncode, project.left), (1, []))


def free() -> str:
    """Return a line for .env with a port that is free."""
    return f"PORT={console.free_port()}\n"


class Terminal:
    """A lesson at a terminal, and somebody who types."""

    def __init__(self, project: Project, lesson: str) -> None:
        self.master, slave = pty.openpty()
        self.text = ""
        self.process = project.start(
            *("demo", lesson),
            stdin=slave,
            stdout=slave,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(slave, termios.TIOCSCTTY, 0),
        )
        os.close(slave)

    def wait_for(self, text: str) -> None:
        """Wait until a text appears, after what has been waited for before."""
        end = time.monotonic() + SECONDS
        while text not in self.text:
            ready, _, _ = select.select([self.master], [], [], max(end - time.monotonic(), 0))
            if not ready:
                raise AssertionError(f"no {text!r} in: {self.text}")
            self.text += os.read(self.master, 4096).decode(errors="replace")
        self.text = self.text.partition(text)[2]

    def type(self, text: str) -> None:
        """Type a text."""
        os.write(self.master, text.encode())


class TestDemoAtATerminal(DemoCase):
    """A lesson in front of a class."""

    def terminal(self, project: Project, lesson: str) -> Terminal:
        """Return a terminal in which a lesson is shown."""
        return Terminal(project, lesson)

    def test_enter_runs_a_command_and_ctrl_c_ends_a_wait(self) -> None:
        project = self.lessons(**{".env": free()})
        (project.folder.parent / "go").unlink()
        terminal = self.terminal(project, "1")
        terminal.wait_for("$ echo ")
        terminal.type("\n")
        terminal.wait_for("(esperando…)")
        time.sleep(0.3)
        terminal.type("\x03")
        terminal.wait_for("Fim: ")
        self.assertEqual(terminal.process.wait(SECONDS), 0)
        self.assertEqual(project.left, [])

    def test_ctrl_c_at_a_prompt_ends_the_lesson(self) -> None:
        project = self.lessons(**{".env": free()})
        terminal = self.terminal(project, "1")
        terminal.wait_for("$ echo ")
        terminal.type("\x03")
        terminal.wait_for("Fim: ")
        self.assertEqual(terminal.process.wait(SECONDS), 0)
        self.assertFalse((project.folder.parent / "port").exists())

    def test_ctrl_c_in_a_command_is_for_the_command(self) -> None:
        project = self.lessons(**{".env": free()})
        terminal = self.terminal(project, "2")
        terminal.wait_for("(Ctrl+C encerra) ")
        terminal.type("\n")
        terminal.wait_for("pronto")
        terminal.type("\x03")
        terminal.wait_for("$ echo segundo")
        self.assertTrue((project.folder.parent / "interrupted").exists())
        terminal.type("\n")
        terminal.wait_for("segundo\r\n")
        terminal.wait_for("Acabou.")
        self.assertEqual(terminal.process.wait(SECONDS), 0)

    def test_a_closed_window_or_sigterm_ends_it(self) -> None:
        for number in (signal.SIGHUP, signal.SIGTERM):
            for where in ("$ echo ", "(esperando…)"):
                with self.subTest(number, where=where):
                    project = self.lessons(**{".env": free()})
                    (project.folder.parent / "go").unlink()
                    terminal = self.terminal(project, "1")
                    terminal.wait_for("$ echo ")
                    if where != "$ echo ":
                        terminal.type("\n")
                        terminal.wait_for(where)
                    if number == signal.SIGHUP:
                        os.close(terminal.master)
                    else:
                        terminal.process.send_signal(number)
                    self.assertEqual(terminal.process.wait(SECONDS), 128 + number)
                    self.assertEqual(project.left, [])


if __name__ == "__main__":
    unittest.main()
