"""Draw the pictures of the documents: a terminal in which a block's commands have run, as SVG.

``make picture`` runs each block below a ``<!-- picture FILE -->`` in Docker and writes its FILE.
Of a long output only the last lines are drawn, below "...".
"""

import io
import re
import sys

from rich.console import Console
from rich.text import Text

from tools import console
from tools.console import CannotRunError
from tools.reading import DOCUMENTS, HERE, Block, Document, DocumentError

COLUMNS = 78
LONGEST, LAST = 8, 3  # lines of one command's output: what is drawn in full, and else what is left


def drawing(svg: str) -> str:
    """Return an SVG of rich's without the addresses of web fonts and of rich itself."""
    svg = re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.S)
    svg = re.sub(r"<!--.*?-->\s*", "", svg, flags=re.S)
    return re.sub(r"[ \t]+$", "", svg, flags=re.M)


def draw(title: str, commands: list[tuple[str, str]]) -> str:
    """Return an SVG of a terminal in which each command has printed its text."""
    terminal = Console(record=True, width=COLUMNS, file=io.StringIO())
    for command, printed in commands:
        terminal.print(Text.assemble(("$ ", "bold green"), (command, "bold")))
        lines = printed.splitlines()
        if len(lines) > LONGEST:
            terminal.print(Text("...", "dim"))
            lines = lines[-LAST:]
        for line in lines:
            terminal.print(Text(line))
    return drawing(terminal.export_svg(title=title, unique_id="terminal"))


def perform(document: Document, block: Block) -> list[tuple[str, str]]:
    """Run a document up to the end of a block; return the block's commands and what they print.

    Raises CannotRunError where a command prints something else than the document says.
    """
    commands = []
    with console.opened("docker", console.free_port()) as shown:
        for step in console.todo(document, "docker"):
            status, printed = shown.do(step)
            printed = shown.as_documented(printed)
            wrong = console.difference(step, status, printed)
            if wrong:
                raise CannotRunError(wrong)
            if step in block.steps:
                commands.append((step.command, printed))
            if step == block.steps[-1]:
                break
    return commands


def draw_all() -> None:
    """Draw the pictures of all documents."""
    documents = [Document(path) for path in DOCUMENTS]
    with console.reserved("docker"):
        for document in documents:
            for block in document.blocks:
                if block.action == "picture":
                    svg = draw(document.title, perform(document, block))
                    (HERE / block.file).write_text(svg, encoding="utf-8")
                    print(f"{block.file}: feito")


def main() -> int:
    """Draw the pictures; return the exit status."""
    console.end_on_signals()
    try:
        draw_all()
    except (DocumentError, CannotRunError) as reason:
        print(reason)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
