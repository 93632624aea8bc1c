import sys
from pathlib import Path

import persona_distill
import pyarrow.parquet as pq
import pytest
from memory_tables import counted_users, random_log


@pytest.fixture
def experiment_yaml(tmp_path: Path) -> Path:
    """A prepared experiment's YAML, with its data folder beside it."""
    folder = tmp_path / "run" / "data"
    folder.mkdir(parents=True)
    interactions, items, users = random_log(seed=0)
    users = users.append_column("n_train", counted_users(interactions)["n_train"])
    for column in ("n_test", "mean_rating", "activity", "conformity", "diversity"):
        users = users.append_column(column, users["activity_tier"])
    for name, table in {"interactions": interactions, "items": items, "users": users}.items():
        pq.write_table(table, folder / f"{name}.parquet")
    path = tmp_path / "small.yaml"
    path.write_text(f"output_dir: {tmp_path / 'run'}\n", encoding="utf-8")
    return path


def distill(monkeypatch: pytest.MonkeyPatch, yaml: Path, *overrides: str) -> int:
    monkeypatch.setattr(sys, "argv", ["persona_distill", "--config", str(yaml), *overrides])
    with pytest.raises(SystemExit) as leaving:
        persona_distill.recipe_main()
    return int(leaving.value.code or 0)


def test_it_writes_both_tables_and_then_is_up_to_date(
    monkeypatch: pytest.MonkeyPatch, experiment_yaml: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert distill(monkeypatch, experiment_yaml) == 0
    folder = experiment_yaml.parent / "run" / "memory"
    written = ["index.html", "manifest.json", "memories.parquet", "profiles.parquet"]
    assert sorted(path.name for path in folder.iterdir()) == written
    assert "9 profiles of 3 users, 51 memories" in capsys.readouterr().out
    assert distill(monkeypatch, experiment_yaml) == 0
    assert "up to date" in capsys.readouterr().out


def test_two_runs_give_the_same_bytes(monkeypatch: pytest.MonkeyPatch, experiment_yaml: Path) -> None:
    folder = experiment_yaml.parent / "run" / "memory"
    files = [folder / "profiles.parquet", folder / "memories.parquet", folder / "index.html"]
    assert distill(monkeypatch, experiment_yaml) == 0
    first = [path.read_bytes() for path in files]
    (folder / "manifest.json").unlink()
    assert distill(monkeypatch, experiment_yaml) == 0
    assert [path.read_bytes() for path in files] == first


def test_own_profiles_are_imported(
    monkeypatch: pytest.MonkeyPatch, experiment_yaml: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = experiment_yaml.parent / "own.csv"
    own.write_text("user,profile\nu0,A.\nu1,B.\nu2,C.\nu3,D.\n", encoding="utf-8")
    assert distill(monkeypatch, experiment_yaml, "distill.distiller=file", f"distill.path={own}") == 0
    out = capsys.readouterr().out
    assert "1 rows of users outside the cohort ignored" in out
    assert "3 profiles of 3 users, 0 memories" in out


@pytest.mark.parametrize("override", ["distill.concurrency=2", "distill.model=other", "distill.max_tries=9"])
def test_keys_that_a_distiller_does_not_use_change_nothing(
    monkeypatch: pytest.MonkeyPatch, experiment_yaml: Path, capsys: pytest.CaptureFixture[str], override: str
) -> None:
    assert distill(monkeypatch, experiment_yaml) == 0
    capsys.readouterr()
    assert distill(monkeypatch, experiment_yaml, override) == 0
    assert "up to date" in capsys.readouterr().out
    assert distill(monkeypatch, experiment_yaml, "distill.batch_size=4") == 0
    assert "up to date" not in capsys.readouterr().out


def test_a_dry_run_of_an_offline_distiller_has_nothing_to_say(
    monkeypatch: pytest.MonkeyPatch, experiment_yaml: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert distill(monkeypatch, experiment_yaml, "distill.dry_run=true") == 0
    assert capsys.readouterr().out == "dry run: distill.distiller=template makes no calls\n"
    assert not (experiment_yaml.parent / "run" / "memory").exists()


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["distill.distiller=file"], "distill.path: is not set"),
        (["distill.distiller=file", "distill.path=no.csv"], "distill.path: no.csv not found"),
        (["output_dir=elsewhere"], "run `tune run persona_prepare"),
    ],
)
def test_what_a_user_can_cause_is_one_line_and_nothing_is_written(
    monkeypatch: pytest.MonkeyPatch,
    experiment_yaml: Path,
    capsys: pytest.CaptureFixture[str],
    overrides: list[str],
    line: str,
) -> None:
    monkeypatch.chdir(experiment_yaml.parent)
    assert distill(monkeypatch, experiment_yaml, *overrides) == 2
    err = capsys.readouterr().err
    assert line in err
    assert err.count("\n") == 1
    assert not (experiment_yaml.parent / "run" / "memory").exists()
    assert not (experiment_yaml.parent / "elsewhere").exists()
