"""Two finished pipelines that the tests look at, run once: on a small CSV log and on a small world."""

from collections.abc import Callable
from pathlib import Path
from shutil import copytree

import pytest
from pipelines import Finished, csv_experiment, run_to_the_end, small_log, world_experiment, write_yaml


@pytest.fixture(scope="session")
def csv_run(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    folder = tmp_path_factory.mktemp("csv")
    small_log().write(folder)
    return run_to_the_end(write_yaml(folder / "experiment.yaml", csv_experiment(folder, tiny_checkpoint)))


@pytest.fixture(scope="session")
def world_run(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    folder = tmp_path_factory.mktemp("world")
    return run_to_the_end(write_yaml(folder / "experiment.yaml", world_experiment(folder, tiny_checkpoint)))


@pytest.fixture
def copy_of(tmp_path: Path) -> Callable[[Finished], Path]:
    """Copies a finished pipeline's folder, so that a test may change it."""
    return lambda run: Path(copytree(run.root, tmp_path / "copy"))
