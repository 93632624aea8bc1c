import errno
import hashlib
import json
import os
import shutil
from contextlib import suppress
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from personas_tune import __version__
from personas_tune.errors import ConfigError, DataError, MissingInputError, SeveralErrors
from personas_tune.workspace import (
    COLUMNS,
    MANIFEST,
    STAGE_RECIPES,
    Workspace,
    missing_inputs,
    open_stage,
    read_json,
    read_table,
    sha256_of_file,
    sha256_of_inputs,
    stage_key,
    to_json,
)

SETTINGS = {"k": 4, "cohort": {"n_users": 5}}


@pytest.fixture
def source(tmp_path):
    """A file that a stage reads."""
    file = tmp_path / "log.csv"
    file.write_text("a", encoding="utf-8")
    return file


def tree(folder):
    """Every file below a folder with its bytes, every folder with None."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def run_stage(folder, inputs, settings=SETTINGS, seed=1, files=("a.txt", "sub/b.txt")):
    """Write a stage whose files hold their own names; say whether there was nothing to do."""
    with open_stage(folder, settings, inputs, seed=seed) as stage:
        if not stage.is_current:
            for name in files:
                stage.write_text(name, name)
        return stage.is_current


def fail_in_stage(folder, inputs):
    """Write a file and a folder of a stage, then fail."""
    with open_stage(folder, {"k": 5}, inputs) as stage:
        stage.write_text("a.txt", "new")
        stage.path("deep/er/b.bin").write_bytes(b"b")
        assert len(list(folder.parent.rglob("a.txt"))) > folder.exists()  # so there is something to leave
        raise ZeroDivisionError


# All or nothing


def test_a_stage_that_fails_leaves_nothing_not_even_folders(tmp_path, source):
    before = tree(tmp_path)
    with pytest.raises(ZeroDivisionError):
        fail_in_stage(tmp_path / "runs" / "one" / "data", [source])
    assert tree(tmp_path) == before


def test_a_stage_that_fails_leaves_its_last_results_as_they_were(tmp_path, source):
    folder = tmp_path / "run" / "data"
    run_stage(folder, [source])
    before = tree(tmp_path)
    with pytest.raises(ZeroDivisionError):
        fail_in_stage(folder, [source])
    assert tree(tmp_path) == before


def test_nothing_is_in_place_before_the_stage_ends(tmp_path, source):
    folder = tmp_path / "run" / "data"
    with open_stage(folder, SETTINGS, [source]) as stage:
        stage.write_text("a.txt", "a")
        assert not folder.exists()
    assert sorted(path.name for path in folder.iterdir()) == ["a.txt", MANIFEST]
    assert sorted(path.name for path in folder.parent.iterdir()) == ["data"]


def test_a_second_run_is_kept_out_while_the_first_writes(tmp_path, source):
    folder = tmp_path / "run" / "data"
    with open_stage(folder, SETTINGS, [source]) as stage:
        stage.write_text("a.txt", "first")
        with pytest.raises(ConfigError, match=rf"run/data: process {os.getpid()} is writing it; wait for it, or set"):
            run_stage(folder, [source])
    assert (folder / "a.txt").read_text() == "first"


def test_what_a_killed_run_left_is_removed_by_the_next(tmp_path, source):
    folder = tmp_path / "run" / "data"
    left = folder.parent / ".data.tmp" / "deep" / "left.bin"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"half")
    with open_stage(folder, SETTINGS, [source]) as stage:
        assert not left.parent.exists()
        stage.write_text("a.txt", "a")
    assert sorted(path.name for path in folder.parent.iterdir()) == ["data"]


def test_the_manifest_comes_last_so_that_half_a_move_is_no_finished_stage(tmp_path, source, monkeypatch):
    folder = tmp_path / "run" / "data"
    run_stage(folder, [source])
    replace = os.replace

    def full_disk(old, new):
        if Path(new).name == "b.txt":
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(old, new)

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(ConfigError, match=r"run/data: no space left on the disk; free some"):
        run_stage(folder, [source], settings={"k": 5})
    assert not (folder / MANIFEST).exists()
    monkeypatch.undo()
    assert not run_stage(folder, [source], settings={"k": 5})
    assert run_stage(folder, [source], settings={"k": 5})


def test_what_an_earlier_run_wrote_and_this_one_does_not_is_removed(tmp_path, source):
    folder = tmp_path / "adapters" / "persona"
    run_stage(folder, [source], files=("0/a.bin", "1/a.bin", "1/deep/b.bin", "both.txt"))
    (folder / "mine.txt").write_text("a note of the user's", encoding="utf-8")
    run_stage(folder, [source], settings={"k": 1}, files=("0/a.bin", "both.txt"))
    assert set(tree(folder)) == {"0", "0/a.bin", "both.txt", "mine.txt", MANIFEST}


def test_a_stage_does_not_touch_its_neighbours(tmp_path, source):
    run_stage(tmp_path / "run" / "data", [source])
    before = tree(tmp_path / "run" / "data")
    run_stage(tmp_path / "run" / "memory", [source])
    assert tree(tmp_path / "run" / "data") == before


@pytest.mark.parametrize("output", ["log.csv", "log.csv/run"])
def test_a_folder_that_can_not_be_made_is_named(tmp_path, source, output):
    before = tree(tmp_path)
    with pytest.raises(ConfigError, match=r"can't write there \(Not a directory\); set output_dir"):
        run_stage(tmp_path / output / "data", [])
    assert tree(tmp_path) == before


def test_a_file_in_the_stages_place_is_left_alone(tmp_path):
    (tmp_path / "data").write_text("mine", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"data: can't write there \(it is a file\)"):
        run_stage(tmp_path / "data", [])
    assert tree(tmp_path) == {"data": b"mine"}


# Up to date


def test_a_finished_stage_with_the_same_settings_and_inputs_is_current_and_stays_untouched(tmp_path, source):
    folder = tmp_path / "run" / "data"
    assert not run_stage(folder, [source])
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert run_stage(folder, [source])
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


@pytest.mark.parametrize("change", [{"settings": {"k": 5}}, {"settings": {}}, {"seed": 2}, {"seed": None}])
def test_a_changed_setting_or_seed_is_not_current(tmp_path, source, change):
    run_stage(tmp_path / "data", [source])
    assert not run_stage(tmp_path / "data", [source], **change)


def test_the_order_of_settings_does_not_matter(tmp_path, source):
    run_stage(tmp_path / "data", [source])
    assert run_stage(tmp_path / "data", [source], settings=dict(reversed(SETTINGS.items())))


def test_a_changed_input_is_not_current(tmp_path, source):
    run_stage(tmp_path / "data", [source])
    source.write_text("b", encoding="utf-8")
    assert not run_stage(tmp_path / "data", [source])


def test_a_folder_as_input_counts_with_every_file_in_it(tmp_path, source):
    inputs = tmp_path / "inputs"
    (inputs / "deep").mkdir(parents=True)
    (inputs / "deep" / "a").write_text("a", encoding="utf-8")
    run_stage(tmp_path / "data", [inputs])
    assert run_stage(tmp_path / "data", [inputs])
    (inputs / "deep" / "b").write_text("b", encoding="utf-8")
    assert not run_stage(tmp_path / "data", [inputs])


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "a.txt").write_text("a.txu", encoding="utf-8"),
        lambda folder: (folder / "sub" / "b.txt").unlink(),
        lambda folder: (folder / MANIFEST).unlink(),
        lambda folder: (folder / MANIFEST).write_text("[]", encoding="utf-8"),
        lambda folder: (folder / MANIFEST).write_text("{", encoding="utf-8"),
        lambda folder: (folder / MANIFEST).write_bytes(b"\xff\xfe"),
        lambda folder: (folder / MANIFEST).write_text('{"key": 1, "outputs": 2}', encoding="utf-8"),
    ],
)
def test_a_damaged_stage_is_not_current_and_is_made_again(tmp_path, source, damage):
    folder = tmp_path / "data"
    run_stage(folder, [source])
    whole = tree(folder)
    damage(folder)
    assert not run_stage(folder, [source])
    assert tree(folder) == whole
    assert run_stage(folder, [source])


def test_a_file_beside_the_outputs_changes_nothing(tmp_path, source):
    run_stage(tmp_path / "data", [source])
    (tmp_path / "data" / "note.txt").write_text("mine", encoding="utf-8")
    assert run_stage(tmp_path / "data", [source])


def test_a_moved_experiment_stays_current(tmp_path, source):
    old, new = tmp_path / "old", tmp_path / "elsewhere" / "new"
    old.mkdir()
    shutil.copy(source, old / "log.csv")
    run_stage(old / "data", [old / "log.csv"])
    new.parent.mkdir()
    shutil.move(old, new)
    assert run_stage(new / "data", [new / "log.csv"])


@given(st.dictionaries(st.text(), st.integers() | st.text() | st.none()))
def test_the_key_is_a_function_of_settings_and_of_the_inputs_bytes(settings):
    key = stage_key(settings, {"a/x": "1", "a/y": "2"})
    assert key == stage_key(dict(reversed(settings.items())), {"b/y": "2", "c/x": "1"})
    assert key != stage_key({**settings, "one more": 0}, {"a/x": "1", "a/y": "2"})
    assert key != stage_key(settings, {"a/x": "1", "a/y": "3"})


# The manifest


def test_the_manifest_says_what_made_the_stage(tmp_path, source):
    folder = tmp_path / "run" / "data"
    run_stage(folder, [source])
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    assert manifest["settings"] == SETTINGS
    assert manifest["seed"] == 1
    assert manifest["inputs"] == {str(source): hashlib.sha256(b"a").hexdigest()}
    assert manifest["outputs"] == {
        name: hashlib.sha256(name.encode()).hexdigest() for name in ("a.txt", "sub/b.txt")
    }  # fmt: skip
    assert manifest["versions"]["personas_tune"] == __version__
    assert {"python", "torch", "torchtune", "numpy", "pyarrow"} <= manifest["versions"].keys()


def test_equal_stages_have_equal_bytes(tmp_path, source):
    run_stage(tmp_path / "one" / "data", [source])
    run_stage(tmp_path / "two" / "data", [source])
    assert tree(tmp_path / "one") == tree(tmp_path / "two")


def test_equal_tables_have_equal_bytes(tmp_path):
    for name in ("one", "two"):
        with open_stage(tmp_path / name, {}) as stage:
            stage.write_table("t.parquet", pa.table({"user_id": ["a", "b"], "rating": [1.0, 2.5]}))
            stage.write_json("j.json", {"b": 1, "a": {"d": [2], "c": "é"}})
    assert tree(tmp_path / "one") == tree(tmp_path / "two")
    assert (tmp_path / "one" / "j.json").read_text(encoding="utf-8").index('"a"') == 4


def test_json_refuses_what_json_has_not():
    with pytest.raises(ValueError, match="nan"):
        to_json({"rmse": float("nan")})


# Reading


@pytest.mark.parametrize(("folder", "recipe"), STAGE_RECIPES.items())
def test_a_missing_file_names_the_recipe_that_writes_it(tmp_path, folder, recipe):
    with pytest.raises(MissingInputError, match=rf"{folder}/x: file not found; run `tune run {recipe} --config"):
        open_stage(tmp_path / "out", {}, [tmp_path / folder / "x"]).__enter__()
    with pytest.raises(MissingInputError, match=recipe):
        read_table(tmp_path / folder / "x.parquet")
    with pytest.raises(MissingInputError, match=recipe):
        read_json(tmp_path / folder / "x.json")


def test_inputs_of_several_recipes_are_missed_at_once_a_line_each_recipe(tmp_path):
    workspace = Workspace.at(tmp_path)
    inputs = [workspace.items, workspace.users, workspace.profiles, workspace.test_samples]
    assert len(missing_inputs(inputs)) == 3
    with pytest.raises(SeveralErrors) as caught:
        sha256_of_inputs(inputs)
    recipes = ("persona_prepare", "persona_distill", "persona_raft")
    assert all(recipe in line for recipe, line in zip(recipes, caught.value.lines, strict=True))


def test_a_table_that_is_cut_short_or_lacks_a_column_names_both(tmp_path):
    file = tmp_path / "data" / "items.parquet"
    file.parent.mkdir()
    pq.write_table(pa.table({"item_id": ["a"], "title": ["A"]}), file)
    assert read_table(file, ["title"]).num_rows == 1
    with pytest.raises(DataError, match=r"items\.parquet: column year, genres is missing; run `tune run persona_prep"):
        read_table(file, ["item_id", "year", "genres"])
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"items\.parquet: not a readable Parquet file \(.+\); run `tune run persona_"):
        read_table(file)


@example(207, b"\x80")  # a column's name
@given(st.integers(0, 10_000), st.binary(min_size=1, max_size=4))
def test_a_damaged_table_is_never_more_than_our_error(tmp_path_factory, place, junk):
    file = tmp_path_factory.mktemp("data") / "t.parquet"
    pq.write_table(pa.table({"user_id": ["a", "b"] * 20, "rating": [1.0, 2.0] * 20}), file)
    content = file.read_bytes()
    place %= len(content)
    file.write_bytes(content[:place] + junk + content[place + len(junk) :])
    with suppress(DataError):  # any other error is a bug of ours
        read_table(file, ["user_id"]).to_pylist()


@pytest.mark.parametrize("content", [b"{", b"\xff", b""])
def test_json_that_is_none_is_named(tmp_path, content):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(DataError, match=r"x\.json: not JSON"):
        read_json(tmp_path / "x.json")


def test_a_workspace_names_its_files_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    workspace = Workspace.at("runs/one")
    assert workspace.root == tmp_path / "runs" / "one"
    assert workspace.adapter_set("persona") == tmp_path / "runs/one/adapters/persona"
    assert workspace.predictions("base").name == "predictions_base.parquet"
    assert Workspace.at("~/x").root == Path.home() / "x"
    assert not workspace.root.exists()


def test_the_columns_of_the_contract_stand_first_in_every_table():
    assert COLUMNS["samples"] == ("user_id", "item_id", "position", "rating", "persona", "memory_positions")
    assert all(columns[0] in ("user_id", "item_id") for columns in COLUMNS.values())


def test_hashes_are_those_of_sha256(source):
    assert sha256_of_file(source) == hashlib.sha256(b"a").hexdigest()
