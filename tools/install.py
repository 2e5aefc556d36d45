"""The virtual environment: made by one ``make`` at a time, and of what is pinned.

    python3 tools/install.py .venv/.run FILE...    a new one, with what the requirement files pin
    python3 tools/install.py .venv/.dev FILE...    more, into the one that is there

The first argument is touched at the end: nothing is done where it is newer than the files.
"""

import fcntl
import subprocess
import sys
from pathlib import Path

OLDEST = (3, 11)
NEW = ".run"  # the marker of an environment that is made from nothing
# Not its scripts: they fail in a deep folder, or in one with a space.
PIP = ["-m", "pip", "install", "-q", "--disable-pip-version-check", "--require-hashes"]


def is_done(marker: Path, files: "list[Path]") -> bool:
    """Tell whether what the files pin was installed meanwhile."""
    if not marker.exists():
        return False
    return all(marker.stat().st_mtime >= file.stat().st_mtime for file in files)


def install(marker: Path, files: "list[Path]", lock: int) -> int:
    """Install what the files pin; return the status of what failed, or 0.

    The lock is handed on: where this program is killed, it lasts until pip ends too. How long that
    takes is the network's affair, for which pip has time-outs.
    """
    folder = marker.parent
    pip = [str(folder / "bin/python"), *PIP]
    for file in files:
        pip += ["-r", str(file)]
    commands = [pip]
    if marker.name == NEW:
        commands.insert(0, [sys.executable, "-m", "venv", "--clear", str(folder)])
    for command in commands:
        print(" ".join(command), flush=True)
        status = subprocess.run(command, pass_fds=[lock]).returncode
        if status:
            return status
    marker.touch()
    return 0


def main(marker: Path, files: "list[Path]") -> int:
    """Install where that is not done; return the exit status."""
    if sys.version_info < OLDEST:
        print("É preciso Python 3.11 ou mais novo; se houver outro: make PYTHON=python3.12 ...")
        return 1
    with open(__file__) as lock:  # dropped by the kernel when the last that has it ends
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("Outro make está instalando os pacotes desta pasta: repita quando ele terminar")
            return 1
        if is_done(marker, files):
            return 0
        if marker.parent.is_symlink():  # venv would empty what it leads to, and then refuse it
            print(f"{marker.parent} leva a {marker.parent.resolve()}, que não é só desta pasta")
            return 1
        return install(marker, files, lock.fileno())


if __name__ == "__main__":
    try:
        sys.exit(main(Path(sys.argv[1]), [Path(name) for name in sys.argv[2:]]))
    except KeyboardInterrupt:
        sys.exit(130)
