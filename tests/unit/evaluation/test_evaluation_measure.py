import json
import math

import numpy as np
import pyarrow as pa
import pytest
from scipy.stats import norm

from personas_tune.datasets.source import Sample
from personas_tune.evaluation.baselines import Baseline
from personas_tune.evaluation.intervals import Resampling
from personas_tune.evaluation.measure import Measurement, readout_probabilities, readout_values
from personas_tune.evaluation.predict import prediction_table

LABELS = ["1", "2", "3", "4", "5"]
STARS = [float(label) for label in LABELS]
RATED = {("ann", 0): [3.0, 5.0, 2.0], ("bob", 7): [4.0, 1.0]}
SAMPLES = [
    Sample(user, f"film {place}", place, rating, persona, ())
    for (user, persona), ratings in RATED.items()
    for place, rating in enumerate(ratings)
]
RATINGS = np.array([sample.rating for sample in SAMPLES])
USERS = pa.table({"user_id": ["ann", "bob"], "n_train": [4, 4], "mean_rating": [3.5, 2.0]})
P = np.random.default_rng(0).dirichlet(np.ones(5), len(SAMPLES))
TEXTS = ["3", "4", "no idea", "5", "2"]
FIGURES = {
    "accuracy", "within_1", "kappa", "confusion", "pearson", "spearman", "pairwise_order", "calibration_curve", "nll",
    "rps", "ece", "distribution", "skill",
}  # fmt: skip


def described(readout, **more):
    return {"base": "default", "adapters": None, "memories": "both", "readout": readout, "published": None, **more}


def measure_all():
    measurement = Measurement(SAMPLES, USERS, STARS, Resampling(99))
    for name, predicted in (("constant", np.full(5, 3.0)), ("global_mean", RATINGS), ("user_mean", RATINGS + 1)):
        measurement.add_baseline(name, Baseline(predicted))
    for readout in ("expected", "argmax", "generate"):
        table = prediction_table(SAMPLES, P, LABELS, TEXTS if readout == "generate" else None)
        values, p = readout_values(table, readout), readout_probabilities(table, readout)
        measurement.add_agent(readout, values, described(readout), p)
    published = {"rmse": 1.171, "mae": 0.881, "urr": 0.0177}
    measurement.add_agent("calibrated", P @ np.array(STARS), described("expected", published=published))
    measurement.add_floor(RATINGS + 0.5)
    return measurement.metrics(seed=1)


@pytest.fixture(scope="module")
def metrics():
    return measure_all()


@pytest.fixture(scope="module")
def agents(metrics):
    return {agent["name"]: agent for agent in metrics["agents"]}


def test_every_predictor_has_every_figure_and_all_of_it_is_json(metrics):
    json.dumps(metrics, allow_nan=False)
    for row in [*metrics["agents"], *metrics["baselines"], metrics["oracle"]]:
        assert row.keys() >= FIGURES
        assert row["distribution"].keys() == {"labels", "overall", "points", "per_persona", "per_user"}
        assert row["distribution"]["labels"] == STARS
        assert row["distribution"]["per_persona"].keys() == {"0", "7"}
        assert np.array(row["confusion"]).sum() == row["n_parsed"]


def test_expected_draws_from_p_and_the_others_answer_a_label(agents):
    drawn = agents["expected"]["distribution"]
    assert drawn["overall"]["simulated"] == pytest.approx(P.mean(axis=0).tolist())
    assert drawn["overall"] != drawn["points"]
    for name in ("argmax", "generate", "calibrated"):
        assert agents[name]["distribution"]["overall"] == agents[name]["distribution"]["points"]
    assert agents["calibrated"]["distribution"]["points"] == drawn["points"]
    shares = np.bincount(P.argmax(axis=1), minlength=5) / 5
    assert agents["argmax"]["distribution"]["overall"]["simulated"] == pytest.approx(shares.tolist())


def test_only_agents_whose_probabilities_are_known_have_scores_of_them(metrics, agents):
    assert agents["expected"]["nll"] == agents["argmax"]["nll"]
    assert agents["expected"]["nll"] == pytest.approx(-np.log(P[np.arange(5), RATINGS.astype(int) - 1]).mean())
    for row in (agents["generate"], agents["calibrated"], *metrics["baselines"], metrics["oracle"]):
        assert [row[key] for key in ("nll", "rps", "ece")] == [None, None, None]


