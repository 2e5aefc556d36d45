"""What tests wait for, with a limit."""

import time
from collections.abc import Callable

SECONDS = 60  # for what should come about much sooner, on the slowest machine


def eventually(check: Callable[[], object], seconds: float = SECONDS) -> None:
    """Wait for a condition; raise AssertionError if it does not come about."""
    end = time.monotonic() + seconds
    while not check():
        if time.monotonic() > end:
            raise AssertionError(f"it did not come about within {seconds} seconds")
        time.sleep(0.02)
