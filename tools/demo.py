"""Show a lesson at the terminal: its text, and its commands, each of which runs on Enter.

python3 tools/demo.py 1 (aula 1), 2 (aula 2) or 3 (aula/extra.md). It needs no packages.
"""

import re
import signal
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools.project_copy import COMMAND, HERE, Copy, project_copy, refuse

BLOCK = re.compile(r"^```(.*)\n((?:.*\n)*?)```\n|^<!-- run: (.*) -->\n", re.M)


def lesson(number: str) -> str:
    """Return the text of a lesson; exit, in one line, if there is none."""
    if number == "3":
        return (HERE / "aula/extra.md").read_text(encoding="utf-8")
    text = (HERE / "aula/README.md").read_text(encoding="utf-8")
    found = re.search(rf"^## Aula {re.escape(number)} .*?(?=^## |\Z)", text, re.M | re.S)
    if not found:
        sys.exit("As aulas são LESSON=1, LESSON=2 e LESSON=3")
    return found[0]


def show(text: str, copy: Copy) -> None:
    """Show a lesson; run its commands on Enter, and at once what its comments say."""
    end = 0
    for match in BLOCK.finditer(text):
        tell(text[end : match.start()])
        end = match.end()
        info, body, hidden = match.groups()
        if hidden:
            print("(…)\n", flush=True)
            status, _ = copy.run(hidden)
            if status != 0:
                print(f"(não deu certo: {hidden})\n")
        elif info in ("console", "console fails"):
            for command in COMMAND.finditer(body):
                type_command(command[1], copy)
        else:
            copy.block.write_text(body, encoding="utf-8")
            print(body)
    tell(text[end:])


def tell(text: str) -> None:
    """Print a text without its comments, and only what is seen of its links."""
    text = re.sub(r"^<!--.*-->\n", "", text, flags=re.M)
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text).strip("\n")
    if text:
        print(f"{text}\n")


def type_command(command: str, copy: Copy) -> None:
    """Show a command; on Enter run it at the terminal, where Ctrl+C is for it alone."""
    input(f"$ {command} ")
    # Not ignored: the command would inherit that.
    signal.signal(signal.SIGINT, lambda number, frame: None)
    subprocess.run(copy.bash(command), cwd=copy.folder, env=copy.environment)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    print()


def main(number: str) -> None:
    """Show a lesson until its end, or until Ctrl+C before an Enter."""
    text = lesson(number)
    refuse("docker")
    try:
        with project_copy("docker") as copy:
            print(f"A aula roda em uma cópia do projeto: {copy.folder}")
            print("Cada Enter roda o próximo comando. Ctrl+C antes do Enter encerra.\n")
            try:
                show(text, copy)
            finally:
                print("\nFim: removendo o que esta aula criou no Docker.")
    except (KeyboardInterrupt, EOFError):
        pass


if __name__ == "__main__":
    main(*sys.argv[1:])
