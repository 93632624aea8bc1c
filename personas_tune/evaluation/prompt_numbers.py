"""The numbers that a prompt shows, as features: what a language model could do with arithmetic alone."""

from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from personas_tune.errors import EvaluationError

Floats = NDArray[np.float64]
Indices = NDArray[np.int64]

TRAIT_COLUMNS = ("activity", "activity_tier", "conformity", "conformity_tier", "diversity", "diversity_tier")


def prompt_numbers(
    samples: pa.Table,
    train: pa.Table,
    items: pa.Table,
    users: pa.Table,
    historical_average: Literal["outside", "train", "all", "none"],
    *,
    leave_own_out: bool,
) -> Floats:
    """The features of each sample, shape ``(n_samples, 18)``, or ``(n_samples, 21)`` where samples have neighbours.

    Of the item:
        0 mean rating as printed (the train mean where none is), 1 whether none is printed,
        2 log(1 + number of ratings), 3 the mean's distance from the train mean times column 2,
        4 year (the mean year where unknown), 5 whether the year is unknown.
    Of the user:
        6 train mean, 7 spread (standard deviation) of the train ratings, 8 log(1 + number of train rows),
        9-14 activity, conformity and diversity, each a value and a tier (the users' mean where missing).
    Of the memories retrieved for the item:
        15 mean rating of their rows minus the user's mean (0 where there is none), 16 whether there is none,
        17 log(1 + how many there are).
    Of like-minded users, where ``samples`` has neighbours_rating:
        18 what they give the item, 19 the same minus the user's mean, 20 log(1 + how many they are).

    Args:
        samples: user_id, item_id, memory_positions; with ``leave_own_out`` also rating.
        train: The cohort's train rows: user_id, position, rating.
        items: The printed item metadata.
        users: The cohort's traits.
        historical_average: What the items' mean ratings were taken from.
        leave_own_out: Whether the samples are train rows. A train row's own rating is then taken out of its
            user's mean and spread, and with ``train`` averages out of its item's mean and number, as a test
            row's rating isn't in there either. With ``all`` it is, for both, so it stays.

    Raises:
        EvaluationError: If a sample's user isn't among the users.
    """
    own = samples["rating"].to_numpy().astype(np.float64) if leave_own_out else None
    owners = _rows_of(samples["user_id"], users["user_id"])
    train_owners = _rows_of(train["user_id"], users["user_id"])
    train_ratings = train["rating"].to_numpy().astype(np.float64)
    overall = float(train_ratings.mean())
    own_in_item = own if historical_average == "train" else None
    by_user = _user_numbers(owners, train_owners, train_ratings, users, own)
    by_item = _item_numbers(samples["item_id"], items, overall, own_in_item)
    by_memory = _memory_numbers(samples["memory_positions"], owners, train_owners, train["position"], train_ratings)
    by_memory[:, 0] = np.where(by_memory[:, 1] == 1, 0.0, by_memory[:, 0] - by_user[:, 0])
    return np.hstack([by_item, by_user, by_memory, *_neighbour_numbers(samples, by_user[:, 0])])


def _rows_of(ids: pa.ChunkedArray, known: pa.ChunkedArray) -> Indices:
    rows = pc.index_in(ids, value_set=known.combine_chunks())
    if rows.null_count:
        unknown = pc.filter(ids, pc.is_null(rows))[0].as_py()
        remedy = "run `tune run persona_prepare --config ...` and the later stages again"
        raise EvaluationError(f"user {unknown} of the samples is missing", where="users.parquet", remedy=remedy)
    return np.asarray(rows.to_numpy(), dtype=np.int64)


def _numbers(column: pa.ChunkedArray) -> Floats:
    """A column as floats, NaN for null."""
    return np.asarray(column.cast(pa.float64()).to_numpy())


def _fill(values: Floats, default: float) -> Floats:
    return np.where(np.isfinite(values), values, default)


def _mean_of_known(values: Floats) -> float:
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else 0.0


