"""Confidence intervals that resample users.

A user's ratings are not independent: whoever is hard to predict is hard on every row. Resampling rows
would therefore give intervals that are too narrow, so whole users are drawn with replacement. Per-user
sums are all that is needed, which keeps 9,999 resamples of 200 users well below a second.

Intervals are percentile intervals. On simulated users their coverage equals that of BCa within a
percent, and they exist where BCa doesn't (a predictor that is never wrong).
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import bootstrap

Floats = NDArray[np.float64]

# Resamples are drawn in blocks of about this many numbers, so that memory doesn't grow with the users.
_BLOCK = 4_000_000


class Resampling(NamedTuple):
    """How intervals are drawn.

    Args:
        n_resamples: How many times the users are drawn.
        confidence: Share of such intervals that hold the true value.
        seed: Seeds the draws; intervals with equal seeds and users share them.
    """

    n_resamples: int = 9999
    confidence: float = 0.95
    seed: int = 0


DEFAULT_RESAMPLING = Resampling()


def interval_of_rmse(sse: ArrayLike, n: ArrayLike, resampling: Resampling = DEFAULT_RESAMPLING) -> tuple[float, float]:
    """Confidence interval of the RMSE over all rows.

    Args:
        sse: Each user's sum of squared errors, shape ``(n_users,)``.
        n: Each user's number of rows; users without rows don't count.
        resampling: How many draws, which confidence, which seed.

    Returns:
        Lower and upper end; NaN when fewer than two users have rows.
    """
    return _resample(_rmse, [sse, n], resampling)


def interval_of_mae(sae: ArrayLike, n: ArrayLike, resampling: Resampling = DEFAULT_RESAMPLING) -> tuple[float, float]:
    """Confidence interval of the MAE over all rows: :func:`interval_of_rmse` with sums of absolute errors."""
    return _resample(_mean, [sae, n], resampling)


def paired_difference(
    sse_a: ArrayLike, sse_b: ArrayLike, n: ArrayLike, resampling: Resampling = DEFAULT_RESAMPLING
) -> tuple[float, float, float]:
    """RMSE of predictor a minus RMSE of predictor b on the same rows, with its confidence interval.

    Both are measured on the same draws of users, so what makes a user hard for both cancels out.

    Args:
        sse_a: Each user's sum of squared errors under a, shape ``(n_users,)``.
        sse_b: The same under b.
        n: Each user's number of rows, the same rows for both.
        resampling: How many draws, which confidence, which seed.

    Returns:
        Difference (negative: a is better), lower and upper end; NaN ends when fewer than two users have rows.
    """
    a, b, rows = (np.asarray(values, dtype=np.float64) for values in (sse_a, sse_b, n))
    difference = float(_difference_of_rmse(a, b, rows)) if rows.sum() > 0 else math.nan
    low, high = _resample(_difference_of_rmse, [a, b, rows], resampling)
    return difference, low, high


def _rmse(sse: Floats, n: Floats, axis: int = -1) -> Floats:
    return np.asarray(np.sqrt(_mean(sse, n, axis)))


def _mean(total: Floats, n: Floats, axis: int = -1) -> Floats:
    return np.asarray(total.sum(axis=axis) / n.sum(axis=axis))


def _difference_of_rmse(sse_a: Floats, sse_b: Floats, n: Floats, axis: int = -1) -> Floats:
    return _rmse(sse_a, n, axis) - _rmse(sse_b, n, axis)


def _resample(
    statistic: Callable[..., Floats], sums: Sequence[ArrayLike], resampling: Resampling
) -> tuple[float, float]:
    """Percentile interval of a statistic of per-user sums, the last of which counts rows."""
    columns = [np.asarray(values, dtype=np.float64) for values in sums]
    rated = columns[-1] > 0
    n_users = int(rated.sum())
    if n_users < 2:
        return math.nan, math.nan
    interval = bootstrap(
        [column[rated] for column in columns],
        statistic,
        paired=True,
        vectorized=True,
        n_resamples=resampling.n_resamples,
        batch=max(1, _BLOCK // n_users),
        confidence_level=resampling.confidence,
        method="percentile",
        rng=np.random.default_rng(resampling.seed),
    ).confidence_interval
    return float(interval.low), float(interval.high)
