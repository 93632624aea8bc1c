"""The cohort's train interactions user by user, with what is known of their items, in little memory.

For distillers that take one user at a time: what is held is the table of items, the details of those
that were met, and one batch of rows, however many users there are.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from personas_tune.errors import DataError, MissingInputError
from personas_tune.memory.history import Ints, keep_train, raise_missing_items, title_with_year
from personas_tune.workspace import COLUMNS, read_table

BATCH_ROWS = 16_384  # 5 MB of Python objects; larger batches are no faster
_PREPARE = "run `tune run persona_prepare --config ...`"

_USERS = pa.schema([("user_id", pa.string()), ("n_train", pa.int64())])
_COUNTS = pa.schema([("n_train", pa.int64())])
_INTERACTIONS = pa.schema(
    [
        ("user_id", pa.string()),
        ("item_id", pa.string()),
        ("rating", pa.float64()),
        ("position", pa.int32()),
        ("split", pa.string()),
    ]
)


@dataclass(frozen=True, slots=True)
class RatedItem:
    """One train interaction and its item.

    Attributes:
        item_id: The item.
        position: How many interactions the user had before.
        rating: The user's.
        title: With the year in brackets where it is known.
        genres: Empty if unknown.
        summary: Empty if unknown.
        cast: The item's people; empty if unknown.
        mean_rating: The item's historical average, if it has one.
    """

    item_id: str
    position: int
    rating: float
    title: str
    genres: tuple[str, ...]
    summary: str
    cast: tuple[str, ...]
    mean_rating: float | None


@dataclass(frozen=True, slots=True)
class UserHistory:
    """One user's train interactions, oldest first."""

    user_id: str
    rated: tuple[RatedItem, ...]


def stream_histories(interactions: Path, items: Path, users: Path) -> Iterator[UserHistory]:
    """The cohort's histories by user id, read as they are asked for.

    A user without train interactions has an empty history; interactions of anyone who isn't in
    ``users`` are passed over. Nothing of a test row is handed out, nor an item of test rows alone.

    Args:
        interactions: ``interactions.parquet``, sorted by user and position.
        items: ``items.parquet``.
        users: ``users.parquet``, sorted by user.

    Raises:
        MissingInputError: If a file isn't there.
        DataError: If one is damaged or out of order, or they don't fit together.
    """
    rated = _rated_by_user(interactions, _Items(read_table(items, COLUMNS["items"])))
    current = next(rated, None)
    for user_id, n_train in _read_users(users):
        while current is not None and current.user_id < user_id:
            current = next(rated, None)
        own = current if current is not None and current.user_id == user_id else UserHistory(user_id, ())
        if len(own.rated) != n_train:  # told before anything is paid for a history that is not whole
            what = f"user {user_id} has {len(own.rated)} train rows where users.parquet counts {n_train}"
            raise _not_as_written(interactions, what)
        yield own


def count_train_rows(users: Path) -> Ints:
    """How many train interactions each user has, by user id, shape ``(n_users,)``; reads one column.

    Raises:
        MissingInputError: If the file isn't there.
        DataError: If it is damaged.
    """
    counts = [batch["n_train"].to_numpy() for batch in _read_batches(users, _COUNTS)]
    return np.concatenate([np.empty(0, dtype=np.int64), *counts])


_Details: TypeAlias = tuple[str, tuple[str, ...], str, tuple[str, ...], float | None]


class _Items:
    """What is known of each item, as the last fields of :class:`RatedItem`; decoded when first asked for."""

    def __init__(self, table: pa.Table) -> None:
        self._table = table
        self._rows = {item_id: row for row, item_id in enumerate(table["item_id"].to_pylist())}
        self._known: dict[str, _Details] = {}

    def details(self, item_ids: pa.Array) -> dict[str, _Details]:
        """Those of at least the given items."""
        new = [item_id for item_id in item_ids.unique().to_pylist() if item_id not in self._known]
        raise_missing_items([item_id for item_id in new if item_id not in self._rows])
        rows = pa.array([self._rows[item_id] for item_id in new], pa.int64())
        self._known.update((row["item_id"], _details(row)) for row in self._table.take(rows).to_pylist())
        return self._known


