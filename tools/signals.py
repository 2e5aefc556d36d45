"""Signals that end a program in good order; quickly imported, to be called before all else is."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

received = 0  # the first signal that came
held = 0  # blocks of signals_held that are being executed


def end_on_signals() -> None:
    """From now on, raise KeyboardInterrupt with its number on the first SIGINT, SIGTERM or SIGHUP.

    Later ones change nothing, so that they don't interrupt what cleans up. Where SIGHUP is ignored
    already, as nohup does, it stays so.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, interrupt)


def interrupt(number: int, frame: FrameType | None) -> None:
    """Handle a signal: see ``end_on_signals``."""
    global received
    if received:
        return
    received = number
    if not held:
        raise KeyboardInterrupt(number)


@contextmanager
def signals_held() -> Iterator[None]:
    """Put off until the end of the block what a signal would do; a block may stand in another."""
    global held
    before = received
    held += 1
    try:
        yield
    finally:
        held -= 1
        if received and not before and not held:
            raise KeyboardInterrupt(received)
