"""MovieLens 1M and 10M: ``::`` between values, no headers, titles in Latin-1 (1M) or UTF-8 (10M)."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from personas_tune.interactions.columns import pick_columns
from personas_tune.interactions.delimited import Layout, read_delimited
from personas_tune.interactions.items import ItemRow, delimited_records, parse_items
from personas_tune.interactions.log import RawLog
from personas_tune.interactions.text_files import pick_encoding


def read_dat_log(path: Path, columns: Mapping[str, str], encoding: str | None = None) -> RawLog:
    """Read ``ratings.dat``.

    Raises:
        ConfigError: If ``columns`` names anything: the file has no names.
        DataError: For a row that can't be read.
    """
    names = ("user_id", "item_id", "rating", "timestamp")
    layout = Layout(path, names, "::", has_header=False, quoted=False, encoding=encoding or "utf-8")
    return read_delimited(layout, pick_columns(names, columns, str(path)))


def read_dat_items(path: Path, encoding: str | None = None) -> Iterator[ItemRow]:
    """Read ``movies.dat``."""
    encoding = encoding or pick_encoding(path, ("utf-8", "latin-1"))
    names = ("item_id", "title", "genres")
    layout = Layout(path, names, "::", has_header=False, quoted=False, encoding=encoding)
    return parse_items(delimited_records(layout), str(path))
