"""Predictors without a language model, on the same test rows as the agents.

An agent is worth its cost only where it beats these, so each is as strong as it honestly can be: fitted
on every rating that an agent may see (the cohort's train rows and all rows of users outside the cohort),
its penalties tuned on a slice of the cohort's train rows, and fitted again on everything with what won.
The slice is the last fifth of each user's train rows in time, because the test rows follow in time too.
No test rating is ever read.

A prediction is one number, and nobody rates 3.7. To simulate ratings a baseline draws from a normal distribution
round its prediction, as wide as its errors on train rows that were held out from fitting.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from personas_tune.collaborative.factorisation import Penalties, Ratings, fit_biases, fit_factors
from personas_tune.collaborative.numbering import distinct_ids, places_of
from personas_tune.errors import EvaluationError
from personas_tune.evaluation.prompt_numbers import prompt_numbers
from personas_tune.evaluation.ridge import cross_validated_ridge, held_out_predictions

Floats = NDArray[np.float64]
Indices = NDArray[np.int64]
Candidate = TypeVar("Candidate")

_VALIDATION_SHARE = 0.2
_SHRINKAGES = (0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
_BIAS_PENALTIES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
_FACTOR_PENALTIES = (2.0, 4.0, 6.0, 9.0, 14.0, 20.0)
_RANKS = (0, 2, 4, 8, 16)
_FIRST_RANK = 8
# One alternating-least-squares solution is a noisy estimate: the mean of several starts is better than
# any (ml-latest-small, rank 8: RMSE .905 against .911) and hardly depends on the seed.
_N_STARTS = 4
_N_SWEEPS = 8


@dataclass(frozen=True)
class Baseline:
    """Predictions of the test rows, and what tuning chose.

    Args:
        predicted: One rating a test row, within the scale.
        tuned: Chosen settings by name; empty when there was nothing to choose.
        sd: Root mean square error on train rows that were held out, clipped as predictions are: the standard deviation
            of the ratings that are drawn round a prediction. None when no row could be held out.
    """

    predicted: Floats
    tuned: dict[str, float] = field(default_factory=dict)
    sd: float | None = None


@dataclass(frozen=True)
class _Task:
    """Ratings to fit on and pairs to predict: ``cohort`` the cohort's rows, ``seen`` these and outside rows."""

    cohort: Ratings
    seen: Ratings
    users: Indices
    items: Indices


