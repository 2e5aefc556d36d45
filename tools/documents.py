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
KINDS = ("", "local", "docker", "swarm")


def is_known(mode: str = "", what: str = "", *more: str) -> bool:
    """Tell whether these words are a use of this program."""
    return not more and (mode == "demo" or (mode == "test" and what in KINDS))


def perform(mode: str, what: str = "") -> int:
    """Test or demonstrate; return the exit status."""
    from tools import check, console, demo, engine, reading  # which an older Python can't read

    console.end_on_signals()
    try:
        return check.test(what or "docker") if mode == "test" else demo.show(what or "1")
    except (reading.DocumentError, engine.CannotRunError) as reason:
        print(reason)
    except BrokenPipeError:
        console.forget_terminal()
        return 1
    except OSError as error:
        print(f"{error.filename}: {error.strerror}" if error.filename else error.strerror)
    return 2


def main(*words: str) -> int:
    """Do what the words say; return the exit status."""
    if sys.version_info < OLDEST:
        print("É preciso Python 3.11 ou mais novo; se houver outro: make PYTHON=python3.12 ...")
        return 2
    if not is_known(*words):
        print("Uso: tools/documents.py test [local|docker|swarm], ou demo [1|2|3]")
        return 2
    try:
        return perform(*words)
    except KeyboardInterrupt:  # before signals are handled
        return 130


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # as with python3 -m
    sys.exit(main(*sys.argv[1:]))
