from collections import Counter, defaultdict

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from personas_tune.interactions.log import Log
from personas_tune.interactions.traits import compute_traits


def log_of(rows: list[tuple[int, int, float]], n_users: int, n_items: int) -> Log:
    """A log of (user, item, rating) rows; times are positions in the list."""
    order = sorted(range(len(rows)), key=lambda index: rows[index][0])
    user, item, rating = (np.array([rows[index][part] for index in order]) for part in range(3))
    return Log(
        pa.array([f"u{number:03d}" for number in range(n_users)], pa.string()),
        pa.array([f"i{number:03d}" for number in range(n_items)], pa.string()),
        user.astype(np.int32),
        item.astype(np.int32),
        rating.astype(np.float64),
        np.array(order, dtype=np.int64),
    )


def test_conformity_is_the_mean_squared_distance_from_item_means():
    # Item means: 4 and 2. User 0: (5-4)^2, (2-2)^2; user 1: (3-4)^2; user 2: (4-4)^2, (2-2)^2.
    log = log_of([(0, 0, 5), (0, 1, 2), (1, 0, 3), (2, 0, 4), (2, 1, 2)], 3, 2)
    assert compute_traits(log, [(), ()]).conformity.value.tolist() == [0.5, 1.0, 0.0]


def test_diversity_counts_the_largest_genres_within_80_percent_of_the_marks():
    genres = [("A",), ("A", "B"), ("C",), ("D",), ("B",)]
    rows = [(0, 0, 3), (0, 1, 3), (0, 2, 3), (0, 3, 3)]  # A 2, B 1, C 1, D 1 of 5: .4, .6, .8, 1
    rows += [(1, 0, 3), (1, 1, 3), (1, 4, 3)]  # A 2, B 2 of 4: .5, 1
    rows += [(2, 0, 3)]  # A alone: 1
    traits = compute_traits(log_of(rows, 3, 5), genres)
    assert traits.diversity.value.tolist() == [3, 1, 0]


def test_tiers_begin_at_the_percentiles_over_users():
    # Activity 1..11: its 60th percentile is 7, its 90th 10.
    rows = [(user, item, 3.0) for user in range(11) for item in range(user + 1)]
    activity = compute_traits(log_of(rows, 11, 11), [("A",)] * 11).activity
    assert activity.thresholds == (7, 10)
    assert activity.tier.tolist() == [1] * 6 + [2] * 3 + [3] * 2


def test_percentiles_between_two_users_are_interpolated():
    rows = [(user, item, 3.0) for user, n in enumerate([1, 2, 4, 8]) for item in range(n)]
    assert compute_traits(log_of(rows, 4, 8), [()] * 8).activity.thresholds == pytest.approx((3.6, 6.8))


def test_users_without_a_main_genre_get_the_lowest_tier_and_move_no_threshold():
    genres = [("A",), ("B",), ("C",)]
    rows = [(user, item, 3.0) for user in range(3) for item in range(3)]  # each genre .333: two of them within .8
    diversity = compute_traits(log_of([*rows, (3, 0, 3.0)], 4, 3), genres).diversity
    assert diversity.value.tolist() == [2, 2, 2, 0]
    assert diversity.thresholds == (2, 2)
    assert diversity.tier.tolist() == [3, 3, 3, 1]


def test_users_whose_genres_are_unknown_get_the_middle_tier():
    traits = compute_traits(log_of([(0, 0, 3.0), (1, 1, 3.0), (1, 2, 3.0)], 2, 3), [(), ("A",), ("B",)])
    assert np.isnan(traits.diversity.value[0])
    assert traits.diversity.tier.tolist() == [2, 3]
    assert compute_traits(log_of([(0, 0, 3.0)], 1, 1), [()]).diversity.tier.tolist() == [2]


