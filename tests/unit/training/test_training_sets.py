from collections import Counter

import pytest
from cohorts import cohorts, per_user, samples_of, seeds
from hypothesis import assume, given
from hypothesis import strategies as st

from personas_tune.errors import ConfigError, DataError
from personas_tune.training.sets import (
    ALL_USERS,
    assign_users_to_adapters,
    latest_share,
    number_of_rows,
    plan_adapter_set,
    rows_per_adapter,
    subsample_per_user,
)

# Two personas: u000 and u002 with 4 + 2 rows, u001 with 3.
SMALL = samples_of([4, 3, 2], [0, 1, 0])


# Which adapter


def test_one_adapter_per_persona_or_one_for_all():
    assert assign_users_to_adapters(SMALL, per="persona", shuffle_personas=False, seed=0) == {
        "u000": "0", "u001": "1", "u002": "0",
    }  # fmt: skip
    assert assign_users_to_adapters(SMALL, per="all", shuffle_personas=False, seed=0) == dict.fromkeys(
        ("u000", "u001", "u002"), ALL_USERS
    )


@given(cohorts, seeds)
def test_shuffled_personas_keep_their_numbers_of_users(samples, seed):
    real = assign_users_to_adapters(samples, per="persona", shuffle_personas=False, seed=seed)
    dealt = assign_users_to_adapters(samples, per="persona", shuffle_personas=True, seed=seed)
    assert dealt.keys() == real.keys()
    assert Counter(dealt.values()) == Counter(real.values())
    assert dealt == assign_users_to_adapters(samples, per="persona", shuffle_personas=True, seed=seed)


def test_shuffling_deals_users_out_by_the_seed():
    samples = samples_of([1] * 40, [user % 4 for user in range(40)])
    real = assign_users_to_adapters(samples, per="persona", shuffle_personas=False, seed=0)
    dealt = [assign_users_to_adapters(samples, per="persona", shuffle_personas=True, seed=seed) for seed in range(3)]
    assert all(each != real for each in dealt)
    assert dealt[0] != dealt[1] != dealt[2]


def test_the_largest_adapter_comes_first_and_names_break_ties():
    rows = rows_per_adapter(SMALL, range(9), {"u000": "b", "u001": "c", "u002": "a"})
    assert {adapter: len(mine) for adapter, mine in rows.items()} == {"b": 4, "c": 3, "a": 2}
    assert list(rows) == ["b", "c", "a"]
    assert list(rows_per_adapter(SMALL, [0, 4, 7], {"u000": "b", "u001": "a", "u002": "c"})) == ["a", "b", "c"]


# How many rows


def test_rows_stand_for_a_number_or_for_a_personas_size():
    assert [number_of_rows(SMALL, rows) for rows in (None, "largest_persona", "smallest_persona", 5)] == [9, 6, 3, 5]


def test_more_rows_than_there_are_is_refused():
    assert number_of_rows(SMALL, 9) == 9
    with pytest.raises(ConfigError, match="10 rows asked for, 9 train rows there; lower rows"):
        number_of_rows(SMALL, 10)


@given(cohorts, st.data(), seeds)
def test_a_subsample_is_exact_in_total_and_even_over_users(samples, data, seed):
    n_rows = data.draw(st.integers(1, len(samples)))
    chosen = subsample_per_user(samples, n_rows, seed)
    assert len(chosen) == len(set(chosen)) == n_rows
    assert chosen == sorted(chosen)
    share = n_rows / len(samples)
    mine, all_rows = per_user(samples, chosen), per_user(samples, range(len(samples)))
    assert all(abs(mine[user] - share * size) < 1 for user, size in all_rows.items())
    assert chosen == subsample_per_user(samples, n_rows, seed)


def test_of_equal_remainders_the_earlier_users_come_first():
    samples = samples_of([10, 6, 4, 5, 3])  # half of them: 5, 3, 2, 2.5 and 1.5
    assert list(per_user(samples, subsample_per_user(samples, 14, 1)).values()) == [5, 3, 2, 3, 1]


def test_the_largest_remainders_get_what_rounding_leaves():
    samples = samples_of([5, 3, 2])  # 6 of 10 rows: 3.0, 1.8 and 1.2
    assert per_user(samples, subsample_per_user(samples, 6, 0)) == {"u000": 3, "u001": 2, "u002": 1}


def test_a_subsample_depends_on_the_seed():
    samples = samples_of([50, 50])
    assert subsample_per_user(samples, 20, 0) != subsample_per_user(samples, 20, 1)


# Validation


