"""Tell where the requirement files don't fit ``pyproject.toml``, or one another: in ``make lint``.

``make lock`` writes them, and needs the network for it; this does not.
"""

import re
import sys
import tomllib
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

HERE = Path(__file__).resolve().parent.parent
RUN = "tools/requirements-run.txt"
DEV = "tools/requirements-dev.txt"
PIN = re.compile(r"^([a-z0-9-]+)==(\S+)", re.MULTILINE)


def wanted(project: dict[str, Any]) -> dict[str, list[Requirement]]:
    """Return what ``pyproject.toml`` asks for, by the requirement file that has to pin it."""
    run, dev = (
        [Requirement(each) for each in project["dependency-groups"][group] if isinstance(each, str)]
        for group in ("run", "dev")
    )
    return {
        "requirements.txt": [Requirement(each) for each in project["project"]["dependencies"]],
        RUN: run,
        DEV: run + dev,
    }


def problems(folder: Path) -> list[str]:
    """Return a line for each thing that does not fit in the project at ``folder``."""
    found: list[str] = []
    versions: dict[str, str] = {}
    project = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))
    for file, requirements in wanted(project).items():
        text = (folder / file).read_text(encoding="utf-8")
        pins = dict(PIN.findall(text))
        for requirement in requirements:
            pin = pins.get(requirement.name)
            if pin is None or pin not in requirement.specifier:
                found.append(f"{file}: {requirement} não está fixado; execute make lock")
        direct = text.count("contador (pyproject.toml")  # uv says of each package who asked for it
        if direct != len(requirements):
            found.append(f"{file}: pyproject.toml pede {len(requirements)}, não {direct}")
        for package, version in pins.items():
            if versions.setdefault(package, version) != version:
                found.append(
                    f"{file}: {package} {version}, mas {versions[package]} em outro arquivo"
                )
    return found


if __name__ == "__main__":
    sys.exit("\n".join(problems(HERE)) or 0)
