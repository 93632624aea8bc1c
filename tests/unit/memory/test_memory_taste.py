import math
from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_tables import interactions_table, items_table, random_log

from personas_tune.memory.history import Catalogue, History, Kind, read_histories
from personas_tune.memory.taste import MAX_THEME_SHARE, MIN_EVIDENCE, SHRINKAGE, Scale, TasteReader

FIVE_STARS = Scale(1, 5, 1)


def reader_of(ratings: list[float], items: list[dict], scale: Scale = FIVE_STARS) -> TasteReader:
    """A user who rated the given items in this order."""
    items = [{"item_id": f"i{number:03}", **item} for number, item in enumerate(items)]
    rows = [
        ("u", item["item_id"], rating, row, "train")
        for row, (item, rating) in enumerate(zip(items, ratings, strict=True))
    ]
    histories, catalogue = read_histories(interactions_table(rows), items_table(items), ["u"])
    return TasteReader(histories[0], catalogue, scale)


def genre(name: str, mean: float | None = None, count: int = 0) -> dict:
    return {"genres": [name], "mean_rating": mean, "n_ratings": count}


def test_habits_match_a_hand_computed_case() -> None:
    reader = reader_of([5, 4, 4, 1], [genre("A", 4.0, 9), genre("A", 3.0, 9), genre("A"), genre("A", 2.0, 9)])
    habits = reader.habits(4)
    assert (habits.n, habits.mean, habits.mode) == (4, 3.5, 4.0)
    assert habits.offset == pytest.approx((1 + 1 - 1) / 3)  # the third item has no average
    assert habits.sd == pytest.approx(1.5)
    assert (habits.top_share, habits.low_share) == (0.25, 0.25)


def test_habits_without_any_average_have_no_offset() -> None:
    assert reader_of([5], [genre("A")]).habits(1).offset is None


@pytest.mark.parametrize(
    ("scale", "low"), [(FIVE_STARS, 2), (Scale(0.5, 5, 0.5), 1.5), (Scale(0, 1, 1), 0), (Scale(0, 100, 10), 20)]
)
def test_the_lowest_quarter_ends_at_a_label(scale: Scale, low: float) -> None:
    assert scale.low == pytest.approx(low)


def test_scores_match_a_hand_computed_case() -> None:
    # No averages: residuals are +2, +2, +2, -2, -2, -2; their prior spread is 0.2 * 4 = 0.8.
    reader = reader_of([5, 5, 5, 1, 1, 1], [genre("A")] * 3 + [genre("B")] * 3)
    sd = math.sqrt((6 * 4 + 5 * 0.64) / (6 + 5))
    assert [(taste.name, taste.score) for taste in reader.tastes(6)[Kind.GENRE]] == [
        ("A", pytest.approx(3 * 2 / (3 + 5) / sd)),
        ("B", pytest.approx(-3 * 2 / (3 + 5) / sd)),
    ]


def test_what_the_items_averages_explain_is_not_taste() -> None:
    # Averages of very many ratings, and the user gives exactly half a star more.
    reader = reader_of([4.5, 4.5, 4.5, 2.5, 2.5, 2.5], [genre("A", 4.0, 10**9)] * 3 + [genre("B", 2.0, 10**9)] * 3)
    assert all(abs(taste.score) < 1e-6 for taste in reader.tastes(6)[Kind.GENRE])


def test_features_with_too_little_evidence_are_not_listed() -> None:
    reader = reader_of([5, 5, 5, 1, 1], [genre("A")] * 3 + [genre("B")] * 2)
    assert [taste.name for taste in reader.tastes(5)[Kind.GENRE]] == ["A"]
    assert reader.tastes(2)[Kind.GENRE] == []


def test_of_words_that_always_come_together_one_is_listed() -> None:
    items = [{"summary": "bank heist"}] * 3 + [{"summary": "jazz"}] * 7
    assert [theme.name for theme in reader_of([5] * 3 + [1] * 7, items).tastes(10)[Kind.THEME]] == ["bank"]


def test_a_word_of_most_summaries_is_no_theme() -> None:
    items = [{"summary": "bank"}] * 3 + [{"summary": "jazz"}] * 7
    reader = reader_of([5] * 3 + [1] * 7, items)
    assert "jazz" not in [theme.name for theme in reader.tastes(10)[Kind.THEME]]


