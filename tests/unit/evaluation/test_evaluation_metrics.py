import json
import math

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from personas_tune.errors import EvaluationError
from personas_tune.evaluation.intervals import Resampling
from personas_tune.evaluation.metrics import (
    fill_unparsed,
    measure_agent,
    skill_score,
    train_means,
)

QUICK = Resampling(n_resamples=99)
NAN = math.nan

# Errors: ann +1, -2, none; bob 0, +3. Filled: ann's third row becomes 3.5 against 2, so +1.5.
USERS = np.array(["ann", "ann", "ann", "bob", "bob"])
PERSONAS = np.array([0, 0, 0, 7, 7])
RATINGS = np.array([3.0, 5.0, 2.0, 4.0, 1.0])
PREDICTED = np.array([4.0, 3.0, NAN, 4.0, 4.0])
USER_MEANS = np.array([3.5, 3.5, 3.5, 2.0, 2.0])


def measure(users=USERS, personas=PERSONAS, ratings=RATINGS, predicted=PREDICTED, means=USER_MEANS):
    return measure_agent(users, personas, ratings, predicted, means, QUICK)


def test_errors_on_parsed_rows_equal_the_hand_computed_ones():
    measured = measure()
    assert (measured["n"], measured["n_parsed"]) == (5, 4)
    assert measured["urr"] == pytest.approx(0.2)
    assert measured["rmse"] == pytest.approx(math.sqrt((1 + 4 + 0 + 9) / 4))
    assert measured["mae"] == pytest.approx((1 + 2 + 0 + 3) / 4)


def test_unparsed_rows_are_filled_with_the_users_train_mean():
    measured = measure()
    assert measured["rmse_filled"] == pytest.approx(math.sqrt((1 + 4 + 2.25 + 0 + 9) / 5))
    assert measured["mae_filled"] == pytest.approx((1 + 2 + 1.5 + 0 + 3) / 5)
    assert fill_unparsed(PREDICTED, USER_MEANS).tolist() == [4.0, 3.0, 3.5, 4.0, 4.0]


def test_macro_errors_weigh_users_equally():
    assert measure()["macro_rmse"] == pytest.approx((math.sqrt(5 / 2) + math.sqrt(9 / 2)) / 2)
    two_of_ann_one_of_bob = measure(*(array[[0, 1, 4]] for array in (USERS, PERSONAS, RATINGS, PREDICTED, USER_MEANS)))
    assert two_of_ann_one_of_bob["macro_mae"] == pytest.approx((1.5 + 3) / 2)


def test_personas_and_users_are_measured_apart():
    measured = measure()
    assert measured["per_persona"] == {
        "0": {"n": 3, "n_parsed": 2, "rmse": pytest.approx(math.sqrt(2.5)), "mae": pytest.approx(1.5)},
        "7": {"n": 2, "n_parsed": 2, "rmse": pytest.approx(math.sqrt(4.5)), "mae": pytest.approx(1.5)},
    }
    assert measured["per_user"] == {"ann": {"n": 2, "sse": 5.0, "sae": 3.0}, "bob": {"n": 2, "sse": 9.0, "sae": 3.0}}


def test_interval_reaches_from_the_better_user_to_the_worse():
    assert measure()["rmse_ci"] == pytest.approx([math.sqrt(2.5), math.sqrt(4.5)])
    assert measure()["mae_ci"] == pytest.approx([1.5, 1.5])


def test_an_agent_that_never_answers_has_no_error_but_a_filled_one():
    measured = measure(predicted=np.full(5, NAN))
    assert (measured["rmse"], measured["mae"], measured["macro_rmse"]) == (None, None, None)
    assert (measured["rmse_ci"], measured["n_parsed"], measured["urr"]) == ([None, None], 0, 1.0)
    assert measured["rmse_filled"] == pytest.approx(math.sqrt((0.25 + 2.25 + 2.25 + 4 + 1) / 5))
    assert measured["per_persona"]["0"] == {"n": 3, "n_parsed": 0, "rmse": None, "mae": None}


def test_one_user_has_an_error_but_no_interval():
    measured = measure(USERS[:2], PERSONAS[:2], RATINGS[:2], PREDICTED[:2], USER_MEANS[:2])
    assert measured["rmse"] == pytest.approx(math.sqrt(2.5))
    assert measured["rmse_ci"] == [None, None]


def test_no_test_row_is_an_error():
    with pytest.raises(EvaluationError, match="no test row"):
        measure(*(array[:0] for array in (USERS, PERSONAS, RATINGS, PREDICTED, USER_MEANS)))


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_values_are_finite_json_and_don_t_depend_on_the_order_of_rows(data):
    n = data.draw(st.integers(1, 12))
    users = np.array(data.draw(st.lists(st.sampled_from("abcd"), min_size=n, max_size=n)))
    predicted = np.array(data.draw(st.lists(st.sampled_from([NAN, math.inf, 1.0, 2.5, 5.0]), min_size=n, max_size=n)))
    rows = (users, np.zeros(n, dtype=int), np.linspace(1, 5, n), predicted, np.full(n, 3.0))
    measured = measure(*rows)
    json.dumps(measured, allow_nan=False)
    order = np.array(data.draw(st.permutations(range(n))))
    shuffled = measure(*(array[order] for array in rows))
    assert flatten(shuffled) == pytest.approx(flatten(measured), abs=1e-12)


def flatten(value) -> list:
    if isinstance(value, dict):
        return [entry for key in sorted(value) for entry in flatten(value[key])]
    return [entry for part in value for entry in flatten(part)] if isinstance(value, list) else [value]


def test_train_means_follow_the_rows_and_unknown_users_get_the_mean_of_all_train_rows():
    users = pa.table(
        {
            "user_id": ["ann", "bob", "cy"],
            "n_train": pa.array([3, 1, 0], pa.int32()),
            "mean_rating": pa.array([4.0, 2.0, None], pa.float64()),
        }
    )
    assert train_means(["bob", "ann", "cy", "dee", "bob"], users).tolist() == [2.0, 4.0, 3.5, 3.5, 2.0]


def test_train_means_without_any_train_row_are_an_error():
    users = pa.table({"user_id": ["a"], "n_train": [0], "mean_rating": pa.array([None], pa.float64())})
    with pytest.raises(EvaluationError, match="no user has a train row"):
        train_means(["a"], users)


def test_skill_is_the_share_of_squared_error_saved():
    assert skill_score(0.5, 1.0) == 0.75
    assert (skill_score(1.0, 1.0), skill_score(2.0, 1.0)) == (0.0, -3.0)
    assert math.isnan(skill_score(1.0, 0.0))
