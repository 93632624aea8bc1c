"""Agent4Rec's user traits: activity, conformity and diversity, each a value and a tier from 1 to 3.

Zhang et al., "On Generative Agents in Recommendation" (SIGIR 2024), section 2.1; where the paper and
its released statistics differ, the definitions here are those that give the released values.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from personas_tune.interactions.log import Log

# A tier is 1 below the first percentile over users, 2 below the second, else 3.
ACTIVITY_PERCENTILES = (60, 90)
CONFORMITY_PERCENTILES = (25, 80)
DIVERSITY_PERCENTILES = (33, 66)
_TOP_SHARE = 0.8
_USERS_PER_BLOCK = 2048
_COUNTS_PER_BLOCK = 1 << 21  # users times genres; shops have thousands of categories


@dataclass(frozen=True)
class Trait:
    """One trait of every user.

    Args:
        value: Shape ``(n_users,)``; NaN where it isn't known.
        tier: 1 to 3, shape ``(n_users,)``; the middle one where the value isn't known.
        thresholds: The values at which tiers 2 and 3 begin.
    """

    value: NDArray[np.float64]
    tier: NDArray[np.int32]
    thresholds: tuple[float, float]


@dataclass(frozen=True)
class Traits:
    """The three traits of every user of a log."""

    activity: Trait
    conformity: Trait
    diversity: Trait


def compute_traits(log: Log, genres: Sequence[Sequence[str]]) -> Traits:
    """Traits of every user, with tiers relative to all users of the log.

    Args:
        log: The interactions to count; users without any have no traits.
        genres: Genres of each item, in the order of ``log.item_ids``.
    """
    n_per_user = log.n_per_user
    active = n_per_user > 0
    activity = np.where(active, n_per_user, np.nan)
    conformity = np.where(active, mean_squared_deviation(log), np.nan)
    diversity = np.where(active, count_main_genres(log, genres), np.nan)
    # As in Agent4Rec, who has no main genre (one genre is above the share) doesn't shift the thresholds.
    has_main_genre = diversity > 0
    return Traits(
        activity=_tiered(activity, active, ACTIVITY_PERCENTILES),
        conformity=_tiered(conformity, active, CONFORMITY_PERCENTILES),
        diversity=_tiered(diversity, has_main_genre, DIVERSITY_PERCENTILES),
    )


def mean_squared_deviation(log: Log) -> NDArray[np.float64]:
    """How far each user's ratings lie from the items' means, the user's own rating included in them.

    Low values mean a user who rates as the crowd does. NaN for users without ratings. Shape ``(n_users,)``.
    """
    sums = np.bincount(log.item, weights=log.rating, minlength=len(log.item_ids))
    counts = np.bincount(log.item, minlength=len(log.item_ids))
    item_mean = sums / np.maximum(counts, 1)
    squares = (log.rating - item_mean[log.item]) ** 2
    totals = np.bincount(log.user, weights=squares, minlength=len(log.user_ids))
    n_per_user = log.n_per_user
    return np.where(n_per_user > 0, totals / np.maximum(n_per_user, 1), np.nan)


def count_main_genres(log: Log, genres: Sequence[Sequence[str]]) -> NDArray[np.float64]:
    """How many genres, largest first, make up at most 80% of all genre marks of a user's items.

    An item of three genres gives three marks. NaN for users none of whose items has a known genre.
    Shape ``(n_users,)``.
    """
    names = sorted({genre for item_genres in genres for genre in item_genres})
    number = {genre: index for index, genre in enumerate(names)}
    n_genres_of_item = np.array([len(item_genres) for item_genres in genres], dtype=np.int64)
    marks = np.array([number[genre] for item_genres in genres for genre in item_genres], dtype=np.int64)
    row_of_user = np.concatenate([[0], np.cumsum(log.n_per_user)])
    values = np.full(len(log.user_ids), np.nan)
    n_users = max(1, min(_USERS_PER_BLOCK, _COUNTS_PER_BLOCK // max(1, len(names))))
    for first in range(0, len(values), n_users):
        last = min(first + n_users, len(values))
        rows = slice(row_of_user[first], row_of_user[last])
        user = log.user[rows] - first
        counts = _count_marks(user, log.item[rows], n_genres_of_item, marks, last - first, len(names))
        values[first:last] = _main_genres(counts)
    return values


def _count_marks(
    user: NDArray[np.int32],
    item: NDArray[np.int32],
    n_genres_of_item: NDArray[np.int64],
    marks: NDArray[np.int64],
    n_users: int,
    n_genres: int,
) -> NDArray[np.int64]:
    """Genre marks of each user, shape ``(n_users, n_genres)``."""
    first_mark = np.cumsum(n_genres_of_item) - n_genres_of_item
    repeats = n_genres_of_item[item]
    # The k-th mark of a row lies k behind the item's first mark.
    k = np.arange(repeats.sum()) - np.repeat(np.cumsum(repeats) - repeats, repeats)
    genre = marks[np.repeat(first_mark[item], repeats) + k]
    cell = np.repeat(user.astype(np.int64), repeats) * n_genres + genre
    return np.bincount(cell, minlength=n_users * n_genres).reshape(n_users, n_genres)


def _main_genres(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    if counts.shape[1] == 0:
        return np.full(len(counts), np.nan)
    total = counts.sum(axis=1, keepdims=True)
    shares = -np.sort(-counts, axis=1) / np.maximum(total, 1)
    n_main = ((np.cumsum(shares, axis=1) <= _TOP_SHARE) & (shares > 0)).sum(axis=1)
    return np.where(total[:, 0] > 0, n_main, np.nan)


def _tiered(value: NDArray[np.float64], reference: NDArray[np.bool_], percentiles: tuple[int, int]) -> Trait:
    """Tiers by percentiles (linear interpolation) over the ``reference`` users."""
    low, high = np.percentile(value[reference], percentiles) if reference.any() else (np.inf, np.inf)
    tier = np.select([np.isnan(value), value < low, value < high], [2, 1, 2], default=3)
    return Trait(value, tier.astype(np.int32), (float(low), float(high)))
