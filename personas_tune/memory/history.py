"""What the distillers may read: the cohort's train interactions and the items in them.

:func:`keep_train` is the only place that takes rows out of the interactions table, and it takes the
train rows. Items that occur in no train row are dropped with them.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from personas_tune.errors import DataError
from personas_tune.memory.stopwords import STOPWORDS

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

_WORD = re.compile(r"[^\W\d_]{3,}")


class Kind(IntEnum):
    """The kinds of features by which a user's taste is described."""

    GENRE = 0
    ERA = 1
    PERSON = 2
    THEME = 3


@dataclass(frozen=True)
class Catalogue:
    """The items of the train interactions, in the order of their ids.

    Attributes:
        ids: Item ids, sorted.
        titles: Titles with the year in brackets where it is known.
        means: Each item's average rating; NaN where there is none.
        counts: How many ratings that average stands on.
        features: Names of all features (genres, decades, people, words), each kind's sorted.
        kinds: The :class:`Kind` of each feature.
        item_features: Features of each item, each item's in the order of ``features``.
    """

    ids: list[str]
    titles: list[str]
    means: Floats
    counts: Ints
    features: list[str]
    kinds: Ints
    item_features: list[Ints]


@dataclass(frozen=True)
class History:
    """One user's train interactions, oldest first; ``n`` of them.

    Attributes:
        items: Catalogue rows, shape ``(n,)``.
        ratings: Shape ``(n,)``.
        positions: Shape ``(n,)``.
    """

    user_id: str
    items: Ints
    ratings: Floats
    positions: Ints


def keep_train(interactions: pa.Table) -> pa.Table:
    """The train interactions of a table (or record batch), in its order, without time and split."""
    train = interactions.filter(pc.equal(interactions["split"], "train"))
    return train.select(["user_id", "item_id", "rating", "position"])


def train_rows(interactions: pa.Table) -> pa.Table:
    """The train interactions, sorted by user and position, without time and split."""
    return keep_train(interactions).sort_by([("user_id", "ascending"), ("position", "ascending")])


def read_histories(interactions: pa.Table, items: pa.Table, user_ids: Sequence[str]) -> tuple[list[History], Catalogue]:
    """Take what may be read of the tables that ``persona_prepare`` wrote.

    Args:
        interactions: All interactions of the cohort; test rows are left out here.
        items: Their items.
        user_ids: The cohort, sorted. A user without train interactions gets an empty history.

    Raises:
        DataError: If an interaction's item is unknown.
    """
    train = train_rows(interactions)
    catalogue = _read_catalogue(items, set(train["item_id"].unique().to_pylist()))
    rows = pc.index_in(train["item_id"], pa.array(catalogue.ids, pa.string())).to_numpy()
    ratings = train["rating"].to_numpy()
    positions = train["position"].to_numpy().astype(np.int64)
    spans = _spans(train["user_id"].to_pylist())
    histories = []
    for user_id in user_ids:
        span = spans.get(user_id, slice(0, 0))
        histories.append(History(user_id, rows[span].astype(np.int64), ratings[span], positions[span]))
    return histories, catalogue


def raise_missing_items(item_ids: Sequence[str]) -> None:
    """Say that items of the interactions have no row in the table of items; do nothing for none.

    Raises:
        DataError: If there are any.
    """
    if item_ids:
        raise DataError(
            f"{len(item_ids)} items of the interactions are missing, such as {item_ids[0]}",
            where="items.parquet",
            remedy="run `tune run persona_prepare --config ...` again",
        )


def title_with_year(title: str, year: int | None) -> str:
    """A title with its year in brackets, if that is known and not in it already."""
    return title if year is None or f"({year})" in title else f"{title} ({year})"


def words_of(text: str) -> list[str]:
    """The content words of a text, lower-case, each once, in order."""
    words = dict.fromkeys(_WORD.findall(text.lower()))
    return [word for word in words if word not in STOPWORDS]


def _spans(sorted_ids: list[str]) -> dict[str, slice]:
    starts: dict[str, slice] = {}
    begin = 0
    for row, user_id in enumerate(sorted_ids):
        if row + 1 == len(sorted_ids) or sorted_ids[row + 1] != user_id:
            starts[user_id] = slice(begin, row + 1)
            begin = row + 1
    return starts


def _read_catalogue(items: pa.Table, wanted: set[str]) -> Catalogue:
    rows = [row for row in items.to_pylist() if row["item_id"] in wanted]
    rows.sort(key=lambda row: row["item_id"])
    raise_missing_items(sorted(wanted - {row["item_id"] for row in rows}))
    labels = [_labels(row) for row in rows]
    features = sorted(set().union(*labels)) if labels else []
    numbers = {label: number for number, label in enumerate(features)}
    return Catalogue(
        ids=[row["item_id"] for row in rows],
        titles=[title_with_year(row["title"] or row["item_id"], row["year"]) for row in rows],
        means=np.array([_number(row["mean_rating"]) for row in rows], dtype=np.float64),
        counts=np.array([row["n_ratings"] or 0 for row in rows], dtype=np.int64),
        features=[name for _, name in features],
        kinds=np.array([kind for kind, _ in features], dtype=np.int64),
        item_features=[np.array(sorted(numbers[label] for label in own), dtype=np.int64) for own in labels],
    )


def _labels(row: dict[str, object]) -> set[tuple[Kind, str]]:
    """An item's features as pairs of kind and name."""
    genres, cast, summary, year = row["genres"], row["cast"], row["summary"], row["year"]
    labels = {(Kind.GENRE, name) for name in _texts(genres)} | {(Kind.PERSON, name) for name in _texts(cast)}
    if isinstance(year, int):
        labels.add((Kind.ERA, f"{year // 10 * 10}s"))
    if isinstance(summary, str):
        labels |= {(Kind.THEME, word) for word in words_of(summary)}
    return labels


def _texts(values: object) -> Iterable[str]:
    return [value for value in values if value] if isinstance(values, list) else []


def _number(value: float | None) -> float:
    return float("nan") if value is None else value
