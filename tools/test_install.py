"""What ``make`` promises of its environment: one installation at a time, whole or begun anew."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

from tools.reading import HERE
from tools.waiting import SECONDS, eventually


class TestInstall(unittest.TestCase):
    """With an environment of its own, and files that pin nothing."""

    def setUp(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="contador-test-")).resolve()
        self.addCleanup(shutil.rmtree, self.folder)
        program = shutil.copy(HERE / "tools/install.py", self.folder)
        self.marker = self.folder / "environment/.run"
        self.files = [self.folder / name for name in ("a.txt", "b.txt")]
        for file in self.files:
            file.touch()
        self.command = [sys.executable, program, *map(str, (self.marker, *self.files))]
        self.output = self.folder / "output"

    def start(self) -> subprocess.Popen[bytes]:
        """Start the program, as a terminal does; return when it has the lock."""
        with self.output.open("wb") as output:
            process = subprocess.Popen(
                self.command, stdout=output, stderr=output, start_new_session=True
            )
        self.addCleanup(process.kill)
        eventually(self.output.read_text)
        return process

    def run_once(self) -> tuple[int, str]:
        """Run the program; return its exit status and what it prints."""
        done = subprocess.run(self.command, capture_output=True, text=True, timeout=SECONDS)
        return done.returncode, done.stdout + done.stderr

    def test_a_second_one_is_refused_and_a_later_one_finds_it_done(self) -> None:
        first = self.start()
        self.assertEqual(
            self.run_once(),
            (1, "Outro make está instalando os pacotes desta pasta: repita quando ele terminar\n"),
        )
        self.assertEqual(first.wait(SECONDS), 0, self.output.read_text())
        self.assertEqual(self.run_once(), (0, ""))
        self.files[0].write_text("no-such-package\n")  # and without a hash
        self.command[2] = str(self.marker.with_name(".dev"))
        self.assertNotEqual(self.run_once()[0], 0)
        self.assertFalse(self.marker.with_name(".dev").exists())

    def test_the_environment_of_another_folder_is_left_alone(self) -> None:
        other = self.folder / "other"
        other.mkdir()
        (other / "kept").touch()
        self.marker.parent.symlink_to(other)
        self.assertEqual(
            self.run_once(), (1, f"{self.marker.parent} leva a {other}, que não é só desta pasta\n")
        )
        self.assertTrue((other / "kept").exists())

    def test_one_that_was_interrupted_is_begun_anew(self) -> None:
        first = self.start()
        os.killpg(first.pid, signal.SIGINT)
        self.assertEqual(first.wait(SECONDS), 130, self.output.read_text())
        self.assertFalse(self.marker.exists())
        self.assertEqual(self.run_once()[0], 0)
        self.assertTrue(self.marker.exists())


if __name__ == "__main__":
    unittest.main()
