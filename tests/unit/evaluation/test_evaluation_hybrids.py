"""A hybrid uses what an agent's distribution adds to plain numbers."""

import numpy as np
import pytest
from test_evaluation_calibration import LABELS, drawn

from personas_tune.errors import EvaluationError
from personas_tune.evaluation.hybrids import fit_hybrid, with_distribution


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
    assert hybrid.sd == pytest.approx(np.sqrt(best), rel=0.1)
    assert without.sd == pytest.approx(truth.std(), rel=0.05)


@pytest.mark.parametrize(
    ("ratings", "users", "said"),
    [([], [], "two users"), ([3.0, 3.0], ["a", "b"], "one rating"), ([3.0, 4.0], ["a", "a"], "two users")],
)
def test_too_little_to_fit_a_hybrid_on_is_told(ratings, users, said):
    n = len(ratings)
    p, numbers = np.full((n, 5), 0.2), np.zeros((n, 3))
    with pytest.raises(EvaluationError, match=rf"{said}.* raise evaluation.calibration_share"):
        fit_hybrid(numbers, p, np.array(ratings), users, np.zeros((1, 3)), np.full((1, 5), 0.2), LABELS)
