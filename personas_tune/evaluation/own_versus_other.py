"""Do personas' adapters differ where they should? Each user's rows under every adapter of a set.

A persona's adapter has learnt something of its persona if its users are predicted better with it than with
the adapters of other personas: the diagonal of the matrix against the rest of each column.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from personas_tune.evaluation.intervals import DEFAULT_RESAMPLING, Resampling, intervals_of
from personas_tune.evaluation.metrics import mae, rmse, without_nan

Floats = NDArray[np.float64]


def choose_rows(owners: Sequence[str], n_rows: int | None, seed: int) -> list[int]:
    """Draw rows, as evenly over the personas as there are rows.

    More rows hold those of fewer with the same seed.

    Args:
        owners: The adapter of each row's user.
        n_rows: How many rows in all; None, or more than there are, for all of them.
        seed: Seeds the draw.

    Returns:
        Indices, ascending.

    Example:
        >>> choose_rows(["0"] * 50 + ["1"] * 2, 5, seed=0)[-2:]
        [50, 51]
    """
    generator = np.random.default_rng(seed)
    turns = np.empty(len(owners), dtype=np.int64)
    for owner in sorted(set(owners)):
        mine = np.flatnonzero(np.asarray(owners) == owner)
        turns[generator.permutation(mine)] = np.arange(len(mine))
    return sorted(np.argsort(turns, kind="stable")[:n_rows].tolist())


def measure_own_versus_other(
    user_ids: Sequence[str],
    owners: Sequence[str],
    ratings: Floats,
    predicted: Mapping[str, Floats],
    resampling: Resampling = DEFAULT_RESAMPLING,
) -> dict[str, Any]:
    """Errors of every adapter on the rows of every persona.

    Args:
        user_ids: The user of each row, shape ``(n,)``.
        owners: The adapter that this user is meant to have, shape ``(n,)``.
        ratings: The true ratings, shape ``(n,)``.
        predicted: By adapter, the ratings that it predicts for all of the rows, each of shape ``(n,)``.
        resampling: How the interval is drawn.

    Returns:
        JSON-ready values, None where a figure doesn't exist. ``adapters``; ``personas``, the same names, as
        groups of users; ``n`` rows of each persona; ``rmse`` and ``mae``, a list for each adapter with a value
        for each persona; ``own_minus_other``: ``difference``, for each persona its RMSE with its own adapter
        minus the mean of those with the others, averaged over the personas by their rows, and the ends ``low``
        and ``high`` of its interval over resamples of users.
    """
    names = list(predicted)
    rows_of = [np.flatnonzero(np.asarray(owners) == name) for name in names]
    measured = {
        "adapters": names,
        "personas": names,
        "n": [len(rows) for rows in rows_of],
        "rmse": [[rmse(ratings[rows], predicted[name][rows]) for rows in rows_of] for name in names],
        "mae": [[mae(ratings[rows], predicted[name][rows]) for rows in rows_of] for name in names],
        "own_minus_other": _own_minus_other(user_ids, owners, ratings, predicted, resampling),
    }
    return {key: without_nan(value) for key, value in measured.items()}


def own_versus_other_cells(agent: str, measured: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """An agent's matrix for ``table.md``: header and cells, a row per adapter, a star where it is the users' own."""
    header = [f"{agent}: RMSE with adapter"]
    header += [f"users of {name} (n={n})" for name, n in zip(measured["personas"], measured["n"], strict=True)]
    rows = []
    for adapter, errors in zip(measured["adapters"], measured["rmse"], strict=True):
        cells = ["-" if error is None else f"{error:.3f}" for error in errors]
        own = zip(measured["personas"], cells, strict=True)
        rows.append([adapter, *(f"{cell} *" if persona == adapter else cell for persona, cell in own)])
    return header, rows


def own_versus_other_note(agent: str, measured: Mapping[str, Any]) -> str:
    """The difference between own and other adapters as a sentence for ``table.md``."""
    difference, low, high = (measured["own_minus_other"][key] for key in ("difference", "low", "high"))
    if difference is None:
        return f"{agent}: with one persona only there is no other adapter to compare with."
    ends = "-" if low is None else f"{low:+.3f}, {high:+.3f}"
    return (
        f"{agent}: RMSE with the own adapter (*) minus RMSE with those of other personas is {difference:+.3f} "
        f"[{ends}]; negative: adapters fit their own personas."
    )


def _own_minus_other(
    user_ids: Sequence[str],
    owners: Sequence[str],
    ratings: Floats,
    predicted: Mapping[str, Floats],
    resampling: Resampling,
) -> dict[str, float]:
    k = len(predicted)
    users, places = np.unique(np.asarray(user_ids), return_inverse=True)
    if k < 2 or len(users) == 0:
        return dict.fromkeys(("difference", "low", "high"), float("nan"))

    def per_user(values: Floats) -> Floats:
        return np.asarray(np.bincount(places, values, minlength=len(users)), dtype=np.float64)

    # A: adapters, G: personas, of the same names; U: users
    is_of = np.array([np.asarray(owners) == name for name in predicted]).astype(np.float64)  # (G, n)
    squared = np.array([(values - ratings) ** 2 for values in predicted.values()])  # (A, n)
    sums = np.array([*(per_user(row * group) for row in squared for group in is_of), *map(per_user, is_of)])

    def difference(totals: Floats) -> Floats:
        sse, n = totals[: k * k].reshape(k, k, -1), totals[k * k :]  # (A, G, draws), (G, draws)
        errors = np.sqrt(sse / np.maximum(n, 1))  # a persona that isn't drawn has no weight either
        own = errors[range(k), range(k)]
        other = (errors.sum(axis=0) - own) / (k - 1)
        return np.asarray(((own - other) * n).sum(axis=0) / n.sum(axis=0))

    low, high = intervals_of(difference, sums, resampling) if len(users) > 1 else (float("nan"), float("nan"))
    return {"difference": float(difference(sums.sum(axis=1, keepdims=True))[0]), "low": float(low), "high": float(high)}
