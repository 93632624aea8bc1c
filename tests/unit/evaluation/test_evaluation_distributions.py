import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import jensenshannon

from personas_tune.evaluation.distributions import (
    compare_groups,
    compare_masses,
    compare_shares,
    jensen_shannon,
    mean_over_users,
    nearest_labels,
    normal_masses,
    point_masses,
    sum_by_group,
    variance,
)

STARS = np.arange(1.0, 6.0)
HALF_STARS = np.arange(0.5, 5.1, 0.5)
NOTHING = {"js": None, "wasserstein": None, "variance_ratio": None, "true": None, "simulated": None}


def shares_of(size: int) -> st.SearchStrategy[np.ndarray]:
    weights = st.lists(st.integers(0, 20), min_size=size, max_size=size).filter(any)
    return weights.map(lambda drawn: np.array(drawn) / sum(drawn))


def test_the_nearest_label_is_found_on_any_scale_and_a_tie_goes_down():
    assert STARS[nearest_labels(np.array([-3, 1.4, 1.5, 1.6, 4.6, 9]), STARS)].tolist() == [1, 1, 1, 2, 5, 5]
    assert HALF_STARS[nearest_labels(np.array([0.7, 0.75, 0.8, 3.3, 5.0]), HALF_STARS)].tolist() == [
        0.5, 0.5, 1.0, 3.5, 5.0,
    ]  # fmt: skip


def test_a_points_mass_lies_on_one_label():
    assert point_masses(np.array([2.6, 1.0]), np.array([1.0, 2, 3])).tolist() == [[0, 0, 1], [1, 0, 0]]


def test_masses_are_summed_by_group_and_groups_without_rows_have_none():
    masses = np.array([[0.5, 0.5], [1, 0], [0.25, 0.75]])
    assert sum_by_group(np.array([2, 0, 2]), masses, 3).tolist() == [[1, 0], [0, 0], [0.75, 1.25]]


def test_distances_equal_the_hand_computed_ones():
    # Middle: 1/4, 1/2, 1/4; both divergences from it are 1/2 ln 2. Half of the mass moves by 2, or all of it by 1.
    compared = compare_shares(np.array([1.0, 2, 3]), np.array([0.5, 0.5, 0]), np.array([0, 0.5, 0.5]))
    assert compared == {
        "js": pytest.approx(math.log(2) / 2),
        "wasserstein": pytest.approx(1.0),
        "variance_ratio": pytest.approx(1.0),
    }


def test_disjoint_shares_are_ln_2_apart_and_equal_ones_not_at_all():
    assert jensen_shannon(np.array([1.0, 0]), np.array([0.0, 1])) == pytest.approx(math.log(2))
    assert jensen_shannon(np.array([0.3, 0.7]), np.array([0.3, 0.7])) == 0


@settings(deadline=None)
@given(shares_of(6), shares_of(6))
def test_js_is_symmetric_bounded_and_scipys_squared(p, q):
    divergence = float(jensen_shannon(p, q))
    assert 0 <= divergence <= math.log(2) + 1e-12
    assert divergence == pytest.approx(float(jensen_shannon(q, p)))
    if abs(p - q).max() > 1e-9:
        assert divergence == pytest.approx(jensenshannon(p, q) ** 2)


def test_js_of_all_but_equal_shares_is_a_number():
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.ones(10), 2000)
    q = p * (1 + 1e-16 * rng.integers(-2, 3, p.shape))
    assert np.all((jensen_shannon(p, q) >= 0) & (jensen_shannon(p, q) < 1e-12))


def test_js_runs_along_the_axis_of_the_labels():
    p, q = np.random.default_rng(1).dirichlet(np.ones(5), (2, 3))
    assert jensen_shannon(p.T, q.T, axis=0) == pytest.approx(jensen_shannon(p, q))


@settings(deadline=None)
@given(shares_of(10), shares_of(10))
def test_wasserstein_is_the_area_between_the_cumulative_shares(p, q):
    area = np.abs(np.cumsum(p - q))[:-1].sum() * 0.5  # half stars lie half a rating apart
    assert compare_shares(HALF_STARS, p, q)["wasserstein"] == pytest.approx(area, abs=1e-12)


