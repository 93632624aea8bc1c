"""What ``personas-tune show`` does: find the experiment, read one user, print or write a page."""

import os
import shutil
import sys
from pathlib import Path

from personas_tune.errors import ConfigError
from personas_tune.memory.page import render_page
from personas_tune.memory.user_tables import UserTables, read_user
from personas_tune.memory.user_text import write_user
from personas_tune.workspace import Workspace

_WIDTH_WITHOUT_TERMINAL = 90


def show_user(user_id: str, folder: Path | None = None, html: Path | None = None) -> None:
    """Print one user's history, profile as it grew, memories and persona, or write them as a page.

    Args:
        user_id: As in ``data/users.parquet``.
        folder: The ``output_dir`` of an experiment; see :func:`find_experiment`.
        html: Where to write the page; an older file is replaced.

    Raises:
        ConfigError: If there is no such user or folder, or the page can't be written.
        MissingInputError: If there are no profiles yet.
        DataError: If a table is damaged.
    """
    as_text = user_id.encode("utf-8", "replace").decode()  # the shell may hand over bytes that are no text
    view = read_user(as_text, UserTables.of(find_experiment(folder)))
    if html is None:
        _print(write_user(view, shutil.get_terminal_size((_WIDTH_WITHOUT_TERMINAL, 24)).columns))
        return
    try:
        html.write_text(render_page([view], f"User {as_text}"), encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"can't be written ({error.strerror})", where=str(html), remedy="write it elsewhere"
        ) from error
    print(f"written to {html}")


def find_experiment(folder: Path | None = None) -> Workspace:
    """The experiment in ``folder``; without one that in the current folder, else the only one in ``runs/``.

    Raises:
        ConfigError: If there is none or more than one.
    """
    if folder is not None:
        if not folder.is_dir():
            raise ConfigError("no such folder", where=str(folder), remedy="give the output_dir of an experiment")
        return Workspace.at(folder)
    if _is_experiment(Path()):
        return Workspace.at(Path())
    found = [path for path in sorted(Path("runs").glob("*")) if _is_experiment(path)]
    if len(found) == 1:
        return Workspace.at(found[0])
    what = f"{len(found)} experiments ({', '.join(map(str, found))})" if found else "no experiment here, nor in runs/"
    raise ConfigError(what, where="current folder", remedy="add --in DIR, the output_dir of one")


def _is_experiment(folder: Path) -> bool:
    return Workspace.at(folder).users.is_file()


def _print(text: str) -> None:
    encoding = sys.stdout.encoding or "utf-8"
    try:
        print(text.encode(encoding, "replace").decode(encoding), end="", flush=True)
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