@dataclass(frozen=True)
class _Problem:
    """The test rows to predict from all that may be seen, and within it a task like that to tune on.

    ``tuning`` asks for each user's last train rows, whose ratings are ``truth``, given the rows before them.
    """

    final: _Task
    tuning: _Task
    truth: Floats
    labels: Floats

    def clip(self, predicted: Floats) -> Floats:
        return np.clip(predicted, self.labels[0], self.labels[-1])

    def solve(self, predict: Callable[[_Task], Floats], tuned: dict[str, float] | None = None) -> Baseline:
        """Predict the test rows, and the rows of the tuning task for the size of the errors."""
        predicted = self.clip(predict(self.final))
        sd = _rmse(self.clip(predict(self.tuning)), self.truth) if len(self.truth) else None
        return Baseline(predicted, tuned or {}, sd)

    def choose(self, candidates: Sequence[Candidate], predict: Callable[[_Task, Candidate], Floats]) -> Candidate:
        """The candidate with the lowest RMSE on the tuning task, the first of equals.

        The middle one when no user has a row to spare for tuning.
        """
        if len(self.truth) == 0:
            return candidates[len(candidates) // 2]
        errors = [_rmse(self.clip(predict(self.tuning, candidate)), self.truth) for candidate in candidates]
        return candidates[int(np.argmin(errors))]


def fit_baselines(
    train: pa.Table,
    outside: pa.Table,
    test: pa.Table,
    items: pa.Table,
    users: pa.Table,
    train_samples: pa.Table,
    *,
    labels: Sequence[float],
    historical_average: Literal["outside", "train", "all", "none"] = "outside",
    seed: int = 0,
) -> dict[str, Baseline]:
    """Fit, tune and apply every baseline.

    * ``constant``: the one label with the lowest RMSE on the cohort's train rows.
    * ``global_mean``: the mean of the cohort's train rows.
    * ``user_mean``: mean of the user's train rows, shrunk towards the global mean.
    * ``item_mean``: mean of the item's rows, outside rows included, shrunk towards the mean of all rows.
    * ``user_item_bias``: mean plus user bias plus item bias, one ridge regression over all rows.
    * ``matrix_factorisation``: the same plus an inner product of factors; rank 0 is among the choices.
    * ``ridge_prompt_numbers``: ridge regression on :func:`~personas_tune.evaluation.prompt_numbers.prompt_numbers`,
      with or without their squares and products, chosen by cross-validation that keeps users together.
    * ``neighbours``: what like-minded users say, unrounded (prompts show one decimal); only where prompts show it.

    Unknown users and items are predicted by whatever part of a model remains. The order of the rows of
    ``train``, ``outside`` and ``train_samples`` changes nothing, nor does the number of threads.

    Args:
        train: The cohort's train rows: user_id, item_id, rating, position.
        outside: Rows of users outside the cohort: user_id, item_id, rating; may be empty.
        test: Rows to predict: user_id, item_id, memory_positions, perhaps neighbours_rating. No rating is read.
        items: ``items.parquet``.
        users: ``users.parquet``.
        train_samples: ``samples/train.parquet``.
        labels: The scale's ratings, ascending.
        historical_average: What the items' mean ratings were taken from.
        seed: Seeds the first factors of the matrix factorisation.

    Returns:
        Predictions for the rows of ``test``, in its order, by name. The error on held-out rows is that on the tuning
        slice, after fitting on what precedes it; for the ridge regression that of cross-validation over users; for
        ``neighbours`` that on all train samples, whose ratings it never saw.

    Raises:
        EvaluationError: If there is no train row, or a user is missing from ``users``.
    """
    if len(train) == 0 or len(train_samples) == 0:
        raise EvaluationError("no train row to fit baselines on", where="data.split.train_fraction", remedy="raise it")
    by_time = [("user_id", "ascending"), ("position", "ascending")]
    train, train_samples = train.sort_by(by_time), train_samples.sort_by(by_time)
    with threadpool_limits(limits=1):
        problem = _number_rows(train, outside, test, np.asarray(labels, dtype=np.float64))
        penalties = _tune_biases(problem)
        baselines = {
            "constant": _constant(problem),
            "global_mean": _global_mean(problem),
            "user_mean": _user_mean(problem),
            "item_mean": _item_mean(problem),
            "user_item_bias": _user_item_bias(problem, penalties),
            "matrix_factorisation": _matrix_factorisation(problem, penalties, seed),
            "ridge_prompt_numbers": _ridge(train, test, items, users, train_samples, historical_average, problem),
        }
        if "neighbours_rating" in test.column_names:
            baselines["neighbours"] = _neighbours(problem, test, train_samples)
        return baselines


def _number_rows(train: pa.Table, outside: pa.Table, test: pa.Table, labels: Floats) -> _Problem:
    user_ids = distinct_ids(*(table["user_id"] for table in (train, outside, test)))
    item_ids = distinct_ids(*(table["item_id"] for table in (train, outside, test)))

    def number(table: pa.Table) -> Ratings:
        values = table["rating"].to_numpy().astype(np.float64)
        numbered = places_of(table["user_id"], user_ids), places_of(table["item_id"], item_ids)
        return Ratings(*numbered, values, len(user_ids), len(item_ids))

    cohort = number(train)
    others = number(outside.sort_by([(name, "ascending") for name in ("user_id", "item_id", "rating")]))
    last = _last_rows(cohort.users)
    earlier, recent = cohort.where(~last), cohort.where(last)
    asked = places_of(test["user_id"], user_ids), places_of(test["item_id"], item_ids)
    return _Problem(
        final=_Task(cohort, cohort.joined(others), *asked),
        tuning=_Task(earlier, earlier.joined(others), recent.users, recent.items),
        truth=recent.values,
        labels=labels,
    )


def _last_rows(owners: Indices) -> NDArray[np.bool_]:
    """Mark the last fifth of each user's rows, which lie together and in order of time.

    At least one row of a user with two or more, none of a user with one.
    """
    _, starts, n_of_user = np.unique(owners, return_index=True, return_counts=True)
    n_recent = np.where(n_of_user > 1, np.maximum(1, np.rint(n_of_user * _VALIDATION_SHARE)), 0)
    within = np.arange(len(owners)) - np.repeat(starts, n_of_user)
    return within >= np.repeat(n_of_user - n_recent, n_of_user)


def _rmse(predicted: Floats | float, ratings: Floats) -> float:
    return float(np.sqrt(np.mean((predicted - ratings) ** 2)))


def _constant(problem: _Problem) -> Baseline:
    def best_label(task: _Task) -> float:
        errors = [_rmse(label, task.cohort.values) for label in problem.labels]
        return float(problem.labels[int(np.argmin(errors))])

    tuned = {"label": best_label(problem.final)}
    return problem.solve(lambda task: np.full(len(task.users), best_label(task)), tuned)


def _global_mean(problem: _Problem) -> Baseline:
    return problem.solve(lambda task: np.full(len(task.users), task.cohort.values.mean()))


def shrunk_means(owners: Indices, values: Floats, n_owners: int, shrinkage: float) -> Floats:
    """Each owner's mean as if it had ``shrinkage`` more ratings at the mean of all values.

    An owner without ratings gets the mean of all values.
    """
    overall = float(values.mean())
    n = np.bincount(owners, minlength=n_owners) + shrinkage
    total = np.bincount(owners, values - overall, minlength=n_owners)
    return overall + total / np.where(n > 0, n, 1.0)


def _user_mean(problem: _Problem) -> Baseline:
    def predict(task: _Task, shrinkage: float) -> Floats:
        rows = task.cohort
        return shrunk_means(rows.users, rows.values, rows.n_users, shrinkage)[task.users]

    shrinkage = problem.choose(_SHRINKAGES, predict)
    return problem.solve(lambda task: predict(task, shrinkage), {"shrinkage": shrinkage})


def _item_mean(problem: _Problem) -> Baseline:
    def predict(task: _Task, shrinkage: float) -> Floats:
        rows = task.seen
        return shrunk_means(rows.items, rows.values, rows.n_items, shrinkage)[task.items]

    shrinkage = problem.choose(_SHRINKAGES, predict)
    return problem.solve(lambda task: predict(task, shrinkage), {"shrinkage": shrinkage})


def _tune_biases(problem: _Problem) -> Penalties:
    candidates = [Penalties(user, item) for user in _BIAS_PENALTIES for item in _BIAS_PENALTIES]
    return problem.choose(candidates, _predict_by_biases)


def _predict_by_biases(task: _Task, penalties: Penalties) -> Floats:
    return fit_biases(task.seen, penalties).predict(task.users, task.items)


def _user_item_bias(problem: _Problem, penalties: Penalties) -> Baseline:
    tuned = {"user_penalty": penalties.user, "item_penalty": penalties.item}
    return problem.solve(lambda task: _predict_by_biases(task, penalties), tuned)


def _matrix_factorisation(problem: _Problem, penalties: Penalties, seed: int) -> Baseline:
    """Tune the factors' penalty at one rank, then the rank at that penalty."""

    def predict(task: _Task, rank: int, factor_penalty: float) -> Floats:
        start = fit_biases(task.seen, penalties)
        chosen = penalties._replace(factor=factor_penalty)
        seeds = range(seed, seed + _N_STARTS) if rank > 0 else [seed]
        models = fit_factors(task.seen, start, rank, chosen, _N_SWEEPS, seeds)
        predictions = [problem.clip(model.predict(task.users, task.items)) for model in models]
        return np.asarray(np.mean(predictions, axis=0))

    factor_penalty = problem.choose(_FACTOR_PENALTIES, lambda task, penalty: predict(task, _FIRST_RANK, penalty))
    rank = problem.choose(_RANKS, lambda task, rank: predict(task, rank, factor_penalty))
    tuned = {"rank": float(rank), "factor_penalty": factor_penalty}
    return problem.solve(lambda task: predict(task, rank, factor_penalty), tuned)


def _neighbours(problem: _Problem, test: pa.Table, train_samples: pa.Table) -> Baseline:
    sd = None
    if "neighbours_rating" in train_samples.column_names:
        said = problem.clip(train_samples["neighbours_rating"].to_numpy())
        sd = _rmse(said, train_samples["rating"].to_numpy().astype(np.float64))
    return Baseline(problem.clip(test["neighbours_rating"].to_numpy()), sd=sd)


def _ridge(
    train: pa.Table,
    test: pa.Table,
    items: pa.Table,
    users: pa.Table,
    train_samples: pa.Table,
    historical_average: Literal["outside", "train", "all", "none"],
    problem: _Problem,
) -> Baseline:
    features = prompt_numbers(train_samples, train, items, users, historical_average, leave_own_out=True)
    ratings = train_samples["rating"].to_numpy().astype(np.float64)
    groups = places_of(train_samples["user_id"], distinct_ids(train_samples["user_id"]))
    model = cross_validated_ridge(features, ratings, groups)
    asked = prompt_numbers(test, train, items, users, historical_average, leave_own_out=False)
    tuned = {"alpha": model["ridge"].alpha, "degree": float(model["products"].degree)}
    held_out = held_out_predictions(model, features, ratings, groups)
    sd = None if held_out is None else _rmse(problem.clip(held_out), ratings)
    return Baseline(problem.clip(model.predict(asked)), tuned, sd)
