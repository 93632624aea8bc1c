import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score
from threadpoolctl import threadpool_limits

from personas_tune.errors import ClusteringError
from personas_tune.personas.clustering import assign_users, choose_personas, cluster_users, find_elbow
from personas_tune.personas.plot import draw_choice

CORNERS = np.eye(4, dtype=np.float32)


def around_corners(counts, spread=0.05, seed=0):
    """Unit vectors near the corners, and which corner each one is near."""
    truth = np.repeat(np.arange(len(counts)), counts)
    points = CORNERS[truth] + np.random.default_rng(seed).normal(0, spread, (len(truth), 4))
    return (points / np.linalg.norm(points, axis=1, keepdims=True)).astype(np.float32), truth


def test_users_near_one_corner_share_a_persona():
    points, truth = around_corners([12, 7, 9])
    clusters = cluster_users(points, k=3, seed=0)
    assert adjusted_rand_score(truth, clusters.personas) == 1
    assert clusters.personas.dtype == np.int32


def test_persona_numbers_fall_with_size():
    points, truth = around_corners([5, 20, 11])
    clusters = cluster_users(points, k=3, seed=0)
    assert clusters.sizes == [20, 11, 5]
    assert [int(clusters.personas[truth == corner][0]) for corner in (1, 2, 0)] == [0, 1, 2]


def test_of_equally_large_personas_the_one_with_the_earliest_user_comes_first():
    points = CORNERS[[2, 0, 1, 1, 0, 2]]
    assert cluster_users(points, k=3, seed=5).personas.tolist() == [0, 1, 2, 2, 1, 0]


def test_distances_and_inertia_by_hand():
    # Two users at right angles: the centre is (1/2, 1/2), each at distance sqrt(1/2).
    clusters = cluster_users(CORNERS[[0, 1]], k=1, seed=0)
    np.testing.assert_allclose(clusters.centres, [[0.5, 0.5, 0, 0]], atol=1e-12)
    np.testing.assert_allclose(clusters.distances, [0.5**0.5] * 2, atol=1e-12)
    assert clusters.inertia == pytest.approx(1.0)


def test_the_inertia_is_that_of_scikit_learn():
    points, _ = around_corners([10, 10, 10, 10], spread=0.4)
    ours = cluster_users(points, k=3, seed=3)
    theirs = KMeans(3, n_init=10, random_state=3).fit(points.astype(np.float64))
    assert ours.inertia == pytest.approx(theirs.inertia_)


def test_the_order_of_users_and_the_number_of_threads_change_no_grouping():
    points, _ = around_corners([10, 8, 6], spread=0.2)
    here = cluster_users(points, k=3, seed=0)
    with threadpool_limits(4):
        there = cluster_users(points, k=3, seed=0)
    assert here.personas.tobytes() == there.personas.tobytes()
    assert here.centres.tobytes() == there.centres.tobytes()
    backwards = cluster_users(points[::-1], k=3, seed=0)
    assert adjusted_rand_score(here.personas, backwards.personas[::-1]) == 1


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 30), st.data())
def test_every_user_is_with_the_nearest_centre_and_every_persona_has_users(seed, n_users, data):
    points = np.random.default_rng(seed).normal(size=(n_users, 3)).astype(np.float32)
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    k = data.draw(st.integers(1, n_users))
    clusters = cluster_users(points, k, seed)
    assert clusters.sizes == sorted(clusters.sizes, reverse=True)
    assert min(clusters.sizes) >= 1
    assert sum(clusters.sizes) == n_users
    apart = np.linalg.norm(points[:, None].astype(float) - clusters.centres[None], axis=2)
    np.testing.assert_allclose(clusters.distances, apart.min(axis=1), atol=1e-9)


