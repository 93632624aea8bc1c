"""Making an agent's distributions honest, and asking what it adds to plain numbers.

Both are fitted on train rows only, the latest of each user, because the test rows follow in time too.

*Calibration* sees nothing but the agent's own distribution. It is Dirichlet calibration (Kull et al. 2019,
"Beyond temperature scaling"): multinomial logistic regression on the log probabilities, which can shift,
sharpen and mix labels, the same way for every user and item.

A *hybrid* sees the numbers of the prompt beside the agent's distribution. It is no agent any more, so it
stands beside the same regression without the agent, fitted on the same rows.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, GroupKFold
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from personas_tune.errors import EvaluationError
from personas_tune.evaluation.baselines import Baseline, cross_validated_ridge

Floats = NDArray[np.float64]

_PENALTIES = {"logisticregression__C": (0.001, 0.01, 0.1, 1.0, 10.0)}
_FOLDS = 5
_LEAST_P = 1e-6
_ITERATIONS = 1000
_REMEDY = "raise evaluation.calibration_share"


def calibrate(p_train: Floats, ratings: Floats, users: Sequence[str], p: Floats, labels: Sequence[float]) -> Floats:
    """An agent's distributions, mended by what it got wrong on train rows.

    Args:
        p_train: Its distributions for N train rows, shape ``(N, n_labels)``.
        ratings: Their true ratings, shape ``(N,)``.
        users: Their users; the strength of the penalty is chosen by folds that keep users together.
        p: Its distributions for M rows, shape ``(M, n_labels)``.
        labels: The scale's ratings, ascending.

    Returns:
        Shape ``(M, n_labels)``; rows sum to 1. A label that no train row has gets probability 0.

    Raises:
        EvaluationError: If the train rows have fewer than two users or different ratings.
    """
    seen = np.searchsorted(np.asarray(labels), ratings)
    _require_variety(users, seen)
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=_ITERATIONS))
    calibrated = np.zeros(p.shape)
    with threadpool_limits(limits=1):
        fitted = _tuned(model, _log(p_train), seen, users)
        calibrated[:, fitted.classes_] = fitted.predict_proba(_log(p))
    return calibrated


def _tuned(model: Pipeline, features: Floats, targets: NDArray[np.int64], users: Sequence[str]) -> GridSearchCV:
    """Choose the penalty by log loss; a label that is missing from a fold's train part rules that score out."""
    folds = GroupKFold(n_splits=min(_FOLDS, len(set(users))))
    search = GridSearchCV(model, _PENALTIES, scoring=_log_loss, cv=folds)
    return search.fit(features, targets, groups=np.unique(np.asarray(users), return_inverse=True)[1])


def _log_loss(model: Pipeline, features: Floats, targets: NDArray[np.int64]) -> float:
    """Mean log probability of the true labels; a label that the model hasn't met counts as least probable."""
    p = np.full((len(targets), 1 + int(max(targets.max(), model.classes_.max()))), _LEAST_P)
    p[:, model.classes_] = model.predict_proba(features)
    return float(np.log(np.maximum(p[np.arange(len(targets)), targets], _LEAST_P)).mean())


def _log(p: Floats) -> Floats:
    return np.log(np.maximum(p, _LEAST_P))


def _require_variety(users: Sequence[str], seen: NDArray[np.int64]) -> None:
    if len(set(users)) < 2:
        raise EvaluationError("calibration needs train rows of two users", where="samples/train", remedy=_REMEDY)
    if len(np.unique(seen)) < 2:
        raise EvaluationError("all train rows have one rating", where="samples/train", remedy=_REMEDY)


def fit_hybrid(
    numbers_train: Floats,
    p_train: Floats | None,
    ratings: Floats,
    users: Sequence[str],
    numbers: Floats,
    p: Floats | None,
    labels: Sequence[float],
) -> Baseline:
    """Ridge regression on the prompt's numbers and an agent's distribution, or for the comparison on numbers alone.

    Args:
        numbers_train: :func:`~personas_tune.evaluation.prompt_numbers.prompt_numbers` of N train rows.
        p_train: The agent's distributions of these rows, shape ``(N, n_labels)``; None for the numbers alone.
        ratings: The true ratings of these rows, shape ``(N,)``.
        users: Their users, whom cross-validation keeps together.
        numbers: The numbers of M rows to predict.
        p: The agent's distributions of these.
        labels: The scale's ratings, ascending.
    """
    groups = np.unique(np.asarray(users), return_inverse=True)[1]
    with threadpool_limits(limits=1):
        model = cross_validated_ridge(with_distribution(numbers_train, p_train, labels), ratings, groups)
        predicted = model.predict(with_distribution(numbers, p, labels))
    tuned = {"alpha": model["ridge"].alpha, "degree": float(model["products"].degree)}
    return Baseline(np.clip(predicted, labels[0], labels[-1]), tuned)


def with_distribution(numbers: Floats, p: Floats | None, labels: Sequence[float]) -> Floats:
    """A hybrid's features: the prompt's numbers, the agent's expected rating and log probabilities.

    Args:
        numbers: :func:`~personas_tune.evaluation.prompt_numbers.prompt_numbers`, shape ``(N, n_numbers)``.
        p: The agent's distributions, shape ``(N, n_labels)``; None leaves them out.
        labels: The scale's ratings.
    """
    if p is None:
        return numbers
    return np.column_stack([numbers, p @ np.asarray(labels), _log(p)])
