"""How good a predicted distribution over the rating labels is, and whether a prediction means what it says.

Shapes: n rows, L labels.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Indices = NDArray[np.intp]

N_BINS = 10
_LEAST_P = float(np.finfo(np.float64).eps)  # as scikit-learn's log_loss


def negative_log_likelihoods(p: Floats, truth: Indices) -> Floats:
    """-ln p of each true label, in nats, at most about 36: probabilities below 2.2e-16 count as that.

    Args:
        p: Label probabilities, shape ``(n, L)``.
        truth: The index of each true label, shape ``(n,)``.
    """
    return np.asarray(-np.log(np.maximum(p[np.arange(len(truth)), truth], _LEAST_P)))


def ranked_probability_scores(p: Floats, truth: Indices) -> Floats:
    """The squared distance between predicted and true cumulative distributions, from 0 to 1, best 0 (Murphy 1971).

    ``sum over k < L of (P(label <= k) - [truth <= k])^2``, over ``L - 1``.

    Args:
        p: Label probabilities, shape ``(n, L)``.
        truth: The index of each true label, shape ``(n,)``.

    Example:
        >>> ranked_probability_scores(np.array([[0.2, 0.5, 0.3]]), np.array([0])).round(3).tolist()
        [0.365]
    """
    cuts = np.arange(p.shape[1] - 1)
    missed = p.cumsum(axis=1)[:, :-1] - (truth[:, np.newaxis] <= cuts)
    return np.asarray((missed**2).mean(axis=1))


def expected_calibration_error(p: Floats, truth: Indices, n_bins: int = N_BINS) -> float:
    """How far confidence is from accuracy, from 0 to 1 (Guo et al. 2017, equation 3); NaN without rows.

    Rows are put into bins of equal width by the probability of their most probable label. The gap between a
    bin's mean confidence and its share of right labels is averaged, each bin by its number of rows.

    Args:
        p: Label probabilities, shape ``(n, L)``.
        truth: The index of each true label, shape ``(n,)``.
        n_bins: How many bins; each is open below and closed above.
    """
    if len(truth) == 0:
        return math.nan
    confidence, right = p.max(axis=1), p.argmax(axis=1) == truth
    bins = np.searchsorted(np.linspace(0, 1, n_bins + 1)[1:-1], confidence)
    return float(np.abs(np.bincount(bins, confidence - right)).sum() / len(truth))


def calibration_curve(ratings: Floats, predicted: Floats, n_bins: int = N_BINS) -> list[dict[str, Any]]:
    """Mean true rating against mean prediction, in bins of about equally many rows.

    Equal predictions share a bin, so there are fewer bins where many predictions are equal.

    Args:
        ratings: The true ratings, shape ``(n,)``.
        predicted: The predicted ratings, finite, shape ``(n,)``.
        n_bins: The most bins there can be.

    Returns:
        ``n``, ``predicted`` and ``true`` of each bin, predictions ascending.
    """
    if len(ratings) == 0:
        return []
    edges = np.quantile(predicted, np.linspace(0, 1, n_bins + 1)[1:-1], method="lower")
    bins = np.searchsorted(edges, predicted)
    return [
        {"n": int(chosen.sum()), "predicted": float(predicted[chosen].mean()), "true": float(ratings[chosen].mean())}
        for chosen in (bins == number for number in np.unique(bins))
    ]
