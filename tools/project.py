"""Copies of the project: of what git would have in a commit, not of what it ignores."""

import os
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from fnmatch import fnmatch
from pathlib import Path

from tools.reading import HERE


def copy_project(folder: Path) -> dict[str, bytes]:
    """Copy the project, without what git ignores, and return its files; link its packages."""
    start = {name: (HERE / name).read_bytes() for name in project_files()}
    for name, data in start.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
        shutil.copystat(HERE / name, folder / name)  # make looks at the times
    if (HERE / ".venv").exists():
        (folder / ".venv").symlink_to(HERE / ".venv")
    return start


def git(*arguments: str, given: str = "") -> list[str] | None:
    """Return the names that git prints about the project, or None where it knows nothing of it."""
    if not (HERE / ".git").exists() or not shutil.which("git"):
        return None
    command = ["git", "-C", str(HERE), *arguments, "-z"]
    done = subprocess.run(command, input=given, capture_output=True, text=True, timeout=60)
    failed = done.stderr or done.returncode > 1  # check-ignore: 1 if none is ignored
    return None if failed else [name for name in done.stdout.split("\0") if name]


def project_files() -> list[str]:
    """Return the names of the project's files, from its folder, without what git ignores."""
    names = git("ls-files", "--cached", "--others", "--exclude-standard")
    if names is None:
        return list(unpacked_files())
    return [name for name in names if (HERE / name).is_file()]


def unpacked_files() -> Iterator[str]:
    """Yield the project's files where there is no git, or no repository."""
    for root, folders, files in os.walk(HERE):
        inside = Path(root).relative_to(HERE)
        folders[:] = [each for each in folders if not is_ignored(inside / each)]
        yield from ((inside / each).as_posix() for each in files if not is_ignored(inside / each))


def is_ignored(path: Path) -> bool:
    """Tell whether .gitignore names a path or a folder on it, by the simple patterns of ours."""
    lines = (HERE / ".gitignore").read_text(encoding="utf-8").splitlines()
    patterns = [".git", *(line for line in lines if line and not line.startswith("#"))]
    return any(
        fnmatch(each.as_posix() if pattern.startswith("/") else each.name, pattern.strip("/"))
        for pattern in patterns
        for each in (path, *path.parents)
    )


def without_ignored(names: Iterable[str]) -> list[str]:
    """Return the names without those that git ignores."""
    names = list(names)
    if not names:
        return []
    ignored = git("check-ignore", "--stdin", given="".join(f"{name}\0" for name in names))
    if ignored is None:
        return [name for name in names if not is_ignored(Path(name))]
    return [name for name in names if name not in ignored]
