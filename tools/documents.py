"""The documents as tests, and a lesson as a demo: run their commands, compare what they print.

    python3 tools/documents.py test [local|docker|swarm]    the commands that need just that
    python3 tools/documents.py demo [1|2|3]                 a lesson: each Enter runs a command

A test fails where a command fails, prints something else, or leaves something behind; with status
2 where nothing could be run. How a document says what to do is told in reading.py; where and how
it is done, in console.py. Python 3.11 is enough for them: this file tells an older one.
"""

import sys
from pathlib import Path

OLDEST = (3, 11)


def main(mode: str = "", what: str = "") -> int:
    """Test or demonstrate; return the exit status."""
    if sys.version_info < OLDEST:
        print("É preciso Python 3.11 ou mais novo; se houver outro: make PYTHON=python3.12 ...")
        return 2
    from tools import console, demo, reading  # which an older Python can't read

    console.end_on_signals()
    try:
        if mode == "test" and what in ("", "local", "docker", "swarm"):
            return console.test(what or "docker")
        if mode == "demo":
            return demo.show(what or "1")
    except (reading.DocumentError, console.CannotRunError) as reason:
        print(reason)
        return 2
    except BrokenPipeError:
        console.forget_terminal()
        return 1
    print("Uso: tools/documents.py test [local|docker|swarm], ou demo [1|2|3]")
    return 2


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # as with python3 -m
    sys.exit(main(*sys.argv[1:]))
