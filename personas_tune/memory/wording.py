"""From a user's taste to sentences: all text of the template distiller, and words that all distillers share.

Frames are fixed and the vocabulary small, so that a reader (a small language model) finds the same
fact in the same words for every user, and every genre in exactly one grade.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from personas_tune.memory.history import Kind
from personas_tune.memory.taste import Change, Habits, Scale, Scored

MAX_MEMORY_WORDS = 35
MAX_TITLE_WORDS = 11  # with the rating and the average, 20 words

# Grades of a genre by its score, in standard deviations of the residuals; the first that fits counts.
LOVE, LIKE, COOL, DISLIKE = 0.25, 0.1, -0.1, -0.25
# What an era, a person or a word needs to be worth a mention, and how many of a sort are mentioned.
MENTION = {Kind.ERA: 0.1, Kind.PERSON: 0.15, Kind.THEME: 0.25}
MAX_MENTIONS = {Kind.ERA: 2, Kind.PERSON: 3, Kind.THEME: 4}
_LINKS = {Kind.ERA: ("from", "the "), Kind.PERSON: ("with", ""), Kind.THEME: ("about", "")}
SURPRISE = 0.4  # standard deviations

NARROW, WIDE = 0.2, 0.27  # standard deviation of ratings, as a share of the scale's width

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]+")


@dataclass(frozen=True)
class DomainWords:
    """How a domain speaks of its items."""

    item: str
    items: str
    use: str


DOMAINS = {
    "movies": DomainWords(item="film", items="films", use="watch"),
    "generic": DomainWords(item="item", items="items", use="use"),
}


def domain_words(template: str) -> DomainWords:
    """The words of the domain that ``prompt.template`` names; the generic ones for a domain of your own."""
    return DOMAINS.get(template, DOMAINS["generic"])


def label_of(rating: float) -> str:
    """A rating as it stands in prompts: 4, 4.5."""
    return f"{rating:g}"


def count_words(text: str) -> int:
    """Words between white space."""
    return len(text.split())


def shorten(text: str, max_words: int) -> str:
    """The text with single spaces; what is beyond ``max_words`` words becomes ``...``, itself one of them."""
    words = text.split()
    return " ".join(words if len(words) <= max_words else [*words[: max_words - 1], "..."])


def squeeze(text: str) -> str:
    """The text on one line with single spaces, without control characters and halves of characters."""
    whole = text.encode("utf-8", errors="ignore").decode("utf-8")
    return " ".join(_CONTROL.sub(" ", whole).split())


def write_profile(sentences: Sequence[str], max_words: int) -> str:
    """Join sentences in order, leaving out those that would exceed ``max_words``."""
    kept: list[str] = []
    left = max_words
    for sentence in sentences:
        if sentence and count_words(sentence) <= left:
            kept.append(sentence)
            left -= count_words(sentence)
    return " ".join(kept)


def no_history_sentence(words: DomainWords) -> str:
    """The whole profile of a user who has not rated anything yet."""
    return f"I have not rated any {words.items} yet."


def habit_sentences(habits: Habits, scale: Scale, words: DomainWords) -> list[str]:
    """How many, how high, how spread."""
    items = words.item if habits.n == 1 else words.items
    spread = habits.sd / scale.width
    width = "narrow" if spread < NARROW else "wide" if spread >= WIDE else "moderate"
    return [
        f"I have rated {habits.n} {items} and give {habits.mean:.2f} on average{_against_others(habits.offset)}.",
        f"I mostly give {label_of(habits.mode)}; {_percent(habits.top_share)} are {label_of(scale.max)} and "
        f"{_percent(habits.low_share)} {label_of(scale.low)} or less, a {width} spread.",
    ]


def genre_sentences(genres: Sequence[Scored]) -> list[str]:
    """Every genre in exactly one grade, from loved to disliked."""
    frames = {
        "love": "I love {}.",
        "like": "I like {}.",
        "neutral": "I am neutral about {}.",
        "cool": "I am cool about {}.",
        "dislike": "I dislike {}.",
    }
    graded: dict[str, list[str]] = {grade: [] for grade in frames}
    for genre in genres:
        graded[grade_of(genre.score)].append(genre.name)
    graded["dislike"].reverse()  # the most disliked first
    graded["cool"].reverse()
    return [frames[grade].format(enumerate_words(names)) for grade, names in graded.items() if names]


def mention_sentence(kind: Kind, features: Sequence[Scored], words: DomainWords) -> str:
    """The eras, people or themes that stand out, liked and disliked; empty if none does."""
    liked = [feature.name for feature in features if feature.score >= MENTION[kind]][: MAX_MENTIONS[kind]]
    disliked = [feature.name for feature in reversed(features) if feature.score <= -MENTION[kind]][: MAX_MENTIONS[kind]]
    link, article = _LINKS[kind]
    if not liked:
        return f"I dislike {words.items} {link} {article}{enumerate_words(disliked)}." if disliked else ""
    contrast = f" and dislike {article}{enumerate_words(disliked)}" if disliked else ""
    return f"I like {words.items} {link} {article}{enumerate_words(liked)}{contrast}."


def trait_sentence(activity: int, conformity: int, diversity: int, words: DomainWords) -> str:
    """The tiers 1-3 of a user's traits in words."""
    amount = {1: "few", 2: "many", 3: "very many"}[activity]
    crowd = {1: "agree with the crowd", 2: "partly agree with the crowd", 3: "go my own way"}[conformity]
    taste = {1: "narrow", 2: "mixed", 3: "broad"}[diversity]
    return f"I {words.use} {amount} {words.items}, {crowd} and have a {taste} taste."


