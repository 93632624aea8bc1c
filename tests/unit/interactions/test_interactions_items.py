import pytest

from personas_tune.errors import DataError
from personas_tune.interactions.catalogue import join_metadata, place_items
from personas_tune.interactions.items import Item, ItemRow, parse_items
from personas_tune.interactions.titles import split_title


@pytest.mark.parametrize(
    ("written", "title", "year"),
    [
        ("Toy Story (1995)", "Toy Story", 1995),
        ("Name, The (1994)", "The Name", 1994),
        ("Good, the Bad and the Ugly, The (1966)", "The Good, the Bad and the Ugly", 1966),
        ("Postman, The (Postino, Il) (1994)", "The Postman (Postino, Il)", 1994),
        ("Avventura, L' (1960)", "L'Avventura", 1960),
        ("Seven (a.k.a. Se7en) (1995) ", "Seven (a.k.a. Se7en)", 1995),
        ("Fawlty Towers (1975-1979)", "Fawlty Towers", 1975),
        ("Thereby Hangs, Therefore (1980)", "Thereby Hangs, Therefore", 1980),
        ("Babylon 5", "Babylon 5", None),
        ("2001: A Space Odyssey (1968)", "2001: A Space Odyssey", 1968),
        ("(1999)", "(1999)", None),
    ],
)
def test_titles_lose_their_year_and_regain_their_order(written, title, year):
    assert split_title(written) == (title, year)


def parse(*records):
    return [row.item for row in parse_items(enumerate(records, 1), "items")]


def test_missing_values_of_any_kind_are_empty():
    empty = {"item_id": "1", "title": "", "year": None, "genres": float("nan"), "summary": "  ", "cast": []}
    assert parse(empty) == [Item()]


def test_years_may_be_numbers_text_or_dates():
    years = [1995, 1995.0, "1995", "1995-11-22", "1995.0"]
    assert {item.year for item in parse(*({"item_id": n, "year": year} for n, year in enumerate(years)))} == {1995}


def test_genres_are_split_and_counted_once():
    assert parse({"item_id": "1", "genres": "Drama| War|Drama|"})[0].genres == ("Drama", "War")


def test_metadata_fills_only_what_the_log_does_not_tell():
    own = [Item("A", 1990, ("Drama",)), Item("B", None, ()), Item()]
    rows = [
        ItemRow("a", Item("other", 1990, ("War",), "about a", ("x",))),
        ItemRow("b", Item("other", 1980, ("War",))),
        ItemRow("z", Item("nobody rated it")),
    ]
    joined, counts = join_metadata(["a", "b", "c"], own, rows, "meta")
    assert joined == [Item("A", 1990, ("Drama",), "about a", ("x",)), Item("B", 1980, ("War",)), Item()]
    assert (counts.n_joined, counts.n_other_year, counts.n_unknown) == (2, 0, 1)


def test_metadata_of_another_year_is_of_another_item():
    rows = [ItemRow("a", Item("A", 1991, (), "another film")), ItemRow("b", Item(summary="kept"))]
    joined, counts = join_metadata(["a", "b"], [Item("A", 1990), Item("B", 1980)], rows, "meta")
    assert joined == [Item("A", 1990), Item("B", 1980, (), "kept")]
    assert (counts.n_joined, counts.n_other_year, counts.n_unknown) == (1, 1, 0)


def test_rows_about_no_item_of_the_log_are_a_mistake():
    with pytest.raises(DataError, match="none of its 1 items is in the log, whose first id is 'a'"):
        place_items(["a"], [ItemRow("A", Item())], "meta.csv")
