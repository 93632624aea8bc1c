"""How far predicted ratings are from true ones, as plain values for ``metrics.json``.

A prediction that is not a finite number is *unparsed*: the agent's answer held no rating. Errors on the
parsed rows are the paper's figures; the unrelated response rate (URR) says how many rows they leave
out, and the ``_filled`` errors measure all rows, with the user's train mean where there was no answer.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from sklearn.metrics import mean_absolute_error, root_mean_squared_error

from personas_tune.errors import EvaluationError
from personas_tune.evaluation.intervals import (
    DEFAULT_RESAMPLING,
    Resampling,
    interval_of_mae,
    interval_of_rmse,
)

Floats = NDArray[np.float64]
Strings = NDArray[Any]

_SPLIT_REMEDY = "change data.split.train_fraction"


def rmse(ratings: Floats, predicted: Floats) -> float:
    """Root mean squared error; NaN when there is no row."""
    return float(root_mean_squared_error(ratings, predicted)) if len(ratings) else math.nan


def mae(ratings: Floats, predicted: Floats) -> float:
    """Mean absolute error; NaN when there is no row."""
    return float(mean_absolute_error(ratings, predicted)) if len(ratings) else math.nan


def skill_score(rmse: float, reference: float) -> float:
    """1 - MSE / MSE of a reference: 1 is perfect, 0 as good, below 0 worse; NaN where the reference is perfect."""
    return 1 - rmse**2 / reference**2 if reference > 0 else math.nan


def train_means(user_ids: Sequence[str], users: pa.Table) -> Floats:
    """The train mean of each row's user: what fills an unparsed row.

    A user without train rows gets the mean over all train rows.

    Args:
        user_ids: A user a row.
        users: ``users.parquet``, with ``user_id``, ``n_train`` and ``mean_rating``.

    Raises:
        EvaluationError: If no user has a train row.
    """
    n_train = users["n_train"].to_numpy().astype(np.float64)
    means = users["mean_rating"].cast(pa.float64()).to_numpy(zero_copy_only=False)
    known = (n_train > 0) & np.isfinite(means)
    if not known.any():
        raise EvaluationError(
            "no user has a train row", where="users.parquet", remedy="raise data.split.train_fraction"
        )
    overall = float(np.average(means[known], weights=n_train[known]))
    rows = pc.index_in(pa.array(user_ids, pa.string()), value_set=users["user_id"].combine_chunks())
    filled = np.append(np.where(known, means, overall), overall)
    return np.asarray(filled[rows.fill_null(len(means)).to_numpy()])


def fill_unparsed(predicted: Floats, user_means: Floats) -> Floats:
    """Predictions for all rows: ``user_means`` where a prediction is not finite."""
    return np.where(np.isfinite(predicted), predicted, user_means)


def measure_agent(
    user_ids: Sequence[str] | Strings,
    personas: Sequence[int] | NDArray[np.integer[Any]],
    ratings: Floats,
    predicted: Floats,
    user_means: Floats,
    resampling: Resampling = DEFAULT_RESAMPLING,
) -> dict[str, Any]:
    """Measure an agent's (or a baseline's) predictions.

    Args:
        user_ids: The user of each test row, shape ``(n,)``.
        personas: That user's persona, shape ``(n,)``.
        ratings: The true ratings, shape ``(n,)``.
        predicted: The predicted ratings, shape ``(n,)``; NaN where the answer held none.
        user_means: The train mean of each row's user (:func:`train_means`), shape ``(n,)``.
        resampling: How the intervals are drawn.

    Returns:
        JSON-ready values, None where a figure doesn't exist: ``n`` rows; ``n_parsed``; ``urr`` (share of
        unparsed rows); ``rmse``, ``mae`` and their ``rmse_ci``, ``mae_ci`` (low, high) on parsed rows;
        ``rmse_filled``, ``mae_filled`` on all rows; ``macro_rmse`` and ``macro_mae``, the means of the users'
        RMSEs and MAEs; ``per_persona`` (n, n_parsed, rmse, mae by persona) and ``per_user`` (n, sse, sae of
        parsed rows).

    Raises:
        EvaluationError: If there is no row.
    """
    if len(ratings) == 0:
        raise EvaluationError(
            "no test row to measure", where="samples/test.parquet", remedy="lower data.split.train_fraction"
        )
    parsed = np.isfinite(predicted)
    filled = fill_unparsed(predicted, user_means)
    names, n, sse, sae = _sum_by_user(np.asarray(user_ids)[parsed], ratings[parsed], predicted[parsed])
    measured = {
        "n": len(ratings),
        "n_parsed": int(parsed.sum()),
        "urr": float(1.0 - parsed.mean()),
        "rmse": rmse(ratings[parsed], predicted[parsed]),
        "rmse_ci": list(interval_of_rmse(sse, n, resampling)),
        "mae": mae(ratings[parsed], predicted[parsed]),
        "mae_ci": list(interval_of_mae(sae, n, resampling)),
        "rmse_filled": rmse(ratings, filled),
        "mae_filled": mae(ratings, filled),
        "macro_rmse": float(np.sqrt(sse / n).mean()) if len(n) else math.nan,
        "macro_mae": float((sae / n).mean()) if len(n) else math.nan,
        "per_persona": _measure_personas(np.asarray(personas), ratings, predicted),
        "per_user": {
            str(name): {"n": int(count), "sse": float(squared), "sae": float(absolute)}
            for name, count, squared, absolute in zip(names, n, sse, sae, strict=True)
        },
    }
    return {key: without_nan(value) for key, value in measured.items()}


def _sum_by_user(user_ids: Strings, ratings: Floats, predicted: Floats) -> tuple[Strings, Floats, Floats, Floats]:
    """Users in order, each one's number of rows, sum of squared and sum of absolute errors."""
    names, owners = np.unique(user_ids, return_inverse=True)
    errors = predicted - ratings
    n = np.bincount(owners, minlength=len(names)).astype(np.float64)
    sse = np.bincount(owners, errors**2, minlength=len(names)).astype(np.float64)
    sae = np.bincount(owners, np.abs(errors), minlength=len(names)).astype(np.float64)
    return names, n, sse, sae


def _measure_personas(personas: NDArray[Any], ratings: Floats, predicted: Floats) -> dict[str, dict[str, Any]]:
    measured = {}
    for persona in np.unique(personas):
        mine = personas == persona
        parsed = mine & np.isfinite(predicted)
        measured[str(persona)] = {
            "n": int(mine.sum()),
            "n_parsed": int(parsed.sum()),
            "rmse": rmse(ratings[parsed], predicted[parsed]),
            "mae": mae(ratings[parsed], predicted[parsed]),
        }
    return measured


def without_nan(value: Any) -> Any:
    """The same nested value with None in the place of every number that JSON can't hold."""
    if isinstance(value, dict):
        return {key: without_nan(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [without_nan(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
