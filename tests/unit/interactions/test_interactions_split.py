import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from personas_tune.errors import ConfigError
from personas_tune.interactions.cohort import choose_cohort
from personas_tune.interactions.split import count_train, draw_rows, find_time_cut, share_test_rows


def test_train_is_the_whole_part_with_one_row_left_on_each_side():
    n_per_user = np.array([0, 1, 2, 3, 4, 5, 10, 11, 100])
    assert count_train(n_per_user, 0.6).tolist() == [0, 1, 1, 1, 2, 3, 6, 6, 60]
    assert count_train(np.array([2, 10, 100]), 0.01).tolist() == [1, 1, 1]
    assert count_train(np.array([2, 10, 100]), 0.99).tolist() == [1, 9, 99]


def test_a_fraction_s_last_bit_costs_no_row():
    assert count_train(np.array([100, 1000]), 0.29).tolist() == [29, 290]  # 100 * 0.29 is 28.999999999999996


def test_the_time_cut_keeps_ties_together_behind_it():
    times = np.array([50, 10, 20, 20, 20, 60, 70, 80, 90, 30])
    cut = find_time_cut(times, 0.3)
    assert cut == 20
    assert (times < cut).sum() == 1


def test_test_rows_are_shared_by_largest_remainder():
    # 7 of 20 in proportion 10:6:4 is 3.5, 2.1, 1.4: the first gets what rounding leaves.
    assert share_test_rows(np.array([10, 6, 4]), 7).tolist() == [4, 2, 1]
    # Equal remainders: the earlier user's.
    assert share_test_rows(np.array([5, 5]), 5).tolist() == [3, 2]


def test_users_of_few_rows_still_get_one():
    assert share_test_rows(np.array([97, 1, 1, 1]), 10).tolist() == [7, 1, 1, 1]
    assert share_test_rows(np.array([50, 30, 1, 1, 1]), 5).tolist() == [1, 1, 1, 1, 1]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=25), st.data())
def test_shares_sum_up_and_stay_within_what_there_is(available, data):
    n_available = np.array(available)
    test_rows = data.draw(st.integers(len(available), int(n_available.sum())))
    quota = share_test_rows(n_available, test_rows)
    assert quota.sum() == test_rows
    assert ((quota >= 1) & (quota <= n_available)).all()
    exact = n_available * test_rows / n_available.sum()
    if (exact >= 1).all():
        assert (np.abs(quota - exact) < 1).all()


@pytest.mark.parametrize(("test_rows", "message"), [(21, "there are 20"), (2, "3 users, who need at least one each")])
def test_impossible_numbers_of_test_rows_are_refused(test_rows, message):
    with pytest.raises(ConfigError, match=message):
        share_test_rows(np.array([10, 6, 4]), test_rows)


def test_drawn_rows_are_as_many_as_asked_of_each_user_and_every_row_has_a_chance():
    user = np.repeat([0, 1, 2], [5, 1, 8])
    quota = np.array([2, 1, 3])
    hits = np.zeros(len(user))
    for seed in range(400):
        drawn = draw_rows(user, quota, np.random.default_rng(seed))
        assert np.bincount(user[drawn], minlength=3).tolist() == [2, 1, 3]
        hits += drawn
    expected = (quota / [5, 1, 8])[user]
    np.testing.assert_allclose(hits / 400, expected, atol=0.1)


def test_a_cohort_is_within_the_range_seeded_and_ascending():
    n_per_user = np.random.default_rng(0).integers(0, 300, 400)
    chosen = choose_cohort(n_per_user, 30, 100, 200, np.random.default_rng(7))
    assert len(set(chosen)) == 30
    assert (np.diff(chosen) > 0).all()
    assert ((n_per_user[chosen] >= 100) & (n_per_user[chosen] <= 200)).all()
    assert chosen.tolist() == choose_cohort(n_per_user, 30, 100, 200, np.random.default_rng(7)).tolist()
    assert chosen.tolist() != choose_cohort(n_per_user, 30, 100, 200, np.random.default_rng(8)).tolist()


def test_without_a_number_every_user_in_range_is_chosen():
    assert choose_cohort(np.array([0, 1, 2, 9, 10, 11]), None, 1, 10, np.random.default_rng(0)).tolist() == [2, 3, 4]


def test_an_impossible_cohort_says_what_would_work():
    n_per_user = np.array([0, 3, 5, 9])
    with pytest.raises(
        ConfigError, match=r"no user has 100 or more interactions; the 3 users have 3 to 9, half of them 5"
    ):
        choose_cohort(n_per_user, None, 100, None, np.random.default_rng(0))
    with pytest.raises(ConfigError, match=r"50 users are asked for, and 2 have 4 to 9 interactions; set .*n_users=2"):
        choose_cohort(n_per_user, 50, 4, 9, np.random.default_rng(0))
