"""What the lessons promise: they fit into one, and account for every line of the Compose file."""

import re
import unittest
from fnmatch import fnmatchcase
from pathlib import Path

from tools.reading import HERE, anchors

LESSONS = HERE / "aula/README.md"
DESCRIBED = HERE / "aula/minimo.yml"
COMMANDS, MINUTES, README_LINES = 20, 35, 300


def sections(level: str) -> dict[str, str]:
    """Return the text of the lessons' sections by heading, with all that is below it."""
    text = LESSONS.read_text(encoding="utf-8")
    parts = re.split(rf"^{level} (.*)$", text, flags=re.M)[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))


def lessons() -> dict[str, str]:
    """Return the text of each lesson by its heading."""
    return {title: text for title, text in sections("##").items() if title.startswith("Aula ")}


def typed(text: str) -> list[str]:
    """Return the commands of a text which a person types."""
    found: list[str] = []
    for language, block in re.findall(r"^```(console|sh)\n(.*?)^```", text, flags=re.M | re.S):
        prompt = "$ " if language == "console" else ""
        lines = [line for line in block.splitlines() if line.startswith(prompt)]
        found += [line.removeprefix(prompt) for line in lines]
    return found


def settings(file: Path) -> set[tuple[str, str]]:
    """Return what a Compose file sets: the keys from the top, with dots between, and the value.

    Each item of a list is a value of the list's. The keys of a service begin with its name. This
    reads what our files use of YAML, and no more: keys, lists, plain values, comments.
    """
    found: set[tuple[str, str]] = set()
    keys: list[tuple[int, str]] = []  # from the top to this line, each with its column
    for line in file.read_text(encoding="utf-8").splitlines():
        text = re.sub(r"(^|\s)#.*", "", line).rstrip()
        item = re.fullmatch(r"( *)- (.*)", text)
        if item and not re.match(r"[\w-]+: ", item[2]):
            above = [key for column, key in keys if column < len(item[1])]
            found.add((path(above), item[2]))
            continue
        pair = re.fullmatch(r"( *(?:- )?)([\w-]+):(?: (.*))?", text)
        if pair:
            keys = [each for each in keys if each[0] < len(pair[1])] + [(len(pair[1]), pair[2])]
            found.add((path([key for _, key in keys]), pair[3] or ""))
        elif text:
            raise ValueError(f"{file.name}: {line}")
    parents = {name.rpartition(".")[0] for name, _ in found}
    lists = {name for name, value in found if value}
    return {(name, value) for name, value in found if value or name not in parents | lists}


def path(keys: list[str]) -> str:
    """Return keys as one name."""
    return ".".join(keys).removeprefix("services.")


def rows() -> list[list[str]]:
    """Return the cells of the table that ends the lessons, without its head."""
    table = sections("##")["Para que serve cada linha"]
    lines = [line for line in table.splitlines() if line.startswith("|")][2:]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def keys_of(row: list[str]) -> list[str]:
    """Return the keys that a row is about, perhaps with an asterisk for the name of a service."""
    return re.findall(r"`([^`]*)`", re.split(r" com | \(", row[0])[0])


class TestLessons(unittest.TestCase):
    def test_first_lesson_shows_the_described_file_word_for_word(self) -> None:
        first, *_ = lessons().values()
        shown = re.search(r"^<!-- from aula/minimo.yml -->\n```yaml\n(.*?)^```", first, re.M | re.S)
        assert shown
        self.assertEqual(shown[1], DESCRIBED.read_text(encoding="utf-8"))

    def test_each_lesson_can_be_typed_in_its_time(self) -> None:
        self.assertEqual([title[:6] for title in lessons()], ["Aula 1", "Aula 2", "Aula 3"])
        for title, text in lessons().items():
            with self.subTest(title):
                self.assertLessEqual(len(typed(text)), COMMANDS)
                self.assertGreater(len(typed(text)), COMMANDS / 2)
                minutes = re.findall(r"^### .*\((\d+) min\)$", text, flags=re.M)
                self.assertEqual(sum(map(int, minutes)), MINUTES)
                self.assertEqual(len(minutes), text.count("\n### "))

    def test_commands_are_what_a_beginner_types(self) -> None:
        for text in lessons().values():
            for command in typed(text):
                self.assertNotRegex(command, r";|\b(for|while|until|done)\b")

    def test_every_line_of_ours_has_its_failure_or_risk(self) -> None:
        ours = settings(HERE / "docker-compose.yml") - settings(DESCRIBED)
        names = {name for name, _ in ours}
        known = [key for row in rows() for key in keys_of(row)]
        for name in names:
            with self.subTest(name):
                self.assertTrue(any(fnmatchcase(name, key) for key in known))
        dockerfile = (HERE / "Dockerfile").read_text(encoding="utf-8")
        for instruction in ("USER", "HEALTHCHECK"):
            self.assertIn(instruction, known)
            self.assertRegex(dockerfile, rf"(?m)^{instruction} ")
            known.remove(instruction)
        for key in known:  # and no row outlives its line
            with self.subTest(key):
                self.assertTrue(any(fnmatchcase(name, key) for name in names))

    def test_every_row_leads_to_a_section(self) -> None:
        for row in rows():
            with self.subTest(row[0]):
                _, why, where = row
                self.assertTrue(why)
                link = re.search(r"\]\(([^)#]*)#([^)]+)\)", where)
                assert link
                file = LESSONS.parent / link[1] if link[1] else LESSONS
                self.assertIn(link[2], anchors(file))

    def test_readme_is_short(self) -> None:
        lines = (HERE / "README.md").read_text(encoding="utf-8").splitlines()
        self.assertLessEqual(len(lines), README_LINES)


if __name__ == "__main__":
    unittest.main()