def change_sentence(change: Change, words: DomainWords) -> str:
    """What is different lately; empty if nothing clearly is."""
    parts = []
    if change.rating is not None:
        parts.append(f"give {abs(change.rating):.1f} {_more_or_less(change.rating)}")
    if change.genre is not None:
        parts.append(f"{words.use} more {change.genre}")
    return f"Lately I {' and '.join(parts)}." if parts else ""


def rating_fact(title: str, rating: float, top: float, others: float | None) -> str:
    """How a memory begins: ``I gave Heat (1995) 4 of 5; others give it 3.9.``"""
    average = "" if others is None else f"; others give it {others:.1f}"
    return f"I gave {shorten(title, MAX_TITLE_WORDS)} {label_of(rating)} of {label_of(top)}{average}."


def write_memory(
    title: str,
    rating: float,
    top: float,
    others: float | None,
    surprise: float,
    reasons: Sequence[tuple[Kind, Scored]],
    max_words: int,
) -> str:
    """One rating, what others give, and why: ``I gave Heat (1995) 4 of 5; others give it 3.9. ...``.

    Args:
        title: Of the item; shortened to ``MAX_TITLE_WORDS`` words.
        rating: The user's.
        top: The highest possible rating.
        others: The item's average, if known.
        surprise: The rating minus what was to be expected, in standard deviations.
        reasons: The item's features with their scores, the best-liked first.
        max_words: Bound on the whole text; the reason is left out where it doesn't fit.
    """
    bound = min(max_words, MAX_MEMORY_WORDS)
    fact = rating_fact(title, rating, top, others)
    for n_reasons in (2, 1, 0):
        text = f"{fact} {_reason(surprise, reasons, n_reasons)}"
        if count_words(text) <= bound:
            return text
    return fact


def grade_of(score: float) -> str:
    """love, like, neutral, cool or dislike."""
    if score >= LIKE:
        return "love" if score >= LOVE else "like"
    if score <= COOL:
        return "dislike" if score <= DISLIKE else "cool"
    return "neutral"


def enumerate_words(names: Sequence[str]) -> str:
    """``A``, ``A and B``, ``A, B and C``."""
    if len(names) < 2:
        return "".join(names)
    return f"{', '.join(names[:-1])} and {names[-1]}"


def _reason(surprise: float, reasons: Sequence[tuple[Kind, Scored]], n: int) -> str:
    pros = [(kind, feature) for kind, feature in reasons if feature.score >= _notable(kind)][:n]
    cons = [(kind, feature) for kind, feature in reversed(reasons) if feature.score <= -_notable(kind)][:n]
    if surprise >= SURPRISE:
        return "Better than I expected" + _because(pros, cons)
    if surprise <= -SURPRISE:
        return "Worse than I expected" + _because(cons, pros)
    if pros and cons:
        return f"As I expected: I {_attitudes(pros[:1])} but {_attitudes(cons[:1])}."
    return "As I expected" + _because(pros or cons, [])


def _because(grounds: Sequence[tuple[Kind, Scored]], obstacles: Sequence[tuple[Kind, Scored]]) -> str:
    if grounds:
        return f": I {_attitudes(grounds)}."
    return f", although I {_attitudes(obstacles)}." if obstacles else "."


def _notable(kind: Kind) -> float:
    return LIKE if kind == Kind.GENRE else MENTION[kind]


def _attitudes(features: Sequence[tuple[Kind, Scored]]) -> str:
    """``love Crime and Drama``, ``love Crime and like films about war``."""
    verbs = {"love": "love", "like": "like", "cool": "am cool about", "dislike": "dislike"}
    by_verb: dict[str, list[str]] = {}
    for kind, feature in features:
        by_verb.setdefault(verbs[grade_of(feature.score)], []).append(_named(kind, feature.name))
    return " and ".join(f"{verb} {' and '.join(names)}" for verb, names in by_verb.items())


def _named(kind: Kind, name: str) -> str:
    if kind == Kind.THEME:
        return f'"{name}"'
    return f"{_LINKS[kind][1]}{name}" if kind in _LINKS else name


def _against_others(offset: float | None) -> str:
    if offset is None:
        return ""
    if round(abs(offset), 2) == 0:
        return ", the same as others"
    return f", {abs(offset):.2f} {_more_or_less(offset)} than others"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} percent"


def _more_or_less(difference: float) -> str:
    return "more" if difference > 0 else "less"
