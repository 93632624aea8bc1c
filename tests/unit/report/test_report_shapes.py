"""Damaged and foreign files: the report tells each in a line that names the file."""

import doctest
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from evaluated import write_evaluated

from personas_tune.errors import ConfigError, DataError
from personas_tune.report import shapes
from personas_tune.report.page import write_report
from personas_tune.report.run import read_run
from personas_tune.report.write import build_comparison, build_report
from personas_tune.workspace import Workspace

GONE = object()


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return write_evaluated(tmp_path_factory.mktemp("shapes") / "run")


@pytest.fixture
def copy(evaluated: Workspace, tmp_path: Path) -> Workspace:
    return Workspace.at(shutil.copytree(evaluated.root, tmp_path / "copy"))


def change(path: Path, keys: list[str | int], value: Any) -> None:
    """Put a value into a JSON file, or take one out."""
    whole = inner = json.loads(path.read_text(encoding="utf-8"))
    for key in keys[:-1]:
        inner = inner[key]
    if value is GONE:
        del inner[keys[-1]]
    else:
        inner[keys[-1]] = value
    path.write_text(json.dumps(whole), encoding="utf-8")


def test_the_example_in_the_docstring_is_right() -> None:
    tried = doctest.testmod(shapes)
    assert (tried.failed, tried.attempted) == (0, 2)


@pytest.mark.parametrize("text", ["[]", "3", "{}", "null", '"text"', '{"agents": []}'])
@pytest.mark.parametrize(
    "file",
    [
        "eval/metrics.json",
        "samples/prompt.json",
        "personas/clustering.json",
        "data/manifest.json",
        "eval/manifest.json",
    ],
)
def test_another_file_s_text_is_told_in_a_line_or_is_a_manifest(copy: Workspace, file: str, text: str) -> None:
    (copy.root / file).write_text(text)
    if "manifest" in file and text.startswith("{"):
        assert "<figure" in build_report(copy.root).read_text(encoding="utf-8")
        return
    with pytest.raises(DataError) as error:
        build_report(copy.root)
    line = str(error.value)
    assert line.startswith(str(copy.root / file))
    assert "\n" not in line
    assert " again" in line
    with pytest.raises(DataError):
        build_comparison(copy.root, copy.root)


@pytest.mark.parametrize(
    ("file", "keys", "value", "says"),
    [
        ("eval/metrics.json", ["settings"], GONE, "no 'settings' in it"),
        ("eval/metrics.json", ["settings", "seed"], GONE, "no 'seed' in settings"),
        ("eval/metrics.json", ["settings", "n_rows"], GONE, "no 'n_rows' in settings"),
        ("eval/metrics.json", ["settings", "confidence"], 95, "settings.confidence is not a number from 0 to 1"),
        ("eval/metrics.json", ["agents", 1, "base"], GONE, r"no 'base' in agents\[1\]"),
        ("eval/metrics.json", ["agents", 0, "memories"], "none", r"agents\[0\].memories is not short, long or both"),
        ("eval/metrics.json", ["agents", 0, "readout"], "loud", r"agents\[0\].readout is not a readout"),
        ("eval/metrics.json", ["agents", 0, "rmse"], float("nan"), r"agents\[0\].rmse is not a number"),
        ("eval/metrics.json", ["baselines", 0, "macro_rmse"], GONE, r"no 'macro_rmse' in baselines\[0\]"),
        ("eval/metrics.json", ["baselines", 0, "per_user"], GONE, r"no 'per_user' in baselines\[0\]"),
        ("eval/metrics.json", ["baselines", 0, "mae_ci"], [1], r"mae_ci is not two numbers or nulls"),
        ("eval/metrics.json", ["agents", 0, "confusion"], [[1]], "confusion of base is not 5 x 5"),
        ("eval/metrics.json", ["agents", 0, "distribution", "labels"], [1], "distribution of base has not a share"),
        ("eval/metrics.json", ["own_versus_other", "persona", "n"], [1], "has not a figure for each adapter"),
        ("samples/prompt.json", ["labels"], GONE, "no 'labels' in it"),
        ("personas/clustering.json", ["range"], GONE, "no 'range' in it"),
        ("personas/clustering.json", ["range"], [], "range is not a list of 1 or more"),
        ("personas/clustering.json", ["elbow"], GONE, "no 'elbow' in it"),
        ("personas/clustering.json", ["k"], GONE, "no 'k' in it"),
        ("personas/clustering.json", ["words"], {"first": []}, "words has a key that is no number"),
        ("data/manifest.json", ["settings"], None, "settings is not an object"),
        ("eval/manifest.json", ["settings", "adapter_sets"], [], "settings.adapter_sets is not an object"),
    ],
)  # fmt: skip
def test_what_is_missing_or_odd_is_named(
    copy: Workspace, file: str, keys: list[str | int], value: Any, says: str
) -> None:
    change(copy.root / file, keys, value)
    with pytest.raises(DataError, match=says) as error:
        read_run(copy)
    assert str(error.value).startswith(f"{copy.root / file}: ")


def test_a_run_of_nothing_but_the_floor_has_a_page(copy: Workspace) -> None:
    metrics = json.loads(copy.metrics.read_text())
    metrics.update(oracle=metrics["baselines"][0], agents=[], baselines=[], paired=[], own_versus_other={})
    copy.metrics.write_text(json.dumps(metrics))
    text = write_report(read_run(copy))
    assert "No agent or baseline answered a single row." in text
    assert "No agent was measured" in text


def test_half_a_letter_is_left_out_of_texts_and_attributes(copy: Workspace) -> None:
    change(copy.clustering, ["words", "0", 0, "word"], "ri\ud800ver\u202e")
    text = build_report(copy.root).read_text(encoding="utf-8")
    assert text.count(">river<") == 1
    assert "persona 0: river, noir" in text


def test_a_file_in_the_page_s_place_is_to_be_moved(copy: Workspace, evaluated: Workspace) -> None:
    copy.report.write_text("")
    for build in (lambda: build_report(copy.root), lambda: build_comparison(copy.root, evaluated.root)):
        with pytest.raises(ConfigError, match=r"report: it is a file; move that file away"):
            build()


def test_a_comparison_that_can_t_be_written_says_what_helps(copy: Workspace, evaluated: Workspace) -> None:
    long = evaluated.root.with_name("x" * 250)
    long.symlink_to(evaluated.root)
    renamed = Workspace.at(shutil.copytree(evaluated.root, copy.root.with_name("y" * 250)))
    with pytest.raises(ConfigError, match="give the folder of the other run a shorter name"):
        build_comparison(copy.root, renamed.root)
    (copy.report / "against_run.html").mkdir(parents=True)
    with pytest.raises(ConfigError, match="move that folder away"):
        build_comparison(copy.root, long)
    assert [path.name for path in copy.report.iterdir()] == ["against_run.html"]


def test_a_folder_s_name_may_be_too_long_for_the_system(copy: Workspace) -> None:
    with pytest.raises(ConfigError, match="no such folder"):
        build_report(copy.root / ("z" * 300))
