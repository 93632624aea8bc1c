"""Every command of README and docs is run, on a small world, or says what it needs."""

import csv
import os
import subprocess
import sys
from dataclasses import dataclass, field
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
    """Somebody who types the commands of the pages in one folder, each of them once."""

    folder: Path
    done: set[tuple[str, ...]] = field(default_factory=set)

    def type_in(self, command: Command) -> None:
        """Run a command that is not marked; a failure names page and line."""
        if command.mark or command.words in {*RUN_BY_CI, *self.done}:
            return
        outcome = _run(command.words, self.folder)
        assert outcome.status == 0, f"{command.where}: exit status {outcome.status}\n{outcome.out}{outcome.err}"
        self.done.add(command.words)


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
def reader(tmp_path_factory: pytest.TempPathFactory) -> Reader:
    """A reader who has a log and has run what other pages build on, so that each page can be tested alone."""
    folder = tmp_path_factory.mktemp("reader")
    for name in ("benchmarks", "tests"):
        (folder / name).symlink_to(ROOT / name)
    _write_shop(folder / "shop.csv")
    reader = Reader(folder)
    for command in PAGES["docs/quickstart.md"]:
        if command.words[-1] in ("quickstart.yaml", "output_dir=runs/six_personas"):
            reader.type_in(command)
    return reader


@pytest.mark.parametrize("page", [page for page, commands in PAGES.items() if commands])
def test_a_pages_commands_run_or_say_what_they_need(page: str, reader: Reader) -> None:
    for command in PAGES[page]:
        reader.type_in(command)


def test_there_are_commands_that_are_run_and_all_that_ci_runs_are_in_the_pages() -> None:
    commands = [command for commands in PAGES.values() for command in commands]
    assert {command.words for command in commands} >= set(RUN_BY_CI) - {("make", "docs")}
    run = {command.words[2] for command in commands if not command.mark and command.words[:2] == ("tune", "run")}
    assert run >= set(RECIPES) - {"persona_base"}


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


def test_a_marked_command_is_not_run(tmp_path: Path) -> None:
    Reader(tmp_path).type_in(Command("page.md", 7, ("make", "nothing"), "# needs a GPU"))


def test_a_key_that_the_page_sets_is_not_made_small() -> None:
    assert "epochs=1" in _small_keys(("persona_lora",))
    assert "epochs=1" not in _small_keys(("persona_lora", "epochs=3"))
