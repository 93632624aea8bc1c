import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import somersd
from sklearn.metrics import cohen_kappa_score, confusion_matrix

from personas_tune.evaluation.faithfulness import (
    correlation,
    measure_agreement,
    measure_faithfulness,
    pairwise_order,
    rank_correlation,
)
from personas_tune.evaluation.metrics import without_nan

NAN = math.nan
STARS = [1.0, 2.0, 3.0, 4.0, 5.0]
USERS = np.array(["ann", "ann", "ann", "bob", "bob"])
PERSONAS = np.array([0, 0, 0, 7, 7])
RATINGS = np.array([1.0, 3.0, 5.0, 4.0, 2.0])
PREDICTED = np.array([2.2, 2.9, 5.0, 3.5, NAN])  # the nearest labels: 2, 3, 5, 3 (a tie), none


def measure(predicted=PREDICTED, p=None, draws=False, labels=STARS, users=USERS, personas=PERSONAS, ratings=RATINGS):
    return without_nan(measure_faithfulness(labels, users, personas, ratings, predicted, p, draws))


def test_agreement_equals_the_hand_computed_one():
    measured = measure()
    assert (measured["accuracy"], measured["within_1"]) == (0.5, 1.0)
    # Mean squared distance: (1 + 0 + 0 + 1) / 4; between all pairs of {1, 3, 5, 4} and {2, 3, 5, 3}: 54 / 16.
    assert measured["kappa"] == pytest.approx(1 - (2 / 4) / (54 / 16))
    expected = np.zeros((5, 5), dtype=int)
    for true, answered in [(1, 2), (3, 3), (5, 5), (4, 3)]:
        expected[true - 1, answered - 1] += 1
    assert measured["confusion"] == expected.tolist()


def test_agreement_is_that_of_sklearn():
    rng = np.random.default_rng(0)
    truth, answered = rng.integers(0, 10, 300), rng.integers(2, 8, 300)
    measured = measure_agreement(np.arange(0.5, 5.1, 0.5), truth, answered)
    assert measured["kappa"] == pytest.approx(cohen_kappa_score(truth, answered, labels=range(10), weights="quadratic"))
    assert measured["confusion"] == confusion_matrix(truth, answered, labels=range(10)).tolist()
    assert measured["accuracy"] == pytest.approx(np.trace(measured["confusion"]) / 300)


def test_within_1_counts_ratings_not_labels():
    half_stars = np.arange(0.5, 5.1, 0.5)
    two_labels_off = measure_agreement(half_stars, np.array([4, 4]), np.array([6, 7]))
    assert (two_labels_off["within_1"], two_labels_off["accuracy"]) == (0.5, 0.0)
    tenths = np.arange(0, 31) / 10
    assert measure_agreement(tenths, np.array([12]), np.array([22]))["within_1"] == 1  # 2.2 - 1.2 is above 1 in floats


def test_kappa_is_nought_for_a_constant_answer_and_none_where_all_are_the_same():
    assert measure_agreement(np.array(STARS), np.array([0, 2, 4]), np.array([3, 3, 3]))["kappa"] == 0
    assert math.isnan(measure_agreement(np.array(STARS), np.array([3, 3]), np.array([3, 3]))["kappa"])
    assert measure_agreement(np.array(STARS), np.array([2, 2]), np.array([3, 3]))["kappa"] == 0


def test_correlations_equal_the_hand_computed_ones():
    # Deviations -1, 0, 1 and -2, 1, 1: 3 / sqrt(2 * 6); ranks 1, 2, 3 and 1, 2.5, 2.5: 1.5 / sqrt(2 * 1.5).
    ratings, predicted = np.array([1.0, 2, 3]), np.array([0.0, 3, 3])
    assert correlation(ratings, predicted) == pytest.approx(3 / math.sqrt(12))
    assert rank_correlation(ratings, predicted) == pytest.approx(1.5 / math.sqrt(3))


