"""Predictors against each other on the same rows, with intervals that resample users."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from personas_tune.errors import ConfigError
from personas_tune.evaluation.distributions import jensen_shannon, point_masses, sum_by_group
from personas_tune.evaluation.intervals import DEFAULT_RESAMPLING, Resampling, intervals_of
from personas_tune.evaluation.metrics import without_nan

Floats = NDArray[np.float64]

# What every agent is compared with, besides the other agents.
REFERENCE_BASELINES = (
    "constant",
    "user_mean",
    "item_mean",
    "user_item_bias",
    "matrix_factorisation",
    "ridge_prompt_numbers",
    "neighbours",
)


@dataclass(frozen=True)
class Predictor:
    """What is compared of a predictor, on all test rows.

    Args:
        filled: Its ratings without gaps (:func:`~personas_tune.evaluation.metrics.fill_unparsed`), shape ``(n,)``.
        simulated: The mass of the ratings that it simulates (:mod:`~personas_tune.evaluation.distributions`), shape
            ``(n, L)``; None: all on the label nearest ``filled``.
        nll: Minus the log probability of each true label, shape ``(n,)``; None without probabilities.
    """

    filled: Floats
    simulated: Floats | None = None
    nll: Floats | None = None


def comparison_pairs(agents: Sequence[str], baselines: Iterable[str]) -> list[tuple[str, str]]:
    """Which predictors the table compares: each agent with the agents named before it and with the baselines.

    Raises:
        ConfigError: If an agent bears a baseline's name.
    """
    references = [name for name in baselines if name in REFERENCE_BASELINES]
    clashes = sorted(set(agents) & set(baselines))
    if clashes:
        raise ConfigError(f"{clashes[0]!r} is the name of a baseline", where="agents", remedy="rename the agent")
    pairs = []
    for place, agent in enumerate(agents):
        pairs += [(agent, other) for other in [*agents[:place], *references]]
    return pairs


def compare_predictors(
    labels: Sequence[float] | Floats,
    user_ids: Sequence[str] | NDArray[Any],
    ratings: Floats,
    predictors: Mapping[str, Predictor],
    pairs: Sequence[tuple[str, str]],
    resampling: Resampling = DEFAULT_RESAMPLING,
) -> list[dict[str, Any]]:
    """Differences between predictors on all rows, with intervals that resample users.

    Args:
        labels: The scale's labels, ascending, shape ``(L,)``.
        user_ids: The user of each test row, shape ``(n,)``.
        ratings: The true ratings, shape ``(n,)``.
        predictors: Each predictor by name.
        pairs: Names a and b of each comparison.
        resampling: How the intervals are drawn; all comparisons use the same draws.

    Returns:
        For each pair: ``a``, ``b``, ``difference`` (RMSE of a minus RMSE of b), ``low`` and ``high``; and under
        ``mae``, ``js`` (of the distributions over all rows) and ``nll`` the same three of that figure, ``nll`` None
        unless both have probabilities. Ends are None when there are fewer than two users.
    """
    if not pairs:
        return []
    sums = _sums_of_users(np.asarray(labels, dtype=np.float64), user_ids, ratings, predictors)
    names = list(predictors)
    first, second = (np.array([names.index(pair[side]) for pair in pairs]) for side in (0, 1))

    def differences(totals: Floats) -> Floats:
        figures = _figures(totals, len(labels))
        return figures[:, first] - figures[:, second]

    found = differences(sums.sum(axis=1, keepdims=True))[..., 0]
    ends = intervals_of(differences, sums, resampling) if sums.shape[1] > 1 else np.full((2, *found.shape), np.nan)
    figures = np.stack([found, *ends], axis=-1)  # RMSE, MAE, JS, NLL x pairs x difference, low, high
    return [
        {"a": a, "b": b, **_row(figures[:, place], all(predictors[name].nll is not None for name in (a, b)))}
        for place, (a, b) in enumerate(pairs)
    ]


def _row(figures: Floats, has_nll: bool) -> dict[str, Any]:
    """One pair's figures, shape ``(4, 3)``, by name."""
    rmse, mae, js, nll = (
        without_nan(dict(zip(("difference", "low", "high"), each, strict=True))) for each in figures.tolist()
    )
    return {**rmse, "mae": mae, "js": js, "nll": nll if has_nll else None}


def _sums_of_users(
    labels: Floats, user_ids: Sequence[str] | NDArray[Any], ratings: Floats, predictors: Mapping[str, Predictor]
) -> Floats:
    """What :func:`_figures` needs, of each user: shape ``(n_sums, n_users)``."""
    users, owners = np.unique(np.asarray(user_ids), return_inverse=True)
    true = np.column_stack([np.ones(len(ratings)), point_masses(ratings, labels)])
    blocks = chain([true], (_columns(labels, ratings, each) for each in predictors.values()))
    return np.concatenate([sum_by_group(owners, block, len(users)).T for block in blocks])


def _columns(labels: Floats, ratings: Floats, predictor: Predictor) -> Floats:
    """Each row's squared error, absolute error, NLL (0 without) and simulated mass, shape ``(n, 3 + L)``."""
    errors = predictor.filled - ratings
    nll = np.zeros(len(ratings)) if predictor.nll is None else predictor.nll
    simulated = point_masses(predictor.filled, labels) if predictor.simulated is None else predictor.simulated
    return np.column_stack([errors**2, np.abs(errors), nll, simulated])


def _figures(totals: Floats, n_labels: int) -> Floats:
    """RMSE, MAE, JS divergence and mean NLL of each predictor, shape ``(4, n_predictors, n_draws)``.

    Args:
        totals: The number of rows, the true ratings of each label, and each predictor's :func:`_columns`, added up over
            users, shape ``(n_sums, n_draws)``.
        n_labels: How many labels there are.
    """
    n, true, predicted = totals[0], totals[1 : 1 + n_labels], totals[1 + n_labels :]
    means = predicted.reshape(-1, 3 + n_labels, totals.shape[1]) / n
    return np.stack([np.sqrt(means[:, 0]), means[:, 1], jensen_shannon(true / n, means[:, 3:], axis=1), means[:, 2]])
