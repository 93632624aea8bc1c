import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.calibration import calibration_curve as curve_of_sklearn
from sklearn.metrics import brier_score_loss, log_loss

from personas_tune.evaluation.ordinal_scores import (
    calibration_curve,
    expected_calibration_error,
    negative_log_likelihoods,
    ranked_probability_scores,
)


def draw(n: int, n_labels: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.dirichlet(np.ones(n_labels), n), rng.integers(0, n_labels, n)


def test_nll_is_minus_the_log_of_the_true_labels_probability_and_sklearns_log_loss():
    assert negative_log_likelihoods(np.array([[0.25, 0.75], [0.5, 0.5]]), np.array([0, 1])).tolist() == pytest.approx(
        [math.log(4), math.log(2)]
    )
    p, truth = draw(200, 10)
    assert negative_log_likelihoods(p, truth).mean() == pytest.approx(log_loss(truth, p, labels=range(10)))


def test_a_label_held_impossible_costs_as_much_as_in_sklearn():
    p, truth = np.array([[1.0, 0.0], [0.0, 1.0]]), np.array([1, 1])
    assert negative_log_likelihoods(p, truth)[0] == pytest.approx(-math.log(np.finfo(float).eps))
    assert negative_log_likelihoods(p, truth).mean() == pytest.approx(log_loss(truth, p, labels=[0, 1]))


@pytest.mark.parametrize(("truth", "score"), [(0, (0.8**2 + 0.3**2) / 2), (1, 0.065), (2, (0.2**2 + 0.7**2) / 2)])
def test_rps_equals_the_hand_computed_one(truth, score):
    assert ranked_probability_scores(np.array([[0.2, 0.5, 0.3]]), np.array([truth])) == pytest.approx([score])


def test_rps_of_two_labels_is_the_brier_score():
    p, truth = draw(100, 2)
    assert ranked_probability_scores(p, truth).mean() == pytest.approx(brier_score_loss(truth, p[:, 1]))


@settings(deadline=None)
@given(st.integers(2, 9), st.integers(0, 1000))
def test_rps_is_the_mean_distance_less_half_the_spread(n_labels, seed):
    # The CRPS of Gneiting and Raftery (2007, equation 21): E|X - y| - E|X - X'| / 2, here on labels one apart.
    (p,), (truth,) = draw(1, n_labels, seed)
    places = np.arange(n_labels)
    distance = (p * abs(places - truth)).sum()
    spread = (np.outer(p, p) * abs(np.subtract.outer(places, places))).sum()
    score = (distance - spread / 2) / (n_labels - 1)
    assert ranked_probability_scores(p[np.newaxis], np.array([truth])) == pytest.approx([score])


@given(st.integers(2, 12), st.data())
def test_rps_of_certainty_is_its_distance_from_the_truth(n_labels, data):
    sure, truth = (data.draw(st.integers(0, n_labels - 1)) for _ in range(2))
    score = ranked_probability_scores(np.eye(n_labels)[[sure]], np.array([truth]))
    assert score == pytest.approx([abs(sure - truth) / (n_labels - 1)])


def test_ece_is_the_gap_between_confidence_and_accuracy_by_bin():
    p = np.array([[0.8, 0.2], [0.8, 0.2], [0.4, 0.6], [0.45, 0.55]])
    truth = np.array([0, 1, 1, 0])
    # (.5, .6]: confidence .575, accuracy .5; (.7, .8]: confidence .8, accuracy .5; two rows each.
    assert expected_calibration_error(p, truth) == pytest.approx((0.075 + 0.3) / 2)


def test_a_bin_is_closed_above():
    p = np.array([[0.5, 0.3, 0.2], [0.55, 0.25, 0.2]])  # (.4, .5] and (.5, .6]
    assert expected_calibration_error(p, np.array([1, 0])) == pytest.approx((0.5 + 0.45) / 2)


def test_ece_weighs_sklearns_bins_by_their_rows():
    p, truth = draw(500, 4)
    confidence, right = p.max(axis=1), p.argmax(axis=1) == truth
    accuracies, confidences = curve_of_sklearn(right, confidence, n_bins=10)
    counts = np.unique(np.ceil(confidence * 10), return_counts=True)[1]
    assert expected_calibration_error(p, truth) == pytest.approx((counts * abs(accuracies - confidences)).sum() / 500)


def test_ece_is_nought_for_right_certainty_and_one_for_wrong():
    assert expected_calibration_error(np.eye(3), np.arange(3)) == 0
    assert expected_calibration_error(np.eye(3), np.array([1, 2, 0])) == 1
    assert math.isnan(expected_calibration_error(np.zeros((0, 3)), np.zeros(0, dtype=int)))


def test_calibration_bins_hold_equally_many_rows():
    predicted = np.random.default_rng(3).permutation(20) / 4
    curve = calibration_curve(predicted + 1, predicted)
    assert [each["n"] for each in curve] == [2] * 10
    assert [each["predicted"] for each in curve] == pytest.approx([0.125 + 0.5 * number for number in range(10)])
    assert all(each["true"] == pytest.approx(each["predicted"] + 1) for each in curve)


def test_equal_predictions_share_a_bin():
    predicted = np.array([3.0] * 30 + [4.0] * 10)
    curve = calibration_curve(np.arange(40.0), predicted)
    assert curve == [
        {"n": 30, "predicted": 3.0, "true": pytest.approx(14.5)},
        {"n": 10, "predicted": 4.0, "true": pytest.approx(34.5)},
    ]
    assert calibration_curve(np.array([1.0, 5]), np.array([3.0, 3])) == [{"n": 2, "predicted": 3.0, "true": 3.0}]
    assert calibration_curve(np.zeros(0), np.zeros(0)) == []


@settings(deadline=None)
@given(st.lists(st.floats(0, 5), min_size=1, max_size=60))
def test_every_row_is_in_one_bin_and_bins_ascend(predicted):
    curve = calibration_curve(np.zeros(len(predicted)), np.array(predicted))
    assert sum(each["n"] for each in curve) == len(predicted)
    assert len(curve) <= 10
    assert [each["predicted"] for each in curve] == sorted(each["predicted"] for each in curve)
