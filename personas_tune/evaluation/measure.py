"""All that is measured on one set of test rows, gathered into ``metrics.json``."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from personas_tune.datasets.source import Sample
from personas_tune.errors import EvaluationError
from personas_tune.evaluation.baselines import Baseline
from personas_tune.evaluation.comparisons import Predictor, compare_predictors, comparison_pairs
from personas_tune.evaluation.distributions import nearest_labels, normal_masses
from personas_tune.evaluation.faithfulness import measure_faithfulness
from personas_tune.evaluation.intervals import Resampling
from personas_tune.evaluation.metrics import fill_unparsed, measure_agent, skill_score, train_means, without_nan
from personas_tune.evaluation.ordinal_scores import negative_log_likelihoods

Floats = NDArray[np.float64]
WITHOUT_AGENT = "hybrid_without_agent"
_READOUT_COLUMNS = {"expected": "expected", "argmax": "argmax", "generate": "parsed"}


class Measurement:
    """Measures predictors on the same test rows.

    Args:
        samples: The test rows.
        users: ``users.parquet``; its train means stand in for answers without a rating.
        labels: The scale's labels, ascending.
        resampling: How intervals are drawn.
    """

    def __init__(
        self, samples: Sequence[Sample], users: pa.Table, labels: Sequence[float], resampling: Resampling
    ) -> None:
        self._users = [sample.user_id for sample in samples]
        self._personas = [sample.persona for sample in samples]
        self._ratings = np.array([sample.rating for sample in samples])
        self._labels = np.asarray(labels, dtype=np.float64)
        self._user_means = train_means(self._users, users)
        self._resampling = resampling
        self._compared: dict[str, Predictor] = {}
        self._agents: list[dict[str, Any]] = []
        self._baselines: list[dict[str, Any]] = []
        self._hybrid_pairs: list[tuple[str, str]] = []
        self._floor: dict[str, Any] | None = None

    def add_agent(self, name: str, predicted: Floats, described: Mapping[str, Any], p: Floats | None = None) -> None:
        """Measure an agent.

        With the readout ``expected`` an agent simulates ratings by drawing them from ``p``; otherwise, and without
        ``p``, it answers the label nearest its prediction.

        Args:
            name: Its name.
            predicted: A rating a test row, NaN where its answer held none.
            described: Its base, adapters, memories, readout and published figures.
            p: The label probabilities of each test row (:func:`readout_probabilities`), or None.
        """
        draws = p is not None and described["readout"] == "expected"
        self._compare(name, predicted, p, draws)
        self._agents.append({"name": name, **described, **self._measure(predicted, p, draws)})

    def add_baseline(self, name: str, baseline: Baseline) -> None:
        """Measure a baseline; it simulates ratings by drawing them from a normal distribution put on the labels."""
        predicted, sd = baseline.predicted, baseline.sd
        p = None if sd is None else normal_masses(predicted, sd, self._labels)
        self._compare(name, predicted, p, draws=p is not None)
        described = {"name": name, "tuned": dict(baseline.tuned), "residual_sd": sd}
        self._baselines.append({**described, **self._measure(predicted, p, draws=p is not None)})

    def add_hybrid(self, agent: str, hybrid: Baseline, without: Baseline) -> None:
        """Measure a regression that uses an agent's distributions beside numbers, and the same one without them."""
        if WITHOUT_AGENT not in self._compared:
            self.add_baseline(WITHOUT_AGENT, without)
        self.add_baseline(f"hybrid_{agent}", hybrid)
        self._hybrid_pairs.append((f"hybrid_{agent}", WITHOUT_AGENT))

    def add_floor(self, optimal: Floats) -> None:
        """Measure the best possible predictor, where it is known."""
        self._floor = {"name": "bayes_optimal", **self._measure(optimal)}

    def metrics(self, **settings: Any) -> dict[str, Any]:
        """``metrics.json``, with ``settings`` among those that are written beside the figures."""
        pairs = comparison_pairs([agent["name"] for agent in self._agents], [row["name"] for row in self._baselines])
        pairs += self._hybrid_pairs
        return {
            "agents": [self._with_skill(agent) for agent in self._agents],
            "baselines": [self._with_skill(row) for row in self._baselines],
            "oracle": None if self._floor is None else self._with_skill(self._floor),
            "paired": compare_predictors(
                self._labels, self._users, self._ratings, self._compared, pairs, self._resampling
            ),
            "settings": {
                "n_users": len(set(self._users)),
                "n_rows": len(self._users),
                "n_resamples": self._resampling.n_resamples,
                "confidence": self._resampling.confidence,
                **settings,
            },
        }

    def _compare(self, name: str, predicted: Floats, p: Floats | None, draws: bool) -> None:
        nll = None if p is None else negative_log_likelihoods(p, nearest_labels(self._ratings, self._labels))
        filled = fill_unparsed(predicted, self._user_means)
        self._compared[name] = Predictor(filled, p if draws else None, nll)

    def _measure(self, predicted: Floats, p: Floats | None = None, draws: bool = False) -> dict[str, Any]:
        rows = (self._users, self._personas, self._ratings, predicted)
        errors = measure_agent(*rows, self._user_means, self._resampling)
        return errors | dict(without_nan(measure_faithfulness(self._labels, *rows, p, draws)))

    def _with_skill(self, measured: Mapping[str, Any]) -> dict[str, Any]:
        """The same with ``skill``: the share of each baseline's squared error that is saved, on all rows."""
        skill = {row["name"]: skill_score(measured["rmse_filled"], row["rmse_filled"]) for row in self._baselines}
        return {**measured, "skill": without_nan(skill)}


def readout_values(predictions: pa.Table, readout: str) -> Floats:
    """The predicted rating of each row under a readout, NaN where there is none, shape ``(n,)``."""
    column = predictions[_READOUT_COLUMNS[readout]].cast(pa.float64())
    return np.asarray(column.fill_null(float("nan")).to_numpy())


def readout_probabilities(predictions: pa.Table, readout: str) -> Floats | None:
    """The label probabilities that a readout's ratings come from, shape ``(n, n_labels)``.

    None for ``generate``, whose distribution isn't known, and where rows have none.
    """
    if readout == "generate" or predictions["p"].null_count:
        return None
    return np.array(predictions["p"].to_pylist(), dtype=np.float64)


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
