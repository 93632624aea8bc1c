"""Making an agent's distributions honest.

Calibration is fitted on train rows only, the latest of each user, because the test rows follow in time too. It
sees nothing but the agent's own distribution. It is Dirichlet calibration (Kull et al. 2019, "Beyond temperature
scaling"): multinomial logistic regression on the log probabilities, which can shift, sharpen and mix labels, the
same way for every user and item.
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
from personas_tune.evaluation.distributions import nearest_labels

Floats = NDArray[np.float64]
Indices = NDArray[np.intp]

_PENALTIES = (0.001, 0.01, 0.1, 1.0, 10.0)
_PENALTY = 0.1  # where folds can't choose
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
    seen = nearest_labels(ratings, np.asarray(labels, dtype=np.float64))
    require_calibration_rows(seen, users)
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=_ITERATIONS))
    calibrated = np.zeros(p.shape)
    with threadpool_limits(limits=1):
        fitted = _tuned(model, log_probabilities(p_train), seen, users)
        calibrated[:, fitted.classes_] = fitted.predict_proba(log_probabilities(p))
    return calibrated


def _tuned(model: Pipeline, features: Floats, targets: Indices, users: Sequence[str]) -> Pipeline:
    """Fit with the penalty that has the best log loss over folds of users.

    With a fixed penalty where some fold leaves rows of one label only, on which nothing can be fitted.
    """
    groups = np.unique(np.asarray(users), return_inverse=True)[1]
    folds = list(GroupKFold(n_splits=min(_FOLDS, len(set(users)))).split(features, targets, groups))
    if any(len(np.unique(targets[train])) < 2 for train, _ in folds):
        return model.set_params(logisticregression__C=_PENALTY).fit(features, targets)
    search = GridSearchCV(model, {"logisticregression__C": _PENALTIES}, scoring=_log_loss, cv=folds)
    return search.fit(features, targets).best_estimator_


def _log_loss(model: Pipeline, features: Floats, targets: NDArray[np.int64]) -> float:
    """Mean log probability of the true labels; one that the fold's train part lacks has the least probability, 1e-6."""
    p = np.full((len(targets), 1 + int(max(targets.max(), model.classes_.max()))), _LEAST_P)
    p[:, model.classes_] = model.predict_proba(features)
    return float(np.log(np.maximum(p[np.arange(len(targets)), targets], _LEAST_P)).mean())


def log_probabilities(p: Floats) -> Floats:
    """Natural logarithms of probabilities, of which those below one in a million count as that."""
    return np.log(np.maximum(p, _LEAST_P))


def require_calibration_rows(ratings: Floats | Indices, users: Sequence[str]) -> None:
    """See whether there are train rows enough to calibrate an agent or fit a hybrid on.

    Args:
        ratings: The ratings, or the indices of their labels.
        users: Their users.

    Raises:
        EvaluationError: If there are fewer than two users or different ratings.
    """
    if len(set(users)) < 2:
        why = (
            f"calibration and hybrids need train rows of two users, there are {len(ratings)} rows of {len(set(users))}"
        )
        raise EvaluationError(why, where="samples/train", remedy=_REMEDY)
    if len(np.unique(ratings)) < 2:
        why = "calibration and hybrids need two different ratings, all train rows kept for them have one rating"
        raise EvaluationError(why, where="samples/train", remedy=_REMEDY)
