"""Every command of README and docs is run, on a small world, or says what it needs."""

import csv
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from documented import ROOT, Command, commands_of, pages_in_reading_order
from pipelines import run_recipe
from several import Outcome

from personas_tune.cli import RECIPES

RUN_BY_CI = {
    ("make", "quickstart"): "a step of .ci/run, with an environment of its own",
    ("make", "test"): "a step of .ci/run; this test is a part of it",
    ("make", "docs"): "a step of .ci/run, and test_docs_site builds the same",
    ("make", "check"): "three steps of .ci/run: lint, types, test",
}
# Long runs, by config, and the test that runs a short form of each.
SHORT_FORMS = {
    "quickstart_base.yaml": "test_pipeline.py",
    "quickstart_llama3_base.yaml": "test_grid_llama3.py",
    "paper_table1_tiny.yaml": "test_grid_paper.py",
}
# What makes the quickstart small; a key that a page sets itself stays as the page has it.
SMALL = {
    "data.world.n_users": 200,
    "data.cohort.n_users": 6,
    "data.split.test_rows": 24,
    "personas.k_max": 6,
    "batch_size": 4,
    "epochs": 1,
    "max_steps_per_epoch": 1,
    "evaluation.n_resamples": 99,
}
LIMIT = 300  # seconds that one command may take in a process of its own
PAGES = {str(page.relative_to(ROOT)): commands_of(page) for page in pages_in_reading_order()}


@dataclass
class Reader:
    """Somebody who types commands of a page in one folder."""

    folder: Path

    def type_in(self, command: Command) -> None:
        """Run a command that is not marked; a failure names page and line."""
        if command.mark or command.words in RUN_BY_CI:
            return
        outcome = _run(command.words, self.folder)
        assert outcome.status == 0, f"{command.where}: exit status {outcome.status}\n{outcome.out}{outcome.err}"


def _run(words: tuple[str, ...], folder: Path) -> Outcome:
    shrunk = (*words, *_small_keys(words)) if set(words) & set(RECIPES) else words
    if words[:2] == ("tune", "run") and words[2] in RECIPES:
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            return run_recipe(shrunk[2], *shrunk[4:])
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        ["env", *shrunk], cwd=folder, env={**os.environ, "PATH": path},
        capture_output=True, text=True, timeout=LIMIT, check=False,
    )  # fmt: skip
    return Outcome(done.returncode, done.stdout, done.stderr)


def _small_keys(words: tuple[str, ...]) -> list[str]:
    own = {word.partition("=")[0] for word in words}
    return [f"{key}={value}" for key, value in SMALL.items() if key not in own]


def _write_shop(path: Path) -> None:
    """The log that docs/own_data.md speaks of: 60 ratings from 1 to 10 of each of 12 users."""
    rng = np.random.default_rng(0)
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["user_id", "item_id", "rating"])
        for user in range(12):
            writer.writerows([f"u{user}", f"i{item}", rng.integers(1, 11)] for item in rng.permutation(80)[:60])


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What every page may count on: a log, and the two runs of the quickstart's page that others build on."""
    folder = tmp_path_factory.mktemp("prepared")
    for name in ("benchmarks", "tests"):
        (folder / name).symlink_to(ROOT / name)
    _write_shop(folder / "shop.csv")
    for command in PAGES["docs/quickstart.md"]:
        if command.words[-1] in ("quickstart.yaml", "output_dir=runs/six_personas"):
            Reader(folder).type_in(command)
    return folder


@pytest.fixture
def reader(prepared: Path, tmp_path: Path) -> Reader:
    """A reader with a copy of it, so that no page depends on what another one left."""
    return Reader(shutil.copytree(prepared, tmp_path / "reader", symlinks=True))


@pytest.mark.parametrize("page", [page for page, commands in PAGES.items() if commands])
def test_a_pages_commands_run_or_say_what_they_need(page: str, reader: Reader) -> None:
    for command in PAGES[page]:
        reader.type_in(command)


def test_there_are_commands_that_are_run_and_all_that_ci_runs_are_in_the_pages() -> None:
    commands = [command for commands in PAGES.values() for command in commands]
    assert {command.words for command in commands} >= set(RUN_BY_CI) - {("make", "docs")}
    assert {command.words[0] for command in commands} >= {"tune", "personas-tune", "make", "pip", "vllm"}
    run = {command.words[2] for command in commands if not command.mark and command.words[:2] == ("tune", "run")}
    assert run >= set(RECIPES) - {"persona_base"}


def test_what_takes_minutes_is_a_benchmark_or_has_a_short_form_that_a_test_runs() -> None:
    marked = [command for commands in PAGES.values() for command in commands if command.mark]
    long = [command for command in marked if command.mark and command.mark.startswith("# takes")]
    others = [command for command in long if not any(word.startswith("benchmarks/") for word in command.words)]
    assert {command.words[4] for command in others} == set(SHORT_FORMS)
    assert all((Path(__file__).parent / test).is_file() for test in SHORT_FORMS.values())


EXAMPLE = """
Text with `tune run persona_eval --config a.yaml`, which is no block.

```
tune run persona_lora --config a.yaml
OMP_NUM_THREADS=1 python benchmarks/rows.py --rows 2   # takes 3 minutes on one core
tune run persona_lora --config a.yaml \\
    epochs=1 'stages=[a, b]'   # needs a key, and time
# needs a GPU; all of these
tune run persona_lora --config b.yaml
# a remark
personas-tune show u1   # a remark

personas-tune ls
pip install something
export KEY=...   # sets the shell up, as the next lines do
. .venv/bin/activate
S='stages=[a, b]'
python -m module
```

```
| a printed | table |
```

```text
output, which isn't a command
```

```python
make = 3
```
"""


def test_commands_are_found_with_page_line_and_mark(tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text(EXAMPLE, encoding="utf-8")
    commands = commands_of(tmp_path / "page.md", tmp_path)
    assert [(command.line, command.mark, command.words[-1]) for command in commands] == [
        (5, None, "a.yaml"),
        (6, "# takes 3 minutes", "2"),
        (7, "# needs a key", "stages=[a, b]"),
        (10, "# needs a GPU", "b.yaml"),
        (12, "# needs a GPU", "u1"),
        (14, None, "ls"),
        (15, None, "something"),
        (19, None, "module"),
    ]
    assert {command.page for command in commands} == {"page.md"}


@pytest.mark.parametrize(
    "words",
    [
        ("tune", "run", "persona_prepare", "--config", "quickstart.yaml", "seeed=1"),
        ("personas-tune", "cp", "none.yaml", "."),
        ("make", "nothing"),
    ],
    ids=lambda words: words[0],
)
def test_a_command_that_fails_is_told_with_its_page_and_line(words: tuple[str, ...], tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=rf"page\.md:7: {words[0]} .*: exit status 2"):
        Reader(tmp_path).type_in(Command("page.md", 7, words, None))


def test_text_that_is_no_command_is_told_with_its_page_and_line(tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text("```\nit's output\n```\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"page\.md:2: no command: it's output"):
        commands_of(tmp_path / "page.md", tmp_path)


def test_a_marked_command_is_not_run(tmp_path: Path) -> None:
    Reader(tmp_path).type_in(Command("page.md", 7, ("make", "nothing"), "# needs a GPU"))


def test_a_key_that_the_page_sets_is_not_made_small() -> None:
    assert "epochs=1" in _small_keys(("persona_lora",))
    assert "epochs=1" not in _small_keys(("persona_lora", "epochs=3"))
