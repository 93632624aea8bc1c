"""Calibration sees an agent's distribution only, and mends what is wrong with it everywhere alike."""

import json

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from personas_tune.errors import EvaluationError
from personas_tune.evaluation.calibration import Calibration, fit_calibration

LABELS = [1.0, 2.0, 3.0, 4.0, 5.0]


def calibrate(p_train, ratings, users, p, labels):
    return fit_calibration(p_train, ratings, users, labels).apply(p)


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


def few(*rows):
    """Distributions, ratings and users of a few rows, from pairs of a user and a rating."""
    return (
        np.random.default_rng(7).dirichlet(np.ones(5), len(rows)),
        np.array([r for _, r in rows]),
        [u for u, _ in rows],
    )


def test_a_fold_that_leaves_one_label_doesn_t_choose_the_penalty():
    p, ratings, users = few(("a", 3.0), ("a", 4.0), ("b", 3.0), ("b", 3.0))  # without a there is no 4
    told = calibrate(p, ratings, users, p, LABELS)
    assert np.isfinite(told).all()
    np.testing.assert_allclose(told.sum(1), 1)
    assert set(np.flatnonzero(told.sum(0))) == {2, 3}


def test_ratings_that_rounding_moved_are_the_label_that_they_are_near():
    p, ratings, users = drawn(8, 200)
    moved = np.nextafter(ratings, 9)
    np.testing.assert_array_equal(calibrate(p, moved, users, p, LABELS), calibrate(p, ratings, users, p, LABELS))


@pytest.mark.parametrize("seen", [LABELS, [1.0, 3.0, 5.0], [2.0, 4.0]], ids=str)
def test_what_is_kept_says_to_the_last_bit_what_scikit_learn_says(seen):
    p, ratings, users = drawn(4, 400)
    kept = np.isin(ratings, seen)
    users = [user for user, each in zip(users, kept, strict=True) if each]
    fitted = fit_calibration(p[kept], ratings[kept], users, LABELS)
    again = Calibration.of(json.loads(json.dumps(fitted.record)), LABELS)
    np.testing.assert_array_equal(again.apply(p), fitted.apply(p))
    scaled = StandardScaler().fit(np.log(np.maximum(p[kept], 1e-6)))
    told = []
    for penalty in (0.001, 0.01, 0.1, 1.0, 10.0):  # one of which was chosen
        peer = LogisticRegression(C=penalty, max_iter=1000)
        peer.fit(scaled.transform(np.log(np.maximum(p[kept], 1e-6))), np.searchsorted(LABELS, ratings[kept]))
        told.append(peer.predict_proba(scaled.transform(np.log(np.maximum(p, 1e-6)))))
    mine = fitted.apply(p)[:, fitted.seen]
    assert min(np.abs(mine - each).max() for each in told) <= 1e-12
    assert fitted.apply(p[:0]).shape == (0, 5)


@pytest.mark.parametrize(
    "change",
    [
        {"labels": [1, 2]},
        {"mean": None},
        {"seen": [0]},
        {"seen": [0, 1, 2, 3, 9]},
        {"intercepts": [0.0]},
        {"scale": "x"},
    ],
    ids=str,
)
def test_what_is_no_calibration_of_these_labels_is_refused(change):
    p, ratings, users = drawn(5, 400)
    record = fit_calibration(p, ratings, users, LABELS).record
    with pytest.raises(ValueError, match=r"no calibration|other labels"):
        Calibration.of({**record, **change}, LABELS)
    del record["mean"]
    with pytest.raises(ValueError, match="no calibration"):
        Calibration.of(record, LABELS)
