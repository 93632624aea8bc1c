"""The examples of docs/metrics.md run as they stand."""

import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

PAGE = Path(__file__).parents[3] / "docs" / "metrics.md"


def examples() -> list[str]:
    _, _, section = PAGE.read_text(encoding="utf-8").partition("\n## Your own metric\n")
    return re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)


@pytest.fixture
def predictions(tmp_path, monkeypatch):
    """Ann is promised three good films and let down once, bob one and once; what isn't promised doesn't count."""
    table = {
        "user_id": ["ann", "ann", "ann", "ann", "bob", "bob"],
        "rating": [4.0, 2.0, 5.0, 1.0, 1.5, 2.0],
        "expected": [4.2, 3.5, 3.9, 3.4, 4.9, 1.0],
    }
    folder = tmp_path / "runs" / "quickstart" / "eval"
    folder.mkdir(parents=True)
    pq.write_table(pa.table(table), folder / "predictions_persona.parquet")
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("predictions")
def test_the_own_metric_reads_predictions_and_says_how_often_users_are_let_down(capsys):
    exec(examples()[0], {})
    assert capsys.readouterr().out == "let down: 0.500 [0.333, 1.000]\n"


def test_predictions_of_any_origin_are_measured_by_the_same_functions(capsys):
    exec(examples()[1], {})
    # The labels 4, 4 and 2 for 5, 3 and 4: none is right, ann's order is, and two of three have to be moved by 1.
    accuracy, order, wasserstein = map(float, capsys.readouterr().out.split())
    assert (accuracy, order) == (0.0, 1.0)
    assert np.isclose(wasserstein, (1 + 0 + 1) / 3)
