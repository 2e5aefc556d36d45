"""A lesson at the terminal: its text, and its commands one by one, each of which runs on Enter."""

import os
import re
import select
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from tools import console
from tools.console import Console
from tools.engine import PROJECT, CannotRunError, reserved
from tools.reading import HERE, SHOWN_PORT, Document, Edit, Prose, Step

LESSONS = HERE / "aula/README.md"
FIXED_PORT = "aula/minimo.yml"  # the only file whose port can't be set from outside
say = partial(print, flush=True)  # before what a command prints


def port() -> str:
    """Return the port for the lesson, from the environment or .env, as Compose would find it."""
    found = os.environ.get("PORT") or from_env_file("PORT") or SHOWN_PORT
    if not re.fullmatch(r"\d{1,5}", found) or not 0 < int(found) < 65536:
        raise CannotRunError(f"PORT: {found} não é uma porta")
    return found


def from_env_file(name: str) -> str:
    """Return a variable's value in the file .env, or nothing."""
    file = HERE / ".env"
    text = file.read_text(encoding="utf-8") if file.exists() else ""
    values = re.findall(rf"^(?:export )?{name}=(.*?)(?: #.*)?$", text, re.M)
    return values[-1].strip().strip("'\"") if values else ""


def lesson_items(document: Document, lesson: str) -> list[Step | Prose]:
    """Return what there is in a lesson; raise CannotRunError where there is no such lesson."""
    sections = dict.fromkeys(item.section for item in document.items)
    lessons = dict(re.findall(r"^## Aula (\d+) — (.*)$", "\n".join(sections), re.M))
    if lesson not in lessons:
        names = "; ".join(f"LESSON={number}: {name}" for number, name in lessons.items())
        raise CannotRunError(f"Não há a aula {lesson}. As aulas: {names}")
    title = f"## Aula {lesson} — {lessons[lesson]}"
    return [item for item in document.items if item.section == title]


def plain(text: str) -> str:
    """Return a text without Markdown's marks; headings are underlined instead."""
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)  # of a link, what is shown
    parts = re.split(r"`+([^`]+)`+", text)  # code is at the odd places, and stays as it is
    parts[::2] = map(without_marks, parts[::2])
    text = re.sub(r"^#+ (.*)$", underlined, "".join(parts), flags=re.M)
    return re.sub(r"(^\|.*\|\n)+", aligned, text, flags=re.M).strip("\n")


def without_marks(text: str) -> str:
    """Return a text, in which there is no code, without the marks inside lines, and of tables."""
    text = re.sub(r"<(https?://[^>]*)>", r"\1", text)
    text = re.sub(r"</?[a-z][^>]*>", "", text)
    text = re.sub(r"(?<![\w*])\*(\S[^*]*)\*(?![\w*])", r"\1", text)
    return re.sub(r"^\|[-|: ]+\|\n", "", text.replace("**", ""), flags=re.M)


def underlined(heading: re.Match[str]) -> str:
    """Return a heading with a line below it."""
    return f"{heading[1]}\n{'─' * len(heading[1])}"


def aligned(table: re.Match[str]) -> str:
    """Return a table with columns as wide as what is in them."""
    rows = [re.split(r"\s*(?<!\\)\|\s*", row)[1:-1] for row in table[0].splitlines()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=False)]
    return "".join(
        "  ".join(map(str.ljust, row, widths)).rstrip().replace("\\|", "|") + "\n" for row in rows
    )


class Demo:
    """A lesson that is being shown; ``shown`` runs its commands."""

    def __init__(self, shown: Console) -> None:
        self.shown, self.at_terminal = shown, sys.stdin.isatty()

    def introduce(self) -> None:
        """Say where the lesson takes place."""
        say(f"A aula usa uma cópia do projeto, em {self.shown.folder}")
        say(f"Um segundo terminal vê os mesmos contêineres: docker compose -p {PROJECT} ps")
        if self.shown.port != SHOWN_PORT and FIXED_PORT in self.shown.start:
            old, new = f'"{SHOWN_PORT}:{SHOWN_PORT}"', f'"{self.shown.port}:{SHOWN_PORT}"'
            self.shown.edit(Edit("replace", FIXED_PORT, old, new))
            say(f"A porta é {self.shown.port}: nesta cópia, {FIXED_PORT} tem {new}, e não {old}")
        say("Cada Enter executa o próximo comando. Ctrl+C, antes do Enter, encerra a aula.\n")

    def show(self, items: list[Step | Prose]) -> None:
        """Show a lesson's text, and run its commands."""
        for item in items:
            if isinstance(item, Prose):
                self.tell(item)
            elif item.shown and item.kind == "docker":
                self.type(item)
            elif item.kind == "docker":
                self.do_for_reader(item)

    def tell(self, item: Prose) -> None:
        """Print a piece of text, or a block that is only shown."""
        text = textwrap.indent(item.text, "    ") if item.is_block else plain(item.text)
        if text.strip():
            say(f"{text.rstrip()}\n")

    def do_for_reader(self, step: Step) -> None:
        """Do what is not a command of the text, and say so."""
        if step.edit:
            say(f"(A demonstração {step.edit.told()})")
        elif step.hidden == "background":
            say(f"(A demonstração executa, como em outro terminal: {step.command})")
        else:
            say("(esperando…)")
        status, printed = self.shown.do(step)
        if status:
            say(f"(não deu certo: {printed.strip() or step.command})")

    def type(self, step: Step) -> None:
        """Show a command; run it on Enter. Raise EOFError where no more input comes."""
        command = self.shown.command(step.command)
        how_to_end = " (Ctrl+C encerra)" if step.interrupt is not None else ""
        typed = command[-1].replace("\n", "\n> ")
        say(f"$ {typed}{how_to_end} ", end="")
        # In short waits: a signal just before a long one would not be seen until Enter.
        while self.at_terminal and not select.select([sys.stdin], [], [], 0.1)[0]:
            pass
        input()
        if self.at_terminal:
            with for_the_command(signal.SIGINT):
                subprocess.run(command, cwd=self.shown.folder, env=self.shown.environment)
            say()
        else:  # no Enter has been echoed
            say(f"\n{self.shown.run(step)[1]}")


@contextmanager
def for_the_command(number: signal.Signals) -> Iterator[None]:
    """Leave a signal to the command that runs: it would not get it if the signal were ignored."""
    before = signal.signal(number, console.ignore)
    try:
        yield
    finally:
        signal.signal(number, before)


def show(lesson: str) -> int:
    """Show a lesson until its end, Ctrl-C or the end of the input; return the exit status."""
    items, where = lesson_items(Document(LESSONS), lesson), port()
    with reserved("docker"):
        console.refuse_taken(where)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            with console.opened("docker", where) as shown:
                present(Demo(shown), items)
        except (KeyboardInterrupt, EOFError):
            pass
    return 0


def present(demo: Demo, items: list[Step | Prose]) -> None:
    """Show a lesson from its introduction to its last word."""
    try:
        demo.introduce()
        demo.show(items)
    finally:
        say("\nFim: removendo os contêineres, os volumes e a imagem desta aula.")