@given(cohorts, st.floats(0, 0.99))
def test_each_users_last_rows_are_held_out(samples, share):
    rows = list(range(len(samples)))
    train, held_out = latest_share(samples, rows, share)
    assert sorted(train + held_out) == rows
    sizes, kept = per_user(samples, rows), per_user(samples, train)
    for user, size in sizes.items():
        assert kept[user] == size - int(size * share) >= 1
        assert max(samples[i].position for i in train if samples[i].user_id == user) == kept[user] - 1


def test_of_rows_that_were_drawn_the_latest_drawn_are_held_out():
    samples = samples_of([6])
    assert latest_share(samples, [0, 2, 3, 5], 0.5) == ([0, 2], [3, 5])


KINDS = [
    {"per": "persona"},
    {"per": "persona", "shuffle_personas": True},
    {"per": "persona", "share": 0.4},
    {"per": "persona", "rows_from": "all"},
    {"per": "persona", "rows_from": "all", "share": 0.7},
    {"per": "all"},
    {"per": "all", "share": 0.4},
    {"per": "all", "rows": "largest_persona"},
    {"per": "all", "rows": "smallest_persona"},
    {"per": "all", "rows": 1},
]


@given(cohorts, st.sampled_from(KINDS), st.sampled_from([0.1, 0.25, 0.5, 0.9]), seeds)
def test_no_kind_of_set_is_trained_on_what_is_held_out_of_all_rows(samples, kind, share, seed):
    """The rows that an evaluation may calibrate on are each user's latest of all train rows."""
    left, latest = latest_share(samples, range(len(samples)), share)
    settings = {"rows": None, "shuffle_personas": False, **kind}
    try:
        plans, assignment = plan_adapter_set(samples, validation_share=share, seed=seed, **settings)
    except ConfigError:  # a small share leaves a small persona none
        assume(False)
    for plan in plans:
        assert set(plan.rows) <= set(left)
        assert plan.validation_rows == [i for i in latest if assignment[samples[i].user_id] == plan.adapter]


def test_with_rows_held_out_a_personas_size_is_the_rows_it_is_trained_on():
    samples = samples_of([8, 8, 4], [0, 0, 1])  # of 16 and 4 rows 12 and 3 are left
    settings = {"shuffle_personas": False, "validation_share": 0.25, "seed": 1}
    by_persona, _ = plan_adapter_set(samples, per="persona", rows=None, **settings)
    assert [len(plan.rows) for plan in by_persona] == [12, 3]
    for rows, n in (("largest_persona", 12), ("smallest_persona", 3), (15, 15), (None, 15)):
        (plan,), _ = plan_adapter_set(samples, per="all", rows=rows, **settings)
        assert (len(plan.rows), plan.validation_rows) == (n, [6, 7, 14, 15, 19])
    with pytest.raises(ConfigError, match=r"^adapter_sets\.single: 16 rows asked for, 15 train rows there"):
        plan_adapter_set(samples, per="all", rows=16, **settings, where="adapter_sets.single")


# The whole plan


@given(cohorts, st.sampled_from(["persona", "all"]), st.booleans(), st.sampled_from([None, 0.25]), seeds)
def test_a_plan_gives_every_row_to_its_users_adapter_once(samples, per, shuffle, share, seed):
    assume(not (per == "all" and shuffle))
    plans, assignment = plan_adapter_set(
        samples, per=per, rows=None, shuffle_personas=shuffle, validation_share=share, seed=seed
    )
    used = [(index, plan.adapter) for plan in plans for index in plan.rows + plan.validation_rows]
    assert sorted(index for index, _ in used) == list(range(len(samples)))
    assert all(assignment[samples[index].user_id] == adapter for index, adapter in used)
    assert len({plan.adapter for plan in plans}) == len(plans)
    assert share is not None or all(plan.validation_rows == [] for plan in plans)


def test_a_plan_for_all_users_has_one_adapter_with_the_rows_asked_for():
    (plan,), assignment = plan_adapter_set(
        SMALL, per="all", rows="largest_persona", shuffle_personas=False, validation_share=None, seed=1
    )
    assert (plan.adapter, len(plan.rows), plan.validation_rows) == ("all", 6, [])
    assert set(assignment) == {"u000", "u001", "u002"}


def test_no_row_at_all_is_refused():
    with pytest.raises(DataError, match=r"samples/train\.parquet: no row to train on; raise data\.split\.train_frac"):
        plan_adapter_set([], per="all", rows=None, shuffle_personas=False, validation_share=None, seed=1)
