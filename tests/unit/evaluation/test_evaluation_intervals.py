import math

import numpy as np
import pytest

from personas_tune.evaluation.intervals import Resampling, interval_of_mae, interval_of_rmse, paired_difference

QUICK = Resampling(n_resamples=999)


def draw_users(rng: np.random.Generator, n_users: int) -> tuple[np.ndarray, np.ndarray]:
    """Per-user SSE and row counts of predictors that are off by a different amount for each user."""
    n = rng.integers(10, 60, n_users)
    offsets = rng.normal(0, 0.5, n_users)
    sse = np.array([np.sum((offsets[user] + rng.normal(0, 0.9, n[user])) ** 2) for user in range(n_users)])
    return sse, n.astype(float)


def loop_interval(values: list[float]) -> tuple[float, float]:
    return float(np.quantile(values, 0.025)), float(np.quantile(values, 0.975))


def test_interval_of_two_users_reaches_from_one_user_to_the_other():
    # Draws of two users: (0, 0), (0, 4), (4, 0), (4, 4), so the RMSE is 0, sqrt(2) or 2, the ends a quarter each.
    assert interval_of_rmse([0.0, 4.0], [1, 1]) == (0.0, 2.0)
    assert interval_of_mae([0.0, 3.0], [1, 1]) == (0.0, 3.0)


def test_interval_agrees_with_a_loop_over_resampled_users():
    rng = np.random.default_rng(5)
    sse, n = draw_users(rng, 80)
    other = sse * rng.uniform(0.8, 1.3, 80)
    rmses, differences = [], []
    for _ in range(6000):
        drawn = [rng.integers(80) for _ in range(80)]
        rows = sum(n[user] for user in drawn)
        rmses.append(math.sqrt(sum(sse[user] for user in drawn) / rows))
        differences.append(rmses[-1] - math.sqrt(sum(other[user] for user in drawn) / rows))
    assert interval_of_rmse(sse, n) == pytest.approx(loop_interval(rmses), abs=0.004)
    assert interval_of_mae(sse, n) == pytest.approx(loop_interval([value**2 for value in rmses]), abs=0.008)
    assert paired_difference(sse, other, n)[1:] == pytest.approx(loop_interval(differences), abs=0.002)


def test_about_95_percent_of_the_intervals_hold_the_true_rmse():
    rng = np.random.default_rng(11)
    truth = math.sqrt(0.5**2 + 0.9**2)
    hits = 0
    for trial in range(300):
        low, high = interval_of_rmse(*draw_users(rng, 80), Resampling(n_resamples=499, seed=trial))
        hits += low <= truth <= high
    assert 0.90 <= hits / 300 <= 0.98


def test_resampling_users_gives_wider_intervals_than_resampling_rows_would():
    rng = np.random.default_rng(2)
    errors = rng.normal(0, 0.5, 60)[:, None] + rng.normal(0, 0.9, (60, 50))
    by_users = interval_of_rmse((errors**2).sum(axis=1), np.full(60, 50), QUICK)
    by_rows = interval_of_rmse(errors.ravel() ** 2, np.ones(3000), QUICK)
    assert by_users[1] - by_users[0] > 1.3 * (by_rows[1] - by_rows[0])


def test_paired_difference_is_rmse_of_a_minus_rmse_of_b():
    difference, low, high = paired_difference([4.0, 4.0], [1.0, 1.0], [1, 1])
    assert (difference, low, high) == (1.0, 1.0, 1.0)


def test_paired_difference_of_a_predictor_with_itself_is_nought():
    sse, n = draw_users(np.random.default_rng(0), 20)
    assert paired_difference(sse, sse, n, QUICK) == (0.0, 0.0, 0.0)


def test_paired_difference_changes_sign_when_the_predictors_change_places():
    rng = np.random.default_rng(3)
    sse, n = draw_users(rng, 30)
    other = sse * rng.uniform(0.8, 1.2, 30)
    there, back = paired_difference(sse, other, n, QUICK), paired_difference(other, sse, n, QUICK)
    assert there == pytest.approx((-back[0], -back[2], -back[1]), abs=1e-12)


def test_pairing_users_narrows_the_interval_of_a_difference():
    rng = np.random.default_rng(4)
    sse, n = draw_users(rng, 100)
    other = sse * rng.uniform(0.95, 1.05, 100)
    _, low, high = paired_difference(sse, other, n, QUICK)
    single = interval_of_rmse(sse, n, QUICK)
    assert high - low < 0.3 * (single[1] - single[0])


def test_equal_seeds_give_equal_intervals_and_others_don_t():
    sse, n = draw_users(np.random.default_rng(6), 40)
    assert interval_of_rmse(sse, n, QUICK) == interval_of_rmse(sse, n, QUICK)
    assert interval_of_rmse(sse, n, QUICK) != interval_of_rmse(sse, n, QUICK._replace(seed=1))


def test_higher_confidence_gives_wider_intervals():
    sse, n = draw_users(np.random.default_rng(6), 40)
    narrow, wide = (interval_of_rmse(sse, n, Resampling(999, confidence)) for confidence in (0.8, 0.99))
    assert wide[0] < narrow[0] < narrow[1] < wide[1]


def test_users_without_rows_change_nothing():
    sse, n = draw_users(np.random.default_rng(7), 25)
    padded = np.insert(sse, [3, 20], 0.0), np.insert(n, [3, 20], 0.0)
    assert interval_of_rmse(*padded, QUICK) == interval_of_rmse(sse, n, QUICK)


@pytest.mark.parametrize(("sse", "n"), [([], []), ([2.0], [3]), ([2.0, 0.0], [3, 0]), ([0.0, 0.0], [0, 0])])
def test_fewer_than_two_users_with_rows_have_no_interval(sse, n):
    assert all(math.isnan(end) for end in interval_of_rmse(sse, n))
    assert all(math.isnan(end) for end in paired_difference(sse, sse, n)[1:])


def test_blocks_of_resamples_give_the_same_interval_as_one_block(monkeypatch):
    sse, n = draw_users(np.random.default_rng(8), 30)
    whole = interval_of_rmse(sse, n, QUICK)
    monkeypatch.setattr("personas_tune.evaluation.intervals._BLOCK", 700)
    assert interval_of_rmse(sse, n, QUICK) == whole
