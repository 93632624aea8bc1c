"""``benchmarks/evaluation_peers.py`` runs, shows its peers equal first, and stops where they are not."""

import re
import runpy
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[3] / "benchmarks" / "evaluation_peers.py"
WAYS = ["expected", "generate", "row, expected", "row, first token", "transformers generate", "torchtune generate"]


@pytest.fixture(scope="module")
def benchmark() -> dict:
    return runpy.run_path(str(SCRIPT))


def test_all_ways_agree_and_are_timed(benchmark, capsys) -> None:
    benchmark["main"](["--quick"])
    out = capsys.readouterr().out
    assert "8 of 8 of transformers, 8 of 8 of torchtune" in out
    rates = dict(re.findall(r"^([a-z, ]+?) +([\d.]+) +\(", out, re.MULTILINE))
    assert list(rates) == WAYS
    assert all(float(rate) > 0 for rate in rates.values())


@pytest.mark.parametrize(
    ("way", "wrong", "message"),
    [
        ("expected", lambda right: right * 0.999, "probabilities differ"),
        ("last_logits", lambda right: right + 1, "logits by more"),
        ("generated_by_torchtune", lambda right: [answer[:-1] for answer in right], "not the same tokens"),
    ],
)
def test_a_difference_ends_it(benchmark, monkeypatch, way, wrong, message) -> None:
    right = benchmark[way]
    monkeypatch.setitem(benchmark["main"].__globals__, way, lambda *args: wrong(right(*args)))
    with pytest.raises(SystemExit, match=message):
        benchmark["main"](["--quick"])


def test_the_token_ratio_by_hand(benchmark, monkeypatch) -> None:
    rows = [[7] * 60 + [row] * 20 for row in range(3)]
    monkeypatch.setitem(benchmark["token_ratio"].__globals__, "prompts_of", lambda case: rows)
    assert benchmark["token_ratio"](benchmark["Case"](300, 60, 20, 3, 3)) == pytest.approx(240 / 120)
