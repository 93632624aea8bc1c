"""What ``personas-tune report`` and the end of ``persona_eval`` do."""

import os
from contextlib import suppress
from dataclasses import replace
from errno import EISDIR, ENAMETOOLONG, ENOTDIR
from pathlib import Path

from personas_tune.errors import ConfigError
from personas_tune.report.against import write_comparison
from personas_tune.report.examples import N_EXAMPLES
from personas_tune.report.page import write_report
from personas_tune.report.run import files_of, read_metrics, read_run
from personas_tune.workspace import Workspace, absolute_path, full_disk_in_a_line, open_stage, sync_to_disk

# What helps where a comparison can't be written, by the system's error number.
_REMEDIES = {
    EISDIR: "move that folder away",
    ENAMETOOLONG: "give the folder of the other run a shorter name",
    ENOTDIR: "move that file away",
}


def build_report(folder: str | Path) -> Path:
    """Write ``report/index.html`` of an experiment, unless it is up to date.

    Returns:
        The page.

    Raises:
        ConfigError: If there is no such folder, or the page can't be written.
        MissingInputError: If the experiment isn't evaluated yet.
        DataError: If a file is damaged.
    """
    workspace = _experiment(folder)
    _require_folder(workspace.report)
    seed = read_metrics(workspace)["settings"]["seed"]
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
    run, beside = (read_run(_experiment(each)) for each in (folder, other))
    _require_folder(run.workspace.report)
    page = run.workspace.report / f"against_{beside.name}.html"
    if run.name == beside.name:
        run, beside = (replace(each, name="/".join(each.workspace.root.parts[-2:])) for each in (run, beside))
    _write(page, write_comparison(run, beside))
    return page


def show_report(folder: Path, other: Path | None) -> None:
    """Write a report, or a comparison with another run, and print where it is."""
    print(f"report: {build_report(folder) if other is None else build_comparison(folder, other)}")


def _experiment(folder: str | Path) -> Workspace:
    workspace = Workspace(absolute_path(folder).resolve())
    if not os.path.isdir(workspace.root):  # False for a name that is too long, too
        raise ConfigError("no such folder", where=str(folder), remedy="give the output_dir of an experiment")
    return workspace


def _require_folder(report: Path) -> None:
    if report.exists() and not report.is_dir():
        raise ConfigError("it is a file", where=str(report), remedy=_REMEDIES[ENOTDIR])


def _write(page: Path, text: str) -> None:
    staging = page.with_name(f".{page.name}.tmp")
    try:
        with full_disk_in_a_line(page):
            page.parent.mkdir(parents=True, exist_ok=True)
            staging.write_text(text, encoding="utf-8")
            sync_to_disk(staging)
            os.replace(staging, page)
    except OSError as error:
        with suppress(OSError):
            staging.unlink()
        remedy = _REMEDIES.get(error.errno or 0, "make the folder writable")
        raise ConfigError(f"can't be written ({error.strerror})", where=str(page), remedy=remedy) from error
