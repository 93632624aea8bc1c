"""MovieLens 100K: ``u.data`` with tabs, ``u.item`` with ``|``, a flag per genre and titles in Latin-1."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from personas_tune.interactions.columns import pick_columns
from personas_tune.interactions.delimited import Layout, read_delimited
from personas_tune.interactions.items import ItemRow, Record, delimited_records, parse_items
from personas_tune.interactions.log import RawLog
from personas_tune.interactions.text_files import pick_encoding

_GENRES = (
    "unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama", "Fantasy",
    "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western",
)  # fmt: skip
_ITEM_NAMES = ("item_id", "title", "release", "video_release", "url", *_GENRES)


def read_100k_log(path: Path, columns: Mapping[str, str], encoding: str | None = None) -> RawLog:
    """Read ``u.data``.

    Raises:
        ConfigError: If ``columns`` names anything: the file has no names.
        DataError: For a row that can't be read.
    """
    names = ("user_id", "item_id", "rating", "timestamp")
    layout = Layout(path, names, "\t", has_header=False, quoted=False, encoding=encoding or "utf-8")
    return read_delimited(layout, pick_columns(names, columns, str(path)))


def read_100k_items(path: Path, encoding: str | None = None) -> Iterator[ItemRow]:
    """Read ``u.item``."""
    encoding = encoding or pick_encoding(path, ("utf-8", "latin-1"))
    layout = Layout(path, _ITEM_NAMES, "|", has_header=False, quoted=False, encoding=encoding)
    records = ((row, _with_genre_names(record)) for row, record in delimited_records(layout))
    return parse_items(records, str(path))


def _with_genre_names(record: Record) -> Record:
    genres = [genre for genre in _GENRES if record[genre] == "1"]
    return {"item_id": record["item_id"], "title": record["title"], "genres": genres}
