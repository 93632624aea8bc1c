import os
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest

from personas_tune import cli
from personas_tune.config import bundled_configs, find_config, load_experiment

PROJECT = Path(__file__).parents[2]


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Run the console script's main in an empty folder; give status, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def run_main(*arguments):
        with pytest.raises(SystemExit) as stop:
            cli.main(arguments)
        captured = capsys.readouterr()
        return stop.value.code or 0, captured.out, captured.err

    return run_main


# ls


def test_ls_lists_every_recipe_that_is_installed_and_every_config(run):
    status, out, err = run("ls")
    installed = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    assert (status, err) == (0, "")
    listed = {line.split()[0] for line in out.splitlines() if line.startswith("  ")}
    assert listed == {*installed["py-modules"], *bundled_configs()}


def test_every_recipe_file_is_installed_and_every_package_too():
    installed = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    assert set(installed["py-modules"]) == {path.stem for path in (PROJECT / "recipes").glob("*.py")}
    packages = {path.parent for path in (PROJECT / "personas_tune").rglob("__init__.py")}
    named = {".".join(path.relative_to(PROJECT).parts) for path in packages}
    assert set(installed["packages"]) == named | {"personas_tune.configs"}


def test_ls_says_what_each_is_for(run):
    _, out, _ = run("ls")
    for line in out.splitlines():
        if line.startswith("  "):
            assert len(line.split(maxsplit=1)[1]) > 10
    assert "The paper's setting" in out


def test_ls_tells_of_the_bundled_configs_whatever_lies_in_this_folder(run):
    expected = run("ls")
    Path("quickstart.yaml").write_text("", encoding="utf-8")
    assert run("ls") == expected


# cp


@pytest.mark.parametrize("name", ["quickstart.yaml", "quickstart"])
def test_cp_copies_a_config(run, name):
    status, out, err = run("cp", name, ".")
    assert (status, out, err) == (0, "copied to quickstart.yaml\n", "")
    assert Path("quickstart.yaml").read_bytes() == find_config("quickstart.yaml").read_bytes()
    assert load_experiment("quickstart.yaml").output_dir == "runs/quickstart"


@pytest.mark.parametrize("name", ["persona_lora", "persona_lora.py"])
def test_cp_copies_a_recipe(run, name):
    assert run("cp", name, "mine.py")[0] == 0
    assert Path("mine.py").read_bytes() == (PROJECT / "recipes" / "persona_lora.py").read_bytes()


def test_cp_overwrites_only_when_told_to(run):
    Path("quickstart.yaml").write_text("mine", encoding="utf-8")
    status, out, err = run("cp", "quickstart.yaml", ".")
    assert (status, out) == (2, "")
    assert err == "error: quickstart.yaml: file exists; add --force to overwrite it\n"
    assert Path("quickstart.yaml").read_text(encoding="utf-8") == "mine"
    assert run("cp", "quickstart.yaml", ".", "--force")[0] == 0
    assert Path("quickstart.yaml").read_text(encoding="utf-8").startswith("# The embedded default")


@pytest.mark.parametrize(
    ("name", "nearest"), [("persona_lra", "persona_lora"), ("quikstart.yaml", "quickstart.yaml"), ("zzz", None)]
)
def test_cp_answers_an_unknown_name_with_the_nearest(run, name, nearest):
    status, out, err = run("cp", name, ".")
    assert (status, out, len(err.splitlines())) == (2, "", 1)
    assert err.startswith(f"error: {name!r}: no recipe and no config of that name is bundled; ")
    assert (f"did you mean {nearest}?" if nearest else "`personas-tune ls`") in err
    assert list(Path().iterdir()) == []


def test_cp_copies_nothing_but_what_is_bundled(run):
    Path("notes.txt").write_text("mine", encoding="utf-8")
    assert run("cp", "notes.txt", "copy.txt")[0] == 2
    assert not Path("copy.txt").exists()


def test_cp_into_a_folder_that_is_not_there_says_so(run):
    assert run("cp", "quickstart.yaml", "gone/x.yaml")[::2] == (2, "error: gone: no such folder; make it first\n")


