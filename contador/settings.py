"""Settings from the environment, and what is said where one can't be used."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

Value = TypeVar("Value")


class BadSetting(Exception):
    """A setting can't be used; the text says which, and not its value: it may be a secret."""


def setting(name: str, default: str, parse: Callable[[str], Value], expected: str) -> Value:
    """Return ``parse`` of the variable or, where it is absent or empty, of ``default``.

    Raise BadSetting, with what is ``expected``, where ``parse`` raises anything.
    """
    try:
        return parse(os.environ.get(name) or default)
    except Exception:
        raise BadSetting(f"{name}: valor inválido; esperado: {expected}") from None


def port_number(text: str) -> int:
    """Return the number in ``text``; raise ValueError where it is none from 0 to 65535."""
    number = int(text)
    if not 0 <= number <= 65535:
        raise ValueError(text)
    return number


def yes_or_no(text: str) -> bool:
    """Return True for ``1`` and False for ``0``; raise ValueError for anything else."""
    if text not in ("0", "1"):
        raise ValueError(text)
    return text == "1"


def contents_of(path: str) -> str:
    """Return what a file holds, without the end of line; raise OSError or, if empty, ValueError."""
    text = Path(path).read_text(encoding="utf-8").rstrip("\r\n")
    if not text:
        raise ValueError(path)
    return text


def password(default: str) -> str:
    """Return POSTGRES_PASSWORD as it is or, without it, what POSTGRES_PASSWORD_FILE names holds.

    A file is how Docker hands a secret over. Raise BadSetting where it can't be read, or is empty.
    """
    given = os.environ.get("POSTGRES_PASSWORD")
    if given:
        return given
    if os.environ.get("POSTGRES_PASSWORD_FILE"):
        return setting("POSTGRES_PASSWORD_FILE", "", contents_of, "um arquivo com a senha")
    return default


@contextmanager
def told_in_one_line(is_program: bool) -> Iterator[None]:
    """Turn BadSetting into a line and exit status 2, where this is the program that was started.

    A program that only imports the module gets the exception.
    """
    try:
        yield
    except BadSetting as error:
        if not is_program:
            raise
        print(error, file=sys.stderr)
        sys.exit(2)
