"""Where a log lies and which reader takes it."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from personas_tune.errors import ConfigError, DataError, MissingInputError
from personas_tune.interactions.csv_log import csv_layout, read_csv_log
from personas_tune.interactions.items import ItemRow, delimited_records, parse_items
from personas_tune.interactions.jsonl_log import json_rows, read_jsonl_log
from personas_tune.interactions.log import RawLog
from personas_tune.interactions.movielens_100k import read_100k_items, read_100k_log
from personas_tune.interactions.movielens_dat import read_dat_items, read_dat_log
from personas_tune.interactions.parquet_log import parquet_rows, read_parquet_log
from personas_tune.interactions.recbole import read_recbole_items, read_recbole_log
from personas_tune.interactions.text_files import pick_encoding, suffix_of
from personas_tune.workspace import home_path

_GET_MOVIELENS = (
    "download https://files.grouplens.org/datasets/movielens/ml-1m.zip (its licence forbids passing it on), "
    "unzip it and set data.path=FOLDER"
)


@dataclass(frozen=True)
class LogFiles:
    """The files that make up a log.

    Args:
        family: Which reader takes them: ``dat``, ``100k``, ``csv``, ``jsonl``, ``parquet`` or ``recbole``.
        log: The interactions.
        items: What the log's own files tell of the items, if anything.
    """

    family: str
    log: Path
    items: Path | None = None

    @property
    def paths(self) -> list[Path]:
        """Every file that is read."""
        return [self.log] if self.items is None else [self.log, self.items]


@dataclass(frozen=True)
class _MovieLens:
    family: str
    log: str
    items: str


_MOVIELENS = (
    _MovieLens("dat", "ratings.dat", "movies.dat"),
    _MovieLens("100k", "u.data", "u.item"),
    _MovieLens("csv", "ratings.csv", "movies.csv"),
)
_READERS: dict[str, Callable[[Path, Mapping[str, str], str], RawLog]] = {
    "dat": read_dat_log,
    "100k": read_100k_log,
    "csv": read_csv_log,
    "jsonl": read_jsonl_log,
    "parquet": read_parquet_log,
    "recbole": read_recbole_log,
}


def find_log(data_format: str, path: str | None) -> LogFiles:
    """The files of a log.

    Args:
        data_format: ``movielens`` (a folder, whose files tell which MovieLens it is, or the ratings file),
            ``csv``, ``jsonl``, ``parquet`` or ``recbole`` (a file, or a folder with one ``.inter``).
        path: The folder or file.

    Raises:
        ConfigError: If no path is set.
        MissingInputError: If nothing is there.
        DataError: For a folder without known files, or where a file is wanted.
    """
    get = _GET_MOVIELENS if data_format == "movielens" else "check data.path"
    if not path:
        remedy = get if data_format == "movielens" else "set data.path to the log"
        raise ConfigError("no log is named", where="data.path", remedy=remedy)
    place = home_path(path)
    if not place.exists():
        raise MissingInputError("no such file or folder", where=str(place), remedy=get)
    if data_format == "movielens":
        return _find_movielens(place)
    if data_format == "recbole":
        return _find_recbole(place)
    if place.is_dir():
        remedy = f"set data.path to the {data_format} file"
        raise DataError("a folder where a file is wanted", where=str(place), remedy=remedy)
    return LogFiles(data_format, place)


def find_file(path: str | None, key: str) -> Path | None:
    """The file that a key names, or None if the key is null.

    Raises:
        MissingInputError: If there is no such file.
    """
    if path is None:
        return None
    place = home_path(path)
    if not place.is_file():
        raise MissingInputError("file not found", where=str(place), remedy=f"check {key}")
    return place


def read_log(files: LogFiles, columns: Mapping[str, str], encoding: str | None = None) -> RawLog:
    """Read the interactions; see the family's reader.

    Args:
        files: What :func:`find_log` found.
        columns: ``data.columns``: a log column to the file's name of it.
        encoding: The text's encoding; UTF-8 if None.
    """
    return _READERS[files.family](files.log, columns, encoding or "utf-8")


def read_own_items(files: LogFiles, encoding: str | None = None) -> Iterator[ItemRow]:
    """Read what the log's own files tell of the items; nothing if there is no such file."""
    if files.items is None:
        return iter(())
    if files.family == "dat":
        return read_dat_items(files.items, encoding)
    if files.family == "100k":
        return read_100k_items(files.items, encoding)
    if files.family == "recbole":
        return read_recbole_items(files.items, encoding or "utf-8")
    return read_item_metadata(files.items, encoding)


def read_item_metadata(path: Path, encoding: str | None = None) -> Iterator[ItemRow]:
    """Read an item file of the user's: CSV, JSONL or Parquet by its suffix, compressed or not.

    Args:
        path: The file.
        encoding: What to fall back on where the text isn't UTF-8.

    Raises:
        DataError: For another suffix, a missing column or a row that can't be read.
    """
    suffix = suffix_of(path)
    if suffix == ".parquet":
        return parse_items(parquet_rows(path), str(path))
    text = pick_encoding(path, ["utf-8", encoding] if encoding else ["utf-8"])
    if suffix in (".csv", ".tsv", ".txt"):
        return parse_items(delimited_records(csv_layout(path, text)), str(path))
    if suffix in (".jsonl", ".ndjson", ".json"):
        return parse_items(json_rows(path, text), str(path))
    raise DataError(f"unknown kind of item file {suffix!r}", where=str(path), remedy="use .csv, .jsonl or .parquet")


def _find_movielens(place: Path) -> LogFiles:
    for kind in _MOVIELENS:
        if place.is_file() and place.name in (kind.log, f"{kind.log}.gz"):
            return LogFiles(kind.family, place, _present(place.parent, kind.items))
        log = _present(place, kind.log) if place.is_dir() else None
        if log is not None:
            return LogFiles(kind.family, log, _present(place, kind.items))
    known = ", ".join(kind.log for kind in _MOVIELENS)
    if place.is_file():
        remedy = "set data.format=csv, jsonl or parquet"
        raise DataError(f"not one of MovieLens's {known}", where=str(place), remedy=remedy)
    raise DataError(f"none of {known} in this folder", where=str(place), remedy=_GET_MOVIELENS)


def _find_recbole(place: Path) -> LogFiles:
    logs = sorted(place.glob("*.inter")) if place.is_dir() else [place]
    if len(logs) != 1:
        what = f"{len(logs)} .inter files in this folder where one is wanted"
        raise DataError(what, where=str(place), remedy="set data.path to the .inter file")
    return LogFiles("recbole", logs[0], _present(logs[0].parent, f"{logs[0].stem}.item"))


def _present(folder: Path, name: str) -> Path | None:
    return next((folder / each for each in (name, f"{name}.gz") if (folder / each).is_file()), None)
