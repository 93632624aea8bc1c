"""Making an agent's distributions honest.

Calibration is fitted on train rows only, the latest of each user, because the test rows follow in time too. It
sees nothing but the agent's own distribution. It is Dirichlet calibration (Kull et al. 2019, "Beyond temperature
scaling"): multinomial logistic regression on the log probabilities, which can shift, sharpen and mix labels, the
same way for every user and item.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

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
_FLOATS = ("mean", "scale", "coefficients", "intercepts")
_REMEDY = "raise evaluation.calibration_share"


@dataclass(frozen=True)
class Calibration:
    """A fitted regression from log probabilities to labels.

    Args:
        labels: The scale's ratings, ascending.
        mean: Of each label's log probability on the train rows, shape ``(n_labels,)``; subtracted.
        scale: Their standard deviations, shape ``(n_labels,)``; divided by.
        seen: Indices of the labels that train rows have, ascending.
        coefficients: Shape ``(len(seen), n_labels)``; one row if two labels were seen.
        intercepts: Shape ``(len(seen),)``; one if two were seen.
    """

    labels: tuple[float, ...]
    mean: Floats
    scale: Floats
    seen: Indices
    coefficients: Floats
    intercepts: Floats

    def apply(self, p: Floats) -> Floats:
        """Mended distributions.

        Args:
            p: The agent's own, shape ``(M, n_labels)``.

        Returns:
            Shape ``(M, n_labels)``; rows sum to 1. A label that no train row has gets probability 0.
        """
        calibrated = np.zeros(p.shape)
        if len(p):
            with threadpool_limits(limits=1):
                calibrated[:, self.seen] = self._regression().predict_proba(log_probabilities(p))
        return calibrated

    def _regression(self) -> Pipeline:
        """As scikit-learn fitted it, so that its own code applies it."""
        scaler, regression = StandardScaler(), LogisticRegression()
        scaler.mean_, scaler.scale_ = self.mean, self.scale
        regression.classes_, regression.coef_, regression.intercept_ = self.seen, self.coefficients, self.intercepts
        return make_pipeline(scaler, regression)

    @property
    def record(self) -> dict[str, Any]:
        """It as JSON, to the last bit."""
        return {"labels": list(self.labels), **{name: getattr(self, name).tolist() for name in ("seen", *_FLOATS)}}

    @classmethod
    def of(cls, record: Mapping[str, Any], labels: Sequence[float]) -> Self:
        """From its JSON.

        Args:
            record: As :attr:`record` gives it.
            labels: The scale's ratings that it has to have.

        Raises:
            ValueError: If it isn't that of a calibration of these labels.
        """
        try:
            arrays = {name: np.array(record[name], dtype=np.float64) for name in _FLOATS}
            found = cls(labels=tuple(record["labels"]), seen=np.array(record["seen"], dtype=np.intp), **arrays)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"no calibration ({error})") from error
        n, n_seen = len(labels), len(found.seen)
        n_rows = 1 if n_seen == 2 else n_seen
        shapes = (found.mean.shape, found.scale.shape, found.coefficients.shape, found.intercepts.shape)
        if n_seen < 2 or found.labels != tuple(labels) or shapes != ((n,), (n,), (n_rows, n), (n_rows,)):
            raise ValueError("it is of other labels")
        if not set(found.seen.tolist()) <= set(range(n)):
            raise ValueError("it is of other labels")
        return found


def fit_calibration(p_train: Floats, ratings: Floats, users: Sequence[str], labels: Sequence[float]) -> Calibration:
    """Learn what an agent gets wrong on train rows.

    Args:
        p_train: Its distributions for N train rows, shape ``(N, n_labels)``.
        ratings: Their true ratings, shape ``(N,)``.
        users: Their users; the strength of the penalty is chosen by folds that keep users together.
        labels: The scale's ratings, ascending.

    Raises:
        EvaluationError: If the train rows have fewer than two users or different ratings.
    """
    seen = nearest_labels(ratings, np.asarray(labels, dtype=np.float64))
    require_calibration_rows(seen, users)
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=_ITERATIONS))
    with threadpool_limits(limits=1):
        scaler, regression = (step for _, step in _tuned(model, log_probabilities(p_train), seen, users).steps)
    return Calibration(
        labels=tuple(map(float, labels)),
        mean=scaler.mean_,
        scale=scaler.scale_,
        seen=regression.classes_,
        coefficients=regression.coef_,
        intercepts=regression.intercept_,
    )


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
