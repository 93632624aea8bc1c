import pyarrow as pa
import pytest

from personas_tune.errors import DataError
from personas_tune.retrieval.texts import ProfilesInTime, RetrievalTexts, item_text

HEAT = {"title": "Heat", "year": 1995, "genres": ["Crime", "Drama"], "summary": "A chase.", "cast": ["Al Pacino"]}
OF_ITEM = {"i1": "Heat", "i2": "Alien"}
PROFILES = pa.table(
    {"user_id": ["u", "u", "v"], "upto_position": [6, 3, 2], "profile": ["all six", "first three", "first two"]}
)
MEMORIES = pa.table({"user_id": ["u", "u"], "item_id": ["i2", "i1"], "position": [0, 4], "memory": ["too dark", None]})
SAMPLES = pa.table(
    {"user_id": ["u", "u", "u", "v", "w"], "position": [2, 3, 9, 9, 9], "item_id": ["i1", "i2", "i1", "i1", "i2"]}
)


def test_an_items_text_holds_what_is_known_of_it():
    assert item_text(HEAT) == "Heat. 1995. Crime, Drama. A chase. Al Pacino"
    nothing = {"title": "Heat", "year": None, "genres": None, "summary": None, "cast": []}
    assert item_text(nothing) == "Heat"
    assert item_text({**nothing, "title": None}) == ""


def test_an_items_text_holds_no_average():
    assert item_text({**HEAT, "mean_rating": 4.25, "n_ratings": 77}) == item_text(HEAT)


def test_a_profile_before_a_position_was_written_without_it():
    profiles = ProfilesInTime(PROFILES)
    assert [profiles.before("u", position) for position in (0, 2, 3, 5, 6, 9)] == [
        "", "", "first three", "first three", "all six", "all six",
    ]  # fmt: skip
    assert profiles.final("u") == "all six"
    assert profiles.final("nobody") == profiles.before("nobody", 9) == ""


def test_query_item_compares_items_with_items():
    texts = RetrievalTexts("item", OF_ITEM)
    assert texts.keys(MEMORIES) == ["Alien", "Heat"]
    assert texts.queries(SAMPLES) == ["Heat", "Alien", "Heat", "Heat", "Alien"]
    assert texts.to_fit(SAMPLES.slice(1, 2), MEMORIES) == ["Heat", "Alien"]


def test_query_user_and_item_adds_profile_and_memory():
    texts = RetrievalTexts("user_and_item", OF_ITEM, ProfilesInTime(PROFILES), "before_target")
    assert texts.keys(MEMORIES) == ["Alien. too dark", "Heat. "]
    assert texts.queries(SAMPLES) == [" Heat", "first three Alien", "all six Heat", "first two Heat", " Alien"]
    final = RetrievalTexts("user_and_item", OF_ITEM, ProfilesInTime(PROFILES))
    assert final.queries(SAMPLES)[:2] == ["all six Heat", "all six Alien"]
    assert final.to_fit(SAMPLES, MEMORIES) == final.keys(MEMORIES)


def test_an_item_without_a_row_is_named():
    with pytest.raises(DataError, match="item i9: this item has no row"):
        RetrievalTexts("item", OF_ITEM).queries(pa.table({"item_id": ["i9"]}))
