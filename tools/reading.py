"""Read the documents: their commands, the pieces of files that they show, their links.

A block fenced as ``console`` needs Docker; ``console local`` does not; ``console swarm`` makes a
Swarm of this machine, and ``console swarm2`` adds the machine of the Docker context ``maquina2``.
In a block "$ " starts a command, "> " continues it, and the rest is what it prints: "..." stands
for any text in a line or, alone in one, for any lines. "^C" ends a command that stays in the
foreground, once the lines above it have been printed. Other blocks are only shown.

Comments, on lines of their own and out of the reader's sight, say what else there is to do:

    <!-- run KIND: COMMAND -->              run a command
    <!-- background KIND: COMMAND -->       start one, which ends with the document
    <!-- replace in FILE: OLD => NEW -->    in the place of the reader: OLD is there exactly once
    <!-- append to FILE: LINE -->           the same, at the end; {now} is the time, which is new
    <!-- restore FILE -->                   as it was at the start
    <!-- port 5000 -->                      before the first command: not on a port of its own

and, directly above a block:

    <!-- insert into FILE before: LINE -->  put the block there, as the reader would
    <!-- from FILE -->                      the block is a piece of that file
    <!-- picture FILE -->                   that SVG is a picture of the block
    <!-- fails -->                          its last command ends with a status other than 0
    <!-- not run: WHY -->                   a block of the shell's which only the reader runs
"""

import os
import re
import textwrap
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

HERE = Path(__file__).resolve().parent.parent
DOCUMENTS = [HERE / "README.md", *sorted(HERE.glob("aula/*.md")), *sorted(HERE.glob("swarm/*.md"))]
SHOWN_PORT = "5000"
KINDS = ("local", "docker", "swarm", "swarm2")
COMMENTS = {
    "run": r"run (?P<kind>\S+): (?P<command>.+)",
    "background": r"background (?P<kind>\S+): (?P<command>.+)",
    "replace": r"replace in (?P<file>.+?): (?P<old>.+?) => (?P<new>.+)",
    "append": r"append to (?P<file>.+?): (?P<new>.+)",
    "restore": r"restore (?P<file>.+)",
    "port": rf"port {SHOWN_PORT}",
    "insert": r"insert into (?P<file>.+?) before: (?P<old>.+)",
    "from": r"from (?P<file>.+)",
    "picture": r"picture (?P<file>.+\.svg)",
    "fails": r"fails",
    "not run": r"not run: .+",
}
ABOVE_A_BLOCK = ("insert", "from", "picture", "fails", "not run")
SHELLS = ("sh", "bash", "shell")


class DocumentError(Exception):
    """A document holds something that looks like one of our forms and is not."""


@dataclass
class Edit:
    """A change of ``file`` in the place of the reader; ``action`` is the comment's first word."""

    action: str
    file: str
    old: str = ""
    new: str = ""

    def told(self) -> str:
        """Return what the change does, as the rest of a sentence in Portuguese."""
        return {
            "append": f"acrescenta ao fim de {self.file}: {self.new}",
            "insert": f"põe o bloco acima em {self.file}, antes da linha {self.old}",
            "replace": f"troca {self.old} por {self.new} em {self.file}",
            "restore": f"desfaz as mudanças em {self.file}",
        }[self.action]

    def edited(self, text: str) -> str:
        """Return the file's text after the change; raise ValueError where it finds no place."""
        if self.action == "append":
            return f"{text}{self.new}\n"
        if self.action == "replace":
            if text.count(self.old) != 1:
                raise ValueError(
                    f"{self.file}: {text.count(self.old)} vezes, e não uma: {self.old}"
                )
            return text.replace(self.old, self.new)
        lines = text.splitlines(keepends=True)
        for number, line in enumerate(lines):
            if line.strip() == self.old:
                return "".join([*lines[:number], self.new, *lines[number:]])
        raise ValueError(f"{self.file}: não tem a linha: {self.old}")


@dataclass
class Step:
    """A command of a document or an edit, where it stands, and what the command should print."""

    where: str
    kind: str
    section: str
    command: str = ""
    expected: list[str] = field(default_factory=list)
    hidden: str = ""  # "run" or "background", for one in a comment
    interrupt: int | None = None  # after how many expected lines Ctrl-C is pressed
    fails: bool = False  # it should end with a status other than 0
    edit: Edit | None = None

    @property
    def shown(self) -> bool:
        """Tell whether it is a command that the reader sees."""
        return not self.hidden and not self.edit