def test_users_without_interactions_move_no_threshold():
    rows = [(user, item, float(item % 5 + 1)) for user in (1, 3, 4) for item in range(user)]
    with_empty = compute_traits(log_of(rows, 6, 4), [("A",), ("B",), ("A", "C"), ()])
    compact = compute_traits(
        log_of([({1: 0, 3: 1, 4: 2}[u], i, r) for u, i, r in rows], 3, 4), [("A",), ("B",), ("A", "C"), ()]
    )
    for name in ("activity", "conformity", "diversity"):
        one, other = getattr(with_empty, name), getattr(compact, name)
        assert one.thresholds == other.thresholds
        assert one.value[[1, 3, 4]].tolist() == other.value.tolist()


def slow_traits(rows, genres):
    """Agent4Rec's definitions, one user at a time."""
    ratings_of_item = defaultdict(list)
    for _, item, rating in rows:
        ratings_of_item[item].append(rating)
    activity, deviation, diversity = {}, {}, {}
    for user in {row[0] for row in rows}:
        own = [row for row in rows if row[0] == user]
        activity[user] = len(own)
        deviation[user] = sum((r - np.mean(ratings_of_item[item])) ** 2 for _, item, r in own) / len(own)
        marks = Counter(genre for _, item, _ in own for genre in genres[item])
        share, diversity[user] = 0.0, 0
        for _, count in marks.most_common():
            share += count / sum(marks.values())
            diversity[user] += share <= 0.8
    return activity, deviation, diversity


def slow_tiers(values, percentiles, reference):
    low, high = np.percentile(reference, percentiles) if reference else (np.inf, np.inf)
    return {user: 1 if value < low else 2 if value < high else 3 for user, value in values.items()}


@st.composite
def logs(draw):
    n_users, n_items = draw(st.integers(1, 12)), draw(st.integers(1, 15))
    pairs = st.tuples(st.integers(0, n_users - 1), st.integers(0, n_items - 1))
    chosen = draw(st.lists(pairs, min_size=1, max_size=80, unique=True))
    rows = [(user, item, draw(st.sampled_from([0.5, 1, 2.5, 4, 5]))) for user, item in chosen]
    names = st.sampled_from(["Action", "Comedy", "Drama", "Horror", "War"])
    genres = draw(st.lists(st.lists(names, min_size=1, max_size=3, unique=True), min_size=n_items, max_size=n_items))
    return rows, genres, n_users, n_items


@settings(max_examples=150, deadline=None)
@given(logs())
def test_traits_equal_a_user_by_user_computation(case):
    rows, genres, n_users, n_items = case
    activity, deviation, diversity = slow_traits(rows, genres)
    traits = compute_traits(log_of(rows, n_users, n_items), genres)
    for trait, values, percentiles in (
        (traits.activity, activity, (60, 90)),
        (traits.conformity, deviation, (25, 80)),
        (traits.diversity, diversity, (33, 66)),
    ):
        assert {u: trait.value[u] for u in values} == pytest.approx(values, abs=1e-12)
        reference = [value for value in values.values() if value > 0 or trait is not traits.diversity]
        if reference:
            assert trait.thresholds == pytest.approx(np.percentile(reference, percentiles), abs=1e-12)
        # A value that is a threshold up to its last bit may fall on either side.
        near = {u for u, value in values.items() if min(abs(value - t) for t in trait.thresholds) < 1e-9}
        exact = trait is not traits.conformity
        tiers = slow_tiers(values, percentiles, reference)
        assert all(trait.tier[u] == tier for u, tier in tiers.items() if exact or u not in near)


def test_blocks_of_users_do_not_change_diversity(monkeypatch):
    rng = np.random.default_rng(3)
    pairs = {(int(u), int(i)) for u, i in zip(rng.integers(0, 40, 600), rng.integers(0, 30, 600), strict=True)}
    log = log_of([(user, item, 3.0) for user, item in sorted(pairs)], 40, 30)
    genres = [tuple(rng.choice(list("ABCDEF"), rng.integers(0, 4), replace=False)) for _ in range(30)]
    whole = compute_traits(log, genres).diversity.value
    for bound, value in (("_USERS_PER_BLOCK", 7), ("_COUNTS_PER_BLOCK", 13), ("_COUNTS_PER_BLOCK", 1)):
        monkeypatch.setattr(f"personas_tune.interactions.traits.{bound}", value)
        np.testing.assert_array_equal(compute_traits(log, genres).diversity.value, whole)