@pytest.mark.parametrize("one", [correlation, rank_correlation])
@pytest.mark.parametrize("n", [0, 1, 5])
def test_no_correlation_without_variation(one, n):
    varied = np.arange(float(n))
    assert math.isnan(one(varied, np.full(n, 3.3)))
    assert math.isnan(one(np.full(n, 3.3), varied))
    assert math.isnan(one(varied, 3.3 + varied * 1e-16))
    assert one(np.array([1.0, 2]), np.array([5.0, 3])) == pytest.approx(-1)


def order_by_pairs(owners, ratings, predicted) -> float:
    right, pairs = 0.0, 0
    for i in range(len(owners)):
        for j in range(len(owners)):
            if owners[i] == owners[j] and ratings[i] < ratings[j]:
                pairs += 1
                right += 0.5 if predicted[i] == predicted[j] else float(predicted[i] < predicted[j])
    return right / pairs if pairs else NAN


@settings(deadline=None)
@given(st.integers(1, 14), st.data())
def test_order_is_that_of_a_loop_over_all_pairs(n, data):
    owners, ratings, predicted = (
        np.array(data.draw(st.lists(values, min_size=n, max_size=n)))
        for values in (st.integers(0, 2), st.sampled_from(STARS), st.sampled_from([0.5, 2.0, 2.5, 4.0, 4.25]))
    )
    assert pairwise_order(owners, ratings, predicted) == pytest.approx(
        order_by_pairs(owners, ratings, predicted), nan_ok=True
    )


def test_order_of_one_user_is_somers_d_on_the_scale_from_0_to_1():
    rng = np.random.default_rng(5)
    ratings, predicted = rng.integers(1, 6, 80).astype(float), rng.integers(0, 30, 80) / 7
    d = somersd(ratings, predicted).statistic
    assert pairwise_order(np.zeros(80, dtype=int), ratings, predicted) == pytest.approx((d + 1) / 2)


def test_order_within_users_ignores_who_is_stricter():
    owners, ratings = np.array([0, 0, 1, 1]), np.array([1.0, 2, 4, 5])
    assert pairwise_order(owners, ratings, np.array([4.0, 5, 1, 2])) == 1
    assert pairwise_order(owners, ratings, np.array([1.0, 1, 5, 5])) == 0.5
    assert pairwise_order(owners, ratings, np.array([3.0, 3 + 1e-15, 3, 3])) == 0.5


@pytest.mark.parametrize("ratings", [[], [3.0], [3.0, 3.0]])
def test_without_a_pair_there_is_no_order(ratings):
    n = len(ratings)
    assert math.isnan(pairwise_order(np.zeros(n, dtype=int), np.array(ratings), np.arange(float(n))))


def test_unparsed_rows_are_left_out():
    without = slice(0, 4)
    measured = measure()
    parsed = measure(PREDICTED[without], users=USERS[without], personas=PERSONAS[without], ratings=RATINGS[without])
    assert measured == parsed
    assert measured["distribution"]["overall"]["true"] == [0.25, 0, 0.25, 0.25, 0.25]
    assert measured["distribution"]["overall"]["simulated"] == [0, 0.25, 0.5, 0, 0.25]


P = np.array(
    [
        [0.5, 0.5, 0.0, 0.0, 0.0],
        [0.0, 0.0, 1.0, 0.0, 0.0],
        [0.0, 0.0, 0.0, 0.2, 0.8],
        [0.1, 0.1, 0.1, 0.6, 0.1],
        [0.0, 0.5, 0.5, 0.0, 0.0],
    ]
)


def test_an_agent_that_draws_simulates_its_mean_distribution():
    expected = P @ np.array(STARS)
    drawn, answered = measure(expected, P, draws=True), measure(expected, P)
    shares = drawn["distribution"]["overall"]
    assert shares["simulated"] == pytest.approx(P.mean(axis=0).tolist())
    draws = np.repeat(STARS, np.round(100 * P.sum(axis=0)).astype(int))
    assert shares["variance_ratio"] == pytest.approx(draws.var() / RATINGS.var())
    assert answered["distribution"]["overall"] == answered["distribution"]["points"] == drawn["distribution"]["points"]
    # Answered: 1.5, 3, 4.8, 3.5 and 2.5, ties down.
    assert answered["distribution"]["overall"]["simulated"] == pytest.approx([0.2, 0.2, 0.4, 0, 0.2])