@dataclass
class Prose:
    """Lines of text, or a block that is only shown."""

    section: str
    text: str
    is_block: bool = False


@dataclass
class Block:
    """The text of a fenced block, and its commands, which a comment connects with ``file``."""

    where: str
    action: str
    file: str
    text: str
    steps: list[Step]


class Document:
    """A document that has been read: its ``items`` in order and the ``blocks`` that name a file.

    Raises DocumentError, with the place, for anything that looks like one of ours and is not.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.name = path, os.path.relpath(path, HERE)
        self.items: list[Step | Prose] = []
        self.blocks: list[Block] = []
        self.port_as_written = False
        self.title = ""
        self.section = ""
        self.where = ""
        self.above = ""  # the action of a comment that awaits a block
        self.said: dict[str, str] = {}  # what it says
        lines = enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        for number, line in lines:
            self.where = f"{self.name}:{number}"
            if line.startswith("```"):
                self.add_block(line.removeprefix("```").split(), self.fenced(lines))
            elif "<!--" in re.sub("`[^`]*`", "", line):
                self.add_comment(line)
            else:
                self.add_text(line)
        self.expect_no_block()

    @property
    def steps(self) -> list[Step]:
        """The commands and edits, in order."""
        return [item for item in self.items if isinstance(item, Step)]

    def error(self, text: str) -> DocumentError:
        """Return the exception for the line that is being read."""
        return DocumentError(f"{self.where}: {text}")

    def expect_no_block(self) -> None:
        """Raise DocumentError where the comment above was about a block."""
        if self.above:
            raise self.error(f"falta o bloco logo abaixo de <!-- {self.above} ... -->")

    def fenced(self, lines: Iterator[tuple[int, str]]) -> list[str]:
        """Return the lines up to the fence that closes a block."""
        body: list[str] = []
        for _, line in lines:
            if line.startswith("```"):
                return body
            body.append(line)
        raise self.error("o bloco não termina")

    def add_text(self, line: str) -> None:
        """Take a line outside blocks."""
        if line.strip().startswith(("```", "~~~")):
            raise self.error("um bloco começa com ``` na margem")
        self.expect_no_block()
        if line.startswith("# "):
            self.title = line.removeprefix("# ")
        elif line.startswith("## "):
            self.section = line
        last = self.items[-1] if self.items else None
        if isinstance(last, Prose) and not last.is_block and last.section == self.section:
            last.text += f"{line}\n"
        else:
            self.items.append(Prose(self.section, f"{line}\n"))

    def add_comment(self, line: str) -> None:
        """Take a comment."""
        self.expect_no_block()
        said = re.fullmatch(r"<!-- (.*) -->", line)
        for action, form in COMMENTS.items():
            match = said and re.fullmatch(form, said[1])
            if match:
                return self.do(action, match.groupdict())
        raise self.error(f"comentário desconhecido: {line}")

    def do(self, action: str, said: dict[str, str]) -> None:
        """Do what a comment says, or keep it for the block below."""
        if action in ABOVE_A_BLOCK:
            self.above, self.said = action, said
        elif action in ("run", "background"):
            self.add_step(**said, hidden=action)
        elif action != "port":
            if action == "append":
                said["new"] = said["new"].replace("{now}", time.asctime())
            self.add_step("docker", edit=Edit(action, **said))
        elif self.steps:
            raise self.error("depois do primeiro comando")
        else:
            self.port_as_written = True

    def add_step(self, kind: str, **step: Any) -> Step:
        """Add a step of a kind, which has to exist."""
        if kind not in KINDS:
            raise self.error(f"tipo desconhecido: {kind} (há {', '.join(KINDS)})")
        added = Step(self.where, kind, self.section, **step)
        self.items.append(added)
        return added

    def add_block(self, info: list[str], body: list[str]) -> None:
        """Take a fenced block with what the comment above says of it."""
        where, action, self.above = self.where, self.above, ""
        text, before = "".join(line + "\n" for line in body), len(self.steps)
        if info[:1] == ["console"]:
            if action in ("not run", "insert"):
                raise self.error(f"<!-- {action} ... --> é para um bloco que não seja console")
            self.add_commands(" ".join(info[1:]) or "docker", body, fails=action == "fails")
        else:
            self.refuse_commands(info, body, action)
            self.items.append(Prose(self.section, text, is_block=True))
        if action == "insert":
            self.add_step("docker", edit=Edit(action, **self.said, new=text))
        elif action in ("from", "picture"):
            file = self.said["file"]
            self.blocks.append(Block(where, action, file, text, self.steps[before:]))

    def refuse_commands(self, info: list[str], body: list[str], action: str) -> None:
        """Raise DocumentError where a block that is not ``console`` looks as if it were to run."""
        if any(line.startswith("$ ") for line in body):
            raise self.error("um bloco com comandos é console")
        if info and info[0] in SHELLS and action != "not run":
            raise self.error(f"um bloco {info[0]} diz por quê: <!-- not run: ... -->")
        if action in ("picture", "fails"):
            raise self.error(f"<!-- {action} ... --> é para um bloco console")

    def add_commands(self, kind: str, body: list[str], fails: bool) -> None:
        """Take the commands of a console block and what they print; the last may fail."""
        step = None
        first = int(self.where.rpartition(":")[2]) + 1
        for number, line in enumerate(body, first):
            self.where = f"{self.name}:{number}"
            if line.startswith("$ "):
                step = self.add_step(kind, command=line[2:])
            elif step is None:
                raise self.error("o bloco começa com um comando: $ ...")
            elif line.startswith("> ") and not step.expected:
                step.command += f"\n{line[2:]}"
            elif line == "^C":
                step.interrupt = len(step.expected)
            else:
                step.expected.append(line)
        if step:
            step.fails = fails


def prose(path: Path) -> str:
    """Return a document's text without its fenced blocks."""
    text = path.read_text(encoding="utf-8")
    return re.sub(r"^```.*\n(?:.*\n)*?```$", "", text, flags=re.M)


