"""What an agent adds to plain numbers.

A *hybrid* is a ridge regression on the numbers of the prompt and the agent's distribution. It is no agent any more,
so it stands beside the same regression without the agent, fitted on the same rows: the latest train rows of each
user, because the test rows follow in time too.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from sklearn.metrics import root_mean_squared_error
from threadpoolctl import threadpool_limits

from personas_tune.evaluation.baselines import Baseline
from personas_tune.evaluation.calibration import log_probabilities, require_calibration_rows
from personas_tune.evaluation.prompt_numbers import prompt_numbers
from personas_tune.evaluation.ridge import cross_validated_ridge, held_out_predictions

Floats = NDArray[np.float64]


def numbers_of_prompts(
    latest: pa.Table,
    test: pa.Table,
    train: pa.Table,
    items: pa.Table,
    users: pa.Table,
    historical_average: Literal["outside", "train", "all", "none"],
) -> tuple[Floats, Floats]:
    """:func:`~personas_tune.evaluation.prompt_numbers.prompt_numbers` of train rows, their own ratings left out, and
    of test rows.

    Args:
        latest: Train samples.
        test: Test samples.
        train: The cohort's train rows.
        items: ``items.parquet``.
        users: ``users.parquet``.
        historical_average: What the items' mean ratings were taken from.
    """
    shown = (train, items, users, historical_average)
    return prompt_numbers(latest, *shown, leave_own_out=True), prompt_numbers(test, *shown, leave_own_out=False)


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

    Raises:
        EvaluationError: If the train rows have fewer than two users or different ratings.
    """
    require_calibration_rows(ratings, users)
    groups = np.unique(np.asarray(users), return_inverse=True)[1]
    with threadpool_limits(limits=1):
        features = with_distribution(numbers_train, p_train, labels)
        model = cross_validated_ridge(features, ratings, groups)
        held_out = held_out_predictions(model, features, ratings, groups)
        predicted = model.predict(with_distribution(numbers, p, labels))
    tuned = {"alpha": model["ridge"].alpha, "degree": float(model["products"].degree)}
    assert held_out is not None  # there are two users
    sd = float(root_mean_squared_error(ratings, np.clip(held_out, labels[0], labels[-1])))
    return Baseline(np.clip(predicted, labels[0], labels[-1]), tuned, sd)


def with_distribution(numbers: Floats, p: Floats | None, labels: Sequence[float]) -> Floats:
    """A hybrid's features: the prompt's numbers, the agent's expected rating and log probabilities.

    Args:
        numbers: :func:`~personas_tune.evaluation.prompt_numbers.prompt_numbers`, shape ``(N, n_numbers)``.
        p: The agent's distributions, shape ``(N, n_labels)``; None leaves them out.
        labels: The scale's ratings.
    """
    if p is None:
        return numbers
    return np.column_stack([numbers, p @ np.asarray(labels), log_probabilities(p)])