def test_cp_to_where_nothing_can_be_written_says_so(run):
    Path("folder.yaml").mkdir()
    Path("folder.yaml/quickstart.yaml").mkdir()
    status, _, err = run("cp", "quickstart.yaml", "folder.yaml", "--force")
    assert status == 2
    assert err.startswith("error: folder.yaml/quickstart.yaml: can't be written (")
    assert len(err.splitlines()) == 1


# The script itself


def test_the_script_knows_its_version(run):
    assert run("--version")[:2] == (0, f"personas-tune {version('personas-tune')}\n")


def test_no_command_and_an_unknown_one_are_refused(run):
    assert run()[0] == 2
    assert run("list")[0] == 2


def test_the_console_script_is_installed(tmp_path):
    script = Path(sys.executable).parent / "personas-tune"
    ran = subprocess.run([script, "ls"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "persona_pipeline" in ran.stdout


# show


def write_run(output_dir):
    """A finished experiment with the history of its users."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from tiny import write_experiment

    workspace = write_experiment(Path(output_dir))
    samples = {"train": workspace.train_samples, "test": workspace.test_samples}
    parts = [
        table.append_column("split", pa.array([split] * table.num_rows))
        for split, table in ((split, pq.read_table(path)) for split, path in samples.items())
    ]
    pq.write_table(pa.concat_tables(parts), workspace.interactions)
    return workspace


def test_show_prints_a_user_of_the_only_run(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    write_run("runs/quickstart")
    status, out, err = run("show", "u1")
    assert (status, err) == (0, "")
    assert out.startswith("USER u1\n  rated       6 items, ")
    assert "persona     persona_cluster hasn't run" in out
    assert "-- Ratings 1-6 " + "-" * 45 + "\n   1  The " in out
    assert "    = 1 sentence unchanged\n    - I have seen 0 films.\n    + I have seen 6 films.\n" in out
    assert run("show", "u1", "--in", "runs/quickstart") == (0, out, "")


def test_show_asks_which_of_several_runs_is_meant(run):
    write_run("runs/a")
    write_run("runs/b")
    message = "error: current folder: 2 experiments (runs/a, runs/b); add --in DIR, the output_dir of one\n"
    assert run("show", "u1") == (2, "", message)


def test_show_answers_an_unknown_user_with_the_nearest(run):
    workspace = write_run("here")
    for user_id in ("u", "\udcff"):  # the second is what the shell hands over for a byte that is no text
        status, out, err = run("show", user_id, "--in", "here")
        assert (status, out, len(err.splitlines())) == (2, "", 1)
        assert err.startswith(f"error: {workspace.users}: no user ")
    assert "did you mean u" in run("show", "u", "--in", "here")[2]


def test_show_before_there_are_profiles_names_the_recipe(run):
    profiles = write_run("here").profiles
    profiles.unlink()
    assert run("show", "u1", "--in", "here") == (
        2,
        "",
        f"error: {profiles}: file not found; run `tune run persona_distill --config ...` first\n",
    )


def test_show_writes_a_page(run):
    write_run("here")
    assert run("show", "u1", "--in", "here", "--html", "u1.html") == (0, "written to u1.html\n", "")
    assert Path("u1.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_show_survives_a_reader_that_leaves_and_a_terminal_of_few_letters(run, encoding):
    import pyarrow.parquet as pq

    from personas_tune.memory.tables import profiles_table

    workspace = write_run("here")
    pq.write_table(profiles_table([("u1", 6, "J'ai vu \N{BLACK STAR} films.")], "file"), workspace.profiles)
    script = Path(sys.executable).parent / "personas-tune"
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    command = [script, "show", "u1", "--in", "here"]
    shown = subprocess.run(command, env=environment, capture_output=True, check=True)
    assert "J'ai vu \N{BLACK STAR} films.".encode(encoding, "replace") in shown.stdout
    leaving = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    leaving.stdout.close()
    assert leaving.stderr.read() == b""
    leaving.stderr.close()
    assert leaving.wait() == 0
