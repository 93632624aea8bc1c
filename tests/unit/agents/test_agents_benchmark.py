"""The agents' benchmark in small: three ways give the same distributions, and ways that don't stop it."""

import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"


@pytest.mark.slow
def test_the_benchmark_shows_all_ways_equal_and_times_them():
    command = [sys.executable, BENCHMARKS / "agents.py", "--quick"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 user x 8 items" in done.stdout
    for way in ("together", "each alone", "stock forward"):
        assert way in done.stdout


@pytest.mark.parametrize("apart", [1.1e-5, float("nan")])
def test_other_distributions_stop_the_benchmark(monkeypatch, apart):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import agents

    agents.require_equal("shape", 1e-6)
    with pytest.raises(SystemExit, match="distributions differ by"):
        agents.require_equal("shape", apart)
