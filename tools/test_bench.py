"""What ``make bench`` makes of a measurement that went wrong, and of one that did not."""

import io
import os
import subprocess
import unittest
from collections import Counter
from contextlib import redirect_stdout
from unittest.mock import patch

from rich.console import Console

from tools import bench

WRK = """Running 2s test @ http://127.0.0.1:5000/
  Latency Distribution
     50%    1.20ms
     99%    2.50ms
  4000 requests in 2.00s, 1.00MB read
Requests/sec:   2000.00
"""


class TestBench(unittest.TestCase):
    def test_wrk_is_read_in_any_unit(self) -> None:
        self.assertEqual(bench.read(WRK), (2000, 2.5, 4000))
        self.assertEqual(bench.read(WRK.replace("2.50ms", "150.00us")), (2000, 0.15, 4000))
        self.assertEqual(bench.read(WRK.replace("2.50ms", "1.50s")), (2000, 1500, 4000))

    def test_answers_that_were_no_good_make_a_measurement_invalid(self) -> None:
        for line in (
            "  Socket errors: connect 0, read 3, write 0, timeout 0\n",
            "  Non-2xx or 3xx responses: 7\n",
        ):
            with self.assertRaisesRegex(RuntimeError, line.strip()):
                bench.read(WRK + line)
        with self.assertRaisesRegex(RuntimeError, "unable to connect"):
            bench.read("unable to connect to 127.0.0.1:5000 Connection refused\n")

    def test_a_wrk_that_does_not_end_is_told_in_a_line(self) -> None:
        late = subprocess.TimeoutExpired("wrk", 32)
        with (
            patch("subprocess.run", side_effect=late),
            self.assertRaisesRegex(RuntimeError, "^A medição não vale; o wrk não terminou.*$"),
        ):
            bench.ask(5000, 1)

    def test_a_server_that_died_is_told_with_its_own_words(self) -> None:
        dead: dict[str, list[object]] = {"morto": ["-c", "import sys; sys.exit('sem memória')"]}
        with (
            patch.dict(bench.COMMANDS, dead),
            self.assertRaisesRegex(RuntimeError, r"morto terminou .*\(código 1\):\nsem memória$"),
        ):
            bench.measure("morto", dict(os.environ), 0)

    def test_each_server_is_measured_under_each_load_in_each_round(self) -> None:
        figures = bench.Figures(bench.Answers(1234.0, 2.0, 100), 1.5, 3e7)
        printed = io.StringIO()
        with (
            patch.object(bench, "measure", return_value=figures) as measure,
            patch("shutil.which", return_value="wrk"),
            redirect_stdout(printed),
        ):
            self.assertEqual(bench.main(), 0)
        asked = Counter((call.args[0], call.args[2]) for call in measure.mock_calls)
        self.assertEqual(set(asked.values()), {1, bench.ROUNDS})  # once without a request
        self.assertEqual(len(asked), len(bench.COMMANDS) * (1 + len(bench.CONNECTIONS)))
        self.assertEqual(printed.getvalue().count("1234"), len(bench.COMMANDS) * 3)

    def test_without_wrk_it_says_how_to_get_it(self) -> None:
        printed = io.StringIO()
        with (
            patch("shutil.which", return_value=None),
            redirect_stdout(printed),
        ):
            self.assertEqual(bench.main(), 1)
        self.assertIn("apt install wrk", printed.getvalue())

    def test_the_longest_bar_is_the_best_rate(self) -> None:
        found = {
            (name, 1): [bench.Figures(bench.Answers(rate, 2.0, 100), 1.5, 3e7)]
            for name, rate in (("rápido", 1000.0), ("lento", 250.0))
        }
        printed = io.StringIO()
        console = Console(width=80, file=printed)
        console.print(bench.table(found, {"rápido": 0.5, "lento": 1.0}))
        _, *rows = printed.getvalue().splitlines()
        bars = "█" * bench.BAR_WIDTH, "█" * (bench.BAR_WIDTH // 4)
        self.assertEqual(rows[0].split(), ["rápido", "1", "1000", bars[0], "2.0", "10000", "30"])
        self.assertEqual(rows[1].split(), ["lento", "1", "250", bars[1], "2.0", "5000", "30"])


if __name__ == "__main__":
    unittest.main()
