"""How faithfully a predictor rates what real users rated, beyond its errors, as plain values for ``metrics.json``.

A predictor that answers everyone's average has a good RMSE and simulates nobody. What it lacks shows here: agreement
on labels, order within a user, spread of ratings, and what its probabilities are worth. Rows without a finite
prediction are left out of every figure.

Shapes: n rows, L labels.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import cohen_kappa_score, confusion_matrix

from personas_tune.evaluation.distributions import compare_groups, compare_masses, nearest_labels, point_masses
from personas_tune.evaluation.ordinal_scores import (
    calibration_curve,
    expected_calibration_error,
    negative_log_likelihoods,
    ranked_probability_scores,
)

Floats = NDArray[np.float64]
Indices = NDArray[np.intp]

_EQUAL = 1e-9  # ratings that differ by less are equal: rounding has no order


def measure_faithfulness(
    labels: Sequence[float] | Floats,
    user_ids: Sequence[str] | NDArray[Any],
    personas: Sequence[int] | NDArray[np.integer[Any]],
    ratings: Floats,
    predicted: Floats,
    p: Floats | None = None,
    draws: bool = False,
) -> dict[str, Any]:
    """Measure a predictor's faithfulness.

    Args:
        labels: The scale's labels, ascending, shape ``(L,)``.
        user_ids: The user of each test row, shape ``(n,)``.
        personas: That user's persona, shape ``(n,)``.
        ratings: The true ratings, shape ``(n,)``.
        predicted: The predicted ratings, shape ``(n,)``; NaN where the answer held none.
        p: The label probabilities behind them, shape ``(n, L)``; None where there are none.
        draws: Whether the predictor simulates a rating by drawing it from ``p``; otherwise it answers the label
            nearest ``predicted``.

    Returns:
        Values for JSON, NaN or None where a figure doesn't exist: ``accuracy``, ``within_1``, ``kappa`` and
        ``confusion`` of the label nearest the prediction; ``pearson``, ``spearman`` and ``pairwise_order`` of the
        prediction; ``calibration_curve``; ``nll``, ``rps`` and ``ece`` of ``p``; ``distribution`` with ``labels``,
        ``overall``, ``points`` (as overall, with the label nearest the prediction for each rating), ``per_persona``
        and ``per_user``.
    """
    values, parsed = np.asarray(labels, dtype=np.float64), np.isfinite(predicted)
    _, owners = np.unique(np.asarray(user_ids), return_inverse=True)
    owners, true, answered = owners[parsed], ratings[parsed], predicted[parsed]
    p, groups = None if p is None else p[parsed], np.asarray(personas)
    truth = nearest_labels(true, values)
    true_mass, points = point_masses(true, values), point_masses(answered, values)
    simulated = p if draws and p is not None else points
    return {
        **measure_agreement(values, truth, nearest_labels(answered, values)),
        "pearson": correlation(true, answered),
        "spearman": rank_correlation(true, answered),
        "pairwise_order": pairwise_order(owners, true, answered),
        "calibration_curve": calibration_curve(true, answered),
        **_score_probabilities(p, truth),
        "distribution": {
            "labels": values.tolist(),
            "points": compare_masses(values, true_mass, points),
            **compare_groups(values, owners, groups[parsed], true_mass, simulated, every_persona=groups),
        },
    }


def measure_agreement(labels: Floats, truth: Indices, answered: Indices) -> dict[str, Any]:
    """How often answered labels are the true ones.

    Args:
        labels: The scale's labels, shape ``(L,)``.
        truth: The index of each true label, shape ``(n,)``.
        answered: The index of each answered label, shape ``(n,)``.

    Returns:
        ``accuracy``; ``within_1``, the share at most 1.0 of rating away; ``kappa``, Cohen's with quadratic weights, NaN
        where every label on both sides is one and the same; ``confusion``, rows by true label.
    """
    places = np.arange(len(labels))
    confusion = np.zeros((len(labels), len(labels)), dtype=int)
    if len(truth) == 0:
        return {"accuracy": math.nan, "within_1": math.nan, "kappa": math.nan, "confusion": confusion.tolist()}
    varied = len(np.union1d(truth, answered)) > 1
    return {
        "accuracy": float((truth == answered).mean()),
        "within_1": float((np.abs(labels[truth] - labels[answered]) <= 1 + _EQUAL).mean()),
        "kappa": float(cohen_kappa_score(truth, answered, labels=places, weights="quadratic")) if varied else math.nan,
        "confusion": confusion_matrix(truth, answered, labels=places).tolist(),
    }


def correlation(ratings: Floats, predicted: Floats) -> float:
    """Pearson's correlation; NaN where one side doesn't vary."""
    return float(pearsonr(ratings, predicted).statistic) if _both_vary(ratings, predicted) else math.nan


def rank_correlation(ratings: Floats, predicted: Floats) -> float:
    """Spearman's correlation; NaN where one side doesn't vary."""
    return float(spearmanr(ratings, predicted).statistic) if _both_vary(ratings, predicted) else math.nan


def pairwise_order(owners: Indices, ratings: Floats, predicted: Floats) -> float:
    """The share of pairs of one user's rows with different true ratings that the predictions order right.

    Equal predictions count one half. It is (Somers' D + 1) / 2, with pairs within users only. Rows are sorted
    once, then each true rating takes one pass: O(n log n) for a given scale.

    Args:
        owners: A number for each row's user, shape ``(n,)``.
        ratings: The true ratings, shape ``(n,)``.
        predicted: The predicted ratings, finite, shape ``(n,)``.

    Returns:
        NaN when there is no such pair.
    """
    order = np.lexsort((predicted, owners))
    owners, ratings, predicted = owners[order], ratings[order], predicted[order]
    new_user = np.diff(owners, prepend=-1) != 0
    new_value = new_user | (np.diff(predicted, prepend=-math.inf) > _EQUAL)
    user_begins, user_ends = _bounds(new_user)
    value_begins, value_ends = _bounds(new_value)
    right = n_pairs = 0.0
    for rating in np.unique(ratings):
        seen = np.append(0, np.cumsum(ratings == rating))  # rows of this rating before each place
        higher = ratings > rating
        n_below = (seen[value_begins] - seen[user_begins])[higher]
        n_not_above = (seen[value_ends] - seen[user_begins])[higher]
        right += (n_below + n_not_above).sum() / 2
        n_pairs += (seen[user_ends] - seen[user_begins])[higher].sum()
    return float(right / n_pairs) if n_pairs else math.nan


def _bounds(begins: NDArray[np.bool_]) -> tuple[Indices, Indices]:
    """Where each row's run begins and where it ends, for runs that begin where ``begins`` is set."""
    starts = np.flatnonzero(begins)
    run = np.cumsum(begins) - 1
    return starts[run], np.append(starts[1:], len(begins))[run]


def _both_vary(ratings: Floats, predicted: Floats) -> bool:
    return len(ratings) > 1 and bool(np.ptp(ratings) > _EQUAL and np.ptp(predicted) > _EQUAL)


def _score_probabilities(p: Floats | None, truth: Indices) -> dict[str, float | None]:
    if p is None or len(truth) == 0:
        return {"nll": None, "rps": None, "ece": None}
    return {
        "nll": float(negative_log_likelihoods(p, truth).mean()),
        "rps": float(ranked_probability_scores(p, truth).mean()),
        "ece": expected_calibration_error(p, truth),
    }
