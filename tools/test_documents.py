"""Run the documents' commands, and compare what they print with what is written.

The variable DOCUMENTS says which: local (without Docker; the default), docker or swarm. A block
fenced as `console` needs Docker; `console local` does not; `console swarm` makes a Swarm of this
machine, and `console swarm2` adds the machine of the Docker context maquina2. After these words,
`fails` says that the last command of the block does. "$ " starts a command, and the rest is what it
prints: "..." stands for anything in a line or, alone in one, for any lines.

A comment of one line, <!-- run: COMMAND --> (run local: and so on), is a command that the reader
does not see. Its variable BLOCK names a file with the last yaml or python block above it.
"""

import difflib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from unittest import TestCase, TestLoader, TestSuite

from sybil import Document, Example, Region
from sybil.parsers.markdown.lexers import DirectiveInHTMLCommentLexer, FencedCodeBlockLexer

from tools.project_copy import COMMAND, HERE, KINDS, Copy, project_copy, refuse
from tools.servers import free_port

KIND = os.environ.get("DOCUMENTS", "local")
ONLY = os.environ.get("ONLY", "")  # a part of the path of the only document whose commands run
CONSOLE = re.compile(r"console(?: (local|swarm2?))?( fails)?")
BLOCKS = ("yaml", "python")


class Part(NamedTuple):
    """A command of a kind, what it prints and whether it fails; or a yaml or python block."""

    kind: str
    text: str
    expected: str = ""
    fails: bool = False


def parse(document: Document) -> Iterator[Region]:
    """Yield a region for Sybil for each command, and for each yaml or python block."""
    for block in FencedCodeBlockLexer(".+")(document):
        language = block.lexemes["language"]
        # Not the lexer's text, which is dedented.
        start = document.text.index("\n", block.start) + 1
        end = document.text.rindex("\n", start - 1, block.end) + 1
        if language in BLOCKS:
            yield Region(start, end, Part(language, document.text[start:end]))
        elif language.startswith("console"):
            yield from parse_console(document, language, start, end)
    for comment in DirectiveInHTMLCommentLexer("run(?: local| swarm2?)?")(document):
        kind = comment.lexemes["directive"].removeprefix("run").strip() or "docker"
        yield Region(comment.start, comment.end, Part(kind, comment.lexemes["arguments"], "..."))


def parse_console(document: Document, info: str, start: int, end: int) -> Iterator[Region]:
    """Yield a block's commands; raise ValueError if it is none of ours."""
    match = CONSOLE.fullmatch(info)
    found = list(COMMAND.finditer(document.text, start, end))
    if not match or not found or found[0].start() != start:
        raise ValueError(f"{document.path}, {document.line_column(start)}: {info}")
    for each in found:
        fails = each is found[-1] and match[2] is not None
        part = Part(match[1] or "docker", each[1], each[2], fails)
        yield Region(each.start(), each.end(), part)


def difference(expected: str, printed: str) -> str:
    """Return as a diff how what has been printed differs from what is written, or nothing."""
    written = [line.rstrip() for line in expected.splitlines()]
    shown = [line.rstrip() for line in printed.splitlines()]
    pattern = ""
    for line in written:
        text = re.escape(line).replace(r"\.\.\.", ".*") + r"\n"
        pattern += r"(.*\n)*" if line == "..." else text
    if re.fullmatch(pattern, "".join(f"{line}\n" for line in shown)):
        return ""
    return "\n".join(difflib.unified_diff(written, shown, "escrito", "impresso", lineterm=""))


def where(example: Example) -> str:
    """Return the file and the line of an example."""
    return f"{os.path.relpath(example.path, HERE)}:{example.line}"


def run(document: Document, kind: str) -> None:
    """Run a document's commands in a copy; raise AssertionError for the first that is wrong."""
    with project_copy(kind) as copy:
        if kind == "local":  # port 5000 may be taken, as by macOS
            copy.environment["PORT"] = str(free_port())
        for example in document:
            part = example.parsed
            if part.kind in BLOCKS:
                copy.block.write_text(part.text, encoding="utf-8")
            elif part.kind in KINDS[kind]:
                check(part, copy, f"{where(example)}: {part.text}")


