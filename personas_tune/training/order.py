"""In which order an adapter sees its rows."""

from collections.abc import Sequence

import numpy as np

from personas_tune.adapters.bank import stable_seed


def epoch_order(users: Sequence[str], *, epoch: int, rows_per_user: int, seed: int, adapter: str) -> list[int]:
    """Row indices of one epoch, shuffled.

    Rows of a user come in runs of up to ``rows_per_user``, so that a step can share their prefix;
    1 gives a plain shuffle. The order depends on the arguments alone, so any epoch can be had
    again without the ones before it.

    Args:
        users: Each row's user.
        epoch: 0-based.
        rows_per_user: Length of the runs.
        seed: The experiment's seed.
        adapter: The adapter's name.
    """
    generator = np.random.default_rng(stable_seed(seed, adapter, f"epoch {epoch}"))
    shuffled = generator.permutation(len(users)).tolist()
    if rows_per_user == 1:
        return list(shuffled)
    by_user: dict[str, list[int]] = {}
    for index in shuffled:
        by_user.setdefault(users[index], []).append(index)
    runs = [rows[i : i + rows_per_user] for rows in by_user.values() for i in range(0, len(rows), rows_per_user)]
    return [index for run in generator.permutation(len(runs)) for index in runs[run]]
