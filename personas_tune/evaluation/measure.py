"""All that is measured on one set of test rows, gathered into ``metrics.json``."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from personas_tune.datasets.source import Sample
from personas_tune.errors import EvaluationError
from personas_tune.evaluation.baselines import Baseline
from personas_tune.evaluation.intervals import Resampling
from personas_tune.evaluation.metrics import (
    compare_predictors,
    comparison_pairs,
    fill_unparsed,
    measure_agent,
    train_means,
)

Floats = NDArray[np.float64]
_READOUT_COLUMNS = {"expected": "expected", "argmax": "argmax", "generate": "parsed"}


class Measurement:
    """Measures predictors on the same test rows.

    Args:
        samples: The test rows.
        users: ``users.parquet``; its train means stand in for answers without a rating.
        resampling: How intervals are drawn.
    """

    def __init__(self, samples: Sequence[Sample], users: pa.Table, resampling: Resampling) -> None:
        self._users = [sample.user_id for sample in samples]
        self._personas = [sample.persona for sample in samples]
        self._ratings = np.array([sample.rating for sample in samples])
        self._user_means = train_means(self._users, users)
        self._resampling = resampling
        self._filled: dict[str, Floats] = {}
        self._agents: list[dict[str, Any]] = []
        self._baselines: list[dict[str, Any]] = []
        self._floor: dict[str, Any] | None = None

    def add_agent(self, name: str, predicted: Floats, described: Mapping[str, Any]) -> None:
        """Measure an agent.

        Args:
            name: Its name.
            predicted: A rating a test row, NaN where its answer held none.
            described: Its base, adapters, memories and readout.
        """
        self._filled[name] = fill_unparsed(predicted, self._user_means)
        self._agents.append({"name": name, **described, **self._measure(predicted)})

    def add_baseline(self, name: str, baseline: Baseline) -> None:
        """Measure a baseline."""
        self._filled[name] = baseline.predicted
        self._baselines.append({"name": name, "tuned": dict(baseline.tuned), **self._measure(baseline.predicted)})

    def add_floor(self, optimal: Floats) -> None:
        """Measure the best possible predictor, where it is known."""
        self._floor = {"name": "bayes_optimal", **self._measure(optimal)}

    def metrics(self, **settings: Any) -> dict[str, Any]:
        """``metrics.json``, with ``settings`` among those that are written beside the figures."""
        pairs = comparison_pairs([agent["name"] for agent in self._agents], [row["name"] for row in self._baselines])
        return {
            "agents": self._agents,
            "baselines": self._baselines,
            "oracle": self._floor,
            "paired": compare_predictors(self._users, self._ratings, self._filled, pairs, self._resampling),
            "settings": {
                "n_users": len(set(self._users)),
                "n_rows": len(self._users),
                "n_resamples": self._resampling.n_resamples,
                "confidence": self._resampling.confidence,
                **settings,
            },
        }

    def _measure(self, predicted: Floats) -> dict[str, Any]:
        return measure_agent(self._users, self._personas, self._ratings, predicted, self._user_means, self._resampling)


def readout_values(predictions: pa.Table, readout: str) -> Floats:
    """The predicted rating of each row under a readout, NaN where there is none, shape ``(n,)``."""
    column = predictions[_READOUT_COLUMNS[readout]].cast(pa.float64())
    return np.asarray(column.fill_null(float("nan")).to_numpy())


def optimal_predictions(samples: Sequence[Sample], oracle: pa.Table) -> Floats:
    """The oracle's prediction for each sample, shape ``(n,)``.

    Raises:
        EvaluationError: If it has none for a sample.
    """
    known = {(row["user_id"], row["item_id"]): row["optimal"] for row in oracle.to_pylist()}
    try:
        return np.array([known[sample.user_id, sample.item_id] for sample in samples])
    except KeyError as error:
        raise EvaluationError(
            f"no optimal prediction for {error}", where="data/oracle.parquet", remedy="run persona_prepare again"
        ) from error
