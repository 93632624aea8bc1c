"""CSV logs with a header: MovieLens 10M and later, and anyone's own."""

import csv
from collections.abc import Mapping
from pathlib import Path

from personas_tune.interactions.columns import pick_columns
from personas_tune.interactions.delimited import Layout, header_of, read_delimited
from personas_tune.interactions.log import RawLog

_DELIMITERS = ",\t;|"


def read_csv_log(path: Path, columns: Mapping[str, str], encoding: str = "utf-8") -> RawLog:
    """Read a log from CSV.

    Args:
        path: The file, which may end in ``.gz``.
        columns: ``data.columns``: names that the aliases don't know.
        encoding: The text's encoding.

    Raises:
        ConfigError: For an entry of ``columns`` that the file doesn't have.
        DataError: For a missing column or a row that can't be read.
    """
    layout = csv_layout(path, encoding)
    return read_delimited(layout, pick_columns(layout.names, columns, f"{path} row 1"))


def csv_layout(path: Path, encoding: str = "utf-8") -> Layout:
    """The layout of a CSV file; its delimiter is the header's most frequent of comma, tab, ``;`` and ``|``.

    Raises:
        DataError: If the file is empty.
    """
    header = header_of(path, encoding)
    delimiter = max(_DELIMITERS, key=header.count)
    return Layout(path, next(csv.reader([header], delimiter=delimiter)), delimiter, encoding=encoding)