def check(command: Part, copy: Copy, told: str) -> None:
    """Run a command; raise AssertionError if it is wrong, and say as what it is ``told``."""
    if command.kind != "local":
        print(told, flush=True)
    port = copy.environment.get("PORT", "5000")
    status, printed = copy.run(command.text.replace("5000", port))
    wrong = difference(command.expected, printed)
    if wrong or (status != 0) != command.fails:
        raise AssertionError(f"{told}\n(código {status})\n{wrong or printed}")


class TestDocuments(TestCase):
    def test_commands(self) -> None:
        for document in DOCUMENTS:
            if ONLY in document.path and any(each.parsed.kind in KINDS[KIND] for each in document):
                with self.subTest(document.path):
                    run(document, KIND)

    def test_runner_fails_where_it_should(self) -> None:
        right = "```console local\n$ printf 'a 1\\nb'\na ...\n...\nb\n```\n"
        run_text(right)
        wrong_line = right.replace("\nb\n", "\nc\n")
        prints_less = right.replace("\\nb'", "'")
        fails = right.replace("b'", "b'; false")
        for text in (wrong_line, prints_less, fails, f"<!-- run local: false -->\n{right}"):
            with self.subTest(text), self.assertRaises(AssertionError):
                run_text(text)

    def test_a_command_starts_where_the_one_before_it_ended(self) -> None:
        run_text("```console local\n$ cd aula\n```\n<!-- run local: test -f ajuda.md -->\n")

    def test_shown_blocks_are_pieces_of_files(self) -> None:
        patterns = ("*.yml", "*.py", "[a-z]*/*.yml", "[a-z]*/*.py")
        paths = [path for pattern in patterns for path in HERE.glob(pattern)]
        files = "".join(f"\n{path.read_text(encoding='utf-8')}" for path in paths)
        step_below = ""
        for example in reversed(EXAMPLES):
            kind, text, *_ = example.parsed
            if kind in BLOCKS and f"\n{text}" not in files:
                self.assertIn("$BLOCK", step_below, where(example))
            step_below = text

    def test_comments_are_steps(self) -> None:
        for document in DOCUMENTS:
            for comment in re.findall(r"^ *<!--.*", document.text, re.M):
                self.assertRegex(comment, r"^<!-- run(| local| swarm2?): .* -->$", document.path)

    def test_links(self) -> None:
        for document in DOCUMENTS:
            for link in re.findall(r"\]\((?!\w+:)([^)\s]+)\)", document.text):
                name, _, anchor = link.partition("#")
                target = Path(document.path).parent / (name or Path(document.path).name)
                self.assertTrue(target.exists(), f"{document.path}: {link}")
                self.assertIn(anchor, ["", *anchors(target)], document.path)

    def test_first_lessons_need_no_other_program(self) -> None:
        for example in EXAMPLES:
            is_shown = example.document.text.startswith("$ ", example.start)
            if is_shown and where(example).startswith("aula/README.md"):
                bare = re.sub(r"\"[^\"]*\"|'[^']*'", "", example.parsed.text)
                self.assertRegex(bare, r"^(docker|cd|cp|rm|curl) [^|&;<>`\\\n]*$", where(example))


def run_text(text: str) -> None:
    """Run a text's commands that need no Docker."""
    document = Document(text, str(HERE / "documento.md"))
    for region in parse(document):
        document.add(region)
    run(document, "local")


def anchors(path: Path) -> list[str]:
    """Return the names that GitHub gives to a document's headings."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.M)
    return [re.sub(r"[^\w\- ]", "", each.strip().lower()).replace(" ", "-") for each in headings]


def load_tests(loader: TestLoader, tests: TestSuite, pattern: str | None) -> TestSuite:
    """Exit, in one line, where the commands can't run; else return the tests."""
    if KIND != "local":
        refuse(KIND)
    if KINDS[KIND] == ["swarm"]:
        print("Sem a variável MAQUINA1, os comandos da segunda máquina não rodam")
    return tests


PATHS = sorted([*HERE.glob("*.md"), *HERE.glob("[a-z]*/*.md")])
DOCUMENTS = [Document.parse(str(path), parse) for path in PATHS]
EXAMPLES = [example for document in DOCUMENTS for example in document]