def test_probabilities_are_scored_however_the_rating_is_read():
    for draws in (False, True):
        measured = measure(P @ np.array(STARS), P, draws)
        assert measured["nll"] == pytest.approx(-sum(math.log(x) for x in (0.5, 1, 0.8, 0.6, 0.5)) / 5)
        assert measured["rps"] == pytest.approx((0.25 + 0 + 0.04 + (0.01 + 0.04 + 0.09 + 0.01) + 0.25) / 4 / 5)
        # Confidences .5, .5 (right: the first of two equal labels), 1, .8, .6; all are right.
        assert measured["ece"] == pytest.approx((0.5 + 0.5 + 0 + 0.2 + 0.4) / 5)
    assert [measure()[key] for key in ("nll", "rps", "ece")] == [None, None, None]


def test_a_constant_prediction_has_order_one_half_and_no_correlation():
    measured = measure(np.full(5, 3.4))
    assert (measured["pearson"], measured["spearman"], measured["pairwise_order"]) == (None, None, 0.5)
    assert (measured["kappa"], measured["distribution"]["overall"]["variance_ratio"]) == (0, 0)
    assert measured["calibration_curve"] == [{"n": 5, "predicted": pytest.approx(3.4), "true": 3.0}]


def test_a_persona_without_parsed_rows_has_no_figures():
    measured = measure(np.array([1.0, 2, 3, NAN, NAN]))
    assert set(measured["distribution"]["per_persona"]["7"].values()) == {None}
    assert measured["distribution"]["per_persona"]["0"]["true"] == pytest.approx([1 / 3, 0, 1 / 3, 0, 1 / 3])


def test_a_predictor_that_never_answers_has_no_figures():
    measured = measure(np.full(5, NAN), P, draws=True)
    assert (measured["calibration_curve"], measured["confusion"]) == ([], np.zeros((5, 5), dtype=int).tolist())
    figures = ("accuracy", "within_1", "kappa", "pearson", "spearman", "pairwise_order", "nll", "rps", "ece")
    assert {measured[key] for key in figures} == {None}
    assert set(measured["distribution"]["overall"].values()) == {None}
    assert set(measured["distribution"]["per_user"].values()) == {None}


def test_half_stars_are_labels_like_others():
    labels = np.arange(0.5, 5.1, 0.5)
    ratings = np.array([0.5, 4.5])
    measured = measure(np.array([0.74, 4.3]), labels=labels, users=["a", "a"], personas=[0, 0], ratings=ratings)
    assert (measured["accuracy"], measured["pairwise_order"], measured["kappa"]) == (1.0, 1.0, 1.0)
    assert measured["distribution"]["overall"]["js"] == 0
    assert len(measured["confusion"]) == 10


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_values_are_finite_json_and_don_t_depend_on_the_order_of_rows(data):
    n = data.draw(st.integers(1, 12))
    users, ratings, predicted = (
        np.array(data.draw(st.lists(st.sampled_from(values), min_size=n, max_size=n)))
        for values in ("abc", STARS, [NAN, math.inf, 1.0, 2.5, 5.0])
    )
    p = np.random.default_rng(data.draw(st.integers(0, 99))).dirichlet(np.ones(5), n)
    draws, order = data.draw(st.booleans()), np.array(data.draw(st.permutations(range(n))))
    personas = (users == "a").astype(int)
    measured = measure(predicted, p, draws, users=users, personas=personas, ratings=ratings)
    shuffled = measure(
        predicted[order], p[order], draws, users=users[order], personas=personas[order], ratings=ratings[order]
    )
    json.dumps(measured, allow_nan=False)
    assert flatten(shuffled) == pytest.approx(flatten(measured), abs=1e-12)


def flatten(value) -> list:
    if isinstance(value, dict):
        return [entry for key in sorted(value) for entry in flatten(value[key])]
    return [entry for part in value for entry in flatten(part)] if isinstance(value, list) else [value]
