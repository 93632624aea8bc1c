import numpy as np
import pytest
from memory_tables import interactions_table, items_table, random_log

from personas_tune.errors import DataError
from personas_tune.memory.history import Kind, read_histories, train_rows, words_of


def test_only_train_rows_are_read_and_sorted_by_position() -> None:
    rows = [
        ("u", "c", 3.0, 2, "test"),
        ("u", "b", 2.0, 1, "train"),
        ("t", "a", 5.0, 0, "train"),
        ("u", "a", 1.0, 0, "train"),
    ]
    train = train_rows(interactions_table(rows))
    assert train["user_id"].to_pylist() == ["t", "u", "u"]
    assert train["position"].to_pylist() == [0, 0, 1]


def test_items_of_test_rows_alone_are_not_in_the_catalogue() -> None:
    interactions, items, _ = random_log(seed=1)
    _, catalogue = read_histories(interactions, items, ["u0", "u1", "u2"])
    assert catalogue.ids == sorted(set(train_rows(interactions)["item_id"].to_pylist()))


def test_a_user_without_train_rows_has_an_empty_history() -> None:
    interactions = interactions_table([("u", "a", 3.0, 0, "train"), ("v", "a", 3.0, 0, "test")])
    histories, _ = read_histories(interactions, items_table([{"item_id": "a"}]), ["u", "v"])
    assert [history.ratings.tolist() for history in histories] == [[3.0], []]


def test_features_are_genres_decades_people_and_content_words() -> None:
    item = {
        "item_id": "a", "title": "Heat", "year": 1995, "genres": ["Crime", "Crime"], "cast": ["Al Pacino"],
        "summary": "A detective and his rival: a detective story.", "mean_rating": 3.9, "n_ratings": 12,
    }  # fmt: skip
    _, catalogue = read_histories(interactions_table([("u", "a", 4.0, 0, "train")]), items_table([item]), ["u"])
    features = {(Kind(kind), name) for kind, name in zip(catalogue.kinds, catalogue.features, strict=True)}
    assert features == {
        (Kind.GENRE, "Crime"), (Kind.ERA, "1990s"), (Kind.PERSON, "Al Pacino"),
        (Kind.THEME, "detective"), (Kind.THEME, "rival"),
    }  # fmt: skip
    assert catalogue.titles == ["Heat (1995)"]
    assert catalogue.item_features[0].tolist() == list(range(5))


def test_a_title_that_has_its_year_keeps_it_once() -> None:
    items = items_table([{"item_id": "a", "title": "Heat (1995)", "year": 1995}])
    _, catalogue = read_histories(interactions_table([("u", "a", 4.0, 0, "train")]), items, ["u"])
    assert catalogue.titles == ["Heat (1995)"]


def test_an_item_without_average_has_nan() -> None:
    items = items_table([{"item_id": "a"}])
    _, catalogue = read_histories(interactions_table([("u", "a", 4.0, 0, "train")]), items, ["u"])
    assert np.isnan(catalogue.means).tolist() == [True]


def test_an_unknown_item_is_named() -> None:
    with pytest.raises(DataError, match=r"1 items of the interactions are missing, such as b"):
        read_histories(interactions_table([("u", "b", 4.0, 0, "train")]), items_table([{"item_id": "a"}]), ["u"])


def test_words_are_lower_case_unique_and_without_stopwords() -> None:
    assert words_of("The Spy's heist: a HEIST in the 1990s, no less.") == ["spy", "heist", "less"]
