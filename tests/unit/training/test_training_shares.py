"""Growing shares of each user's rows, and as many rows as a persona has from all users."""

import math
from collections import Counter

import pytest
from cohorts import cohorts, per_user, samples_of, seeds
from hypothesis import given
from hypothesis import strategies as st

from personas_tune.errors import ConfigError
from personas_tune.training.sets import as_many_of_all, plan_adapter_set, share_of_each_user


def plans_of(samples, **settings):
    defaults = {"per": "persona", "rows": None, "shuffle_personas": False, "validation_share": None, "seed": 3}
    plans, _ = plan_adapter_set(samples, **{**defaults, **settings})
    return {plan.adapter: plan for plan in plans}


shares = st.floats(0.01, 1)


# A share of each user's rows


@given(cohorts, shares, seeds)
def test_a_share_is_even_over_users_and_the_same_every_time(samples, share, seed):
    chosen = share_of_each_user(samples, share, seed)
    assert chosen == sorted(set(chosen)) == share_of_each_user(samples, share, seed)
    mine, all_rows = per_user(samples, chosen), per_user(samples, range(len(samples)))
    assert all(abs(mine[user] - share * size) < 1 for user, size in all_rows.items())


@given(cohorts, shares, shares, seeds)
def test_a_larger_share_holds_the_rows_of_a_smaller_one(samples, one, other, seed):
    small, large = (set(share_of_each_user(samples, share, seed)) for share in sorted((one, other)))
    assert small <= large


@given(cohorts, seeds)
def test_the_whole_share_is_all_rows(samples, seed):
    assert share_of_each_user(samples, 1, seed) == list(range(len(samples)))


def test_shares_that_come_out_even_are_exact():
    samples = samples_of([8, 4, 12])
    for seed in range(5):
        assert per_user(samples, share_of_each_user(samples, 0.25, seed)) == {"u000": 2, "u001": 1, "u002": 3}


def test_of_users_with_few_rows_as_many_round_up_as_should():
    """A quarter of 40 users' single rows is 10 rows, and half of a user's three is 1 or 2."""
    assert len(share_of_each_user(samples_of([1] * 40), 0.25, 0)) == 10
    assert Counter(per_user(samples_of([3] * 40), share_of_each_user(samples_of([3] * 40), 0.5, 0)).values()) == {
        1: 20, 2: 20,
    }  # fmt: skip


def test_a_share_depends_on_the_seed_and_takes_no_row_more_often_than_another():
    samples = samples_of([10] * 20)
    assert share_of_each_user(samples, 0.5, 0) != share_of_each_user(samples, 0.5, 1)
    taken = Counter(
        samples[i].position for seed in range(100) for i in share_of_each_user(samples_of([10] * 20), 0.2, seed)
    )
    # 4000 draws over 10 positions: 400 each, with a standard deviation of 18
    assert len(taken) == 10
    assert max(abs(n - 400) for n in taken.values()) < 5 * math.sqrt(4000 * 0.1 * 0.8)


def test_one_share_has_the_same_rows_however_they_are_grouped():
    samples = samples_of([7, 9, 11, 5], [0, 1, 0, 1])
    by_persona = plans_of(samples, share=0.4)
    (single,) = plans_of(samples, per="all", share=0.4).values()
    assert sorted(by_persona["0"].rows + by_persona["1"].rows) == single.rows
    assert {samples[i].persona for i in by_persona["1"].rows} == {1}


def test_a_share_is_one_of_the_rows_that_are_not_held_out():
    samples = samples_of([20, 10], [0, 1])
    plans = plans_of(samples, share=0.5, validation_share=0.2)
    assert {name: len(plan.rows) for name, plan in plans.items()} == {"0": 8, "1": 4}
    assert {name: plan.validation_rows for name, plan in plans.items()} == {"0": [16, 17, 18, 19], "1": [28, 29]}
    assert max(plans["0"].rows) < 16 <= 20 <= min(plans["1"].rows)
    assert max(plans["1"].rows) < 28


def test_an_adapter_without_rows_is_refused_in_a_line():
    samples = samples_of([1, 30, 30], [1, 0, 0])
    (seed, *_) = (seed for seed in range(8) if 0 not in share_of_each_user(samples, 0.1, seed))
    with pytest.raises(ConfigError) as caught:
        plans_of(samples, share=0.1, seed=seed, where="adapter_sets.persona_10")
    assert caught.value.lines == [
        "adapter_sets.persona_10: adapter 1 of 1 user(s) gets no row at share 0.1; raise share or lower personas.k"
    ]


# As many rows, from all users


@given(cohorts, st.sampled_from([1, 0.6]), st.sampled_from([None, 0.25]), seeds)
def test_adapters_have_as_many_rows_as_their_personas_have(samples, share, held_out, seed):
    try:
        own = plans_of(samples, share=share, seed=seed, validation_share=held_out)
    except ConfigError:
        return
    from_all = plans_of(samples, rows_from="all", share=share, seed=seed, validation_share=held_out)
    assert list(own) == list(from_all)
    kept = {index for plan in own.values() for index in plan.rows}
    for adapter, plan in from_all.items():
        assert len(plan.rows) == len(set(plan.rows)) == len(own[adapter].rows)
        assert set(plan.rows) <= kept
        assert plan.validation_rows == own[adapter].validation_rows


def test_they_come_evenly_from_all_users():
    samples = samples_of([20, 40, 10, 30, 60, 40], [0, 0, 0, 1, 1, 1])
    for seed in range(5):
        for adapter, n_rows in (("0", 70), ("1", 130)):
            mine = per_user(samples, plans_of(samples, rows_from="all", seed=seed)[adapter].rows)
            for user, size in per_user(samples, range(200)).items():
                assert abs(mine[user] - size * n_rows / 200) < 2


def test_users_stay_with_the_adapter_of_their_persona():
    samples = samples_of([5, 5], [0, 1])
    for rows_from in ("own", "all"):
        _, assignment = plan_adapter_set(
            samples, per="persona", rows=None, shuffle_personas=False, validation_share=None, seed=0,
            rows_from=rows_from,
        )  # fmt: skip
        assert assignment == {"u000": "0", "u001": "1"}


def test_each_adapter_has_a_draw_of_its_own_and_more_rows_hold_those_of_fewer():
    samples = samples_of([30] * 4)
    kept = range(120)
    draws = [as_many_of_all(samples, kept, n, "0", seed=1) for n in (10, 40, 90)]
    assert set(draws[0]) < set(draws[1]) < set(draws[2])
    assert draws[1] == as_many_of_all(samples, kept, 40, "0", seed=1)
    assert draws[1] != as_many_of_all(samples, kept, 40, "1", seed=1)
    assert draws[1] != as_many_of_all(samples, kept, 40, "0", seed=2)


@pytest.mark.parametrize("settings", [{}, {"share": 1}, {"rows_from": "own"}])
def test_without_either_key_a_set_is_what_it_was(settings):
    samples = samples_of([4, 3, 2], [0, 1, 0])
    plans = plans_of(samples, **settings)
    assert {name: plan.rows for name, plan in plans.items()} == {"0": [0, 1, 2, 3, 7, 8], "1": [4, 5, 6]}
