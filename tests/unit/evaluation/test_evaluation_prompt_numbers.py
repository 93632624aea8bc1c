import numpy as np
import pyarrow as pa
import pytest

from personas_tune.errors import EvaluationError
from personas_tune.evaluation.prompt_numbers import feature_names, prompt_numbers

TRAIN = pa.table(
    {
        "user_id": ["ann", "ann", "ann", "bob"],
        "item_id": ["i", "j", "k", "i"],
        "position": pa.array([0, 1, 2, 0], pa.int32()),
        "rating": [5.0, 3.0, 1.0, 4.0],
    }
)
ITEMS = pa.table(
    {
        "item_id": ["i", "j", "k"],
        "mean_rating": pa.array([4.5, None, 2.0], pa.float64()),
        "n_ratings": pa.array([2, 0, 1], pa.int32()),
        "year": pa.array([1990, 2000, None], pa.int32()),
    }
)
USERS = pa.table(
    {
        "user_id": ["ann", "bob"],
        "activity": [3.0, 1.0],
        "activity_tier": pa.array([2, 1], pa.int32()),
        "conformity": pa.array([0.5, None], pa.float64()),
        "conformity_tier": pa.array([1, 3], pa.int32()),
        "diversity": [4.0, 6.0],
        "diversity_tier": pa.array([1, 2], pa.int32()),
    }
)
OVERALL = 13 / 4


def samples(rows, memory_positions):
    return rows.append_column("memory_positions", pa.array(memory_positions, pa.list_(pa.int32())))


def numbers(table, historical_average="outside", leave_own_out=False):
    features = prompt_numbers(table, TRAIN, ITEMS, USERS, historical_average, leave_own_out=leave_own_out)
    return [dict(zip(feature_names(), row, strict=True)) for row in features.tolist()]


def ask(user: str, item: str, memory_positions: list[int]) -> dict[str, float]:
    rows = pa.table({"user_id": [user], "item_id": [item]})
    return numbers(samples(rows, [memory_positions]))[0]


def test_a_test_rows_numbers_equal_the_hand_computed_ones():
    assert ask("ann", "i", [1, 2]) == pytest.approx(
        {
            "item_mean": 4.5,
            "no_item_mean": 0,
            "log_n_ratings": np.log(3),
            "item_mean_by_log_n_ratings": (4.5 - OVERALL) * np.log(3),
            "year": 1990,
            "no_year": 0,
            "user_mean": 3.0,
            "user_spread": np.sqrt(8 / 3),
            "log_n_train": np.log(4),
            "activity": 3,
            "activity_tier": 2,
            "conformity": 0.5,
            "conformity_tier": 1,
            "diversity": 4,
            "diversity_tier": 1,
            "memory_mean_minus_user_mean": 2.0 - 3.0,
            "no_memory": 0,
            "log_n_memories": np.log(3),
        }
    )


def test_what_is_missing_gets_an_average_and_a_mark():
    row = ask("bob", "j", [])
    assert (row["item_mean"], row["no_item_mean"], row["item_mean_by_log_n_ratings"]) == (OVERALL, 1, 0)
    assert (row["no_memory"], row["memory_mean_minus_user_mean"]) == (1, 0)
    assert row["conformity"] == 0.5  # the users' mean
    assert row["user_spread"] == pytest.approx(np.std([5, 3, 1, 4]))  # one rating has no spread of its own
    assert (ask("ann", "k", [])["year"], ask("ann", "k", [])["no_year"]) == (1995, 1)


def test_an_item_without_metadata_is_like_one_without_ratings():
    row = ask("ann", "unheard-of", [0])
    assert (row["item_mean"], row["no_item_mean"], row["log_n_ratings"], row["no_year"]) == (OVERALL, 1, 0, 1)


def test_memories_of_other_users_positions_don_t_count():
    assert ask("bob", "k", [0])["memory_mean_minus_user_mean"] == 0.0  # bob's own row at 0 is his mean, 4
    assert ask("bob", "k", [2])["no_memory"] == 1  # only ann has a row at 2


def test_a_train_rows_own_rating_is_not_in_its_users_mean_and_spread():
    rows = numbers(samples(TRAIN, [[], [], [], []]), leave_own_out=True)
    assert [row["user_mean"] for row in rows] == pytest.approx([2.0, 3.0, 4.0, OVERALL])
    assert [row["user_spread"] for row in rows[:3]] == pytest.approx([1.0, 2.0, 1.0])


@pytest.mark.parametrize("historical_average", ["outside", "train", "all"])
def test_a_train_rows_own_rating_leaves_its_items_mean_only_where_a_test_rows_would_not_be_in_it(historical_average):
    rows = numbers(samples(TRAIN, [[], [], [], []]), historical_average, leave_own_out=True)
    if historical_average == "train":  # item i: ratings 5 and 4; item k: its one rating is the row's own
        assert [row["item_mean"] for row in rows] == pytest.approx([4.0, OVERALL, OVERALL, 5.0])
        assert [row["no_item_mean"] for row in rows] == [0, 1, 1, 0]
        assert rows[0]["log_n_ratings"] == pytest.approx(np.log(2))
    else:
        assert [row["item_mean"] for row in rows] == pytest.approx([4.5, OVERALL, 2.0, 4.5])


def test_a_user_without_traits_is_named():
    with pytest.raises(EvaluationError, match=r"users\.parquet: user cy of the samples is missing"):
        ask("cy", "i", [])
