"""RecBole's atomic files: tab-separated, with ``name:type`` headers; a ``.inter`` and the ``.item`` beside it."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from personas_tune.interactions.columns import pick_columns
from personas_tune.interactions.delimited import Layout, header_of, read_delimited
from personas_tune.interactions.items import ItemRow, delimited_records, parse_items
from personas_tune.interactions.log import RawLog


def read_recbole_log(path: Path, columns: Mapping[str, str], encoding: str = "utf-8") -> RawLog:
    """Read a ``.inter`` file; ``columns`` takes names with or without their ``:type``.

    Raises:
        ConfigError: For an entry of ``columns`` that the file doesn't have.
        DataError: For a missing column or a row that can't be read.
    """
    layout = _layout(path, encoding)
    overrides = {column: name.partition(":")[0] for column, name in columns.items()}
    return read_delimited(layout, pick_columns(layout.names, overrides, f"{path} row 1"))


def read_recbole_items(path: Path, encoding: str = "utf-8") -> Iterator[ItemRow]:
    """Read a ``.item`` file; RecBole puts a space between the values of a sequence, and so between genres."""
    return parse_items(delimited_records(_layout(path, encoding)), str(path), separator=" ")


def _layout(path: Path, encoding: str) -> Layout:
    names = [field.partition(":")[0] for field in header_of(path, encoding).split("\t")]
    return Layout(path, names, "\t", quoted=False, encoding=encoding)
