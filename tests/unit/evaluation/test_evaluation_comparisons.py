import math

import numpy as np
import pytest
from scipy.spatial.distance import jensenshannon

from personas_tune.errors import ConfigError
from personas_tune.evaluation.comparisons import Predictor, compare_predictors, comparison_pairs
from personas_tune.evaluation.distributions import point_masses
from personas_tune.evaluation.intervals import Resampling
from personas_tune.evaluation.metrics import mae, rmse

QUICK = Resampling(n_resamples=99)
STARS = np.arange(1.0, 8.0)
USERS = np.array(["ann", "ann", "ann", "bob", "bob"])
RATINGS = np.array([3.0, 5.0, 2.0, 4.0, 1.0])


def compare(predictors, pairs, users=USERS, ratings=RATINGS, resampling=QUICK):
    rows = {name: each if isinstance(each, Predictor) else Predictor(each) for name, each in predictors.items()}
    return compare_predictors(STARS, users, ratings, rows, pairs, resampling)


def same(value: float) -> dict[str, float]:
    return {"difference": value, "low": value, "high": value}


def test_compared_predictors_differ_by_their_rmses_and_maes():
    predictors = {"agent": RATINGS + np.array([1.0, -1, 1, -1, 1]), "constant": RATINGS + 2, "perfect": RATINGS}
    pairs = [("agent", "constant"), ("agent", "perfect"), ("agent", "agent")]
    for row, pair, value in zip(compare(predictors, pairs), pairs, [-1.0, 1.0, 0.0], strict=True):
        assert (row["a"], row["b"], row["nll"]) == (*pair, None)
        assert {key: row[key] for key in ("difference", "low", "high")} == same(value)
        assert row["mae"] == same(value)
    assert compare(predictors, pairs)[2]["js"] == same(0.0)


def test_js_is_that_of_all_rows_together_and_nll_needs_both():
    # Every true rating is 1 or 2 as often in each draw of users as in all rows.
    ratings = np.array([1.0, 2, 1, 2])
    halves, sure = np.full((4, 7), [0.5, 0.5, 0, 0, 0, 0, 0]), point_masses(np.ones(4), STARS)
    a = Predictor(np.full(4, 1.5), halves, nll=np.full(4, 0.7))
    b = Predictor(np.ones(4), sure, nll=np.full(4, 0.9))
    users = np.array(["u", "u", "v", "v"])
    of_a, of_points = compare({"a": a, "b": b, "points": np.ones(4)}, [("a", "b"), ("a", "points")], users, ratings)
    apart = jensenshannon([0.5, 0.5], [1, 0]) ** 2
    assert of_a["js"] == {key: pytest.approx(-apart) for key in ("difference", "low", "high")}
    assert of_points["js"] == of_a["js"]  # without a mass, all is on the label nearest the prediction
    assert of_a["nll"] == {key: pytest.approx(-0.2) for key in ("difference", "low", "high")}
    assert of_points["nll"] is None


def by_hand(chosen: np.ndarray, ratings: np.ndarray, predictor: Predictor) -> dict[str, float]:
    """Every figure of some rows, which may stand there more than once."""
    true = np.bincount(ratings[chosen].astype(int) - 1, minlength=7)
    return {
        "difference": rmse(ratings[chosen], predictor.filled[chosen]),
        "mae": mae(ratings[chosen], predictor.filled[chosen]),
        "js": float(jensenshannon(true, predictor.simulated[chosen].sum(axis=0)) ** 2),
        "nll": float(predictor.nll[chosen].mean()),
    }


def test_intervals_are_those_of_a_loop_over_the_same_draws_of_users():
    rng = np.random.default_rng(1)
    users = rng.integers(0, 9, 120).astype(str)
    ratings = rng.integers(1, 8, 120).astype(float)
    a, b = (
        Predictor(ratings + rng.normal(0, 1 + each, 120), rng.dirichlet(np.ones(7), 120), rng.random(120))
        for each in range(2)
    )
    (row,) = compare({"a": a, "b": b}, [("a", "b")], users, ratings, Resampling(200, 0.9, seed=4))
    names = np.unique(users)
    differences = []
    for drawn in np.random.default_rng(4).integers(0, len(names), (200, len(names))):
        chosen = np.concatenate([np.flatnonzero(users == names[user]) for user in drawn])
        found = (by_hand(chosen, ratings, each) for each in (a, b))
        differences.append([first - second for first, second in zip(*(each.values() for each in found), strict=True)])
    ends = np.quantile(differences, [0.05, 0.95], axis=0)
    everything = np.arange(120)
    for place, key in enumerate(("difference", "mae", "js", "nll")):
        figures = row if key == "difference" else row[key]
        between = by_hand(everything, ratings, a)[key] - by_hand(everything, ratings, b)[key]
        assert [figures["difference"], figures["low"], figures["high"]] == pytest.approx([between, *ends[:, place]])


def test_comparing_on_one_user_has_no_interval_and_no_nan():
    (row,) = compare({"a": RATINGS[:3], "b": RATINGS[:3] + 1}, [("a", "b")], USERS[:3], RATINGS[:3])
    no_interval = {"difference": -1.0, "low": None, "high": None}
    assert row["mae"] == no_interval
    assert row == {"a": "a", "b": "b", **no_interval, "mae": no_interval, "js": row["js"], "nll": None}
    # Of 2, 3, 5 and 3, 4, 6 only a third is shared.
    assert row["js"] == {"difference": pytest.approx(-2 / 3 * math.log(2)), "low": None, "high": None}


def test_without_pairs_there_is_nothing_to_compare():
    assert compare({"a": RATINGS}, []) == []


def test_agents_are_compared_with_earlier_agents_and_with_the_baselines():
    pairs = comparison_pairs(["base", "single", "persona"], ["constant", "global_mean", "user_mean"])
    assert pairs == [
        ("base", "constant"),
        ("base", "user_mean"),
        ("single", "base"),
        ("single", "constant"),
        ("single", "user_mean"),
        ("persona", "base"),
        ("persona", "single"),
        ("persona", "constant"),
        ("persona", "user_mean"),
    ]


def test_an_agent_may_not_bear_a_baselines_name():
    with pytest.raises(ConfigError, match="'user_mean' is the name of a baseline; rename the agent"):
        comparison_pairs(["base", "user_mean"], ["constant", "user_mean"])
