"""The log: lines on standard output, which nobody ever waits for."""

import logging
import os
import select
from contextlib import suppress
from functools import cache

STDOUT = 1


@cache
def output() -> int:
    """Return the file number to write to, which is opened at the first line.

    A terminal is opened once more: select says that one is ready though few bytes fit into it.
    Only what is opened here refuses the others at once; the shell's own waits, as it did before.
    """
    with suppress(OSError):  # no terminal, or one that can't be opened
        return os.open(os.ttyname(STDOUT), os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)
    return STDOUT


def write(text: str) -> None:
    """Write ``text`` to standard output, as far as that takes it at once.

    The rest is left out: a reader who has stopped (Ctrl+S, a pager), a closed pipe and a full disk
    are no reason to stop counting.
    """
    data = text.encode(errors="backslashreplace")
    with suppress(OSError):
        # So many bytes fit into a pipe that is ready, without a wait (Python's manual, select).
        for start in range(0, len(data), select.PIPE_BUF):
            if not select.select([], [output()], [], 0)[1]:
                return
            part = data[start : start + select.PIPE_BUF]
            if os.write(output(), part) < len(part):
                return


class Handler(logging.Handler):
    """What ``logging`` is told, written so."""

    def emit(self, record: logging.LogRecord) -> None:
        write(self.format(record) + "\n")
