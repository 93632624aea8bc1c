"""Calibration sees an agent's distribution only, and mends what is wrong with it everywhere alike."""

import numpy as np
import pytest

from personas_tune.errors import EvaluationError
from personas_tune.evaluation.calibration import calibrate, fit_hybrid, with_distribution

LABELS = [1.0, 2.0, 3.0, 4.0, 5.0]


def drawn(seed, n):
    """True distributions over five labels, and a rating drawn from each."""
    rng = np.random.default_rng(seed)
    p = rng.dirichlet(np.full(5, 0.7), n) * 0.98 + 0.004
    ratings = np.array([rng.choice(LABELS, p=each) for each in p])
    return p, ratings, [f"u{index % 20}" for index in range(n)]


def nll(p, ratings):
    return -np.log(p[np.arange(len(p)), np.searchsorted(LABELS, ratings)]).mean()


def too_sure_and_too_high(p):
    tilted = p**2.5 * np.array([0.3, 0.6, 1, 1.5, 3])
    return tilted / tilted.sum(1, keepdims=True)


def test_calibration_undoes_a_distortion():
    p, ratings, users = drawn(0, 3000)
    truth, unseen, _ = drawn(1, 3000)
    told = calibrate(too_sure_and_too_high(p), ratings, users, too_sure_and_too_high(truth), LABELS)
    assert nll(told, unseen) - nll(truth, unseen) < 0.1 * (
        nll(too_sure_and_too_high(truth), unseen) - nll(truth, unseen)
    )
    np.testing.assert_allclose(told.sum(1), 1)


def test_calibration_hardly_touches_what_is_calibrated():
    p, ratings, users = drawn(2, 3000)
    told = calibrate(p, ratings, users, p, LABELS)
    assert np.abs(told - p).mean() < 0.02


def test_a_label_that_no_train_row_has_gets_nothing():
    p, ratings, users = drawn(3, 500)
    kept = ratings != 2
    users = [user for user, each in zip(users, kept, strict=True) if each]
    told = calibrate(p[kept], ratings[kept], users, p, LABELS)
    assert (told[:, 1] == 0).all()
    np.testing.assert_allclose(told.sum(1), 1)


@pytest.mark.parametrize(
    ("ratings", "users", "said"),
    [([3.0, 3.0], ["a", "b"], "one rating"), ([3.0, 4.0], ["a", "a"], "two users")],
)
def test_too_little_to_calibrate_on_is_told(ratings, users, said):
    p = np.full((2, 5), 0.2)
    with pytest.raises(EvaluationError, match=rf"{said}.* raise evaluation.calibration_share"):
        calibrate(p, np.array(ratings), users, p, LABELS)


def test_a_hybrids_features_hold_numbers_expected_rating_and_log_probabilities():
    features = with_distribution(np.array([[7.0]]), np.array([[0.5, 0.5, 0, 0, 0]]), LABELS)
    np.testing.assert_allclose(features, [[7.0, 1.5, *np.log([0.5, 0.5, 1e-6, 1e-6, 1e-6])]])


def test_a_hybrid_uses_what_the_distribution_adds_to_the_numbers():
    p, ratings, users = drawn(4, 1500)
    unseen, truth, _ = drawn(5, 1500)
    noise = np.random.default_rng(6).normal(size=(1500, 3))
    hybrid = fit_hybrid(noise, p, ratings, users, noise, unseen, LABELS)
    without = fit_hybrid(noise, None, ratings, users, noise, None, LABELS)
    best = np.mean((unseen @ LABELS - truth) ** 2)
    assert np.mean((hybrid.predicted - truth) ** 2) < 1.05 * best
    assert np.mean((without.predicted - truth) ** 2) == pytest.approx(truth.var(), rel=0.05)
    assert hybrid.predicted.min() >= 1
    assert hybrid.predicted.max() <= 5
