"""What is learnt from and what is tested on."""

import numpy as np
from numpy.typing import NDArray

from personas_tune.errors import ConfigError

_ROUNDING = 1e-9  # so that 0.6 of 10 is 6 whatever the product's last bit


def count_train(n_per_user: NDArray[np.int64], train_fraction: float) -> NDArray[np.int64]:
    """How many of each user's first interactions are train rows.

    The whole part of ``train_fraction`` of them, but at least one, and at least one is left to test on
    unless the user has only one. Shape ``(n_users,)``.
    """
    wanted = np.floor(n_per_user * train_fraction + _ROUNDING).astype(np.int64)
    at_most = np.maximum(n_per_user - 1, np.minimum(n_per_user, 1))
    n_train: NDArray[np.int64] = np.clip(wanted, np.minimum(at_most, 1), at_most)
    return n_train


def find_time_cut(timestamps: NDArray[np.int64], train_fraction: float) -> int:
    """The time before which ``train_fraction`` of the interactions lie; ties fall behind the cut together."""
    index = int(np.floor(len(timestamps) * train_fraction + _ROUNDING))
    return int(np.partition(timestamps, index)[index])


def share_test_rows(n_available: NDArray[np.int64], test_rows: int) -> NDArray[np.int64]:
    """Divide ``test_rows`` among users in proportion to their test interactions, at least one each.

    Largest remainders get what rounding leaves; of equal ones the earlier user's.

    Args:
        n_available: Test interactions of each user, each at least 1.
        test_rows: How many to draw in total.

    Raises:
        ConfigError: If there are fewer, or not enough for one a user.
    """
    where = "data.split.test_rows"
    total = int(n_available.sum())
    if test_rows > total:
        what = f"{test_rows} test rows are asked for, and there are {total}"
        raise ConfigError(what, where=where, remedy=f"set it to {total} or less, or to null for all of them")
    if test_rows < len(n_available):
        what = f"{test_rows} test rows for {len(n_available)} users, who need at least one each"
        raise ConfigError(what, where=where, remedy=f"set it to {len(n_available)} or more")
    exact = n_available * (test_rows / total)
    quota: NDArray[np.int64] = np.maximum(np.floor(exact + _ROUNDING).astype(np.int64), 1)
    while (missing := test_rows - int(quota.sum())) != 0:
        step = 1 if missing > 0 else -1
        can_move = (quota < n_available) if missing > 0 else (quota > 1)
        by_remainder = np.argsort(-step * (exact - quota), kind="stable")
        moved = by_remainder[can_move[by_remainder]][: abs(missing)]
        quota[moved] += step
    return quota


def draw_rows(user: NDArray[np.int64], quota: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.bool_]:
    """Draw ``quota[u]`` of each user's rows.

    Args:
        user: User of each row, ascending.
        quota: How many to draw of each user.
        rng: Draws them.

    Returns:
        A mask over the rows.
    """
    shuffled = np.lexsort((rng.random(len(user)), user))
    n_per_user = np.bincount(user, minlength=len(quota))
    first_rows = np.cumsum(n_per_user) - n_per_user
    rank = np.arange(len(user)) - first_rows[user]
    drawn = np.zeros(len(user), dtype=bool)
    drawn[shuffled] = rank < quota[user]
    return drawn