def _details(row: dict[str, Any]) -> _Details:
    mean = row["mean_rating"]
    return (
        title_with_year(row["title"] or row["item_id"], row["year"]),
        tuple(name for name in row["genres"] or () if name),
        row["summary"] or "",
        tuple(name for name in row["cast"] or () if name),
        None if mean is None or mean != mean else float(mean),
    )


def _rated_by_user(interactions: Path, items: _Items) -> Iterator[UserHistory]:
    """The histories of all users with train rows."""
    last = None
    for user_id, rows in groupby(_train_rows(interactions, items), key=itemgetter(0)):
        history = UserHistory(user_id, tuple(rated for _, rated in rows))
        if last is not None and user_id <= last:
            raise _not_as_written(interactions, f"user {user_id} follows user {last}")
        for position, rated in enumerate(history.rated):
            if rated.position != position:  # a profile made of p rows would know more than the p first
                raise _not_as_written(
                    interactions, f"train row {position} of user {user_id} has position {rated.position}"
                )
        yield history
        last = user_id


def _train_rows(interactions: Path, items: _Items) -> Iterator[tuple[str, RatedItem]]:
    for batch in _read_batches(interactions, _INTERACTIONS):
        train = keep_train(batch)
        details = items.details(train["item_id"])
        columns = (train[name].to_pylist() for name in ("user_id", "item_id", "position", "rating"))
        for user_id, item_id, position, rating in zip(*columns, strict=True):
            yield user_id, RatedItem(item_id, position, rating, *details[item_id])


def _read_users(users: Path) -> Iterator[tuple[str, int]]:
    last = None
    for batch in _read_batches(users, _USERS):
        for user_id, n_train in zip(batch["user_id"].to_pylist(), batch["n_train"].to_pylist(), strict=True):
            if last is not None and user_id <= last:
                raise _not_as_written(users, f"user {user_id} follows user {last}")
            yield user_id, n_train
            last = user_id


def _not_as_written(path: Path, what: str) -> DataError:
    return DataError(f"rows are missing or out of order: {what}", where=str(path), remedy=f"{_PREPARE} again")


def _read_batches(path: Path, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    """The columns of a table that ``persona_prepare`` wrote, batch by batch, checked as ``read_table`` does."""
    if not path.is_file():
        raise MissingInputError("file not found", where=str(path), remedy=f"{_PREPARE} first")
    try:
        with pq.ParquetFile(path) as file:
            _raise_missing_columns(path, schema.names, file.schema_arrow.names)
            for batch in _batches_of(file, schema.names):
                batch.validate(full=True)  # a flipped bit may leave text that is no UTF-8
                _raise_empty_cells(path, batch)
                yield batch.select(schema.names).cast(schema)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        what = f"not a readable Parquet file ({str(error).splitlines()[0]})"
        raise DataError(what, where=str(path), remedy=f"{_PREPARE} first") from error


def _batches_of(file: pq.ParquetFile, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    for group in range(file.num_row_groups):  # one reader of all groups would keep the raw bytes of each until the end
        yield from file.iter_batches(BATCH_ROWS, row_groups=[group], columns=columns)


def _raise_missing_columns(path: Path, wanted: Sequence[str], found: Sequence[str]) -> None:
    missing = [name for name in wanted if name not in found]
    if missing:
        raise DataError(f"column {', '.join(missing)} is missing", where=str(path), remedy=f"{_PREPARE} first")


def _raise_empty_cells(path: Path, batch: pa.RecordBatch) -> None:
    empty = [name for name, column in zip(batch.schema.names, batch.columns, strict=True) if column.null_count]
    if empty:
        raise DataError(f"column {', '.join(empty)} has empty cells", where=str(path), remedy=f"{_PREPARE} again")