def anchors(path: Path) -> set[str]:
    """Return the names that GitHub gives a document's headings."""
    headings = re.findall(r"^#+ (.*)$", prose(path), re.M)
    return {re.sub(r"[^\w\- ]", "", each.strip().lower()).replace(" ", "-") for each in headings}


def dead_links(path: Path) -> list[str]:
    """Return a document's relative links that lead nowhere."""
    wrong = []
    for link in re.findall(r"\]\((?!\w+:)([^)\s]+)\)", prose(path)):
        file, _, anchor = link.partition("#")
        target = (path.parent / file) if file else path
        if not target.exists() or (anchor and anchor not in anchors(target)):
            wrong.append(f"{os.path.relpath(path, HERE)}: {link} não existe")
    return wrong


def is_piece(text: str, file: Path) -> bool:
    """Tell whether a file has these lines, however far indented."""
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    size = text.count("\n")
    windows = ("".join(lines[start : start + size]) for start in range(len(lines) - size + 1))
    return textwrap.dedent(text) in map(textwrap.dedent, windows)


def is_picture(text: str, file: Path) -> bool:
    """Tell whether an SVG shows these lines: of a line with "...", all else."""
    shown = iter(picture_lines(file))
    for line in text.splitlines():
        parts = [part.strip() for part in line.split("...")]
        if any(parts) and not any(all(part in each for part in parts) for each in shown):
            return False
    return True


def picture_lines(file: Path) -> list[str]:
    """Return the lines of text that an SVG shows, from top to bottom."""
    lines: dict[float, str] = {}
    for element in ElementTree.parse(file).iter("{http://www.w3.org/2000/svg}text"):
        height = float(element.get("y", 0))
        lines[height] = lines.get(height, "") + "".join(element.itertext()).replace("\xa0", " ")
    return [lines[height] for height in sorted(lines)]


def faults(document: Document) -> list[str]:
    """Return what can be seen to be wrong with a document without running it."""
    return wrong_blocks(document) + dead_links(document.path)


def wrong_blocks(document: Document) -> list[str]:
    """Return the blocks that are not in the file, or the picture, which they are said to be in."""
    tests = {"from": is_piece, "picture": is_picture}
    wrong = []
    for block in document.blocks:
        file = HERE / block.file
        if not file.is_file() or not tests[block.action](block.text, file):
            wrong.append(f"{block.where}: não está em {block.file}")
    return wrong
