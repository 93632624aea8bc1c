"""Whether simulated ratings are spread over the labels as true ones are, whoever rated what.

Every predictor is a *mass* here: a row of label probabilities for each rating that it simulates. A point prediction
has all mass on the nearest label, a simulator that draws from p has the mass p. Means of such rows are the shares
of the labels among simulated ratings, for any group of rows.

Shapes: n rows, L labels.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr, rel_entr
from scipy.stats import wasserstein_distance

Floats = NDArray[np.float64]
Indices = NDArray[np.intp]

_LEAST_SD = 1e-9


def nearest_labels(values: Floats, labels: Floats) -> Indices:
    """The index of the label nearest each value, the lower one on a tie.

    Args:
        values: Ratings, finite.
        labels: The scale's labels, ascending, shape ``(L,)``.

    Example:
        >>> nearest_labels(np.array([0.2, 3.5, 3.6]), np.arange(1.0, 6.0)).tolist()
        [0, 2, 3]
    """
    return np.asarray(np.searchsorted((labels[1:] + labels[:-1]) / 2, values))


def point_masses(values: Floats, labels: Floats) -> Floats:
    """All mass of each row on the label nearest its value, shape ``(n, L)``."""
    return np.eye(len(labels))[nearest_labels(values, labels)]


def normal_masses(means: Floats, sd: float, labels: Floats) -> Floats:
    """A normal distribution round each mean, put on the nearest labels; the outer labels take the tails.

    Args:
        means: Ratings, finite, shape ``(n,)``.
        sd: The standard deviation of all of them.
        labels: The scale's labels, ascending, shape ``(L,)``.

    Returns:
        Shape ``(n, L)``; rows sum to 1.

    Example:
        >>> normal_masses(np.array([2.5]), 1.0, np.arange(1.0, 5.0)).round(3).tolist()
        [[0.159, 0.341, 0.341, 0.159]]
    """
    edges = (labels[1:] + labels[:-1]) / 2
    below = ndtr((edges - means[:, np.newaxis]) / max(sd, _LEAST_SD))
    return np.diff(below, prepend=0.0, append=1.0, axis=1)


def sum_by_group(groups: Indices, masses: Floats, n_groups: int) -> Floats:
    """The mass of each label in each group of rows, shape ``(n_groups, L)``."""
    return np.stack([np.bincount(groups, mass, minlength=n_groups) for mass in masses.T], axis=1)


def jensen_shannon(p: Floats, q: Floats, axis: int = -1) -> Floats:
    """Jensen-Shannon divergence in nats, from 0 to ln 2 (Lin 1991, equation 4.1).

    The square of ``scipy.spatial.distance.jensenshannon``, which is NaN where rounding makes the sum negative.

    Args:
        p: Shares, summing to 1 along ``axis``.
        q: Shares of the same shape.
        axis: Which axis the labels are.
    """
    middle = (p + q) / 2
    return np.asarray(np.maximum((rel_entr(p, middle) + rel_entr(q, middle)).sum(axis=axis) / 2, 0.0))


def variance(labels: Floats, shares: Floats) -> Floats:
    """The variance of ratings of which ``shares`` fall on each label, over the last axis."""
    deviations = labels - (shares @ labels)[..., np.newaxis]
    return np.asarray((shares * deviations**2).sum(axis=-1))


def compare_shares(labels: Floats, true: Floats, simulated: Floats) -> dict[str, float]:
    """Distances between two distributions over the labels.

    Args:
        labels: The scale's labels, shape ``(L,)``.
        true: The labels' shares among true ratings, shape ``(L,)``.
        simulated: Their shares among simulated ratings, shape ``(L,)``.

    Returns:
        ``js``: :func:`jensen_shannon`, in nats; ``wasserstein``: Wasserstein-1, in units of rating;
        ``variance_ratio``: the variance of simulated ratings over that of true ones, NaN where these don't vary.
    """
    spread = float(variance(labels, true))
    return {
        "js": float(jensen_shannon(true, simulated)),
        "wasserstein": float(wasserstein_distance(labels, labels, true, simulated)),
        "variance_ratio": float(variance(labels, simulated)) / spread if spread > 0 else math.nan,
    }


def compare_masses(labels: Floats, true: Floats, simulated: Floats) -> dict[str, Any]:
    """:func:`compare_shares` of two masses of the same rows, with the shares; None in all places without rows.

    Args:
        labels: The scale's labels, shape ``(L,)``.
        true: The true ratings' mass, shape ``(n, L)``.
        simulated: The simulated ratings' mass, shape ``(n, L)``.
    """
    if len(true) == 0:
        return dict.fromkeys(("js", "wasserstein", "variance_ratio", "true", "simulated"))
    shares = true.mean(axis=0), simulated.mean(axis=0)
    return {**compare_shares(labels, *shares), "true": shares[0].tolist(), "simulated": shares[1].tolist()}


def compare_groups(
    labels: Floats,
    owners: Indices,
    personas: NDArray[Any],
    true: Floats,
    simulated: Floats,
    every_persona: NDArray[Any],
) -> dict[str, Any]:
    """The masses of the same rows compared ``overall``, ``per_persona`` and ``per_user`` (means over users).

    Args:
        labels: The scale's labels, shape ``(L,)``.
        owners: A number for each row's user, shape ``(n,)``.
        personas: Each row's persona, shape ``(n,)``.
        true: The true ratings' mass, shape ``(n, L)``.
        simulated: The simulated ratings' mass, shape ``(n, L)``.
        every_persona: The personas to be named, those without rows too.
    """
    chosen = {str(persona): personas == persona for persona in np.unique(every_persona)}
    return {
        "overall": compare_masses(labels, true, simulated),
        "per_persona": {name: compare_masses(labels, true[rows], simulated[rows]) for name, rows in chosen.items()},
        "per_user": mean_over_users(labels, owners, true, simulated),
    }


def mean_over_users(labels: Floats, owners: Indices, true: Floats, simulated: Floats) -> dict[str, float]:
    """The means over users of what :func:`compare_shares` says of each one's ratings.

    A user whose true ratings are all equal has no variance ratio and is left out of its mean.

    Args:
        labels: The scale's labels, shape ``(L,)``.
        owners: A number for each row's user, shape ``(n,)``.
        true: The true ratings' mass, shape ``(n, L)``.
        simulated: The simulated ratings' mass, shape ``(n, L)``.
    """
    names, owners = np.unique(owners, return_inverse=True)
    n_rows = np.bincount(owners, minlength=len(names))[:, np.newaxis]
    pairs = zip(*(sum_by_group(owners, mass, len(names)) / n_rows for mass in (true, simulated)), strict=True)
    compared = [compare_shares(labels, *pair) for pair in pairs]
    return {figure: _mean([each[figure] for each in compared]) for figure in ("js", "wasserstein", "variance_ratio")}


def _mean(values: list[float]) -> float:
    known = [value for value in values if math.isfinite(value)]
    return float(np.mean(known)) if known else math.nan
