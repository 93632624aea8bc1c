"""The training benchmark in small: every peer takes part, and a peer that computes something else stops it."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"
WAYS = ("plain", "stock default", "stock best", "PEFT", "ours, N=4")


@pytest.mark.slow
def test_the_benchmark_shows_every_peer_equal_and_times_it() -> None:
    command = [sys.executable, BENCHMARKS / "training_peers.py", "--quick"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    equal, table = done.stdout.split("one step of 8 rows")[1].split("rows/s", 1)
    for way in WAYS:
        _, of_loss, of_gradients = line_of(equal, way).rsplit(maxsplit=2)
        assert float(of_loss) <= 1e-5
        assert float(of_gradients) <= 1e-5
        assert "batch" in line_of(table, way)


def line_of(text: str, way: str) -> str:
    return next(line for line in text.splitlines() if line.strip().startswith(way))


class Stub:
    """A peer with given gradients."""

    def __init__(self, loss: float, *gradient: float) -> None:
        self.found = loss, {"weight": torch.tensor(gradient)}

    def gradients(self, rows: object) -> tuple[float, dict[str, torch.Tensor]]:
        return self.found

    def step(self) -> float:
        raise AssertionError("timed before it was checked")


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import training_peers

    return training_peers


@pytest.mark.parametrize("other", [(2.0, 1.0, 1.0001), (2.001, 1.0, 1.0), (float("nan"), 1.0, 1.0)])
def test_another_loss_or_gradient_stops_the_benchmark(benchmark: Any, other: tuple[float, ...]) -> None:
    machine = benchmark.Machine(torch.device("cpu"), torch.float32)
    plain = benchmark.Entry("plain", "", Stub(2.0, 1.0, 1.0))
    benchmark.show_equal([plain, benchmark.Entry("same", "", Stub(2.0, 1.0, 1.000001))], [], machine)
    with pytest.raises(SystemExit, match="differ by more than 1e-05"):
        benchmark.show_equal([plain, benchmark.Entry("other", "", Stub(*other))], [], machine)


def test_peak_memory_is_the_most_that_new_tensors_held_at_a_time(benchmark: Any) -> None:
    machine = benchmark.Machine(torch.device("cpu"), torch.float32)
    given = torch.ones(1000)

    def run() -> None:
        kept = given * 2
        for _ in range(3):
            (kept.view(10, 100) + 1).sum()
        kept.add_(given)

    _, peak = machine.with_peak_bytes(run, compiled=False)
    assert 8000 <= peak <= 8100  # kept, and one sum at a time


@pytest.mark.slow
def test_the_stock_prefix_benchmark_shows_losses_and_gradients_equal_and_times_all_kinds() -> None:
    command = [sys.executable, BENCHMARKS / "stock_prefix.py", "--quick", "--batch-sizes", "2"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    differences = re.findall(r"loss and gradients differ from those of rows by (\S+)", done.stdout)
    assert len(differences) == 2
    assert all(float(difference) <= 1e-5 for difference in differences)
    table = done.stdout.split("/ best", 1)[1]
    for kind in ("rows", "packs of 2", "ours, N=4"):
        assert "batch 2" in line_of(table, kind)
