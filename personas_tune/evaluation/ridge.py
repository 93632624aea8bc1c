"""Ridge regression on features of rows, tuned and judged by cross-validation that keeps users together."""

import numpy as np
from numpy.typing import NDArray
from sklearn.base import clone
from sklearn.linear_model import Ridge
from sklearn.model_selection import GridSearchCV, GroupKFold, cross_val_predict
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import PolynomialFeatures, StandardScaler

Floats = NDArray[np.float64]
Indices = NDArray[np.int64]

_ALPHAS = tuple(float(alpha) for alpha in np.logspace(-1, 4, 11))
_FOLDS = 5


def cross_validated_ridge(features: Floats, ratings: Floats, groups: Indices) -> Pipeline:
    """A ridge regression on standardised features and perhaps their products, tuned over groups."""
    pipeline = Pipeline(
        [
            ("scaled", StandardScaler()),
            ("products", PolynomialFeatures(degree=1, include_bias=False)),
            ("rescaled", StandardScaler()),
            ("ridge", Ridge(alpha=_ALPHAS[len(_ALPHAS) // 2])),
        ]
    )
    folds = _folds(groups)
    if folds is None:
        return pipeline.fit(features, ratings)
    grid = {"products__degree": (1, 2), "ridge__alpha": _ALPHAS}
    search = GridSearchCV(pipeline, grid, scoring="neg_mean_squared_error", cv=folds)
    return search.fit(features, ratings, groups=groups).best_estimator_


def held_out_predictions(model: Pipeline, features: Floats, ratings: Floats, groups: Indices) -> Floats | None:
    """Each row predicted by the same regression fitted without its fold of groups; None with one group only."""
    folds = _folds(groups)
    if folds is None:
        return None
    return np.asarray(cross_val_predict(clone(model), features, ratings, groups=groups, cv=folds))


def _folds(groups: Indices) -> GroupKFold | None:
    n_groups = len(np.unique(groups))
    return GroupKFold(n_splits=min(_FOLDS, n_groups)) if n_groups > 1 else None
