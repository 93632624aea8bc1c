"""``personas-tune report``: one run's page, two runs side by side, and mistakes."""

import json
import re
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from evaluated import write_evaluated

from personas_tune import cli
from personas_tune.report.against import are_alike_in_rows, difference_between
from personas_tune.report.run import read_run
from personas_tune.workspace import Workspace, to_json


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    write_evaluated(folder / "good", skill=0.9)
    write_evaluated(folder / "bad", skill=0.1)
    return folder


@pytest.fixture
def report(capsys):
    def run_it(*arguments: object):
        with pytest.raises(SystemExit) as stop:
            cli.main(["report", *map(str, arguments)])
        captured = capsys.readouterr()
        return stop.value.code or 0, captured.out, captured.err

    return run_it


def test_the_command_writes_the_page_and_prints_where(runs, report):
    page = runs / "good" / "report" / "index.html"
    assert report(runs / "good") == (0, f"report: {page}\n", "")
    assert "<figure" in page.read_text(encoding="utf-8")


def test_a_run_without_eval_is_one_line(runs, report, tmp_path):
    shutil.copytree(runs / "good", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "eval")
    status, out, err = report(tmp_path / "run")
    assert (status, out) == (2, "")
    assert err.count("\n") == 1
    assert "metrics.json: file not found; run `tune run persona_eval --config ...` first" in err


def test_a_folder_that_isn_t_there_is_one_line(report, tmp_path):
    assert report(tmp_path / "nowhere")[0] == 2
    assert "no such folder" in report(tmp_path / "nowhere")[2]


def test_two_runs_side_by_side(runs, report):
    report(runs / "good")
    page = runs / "good" / "report" / "against_bad.html"
    assert report(runs / "good", "--against", runs / "bad") == (0, f"report: {page}\n", "")
    text = page.read_text(encoding="utf-8")
    metrics = {name: json.loads((runs / name / "eval" / "metrics.json").read_text()) for name in ("good", "bad")}
    for agent, other in zip(metrics["good"]["agents"], metrics["bad"]["agents"], strict=True):
        for value in (agent["rmse"], other["rmse"]):
            assert f"<td>{value:.3f}</td>" in text
        difference = f"{agent['rmse'] - other['rmse']:+.3f}".replace("-", "\N{MINUS SIGN}")
        assert f"<td>{difference}</td>" in text
    for figure in ("rmse", "mae", "table", "distribution", "settings"):
        assert f'<figure id="{figure}"' in text
    assert "On the same test rows" in text
    assert re.search('aria-label="Shares of each rating. good, [^"]+: 1 true [^"]+ bad, ', text)
    assert "They have no intervals" in text
    assert "http" not in text.replace("http-equiv", "")
    before = text
    report(runs / "good", "--against", runs / "bad")
    assert page.read_text(encoding="utf-8") == before


def test_a_comparison_outlives_a_new_report(runs, report, tmp_path):
    shutil.copytree(runs / "good", tmp_path / "run")
    assert report(tmp_path / "run", "--against", runs / "bad")[0] == 0
    assert report(tmp_path / "run")[0] == 0
    assert {path.name for path in (tmp_path / "run" / "report").iterdir()} == {
        "against_bad.html",
        "index.html",
        "manifest.json",
    }


def test_settings_that_differ_are_named_and_others_are_not(runs, report, tmp_path):
    shutil.copytree(runs / "good", tmp_path / "other")
    manifest = json.loads((tmp_path / "other" / "data" / "manifest.json").read_text())
    manifest["settings"]["data"]["traits"] = "all"
    manifest["versions"]["torch"] = "2.11.0"
    (tmp_path / "other" / "data" / "manifest.json").write_text(to_json(manifest))
    report(runs / "good", "--against", tmp_path / "other")
    text = (runs / "good" / "report" / "against_other.html").read_text(encoding="utf-8")
    settings = text[text.index('id="settings"') :]
    assert "data.traits" in settings
    assert "data.format" not in settings
    same = "None: the runs share settings and versions."
    assert same not in settings
    report(tmp_path / "other", "--against", tmp_path / "other")
    assert same in (tmp_path / "other" / "report" / "against_other.html").read_text(encoding="utf-8")


def test_a_leak_in_one_run_only_is_in_the_sentence(runs, report, tmp_path):
    shutil.copytree(runs / "good", tmp_path / "honest")
    metrics = json.loads((tmp_path / "honest" / "eval" / "metrics.json").read_text())
    assert metrics["settings"]["historical_average"] == "all"
    metrics["settings"]["historical_average"] = "train"
    (tmp_path / "honest" / "eval" / "metrics.json").write_text(to_json(metrics))
    report(runs / "good", "--against", tmp_path / "honest")
    text = (runs / "good" / "report" / "against_honest.html").read_text(encoding="utf-8")
    assert "historical average is all (leaky, the paper’s way) in good, but train in honest." in text
    assert "traits is" not in text
    report(runs / "good", "--against", runs / "bad")
    assert "leaky" not in (runs / "good" / "report" / "against_bad.html").read_text(encoding="utf-8")


def test_runs_of_one_name_are_told_apart_by_the_folder_above(runs, report, tmp_path):
    shutil.copytree(runs / "good", tmp_path / "good")
    assert report(runs / "good", "--against", tmp_path / "good")[0] == 0
    text = (runs / "good" / "report" / "against_good.html").read_text(encoding="utf-8")
    assert f"{runs.name}/good against {tmp_path.name}/good" in text


def test_a_run_against_itself_differs_in_nothing(runs):
    run = read_run(Workspace.at(runs / "good"))
    best = run.best_agent
    assert best is not None
    assert are_alike_in_rows(run, run)
    assert difference_between(run, best, best) == {"difference": 0.0, "low": 0.0, "high": 0.0}


def test_other_rows_are_never_called_paired(runs, tmp_path):
    shutil.copytree(runs / "good", tmp_path / "other")
    other = Workspace.at(tmp_path / "other")
    pq.write_table(pq.read_table(other.test_samples).slice(1), other.test_samples)
    assert not are_alike_in_rows(read_run(Workspace.at(runs / "good")), read_run(other))


def test_unanswered_rows_leave_no_paired_difference(runs):
    run = read_run(Workspace.at(runs / "good"))
    agents = {row["name"]: row for row in run.agents}
    assert agents["persona_text"]["n_parsed"] < agents["persona_text"]["n"]
    assert difference_between(run, agents["persona_text"], agents["persona"]) is None