def _item_numbers(item_ids: pa.ChunkedArray, items: pa.Table, overall: float, own: Floats | None) -> Floats:
    rows = pc.index_in(item_ids, value_set=items["item_id"].combine_chunks())
    printed = items.select(["mean_rating", "n_ratings", "year"]).take(rows)
    means, n, years = _numbers(printed["mean_rating"]), _numbers(printed["n_ratings"]), _numbers(printed["year"])
    n = _fill(n, 0.0)
    if own is not None:
        others = n - 1
        with np.errstate(divide="ignore", invalid="ignore"):
            means = np.where(others > 0, (means * n - own) / others, np.nan)
        n = np.maximum(others, 0.0)
    without_mean, without_year = ~np.isfinite(means), ~np.isfinite(years)
    means = _fill(means, overall)
    years = _fill(years, _mean_of_known(_numbers(items["year"])))
    return np.column_stack([means, without_mean, np.log1p(n), (means - overall) * np.log1p(n), years, without_year])


def _user_numbers(
    owners: Indices, train_owners: Indices, train_ratings: Floats, users: pa.Table, own: Floats | None
) -> Floats:
    n_users = len(users)
    overall, spread = float(train_ratings.mean()), float(train_ratings.std())
    # Sums of deviations from the overall mean: squares of raw ratings would lose digits.
    deviations = train_ratings - overall
    sums = [np.bincount(train_owners, deviations**power, minlength=n_users)[owners] for power in (0, 1, 2)]
    n_train = sums[0]
    n, total, squares = sums if own is None else [sums[power] - (own - overall) ** power for power in (0, 1, 2)]
    means = np.where(n > 0, total / np.maximum(n, 1), 0.0)
    variances = np.maximum(squares / np.maximum(n, 1) - means**2, 0.0)
    spreads = np.where(n > 1, np.sqrt(variances), spread)
    traits = [_numbers(users[name]) for name in TRAIT_COLUMNS]
    filled = [_fill(values, _mean_of_known(values))[owners] for values in traits]
    return np.column_stack([means + overall, spreads, np.log1p(n_train), *filled])


def _memory_numbers(
    memory_positions: pa.ChunkedArray,
    owners: Indices,
    train_owners: Indices,
    train_positions: pa.ChunkedArray,
    train_ratings: Floats,
) -> Floats:
    """Mean rating of each sample's memories (0 without any), whether it has none, log(1 + how many)."""
    lists = memory_positions.combine_chunks()
    parents = pc.list_parent_indices(lists).to_numpy().astype(np.int64)
    positions = pc.list_flatten(lists).to_numpy().astype(np.int64)
    places = train_positions.to_numpy().astype(np.int64)
    stride = 1 + max(places.max(initial=0), positions.max(initial=0))
    keys = train_owners * stride + places
    order = np.argsort(keys)
    wanted = owners[parents] * stride + positions
    found = order[np.minimum(np.searchsorted(keys, wanted, sorter=order), len(keys) - 1)]
    exists = keys[found] == wanted
    n = np.bincount(parents[exists], minlength=len(owners))
    total = np.bincount(parents[exists], train_ratings[found[exists]], minlength=len(owners))
    return np.column_stack([total / np.maximum(n, 1), n == 0, np.log1p(n)])


def _neighbour_numbers(samples: pa.Table, user_means: Floats) -> list[Floats]:
    if "neighbours_rating" not in samples.column_names:
        return []
    ratings = _numbers(samples["neighbours_rating"])
    return [np.column_stack([ratings, ratings - user_means, np.log1p(_numbers(samples["n_neighbours"]))])]


def feature_names() -> list[str]:
    """Names of :func:`prompt_numbers`' first 18 columns, in order."""
    item = ["item_mean", "no_item_mean", "log_n_ratings", "item_mean_by_log_n_ratings", "year", "no_year"]
    user = ["user_mean", "user_spread", "log_n_train", *TRAIT_COLUMNS]
    return [*item, *user, "memory_mean_minus_user_mean", "no_memory", "log_n_memories"]
