"""Temporary folders that a server of another user can enter, and where there can be none."""

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager


def place() -> str:
    """Return the folder for what is temporary; raise OSError, with its name, if it is no use."""
    try:
        return tempfile.gettempdir()
    except FileNotFoundError:
        tried = os.environ.get("TMPDIR") or "/tmp"
        reason = "não serve de pasta temporária; TMPDIR pode indicar outra"
        raise FileNotFoundError(errno.ENOENT, reason, tried) from None


@contextmanager
def temporary_folder() -> Iterator[str]:
    """Yield the path of a new folder, which is removed; others can reach what they know in it."""
    with tempfile.TemporaryDirectory(prefix="contador-", dir=place()) as folder:
        os.chmod(folder, 0o711)
        yield folder
