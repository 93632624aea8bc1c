import sys
from pathlib import Path

import persona_distill
import pyarrow.parquet as pq
import pytest
from memory_tables import random_log


@pytest.fixture
def experiment_yaml(tmp_path: Path) -> Path:
    """A prepared experiment's YAML, with its data folder beside it."""
    folder = tmp_path / "run" / "data"
    folder.mkdir(parents=True)
    names = ("interactions", "items", "users")
    for name, table in zip(names, random_log(seed=0), strict=True):
        if name == "users":
            for column in ("n_train", "n_test", "mean_rating", "activity", "conformity", "diversity"):
                table = table.append_column(column, table["activity_tier"])
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
    assert sorted(path.name for path in folder.iterdir()) == ["manifest.json", "memories.parquet", "profiles.parquet"]
    assert "9 profiles of 3 users and 51 memories written to" in capsys.readouterr().out
    assert distill(monkeypatch, experiment_yaml) == 0
    assert "up to date" in capsys.readouterr().out


def test_two_runs_give_the_same_bytes(monkeypatch: pytest.MonkeyPatch, experiment_yaml: Path) -> None:
    folder = experiment_yaml.parent / "run" / "memory"
    files = [folder / "profiles.parquet", folder / "memories.parquet"]
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
    assert "3 profiles of 3 users and 0 memories" in out


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (
            ["distill.distiller=openai"],
            "distill.distiller: openai is not in this version yet; "
            "use distill.distiller=template (offline) or =file (your own profiles)",
        ),
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