def test_variance_of_a_mixture_is_that_within_rows_plus_that_between_them():
    p = np.random.default_rng(2).dirichlet(np.ones(5), 40)
    between = (p @ STARS).var()
    assert variance(STARS, p.mean(axis=0)) == pytest.approx(variance(STARS, p).mean() + between)


def test_a_constant_answer_has_no_variance_and_constant_truth_no_ratio():
    true, constant = np.array([0.5, 0, 0.5]), np.array([0, 1.0, 0])
    assert compare_shares(np.array([1.0, 2, 3]), true, constant)["variance_ratio"] == 0
    assert math.isnan(compare_shares(np.array([1.0, 2, 3]), constant, true)["variance_ratio"])


def test_rows_are_averaged_to_shares_and_no_rows_leave_nothing():
    compared = compare_masses(np.array([1.0, 2]), np.array([[1.0, 0], [0, 1]]), np.array([[0.5, 0.5], [0.3, 0.7]]))
    assert (compared["true"], compared["simulated"]) == ([0.5, 0.5], pytest.approx([0.4, 0.6]))
    assert compared["wasserstein"] == pytest.approx(0.1)
    assert compare_masses(np.array([1.0, 2]), np.zeros((0, 2)), np.zeros((0, 2))) == NOTHING


def test_users_weigh_equally_whatever_their_rows_and_numbers():
    labels = np.array([1.0, 2])
    true = point_masses(np.array([1.0, 2, 2, 1]), labels)
    simulated = point_masses(np.array([1.0, 1, 1, 1]), labels)
    # User 9: 1, 2, 2 as 1, 1, 1: two thirds move by 1. User 4: 1 as 1, and no variance to compare with.
    means = mean_over_users(labels, np.array([9, 9, 9, 4]), true, simulated)
    assert means["wasserstein"] == pytest.approx((2 / 3 + 0) / 2)
    assert means["js"] == pytest.approx(float(jensen_shannon(np.array([1 / 3, 2 / 3]), np.array([1.0, 0]))) / 2)
    assert means["variance_ratio"] == 0


def test_users_whose_ratings_are_all_equal_leave_no_variance_ratio():
    one = point_masses(np.array([2.0, 2.0]), STARS)
    assert math.isnan(mean_over_users(STARS, np.array([0, 1]), one, one)["variance_ratio"])


def test_personas_are_compared_apart_and_one_without_rows_is_named():
    labels = np.array([1.0, 2])
    true, simulated = point_masses(np.array([1.0, 2, 1]), labels), point_masses(np.array([1.0, 2, 2]), labels)
    groups = compare_groups(
        labels, np.array([0, 0, 1]), np.array([3, 3, 0]), true, simulated, every_persona=np.array([0, 3, 3, 7])
    )
    assert list(groups["per_persona"]) == ["0", "3", "7"]
    assert groups["per_persona"]["0"]["wasserstein"] == 1
    assert groups["per_persona"]["3"]["js"] == 0
    assert groups["per_persona"]["7"] == NOTHING
    assert groups["overall"]["wasserstein"] == pytest.approx(1 / 3)


def test_normal_masses_are_those_of_many_draws_put_on_the_nearest_label():
    labels, means = np.arange(0.5, 5.1, 0.5), np.array([0.5, 3.3, 4.9])
    masses = normal_masses(means, 0.7, labels)
    for mean, mass in zip(means, masses, strict=True):
        draws = np.random.default_rng(0).normal(mean, 0.7, 100_000)
        shares = point_masses(draws, labels).mean(axis=0)
        assert np.abs(mass - shares).max() < 0.01
    assert masses.sum(axis=1) == pytest.approx(1)


def test_a_normal_distribution_without_width_is_a_point():
    labels, means = np.arange(1.0, 6.0), np.array([-3.0, 2.4, 4.6, 99.0])
    assert np.array_equal(normal_masses(means, 0.0, labels), point_masses(means, labels))
