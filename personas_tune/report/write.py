"""What ``personas-tune report`` and the end of ``persona_eval`` do."""

import os
from dataclasses import replace
from pathlib import Path

from personas_tune.errors import ConfigError
from personas_tune.report.against import write_comparison
from personas_tune.report.examples import N_EXAMPLES
from personas_tune.report.page import write_report
from personas_tune.report.run import files_of, read_run
from personas_tune.workspace import Workspace, absolute_path, full_disk_in_a_line, open_stage, read_json, sync_to_disk


def build_report(folder: str | Path) -> Path:
    """Write ``report/index.html`` of an experiment, unless it is up to date.

    Returns:
        The page.

    Raises:
        ConfigError: If there is no such folder.
        MissingInputError: If the experiment isn't evaluated yet.
        DataError: If a file is damaged.
    """
    workspace = _evaluated(folder)
    seed = read_json(workspace.metrics)["settings"]["seed"]
    with open_stage(workspace.report, {"examples": N_EXAMPLES}, files_of(workspace), seed=seed) as stage:
        if not stage.is_current:
            stage.write_text("index.html", write_report(read_run(workspace)))
    return workspace.report / "index.html"


def build_comparison(folder: str | Path, other: str | Path) -> Path:
    """Write ``report/against_<other's name>.html`` of an experiment.

    Args:
        folder: The experiment that the page is written in.
        other: The one beside it.

    Returns:
        The page.

    Raises:
        ConfigError: If a folder isn't there, or the page can't be written.
        MissingInputError: If one of them isn't evaluated yet.
        DataError: If a file is damaged.
    """
    run, beside = (read_run(_evaluated(each)) for each in (folder, other))
    page = run.workspace.report / f"against_{beside.name}.html"
    if run.name == beside.name:
        run, beside = (replace(each, name="/".join(each.workspace.root.parts[-2:])) for each in (run, beside))
    _write(page, write_comparison(run, beside))
    return page


def show_report(folder: Path, other: Path | None) -> None:
    """Write a report, or a comparison with another run, and print where it is."""
    print(f"report: {build_report(folder) if other is None else build_comparison(folder, other)}")


def _evaluated(folder: str | Path) -> Workspace:
    workspace = Workspace(absolute_path(folder).resolve())
    if not workspace.root.is_dir():
        raise ConfigError("no such folder", where=str(folder), remedy="give the output_dir of an experiment")
    read_json(workspace.metrics)  # tells which recipe is to be run
    return workspace


def _write(page: Path, text: str) -> None:
    staging = page.with_name(f".{page.name}.tmp")
    try:
        with full_disk_in_a_line(page):
            page.parent.mkdir(parents=True, exist_ok=True)
            staging.write_text(text, encoding="utf-8")
            sync_to_disk(staging)
            os.replace(staging, page)
    except OSError as error:
        raise ConfigError(f"can't be written ({error.strerror})", where=str(page), remedy="make room there") from error
