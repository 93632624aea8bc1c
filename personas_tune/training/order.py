"""In which order an adapter sees its rows."""

from collections.abc import Sequence

import numpy as np

from personas_tune.adapters.bank import stable_seed


def epoch_order(prefixes: Sequence[str], *, epoch: int, rows_per_user: int, seed: int, adapter: str) -> list[int]:
    """Row indices of one epoch, shuffled.

    Rows that begin alike come in runs of up to ``rows_per_user``, so that a step can share their prefix;
    1 gives a plain shuffle. The order depends on the arguments alone, so any epoch can be had
    again without the ones before it.

    Args:
        prefixes: Names what each row begins with: its user and, where it varies, the profile.
        epoch: 0-based.
        rows_per_user: Length of the runs.
        seed: The experiment's seed.
        adapter: The adapter's name.
    """
    generator = np.random.default_rng(stable_seed(seed, adapter, f"epoch {epoch}"))
    shuffled = generator.permutation(len(prefixes)).tolist()
    if rows_per_user == 1:
        return list(shuffled)
    by_prefix: dict[str, list[int]] = {}
    for index in shuffled:
        by_prefix.setdefault(prefixes[index], []).append(index)
    runs = [rows[i : i + rows_per_user] for rows in by_prefix.values() for i in range(0, len(rows), rows_per_user)]
    return [index for run in generator.permutation(len(runs)) for index in runs[run]]
