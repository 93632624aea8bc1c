"""From a checked log to the tables that all later stages read."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from personas_tune.errors import DataError
from personas_tune.interactions.averages import HistoricalAverage, average_ratings, choose_average_rows
from personas_tune.interactions.cohort import choose_cohort
from personas_tune.interactions.items import Item
from personas_tune.interactions.log import Log, decode_ids
from personas_tune.interactions.split import count_train, draw_rows, find_time_cut, share_test_rows
from personas_tune.interactions.traits import Traits, compute_traits

# Each draw has a stream of its own, so that a change of one leaves the other as it was.
_COHORT_STREAM, _TEST_STREAM = 0, 1


@dataclass(frozen=True)
class Prepared:
    """The tables of the data stage.

    Args:
        interactions: The cohort's interactions, sorted by user and position; undrawn test rows are absent.
        items: Every item that occurs in them, sorted by id.
        users: The cohort, sorted by id.
        outside: All interactions of the other users, sorted by user, time and file order.
        traits: Traits of every user of the log, with the thresholds of their tiers.
        n_left_out: Users of the cohort that a global time cut left without train or without test rows.
    """

    interactions: pa.Table
    items: pa.Table
    users: pa.Table
    outside: pa.Table
    traits: Traits
    n_left_out: int


def prepare(
    log: Log,
    catalogue: Sequence[Item],
    *,
    n_users: int | None = None,
    min_interactions: int = 1,
    max_interactions: int | None = None,
    split_by: Literal["user_time", "global_time"] = "user_time",
    train_fraction: float = 0.6,
    test_rows: int | None = None,
    traits: Literal["train", "all"] = "train",
    historical_average: HistoricalAverage = "outside",
    seed: int = 0,
) -> Prepared:
    """Choose a cohort, split its interactions, and describe its users and items.

    Args:
        log: The log, checked and in order.
        catalogue: What is known of each item, in the order of ``log.item_ids``.
        n_users: Cohort size; None takes every user in range.
        min_interactions: Fewest interactions of a cohort user.
        max_interactions: Most, or None.
        split_by: ``user_time``: each user's first ``train_fraction`` is train; ``global_time``: what lies before
            the time that ``train_fraction`` of the cohort's interactions lie before.
        train_fraction: Share of train rows.
        test_rows: Draw so many test rows in total, a fixed share per user; None keeps all.
        traits: ``train`` computes traits from every user's interactions before the cut, ``all`` from all.
        historical_average: What items' averages are made of; see :func:`choose_average_rows`.
        seed: Seeds the cohort and the drawn test rows.

    Raises:
        ConfigError: If the log has no such cohort, or not as many test rows.
        DataError: If the cut leaves no user with both train and test rows.
    """
    n_per_user = log.n_per_user
    rng = np.random.default_rng([seed, _COHORT_STREAM])
    chosen = choose_cohort(n_per_user, n_users, min_interactions, max_interactions, rng)
    position = log.position
    if split_by == "user_time":
        is_train = position < count_train(n_per_user, train_fraction)[log.user]
    else:
        is_train = log.timestamp < find_time_cut(log.timestamp[np.isin(log.user, chosen)], train_fraction)
    cohort = _with_both_splits(chosen, log, is_train)
    in_cohort = _members(cohort, len(n_per_user))[log.user]
    is_test = _draw_test_rows(log, cohort, in_cohort & ~is_train, test_rows, seed)
    kept = np.flatnonzero((in_cohort & is_train) | is_test)
    interactions = log.rows(kept)
    described = log.rows(is_train) if traits == "train" else log
    user_traits = compute_traits(described, [item.genres for item in catalogue])
    averaged = log.rows(choose_average_rows(historical_average, in_cohort, is_train))
    return Prepared(
        interactions=_interactions_table(interactions, position[kept], is_train[kept]),
        items=_items_table(interactions, catalogue, averaged),
        users=_users_table(cohort, interactions, is_train[kept], user_traits),
        outside=_log_table(log.rows(~in_cohort)),
        traits=user_traits,
        n_left_out=len(chosen) - len(cohort),
    )


def _members(users: NDArray[np.int64], n_users: int) -> NDArray[np.bool_]:
    mask = np.zeros(n_users, dtype=bool)
    mask[users] = True
    return mask


def _with_both_splits(users: NDArray[np.int64], log: Log, is_train: NDArray[np.bool_]) -> NDArray[np.int64]:
    n_per_user = log.n_per_user
    n_train = np.bincount(log.user[is_train], minlength=len(n_per_user))
    both = users[(n_train[users] > 0) & (n_train[users] < n_per_user[users])]
    if len(both) == 0:
        what = f"the time cut leaves none of {len(users)} users with both train and test rows"
        raise DataError(what, where="data.split", remedy="set data.split.by=user_time, or draw more users")
    return both


def _draw_test_rows(
    log: Log, cohort: NDArray[np.int64], available: NDArray[np.bool_], test_rows: int | None, seed: int
) -> NDArray[np.bool_]:
    """The mask of test rows that are kept."""
    if test_rows is None:
        return available
    rows = np.flatnonzero(available)
    user = np.searchsorted(cohort, log.user[rows])
    quota = share_test_rows(np.bincount(user, minlength=len(cohort)), test_rows)
    drawn = np.zeros(len(available), dtype=bool)
    drawn[rows[draw_rows(user, quota, np.random.default_rng([seed, _TEST_STREAM]))]] = True
    return drawn


def _log_table(log: Log) -> pa.Table:
    return pa.table(
        {
            "user_id": decode_ids(log.user_ids, log.user),
            "item_id": decode_ids(log.item_ids, log.item),
            "rating": log.rating,
            "timestamp": log.timestamp,
        }
    )


def _interactions_table(log: Log, position: NDArray[np.int32], is_train: NDArray[np.bool_]) -> pa.Table:
    table = _log_table(log).append_column("position", pa.array(position, type=pa.int32()))
    return table.append_column("split", pa.array(np.where(is_train, "train", "test"), type=pa.string()))


def _items_table(log: Log, catalogue: Sequence[Item], averaged: Log) -> pa.Table:
    codes = np.unique(log.item)
    mean, count = average_ratings(averaged)
    item_ids = decode_ids(log.item_ids, codes)
    items = [catalogue[code] for code in codes]
    titles = [item.title or item_id for item, item_id in zip(items, item_ids.to_pylist(), strict=True)]
    texts = pa.list_(pa.string())
    return pa.table(
        {
            "item_id": item_ids,
            "title": pa.array(titles, type=pa.string()),
            "year": pa.array([item.year for item in items], type=pa.int32()),
            "genres": pa.array([list(item.genres) for item in items], type=texts),
            "summary": pa.array([item.summary for item in items], type=pa.string()),
            "cast": pa.array([list(item.cast) for item in items], type=texts),
            "mean_rating": pa.array(mean[codes], mask=np.isnan(mean[codes])),
            "n_ratings": pa.array(count[codes], type=pa.int32()),
        }
    )


def _users_table(cohort: NDArray[np.int64], interactions: Log, is_train: NDArray[np.bool_], traits: Traits) -> pa.Table:
    n_users = len(interactions.user_ids)
    train = interactions.rows(is_train)
    n_train, n_kept = train.n_per_user[cohort], interactions.n_per_user[cohort]
    totals = np.bincount(train.user, weights=train.rating, minlength=n_users)[cohort]
    columns: dict[str, Any] = {
        "user_id": decode_ids(interactions.user_ids, cohort.astype(np.int32)),
        "n_train": pa.array(n_train, type=pa.int32()),
        "n_test": pa.array(n_kept - n_train, type=pa.int32()),
        "mean_rating": totals / n_train,
    }
    for name in ("activity", "conformity", "diversity"):
        trait = getattr(traits, name)
        columns[name] = np.nan_to_num(trait.value[cohort])  # no known genre: no main genre
        columns[f"{name}_tier"] = trait.tier[cohort]
    return pa.table(columns)