def test_text_without_a_rating_is_left_out_of_faithfulness_and_filled_in_skill(agents):
    generated = agents["generate"]
    assert (generated["n_parsed"], sum(each["n"] for each in generated["calibration_curve"])) == (4, 4)
    assert generated["accuracy"] == pytest.approx(1 / 4)  # 3 as 3, 5 as 4, 4 as 5, 1 as 2
    assert generated["within_1"] == 1
    mse = (0 + 1 + 1.5**2 + 1 + 1) / 5
    assert generated["skill"]["constant"] == pytest.approx(1 - mse / np.mean((RATINGS - 3) ** 2))


def test_skill_against_a_perfect_baseline_does_not_exist(metrics, agents):
    assert agents["expected"]["skill"]["global_mean"] is None
    assert [row["skill"]["user_mean"] for row in metrics["baselines"]][-1] == 0
    assert metrics["oracle"]["skill"]["user_mean"] == pytest.approx(0.75)


def test_pairs_have_nll_only_between_agents_with_probabilities(metrics):
    nll = {(pair["a"], pair["b"]): pair["nll"] for pair in metrics["paired"]}
    assert nll["argmax", "expected"] == {"difference": 0, "low": 0, "high": 0}
    assert {pair for pair, found in nll.items() if found is not None} == {("argmax", "expected")}


def test_baselines_and_agents_draw_and_are_compared_on_equal_terms():
    measurement = Measurement(SAMPLES, USERS, STARS, Resampling(99))
    predicted, sd = np.array([3.2, 4.1, 2.0, 3.5, 1.0]), 0.8
    measurement.add_baseline("user_mean", Baseline(predicted, sd=sd))
    measurement.add_agent("agent", P @ np.array(STARS), described("expected"), P)
    measured = measurement.metrics()
    (agent,), (baseline,) = measured["agents"], measured["baselines"]
    edges = norm.cdf([-math.inf, 1.5, 2.5, 3.5, 4.5, math.inf], predicted[:, None], sd)
    p = np.diff(edges, axis=1)
    assert baseline["residual_sd"] == sd
    assert baseline["distribution"]["overall"]["simulated"] == pytest.approx(p.mean(axis=0).tolist())
    assert baseline["distribution"]["points"]["simulated"] == pytest.approx([0.2, 0.2, 0.4, 0.2, 0])
    assert baseline["nll"] == pytest.approx(-np.log(p[np.arange(5), RATINGS.astype(int) - 1]).mean())
    assert None not in (baseline["rps"], baseline["ece"])
    assert baseline["rmse"] == pytest.approx(np.sqrt(np.mean((predicted - RATINGS) ** 2)))
    (pair,) = measured["paired"]
    assert pair["nll"]["difference"] == pytest.approx(agent["nll"] - baseline["nll"])
    js = (row["distribution"]["overall"]["js"] for row in (agent, baseline))
    assert pair["js"]["difference"] == pytest.approx(next(js) - next(js))


def test_pairs_compare_what_is_simulated(metrics, agents):
    js = {(pair["a"], pair["b"]): pair["js"]["difference"] for pair in metrics["paired"]}
    expected, argmax = (agents[name]["distribution"]["overall"]["js"] for name in ("expected", "argmax"))
    assert js["argmax", "expected"] == pytest.approx(argmax - expected)


def test_published_figures_stand_with_the_agent(agents):
    assert agents["calibrated"]["published"] == {"rmse": 1.171, "mae": 0.881, "urr": 0.0177}
    assert agents["expected"]["published"] is None


def test_probabilities_are_read_from_the_table_unless_some_are_missing():
    table = prediction_table(SAMPLES, P, LABELS, TEXTS)
    assert np.array_equal(readout_probabilities(table, "expected"), P)
    assert readout_probabilities(table, "generate") is None
    column = pa.array([None, *P[1:].tolist()], pa.list_(pa.float64()))
    assert readout_probabilities(table.set_column(table.column_names.index("p"), "p", column), "expected") is None
    assert math.isnan(readout_values(table, "generate")[2])
