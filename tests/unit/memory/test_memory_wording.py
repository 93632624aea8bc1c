import pytest
from hypothesis import given
from hypothesis import strategies as st

from personas_tune.memory.history import Kind
from personas_tune.memory.taste import Change, Habits, Scale, Scored
from personas_tune.memory.wording import (
    DOMAINS,
    MAX_MEMORY_WORDS,
    change_sentence,
    count_words,
    domain_words,
    enumerate_words,
    genre_sentences,
    grade_of,
    habit_sentences,
    label_of,
    mention_sentence,
    trait_sentence,
    write_memory,
    write_profile,
)

MOVIES = DOMAINS["movies"]
CRIME, DRAMA, HORROR = (
    (Kind.GENRE, Scored("Crime", 0.4)),
    (Kind.GENRE, Scored("Drama", 0.15)),
    (Kind.GENRE, Scored("Horror", -0.5)),
)


def habits(**changes: object) -> Habits:
    usual = {"n": 60, "mean": 3.624, "offset": -0.19, "sd": 1.0, "mode": 4.0, "top_share": 0.125, "low_share": 0.1}
    return Habits(**{**usual, **changes})  # type: ignore[arg-type]


def memory_of(rating: float, surprise: float, *reasons: tuple[Kind, Scored], **changes: object) -> str:
    usual = {"title": "Heat (1995)", "top": 5.0, "others": 3.94, "max_words": 2000}
    return write_memory(rating=rating, surprise=surprise, reasons=reasons, **{**usual, **changes})  # type: ignore[arg-type]


def test_habits_are_told_with_numbers() -> None:
    assert habit_sentences(habits(), Scale(1, 5, 1), MOVIES) == [
        "I have rated 60 films and give 3.62 on average, 0.19 less than others.",
        "I mostly give 4; 12 percent are 5 and 10 percent 2 or less, a moderate spread.",
    ]


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"offset": 0.25}, "on average, 0.25 more than others."),
        ({"offset": -0.001}, "on average, the same as others."),
        ({"offset": None}, "on average."),
        ({"n": 1}, "rated 1 film and"),
        ({"sd": 0.5}, "a narrow spread"),
        ({"sd": 1.5}, "a wide spread"),
        ({"mode": 4.5}, "I mostly give 4.5;"),
    ],
)
def test_habits_in_other_cases(changes: dict[str, object], part: str) -> None:
    assert part in " ".join(habit_sentences(habits(**changes), Scale(1, 5, 1), MOVIES))


def test_half_star_scales_name_their_own_low_ratings() -> None:
    assert "are 5 and 10 percent 1.5 or less" in habit_sentences(habits(), Scale(0.5, 5, 0.5), MOVIES)[1]


@pytest.mark.parametrize(("rating", "label"), [(4.0, "4"), (4.5, "4.5"), (0.5, "0.5"), (10.0, "10"), (100.0, "100")])
def test_labels_have_no_trailing_zero(rating: float, label: str) -> None:
    assert label_of(rating) == label


@pytest.mark.parametrize(
    ("score", "grade"),
    [(0.9, "love"), (0.25, "love"), (0.24, "like"), (0.1, "like"), (0.09, "neutral"), (-0.09, "neutral"),
     (-0.1, "cool"), (-0.24, "cool"), (-0.25, "dislike"), (-0.9, "dislike")],
)  # fmt: skip
def test_grades(score: float, grade: str) -> None:
    assert grade_of(score) == grade


def test_genres_are_listed_by_grade_with_the_strongest_first() -> None:
    scores = {"Crime": 0.5, "War": 0.3, "Drama": 0.2, "Comedy": 0.0, "Musical": -0.2, "Action": -0.3, "Horror": -0.6}
    assert genre_sentences([Scored(name, score) for name, score in scores.items()]) == [
        "I love Crime and War.",
        "I like Drama.",
        "I am neutral about Comedy.",
        "I am cool about Musical.",
        "I dislike Horror and Action.",
    ]


@given(st.dictionaries(st.sampled_from(["Crime", "War", "Drama", "Comedy", "Horror"]), st.floats(-2, 2)))
def test_every_genre_is_in_exactly_one_grade(scores: dict[str, float]) -> None:
    ordered = [Scored(name, score) for name, score in sorted(scores.items(), key=lambda pair: -pair[1])]
    text = " ".join(genre_sentences(ordered))
    assert all(text.count(name) == 1 for name in scores)


