"""Which users become agents."""

import numpy as np
from numpy.typing import NDArray

from personas_tune.errors import ConfigError

_WHERE = "data.cohort"


def choose_cohort(
    n_per_user: NDArray[np.int64],
    n_users: int | None,
    min_interactions: int,
    max_interactions: int | None,
    rng: np.random.Generator,
) -> NDArray[np.int64]:
    """Draw users whose number of interactions is in a range.

    Args:
        n_per_user: Interactions of each user; users without any don't count.
        n_users: How many to draw; None takes all in range.
        min_interactions: Lowest number; at least 2 are always wanted, one to learn from and one to test on.
        max_interactions: Highest number, or None.
        rng: Draws the users.

    Returns:
        The users' indices, ascending.

    Raises:
        ConfigError: If nobody is in range, or fewer than ``n_users``.
    """
    lowest = max(min_interactions, 2)
    highest = np.inf if max_interactions is None else max_interactions
    in_range = np.flatnonzero((n_per_user >= lowest) & (n_per_user <= highest))
    asked = f"{lowest} {'or more' if max_interactions is None else f'to {max_interactions}'} interactions"
    if len(in_range) == 0:
        raise ConfigError(f"no user has {asked}", where=_WHERE, remedy=_what_would_work(n_per_user))
    if n_users is None:
        return in_range
    if n_users > len(in_range):
        what = f"{n_users} users are asked for, and {len(in_range)} have {asked}"
        remedy = f"set data.cohort.n_users={len(in_range)} or widen the range"
        raise ConfigError(what, where=f"{_WHERE}.n_users", remedy=remedy)
    return np.sort(rng.choice(in_range, n_users, replace=False))


def _what_would_work(n_per_user: NDArray[np.int64]) -> str:
    present = n_per_user[n_per_user > 0]
    if present.max() < 2:
        return "use a log whose users have at least 2 interactions"
    low, median, high = present.min(), np.median(present), present.max()
    return f"the {len(present)} users have {low} to {high}, half of them {median:g} or more: set a range within that"
