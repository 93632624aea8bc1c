"""The reliability benchmark in small: kills, drains and a faulty server, on the recipe for real."""

import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "distill_reliability.py"


@pytest.mark.slow
def test_no_paid_answer_is_lost_or_bought_twice_however_runs_end() -> None:
    done = subprocess.run([sys.executable, BENCHMARK, "--short"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "every promise kept" in done.stdout
    for part in ("SIGKILL, seed 0: 3 in", "SIGTERM and SIGINT: 2 in", "SIGKILL, Batch API: 3 in"):
        assert part in done.stdout