@pytest.mark.parametrize(
    ("kind", "scores", "sentence"),
    [
        (
            Kind.ERA,
            {"1980s": 0.3, "1970s": 0.2, "1960s": 0.15, "1990s": -0.3},
            "I like films from the 1980s and 1970s and dislike the 1990s.",
        ),
        (Kind.PERSON, {"Ann Lee": 0.2}, "I like films with Ann Lee."),
        (Kind.THEME, {"jazz": -0.3, "war": -0.4}, "I dislike films about war and jazz."),
        (Kind.THEME, {"jazz": 0.2, "war": -0.2}, ""),
        (Kind.THEME, {}, ""),
    ],
)
def test_only_what_stands_out_is_mentioned(kind: Kind, scores: dict[str, float], sentence: str) -> None:
    assert mention_sentence(kind, [Scored(name, score) for name, score in scores.items()], MOVIES) == sentence


def test_traits_in_words() -> None:
    assert trait_sentence(1, 1, 1, MOVIES) == "I watch few films, agree with the crowd and have a narrow taste."
    assert trait_sentence(3, 3, 3, DOMAINS["generic"]) == "I use very many items, go my own way and have a broad taste."


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (Change(-0.42, None), "Lately I give 0.4 less."),
        (Change(0.42, "Drama"), "Lately I give 0.4 more and watch more Drama."),
        (Change(None, None), ""),
    ],
)
def test_changes_in_words(change: Change, sentence: str) -> None:
    assert change_sentence(change, MOVIES) == sentence


def test_a_domain_of_ones_own_gets_the_generic_words() -> None:
    assert domain_words("books") == DOMAINS["generic"]


@pytest.mark.parametrize(
    ("surprise", "reasons", "reason"),
    [
        (1.0, [CRIME, DRAMA], "Better than I expected: I love Crime and like Drama."),
        (1.0, [HORROR], "Better than I expected, although I dislike Horror."),
        (0.0, [CRIME, HORROR], "As I expected: I love Crime but dislike Horror."),
        (0.0, [CRIME], "As I expected: I love Crime."),
        (-1.0, [CRIME, HORROR], "Worse than I expected: I dislike Horror."),
        (-1.0, [CRIME], "Worse than I expected, although I love Crime."),
        (-1.0, [], "Worse than I expected."),
        (0.0, [(Kind.GENRE, Scored("War", 0.05))], "As I expected."),
        (1.0, [CRIME, (Kind.ERA, Scored("1990s", 0.3))], "Better than I expected: I love Crime and the 1990s."),
        (1.0, [(Kind.THEME, Scored("heist", 0.3)), (Kind.PERSON, Scored("Ann Lee", 0.2))],
         'Better than I expected: I love "heist" and like Ann Lee.'),
    ],
)  # fmt: skip
def test_memories_give_the_reason(surprise: float, reasons: list[tuple[Kind, Scored]], reason: str) -> None:
    assert memory_of(4.0, surprise, *reasons) == f"I gave Heat (1995) 4 of 5; others give it 3.9. {reason}"


def test_a_memory_without_average_does_not_invent_one() -> None:
    assert memory_of(4.5, 0.0, others=None) == "I gave Heat (1995) 4.5 of 5. As I expected."


@given(
    title=st.lists(st.sampled_from(["The", "Long", "Title", "(1995)"]), min_size=1, max_size=60).map(" ".join),
    n_reasons=st.integers(0, 4),
    surprise=st.floats(-2, 2),
    max_words=st.integers(20, 60),
)
def test_memories_keep_to_their_bound_and_state_the_rating(
    title: str, n_reasons: int, surprise: float, max_words: int
) -> None:
    reasons = [(Kind.PERSON, Scored("A Person Of Very Many Names And Titles", 0.4 - 0.2 * n)) for n in range(n_reasons)]
    memory = memory_of(4.0, surprise, *reasons, title=title, max_words=max_words)
    assert count_words(memory) <= min(max_words, MAX_MEMORY_WORDS)
    assert " 4 of 5; others give it 3.9." in memory


def test_a_profile_leaves_out_the_sentences_that_do_not_fit() -> None:
    assert write_profile(["one two three.", "four five six.", "", "seven."], max_words=4) == "one two three. seven."


@pytest.mark.parametrize(
    ("names", "text"), [([], ""), (["A"], "A"), (["A", "B"], "A and B"), (["A", "B", "C"], "A, B and C")]
)
def test_enumerations(names: list[str], text: str) -> None:
    assert enumerate_words(names) == text
