"""The log: lines on standard output, which nobody ever waits for."""

import logging
import os
import select
from contextlib import suppress

STDOUT = 1


def write(text: str) -> None:
    """Write ``text`` to standard output, as far as that takes it at once.

    The rest is left out: a reader who has stopped (Ctrl+S, a pager), a closed pipe and a full disk
    are no reason to stop counting.
    """
    data = text.encode(errors="backslashreplace")
    with suppress(OSError):
        # So many bytes fit into a pipe that is ready, without a wait (Python's manual, select).
        for start in range(0, len(data), select.PIPE_BUF):
            if not select.select([], [STDOUT], [], 0)[1]:
                return
            os.write(STDOUT, data[start : start + select.PIPE_BUF])


class Handler(logging.Handler):
    """What ``logging`` is told, written so."""

    def emit(self, record: logging.LogRecord) -> None:
        write(self.format(record) + "\n")
