"""What is known of an item, from whatever file tells it."""

import functools
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from personas_tune.errors import DataError
from personas_tune.interactions.columns import LOG_ALIASES, find_alias
from personas_tune.interactions.delimited import Layout, ragged, read_rows
from personas_tune.interactions.log import MEND_ROW
from personas_tune.interactions.titles import split_title
from personas_tune.interactions.values import id_text

ITEM_ALIASES: dict[str, tuple[str, ...]] = {
    "item_id": LOG_ALIASES["item_id"],
    "title": ("title", "movietitle", "name"),
    "year": ("year", "releaseyear"),
    "genres": ("genres", "genre", "class", "categories"),
    "summary": ("summary", "description", "overview"),
    "cast": ("cast", "actors"),
}
_NO_GENRES = ("(no genres listed)", "unknown")
_YEAR = re.compile(r"(\d{4})(\.0|-\d\d.*)?")


class Item(NamedTuple):
    """One item; what isn't known is None or empty."""

    title: str | None = None
    year: int | None = None
    genres: tuple[str, ...] = ()
    summary: str | None = None
    cast: tuple[str, ...] = ()


class ItemRow(NamedTuple):
    """An item as one row of a file tells it."""

    item_id: str
    item: Item


Record = Mapping[str, Any]


def parse_items(records: Iterable[tuple[int, Record]], where: str, separator: str = "|") -> Iterator[ItemRow]:
    """Items from rows of named values.

    Args:
        records: Row number and values by column name.
        where: The file's name for messages.
        separator: What stands between genres, or names, that are one text.

    Raises:
        DataError: For a missing column, an empty or repeated id, or a year that isn't one, with its row.
    """
    seen: set[str] = set()
    for row, record in records:
        columns = _item_columns(tuple(record), where)
        item_id = _as_id(record[columns["item_id"]])
        if item_id is None:
            raise DataError("empty item_id", where=f"{where} row {row}", remedy=MEND_ROW)
        if item_id in seen:
            raise DataError(f"item {item_id!r} again", where=f"{where} row {row}", remedy="keep one row an item")
        seen.add(item_id)
        values = {column: record[name] for column, name in columns.items()}
        yield ItemRow(item_id, _as_item(values, separator, f"{where} row {row}"))
    if not seen:
        raise DataError("no items", where=where, remedy="check the file")


def delimited_records(layout: Layout) -> Iterator[tuple[int, Record]]:
    """Rows of a delimited file as values by column name.

    Raises:
        DataError: For a row with more or fewer values than columns.
    """
    for row, fields in read_rows(layout):
        if mistake := ragged(layout, row, fields):
            raise mistake
        yield row, dict(zip(layout.names, fields, strict=True))


@functools.lru_cache(maxsize=64)
def _item_columns(names: Sequence[str], where: str) -> dict[str, str]:
    """The file's own name of each item column that it has."""
    found = {column: find_alias(names, aliases) for column, aliases in ITEM_ALIASES.items()}
    columns = {column: name for column, name in found.items() if name is not None}
    listed = ", ".join(repr(name) for name in names[:12])
    if "item_id" not in columns:
        raise DataError(f"no item_id column among {listed}", where=where, remedy="name the ids item_id or movie_id")
    if len(columns) == 1:
        remedy = f"name one of them {', '.join(list(ITEM_ALIASES)[1:])}"
        raise DataError(f"nothing about the items among {listed}", where=where, remedy=remedy)
    return columns


def _as_item(values: Record, separator: str, where: str) -> Item:
    text = _as_text(values.get("title"))
    title, title_year = split_title(text) if text else (None, None)
    year = _as_year(values.get("year"), where)
    return Item(
        title=title,
        year=title_year if year is None else year,
        genres=tuple(genre for genre in _as_list(values.get("genres"), separator) if genre not in _NO_GENRES),
        summary=_as_text(values.get("summary")),
        cast=_as_list(values.get("cast"), "|"),
    )


def _is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _as_id(value: Any) -> str | None:
    return None if _is_missing(value) or not str(value).strip() else id_text(value)


def _as_text(value: Any) -> str | None:
    if isinstance(value, list):
        value = " ".join(str(part) for part in value if not _is_missing(part))
    return None if _is_missing(value) else " ".join(str(value).split()) or None


def _as_list(value: Any, separator: str) -> tuple[str, ...]:
    if _is_missing(value):
        return ()
    parts = value if isinstance(value, list) else str(value).split(separator)
    names = (str(part).strip() for part in parts if not _is_missing(part))
    return tuple(dict.fromkeys(name for name in names if name))


def _as_year(value: Any, where: str) -> int | None:
    text = _as_text(value)
    if text is None:
        return None
    found = _YEAR.fullmatch(text)
    if found is None:
        raise DataError(f"year {text!r} is not a year", where=where, remedy="mend the row or leave the year empty")
    return int(found[1])