def test_a_new_user_goes_to_the_nearest_persona():
    points, _ = around_corners([9, 6, 3])
    clusters = cluster_users(points, k=3, seed=0)
    again, distances = assign_users(points, clusters.centres)
    assert again.tolist() == clusters.personas.tolist()
    np.testing.assert_allclose(distances, clusters.distances)
    assert assign_users(CORNERS[[2, 0]], clusters.centres)[0].tolist() == [2, 0]


@pytest.mark.parametrize(
    ("rows", "k", "message"),
    [
        ([0, 1, 2], 5, "5 personas need at least 5 users, there are 3"),
        ([0, 1, 1, 1, 0], 3, "3 personas need 3 different profiles, the 5 users have 2; set personas.k=2 or fewer"),
        ([0, 1], 0, "0 personas can't be formed"),
    ],
)
def test_a_k_that_the_users_do_not_allow_is_refused(rows, k, message):
    with pytest.raises(ClusteringError, match=message):
        cluster_users(CORNERS[rows], k, seed=0)
    with pytest.raises(ClusteringError, match=message):
        choose_personas(CORNERS[rows], k, k_max=4, seed=0)


@pytest.mark.parametrize(
    ("inertias", "elbow"),
    [
        ([100, 60, 20, 18, 16, 15], 3),  # below the chord 100, 83, 66, 49, 32, 15: 0, 23, 46, 31, 16, 0
        ([100, 20, 10, 0], 2),  # below 100, 66.7, 33.3, 0: 46.7, 23.3
        ([100, 50, 20, 0], 2),  # below 100, 66.7, 33.3, 0: 16.7, 13.3
        ([90, 60, 30, 0], 2),  # a straight line bends nowhere: the smallest
        ([0.9, 0.6, 0.3, 0.0], 2),
        ([100, 90, 80, 0], 4),  # all above the chord but the last: k_max is too small to see a bend
        ([5, 1], None),
        ([5], None),
    ],
)
def test_the_elbow_lies_farthest_below_the_chord(inertias, elbow):
    assert find_elbow(inertias) == elbow


def test_the_elbow_finds_the_number_of_corners():
    points, truth = around_corners([15, 15, 15, 15])
    choice = choose_personas(points, "elbow", k_max=9, seed=0)
    assert choice.clusters.k == choice.elbow == 4
    assert adjusted_rand_score(truth, choice.clusters.personas) == 1
    assert np.nanargmax([np.nan if value is None else value for value in choice.silhouettes]) == 3


def test_every_k_is_reported_also_when_k_is_given():
    points, _ = around_corners([6, 6, 6], spread=0.3)
    choice = choose_personas(points, 2, k_max=5, seed=0)
    assert choice.clusters.k == 2
    assert [candidate.k for candidate in choice.candidates] == [1, 2, 3, 4, 5]
    assert choice.silhouettes[0] is None
    assert all(-1 <= value <= 1 for value in choice.silhouettes[1:])
    assert [c.k for c in choose_personas(points, 7, k_max=5, seed=0).candidates] == [1, 2, 3, 4, 5, 6, 7]


def test_the_range_ends_at_the_number_of_different_profiles():
    choice = choose_personas(CORNERS[[0, 1, 2, 2]], 1, k_max=10, seed=0)
    assert [candidate.k for candidate in choice.candidates] == [1, 2, 3]
    assert choice.candidates[2].inertia == 0


def test_two_profiles_have_no_elbow():
    with pytest.raises(ClusteringError, match="no elbow"):
        choose_personas(CORNERS[[0, 1, 1]], "elbow", k_max=5, seed=0)
    assert choose_personas(CORNERS[[0, 1, 1]], 2, k_max=5, seed=0).elbow is None


def test_the_plot_is_a_png_of_equal_bytes():
    points, _ = around_corners([6, 6, 6])
    first, second = (draw_choice(choose_personas(points, "elbow", k_max=5, seed=0)) for _ in range(2))
    assert first.startswith(b"\x89PNG")
    assert b"matplotlib" not in first.lower()
    assert first == second
    assert first != draw_choice(choose_personas(points, 2, k_max=5, seed=0))