def test_reasons_are_the_features_of_the_latest_item() -> None:
    reader = reader_of([5, 5, 5, 1, 1, 1], [genre("A")] * 3 + [genre("B")] * 3)
    assert [(kind, reason.name) for kind, reason in reader.reasons(6)] == [(Kind.GENRE, "B")]
    assert reader.reasons(4) == []


def test_the_first_rating_is_compared_with_the_items_average() -> None:
    reader = reader_of([5], [genre("A", 3.8, 10**9)])
    # The user's own average counts for 1 of 6: expected is 3.8 + 1.2 / 6 = 4.0.
    sd = math.sqrt(5 * 0.64 / 6)
    assert reader.surprise(1) == pytest.approx(1.0 / sd)


def test_a_clear_fall_in_the_last_third_is_reported() -> None:
    reader = reader_of([5] * 20 + [2] * 10, [genre("A")] * 30)
    assert reader.change(30).rating == pytest.approx(-3.0)
    assert reader.change(30).genre is None
    assert reader.change(20).rating is None


def test_a_genre_that_takes_over_is_reported() -> None:
    reader = reader_of([4] * 30, [genre("A")] * 20 + [genre("B")] * 10)
    assert reader.change(30).genre == "B"


def test_a_fall_that_the_items_explain_is_no_change() -> None:
    reader = reader_of([5] * 20 + [2] * 10, [genre("A", 4.5, 10**9)] * 20 + [genre("A", 1.5, 10**9)] * 10)
    assert reader.change(30).rating is None


def plain_tastes(history: History, catalogue: Catalogue, upto: int) -> dict[Kind, dict[str, float]]:
    """The definition in the module's docstring, item by item."""
    ratings = [float(rating) for rating in history.ratings[:upto]]
    means = [float(catalogue.means[item]) for item in history.items[:upto]]
    weights = [float(c / (c + SHRINKAGE)) for c in catalogue.counts[history.items[:upto]]]
    known = [mean for mean in means if not math.isnan(mean)]
    others = sum(known) / len(known) if known else 0.0
    explained = [0.0 if math.isnan(m) else w * (m - others) for m, w in zip(means, weights, strict=True)]
    rest = [rating - part for rating, part in zip(ratings, explained, strict=True)]
    residuals = [value - sum(rest) / upto for value in rest]
    sd = math.sqrt((sum(value**2 for value in residuals) + SHRINKAGE * 0.8**2) / (upto + SHRINKAGE))
    found = defaultdict(list)
    for item, residual in zip(history.items, residuals, strict=False):
        for feature in catalogue.item_features[item]:
            found[Kind(catalogue.kinds[feature]), catalogue.features[feature]].append(residual)
    tastes: dict[Kind, dict[str, float]] = {kind: {} for kind in Kind}
    for (kind, name), values in found.items():
        is_grammar = kind == Kind.THEME and len(values) > max(MIN_EVIDENCE[kind], MAX_THEME_SHARE * upto)
        if len(values) >= MIN_EVIDENCE[kind] and not is_grammar:
            tastes[kind][name] = sum(values) / (len(values) + SHRINKAGE) / sd
    return tastes


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), upto=st.integers(1, 17))
def test_tastes_equal_the_plain_definition(seed: int, upto: int) -> None:
    interactions, items, _ = random_log(seed)
    histories, catalogue = read_histories(interactions, items, ["u0", "u1", "u2"])
    for history in histories:
        plain = plain_tastes(history, catalogue, upto)
        tastes = TasteReader(history, catalogue, FIVE_STARS).tastes(upto)
        for kind in Kind:
            found = {taste.name: taste.score for taste in tastes[kind]}
            assert found == {name: pytest.approx(plain[kind][name], abs=1e-9) for name in found}
            dropped = [plain[kind][name] for name in plain[kind].keys() - found.keys()]
            twins = [pytest.approx(score, abs=1e-9) for score in found.values()] if kind == Kind.THEME else []
            assert all(score in twins for score in dropped)
            scores = [taste.score for taste in tastes[kind]]
            assert scores == sorted(scores, reverse=True)


def test_equal_ratings_without_averages_give_scores_of_zero() -> None:
    reader = reader_of([3] * 6, [genre("A")] * 3 + [genre("B")] * 3)
    assert [taste.score for taste in reader.tastes(6)[Kind.GENRE]] == [0.0, 0.0]
    assert np.isfinite(reader.surprise(6))
