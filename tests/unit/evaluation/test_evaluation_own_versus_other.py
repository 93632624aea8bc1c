"""Every adapter on every persona's rows: by hand, and the interval against a slow reference."""

import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import bootstrap

from personas_tune.evaluation.intervals import Resampling
from personas_tune.evaluation.own_versus_other import (
    choose_rows,
    measure_own_versus_other,
    own_versus_other_cells,
    own_versus_other_note,
)

QUICK = Resampling(199, 0.9, 1)

# Users a and b are persona 0's, c is persona 1's; adapter 0 errs by 1, 1, 0 and then 3, adapter 1 by 2, 0, 2 and 1.
USERS = ["a", "a", "b", "c"]
OWNERS = ["0", "0", "0", "1"]
RATINGS = np.array([3.0, 4.0, 5.0, 2.0])
PREDICTED = {"0": RATINGS + np.array([1, -1, 0, 3]), "1": RATINGS + np.array([2, 0, -2, 1])}


def test_the_matrix_by_hand():
    measured = measure_own_versus_other(USERS, OWNERS, RATINGS, PREDICTED, QUICK)
    assert (measured["adapters"], measured["personas"], measured["n"]) == (["0", "1"], ["0", "1"], [3, 1])
    np.testing.assert_allclose(measured["rmse"], [[np.sqrt(2 / 3), 3], [np.sqrt(8 / 3), 1]])
    np.testing.assert_allclose(measured["mae"], [[2 / 3, 3], [4 / 3, 1]])


def test_own_minus_other_is_the_mean_over_personas_by_their_rows():
    figures = measure_own_versus_other(USERS, OWNERS, RATINGS, PREDICTED, QUICK)["own_minus_other"]
    assert figures["difference"] == pytest.approx((3 * (np.sqrt(2 / 3) - np.sqrt(8 / 3)) + 1 * (1 - 3)) / 4)


def test_the_others_of_three_adapters_are_averaged():
    ratings = np.zeros(3)
    predicted = {"0": np.array([1.0, 2.0, 3.0]), "1": np.array([2.0, 1.0, 4.0]), "2": np.array([4.0, 4.0, 1.0])}
    figures = measure_own_versus_other(["a", "b", "c"], ["0", "1", "2"], ratings, predicted, QUICK)["own_minus_other"]
    assert figures["difference"] == pytest.approx(((1 - 3) + (1 - 3) + (1 - 3.5)) / 3)


def slow_difference(users, owners, ratings, predicted, drawn):
    """The difference on a draw of users, row by row."""
    rows = [row for user in drawn for row in range(len(users)) if users[row] == user]
    total = 0.0
    for persona in set(owners):
        mine = [row for row in rows if owners[row] == persona]
        if not mine:
            continue
        errors = {
            name: np.sqrt(np.mean([(values[row] - ratings[row]) ** 2 for row in mine]))
            for name, values in predicted.items()
        }
        other = np.mean([error for name, error in errors.items() if name != persona])
        total += len(mine) * (errors[persona] - other)
    return total / len(rows)


def test_the_interval_is_that_of_a_slow_bootstrap_over_users():
    generator = np.random.default_rng(0)
    users = [f"u{user}" for user in generator.integers(0, 9, 60)]
    names = sorted(set(users))
    owners = [str(names.index(user) % 3) for user in users]
    ratings = generator.normal(size=60)
    predicted = {name: ratings + generator.normal(size=60) for name in ("0", "1", "2")}
    figures = measure_own_versus_other(users, owners, ratings, predicted, QUICK)["own_minus_other"]
    interval = bootstrap(
        [np.arange(len(names))],
        lambda drawn: slow_difference(users, owners, ratings, predicted, [names[place] for place in drawn]),
        vectorized=False,
        n_resamples=QUICK.n_resamples,
        confidence_level=QUICK.confidence,
        method="percentile",
        rng=np.random.default_rng(QUICK.seed),
    ).confidence_interval
    assert figures["difference"] == pytest.approx(slow_difference(users, owners, ratings, predicted, names))
    assert (figures["low"], figures["high"]) == pytest.approx((interval.low, interval.high))


def test_figures_that_dont_exist_are_none():
    alone = measure_own_versus_other(USERS, ["0"] * 4, RATINGS, {"0": RATINGS}, QUICK)
    assert alone["own_minus_other"] == {"difference": None, "low": None, "high": None}
    empty = measure_own_versus_other(["a"], ["0"], RATINGS[:1], {"0": RATINGS[:1], "1": RATINGS[:1] + 1}, QUICK)
    assert (empty["n"], empty["rmse"], empty["mae"]) == ([1, 0], [[0, None], [1, None]], [[0, None], [1, None]])
    assert empty["own_minus_other"] == {"difference": -1, "low": None, "high": None}
    json.dumps([alone, empty], allow_nan=False)


# Rows

owners_of = st.lists(st.sampled_from(["0", "1", "2"]), min_size=1, max_size=40)


@given(owners_of, st.integers(1, 50), st.integers(0, 1000))
def test_rows_are_drawn_evenly_over_the_personas(owners, n_rows, seed):
    chosen = choose_rows(owners, n_rows, seed)
    assert chosen == sorted(set(chosen)) == choose_rows(owners, n_rows, seed)
    assert len(chosen) == min(n_rows, len(owners))
    taken, there = Counter(owners[row] for row in chosen), Counter(owners)
    most = max(taken.values())
    assert all(taken[owner] >= min(there[owner], most - 1) for owner in there)


@given(owners_of, st.integers(1, 50), st.integers(0, 1000))
def test_more_rows_hold_those_of_fewer_and_none_means_all(owners, n_rows, seed):
    assert set(choose_rows(owners, n_rows, seed)) <= set(choose_rows(owners, n_rows + 1, seed))
    assert choose_rows(owners, None, seed) == list(range(len(owners)))


def test_the_seed_decides_which_rows():
    owners = ["0", "1"] * 50
    assert choose_rows(owners, 10, 0) != choose_rows(owners, 10, 1)


# For people


def test_the_table_marks_the_own_adapter_and_the_note_has_the_difference():
    measured = measure_own_versus_other(USERS, OWNERS, RATINGS, PREDICTED, QUICK)
    assert own_versus_other_cells("mine", measured) == (
        ["mine: RMSE with adapter", "users of 0 (n=3)", "users of 1 (n=1)"],
        [["0", "0.816 *", "3.000"], ["1", "1.633", "1.000 *"]],
    )
    ends = [measured["own_minus_other"][key] for key in ("difference", "low", "high")]
    assert own_versus_other_note("mine", measured) == (
        "mine: RMSE with the own adapter (*) minus RMSE with those of other personas is "
        f"{ends[0]:+.3f} [{ends[1]:+.3f}, {ends[2]:+.3f}]; negative: adapters fit their own personas."
    )
    alone = measure_own_versus_other(USERS, ["0"] * 4, RATINGS, {"0": RATINGS}, QUICK)
    assert "with one persona only" in own_versus_other_note("mine", alone)
    lonely = measure_own_versus_other(["a"], ["0"], RATINGS[:1], {"0": RATINGS[:1], "1": RATINGS[:1] + 1}, QUICK)
    assert own_versus_other_cells("mine", lonely)[1] == [["0", "0.000 *", "-"], ["1", "1.000", "- *"]]
    assert "-1.000 [-]; negative" in own_versus_other_note("mine", lonely)
